//! What each process of a stage does in a step, as data, and how long all of them take for it.

use std::collections::HashMap;

use super::Stage;

/// A micro-batch through a layer, forward or back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pass {
    /// The layer.
    pub layer: usize,
    /// The micro-batch.
    pub micro_batch: usize,
    /// Whether the layer is differentiated.
    pub is_back: bool,
}

/// Seconds of the parts of a step.
#[derive(Clone, Copy, Debug)]
pub struct Seconds {
    /// A layer, forward.
    pub forward: f64,
    /// A layer, computed again and differentiated.
    pub back: f64,
    /// A tensor on its way to another process.
    pub hop: f64,
}

/// How a step went.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Simulated {
    /// Seconds until the last process is done.
    pub seconds: f64,
    /// The part of that time in which processes compute.
    pub busy: f64,
    /// The most tensors that were on their way to a process, or waited there, at a time.
    pub most_waiting: usize,
}

impl Stage {
    /// What process `mine` does in a step, in its order: each of its layers with all micro-batches, then back.
    /// Layers below `first` are not differentiated.
    pub fn passes(&self, mine: usize, micro_batches: usize, first: usize) -> Vec<Pass> {
        let held = || (0..self.of_layer.len()).filter(|&layer| self.of_layer[layer] == mine);
        let all = move |layer: usize, is_back: bool| {
            (0..micro_batches).map(move |micro_batch| Pass { layer, micro_batch, is_back })
        };
        let back = held().rev().filter(|&layer| layer >= first);
        held().flat_map(|layer| all(layer, false)).chain(back.flat_map(|layer| all(layer, true))).collect()
    }

    /// What a pass has to wait for.
    fn before(&self, pass: Pass) -> Option<Pass> {
        let last = self.of_layer.len() - 1;
        match (pass.is_back, pass.layer) {
            (false, 0) => None,
            (false, layer) => Some(Pass { layer: layer - 1, ..pass }),
            (true, layer) if layer == last => Some(Pass { is_back: false, ..pass }),
            (true, layer) => Some(Pass { layer: layer + 1, ..pass }),
        }
    }

    /// A step of all processes, each in the order of [`Stage::passes`]. Tensors travel beside the computing, one
    /// after the other from each process. `None` if processes wait for each other for ever.
    pub fn simulate(&self, micro_batches: usize, first: usize, seconds: Seconds) -> Option<Simulated> {
        let count = self.count();
        let orders: Vec<Vec<Pass>> = (0..count).map(|mine| self.passes(mine, micro_batches, first)).collect();
        let mut next = vec![0; count];
        let (mut free, mut link_free, mut computing) = (vec![0.0f64; count], vec![0.0f64; count], 0.0);
        // When what a pass made is where the next one needs it.
        let mut arrived: HashMap<Pass, f64> = HashMap::new();
        // (when it was sent, when it was used, to whom)
        let mut travels: Vec<(f64, f64, usize)> = Vec::new();
        let mut sent: HashMap<Pass, f64> = HashMap::new();
        while next.iter().zip(&orders).any(|(next, order)| *next < order.len()) {
            let mut moved = false;
            for process in 0..count {
                while let Some(&pass) = orders[process].get(next[process]) {
                    let before = self.before(pass);
                    let Some(ready) = before.map_or(Some(0.0), |before| arrived.get(&before).copied()) else { break };
                    let begins = free[process].max(ready);
                    let takes = if pass.is_back { seconds.back } else { seconds.forward };
                    let ends = begins + takes;
                    (free[process], computing) = (ends, computing + takes);
                    if let Some(sent) = before.and_then(|before| sent.get(&before)) {
                        travels.push((*sent, begins, process));
                    }
                    let goes_on =
                        self.of_layer.get(if pass.is_back { pass.layer.wrapping_sub(1) } else { pass.layer + 1 });
                    let arrives = if goes_on.is_some_and(|next| *next != process) {
                        let leaves = link_free[process].max(ends);
                        link_free[process] = leaves + seconds.hop;
                        sent.insert(pass, ends);
                        link_free[process]
                    } else {
                        ends
                    };
                    arrived.insert(pass, arrives);
                    (next[process], moved) = (next[process] + 1, true);
                }
            }
            if !moved {
                return None;
            }
        }
        let whole = free.into_iter().fold(0.0, f64::max);
        Some(Simulated {
            seconds: whole,
            busy: computing / (whole * count as f64),
            most_waiting: (0..count).map(|process| most_waiting(&travels, process)).max().unwrap_or(0),
        })
    }
}

/// The most tensors for a process at a time. `travels`: (when it was sent, when it was used, to whom).
fn most_waiting(travels: &[(f64, f64, usize)], process: usize) -> usize {
    let here = || travels.iter().filter(|travel| travel.2 == process);
    let sorted = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times
    };
    let sent = sorted(here().map(|travel| travel.0).collect());
    let used = sorted(here().map(|travel| travel.1).collect());
    let until = |times: &[f64], now: f64| times.partition_point(|time| *time <= now);
    sent.iter().map(|&now| until(&sent, now) - until(&used, now)).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECONDS: Seconds = Seconds { forward: 1.0, back: 3.0, hop: 0.1 };

    #[test]
    fn a_process_goes_through_its_layers_and_back() {
        let stage = Stage::in_turn(3, 2, 0);
        let text = |mine: usize| -> Vec<String> {
            let word = |pass: Pass| {
                let way = if pass.is_back { "back" } else { "forward" };
                format!("{way} {} {}", pass.layer, pass.micro_batch)
            };
            stage.passes(mine, 2, 1).into_iter().map(word).collect()
        };
        assert_eq!(text(0), ["forward 0 0", "forward 0 1", "forward 2 0", "forward 2 1", "back 2 0", "back 2 1"]);
        assert_eq!(text(1), ["forward 1 0", "forward 1 1", "back 1 0", "back 1 1"]);
    }

    /// For all numbers of processes and micro-batches: nobody waits for ever, each process is idle for no longer
    /// than the others need to reach it and it to be left, and no more than two steps of a layer wait anywhere.
    #[test]
    fn no_plan_waits_for_ever() {
        for stages in 1..=8usize {
            for layers in [stages, 2 * stages + 1, 33] {
                let stage = Stage::in_turn(layers, stages, 0);
                for micro_batches in 1..=64 {
                    let what = format!("{stages} stages, {layers} layers, {micro_batches} micro-batches");
                    let done = stage.simulate(micro_batches, 0, SECONDS).unwrap_or_else(|| panic!("{what}: stuck"));
                    // The work of the process with most layers, and a ring's length at each end.
                    let work = (layers.div_ceil(stages) * micro_batches) as f64 * (SECONDS.forward + SECONDS.back);
                    let ends = stages as f64 * (SECONDS.forward + SECONDS.back + 2.0 * SECONDS.hop);
                    let alone = layers as f64 * (SECONDS.forward + SECONDS.back + 2.0 * SECONDS.hop);
                    let bound = if micro_batches <= stages { alone.max(work) * 2.0 } else { work + ends };
                    assert!(done.seconds <= bound + 1e-9, "{what}: {done:?} is above {bound}");
                    assert!(done.most_waiting <= 2 * micro_batches, "{what}: {done:?}");
                }
            }
        }
    }

    /// As many as anywhere, or one less on the last ones: layer n on process n mod N.
    #[test]
    fn even_counts_go_round() {
        for stages in 1..=8 {
            for layers in stages..=130 {
                let stage = Stage::in_turn(layers, stages, 0);
                assert_eq!(Stage::dealt(&stage.counts(), 0), stage, "{stages} stages, {layers} layers");
                assert_eq!(Stage::ending_on(stage.last(), &stage.counts(), 0), stage, "{stages}, {layers}");
            }
        }
        assert_eq!(*Stage::dealt(&[2, 1], 0).of_layer, [0, 1, 0]);
        assert_eq!(*Stage::dealt(&[1, 4], 0).of_layer, [1, 1, 0, 1, 1]);
    }

    /// (layers of each process)
    const UNEVEN: [&[usize]; 12] = [
        &[1],
        &[2, 1],
        &[1, 4],
        &[9, 1],
        &[12, 10, 8],
        &[1, 1, 7],
        &[20, 5, 5],
        &[3, 14, 15, 9],
        &[1, 2, 3, 4, 5],
        &[8, 1, 8, 1, 8, 1],
        &[30, 1, 1, 1, 1, 1, 1],
        &[1, 2, 3, 5, 8, 13, 21, 34],
    ];

    /// Uneven placements: nobody waits for ever, each process has as many layers as it was given, and a step is no
    /// longer than the work of the busiest process and what its longest stretch makes the others wait.
    #[test]
    fn no_uneven_plan_waits_for_ever() {
        let ends = |counts: &'static [usize]| (0..=counts.len()).map(move |end| (counts, end));
        for (counts, end) in UNEVEN.into_iter().flat_map(ends) {
            let (layers, most) = (counts.iter().sum::<usize>(), *counts.iter().max().expect("a process"));
            // With each process as the one of the last layer, and with that which it comes to by itself.
            let stage = if end < counts.len() { Stage::ending_on(end, counts, 0) } else { Stage::dealt(counts, 0) };
            assert_eq!(stage.counts(), counts);
            assert!(end == counts.len() || stage.last() == end);
            for (micro_batches, first) in (1..=64).flat_map(|count| [(count, 0), (count, layers - 1)]) {
                let what = format!("{counts:?} to {end}, {micro_batches} micro-batches from layer {first} on");
                let done = stage.simulate(micro_batches, first, SECONDS).unwrap_or_else(|| panic!("{what}: stuck"));
                let passes: Vec<usize> =
                    (0..counts.len()).map(|n| stage.passes(n, micro_batches, first).len()).collect();
                let of = |n: usize| {
                    micro_batches * (counts[n] + (first..layers).filter(|&l| stage.of_layer[l] == n).count())
                };
                assert_eq!(passes, (0..counts.len()).map(of).collect::<Vec<_>>(), "{what}");
                if first == 0 {
                    let work = (most * micro_batches) as f64 * (SECONDS.forward + SECONDS.back);
                    // One micro-batch through all layers and back, with a hop behind each.
                    let alone = layers as f64 * (SECONDS.forward + SECONDS.back + 2.0 * SECONDS.hop);
                    assert!(done.seconds >= work - 1e-9, "{what}: {done:?} is below {work}");
                    assert!(done.seconds <= 2.0 * (work + alone), "{what}: {done:?} is above {work} and {alone}");
                }
            }
        }
    }

    /// Layers next to each other on a process need no hop.
    #[test]
    fn neighbours_on_a_process_need_no_hop() {
        let slow = Seconds { hop: 1e6, ..SECONDS };
        let stage = Stage { of_layer: [0, 0, 0, 1, 1].into(), mine: 0 };
        assert_eq!(stage.links(), [(0, 1), (1, 0)]);
        let done = stage.simulate(1, 0, slow).expect("an end");
        assert!((2e6..2.1e6).contains(&done.seconds), "one hop forward and one back: {done:?}");
    }

    /// 61 layers over 4 processes, as Kimi K2's: 95 % busy with 16 micro-batches.
    #[test]
    fn many_micro_batches_keep_all_busy() {
        let stage = Stage::in_turn(61, 4, 0);
        let busy = |micro_batches| stage.simulate(micro_batches, 0, SECONDS).expect("an end").busy;
        assert!(busy(1) < 0.3, "{}", busy(1));
        assert!(busy(16) > 0.94, "{}", busy(16));
        assert_eq!(Stage::in_turn(5, 1, 0).simulate(3, 0, SECONDS).expect("an end").busy, 1.0);
    }
}
