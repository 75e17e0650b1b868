//! Checks of one Linux box: its RDMA, if it has any.

use super::Findings;
use crate::facts::{Facts, PortState, VerbsDevice};

/// Buffers are a few MiB per device and peer; systemd's default of 8 MiB is too little for four.
const LEAST_LOCKABLE_BYTES: u64 = 64 << 20;

pub(super) fn examine(facts: &Facts, findings: &mut Findings<'_>) {
    let host = facts.host.as_str();
    let devices = match &facts.devices {
        None => {
            findings.cannot_tell(host, "RDMA devices", facts.why("infiniband"));
            return;
        }
        Some(devices) if devices.is_empty() => {
            let next = "a card with RoCE or InfiniBand, or soft-RoCE: `sudo rdma link add rxe0 type rxe netdev eth0`";
            match findings.expected.rdma {
                true => findings.fail(host, "RDMA devices", "none", next),
                false => findings.ok(host, "RDMA devices", "none: TCP is used"),
            }
            return;
        }
        Some(devices) => devices,
    };
    let names: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
    findings.ok(host, "RDMA devices", names.join(" "));
    verbs_library(facts, findings);
    for device in devices {
        port(host, device, findings);
    }
    if let Some(file) = facts.refused_device_files.first() {
        let next = "join the group that owns it (`ls -l /dev/infiniband`), or a udev rule with mode 0666";
        findings.no_rdma(host, "device files", format!("{file} may not be opened by this user"), next);
    }
    locked_memory(facts, findings);
}

/// Whether the verbs library can be opened.
fn verbs_library(facts: &Facts, findings: &mut Findings<'_>) {
    let host = facts.host.as_str();
    match facts.verbs_library {
        Some(true) => findings.ok(host, "verbs library", "libibverbs.so.1"),
        Some(false) => findings.no_rdma(
            host,
            "verbs library",
            "libibverbs.so.1 is not there",
            "install it: `apt install libibverbs1 ibverbs-providers`, or rdma-core of other distributions",
        ),
        None => findings.cannot_tell(host, "verbs library", facts.why("library")),
    }
}

/// Whether a device's port is up and has an IPv4 address.
fn port(host: &str, device: &VerbsDevice, findings: &mut Findings<'_>) {
    let name = device.name.as_str();
    let found = |what: &str| format!("{name}: {what}");
    match device.state {
        PortState::Active if device.ipv4().next().is_none() => findings.no_rdma(
            host,
            "RDMA address",
            found("no IPv4 address among its GIDs"),
            &format!(
                "give {} an IPv4 address: `ip addr add …`",
                device.interface.as_deref().unwrap_or("its interface")
            ),
        ),
        PortState::Active => {
            let address = device.ipv4().next().map(|address| address.to_string()).unwrap_or_default();
            findings.ok(host, "RDMA address", found(&address));
        }
        PortState::Down => findings.no_rdma(
            host,
            "RDMA port",
            found("the port is down"),
            "the cable, the switch, or `ip link set … up`; InfiniBand also needs a subnet manager (opensm)",
        ),
        PortState::Unknown => findings.cannot_tell(host, "RDMA port", &found("the state of its port is unknown")),
    }
}

/// Whether buffers may be locked in memory.
fn locked_memory(facts: &Facts, findings: &mut Findings<'_>) {
    let host = facts.host.as_str();
    match facts.lockable_bytes {
        None => findings.cannot_tell(host, "locked memory", facts.why("locked")),
        Some(u64::MAX) => findings.ok(host, "locked memory", "unlimited"),
        Some(bytes) if bytes < LEAST_LOCKABLE_BYTES => findings.no_rdma(
            host,
            "locked memory",
            format!("at most {} MiB", bytes >> 20),
            "RDMA buffers are locked: `* soft memlock unlimited` and `* hard memlock unlimited` in /etc/security/limits.conf, then log in anew",
        ),
        Some(bytes) => findings.ok(host, "locked memory", format!("at most {} MiB", bytes >> 20)),
    }
}
