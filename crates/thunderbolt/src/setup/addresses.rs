//! Which address each end of each cable gets: a network of its own for every cable.

use std::net::Ipv4Addr;

use super::{SetupError, is_self_assigned};
use crate::discover::Discovery;
use crate::facts::{System, network};

/// Four addresses, two of them for hosts: all that a cable needs.
pub(super) const PREFIX: u8 = 30;
pub(super) const NETMASK: &str = "255.255.255.252";

/// Ranges to take networks from: `mlx.distributed_config`'s is the last, because homes use
/// 192.168.0.x and 192.168.1.x.
const RANGES: [Ipv4Addr; 4] = [
    Ipv4Addr::new(192, 168, 200, 0),
    Ipv4Addr::new(10, 213, 0, 0),
    Ipv4Addr::new(172, 29, 0, 0),
    Ipv4Addr::new(192, 168, 0, 0),
];
/// Per range: 8,192 addresses.
const NETWORKS_PER_RANGE: u32 = 2048;

/// A cable between two Macs whose interfaces are known.
#[derive(Debug)]
pub(super) struct AddressedCable {
    pub(super) hosts: [usize; 2],
    pub(super) interfaces: [String; 2],
    pub(super) addresses: [Ipv4Addr; 2],
    /// Whether it has these addresses already.
    pub(super) kept: bool,
}

/// A cable keeps addresses that work; the others get free networks, in the order of the cables.
pub(super) fn of_cables(discovery: &Discovery) -> Result<Vec<AddressedCable>, SetupError> {
    let is_mac = |host: usize| discovery.hosts[host].system == System::Mac;
    let mut cables = Vec::new();
    let mut open: Vec<([usize; 2], [String; 2])> = Vec::new();
    for cable in &discovery.cabling.cables {
        let hosts = cable.ends.map(|end| end.host);
        let [Some(a), Some(b)] = cable.interfaces.clone() else { continue };
        if !hosts.iter().all(|&host| is_mac(host)) {
            continue;
        }
        let interfaces = [a, b];
        match working_addresses(discovery, hosts, &interfaces) {
            Some(addresses) => cables.push(AddressedCable { hosts, interfaces, addresses, kept: true }),
            None => open.push((hosts, interfaces)),
        }
    }
    // What an open cable has is replaced; all else is taken, as (address, prefix). So a run that
    // stopped half way goes on with the same addresses.
    let is_open = |host: usize, interface: &str| {
        let sides = open.iter().flat_map(|(hosts, interfaces)| hosts.iter().zip(interfaces));
        sides.into_iter().any(|(&at, name)| at == host && name == interface)
    };
    let interfaces = discovery
        .hosts
        .iter()
        .enumerate()
        .flat_map(|(host, facts)| facts.interfaces.iter().map(move |found| (host, found)));
    let others = interfaces.filter(|(host, interface)| !is_open(*host, &interface.name));
    let mut taken: Vec<(Ipv4Addr, u8)> =
        others.flat_map(|(_, interface)| interface.addresses.iter().copied()).collect();
    let wanted = open.len();
    for (hosts, interfaces) in open {
        let Some(free) = free_network(&taken) else {
            return Err(SetupError::Addresses { cables: wanted });
        };
        taken.push((free, PREFIX));
        let addresses = [1, 2].map(|last| Ipv4Addr::from(u32::from(free) + last));
        cables.push(AddressedCable { hosts, interfaces, addresses, kept: false });
    }
    Ok(cables)
}

/// Addresses at both ends that are in one network, which neither host has on another interface.
fn working_addresses(discovery: &Discovery, hosts: [usize; 2], interfaces: &[String; 2]) -> Option<[Ipv4Addr; 2]> {
    let interface = |side: usize| discovery.hosts[hosts[side]].interface(&interfaces[side]);
    let (here, there) = (interface(0)?, interface(1)?);
    here.addresses.iter().find_map(|&(own, prefix)| {
        let together = |&&(far, far_prefix): &&(Ipv4Addr, u8)| {
            far_prefix == prefix && far != own && network(far, prefix) == network(own, prefix)
        };
        let &(far, _) = there.addresses.iter().find(together)?;
        let elsewhere = |side: usize| {
            let others = discovery.hosts[hosts[side]].interfaces.iter().filter(|other| other.name != interfaces[side]);
            others.flat_map(|other| &other.addresses).any(|&other| overlap(other, (own, prefix)))
        };
        (!is_self_assigned(own) && !elsewhere(0) && !elsewhere(1)).then_some([own, far])
    })
}

fn free_network(taken: &[(Ipv4Addr, u8)]) -> Option<Ipv4Addr> {
    let in_range =
        |range: Ipv4Addr| (0..NETWORKS_PER_RANGE).map(move |index| Ipv4Addr::from(u32::from(range) + 4 * index));
    // The last range ends where 192.168.32 begins; the first reaches to 192.168.231.
    RANGES.into_iter().flat_map(in_range).find(|&network| !taken.iter().any(|&other| overlap(other, (network, PREFIX))))
}

pub(crate) fn overlap(a: (Ipv4Addr, u8), b: (Ipv4Addr, u8)) -> bool {
    let prefix = a.1.min(b.1);
    network(a.0, prefix) == network(b.0, prefix)
}
