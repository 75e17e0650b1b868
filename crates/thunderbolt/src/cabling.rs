//! Which port of which host is cabled to which port of which other host.
//!
//! A Mac reports the domain UUID of the port at the other end of a cable. An index of all ports
//! turns that into a host. Both ends should report the same cable. If only one does (a Mac behind a
//! dock sees the dock instead), the cable counts and is marked.

use std::collections::BTreeMap;

use crate::facts::{Facts, Port};

#[cfg(test)]
mod tests;

/// A port: the index of a host and the index of one of its `ports`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct End {
    /// The index of a host.
    pub host: usize,
    /// The index of one of its ports.
    pub port: usize,
}

/// A cable between two hosts of the list; `ends[0].host` is the smaller index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cable {
    /// The ports that it joins.
    pub ends: [End; 2],
    /// The interface at each end, such as "en5", if it is known.
    pub interfaces: [Option<String>; 2],
    /// Gb/s that it runs at: the lesser of what both ends say.
    pub gigabits: Option<u32>,
    /// Docks and displays in between.
    pub through: Vec<String>,
    /// Whether only one end reports it.
    pub one_sided: bool,
}

/// A cable to a Mac that is not in the list of hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stranger {
    /// The port that the cable is in.
    pub end: End,
    /// "Mac Studio", as it calls itself.
    pub name: String,
}

/// All cables, ordered by their ends.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cabling {
    /// Cables between two hosts of the list.
    pub cables: Vec<Cable>,
    /// Cables to other Macs.
    pub strangers: Vec<Stranger>,
    /// Pairs of hosts that are one machine under two names.
    pub same_machine: Vec<(usize, usize)>,
    /// Cables from a Mac to itself.
    pub loops: Vec<(End, End)>,
}

impl Cabling {
    /// Matches the ports of all hosts.
    pub fn new(hosts: &[Facts]) -> Self {
        let mut owners: BTreeMap<&str, End> = BTreeMap::new();
        let mut cabling = Self::default();
        for (end, port) in ports(hosts) {
            let owner = *owners.entry(&port.domain).or_insert(end);
            let pair = (owner.host, end.host);
            if owner.host != end.host && !cabling.same_machine.contains(&pair) {
                cabling.same_machine.push(pair);
            }
        }
        let mut cables: BTreeMap<[End; 2], Cable> = BTreeMap::new();
        for (end, port) in ports(hosts) {
            for far in &port.far {
                let Some(&other) = owners.get(far.domain.as_str()) else {
                    cabling.strangers.push(Stranger { end, name: far.name.clone() });
                    continue;
                };
                let ends = [end.min(other), end.max(other)];
                if end.host == other.host {
                    let pair = (ends[0], ends[1]);
                    if !cabling.loops.contains(&pair) {
                        cabling.loops.push(pair);
                    }
                    continue;
                }
                if let Some(cable) = cables.get_mut(&ends) {
                    cable.one_sided = false;
                    if cable.through.is_empty() {
                        cable.through.clone_from(&far.through);
                    }
                    continue;
                }
                let port_at = |end: End| hosts[end.host].ports.as_ref().map(|ports| &ports[end.port]);
                let running = |end| port_at(end)?.speed.filter(|speed| !speed.is_limit).map(|speed| speed.gigabits);
                let cable = Cable {
                    ends,
                    interfaces: ends.map(|end| port_at(end)?.interface.clone()),
                    gigabits: ends.iter().filter_map(|&end| running(end)).min(),
                    through: far.through.clone(),
                    one_sided: true,
                };
                cables.insert(ends, cable);
            }
        }
        cabling.cables = cables.into_values().collect();
        cabling
    }

    /// How many cables lead from host i to host j.
    pub fn counts(&self, hosts: usize) -> Vec<Vec<usize>> {
        let mut counts = vec![vec![0; hosts]; hosts];
        for [a, b] in self.cables.iter().map(|cable| cable.ends) {
            counts[a.host][b.host] += 1;
            counts[b.host][a.host] += 1;
        }
        counts
    }

    /// The cables between two hosts, in the same order from either side.
    pub fn between(&self, i: usize, j: usize) -> impl Iterator<Item = &Cable> {
        let hosts = [i.min(j), i.max(j)];
        self.cables.iter().filter(move |cable| cable.ends.map(|end| end.host) == hosts)
    }
}

impl Cable {
    /// Which of the two ends is at a host: 0 or 1.
    pub fn side(&self, host: usize) -> usize {
        usize::from(self.ends[1].host == host)
    }

    /// Its interface at one of its two hosts.
    pub fn interface(&self, host: usize) -> Option<&str> {
        self.interfaces[self.side(host)].as_deref()
    }
}

fn ports(hosts: &[Facts]) -> impl Iterator<Item = (End, &Port)> {
    hosts.iter().enumerate().flat_map(|(host, facts)| {
        facts.ports.iter().flatten().enumerate().map(move |(port, found)| (End { host, port }, found))
    })
}
