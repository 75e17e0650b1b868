//! Checks that compare hosts.

use std::collections::BTreeMap;

use finetune_advice::Advice as _;

use super::Findings;
use crate::discover::{Discovery, meeting_point};
use crate::facts::{Facts, System};

const ALL: &str = "all";
/// Seconds. Nothing in a run depends on the time of day, but logs are read side by side.
const MOST_CLOCK_DIFFERENCE: f64 = 2.0;

pub(super) fn examine(discovery: &Discovery, findings: &mut Findings<'_>) {
    for error in &discovery.unreachable {
        let host = error.host().unwrap_or(ALL);
        findings.fail(host, "ssh", error.to_string(), &error.hints().join("; "));
    }
    for facts in &discovery.hosts {
        let found = match finetune_rendezvous::is_this_host(&facts.host) {
            true => "this machine",
            false => "works without a password",
        };
        findings.ok(&facts.host, "ssh", found);
    }
    for (first, other) in &discovery.same_machine {
        let found = format!("{first} and {other} are one machine");
        findings.fail(ALL, "hosts", found, "leave one of the names out");
    }
    if discovery.hosts.len() < 2 {
        return;
    }
    systems(&discovery.hosts, findings);
    programs(&discovery.hosts, findings);
    clocks(&discovery.hosts, findings);
    network(discovery, findings);
    if discovery.hosts.iter().all(|facts| facts.system == System::Mac) {
        cables(discovery, findings);
    }
}

fn systems(hosts: &[Facts], findings: &mut Findings<'_>) {
    let macs: Vec<&Facts> = hosts.iter().filter(|facts| facts.system == System::Mac).collect();
    if !macs.is_empty() && macs.len() < hosts.len() {
        findings.no_rdma(ALL, "systems", "Macs and others", "between a Mac and another system there is no RDMA");
    }
    let build = |facts: &&Facts| facts.system_build.clone();
    if let Some(groups) = groups(&macs, build) {
        findings.warn(
            ALL,
            "macOS builds",
            groups,
            "bring all Macs to the same version: RDMA between different ones is known to fail",
        );
    } else if macs.len() > 1 {
        findings.ok(ALL, "macOS builds", "the same everywhere");
    }
}

fn programs(hosts: &[Facts], findings: &mut Findings<'_>) {
    let all: Vec<&Facts> = hosts.iter().collect();
    // Builds for different processors cannot be the same bytes.
    let kinds: BTreeMap<String, Vec<&Facts>> = all.iter().fold(BTreeMap::new(), |mut kinds, facts| {
        kinds.entry(format!("{:?} {}", facts.system, facts.architecture)).or_default().push(*facts);
        kinds
    });
    for alike in kinds.values() {
        let checksum = |facts: &&Facts| {
            let (checksum, bytes) = facts.finetune.as_ref()?.checksum?;
            Some(format!("{checksum:08x} ({bytes} bytes)"))
        };
        if let Some(groups) = groups(alike, checksum) {
            findings.warn(ALL, "same program", groups, "copy one build to all hosts of a kind");
        } else if alike.len() > 1 && alike.iter().all(|facts| checksum(facts).is_some()) {
            findings.ok(ALL, "same program", "byte for byte");
        }
    }
}

/// "a: mini-1, mini-2; b: mini-3" if there is more than one value among those that are known.
fn groups(hosts: &[&Facts], value: impl Fn(&&Facts) -> Option<String>) -> Option<String> {
    let mut groups: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for facts in hosts {
        if let Some(value) = value(facts) {
            groups.entry(value).or_default().push(&facts.host);
        }
    }
    let words: Vec<String> = groups.iter().map(|(value, hosts)| format!("{value}: {}", hosts.join(", "))).collect();
    (groups.len() > 1).then(|| words.join("; "))
}

fn clocks(hosts: &[Facts], findings: &mut Findings<'_>) {
    let known: Vec<_> = hosts.iter().filter_map(|facts| Some((facts, facts.clock?))).collect();
    let least = known.iter().min_by(|a, b| a.1.ahead.total_cmp(&b.1.ahead));
    let most = known.iter().max_by(|a, b| a.1.ahead.total_cmp(&b.1.ahead));
    let (Some((slow, behind)), Some((fast, ahead))) = (least, most) else {
        findings.cannot_tell(ALL, "clocks", "no host tells the time");
        return;
    };
    let (difference, error) = (ahead.ahead - behind.ahead, ahead.error + behind.error);
    let found = format!("{} is {difference:.1} s ahead of {} (± {error:.1} s)", fast.host, slow.host);
    match difference - error > MOST_CLOCK_DIFFERENCE {
        true => {
            findings.warn(ALL, "clocks", found, "set them by the network (System Settings, Date & Time; timedatectl)")
        }
        false => findings.ok(ALL, "clocks", format!("at most {:.1} s apart", difference + error)),
    }
}

fn network(discovery: &Discovery, findings: &mut Findings<'_>) {
    let meeting = meeting_point(&discovery.hosts);
    let addresses: Vec<&str> = meeting.of_hosts.iter().flatten().map(String::as_str).collect();
    match meeting.notes.is_empty() {
        true => findings.ok(ALL, "network", format!("in common: {}", addresses.join(" "))),
        false => findings.warn(
            ALL,
            "network",
            meeting.notes.join("; "),
            "join all hosts to one Ethernet network, if you can",
        ),
    }
}

fn cables(discovery: &Discovery, findings: &mut Findings<'_>) {
    let sentences = discovery.sentences();
    let found = sentences.first().cloned().unwrap_or_default();
    if !discovery.hosts.iter().any(|facts| facts.ports.is_some()) {
        return;
    }
    match discovery.shape.is_mesh() || discovery.shape.is_ring() {
        true => findings.ok(ALL, "cabling", found),
        false => findings.no_rdma(ALL, "cabling", found, &sentences[1..].join(" ")),
    }
}
