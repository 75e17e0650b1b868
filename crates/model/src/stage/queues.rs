//! A check of the length of queues: a process that sends waits where the queue to the receiver is full. Times are not
//! looked at. Each process sends and receives in one order, so whether all come to an end depends on no time.

use std::collections::{HashMap, VecDeque};

use super::{Order, Pass, Stage};

/// (group of micro-batches, micro-batch, layer, kind)
type Message = (usize, usize, usize, Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// What comes out of a layer.
    Output,
    /// What the layers up to this one have counted.
    Counts,
    /// What all layers have counted, from the process of the last one.
    CountsOfAll,
    /// The gradient of a layer's input.
    Gradient,
}

enum Act {
    Send(usize, Message),
    Receive(usize, Message),
}

/// Groups of micro-batches that go through the layers one after the other.
#[derive(Clone, Copy, Debug)]
struct Work {
    groups: usize,
    micro_batches: usize,
    /// The first layer that is differentiated; the number of layers: none is, as in an evaluation.
    first: usize,
    /// Whether the balance of routers counts.
    counts: bool,
    /// The order of every other process, and that of the others: some may read their layers from the disk.
    orders: [Order; 2],
}

const ORDERS: [[Order; 2]; 3] =
    [[Order::MicroBatches, Order::MicroBatches], [Order::Layers, Order::Layers], [Order::MicroBatches, Order::Layers]];

impl Stage {
    /// What a process sends and receives, in its order.
    fn acts(&self, mine: usize, work: Work) -> Vec<Act> {
        let (layers, last) = (self.of_layer.len(), self.last());
        let other = |layer: usize| self.of_layer.get(layer).copied().filter(|process| *process != mine);
        let kinds = if work.counts { &[Kind::Output, Kind::Counts][..] } else { &[Kind::Output] };
        let order = work.orders[mine % 2];
        let mut acts = Vec::new();
        for group in 0..work.groups {
            for Pass { layer, micro_batch, .. } in self.forward(mine, work.micro_batches, order) {
                let below = layer.checked_sub(1).and_then(|below| Some((below, other(below)?)));
                for &kind in kinds {
                    acts.extend(below.map(|(below, from)| Act::Receive(from, (group, micro_batch, below, kind))));
                }
                for &kind in kinds {
                    acts.extend(other(layer + 1).map(|to| Act::Send(to, (group, micro_batch, layer, kind))));
                }
            }
            for micro_batch in (0..work.micro_batches).filter(|_| work.counts) {
                let message = (group, micro_batch, layers, Kind::CountsOfAll);
                match mine == last {
                    true => acts.extend((0..self.count()).filter(|to| *to != mine).map(|to| Act::Send(to, message))),
                    false => acts.push(Act::Receive(last, message)),
                }
            }
            for Pass { layer, micro_batch, .. } in self.back(mine, work.micro_batches, work.first, order) {
                let message = |layer: usize| (group, micro_batch, layer, Kind::Gradient);
                acts.extend(other(layer + 1).map(|from| Act::Receive(from, message(layer + 1))));
                let below = layer.checked_sub(1).filter(|_| layer > work.first).and_then(other);
                acts.extend(below.map(|to| Act::Send(to, message(layer))));
            }
        }
        acts
    }

    /// The most messages in any queue if none holds more than `length`; `None` if processes wait for each other for
    /// ever.
    fn most_in_queues(&self, work: Work, length: usize) -> Option<usize> {
        let all: Vec<Vec<Act>> = (0..self.count()).map(|mine| self.acts(mine, work)).collect();
        let (mut next, mut most) = (vec![0; all.len()], 0);
        let mut queues: HashMap<(usize, usize), VecDeque<Message>> = HashMap::new();
        while next.iter().zip(&all).any(|(next, acts)| *next < acts.len()) {
            let before = next.clone();
            for (mine, acts) in all.iter().enumerate() {
                while let Some(act) = acts.get(next[mine]) {
                    match act {
                        Act::Send(to, message) => {
                            let queue = queues.entry((mine, *to)).or_default();
                            if queue.len() >= length {
                                break;
                            }
                            queue.push_back(*message);
                            most = most.max(queue.len());
                        }
                        Act::Receive(from, message) => {
                            let Some(arrived) = queues.entry((*from, mine)).or_default().pop_front() else { break };
                            assert_eq!(arrived, *message, "process {mine} expects another message from {from}");
                        }
                    }
                    next[mine] += 1;
                }
            }
            if next == before {
                return None;
            }
        }
        Some(most)
    }
}

fn expect_an_end(stage: &Stage, micro_batches: usize) {
    let layers = stage.of_layer.len();
    // Where no two layers of a process follow each other, all orders are one.
    let has_runs = stage.of_layer.windows(2).any(|two| two[0] == two[1]);
    let orders = if has_runs { &ORDERS[..] } else { &ORDERS[..1] };
    for first in [0, layers / 2, layers - 1, layers] {
        for (counts, orders) in [false, true].into_iter().flat_map(|counts| orders.iter().map(move |of| (counts, *of)))
        {
            let work = Work { groups: 2, micro_batches, first, counts, orders };
            // Without counts, two of the three messages are never sent.
            let length = if counts { Stage::most_queued(micro_batches) } else { micro_batches };
            assert!(stage.most_in_queues(work, length).is_some(), "{stage:?} {work:?}: stuck with {length}");
        }
    }
}

/// For all numbers of processes and micro-batches, in turn, next to each other, and there and back.
#[test]
fn bounded_queues_never_block_for_ever() {
    for stages in 1..=8 {
        for micro_batches in 1..=64 {
            expect_an_end(&Stage::in_turn(stages, stages, 0), micro_batches);
            expect_an_end(&Stage::in_turn(2 * stages + 1, stages, 0), micro_batches);
            expect_an_end(&Stage::contiguous(2 * stages + 1, stages, 0), micro_batches);
            expect_an_end(&Stage::wave(&vec![2; stages], 0), micro_batches);
        }
        for micro_batches in [1, 7, 64] {
            expect_an_end(&Stage::in_turn(33, stages, 0), micro_batches);
            expect_an_end(&Stage::contiguous(33, stages, 0), micro_batches);
        }
    }
}

/// For uneven placements, with any process as the one of the last layer.
#[test]
fn bounded_queues_never_block_for_ever_where_layers_are_uneven() {
    let placements: [&[usize]; 8] =
        [&[2, 1], &[1, 4], &[9, 1], &[12, 10, 8], &[1, 1, 7], &[3, 14, 15, 9], &[8, 1, 8, 1, 8, 1], &[30, 1, 1, 1, 1]];
    for counts in placements {
        for micro_batches in [1, 2, 5, 16, 64] {
            expect_an_end(&Stage::dealt(counts, 0), micro_batches);
            expect_an_end(&Stage::in_order(counts, 0), micro_batches);
            expect_an_end(&Stage::wave(counts, 0), micro_batches);
            (0..counts.len()).for_each(|last| expect_an_end(&Stage::ending_on(last, counts, 0), micro_batches));
        }
    }
}

/// Each process sends all micro-batches on before it takes any back: a queue of a few is full then, on all sides. Next
/// to each other, layers send one way until all are through, and a queue of one holds nobody up for ever.
#[test]
fn queues_that_are_too_short_are_found() {
    let work = Work { groups: 1, micro_batches: 8, first: 0, counts: false, orders: ORDERS[0] };
    let stage = Stage::in_turn(4, 2, 0);
    assert_eq!(stage.most_in_queues(work, 1), None);
    assert_eq!(stage.most_in_queues(work, 8), Some(8));
    for orders in ORDERS {
        assert_eq!(Stage::contiguous(9, 4, 0).most_in_queues(Work { orders, ..work }, 1), Some(1), "{orders:?}");
    }
}
