//! At which address the hosts reach each other.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use crate::facts::{Facts, Interface, Medium, System, network};

/// One address per host, and notes about the choice.
pub(crate) struct Addresses {
    pub(crate) of_hosts: Vec<Option<String>>,
    pub(crate) notes: Vec<String>,
}

/// The addresses of the fastest network that all hosts are on, wired before wireless. If there is
/// none: per host the address that our ssh connection came in at, or the host's best.
pub(crate) fn meeting_point(hosts: &[Facts]) -> Addresses {
    if let Some((network, of_hosts)) = common_network(hosts) {
        let wireless = hosts
            .iter()
            .zip(&of_hosts)
            .filter(|(facts, address)| medium_of(facts, **address) == Some(Medium::Wireless));
        let wireless: Vec<&str> = wireless.map(|(facts, _)| facts.host.as_str()).collect();
        let mut notes = Vec::new();
        if !wireless.is_empty() && hosts.len() > 1 {
            notes.push(format!("{} reached over Wi-Fi (network {network}): Ethernet is steadier", listed(&wireless)));
        }
        return Addresses { of_hosts: of_hosts.iter().map(|address| Some(address.to_string())).collect(), notes };
    }
    let own = |facts: &Facts| {
        let best =
            usable(facts).max_by_key(|(interface, _, _)| rank(interface)).map(|(_, address, _)| IpAddr::V4(address));
        let way_in = facts.way_in.filter(|address| !address.is_loopback());
        way_in.or(best).map(|address| address.to_string())
    };
    let of_hosts: Vec<Option<String>> = hosts.iter().map(own).collect();
    let mut notes = Vec::new();
    if hosts.len() > 1 {
        notes.push("the hosts share no network: check that each reaches the others' addresses in the hostfile".into());
    }
    for (facts, _) in hosts.iter().zip(&of_hosts).filter(|(_, address)| address.is_none()) {
        notes.push(format!("no address of {} is known; its name in ssh is used", facts.host));
    }
    Addresses { of_hosts, notes }
}

/// Interfaces that others may reach this host at, with each address and its prefix.
fn usable(facts: &Facts) -> impl Iterator<Item = (&Interface, Ipv4Addr, u8)> {
    let fits = |interface: &&Interface| {
        let medium = match interface.medium {
            Medium::Wired | Medium::Wireless => true,
            // A Linux server may have its address on a bridge; a Mac's bridge is Thunderbolt's or a
            // virtual machine's.
            Medium::Bridge => facts.system == System::Linux,
            Medium::Thunderbolt => facts.system == System::Linux,
            Medium::Loopback | Medium::Virtual => false,
        };
        medium && interface.up && interface.active != Some(false)
    };
    facts.interfaces.iter().filter(fits).flat_map(|interface| {
        let addresses = interface.addresses.iter();
        addresses
            .filter(|(address, _)| !address.is_link_local() && !address.is_loopback())
            .map(move |&(address, prefix)| (interface, address, prefix))
    })
}

/// Wired before wireless, fast before slow; a speed that is not told counts as the usual one.
fn rank(interface: &Interface) -> (u8, u32) {
    match interface.medium {
        Medium::Wired | Medium::Thunderbolt => (3, interface.megabits.unwrap_or(1000)),
        Medium::Bridge => (2, interface.megabits.unwrap_or(1000)),
        _ => (1, interface.megabits.unwrap_or(100)),
    }
}

/// An address, and how good the interface is that has it.
type Ranked = ((u8, u32), Ipv4Addr);

fn common_network(hosts: &[Facts]) -> Option<(Ipv4Addr, Vec<Ipv4Addr>)> {
    // Per network: of each host the best address in it.
    let mut networks: BTreeMap<(Ipv4Addr, u8), Vec<Option<Ranked>>> = BTreeMap::new();
    for (host, facts) in hosts.iter().enumerate() {
        for (interface, address, prefix) in usable(facts).filter(|(_, _, prefix)| *prefix < 31) {
            let found = networks.entry((network(address, prefix), prefix)).or_insert_with(|| vec![None; hosts.len()]);
            if found[host].is_none_or(|(best, _)| rank(interface) > best) {
                found[host] = Some((rank(interface), address));
            }
        }
    }
    let complete = networks.into_iter().filter_map(|((network, _), found)| {
        let found: Vec<Ranked> = found.into_iter().collect::<Option<_>>()?;
        let slowest = found.iter().map(|(rank, _)| *rank).min()?;
        let addresses: Vec<Ipv4Addr> = found.into_iter().map(|(_, address)| address).collect();
        // The network of containers is called the same everywhere and has the same address
        // everywhere.
        let mut distinct = addresses.clone();
        distinct.sort_unstable();
        distinct.dedup();
        (distinct.len() == addresses.len()).then_some((slowest, network, addresses))
    });
    // Of equally good ones the first, so that the choice is the same every time.
    let best = complete.reduce(|best, other| if other.0 > best.0 { other } else { best })?;
    Some((best.1, best.2))
}

fn medium_of(facts: &Facts, address: Ipv4Addr) -> Option<Medium> {
    let has = |interface: &&Interface| interface.addresses.iter().any(|&(own, _)| own == address);
    facts.interfaces.iter().find(has).map(|interface| interface.medium)
}

fn listed(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [name] => format!("{name} is"),
        [names @ .., last] => format!("{} and {last} are", names.join(", ")),
    }
}
