//! From the facts of hosts: what they form, which cables are missing, and a hostfile.

use finetune_launch::gather::GatherError;

use crate::cabling::{Cable, Cabling};
use crate::facts::{Facts, System};
use crate::shape::{Form, Shape};

mod addresses;
mod proposal;

#[cfg(test)]
mod tests;

pub(crate) use addresses::meeting_point;
pub use proposal::Proposal;

/// The least that RDMA over Thunderbolt needs, in Gb/s: Thunderbolt 4 and older run at 40.
/// (exo-explore/exo pull request 1813: macOS makes rdma_enX devices for Thunderbolt 4 too, which do
/// not work.)
const RDMA_GIGABITS: u32 = 41;

/// Everything that is known of a cluster.
#[derive(Debug)]
pub struct Discovery {
    /// The hosts that answered, in the order asked.
    pub hosts: Vec<Facts>,
    /// Hosts that are one of these under another name, and are left out: that one's name, and the
    /// other name.
    pub same_machine: Vec<(String, String)>,
    /// Why the others did not.
    pub unreachable: Vec<GatherError>,
    /// The cables between the hosts.
    pub cabling: Cabling,
    /// By Thunderbolt cables; hosts without Thunderbolt are parts of their own.
    pub shape: Shape,
}

/// Takes out every host that is an earlier one under another name: says so of itself, or has a port
/// of it.
fn leave_out_twins(hosts: &mut Vec<Facts>) -> Vec<(String, String)> {
    let by_ports = Cabling::new(hosts).same_machine;
    let same = |i: usize, j: usize| match (&hosts[i].identity, &hosts[j].identity) {
        (Some(one), Some(other)) => one == other,
        _ => by_ports.contains(&(i, j)),
    };
    let twins: Vec<(usize, usize)> =
        (0..hosts.len()).filter_map(|j| (0..j).find(|&i| same(i, j)).map(|i| (i, j))).collect();
    let named = twins.iter().map(|&(i, j)| (hosts[i].host.clone(), hosts[j].host.clone())).collect();
    let mut index = 0;
    hosts.retain(|_| {
        index += 1;
        !twins.iter().any(|&(_, j)| j + 1 == index)
    });
    named
}

impl Discovery {
    /// From what [`crate::gather::gather`] found.
    pub fn new(answers: Vec<Result<Facts, GatherError>>) -> Self {
        let (mut hosts, mut unreachable) = (Vec::new(), Vec::new());
        for answer in answers {
            match answer {
                Ok(facts) => hosts.push(facts),
                Err(error) => unreachable.push(error),
            }
        }
        let same_machine = leave_out_twins(&mut hosts);
        let cabling = Cabling::new(&hosts);
        let shape = Shape::new(&cabling.counts(hosts.len()));
        Self { hosts, same_machine, unreachable, cabling, shape }
    }

    /// The name of a host, as ssh takes it.
    pub fn name(&self, host: usize) -> &str {
        &self.hosts[host].host
    }

    /// Whether there is any Thunderbolt cable between the hosts.
    pub fn is_cabled(&self) -> bool {
        !self.cabling.cables.is_empty()
    }

    /// What the cables form, and the missing ones by name: one sentence each.
    pub fn sentences(&self) -> Vec<String> {
        let mut sentences = vec![self.form_in_words()];
        // Advice about cables is for Macs; a host that could not tell its ports may have any.
        if self.hosts.len() > 1 && self.hosts.iter().all(|host| host.ports.is_some()) {
            if !self.shape.is_ring() && !self.shape.is_mesh() {
                let missing = self.pairs(&self.shape.ring.missing);
                let order: Vec<&str> = self.shape.ring.order.iter().map(|&host| self.name(host)).collect();
                let only = if self.shape.ring.exact { "" } else { ", if no better order is found," };
                if self.hosts.len() > 2 {
                    sentences.push(format!("For a ring ({}){only} {missing}.", order.join(" – ")));
                }
            }
            if !self.shape.is_mesh() {
                let mesh = || format!("For a mesh {}.", self.pairs(&self.shape.missing_for_mesh));
                sentences.push(self.lack_of_ports().unwrap_or_else(mesh));
            }
        }
        for (first, other) in &self.same_machine {
            sentences.push(format!("{first} and {other} are the same machine: {other} is left out."));
        }
        for (a, b) in &self.cabling.loops {
            let sockets = (self.socket(a.host, a.port), self.socket(b.host, b.port));
            let host = self.name(a.host);
            sentences.push(format!("A cable joins {} and {} of {host}: it leads nowhere.", sockets.0, sockets.1));
        }
        for stranger in &self.cabling.strangers {
            let socket = self.socket(stranger.end.host, stranger.end.port);
            let host = self.name(stranger.end.host);
            let whom = match &self.hosts_of_unknown_ports()[..] {
                [] => "that is not in the list (or did not answer)".to_owned(),
                [mute] => format!("that is not in the list, or is {mute}, which did not tell its ports"),
                mute => format!(
                    "that is not in the list, or is one of {}, which did not tell all their ports",
                    mute.join(", ")
                ),
            };
            sentences.push(format!("{socket} of {host} is cabled to a {} {whom}.", stranger.name));
        }
        for cable in self.cabling.cables.iter().filter(|cable| !cable.through.is_empty()) {
            let [a, b] = cable.ends.map(|end| self.name(end.host));
            sentences.push(format!(
                "Between {a} and {b} is {}: a cable from Mac to Mac is faster.",
                cable.through.join(", ")
            ));
        }
        sentences
    }

    /// Macs that answered, but not with ports that could be read: cables may lead to them.
    pub(crate) fn hosts_of_unknown_ports(&self) -> Vec<&str> {
        let mute = |facts: &&Facts| facts.system == System::Mac && facts.ports.as_ref().is_none_or(Vec::is_empty);
        self.hosts.iter().filter(mute).map(|facts| facts.host.as_str()).collect()
    }

    fn form_in_words(&self) -> String {
        let names = |hosts: &[usize]| hosts.iter().map(|&host| self.name(host)).collect::<Vec<_>>();
        let hosts = self.hosts.len();
        match (hosts, &self.shape.parts[..]) {
            (0, _) => "No host answered.".into(),
            (1, _) => format!("One host: {}.", self.name(0)),
            _ if !self.is_cabled() => "No Thunderbolt cable joins these hosts.".into(),
            (2, [_]) => format!("The cable between {} and {} is all that two hosts need.", self.name(0), self.name(1)),
            (_, [part]) => match part.form {
                Form::Mesh => format!("The {hosts} hosts form a mesh: every two of them have a cable."),
                Form::Ring => {
                    let order = names(&part.hosts);
                    format!("The {hosts} hosts form a ring: {} – {}.", order.join(" – "), order[0])
                }
                Form::Line => format!("The {hosts} hosts form a line: {}.", names(&part.hosts).join(" – ")),
                _ => format!("The {hosts} hosts are joined, but neither as a ring nor as a mesh."),
            },
            (_, parts) => {
                let part = |part: &crate::shape::Part| match part.form {
                    Form::Alone => format!("{} alone", self.name(part.hosts[0])),
                    Form::Mesh if part.hosts.len() == 2 => format!("the pair {}", names(&part.hosts).join(" – ")),
                    Form::Mesh => format!("a mesh of {}", names(&part.hosts).join(", ")),
                    Form::Ring => format!("a ring of {}", names(&part.hosts).join(" – ")),
                    Form::Line => format!("a line of {}", names(&part.hosts).join(" – ")),
                    Form::Other => format!("a group of {}", names(&part.hosts).join(", ")),
                };
                let parts_in_words: Vec<String> = parts.iter().map(part).collect();
                format!("The {hosts} hosts are in {} parts: {}.", parts.len(), parts_in_words.join("; "))
            }
        }
    }

    /// "a cable between mini-2 and mini-4 is missing".
    fn pairs(&self, pairs: &[(usize, usize)]) -> String {
        // A cluster of unconnected hosts would list all its pairs.
        const MOST: usize = 12;
        let mut words: Vec<String> = pairs
            .iter()
            .take(MOST)
            .map(|&(i, j)| format!("{} and {}", self.name(i.min(j)), self.name(i.max(j))))
            .collect();
        if pairs.len() > MOST {
            words.push(format!("{} more pairs", pairs.len() - MOST));
        }
        match &words[..] {
            [] => "nothing is missing".into(),
            [pair] => format!("a cable between {pair} is missing"),
            words => format!("cables are missing between {}", words.join("; ")),
        }
    }

    /// Hosts that have not enough Thunderbolt ports for a mesh.
    fn lack_of_ports(&self) -> Option<String> {
        let needed = self.hosts.len() - 1;
        let short = |facts: &&Facts| facts.ports.as_ref().is_some_and(|ports| ports.len() < needed);
        let host = self.hosts.iter().find(short)?;
        let ports = host.ports.as_ref()?.len();
        Some(format!(
            "A mesh of {} hosts is out of reach: it takes {needed} Thunderbolt ports at each, {} has {ports}.",
            needed + 1,
            host.host
        ))
    }

    /// "Thunderbolt 2 (en3)".
    pub fn socket(&self, host: usize, port: usize) -> String {
        let Some(port) = self.hosts[host].ports.as_ref().and_then(|ports| ports.get(port)) else {
            return "a port".into();
        };
        let title = port.receptacle.map_or("a port".to_owned(), |number| format!("Thunderbolt {number}"));
        match &port.interface {
            Some(interface) => format!("{title} ({interface})"),
            None => title,
        }
    }

    /// The RDMA devices at both ends of a cable.
    ///
    /// # Errors
    ///
    /// Why RDMA does not run over it, as a clause.
    pub fn rdma_over(&self, cable: &Cable) -> Result<[String; 2], String> {
        if cable.gigabits.is_some_and(|gigabits| gigabits < RDMA_GIGABITS) {
            let gigabits = cable.gigabits.unwrap_or_default();
            return Err(format!(
                "it runs at {gigabits} Gb/s, as Thunderbolt 4 does; RDMA needs Thunderbolt 5 all the way"
            ));
        }
        let device = |side: usize| {
            let facts = &self.hosts[cable.ends[side].host];
            let interface = cable.interfaces[side].as_deref().ok_or_else(|| {
                format!(
                    "the network interface of {} of {} is unknown",
                    self.socket(cable.ends[side].host, cable.ends[side].port),
                    facts.host
                )
            })?;
            match &facts.devices {
                None => Err(format!("{} does not tell its RDMA devices: {}", facts.host, facts.why("devices"))),
                Some(_) => facts
                    .device_of(interface)
                    .map(|device| device.name.clone())
                    .ok_or_else(|| format!("{} has no RDMA device rdma_{interface}", facts.host)),
            }
        };
        Ok([device(0)?, device(1)?])
    }
}
