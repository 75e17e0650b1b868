//! The hostfile that suits what was found.

use finetune_rendezvous::{Host, Hostfile};

use super::Discovery;
use super::addresses::meeting_point;
use crate::facts::{PortState, System, VerbsDevice, network};
use crate::shape::{Form, Part, Shape};

/// A hostfile, and why it is as it is.
#[derive(Debug, Clone)]
pub struct Proposal {
    /// Rank order: the given one, or the order of a ring or a chain so that neighbours are adjacent.
    pub hostfile: Hostfile,
    /// Sentences for the user: why the hostfile is as it is.
    pub notes: Vec<String>,
}

/// What `finetune_allreduce::DeviceMatrix` takes.
const MAX_RDMA_HOSTS: usize = 64;

/// `names[i][j]`: the devices of host i towards host j.
type Matrix = Vec<Vec<Vec<String>>>;

impl Discovery {
    /// RDMA as a mesh where all pairs have it, as a ring where a ring has it, TCP otherwise, with the cables of a chain
    /// written down. `None` if no host answered.
    ///
    /// The names of backends are MLX's: "jaccl", "jaccl-ring" and "ring", which is TCP.
    pub fn proposal(&self) -> Option<Proposal> {
        let hosts = self.hosts.len();
        if hosts == 0 {
            return None;
        }
        let mut notes: Vec<String> = self
            .unreachable
            .iter()
            .filter_map(|error| error.host())
            .map(|host| format!("{host} did not answer and is left out"))
            .collect();
        let has = |system: System| self.hosts.iter().any(|facts| facts.system == system);
        let (order, backend, devices) = match (has(System::Mac), has(System::Linux)) {
            (true, false) => self.macs(&mut notes),
            (false, true) => self.linux_boxes(&mut notes),
            _ => ((0..hosts).collect(), None, None),
        };
        if hosts > 1 && devices.is_none() {
            notes.push("without RDMA between all hosts the ranks talk over TCP".into());
        }
        let meeting = meeting_point(&self.hosts);
        notes.extend(meeting.notes);
        let cable = if devices.is_none() { self.pair_of_cables() } else { None };
        let host = |&host: &usize| Host {
            ssh: self.name(host).to_owned(),
            ips: match &cable {
                Some(ends) => ends[host].clone(),
                None => meeting.of_hosts[host].iter().cloned().collect(),
            },
            rdma: match &devices {
                Some(matrix) => order.iter().map(|&peer| matrix[host][peer].clone()).collect(),
                None => Vec::new(),
            },
        };
        let hostfile = Hostfile {
            backend: backend.or((devices.is_none()).then_some("ring")).map(str::to_owned),
            environment: Vec::new(),
            hosts: order.iter().map(host).collect(),
            notices: Vec::new(),
        };
        Some(Proposal { hostfile, notes })
    }

    fn macs(&self, notes: &mut Vec<String>) -> (Vec<usize>, Option<&'static str>, Option<Matrix>) {
        let hosts = self.hosts.len();
        let given = (0..hosts).collect();
        if hosts > MAX_RDMA_HOSTS {
            notes.push(format!("above {MAX_RDMA_HOSTS} hosts RDMA is not used"));
            return (given, None, None);
        }
        let mut devices: Matrix = vec![vec![Vec::new(); hosts]; hosts];
        for cable in &self.cabling.cables {
            let [a, b] = cable.ends.map(|end| end.host);
            // The devices stay when RDMA is switched off, and do not work then.
            let off = [a, b].into_iter().find(|&host| self.hosts[host].rdma_enabled == Some(false));
            match (self.rdma_over(cable), off) {
                (Ok(_), Some(host)) => {
                    let (one, other, at) = (self.name(a), self.name(b), self.name(host));
                    notes.push(format!(
                        "no RDMA over a cable between {one} and {other}: it is switched off at {at} (`rdma_ctl status`)"
                    ));
                }
                (Ok([there, back]), None) => {
                    // The k-th name of one side and the k-th of the other are the same cable.
                    devices[a][b].push(there);
                    devices[b][a].push(back);
                }
                (Err(why), _) => {
                    notes.push(format!("no RDMA over a cable between {} and {}: {why}", self.name(a), self.name(b)));
                }
            }
        }
        let counts: Vec<Vec<usize>> = devices.iter().map(|row| row.iter().map(Vec::len).collect()).collect();
        let shape = Shape::new(&counts);
        if hosts > 1 && shape.is_mesh() {
            return (given, Some("jaccl"), Some(devices));
        }
        if let [Part { hosts: line, form: Form::Line }] = &shape.parts[..] {
            let mut line = line.clone();
            if line.iter().position(|host| *host == 0).is_some_and(|place| 2 * place > line.len() - 1) {
                line.reverse();
            }
            notes.push(format!(
                "the cables form a chain: sums over all hosts go over TCP, and layers that are spread over hosts \
                 (parallel.stages) have hops between neighbours only; rank 0 is {}, at an end of it",
                self.name(line[0])
            ));
            let pairs: Vec<(usize, usize)> = line.windows(2).map(|two| (two[0], two[1])).collect();
            return (line, Some("ring"), Some(of_neighbours(&devices, &pairs)));
        }
        if !shape.is_ring() {
            return (given, None, None);
        }
        // Every pair of neighbours must have the same number of cables, and no other pair any.
        let order = shape.ring.order;
        let pairs: Vec<(usize, usize)> = (0..hosts).map(|step| (order[step], order[(step + 1) % hosts])).collect();
        let ring = of_neighbours(&devices, &pairs);
        if ring.iter().flatten().flatten().count() < devices.iter().flatten().flatten().count() {
            notes
                .push("cables that are not part of the ring, or more than its thinnest place has, are not used".into());
        }
        (order, Some("jaccl-ring"), Some(ring))
    }

    /// Cards behind a switch: one device per host serves all others that it shares a network with.
    fn linux_boxes(&self, notes: &mut Vec<String>) -> (Vec<usize>, Option<&'static str>, Option<Matrix>) {
        let hosts = self.hosts.len();
        let given: Vec<usize> = (0..hosts).collect();
        if hosts > MAX_RDMA_HOSTS {
            notes.push(format!("above {MAX_RDMA_HOSTS} hosts RDMA is not used"));
            return (given, None, None);
        }
        if hosts < 2 || self.hosts.iter().all(|facts| facts.devices.as_ref().is_none_or(Vec::is_empty)) {
            return (given, None, None);
        }
        let mut devices: Matrix = vec![vec![Vec::new(); hosts]; hosts];
        let pairs = (0..hosts).flat_map(|i| (0..hosts).map(move |j| (i, j))).filter(|(i, j)| i != j);
        for (i, j) in pairs {
            let Some(device) = self.card(i, j) else {
                notes.push(format!(
                    "no RDMA: no active device of {} has an IPv4 address in a network of one of {}",
                    self.name(i),
                    self.name(j)
                ));
                return (given, None, None);
            };
            devices[i][j] = vec![device];
        }
        (given, None, Some(devices))
    }

    /// The device of host i for host j: on a common network, the fastest pair first.
    fn card(&self, i: usize, j: usize) -> Option<String> {
        let active = |host: usize| {
            let devices = self.hosts[host].devices.iter().flatten();
            devices.filter(|device| device.state == PortState::Active)
        };
        let pairs = active(i).flat_map(|own| active(j).map(move |other| (own, other)));
        let joined = pairs.filter(|(own, other)| self.share_a_network(i, own, j, other));
        let speed = |(own, other): &(&VerbsDevice, &VerbsDevice)| own.gigabits.min(other.gigabits);
        // Of equally fast ones the first.
        let best = joined.reduce(|best, other| if speed(&other) > speed(&best) { other } else { best })?;
        Some(best.0.name.clone())
    }

    fn share_a_network(&self, i: usize, own: &VerbsDevice, j: usize, other: &VerbsDevice) -> bool {
        let networks = |host: usize, device: &VerbsDevice| {
            let interface = device.interface.as_deref().and_then(|name| self.hosts[host].interface(name));
            interface.map(|interface| interface.addresses.clone()).unwrap_or_default()
        };
        let others = networks(j, other);
        networks(i, own).iter().any(|&(address, prefix)| {
            let same =
                |&(far, far_prefix): &(_, u8)| prefix == far_prefix && network(far, prefix) == network(address, prefix);
            !address.is_loopback() && others.iter().any(same)
        })
    }

    /// Two hosts without RDMA meet on their cables, if these have addresses: per host, one address
    /// for each cable.
    fn pair_of_cables(&self) -> Option<[Vec<String>; 2]> {
        if self.hosts.len() != 2 {
            return None;
        }
        let mut ends = [Vec::new(), Vec::new()];
        for cable in &self.cabling.cables {
            let interface = |side: usize| self.hosts[side].interface(cable.interfaces[side].as_deref()?);
            let (Some(here), Some(there)) = (interface(0), interface(1)) else { continue };
            let joined = here.addresses.iter().find_map(|&(address, prefix)| {
                let far = there.addresses.iter().find(|(far, _)| network(*far, prefix) == network(address, prefix))?.0;
                (!address.is_link_local() && far != address).then_some((address, far))
            });
            if let Some((address, far)) = joined {
                ends[0].push(address.to_string());
                ends[1].push(far.to_string());
            }
        }
        (!ends[0].is_empty()).then_some(ends)
    }
}

/// The devices of these pairs only, of each as many as the pair with the fewest has.
fn of_neighbours(devices: &Matrix, pairs: &[(usize, usize)]) -> Matrix {
    let most = pairs.iter().map(|&(i, j)| devices[i][j].len()).min().unwrap_or(0);
    let mut used: Matrix = vec![vec![Vec::new(); devices.len()]; devices.len()];
    for &(i, j) in pairs {
        used[i][j] = devices[i][j][..most].to_vec();
        used[j][i] = devices[j][i][..most].to_vec();
    }
    used
}
