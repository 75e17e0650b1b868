//! Checks of one Thunderbolt cable between two Macs.

use std::net::Ipv4Addr;

use super::Findings;
use crate::cabling::Cable;
use crate::discover::Discovery;
use crate::facts::{Facts, Interface, PortState, network};
use crate::setup::is_self_assigned;

pub(super) fn examine(discovery: &Discovery, cable: &Cable, findings: &mut Findings<'_>) {
    let ends = [0, 1].map(|side| &discovery.hosts[cable.ends[side].host]);
    let subject = format!("{} – {}", ends[0].host, ends[1].host);
    let label = |side: usize| cable.interfaces[side].as_deref().unwrap_or("?");
    let cable_name = format!("{}/{}", label(0), label(1));
    let found = |what: &str| format!("{cable_name}: {what}");
    match cable.gigabits {
        Some(gigabits) if gigabits <= 40 => findings.no_rdma(
            &subject,
            "cable speed",
            found(&format!("{gigabits} Gb/s")),
            "Thunderbolt 5 runs at 80: a Thunderbolt 5 cable, ports and no older dock between; above 40 RDMA works",
        ),
        Some(gigabits) => findings.ok(&subject, "cable speed", found(&format!("{gigabits} Gb/s"))),
        None => findings.cannot_tell(&subject, "cable speed", &found("neither end tells it")),
    }
    if !cable.through.is_empty() {
        let what = found(&format!("it goes through {}", cable.through.join(", ")));
        findings.warn(&subject, "direct cable", what, "cable the Macs to each other");
    }
    if cable.one_sided && cable.through.is_empty() {
        let next =
            "a dock or display in between shows itself to one end only; else unplug the cable and plug it in again";
        findings.warn(&subject, "both ends see it", found("only one end reports the other"), next);
    }
    let interfaces = [0, 1].map(|side| ends[side].interface(cable.interfaces[side].as_deref()?));
    let interfaces = match interfaces {
        [Some(a), Some(b)] => [a, b],
        _ => {
            let side = usize::from(interfaces[0].is_some());
            let why = format!("{} does not tell the interface: {}", ends[side].host, ends[side].why("interfaces"));
            findings.cannot_tell(&subject, "cable addresses", &found(&why));
            return;
        }
    };
    addresses(&subject, &cable_name, ends, interfaces, findings);
    // A cable that is too slow has no RDMA to look at.
    if cable.gigabits.is_none_or(|gigabits| gigabits > 40) {
        for (side, interface) in interfaces.into_iter().enumerate() {
            device(discovery, cable, side, interface, &subject, findings);
        }
    }
}

fn addresses(subject: &str, cable: &str, ends: [&Facts; 2], interfaces: [&Interface; 2], findings: &mut Findings<'_>) {
    const NAME: &str = "cable addresses";
    let next = "`finetune cluster setup` gives each cable a network of its own";
    if let Some(side) = (0..2).find(|&side| interfaces[side].addresses.is_empty()) {
        let found = format!("{cable}: {} of {} has no IPv4 address", interfaces[side].name, ends[side].host);
        findings.no_rdma(subject, NAME, found, next);
        return;
    }
    let joined = |&(own, prefix): &(Ipv4Addr, u8)| {
        let far = interfaces[1].addresses.iter();
        far.clone()
            .find(|(far, _)| *far != own && network(*far, prefix) == network(own, prefix))
            .map(|(far, _)| (own, *far))
    };
    match interfaces[0].addresses.iter().find_map(joined) {
        None => findings.warn(subject, NAME, format!("{cable}: the ends are in different networks"), next),
        Some((own, far)) if is_self_assigned(own) => findings.warn(
            subject,
            NAME,
            format!("{cable}: {own} and {far}, which the Macs gave themselves"),
            "they change with every plugging, and are missing for minutes after a restart (ml-explore/mlx issue 3467): `finetune cluster setup`",
        ),
        Some((own, far)) => {
            let elsewhere = (0..2).find_map(|side| {
                let others = ends[side].interfaces.iter().filter(|other| other.name != interfaces[side].name);
                let clash = others.into_iter().find(|other| other.reaches([own, far][1 - side]))?;
                Some(format!("{} of {}", clash.name, ends[side].host))
            });
            match elsewhere {
                Some(clash) => {
                    let found = format!("{cable}: {own} and {far}, but {clash} is in the same network");
                    findings.warn(subject, NAME, found, "packets may take the other way: `finetune cluster setup`");
                }
                None => findings.ok(subject, NAME, format!("{cable}: {own} and {far}")),
            }
        }
    }
}

fn device(
    discovery: &Discovery,
    cable: &Cable,
    side: usize,
    interface: &Interface,
    subject: &str,
    findings: &mut Findings<'_>,
) {
    let facts = &discovery.hosts[cable.ends[side].host];
    let far = &discovery.hosts[cable.ends[1 - side].host];
    // What a host lacks as a whole is said once, at the host.
    let Some(device) = facts.device_of(&interface.name) else {
        if facts.devices.as_ref().is_some_and(|devices| !devices.is_empty()) {
            let found = format!("{} has no device for {}", facts.host, interface.name);
            findings.no_rdma(subject, "RDMA port", found, "restart that Mac");
        }
        return;
    };
    let found = |what: &str| format!("{} of {}: {what}", device.name, facts.host);
    match device.state {
        PortState::Down => {
            let port = &facts.ports.as_ref().map(|ports| &ports[cable.ends[side].port]);
            let far_domain = far.ports.as_ref().map(|ports| ports[cable.ends[1 - side].port].domain.as_str());
            let mut announced =
                port.iter().flat_map(|port| &port.far).filter(|end| Some(end.domain.as_str()) == far_domain);
            let next = if far.rdma_enabled == Some(false)
                || announced.next().and_then(|end| end.announces_rdma) == Some(false)
            {
                format!("the other end does not offer RDMA: switch it on at {}", far.host)
            } else if facts.model.as_deref().is_some_and(is_studio) || far.model.as_deref().is_some_and(is_studio) {
                "plug the cable in again; on a Mac Studio the port next to Ethernet does not do RDMA: use another"
                    .to_owned()
            } else {
                "plug the cable in again, swap its ends, or restart both Macs".to_owned()
            };
            findings.no_rdma(subject, "RDMA port", found("the port is down"), &next);
        }
        PortState::Unknown => {
            let why = format!("ibv_devinfo does not tell the state of its port: {}", facts.why("device_details"));
            findings.cannot_tell(subject, "RDMA port", &found(&why));
        }
        PortState::Active => {
            findings.ok(subject, "RDMA port", found("active"));
            let own: Vec<Ipv4Addr> = interface.addresses.iter().map(|(address, _)| *address).collect();
            match device.ipv4().find(|address| own.contains(address)) {
                Some(address) => findings.ok(subject, "RDMA address", found(&address.to_string())),
                // Without one, queue pairs fail with errno 22 (ml-explore/mlx pull request 4191).
                None => findings.no_rdma(
                    subject,
                    "RDMA address",
                    found("its GIDs have no IPv4 address of the interface"),
                    "give the interface an address (`finetune cluster setup`); if it has one, take it down and up again",
                ),
            }
        }
    }
}

/// M3 Ultra and M4 Max Mac Studios (jaccl's users name Mac15,14 and Mac16,9).
fn is_studio(model: &str) -> bool {
    matches!(model, "Mac15,14" | "Mac16,9")
}
