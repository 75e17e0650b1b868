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
        let waiting = |&(sent, _, to): &(f64, f64, usize)| {
            travels.iter().filter(|other| other.2 == to && other.0 <= sent && sent < other.1).count()
        };
        Some(Simulated {
            seconds: whole,
            busy: computing / (whole * count as f64),
            most_waiting: travels.iter().map(waiting).max().unwrap_or(0),
        })
    }
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
