//! Checks of one Mac.

use super::Findings;
use crate::discover::Discovery;
use crate::facts::{Facts, Medium};
use crate::shape::Form;

/// The first version with RDMA over Thunderbolt (Apple TN3205).
const FIRST_VERSION: (u32, u32) = (26, 2);

pub(super) fn examine(discovery: &Discovery, host: usize, findings: &mut Findings<'_>) {
    let facts = &discovery.hosts[host];
    version(facts, findings);
    if discovery.hosts.len() > 1 || facts.ports.is_some() {
        thunderbolt(facts, findings);
        rdma(facts, findings);
        bridge(discovery, host, findings);
    }
    power(facts, findings);
}

fn version(facts: &Facts, findings: &mut Findings<'_>) {
    let host = facts.host.as_str();
    if facts.architecture != "arm64" {
        let found = format!("{}, not Apple silicon", facts.architecture);
        findings.no_rdma(host, "processor", found, "RDMA over Thunderbolt is for Macs with Apple silicon");
    }
    match (facts.mac_version(), &facts.release) {
        (Some(version), Some(release)) if version < FIRST_VERSION => {
            let found = format!("macOS {release}");
            findings.no_rdma(host, "macOS", found, "RDMA over Thunderbolt begins with macOS 26.2: update");
        }
        (Some(_), Some(release)) => findings.ok(host, "macOS", release.clone()),
        _ => findings.cannot_tell(host, "macOS", facts.why("release")),
    }
}

fn thunderbolt(facts: &Facts, findings: &mut Findings<'_>) {
    let host = facts.host.as_str();
    let Some(ports) = &facts.ports else {
        findings.cannot_tell(host, "Thunderbolt", facts.why("thunderbolt"));
        return;
    };
    let found = format!("{} ports", ports.len());
    match facts.has_thunderbolt_5() {
        Some(true) => findings.ok(host, "Thunderbolt", format!("{found}, Thunderbolt 5")),
        // A switch in Recovery does nothing for these.
        Some(false) => findings.no_rdma(
            host,
            "Thunderbolt",
            format!("{found}, none above 40 Gb/s: Thunderbolt 4 or older"),
            "this Mac has no RDMA, whatever `rdma_ctl status` says; TCP over the cables works",
        ),
        None => findings.cannot_tell(host, "Thunderbolt", &format!("{found} of unknown speed")),
    }
    let without = ports.iter().filter(|port| !port.far.is_empty() && port.interface.is_none()).count();
    if without > 0 {
        let found = format!("{without} cabled ports have no network interface: {}", facts.why("ports"));
        let next = "System Settings, Network: add a service for each Thunderbolt port; `networksetup -detectnewhardware` may do";
        findings.warn(host, "port interfaces", found, next);
    }
}

fn rdma(facts: &Facts, findings: &mut Findings<'_>) {
    let host = facts.host.as_str();
    // These Macs have been told enough already.
    if facts.has_thunderbolt_5() == Some(false) {
        return;
    }
    match facts.rdma_enabled {
        Some(true) => findings.ok(host, "RDMA switch", "enabled"),
        Some(false) => findings.no_rdma(
            host,
            "RDMA switch",
            "disabled",
            "in Recovery: Options, Utilities, Terminal, `rdma_ctl enable`, restart; newer macOS: System Settings, search for RDMA",
        ),
        None => findings.cannot_tell(host, "RDMA switch", facts.why("rdma")),
    }
    match &facts.devices {
        None => findings.cannot_tell(host, "RDMA devices", facts.why("devices")),
        Some(devices) if devices.is_empty() && facts.rdma_enabled == Some(true) => findings.no_rdma(
            host,
            "RDMA devices",
            "none, though RDMA is enabled",
            "restart once more after `rdma_ctl enable`; Macs with Thunderbolt 4 stay like this for ever",
        ),
        Some(devices) if devices.is_empty() => findings.no_rdma(host, "RDMA devices", "none", "switch RDMA on first"),
        Some(devices) => {
            let names: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
            findings.ok(host, "RDMA devices", names.join(" "));
        }
    }
}

fn bridge(discovery: &Discovery, host: usize, findings: &mut Findings<'_>) {
    let facts = &discovery.hosts[host];
    if facts.interfaces.is_empty() {
        findings.cannot_tell(&facts.host, "Thunderbolt Bridge", facts.why("interfaces"));
        return;
    }
    let cabled = |member: &String| {
        discovery.cabling.cables.iter().any(|cable| {
            cable.ends.iter().any(|end| end.host == host) && cable.interface(host) == Some(member.as_str())
        })
    };
    let holds = |bridge: &&crate::facts::Interface| bridge.medium == Medium::Bridge && bridge.up;
    let bridges = facts.interfaces.iter().filter(holds);
    let Some((bridge, members)) = bridges
        .map(|bridge| (bridge, bridge.members.iter().filter(|member| cabled(member)).count()))
        .find(|(_, members)| *members > 0)
    else {
        findings.ok(&facts.host, "Thunderbolt Bridge", "no cable is under a bridge");
        return;
    };
    let found = format!("{} is up and joins {members} of the cables", bridge.name);
    let next = "`finetune cluster setup` takes it down; or System Settings, Network, Thunderbolt Bridge, Make Inactive";
    // With a loop of cables frames circle for ever (TN3205).
    match discovery.shape.parts.iter().any(|part| part.hosts.len() > 2 && part.form != Form::Line) {
        true => findings.fail(&facts.host, "Thunderbolt Bridge", found, next),
        false => findings.warn(&facts.host, "Thunderbolt Bridge", found, next),
    }
}

fn power(facts: &Facts, findings: &mut Findings<'_>) {
    let host = facts.host.as_str();
    let Some(power) = facts.power else {
        findings.cannot_tell(host, "idle sleep", facts.why("power"));
        return;
    };
    match power.sleep_minutes {
        0 => findings.ok(host, "idle sleep", "never"),
        minutes => findings.warn(
            host,
            "idle sleep",
            format!("after {minutes} minutes"),
            "`sudo pmset -a sleep 0`: Thunderbolt does not wake a Mac",
        ),
    }
    match power.restarts {
        Some(true) => findings.ok(host, "restart after power failure", "yes"),
        Some(false) => findings.warn(
            host,
            "restart after power failure",
            "no",
            "`sudo pmset -a autorestart 1`, and automatic login if runs start by themselves",
        ),
        None => findings.cannot_tell(host, "restart after power failure", "pmset does not say"),
    }
}
