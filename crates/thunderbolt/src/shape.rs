//! What a number of cables between hosts makes up: a mesh, a ring, a line or pieces, and which
//! cables are missing.

#[cfg(test)]
mod tests;

/// What a connected group of hosts forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// One host without cables.
    Alone,
    /// A cable between every two.
    Mesh,
    /// Every host has two neighbours; more cables than a ring needs do no harm.
    Ring,
    /// A ring with one cable missing.
    Line,
    /// Connected, but neither of these: a star, a ring with a tail.
    Other,
}

/// Hosts that are joined by cables, directly or by way of others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Ascending; for a ring or a line, in the order of the cables.
    pub hosts: Vec<usize>,
    /// What its cables form.
    pub form: Form,
}

/// A way around all hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ring {
    /// Every host once, beginning with host 0.
    pub order: Vec<usize>,
    /// Neighbours in this order that have no cable.
    pub missing: Vec<(usize, usize)>,
    /// Whether no order has fewer missing cables. Above 13 hosts that is not searched through.
    pub exact: bool,
}

/// What the cables of a cluster form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// One part if everything is connected.
    pub parts: Vec<Part>,
    /// Pairs (i, j), i below j, that a mesh of all hosts lacks.
    pub missing_for_mesh: Vec<(usize, usize)>,
    /// The ring of all hosts that lacks the fewest cables.
    pub ring: Ring,
}

/// 2¹² sets × 13 ends × 13 next ones: milliseconds.
const MAX_EXACT: usize = 13;

impl Shape {
    /// `counts[i][j]`: cables from i to j, as [`crate::cabling::Cabling::counts`] gives them:
    /// square and symmetric.
    pub fn new(counts: &[Vec<usize>]) -> Self {
        let hosts = counts.len();
        let pairs = (0..hosts).flat_map(|i| (i + 1..hosts).map(move |j| (i, j)));
        let missing_for_mesh = pairs.filter(|&(i, j)| counts[i][j] == 0).collect();
        Self { parts: parts(counts), missing_for_mesh, ring: ring(counts) }
    }

    /// What all hosts together form; `None` if they are in several parts.
    pub fn form(&self) -> Option<Form> {
        match &self.parts[..] {
            [part] => Some(part.form),
            _ => None,
        }
    }

    /// Whether all hosts are on one ring: a mesh is one too, and so is a pair.
    pub fn is_ring(&self) -> bool {
        self.ring.missing.is_empty() && self.ring.order.len() > 1
    }

    /// Whether every pair of hosts has a cable.
    pub fn is_mesh(&self) -> bool {
        self.form() == Some(Form::Mesh)
    }
}

fn parts(counts: &[Vec<usize>]) -> Vec<Part> {
    let mut seen = vec![false; counts.len()];
    let mut parts = Vec::new();
    for start in 0..counts.len() {
        if seen[start] {
            continue;
        }
        seen[start] = true;
        let mut hosts = vec![start];
        let mut next = 0;
        while let Some(&host) = hosts.get(next) {
            for other in 0..counts.len() {
                if counts[host][other] > 0 && !seen[other] {
                    seen[other] = true;
                    hosts.push(other);
                }
            }
            next += 1;
        }
        hosts.sort_unstable();
        parts.push(part(counts, hosts));
    }
    parts
}

fn part(counts: &[Vec<usize>], mut hosts: Vec<usize>) -> Part {
    let neighbours = |host: usize| hosts.iter().filter(|&&other| counts[host][other] > 0).count();
    let degrees: Vec<usize> = hosts.iter().map(|&host| neighbours(host)).collect();
    if hosts.len() == 1 {
        return Part { hosts, form: Form::Alone };
    }
    if degrees.iter().all(|&degree| degree == hosts.len() - 1) {
        return Part { hosts, form: Form::Mesh };
    }
    let own: Vec<Vec<usize>> = hosts.iter().map(|&i| hosts.iter().map(|&j| counts[i][j]).collect()).collect();
    let ring = ring(&own);
    if ring.missing.is_empty() {
        hosts = ring.order.iter().map(|&index| hosts[index]).collect();
        return Part { hosts, form: Form::Ring };
    }
    if degrees.iter().all(|&degree| degree <= 2) {
        // Connected, no ring, no host with three neighbours: a line. It is the ring opened at its
        // one missing cable.
        let (before, after) = ring.missing[0];
        let gap = ring.order.iter().position(|&host| host == after).filter(|_| ring.missing.len() == 1);
        if let Some(gap) = gap {
            debug_assert_eq!(ring.order[(gap + hosts.len() - 1) % hosts.len()], before);
            hosts = (0..hosts.len()).map(|step| hosts[ring.order[(gap + step) % hosts.len()]]).collect();
        }
        return Part { hosts, form: Form::Line };
    }
    Part { hosts, form: Form::Other }
}

/// The way around all hosts that needs the fewest new cables; of several, the one nearest to the
/// given order.
fn ring(counts: &[Vec<usize>]) -> Ring {
    let hosts = counts.len();
    let (order, exact) = match hosts {
        0..=2 => ((0..hosts).collect(), true),
        3..=MAX_EXACT => (best_order(counts), true),
        _ => joined_order(counts),
    };
    // Two hosts have one pair, not two; one host has none.
    let steps = if hosts == 2 { 1 } else { hosts };
    let pairs = (0..steps).map(|step| (order[step], order[(step + 1) % hosts]));
    let missing = pairs.filter(|&(i, j)| i != j && counts[i][j] == 0).collect();
    Ring { order, missing, exact }
}

/// Held and Karp's way of the travelling salesman, with a price of 1 for a missing cable.
fn best_order(counts: &[Vec<usize>]) -> Vec<usize> {
    let hosts = counts.len();
    let price = |i: usize, j: usize| u8::from(counts[i][j] == 0);
    let all = (1usize << hosts) - 1;
    // costs[set][last]: the least price of going on from `last`, with `set` behind us, through the
    // others and home to 0.
    let mut costs = vec![vec![u8::MAX; hosts]; 1 << hosts];
    costs[all] = (0..hosts).map(|last| price(last, 0)).collect();
    for set in (1..all).rev().filter(|set| set & 1 == 1) {
        for last in (0..hosts).filter(|last| set >> last & 1 == 1) {
            let open = (0..hosts).filter(|next| set >> next & 1 == 0);
            let ways = open.map(|next| price(last, next) + costs[set | 1 << next][next]);
            costs[set][last] = ways.min().unwrap_or(u8::MAX);
        }
    }
    let (mut order, mut set) = (vec![0], 1usize);
    while let Some(&last) = order.last().filter(|_| set != all) {
        let goes_on = |next: &usize| {
            set >> next & 1 == 0 && price(last, *next) + costs[set | 1 << next][*next] == costs[set][last]
        };
        let next = (0..hosts).find(goes_on).expect("the price came from one of them");
        order.push(next);
        set |= 1 << next;
    }
    order
}

/// For many hosts: the given order if it is a ring, else stretches of cables joined end to end,
/// which may miss a better way. The flag says whether it is known that there is none.
fn joined_order(counts: &[Vec<usize>]) -> (Vec<usize>, bool) {
    let hosts = counts.len();
    if (0..hosts).all(|host| counts[host][(host + 1) % hosts] > 0) {
        return ((0..hosts).collect(), true);
    }
    // Hosts with few cables first: they have the least choice.
    let degree = |host: usize| counts[host].iter().filter(|&&count| count > 0).count();
    let mut cables: Vec<(usize, usize)> =
        (0..hosts).flat_map(|i| (i + 1..hosts).map(move |j| (i, j))).filter(|&(i, j)| counts[i][j] > 0).collect();
    cables.sort_by_key(|&(i, j)| (degree(i) + degree(j), i, j));
    let mut neighbours: Vec<Vec<usize>> = vec![Vec::new(); hosts];
    let mut stretch: Vec<usize> = (0..hosts).collect();
    for (i, j) in cables {
        let closes = stretch[i] == stretch[j];
        if neighbours[i].len() < 2 && neighbours[j].len() < 2 && !closes {
            neighbours[i].push(j);
            neighbours[j].push(i);
            let (from, to) = (stretch[j], stretch[i]);
            stretch.iter_mut().filter(|stretch| **stretch == from).for_each(|stretch| *stretch = to);
        }
    }
    let mut order = Vec::with_capacity(hosts);
    let mut seen = vec![false; hosts];
    for start in (0..hosts).filter(|&host| neighbours[host].len() < 2) {
        let mut here = Some(start).filter(|&host| !seen[host]);
        while let Some(host) = here {
            seen[host] = true;
            order.push(host);
            here = neighbours[host].iter().copied().find(|&next| !seen[next]);
        }
    }
    let zero = order.iter().position(|&host| host == 0).unwrap_or(0);
    order.rotate_left(zero);
    let complete = (0..hosts).all(|step| counts[order[step]][order[(step + 1) % hosts]] > 0);
    (order, complete)
}
