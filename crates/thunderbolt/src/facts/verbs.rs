//! RDMA devices: `rdma_ctl status`, `ibv_devices` and `ibv_devinfo -v` of macOS,
//! /sys/class/infiniband of Linux.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{MAX_ADDRESSES, MAX_ENTRIES, plain_name};

/// An RDMA device, as the verbs library names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerbsDevice {
    /// "rdma_en5", "mlx5_0".
    pub name: String,
    /// The IP interface that it goes with: "en5".
    pub interface: Option<String>,
    /// Whether its port is up.
    pub state: PortState,
    /// The addresses that it has, all zero ones left out.
    pub gids: Vec<Ipv6Addr>,
    /// Gb/s, if the system says.
    pub gigabits: Option<u32>,
}

/// The state of an RDMA device's port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortState {
    /// The link is up.
    Active,
    /// No cable, or the other end does not do RDMA.
    Down,
    /// The system does not say.
    Unknown,
}

impl VerbsDevice {
    /// The IPv4 addresses among its GIDs (`::ffff:a.b.c.d`): what connections need.
    pub fn ipv4(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.gids.iter().filter_map(Ipv6Addr::to_ipv4_mapped)
    }

    fn new(name: String) -> Self {
        // Apple pairs the device rdma_enX with the interface enX (TN3205).
        let interface = name.strip_prefix("rdma_").map(str::to_owned);
        Self { name, interface, state: PortState::Unknown, gids: Vec::new(), gigabits: None }
    }

    fn add_gid(&mut self, text: &str) {
        // rdma-core puts the type behind a comma: "::ffff:10.0.0.1, RoCE v2".
        if let Ok(gid) = text.split(',').next().unwrap_or_default().trim().parse::<Ipv6Addr>()
            && !gid.is_unspecified()
            && self.gids.len() < MAX_ADDRESSES
            && !self.gids.contains(&gid)
        {
            self.gids.push(gid);
        }
    }
}

/// "enabled" or "disabled", alone or in a sentence; "on" or "off" at the end of one.
pub(super) fn rdma_enabled(text: &str) -> Option<bool> {
    let text = text.to_ascii_lowercase();
    let words: Vec<&str> = text.split(|letter: char| !letter.is_ascii_alphanumeric()).collect();
    let last = words.iter().rev().find(|word| !word.is_empty());
    let negated = words.contains(&"not");
    let on = words.contains(&"enabled") || last.is_some_and(|last| *last == "on");
    let off = words.contains(&"disabled") || last.is_some_and(|last| *last == "off");
    match (on, off) {
        (true, false) => Some(!negated),
        (false, true) => Some(negated),
        _ => None,
    }
}

/// The table of `ibv_devices`, with what `ibv_devinfo` says of the same devices. A table without
/// rows means no devices.
pub(super) fn ibv_devices(text: &str, details: &[VerbsDevice]) -> Option<Vec<VerbsDevice>> {
    let mut devices: Vec<VerbsDevice> = Vec::new();
    let mut is_table = false;
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().take(3).collect();
        match words[..] {
            ["device", "node", ..] | ["------", ..] => is_table = true,
            [title, guid] if guid.len() >= 16 && guid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b':') => {
                let known = |device: &VerbsDevice| device.name == title;
                if devices.len() < MAX_ENTRIES && !devices.iter().any(known) {
                    let detailed = details.iter().find(|device| known(device)).cloned();
                    devices.extend(detailed.or_else(|| plain_name(title).map(VerbsDevice::new)));
                }
            }
            _ => {}
        }
    }
    devices.sort_by(|a, b| a.name.cmp(&b.name));
    (is_table || !devices.is_empty() || text.contains("No IB devices found")).then_some(devices)
}

/// The devices of `ibv_devinfo -v`: "hca_id: rdma_en5", then indented lines "state: PORT_ACTIVE
/// (4)" and "GID[  1]: ::ffff:192.168.0.1".
pub(super) fn ibv_devinfo(text: &str) -> Option<Vec<VerbsDevice>> {
    let mut devices: Vec<VerbsDevice> = Vec::new();
    for line in text.lines() {
        let Some((key, value)) = line.trim().split_once(':') else { continue };
        let (key, value) = (key.trim(), value.trim());
        if key == "hca_id" {
            if devices.len() == MAX_ENTRIES {
                break;
            }
            devices.extend(value.split_whitespace().next().and_then(plain_name).map(VerbsDevice::new));
            continue;
        }
        let Some(device) = devices.last_mut() else { continue };
        if key == "state" {
            device.state = state(value);
        } else if key.starts_with("GID[") {
            device.add_gid(value);
        }
    }
    Some(devices)
}

/// "PORT_ACTIVE (4)" of `ibv_devinfo`, "4: ACTIVE" of /sys.
fn state(text: &str) -> PortState {
    match () {
        () if text.contains("ACTIVE") => PortState::Active,
        () if text.contains("DOWN") || text.contains("INIT") => PortState::Down,
        () => PortState::Unknown,
    }
}

/// What the script's `infiniband` prints: "device mlx5_0", "interface eth2", "state 4: ACTIVE",
/// "rate 100 Gb/sec (4X EDR)", "gid 3 0000:…".
pub(super) fn infiniband(text: &str) -> Option<Vec<VerbsDevice>> {
    let mut devices: Vec<VerbsDevice> = Vec::new();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(' ') else { continue };
        if key == "device" {
            if devices.len() == MAX_ENTRIES {
                break;
            }
            devices.extend(plain_name(value.trim()).map(VerbsDevice::new));
            continue;
        }
        let Some(device) = devices.last_mut() else { continue };
        match key {
            "interface" if device.interface.is_none() => device.interface = plain_name(value.trim()),
            "state" => device.state = state(value),
            "rate" => device.gigabits = value.split(['.', ' ']).next().and_then(|number| number.parse().ok()),
            "gid" => device.add_gid(value.split_whitespace().nth(1).unwrap_or_default()),
            _ => {}
        }
    }
    Some(devices)
}

/// Lines "refused /dev/infiniband/uverbs0".
pub(super) fn refused_files(text: &str) -> Option<Vec<String>> {
    let files = text.lines().filter_map(|line| super::name(line.strip_prefix("refused ")?.trim()));
    Some(files.take(MAX_ENTRIES).collect())
}
