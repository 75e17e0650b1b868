//! The layers of a model that this process holds, where several hold them together.
//!
//! Only what goes from layer to layer travels: [t, hidden] on the way forward, and its gradient on the way
//! back, in the number type that is computed in. So every number has the bits of one process. Where the balance of
//! routers counts, the choices of experts travel with it, and those of all layers from the last process to all.
//!
//! **Several passes of an answer may be under way**, one behind the other: a process begins a pass, which sends
//! what its layers make, and begins others before it takes the tokens of the first. The last process, which has the
//! logits, chooses the tokens as soon as it has computed the pass, and tells them to all
//! ([`crate::passes::choices`]). Three rules hold:
//!
//! 1. All processes begin the same passes and take the same tokens, in the same order.
//! 2. Tokens are taken in the order in which their passes were begun.
//! 3. No more than [`Stage::passes_at_once`] passes, here n, are begun and not taken.
//!
//! *Nobody waits for ever.* Number these acts by their place in the common order. To begin pass i, a process waits
//! for the process before it, in the same act, and for no other. To take the tokens of pass i, it waits for the
//! last process to begin pass i, which is an earlier act. So a process only waits for earlier acts, or for an
//! earlier process in the same act: there is no circle.
//!
//! *No line holds more than n messages.* A process sends to the next one in pass i after it has taken the tokens of
//! pass i - n. For these the next process has received what belongs to pass i - n. The last process sends the
//! tokens of pass i once all have begun pass i, and each has taken those of pass i - n before.
//!
//! *Requests of one prompt* are the exception. When the tokens of the pass that has read it are taken, the last
//! process chooses the first token of each further request too, and tells it in a message of its own. The others
//! take in first what was said of the passes under way: these were begun before, so nobody waits for a later act.
//! The line of the last process holds one message more for each such request.

#[cfg(test)]
mod queues;
mod schedule;

use std::error::Error;
use std::sync::Arc;

use burn::tensor::{Tensor, TensorData};

use crate::adaptation::Adaptation;
use crate::branch::EMBEDDING;
use crate::config::{ModelConfig, Values};
use crate::decoder::balance::Balance;
use crate::error::ModelError;
use crate::tree::Decoder;

pub use self::schedule::{Order, Pass, Seconds, Simulated};

/// What carries numbers between the processes that hold a model together. They are counted from 0.
///
/// What one process sends to another arrives in the same order.
pub trait Hops: Send + Sync {
    /// Sends bytes to another process. It may return before they have arrived.
    ///
    /// # Errors
    /// If the other process cannot be reached.
    fn send(&self, to: usize, bytes: Vec<u8>) -> Result<(), Box<dyn Error + Send + Sync>>;

    /// Receives what another process sends: `length` bytes.
    ///
    /// # Errors
    /// If the other process cannot be reached.
    fn receive(&self, from: usize, length: usize) -> Result<Vec<u8>, Box<dyn Error + Send + Sync>>;
}

/// How the layers of a process lie among those of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrangement {
    /// In turn: the last process hands on to the first one ([`Stage::dealt`]).
    Ring,
    /// Next to each other: each process hands on to the next one only ([`Stage::in_order`]).
    Contiguous,
    /// In turn there and back: each process hands on to the next one and to the one before ([`Stage::wave`]).
    Wave,
}

/// Which process holds which layer of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// The process of each layer.
    pub of_layer: Arc<[usize]>,
    /// This process.
    pub mine: usize,
}

impl Stage {
    /// Layer n on process n mod `stages`: the micro-batches go round the processes, and each is busy as soon
    /// as the first layers are behind one of them (Lamy-Poirier 2022, "Breadth-First Pipeline Parallelism").
    pub fn in_turn(layers: usize, stages: usize, mine: usize) -> Stage {
        Stage { of_layer: (0..layers).map(|layer| layer % stages).collect(), mine }
    }

    /// So many layers on each process as `counts` says, in turn, where one with twice as many comes twice as often:
    /// the smooth weighted round robin of nginx, which steps to the process that lags most behind its part. Counts
    /// that differ by one at most, the larger ones first, are [`Stage::in_turn`].
    pub fn dealt(counts: &[usize], mine: usize) -> Stage {
        let layers: usize = counts.iter().sum();
        let mut behind = vec![0i64; counts.len()];
        let mut next = || {
            behind.iter_mut().zip(counts).for_each(|(behind, count)| *behind += *count as i64);
            let most = behind.iter().copied().max().unwrap_or(0);
            let process = behind.iter().position(|behind| *behind == most).unwrap_or(0);
            behind[process] -= layers as i64;
            process
        };
        Stage { of_layer: (0..layers).map(|_| next()).collect(), mine }
    }

    /// So many layers on each process as `counts` says, arranged in this way.
    pub fn arranged(arrangement: Arrangement, counts: &[usize], mine: usize) -> Stage {
        match arrangement {
            Arrangement::Ring => Stage::dealt(counts, mine),
            Arrangement::Contiguous => Stage::in_order(counts, mine),
            Arrangement::Wave => Stage::wave(counts, mine),
        }
    }

    /// So many layers on each process as `counts` says: from the first process to the last one, back to the first one
    /// and so on, without a hop between any but neighbours. There are as many such ways as the process with the fewest
    /// layers has, and a part of one more if those with one layer more are the first on it; otherwise a process with
    /// more layers has several next to each other on some of them (Liu et al. 2023, "Hanayo: Harnessing Wave-like
    /// Pipeline Parallelism").
    pub fn wave(counts: &[usize], mine: usize) -> Stage {
        let ways = counts.iter().copied().min().unwrap_or(0);
        let order = |way: usize| -> Vec<usize> {
            if way.is_multiple_of(2) { (0..counts.len()).collect() } else { (0..counts.len()).rev().collect() }
        };
        let more: Vec<usize> = order(ways).into_iter().take_while(|process| counts[*process] == ways + 1).collect();
        let of_layer = if counts.iter().sum::<usize>() == ways * counts.len() + more.len() {
            (0..ways).flat_map(order).chain(more).collect()
        } else {
            let on_ways = |process: usize, way: usize| counts[process] * way / ways.max(1);
            let on_way = |way: usize| {
                let count = move |process: usize| on_ways(process, way + 1) - on_ways(process, way);
                order(way).into_iter().flat_map(move |process| std::iter::repeat_n(process, count(process)))
            };
            (0..ways).flat_map(on_way).collect()
        };
        Stage { of_layer, mine }
    }

    /// As [`Stage::dealt`], with the last layer on process `last`, which has one at least.
    pub fn ending_on(last: usize, counts: &[usize], mine: usize) -> Stage {
        let but_last = |process: usize| counts[process] - usize::from(process == last);
        let before = Stage::dealt(&(0..counts.len()).map(but_last).collect::<Vec<_>>(), mine);
        Stage { of_layer: before.of_layer.iter().copied().chain([last]).collect(), mine }
    }

    /// How many layers each process holds.
    pub fn counts(&self) -> Vec<usize> {
        let of = |process: usize| self.of_layer.iter().filter(|holder| **holder == process).count();
        (0..self.count()).map(of).collect()
    }

    /// Layers next to each other on the same process, as many on each as on any other: few hops, for answers that are
    /// made token by token, and for processes of which only neighbours are cabled.
    pub fn contiguous(layers: usize, stages: usize, mine: usize) -> Stage {
        Stage { of_layer: (0..layers).map(|layer| layer * stages / layers.max(1)).collect(), mine }
    }

    /// So many layers next to each other on each process as `counts` says, in the order of the processes.
    pub fn in_order(counts: &[usize], mine: usize) -> Stage {
        let of_process = |(process, count): (usize, &usize)| std::iter::repeat_n(process, *count);
        Stage { of_layer: counts.iter().enumerate().flat_map(of_process).collect(), mine }
    }

    /// Whether this process holds a layer.
    pub fn holds(&self, layer: usize) -> bool {
        self.of_layer[layer] == self.mine
    }

    /// How many processes hold a layer.
    pub fn count(&self) -> usize {
        self.of_layer.iter().max().map_or(1, |last| last + 1)
    }

    /// The process of the last layer, which computes the losses.
    pub fn last(&self) -> usize {
        self.of_layer.last().copied().unwrap_or(0)
    }

    /// How many passes may be under way at once, one on the layers of each process. Where layers go round the
    /// processes, one pass keeps all of them waiting, and it is one.
    pub fn passes_at_once(&self) -> usize {
        if self.of_layer.is_sorted() { self.count() } else { 1 }
    }

    /// The most messages that wait on the way from one process to another in a step, with so many micro-batches going
    /// through the layers together: for each, what comes out of a layer, what the layers have counted so far and what
    /// all have counted. A micro-batch that goes the same way a second time has been received from it before. Where a
    /// process runs ahead to the next micro-batches, it may wait for a queue of this length, and nobody waits for
    /// ever (`queues.rs`).
    pub fn most_queued(micro_batches: usize) -> usize {
        3 * micro_batches
    }

    /// From which process to which one numbers travel, on the way forward or back. Each pair once.
    pub fn links(&self) -> Vec<(usize, usize)> {
        let pairs = self.of_layer.windows(2).flat_map(|pair| [(pair[0], pair[1]), (pair[1], pair[0])]);
        let logits = (0..self.count()).map(|stage| (self.last(), stage));
        let mut links: Vec<(usize, usize)> = pairs.chain(logits).filter(|(from, to)| from != to).collect();
        links.sort_unstable();
        links.dedup();
        links
    }
}

/// Why several processes cannot hold this model together, if they cannot.
pub fn not_in_stages(config: &ModelConfig, adaptation: &Adaptation) -> Option<String> {
    if config.layers.iter().any(|layer| matches!(layer.values, Values::OfLayer(_))) {
        return Some("layers of this model use keys and values of earlier layers, which stay on their rank".to_owned());
    }
    let inner = |name: &str| name.contains(".layers.") || name.contains(".h.");
    let makes_inputs = |name: &str| {
        ["per_layer_model_projection", "per_layer_projection_norm", EMBEDDING].iter().any(|part| name.contains(part))
    };
    let of_inputs = |name: &str| config.per_layer.is_some() && makes_inputs(name) && !inner(name);
    let target = adaptation.targets.iter().map(|target| target.module.as_str());
    target.chain(adaptation.saved.iter().map(String::as_str)).find(|name| of_inputs(name)).map(|name| {
        format!("{name} gets gradients from all layers, whose order of summation would depend on the number of ranks")
    })
}

/// A stage, and what connects it with the others.
#[derive(Clone)]
pub(crate) struct Connected {
    pub(crate) stage: Stage,
    hops: Arc<dyn Hops>,
}

impl std::fmt::Debug for Connected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Connected").field(&self.stage).finish()
    }
}

impl Connected {
    pub(crate) fn new(stage: Stage, hops: Arc<dyn Hops>) -> Connected {
        Connected { stage, hops }
    }

    /// Sends the same bytes to all other processes.
    fn tell_all(&self, bytes: &[u8]) -> Result<(), ModelError> {
        let mut others = (0..self.stage.count()).filter(|&other| other != self.stage.mine);
        others.try_for_each(|other| self.hops.send(other, bytes.to_vec()).map_err(ModelError::Hop))
    }
}

/// Where a tensor goes to or comes from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Neighbour {
    /// The layer is held by this process too, or there is none.
    Here,
    /// This process holds it.
    Process(usize),
}

impl Decoder {
    /// Whether this process computes layer `n`.
    pub(crate) fn holds(&self, n: usize) -> bool {
        self.stage.as_ref().is_none_or(|connected| connected.stage.holds(n))
    }

    /// Whether this process computes logits and losses.
    pub(crate) fn holds_head(&self) -> bool {
        self.layers.is_empty() || self.holds(self.layers.len() - 1)
    }

    /// What the schedule of all processes says of this one; of one that holds all layers, if there are no others.
    pub(crate) fn of_stage<T>(&self, says: impl FnOnce(&Stage, usize) -> T) -> T {
        match &self.stage {
            Some(connected) => says(&connected.stage, connected.stage.mine),
            None => says(&Stage::in_order(&[self.layers.len()], 0), 0),
        }
    }

    /// The layers that this process computes, in their order.
    pub(crate) fn held(&self) -> Vec<usize> {
        (0..self.layers.len()).filter(|&n| self.holds(n)).collect()
    }

    /// Who holds layer `n`, which a layer of this process is next to.
    fn neighbour(&self, n: Option<usize>) -> Neighbour {
        match (&self.stage, n) {
            (Some(connected), Some(n)) if n < self.layers.len() && !connected.stage.holds(n) => {
                Neighbour::Process(connected.stage.of_layer[n])
            }
            _ => Neighbour::Here,
        }
    }

    /// What comes from layer `n`: `here` if this process holds it, otherwise what its process has sent, of the
    /// same shape and number type.
    pub(crate) fn arrived(&self, n: Option<usize>, here: Tensor<2>) -> Result<Tensor<2>, ModelError> {
        match self.neighbour(n) {
            Neighbour::Here => Ok(here),
            Neighbour::Process(from) => self.receive(from, &here),
        }
    }

    /// Sends x to the process of layer `n`, unless it is this one.
    pub(crate) fn leave(&self, n: Option<usize>, x: &Tensor<2>) -> Result<(), ModelError> {
        match self.neighbour(n) {
            Neighbour::Here => Ok(()),
            Neighbour::Process(to) => {
                let data = x.clone().try_into_data().map_err(|error| ModelError::device(error.to_string()))?;
                self.hops().send(to, data.as_bytes().to_vec()).map_err(ModelError::Hop)
            }
        }
    }

    fn receive(&self, from: usize, like: &Tensor<2>) -> Result<Tensor<2>, ModelError> {
        let (shape, dtype) = (like.dims(), like.dtype());
        let length = shape[0] * shape[1] * dtype.size();
        let bytes = self.hops().receive(from, length).map_err(ModelError::Hop)?;
        let data = TensorData::from_bytes_vec(bytes, shape, dtype);
        Ok(Tensor::from_data(data, (&like.device(), dtype)))
    }

    /// What the layers before layer `n` have counted, if another process holds the last of them.
    pub(crate) fn counts_arrived(&self, n: Option<usize>, balance: Option<&Balance>) -> Result<(), ModelError> {
        if let (Neighbour::Process(from), Some(balance)) = (self.neighbour(n), balance) {
            balance.go_on_from(&self.hops().receive(from, balance.carried_bytes()).map_err(ModelError::Hop)?);
        }
        Ok(())
    }

    /// Sends what the layers have counted so far to the process of layer `n`, unless it is this one.
    pub(crate) fn counts_leave(&self, n: Option<usize>, balance: Option<&Balance>) -> Result<(), ModelError> {
        if let (Neighbour::Process(to), Some(balance)) = (self.neighbour(n), balance) {
            self.hops().send(to, balance.carried()).map_err(ModelError::Hop)?;
        }
        Ok(())
    }

    /// What all layers have counted, which the process of the last one has, for all.
    pub(crate) fn counts_of_all(&self, balance: Option<&Balance>) -> Result<(), ModelError> {
        let (Some(connected), Some(balance)) = (&self.stage, balance) else { return Ok(()) };
        let Connected { stage, hops } = connected;
        if stage.mine == stage.last() {
            return connected.tell_all(&balance.carried());
        }
        balance.go_on_from(&hops.receive(stage.last(), balance.carried_bytes()).map_err(ModelError::Hop)?);
        Ok(())
    }

    /// Numbers that the process of the last layer has, for all.
    pub(crate) fn said_by_last(&self, mine: Option<Vec<f32>>, length: usize) -> Result<Vec<f32>, ModelError> {
        if let Some(numbers) = mine {
            let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            self.tell_others(&bytes)?;
            return Ok(numbers);
        }
        let bytes = self.hear_last(length * size_of::<f32>())?;
        let number = |four: &[u8]| f32::from_le_bytes(four.try_into().expect("four bytes"));
        Ok(bytes.chunks_exact(size_of::<f32>()).map(number).collect())
    }

    /// Whether other processes hold layers of the model.
    pub(crate) fn has_others(&self) -> bool {
        self.stage.as_ref().is_some_and(|connected| connected.stage.count() > 1)
    }

    /// Sends bytes to all processes that hold layers, if this is the one of the last layer. Waits for nobody.
    pub(crate) fn tell_others(&self, bytes: &[u8]) -> Result<(), ModelError> {
        self.stage.as_ref().map_or(Ok(()), |connected| connected.tell_all(bytes))
    }

    /// Waits for so many bytes from the process of the last layer. They come in the order in which it has sent them.
    pub(crate) fn hear_last(&self, length: usize) -> Result<Vec<u8>, ModelError> {
        let Some(Connected { stage, hops }) = &self.stage else {
            return Err(ModelError::Hop("this process holds no part of a model".into()));
        };
        hops.receive(stage.last(), length).map_err(ModelError::Hop)
    }

    fn hops(&self) -> &dyn Hops {
        self.stage.as_ref().expect("only a stage has neighbours").hops.as_ref()
    }
}
