//! Network interfaces: `networksetup -listallhardwareports` and `ifconfig -a` of macOS,
//! `ip -o -4 addr show` and /sys/class/net of Linux.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use super::{MAX_ADDRESSES, MAX_ENTRIES, name, plain_name};

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// "en5", "enp3s0".
    pub name: String,
    /// What it is connected to.
    pub medium: Medium,
    /// Whether it is switched on.
    pub up: bool,
    /// Whether something is at the other end; `None` if the interface does not say.
    pub active: Option<bool>,
    /// IPv4 addresses with the length of their network's prefix, 0 to 32.
    pub addresses: Vec<(Ipv4Addr, u8)>,
    /// Of a bridge: the interfaces that it joins.
    pub members: Vec<String>,
    /// Mb/s, if the system says.
    pub megabits: Option<u32>,
}

/// What a network interface is connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Medium {
    /// Ethernet.
    Wired,
    /// Wi-Fi.
    Wireless,
    /// A Thunderbolt port.
    Thunderbolt,
    /// Other interfaces, joined to one network.
    Bridge,
    /// The host itself.
    Loopback,
    /// Tunnels, containers, virtual machines.
    Virtual,
}

impl Interface {
    /// Whether an address is in one of this interface's networks.
    pub fn reaches(&self, address: Ipv4Addr) -> bool {
        self.addresses.iter().any(|&(own, prefix)| network(own, prefix) == network(address, prefix))
    }
}

/// The first address of a network.
pub(crate) fn network(address: Ipv4Addr, prefix: u8) -> Ipv4Addr {
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
    Ipv4Addr::from(u32::from(address) & mask)
}

/// "Thunderbolt 2" → "en3".
pub(super) fn hardware_ports(text: &str) -> Option<BTreeMap<String, String>> {
    let mut ports = BTreeMap::new();
    let mut port = None;
    for line in text.lines() {
        if let Some(title) = line.trim().strip_prefix("Hardware Port:") {
            port = name(title.trim());
        } else if let Some(device) = line.trim().strip_prefix("Device:")
            && let (Some(port), Some(device)) = (port.take(), plain_name(device.trim()))
            && ports.len() < MAX_ENTRIES
        {
            ports.entry(port).or_insert(device);
        }
    }
    (!ports.is_empty()).then_some(ports)
}

/// The interfaces of `ifconfig -a`: a line "en5: flags=8863<UP,…> mtu 1500" each, and indented
/// lines about it.
pub(super) fn ifconfig(text: &str, hardware_ports: &BTreeMap<String, String>) -> Option<Vec<Interface>> {
    let mut interfaces: Vec<Interface> = Vec::new();
    for line in text.lines() {
        if !line.starts_with([' ', '\t']) {
            if interfaces.len() == MAX_ENTRIES {
                break;
            }
            let Some((title, rest)) = line.split_once(": flags=") else { continue };
            let Some(title) = plain_name(title) else { continue };
            let flags = rest.split_once('<').and_then(|(_, rest)| rest.split_once('>')).map_or("", |(flags, _)| flags);
            interfaces.push(Interface {
                medium: mac_medium(&title, hardware_ports),
                name: title,
                up: flags.split(',').any(|flag| flag == "UP"),
                active: None,
                addresses: Vec::new(),
                members: Vec::new(),
                megabits: None,
            });
            continue;
        }
        let Some(interface) = interfaces.last_mut() else { continue };
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("inet"), Some(address)) => {
                let mask = words.skip_while(|&word| word != "netmask").nth(1);
                if let (Ok(address), Some(prefix)) = (address.parse(), mask.and_then(prefix_of_mask))
                    && interface.addresses.len() < MAX_ADDRESSES
                {
                    interface.addresses.push((address, prefix));
                }
            }
            (Some("member:"), Some(member)) if interface.members.len() < MAX_ENTRIES => {
                interface.members.extend(plain_name(member));
            }
            (Some("status:"), Some(status)) => interface.active = Some(status == "active"),
            _ => {}
        }
    }
    (!interfaces.is_empty()).then_some(interfaces)
}

fn mac_medium(interface: &str, hardware_ports: &BTreeMap<String, String>) -> Medium {
    let title = hardware_ports.iter().find(|(_, device)| *device == interface).map(|(title, _)| title.as_str());
    match title {
        _ if interface.starts_with("lo") => Medium::Loopback,
        _ if interface.starts_with("bridge") => Medium::Bridge,
        Some("Wi-Fi") => Medium::Wireless,
        Some(title) if title.starts_with("Thunderbolt ") && title != "Thunderbolt Ethernet" => Medium::Thunderbolt,
        _ if interface.starts_with("en") => Medium::Wired,
        _ => Medium::Virtual,
    }
}

/// "0xfffffffc" or "255.255.255.252" → 30.
fn prefix_of_mask(mask: &str) -> Option<u8> {
    let bits = match mask.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok()?,
        None => u32::from(mask.parse::<Ipv4Addr>().ok()?),
    };
    (bits.leading_ones() == bits.count_ones()).then(|| u8::try_from(bits.count_ones()).unwrap_or(32))
}

/// `netstat -rn -f inet`: lines "192.168.200.2      link#11            UHLS                  en5"
/// with a whole address in front; networks are abbreviated ("192.168.1") or have a prefix.
pub(super) fn host_routes(text: &str) -> Option<Vec<(Ipv4Addr, String)>> {
    let route = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().take(4).collect();
        let (&destination, &interface) = (words.first()?, words.get(3)?);
        let destination = destination.strip_suffix("/32").unwrap_or(destination);
        Some((destination.parse().ok()?, plain_name(interface)?))
    };
    Some(text.lines().filter_map(route).take(MAX_ENTRIES).collect())
}

/// What /sys/class/net says of one interface.
#[derive(Debug, Clone, Copy)]
pub(super) struct Link {
    up: bool,
    megabits: Option<u32>,
    wireless: bool,
}

/// Lines "eth0 state=up speed=10000 wireless=no".
pub(super) fn links(text: &str) -> Option<BTreeMap<String, Link>> {
    let mut links = BTreeMap::new();
    for line in text.lines().take(MAX_ENTRIES) {
        let mut words = line.split_whitespace();
        let Some(title) = words.next().and_then(plain_name) else { continue };
        let words: Vec<&str> = words.collect();
        let value = |key: &str| words.iter().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        // A virtual or unplugged interface has the speed -1, or none.
        let megabits = value("speed").and_then(|speed| speed.parse().ok());
        let wireless = value("wireless") == Some("yes");
        links.insert(title, Link { up: value("state") != Some("down"), megabits, wireless });
    }
    Some(links)
}

/// Lines "2: eth0    inet 192.168.1.11/24 brd 192.168.1.255 scope global eth0".
pub(super) fn ip_addresses(text: &str, links: &BTreeMap<String, Link>) -> Option<Vec<Interface>> {
    let mut interfaces: Vec<Interface> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace().skip(1);
        let (Some(title), Some("inet"), Some(address)) = (words.next(), words.next(), words.next()) else { continue };
        let Some(title) = plain_name(title.split('@').next().unwrap_or(title)) else { continue };
        let (address, prefix) = address.split_once('/').unwrap_or((address, "32"));
        let (Ok(address), Ok(prefix @ 0..=32)) = (address.parse::<Ipv4Addr>(), prefix.parse::<u8>()) else { continue };
        if let Some(interface) = interfaces.iter_mut().find(|interface| interface.name == title) {
            if interface.addresses.len() < MAX_ADDRESSES {
                interface.addresses.push((address, prefix));
            }
            continue;
        }
        if interfaces.len() == MAX_ENTRIES {
            break;
        }
        let link = links.get(&title);
        interfaces.push(Interface {
            medium: linux_medium(&title, link),
            up: link.is_none_or(|link| link.up),
            active: link.map(|link| link.up),
            addresses: vec![(address, prefix)],
            members: Vec::new(),
            megabits: link.and_then(|link| link.megabits),
            name: title,
        });
    }
    Some(interfaces)
}

/// By the kernel's and systemd's names: en*, eth*, ib* are cards, wl* wireless, thunderbolt* cables
/// between hosts.
fn linux_medium(interface: &str, link: Option<&Link>) -> Medium {
    let starts = |names: &[&str]| names.iter().any(|name| interface.starts_with(name));
    match () {
        () if interface == "lo" => Medium::Loopback,
        () if link.is_some_and(|link| link.wireless) || starts(&["wl"]) => Medium::Wireless,
        () if starts(&["thunderbolt"]) => Medium::Thunderbolt,
        () if starts(&["br", "docker", "virbr", "cni", "lxc"]) => Medium::Bridge,
        () if starts(&["veth", "tun", "tap", "wg", "tailscale", "zt", "vnet", "dummy", "cali", "flannel"]) => {
            Medium::Virtual
        }
        () => Medium::Wired,
    }
}
