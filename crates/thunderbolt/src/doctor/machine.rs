//! Checks of one host, whatever its system.

use super::{Findings, Verdict, gigabytes};
use crate::facts::{Facts, Firewall, System};

/// A rank has a few sockets per peer and maps a few files; macOS starts programs with 256.
const LEAST_OPEN_FILES: u64 = 256;

pub(super) fn examine(facts: &Facts, findings: &mut Findings<'_>) {
    let host = facts.host.as_str();
    match &facts.system {
        System::Other(system) => {
            findings.fail(host, "system", format!("{system} is neither macOS nor Linux"), "leave this host out")
        }
        _ if !facts.complete => findings.warn(
            host,
            "answer",
            "the host did not answer everything in time; what is missing below was not asked",
            "run this again; a host under load may take longer than 20 s",
        ),
        _ => findings.ok(host, "answer", "complete"),
    }
    version(facts, findings);
    match facts.disk_free_bytes {
        None => findings.cannot_tell(host, "disk space", facts.why("disk")),
        Some(free) if free < findings.expected.disk_bytes => {
            let needed = gigabytes(findings.expected.disk_bytes);
            let found = format!("{} free, {needed} wanted", gigabytes(free));
            findings.warn(host, "disk space", found, "make room: a checkpoint that does not fit ends the run");
        }
        Some(free) => findings.ok(host, "disk space", format!("{} free", gigabytes(free))),
    }
    match facts.open_files {
        None => findings.cannot_tell(host, "open files", facts.why("files")),
        Some(count) if count < LEAST_OPEN_FILES => findings.warn(
            host,
            "open files",
            format!("at most {count}"),
            "raise the limit: `ulimit -n 1024` in the shell's profile, or limits.conf",
        ),
        Some(u64::MAX) => findings.ok(host, "open files", "unlimited"),
        Some(count) => findings.ok(host, "open files", format!("at most {count}")),
    }
    firewall(facts, findings);
    ports(facts, findings);
}

fn version(facts: &Facts, findings: &mut Findings<'_>) {
    let (host, wanted) = (facts.host.as_str(), findings.expected.version.clone());
    match &facts.finetune {
        None => findings.fail(
            host,
            "finetune",
            format!("not found: {}", facts.why("version")),
            "copy this program to the same path there; a shell that ssh starts may have a shorter PATH than yours",
        ),
        Some(build) if build.version != wanted => findings.fail(
            host,
            "finetune",
            format!("{:?} there, {wanted:?} here", build.version),
            "ranks of different versions refuse each other: install the same one everywhere",
        ),
        Some(build) => findings.ok(host, "finetune", build.version.clone()),
    }
}

fn firewall(facts: &Facts, findings: &mut Findings<'_>) {
    let host = facts.host.as_str();
    match &facts.firewall {
        None => findings.cannot_tell(host, "firewall", facts.why("firewall")),
        Some(Firewall::Off) => findings.ok(host, "firewall", "off"),
        Some(Firewall::BlocksAll) => findings.fail(
            host,
            "firewall",
            "it lets no connection in",
            "System Settings, Network, Firewall, Options: switch \"Block all incoming connections\" off",
        ),
        Some(Firewall::On(name)) => findings.warn(
            host,
            "firewall",
            format!("{name} is on"),
            match facts.system {
                System::Mac => "allow finetune to take connections (System Settings, Network, Firewall, Options): nobody can answer its question over ssh",
                _ => "let TCP connections from the other hosts in; ranks choose their ports, only the first rank's can be given",
            },
        ),
    }
}

fn ports(facts: &Facts, findings: &mut Findings<'_>) {
    let host = facts.host.as_str();
    let Some(listening) = &facts.listening else {
        if !findings.expected.ports.is_empty() {
            findings.cannot_tell(host, "ports", facts.why("listening"));
        }
        return;
    };
    for port in findings.expected.ports.clone() {
        match listening.contains(&port) {
            true => findings.fail(
                host,
                "ports",
                format!("port {port} is in use"),
                "an earlier run may still be there; end it, or choose another port",
            ),
            false => findings.add(host, "ports", Verdict::Ok, format!("port {port} is free"), ""),
        }
    }
}
