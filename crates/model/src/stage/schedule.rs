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

/// In which order micro-batches go through layers that follow each other on one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// A micro-batch through all of them, then the next one: the next process begins after the first. For layers in
    /// memory (Huang et al. 2019, "GPipe").
    MicroBatches,
    /// All micro-batches through a layer, then through the next layer: each layer is read once for all of them. The
    /// next process begins when the last of these layers does.
    Layers,
}

/// Seconds of the parts of a step.
#[derive(Clone, Copy, Debug)]
pub struct Seconds {
    /// A layer, forward.
    pub forward: f64,
    /// A layer, computed again and differentiated.
    pub back: f64,
    /// The output layer and the loss of a micro-batch, forward and back. The process of the last layer computes them
    /// for all micro-batches before it begins the way back, while the others wait.
    pub head: f64,
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
    /// What process `mine` does in a step, in its order: its layers with all micro-batches, then back.
    /// Layers below `first` are not differentiated.
    pub fn passes(&self, mine: usize, micro_batches: usize, first: usize, order: Order) -> Vec<Pass> {
        let mut passes = self.forward(mine, micro_batches, order);
        passes.extend(self.back(mine, micro_batches, first, order));
        passes
    }

    /// The way forward of process `mine`.
    pub(crate) fn forward(&self, mine: usize, micro_batches: usize, order: Order) -> Vec<Pass> {
        self.through(self.runs(mine), micro_batches, order, false)
    }

    /// The way back of process `mine`, down to layer `first`.
    pub(crate) fn back(&self, mine: usize, micro_batches: usize, first: usize, order: Order) -> Vec<Pass> {
        let mut runs = self.runs(mine);
        runs.reverse();
        for run in &mut runs {
            run.retain(|layer| *layer >= first);
            run.reverse();
        }
        self.through(runs, micro_batches, order, true)
    }

    /// The layers of process `mine`, those together that follow each other.
    fn runs(&self, mine: usize) -> Vec<Vec<usize>> {
        let layers: Vec<usize> = (0..self.of_layer.len()).collect();
        let runs = layers.chunk_by(|one, next| self.of_layer[*one] == self.of_layer[*next]);
        runs.filter(|run| self.of_layer[run[0]] == mine).map(<[usize]>::to_vec).collect()
    }

    fn through(&self, runs: Vec<Vec<usize>>, micro_batches: usize, order: Order, is_back: bool) -> Vec<Pass> {
        let pass = |layer: usize, micro_batch: usize| Pass { layer, micro_batch, is_back };
        let of_run = |run: Vec<usize>| -> Vec<Pass> {
            match order {
                Order::MicroBatches => {
                    (0..micro_batches).flat_map(|n| run.iter().map(move |&layer| pass(layer, n))).collect()
                }
                Order::Layers => {
                    run.iter().flat_map(|&layer| (0..micro_batches).map(move |n| pass(layer, n))).collect()
                }
            }
        };
        runs.into_iter().flat_map(of_run).collect()
    }

    /// The passes of process `mine` with those through the output layer, which counts as one layer more here.
    fn passes_and_heads(&self, mine: usize, micro_batches: usize, first: usize, order: Order) -> Vec<Pass> {
        let mut passes = self.forward(mine, micro_batches, order);
        let heads = if mine == self.last() { micro_batches } else { 0 };
        passes.extend((0..heads).map(|n| Pass { layer: self.of_layer.len(), micro_batch: n, is_back: false }));
        passes.extend(self.back(mine, micro_batches, first, order));
        passes
    }

    /// What a pass has to wait for.
    fn before(&self, pass: Pass) -> Option<Pass> {
        let head = self.of_layer.len();
        match (pass.is_back, pass.layer) {
            (false, 0) => None,
            (false, layer) => Some(Pass { layer: layer - 1, ..pass }),
            (true, layer) => Some(Pass { layer: layer + 1, is_back: layer + 1 < head, ..pass }),
        }
    }

    /// A step of all processes, each in the order of [`Stage::passes`], with the losses where the way back begins.
    /// Tensors travel beside the computing, one after the other from each process. `None` if processes wait for each
    /// other for ever.
    pub fn simulate(&self, micro_batches: usize, first: usize, order: Order, seconds: Seconds) -> Option<Simulated> {
        let count = self.count();
        let orders: Vec<Vec<Pass>> =
            (0..count).map(|mine| self.passes_and_heads(mine, micro_batches, first, order)).collect();
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
                    let takes = match pass {
                        Pass { is_back: true, .. } => seconds.back,
                        Pass { layer, .. } if layer == self.of_layer.len() => seconds.head,
                        _ => seconds.forward,
                    };
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

    const ORDERS: [Order; 2] = [Order::MicroBatches, Order::Layers];
    const SECONDS: Seconds = Seconds { forward: 1.0, back: 3.0, head: 2.0, hop: 0.1 };
    /// What placements cost by themselves.
    const NO_HEAD: Seconds = Seconds { head: 0.0, ..SECONDS };

    #[test]
    fn a_process_goes_through_its_layers_and_back() {
        let stage = Stage::in_turn(3, 2, 0);
        let text = |mine: usize| -> Vec<String> {
            let word = |pass: Pass| {
                let way = if pass.is_back { "back" } else { "forward" };
                format!("{way} {} {}", pass.layer, pass.micro_batch)
            };
            stage.passes(mine, 2, 1, Order::MicroBatches).into_iter().map(word).collect()
        };
        assert_eq!(text(0), ["forward 0 0", "forward 0 1", "forward 2 0", "forward 2 1", "back 2 0", "back 2 1"]);
        assert_eq!(text(1), ["forward 1 0", "forward 1 1", "back 1 0", "back 1 1"]);
    }

    /// Layers that follow each other: by micro-batches in memory, by layers from the disk.
    #[test]
    fn the_order_of_a_run_of_layers() {
        let passes = |order| -> Vec<(usize, usize, bool)> {
            let passes = Stage::contiguous(4, 2, 0).passes(1, 2, 0, order);
            passes.into_iter().map(|pass| (pass.layer, pass.micro_batch, pass.is_back)).collect()
        };
        let forward = [(2, 0, false), (3, 0, false), (2, 1, false), (3, 1, false)];
        assert_eq!(passes(Order::MicroBatches)[..4], forward);
        assert_eq!(passes(Order::MicroBatches)[4..], [(3, 0, true), (2, 0, true), (3, 1, true), (2, 1, true)]);
        assert_eq!(passes(Order::Layers)[..4], [(2, 0, false), (2, 1, false), (3, 0, false), (3, 1, false)]);
        assert_eq!(passes(Order::Layers)[4..], [(3, 0, true), (3, 1, true), (2, 0, true), (2, 1, true)]);
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
                    let done = stage
                        .simulate(micro_batches, 0, Order::Layers, SECONDS)
                        .unwrap_or_else(|| panic!("{what}: stuck"));
                    // The work of the process with most layers, the losses, and a ring's length at each end.
                    let losses = micro_batches as f64 * SECONDS.head;
                    let work = (layers.div_ceil(stages) * micro_batches) as f64 * (SECONDS.forward + SECONDS.back);
                    let ends = stages as f64 * (SECONDS.forward + SECONDS.back + 2.0 * SECONDS.hop);
                    let alone = layers as f64 * (SECONDS.forward + SECONDS.back + 2.0 * SECONDS.hop);
                    let bound = losses + if micro_batches <= stages { alone.max(work) * 2.0 } else { work + ends };
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
        for ((counts, end), order) in UNEVEN.into_iter().flat_map(ends).flat_map(|of| ORDERS.map(|order| (of, order))) {
            let (layers, most) = (counts.iter().sum::<usize>(), *counts.iter().max().expect("a process"));
            // With each process as the one of the last layer, and with that which it comes to by itself.
            let stage = if end < counts.len() { Stage::ending_on(end, counts, 0) } else { Stage::dealt(counts, 0) };
            assert_eq!(stage.counts(), counts);
            assert!(end == counts.len() || stage.last() == end);
            for (micro_batches, first) in (1..=64).flat_map(|count| [(count, 0), (count, layers - 1)]) {
                let what =
                    format!("{counts:?} to {end}, {micro_batches} micro-batches from layer {first} on, {order:?}");
                let done = stage.simulate(micro_batches, first, order, SECONDS);
                let done = done.unwrap_or_else(|| panic!("{what}: stuck"));
                let passes: Vec<usize> =
                    (0..counts.len()).map(|n| stage.passes(n, micro_batches, first, order).len()).collect();
                let of = |n: usize| {
                    micro_batches * (counts[n] + (first..layers).filter(|&l| stage.of_layer[l] == n).count())
                };
                assert_eq!(passes, (0..counts.len()).map(of).collect::<Vec<_>>(), "{what}");
                if first == 0 {
                    let losses = micro_batches as f64 * SECONDS.head;
                    let work = losses + (most * micro_batches) as f64 * (SECONDS.forward + SECONDS.back);
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
        let done = stage.simulate(1, 0, Order::Layers, slow).expect("an end");
        assert!((2e6..2.1e6).contains(&done.seconds), "one hop forward and one back: {done:?}");
    }

    /// 61 layers over 4 processes, as Kimi K2's: 95 % busy with 16 micro-batches.
    #[test]
    fn many_micro_batches_keep_all_busy() {
        let stage = Stage::in_turn(61, 4, 0);
        let busy = |micro_batches| stage.simulate(micro_batches, 0, Order::Layers, NO_HEAD).expect("an end").busy;
        assert!(busy(1) < 0.3, "{}", busy(1));
        assert!(busy(16) > 0.94, "{}", busy(16));
        assert_eq!(Stage::in_turn(5, 1, 0).simulate(3, 0, Order::Layers, NO_HEAD).expect("an end").busy, 1.0);
    }

    /// For all numbers of processes and micro-batches: layers next to each other are idle for (stages - 1) of
    /// (micro-batches + stages - 1) parts of a step, as in GPipe. From the disk a process hands nothing on before it
    /// comes to its last layer, so that all but the last layers of each wait for each other.
    #[test]
    fn what_layers_next_to_each_other_cost() {
        let seconds = Seconds { hop: 0.0, ..NO_HEAD };
        for (stages, each) in (1..=8usize).flat_map(|stages| [1, 2, 5].map(|each| (stages, each))) {
            let stage = Stage::contiguous(stages * each, stages, 0);
            assert_eq!(stage.counts(), vec![each; stages]);
            for micro_batches in 1..=64usize {
                let what = format!("{stages} stages of {each} layers, {micro_batches} micro-batches");
                let took = |order| stage.simulate(micro_batches, 0, order, seconds).expect("an end");
                let in_memory = took(Order::MicroBatches);
                assert_eq!(in_memory.seconds, (4 * each * (micro_batches + stages - 1)) as f64, "{what}");
                let busy = micro_batches as f64 / (micro_batches + stages - 1) as f64;
                assert!((in_memory.busy - busy).abs() < 1e-9, "{what}: {in_memory:?}");
                let before_last = (stages - 1) * ((each - 1) * micro_batches + 1);
                let from_disk = took(Order::Layers);
                assert_eq!(from_disk.seconds, (4 * (before_last + each * micro_batches)) as f64, "{what}");
                assert!(in_memory.most_waiting <= micro_batches && from_disk.most_waiting <= micro_batches, "{what}");
            }
        }
    }

    /// There and back: as many layers as asked for on each, hops between neighbours only, and little more idle than
    /// next to each other in memory, also from the disk.
    #[test]
    fn a_wave_goes_between_neighbours() {
        assert_eq!(*Stage::wave(&[2, 2, 2], 0).of_layer, [0, 1, 2, 2, 1, 0]);
        assert_eq!(*Stage::wave(&[3, 2], 0).of_layer, [0, 1, 1, 0, 0]);
        assert_eq!(*Stage::wave(&[1, 2, 2], 0).of_layer, [0, 1, 2, 2, 1]);
        assert_eq!(*Stage::wave(&[2, 1, 1], 0).of_layer, [0, 0, 1, 2]);
        assert_eq!(*Stage::wave(&[1, 3], 0).of_layer, [0, 1, 1, 1]);
        let even = (1..=8).flat_map(|stages| [1, 2, 3, 7].map(|each| vec![each; stages]));
        for counts in even.chain(UNEVEN.map(<[usize]>::to_vec)) {
            let stage = Stage::wave(&counts, 0);
            assert_eq!(stage.counts(), counts);
            let hops = stage.of_layer.windows(2).map(|two| two[0].abs_diff(two[1]));
            assert!(hops.max().unwrap_or(0) <= 1, "{stage:?}");
            for (micro_batches, order) in (1..=64).flat_map(|count| ORDERS.map(|order| (count, order))) {
                let done = stage.simulate(micro_batches, 0, order, SECONDS);
                assert!(done.is_some(), "{counts:?}, {micro_batches} micro-batches, {order:?}: stuck");
            }
        }
        let (wave, contiguous) = (Stage::wave(&[16; 4], 0), Stage::contiguous(64, 4, 0));
        let busy = |stage: &Stage, order| stage.simulate(16, 0, order, NO_HEAD).expect("an end").busy;
        assert!(busy(&wave, Order::MicroBatches) > busy(&contiguous, Order::MicroBatches));
        assert!(busy(&wave, Order::Layers) > 0.8 && busy(&contiguous, Order::Layers) < 0.3);
    }

    /// Where layers of so many processes may lie: as many on each, uneven, in turn, next to each other, there and back.
    fn placements(stages: usize) -> Vec<Stage> {
        let uneven: Vec<usize> = (0..stages).map(|process| 1 + process * 5 % 7).collect();
        let wave: Vec<usize> = (0..stages).map(|process| 3 + usize::from(process == 0)).collect();
        let layers = 3 * stages + 1;
        vec![
            Stage::contiguous(layers, stages, 0),
            Stage::in_turn(layers, stages, 0),
            Stage::wave(&wave, 0),
            Stage::wave(&uneven, 0),
            Stage::dealt(&uneven, 0),
            Stage::ending_on(stages / 2, &uneven, 0),
        ]
    }

    /// In the order of layers each is read once on the way forward and once on the way back, whatever the placement and
    /// however many micro-batches there are. A pass back finds the input that its layer has kept: the newest of its
    /// micro-batch. So a process keeps as many as it has layers for each micro-batch, and has none left at the end.
    #[test]
    fn each_layer_is_read_twice_and_keeps_an_input_of_each_micro_batch() {
        for stage in (1..=8).flat_map(placements) {
            let layers = stage.of_layer.len();
            let all = || [1, 2, 7, 16, 33, 64].into_iter().flat_map(|count| ORDERS.map(|order| (count, order)));
            for (mine, (micro_batches, order)) in (0..stage.count()).flat_map(|mine| all().map(move |of| (mine, of))) {
                let what = format!("{stage:?}, process {mine}, {micro_batches} micro-batches, {order:?}");
                let passes = stage.passes(mine, micro_batches, 0, order);
                let held: Vec<usize> = (0..layers).filter(|layer| stage.of_layer[*layer] == mine).collect();
                if order == Order::Layers {
                    let mut read: Vec<(usize, bool)> = passes.iter().map(|pass| (pass.layer, pass.is_back)).collect();
                    read.dedup();
                    let forward = held.iter().map(|layer| (*layer, false));
                    let back = held.iter().rev().map(|layer| (*layer, true));
                    assert_eq!(read, forward.chain(back).collect::<Vec<_>>(), "{what}");
                }
                let mut kept: Vec<Vec<usize>> = vec![Vec::new(); micro_batches];
                let mut most = 0;
                for Pass { layer, micro_batch, is_back } in passes {
                    match is_back {
                        false => kept[micro_batch].push(layer),
                        true => assert_eq!(kept[micro_batch].pop(), Some(layer), "{what}"),
                    }
                    most = most.max(kept.iter().map(Vec::len).sum());
                }
                assert_eq!(most, micro_batches * held.len(), "{what}");
                assert!(kept.iter().all(Vec::is_empty), "{what}");
            }
        }
    }

    /// All wait while the losses are computed, so they make a step longer by as much, whatever the placement.
    #[test]
    fn the_losses_are_computed_while_others_wait() {
        for stage in (1..=8).flat_map(placements) {
            for (micro_batches, order) in [1, 2, 7, 16, 64].into_iter().flat_map(|n| ORDERS.map(|order| (n, order))) {
                let took = |seconds| stage.simulate(micro_batches, 0, order, seconds).expect("an end").seconds;
                let longer = took(SECONDS) - took(NO_HEAD);
                let losses = micro_batches as f64 * SECONDS.head;
                assert!((longer - losses).abs() < 1e-6, "{stage:?} {micro_batches} {order:?}: {longer}");
            }
        }
        // (layers, parameters of the output layer for one of a layer, how busy four processes are)
        for (layers, head, busy) in [(36, 622.0 / 193.0, 0.84), (30, 28.3 / 3.54, 0.66), (18, 168.0 / 5.6, 0.38)] {
            let seconds = Seconds { forward: 1.0, back: 2.0, head: 2.0 * head, hop: 0.0 };
            let done = Stage::in_turn(layers, 4, 0).simulate(16, 0, Order::Layers, seconds).expect("an end");
            assert!((done.busy - busy).abs() < 0.006, "{layers} layers: {done:?}");
        }
    }
}
