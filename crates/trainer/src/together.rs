//! Ranks that hold a model together to use it, without training it: whole layers on each, or a slice of every layer.

mod dealing;

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use finetune_allreduce::{Group, GroupError, Reduction};
use finetune_model::{Adaptation, Hops, ModelConfig, Slice, Stage, Sums, not_in_slices};
use rayon::prelude::*;

use crate::base_digest::expect_same_model;
use crate::device_plan::ThisHost;
use crate::error::TrainError;
use crate::ranks::Ranks;
use crate::stages::{Connections, few_layers};

use self::dealing::deal_together;

/// The most messages that wait to be sent to another rank: far more than passes are under way, of which each line holds
/// one message of each kind (`model/src/stage.rs`).
const QUEUE: usize = 1024;

/// How ranks hold a model together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parallel {
    /// Layers next to each other on the same rank. A token goes from rank to rank. The bits are those of one process.
    Stages,
    /// A slice of every layer on each. All compute each token together, and add up what they make of it.
    Tensor,
    /// What should take less time a token.
    Auto,
}

/// What a rank holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OnRank {
    /// Some of the layers.
    Stage(Stage),
    /// A slice of every layer.
    Slice(Slice),
}

/// How large a model is on this rank, and what the rank has for it.
#[derive(Clone, Debug, PartialEq)]
pub struct Sizes {
    /// Bytes of each layer.
    pub layers: Vec<u64>,
    /// Bytes of what goes with the first layer and with the last one: the embedding and the output layer.
    pub ends: [u64; 2],
    /// Bytes of the largest rank's slices of all layers; 0: they are not split.
    pub slice: u64,
    /// The part of them that a token goes through: less than 1 with experts.
    pub used: f64,
    /// Bytes that the device reads in a second; `None`: it is the CPU, which is measured.
    pub bandwidth: Option<f64>,
    /// Bytes of memory that this rank may take, if that can be told.
    pub available: Option<u64>,
    /// Whether layers that have no room may stay on the disk.
    pub may_read: bool,
}

/// All ranks, which hold a model together.
pub struct Together {
    /// What this rank holds.
    pub part: OnRank,
    /// What connects the ranks that a token goes to, and the first with all.
    pub hops: Arc<dyn Hops>,
    /// What the user should know of how the ranks hold the model.
    pub notes: Vec<String>,
    /// This rank's host and its place there, for whoever opens its part.
    pub host: ThisHost,
    ranks: Arc<Ranks>,
}

/// Numbers that a rank of a group adds up with all others.
struct GroupSums(Arc<Ranks>);

impl Sums for GroupSums {
    fn sum(&self, values: &mut [f32]) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(self.0.group().all_reduce(values, Reduction::Sum)?)
    }

    fn largest(&self, values: &mut [f32]) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(self.0.group().all_reduce(values, Reduction::Max)?)
    }
}

impl Together {
    /// Connects all ranks of a group, which hold the model of a directory together, perhaps with an adapter. All call it
    /// together. `host`: that of this rank, for whoever opens its part; `sizes`: asked for where the ranks may hold whole
    /// layers.
    ///
    /// # Errors
    /// If the ranks have other models than each other, the model cannot be spread over so many ranks, they have too
    /// little memory for it, one cannot be reached, or `sizes` fails.
    pub fn connect<E: From<TrainError>>(
        group: Group,
        directory: &Path,
        adapter: Option<&Path>,
        config: &ModelConfig,
        parallel: Parallel,
        host: ThisHost,
        sizes: impl FnOnce() -> Result<Sizes, E>,
    ) -> Result<Together, E> {
        let world = group.world();
        let ranks = Arc::new(Ranks::new(group, None)?);
        expect_same_model(directory, adapter, &ranks)?;
        let (against_stages, against_slices) = (not_in_stages(config, world), not_in_slices(config, world));
        let has_stages = against_stages.is_none() && parallel != Parallel::Tensor;
        let sizes = has_stages.then(sizes).transpose()?;
        let (is_tensor, reason) = match parallel {
            Parallel::Stages => (false, None),
            Parallel::Tensor => (true, None),
            Parallel::Auto => match (&against_stages, &against_slices, &sizes) {
                (_, Some(what), _) => (false, Some(format!("--parallel auto takes stages: {what}"))),
                (Some(error), None, _) => (true, Some(format!("--parallel auto takes tensor: {error}"))),
                (None, None, None) => (false, None),
                (None, None, Some(sizes)) => {
                    let costs = Costs::measure(&ranks, config, sizes).map_err(TrainError::from)?;
                    (costs.is_tensor, Some(costs.to_string()))
                }
            },
        };
        let together = if is_tensor {
            let slices = against_slices.map_or(Ok(()), |what| Err(TrainError::NotSplit { what }));
            slices.and_then(|()| Together::in_slices(ranks, reason))?
        } else {
            let stages = against_stages.map_or(Ok(()), Err);
            stages.and_then(|()| Together::in_stages(ranks, config.layers.len(), sizes.as_ref(), reason))?
        };
        Ok(Together { host, ..together })
    }

    fn in_stages(
        ranks: Arc<Ranks>,
        layers: usize,
        sizes: Option<&Sizes>,
        reason: Option<String>,
    ) -> Result<Together, TrainError> {
        let (rank, world) = (ranks.group().rank(), ranks.group().world());
        ranks.settle(world)?;
        let alike = (Stage::contiguous(layers, world, rank), None);
        let (stage, note) = sizes.map_or(Ok(alike), |sizes| deal_together(&ranks, sizes))?;
        let mut links = stage.links();
        links.extend((1..world).map(|other| (0, other)));
        links.sort_unstable();
        links.dedup();
        let hops = Arc::new(Connections::new(&ranks, [rank, world], links, QUEUE)?);
        let notes = reason.into_iter().chain(note).chain(hops.carried()).collect();
        Ok(Together { part: OnRank::Stage(stage), hops, notes, host: ThisHost::default(), ranks })
    }

    fn in_slices(ranks: Arc<Ranks>, reason: Option<String>) -> Result<Together, TrainError> {
        let (mine, count) = (ranks.group().rank(), ranks.group().world());
        let links = (1..count).map(|other| (0, other)).collect();
        let hops = Arc::new(Connections::new(&ranks, [mine, count], links, QUEUE)?);
        let notes = reason.into_iter().collect();
        Ok(Together { part: OnRank::Slice(Slice { mine, count }), hops, notes, host: ThisHost::default(), ranks })
    }

    /// What adds up the numbers of all ranks.
    pub fn sums(&self) -> Arc<dyn Sums> {
        Arc::new(GroupSums(Arc::clone(&self.ranks)))
    }

    /// This rank, and how many there are.
    pub fn place(&self) -> (usize, usize) {
        (self.ranks.group().rank(), self.ranks.group().world())
    }

    /// The host of each rank.
    pub fn hosts(&self) -> Vec<String> {
        self.ranks.group().who().iter().map(|who| who.host.clone()).collect()
    }

    /// Whether all ranks are there. Looks without waiting.
    ///
    /// # Errors
    /// If one is lost.
    pub fn check(&self) -> Result<(), TrainError> {
        Ok(self.ranks.group().check()?)
    }

    /// Lines from all other ranks to the first one. All call it together.
    ///
    /// # Errors
    /// If one is lost.
    pub fn replies(&self) -> Result<Replies, TrainError> {
        Replies::connect(&self.ranks)
    }

    /// Keeps links usable through a long rest: see [`Group::keep_alive`].
    pub fn keep_alive(&self) {
        self.ranks.keep_alive();
    }

    /// Whether all ranks say so. All call it together.
    ///
    /// # Errors
    /// If one is lost.
    pub fn all_say(&self, mine: bool) -> Result<bool, TrainError> {
        let mut against = [f32::from(u8::from(!mine))];
        self.ranks.group().all_reduce(&mut against, Reduction::Max)?;
        Ok(against[0] == 0.0)
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// If one is lost.
    pub fn barrier(&self) -> Result<(), TrainError> {
        Ok(self.ranks.group().barrier()?)
    }

    /// Returns when every rank has called it, and is the last thing that a rank does with the others: none of them takes
    /// it for lost when its process ends, whoever still holds a connection.
    ///
    /// # Errors
    /// If one is lost.
    pub fn leave(&self) -> Result<(), TrainError> {
        self.barrier()?;
        self.ranks.group().leave();
        Ok(())
    }
}

/// What the other ranks tell the first one while all compute, beside what goes from layer to layer.
pub struct Replies {
    lines: Connections,
    world: usize,
    /// Held by the thread that tells, so that a reply and its words stay together.
    telling: Mutex<()>,
    /// Of a rank whose words are still under way: the number of the reply, and their bytes.
    begun: Mutex<BTreeMap<usize, (u64, usize)>>,
}

/// What another rank says of something that the first one has given a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The rank.
    pub rank: usize,
    /// The number.
    pub number: u64,
    /// What is wrong; empty: nothing is.
    pub words: String,
}

/// Letters of what is wrong. More helps nobody.
const LONGEST_WORDS: usize = 2000;

impl Replies {
    fn connect(ranks: &Ranks) -> Result<Replies, TrainError> {
        let (rank, world) = (ranks.group().rank(), ranks.group().world());
        let links = (1..world).map(|other| (other, 0)).collect();
        let lines = Connections::new(ranks, [rank, world], links, QUEUE)?;
        Ok(Replies { lines, world, telling: Mutex::default(), begun: Mutex::default() })
    }

    /// Tells the first rank of a number, from another one: what is wrong, or nothing.
    ///
    /// # Errors
    /// If it cannot be reached.
    pub fn tell(&self, number: u64, words: &str) -> Result<(), Box<dyn Error + Send + Sync>> {
        let words: String = words.chars().take(LONGEST_WORDS).collect();
        let _telling = self.telling.lock().unwrap_or_else(PoisonError::into_inner);
        let length = words.len() as u64;
        self.lines.send(0, [number.to_le_bytes(), length.to_le_bytes()].concat())?;
        if words.is_empty() { Ok(()) } else { self.lines.send(0, words.into_bytes()) }
    }

    /// On the first rank, what has arrived since, of all others. It does not wait.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn heard(&self) -> Result<Vec<Reply>, TrainError> {
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        let mut replies = Vec::new();
        for rank in 1..self.world {
            loop {
                let (number, length) = match begun.get(&rank) {
                    Some(known) => *known,
                    None => {
                        let Some(head) = self.lines.arrived(rank, 2 * size_of::<u64>())? else { break };
                        let of = |half: &[u8]| half.try_into().map_or(0, u64::from_le_bytes);
                        let (number, length) = head.split_at(size_of::<u64>());
                        (of(number), of(length) as usize)
                    }
                };
                let words = match length {
                    0 => Some(Vec::new()),
                    _ => self.lines.arrived(rank, length)?,
                };
                let Some(words) = words else {
                    begun.insert(rank, (number, length));
                    break;
                };
                begun.remove(&rank);
                replies.push(Reply { rank, number, words: String::from_utf8_lossy(&words).into_owned() });
            }
        }
        Ok(replies)
    }
}

/// Why so many ranks cannot hold whole layers of this model, if they cannot.
fn not_in_stages(config: &ModelConfig, world: usize) -> Option<TrainError> {
    let what = finetune_model::not_in_stages(config, &Adaptation::default());
    let what = what.or_else(|| (world > config.layers.len()).then(|| few_layers(config, world)))?;
    Some(TrainError::NotTogether { what })
}

/// What a token costs in either way, in seconds, as far as weights and messages make it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Costs {
    stages: f64,
    tensor: f64,
    /// Seconds of a sum of one token's hidden state.
    sum: f64,
    /// How many of them a token takes.
    sums: usize,
    /// Bytes that a rank reads in a second.
    bandwidth: f64,
    is_tensor: bool,
}

/// Sums that are measured; the fastest counts.
const TRIES: usize = 20;
/// Bytes that are read to measure the memory: more than caches hold.
const READ: usize = 256 << 20;

impl Costs {
    /// All ranks measure together, and come to the same.
    fn measure(ranks: &Ranks, config: &ModelConfig, sizes: &Sizes) -> Result<Costs, GroupError> {
        let group = ranks.group();
        let mut hidden = vec![0f32; config.hidden_size];
        let mut sum = f64::INFINITY;
        for _ in 0..TRIES {
            let began = Instant::now();
            group.all_reduce(&mut hidden, Reduction::Sum)?;
            sum = sum.min(began.elapsed().as_secs_f64());
        }
        let bandwidth = sizes.bandwidth.unwrap_or_else(measured_bandwidth);
        // The slowest rank's numbers count for all.
        let mut slowest = [sum as f32, -bandwidth as f32];
        group.all_reduce(&mut slowest, Reduction::Max)?;
        let [sum, bandwidth] = [f64::from(slowest[0]), -f64::from(slowest[1])];
        Ok(Costs::of(group.world(), config.layers.len(), sizes, sum, bandwidth))
    }

    /// Of `layers` layers on `world` ranks, if a sum takes `sum` seconds. With stages a token reads all layers one
    /// after the other, and goes from rank to rank; a hop is taken to cost what a sum does.
    fn of(world: usize, layers: usize, sizes: &Sizes, sum: f64, bandwidth: f64) -> Costs {
        let read = |bytes: u64| bytes as f64 * sizes.used / bandwidth;
        let sums = 2 * layers + 1;
        let stages = read(sizes.layers.iter().sum()) + world as f64 * sum;
        let tensor = read(sizes.slice) + sums as f64 * sum;
        Costs { stages, tensor, sum, sums, bandwidth, is_tensor: tensor < stages }
    }
}

impl std::fmt::Display for Costs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Costs { stages, tensor, sum, sums, bandwidth, is_tensor } = self;
        let [stages, tensor, sum] = [stages, tensor, sum].map(|seconds| format!("{:.2} ms", seconds * 1e3));
        let taken = if *is_tensor { "tensor" } else { "stages" };
        write!(
            f,
            "--parallel auto takes {taken}: a token takes about {tensor} with tensor ({sums} sums of {sum} each), {stages} with \
             stages; weights are read at {:.1} GB/s",
            bandwidth / 1e9
        )
    }
}

/// Bytes that the CPU reads in a second.
fn measured_bandwidth() -> f64 {
    READ as f64 / reading().as_secs_f64()
}

/// How long it takes to read [`READ`] bytes of memory with all threads; the fastest of three.
fn reading() -> Duration {
    let numbers = vec![1u64; READ / size_of::<u64>()];
    let read = || {
        let began = Instant::now();
        let sum: u64 = numbers.par_chunks(1 << 16).map(|part| part.iter().fold(0u64, |a, b| a.wrapping_add(*b))).sum();
        std::hint::black_box(sum);
        began.elapsed()
    };
    (0..3).map(|_| read()).min().unwrap_or_default().max(Duration::from_micros(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each number once with its words, those of a rank in their order.
    #[test]
    fn the_first_rank_hears_what_the_others_tell() {
        fn words(n: u64) -> String {
            if n == 1 { "no room, ".repeat(300) } else { String::new() }
        }
        let start = |group: Group| {
            std::thread::spawn(move || {
                let ranks = Ranks::new(group, None).expect("ranks");
                let replies = Replies::connect(&ranks).expect("lines");
                let (rank, mut heard, began) = (ranks.group().rank() as u64, Vec::new(), Instant::now());
                match rank {
                    0 => {
                        while heard.len() < 6 {
                            heard.extend(replies.heard().expect("all are there"));
                            assert!(began.elapsed() < Duration::from_secs(20), "{heard:?}");
                        }
                    }
                    rank => {
                        (0..3).for_each(|n| replies.tell(10 * rank + n, &words(n)).expect("the first one is there"))
                    }
                }
                // Nobody leaves before.
                ranks.group().barrier().expect("all are there");
                heard
            })
        };
        let threads: Vec<_> = Group::in_process(3, None).into_iter().map(start).collect();
        let heard: Vec<Vec<Reply>> = threads.into_iter().map(|thread| thread.join().expect("no panic")).collect();
        for rank in 1..3 {
            let own: Vec<&Reply> = heard[0].iter().filter(|reply| reply.rank == rank).collect();
            let said: Vec<(u64, usize)> = own.iter().map(|reply| (reply.number, reply.words.len())).collect();
            let first = 10 * rank as u64;
            assert_eq!(said, [(first, 0), (first + 1, LONGEST_WORDS), (first + 2, 0)]);
        }
        assert_eq!(heard[0].len(), 6);
    }

    /// (ranks, layers, bytes of all layers, of a slice, the part that a token uses, seconds of a sum, whether tensor
    /// takes less)
    #[test]
    fn auto_takes_what_takes_less() {
        for (world, layers, all, slice, used, sum, is_tensor) in [
            // A large model and a fast link.
            (2, 32, 16_000_000_000, 8_000_000_000, 1.0, 50e-6, true),
            // The same over a slow one.
            (2, 32, 16_000_000_000, 8_000_000_000, 1.0, 20e-3, false),
            // A small one.
            (2, 30, 200_000_000, 100_000_000, 1.0, 400e-6, false),
            (4, 30, 200_000_000, 50_000_000, 1.0, 50e-6, true),
            // Experts of which a token uses few.
            (2, 48, 16_000_000_000, 8_000_000_000, 0.01, 200e-6, false),
        ] {
            let sizes = Sizes {
                layers: vec![all],
                ends: [0; 2],
                slice,
                used,
                bandwidth: None,
                available: None,
                may_read: false,
            };
            let costs = Costs::of(world, layers, &sizes, sum, 10e9);
            assert_eq!(costs.is_tensor, is_tensor, "{costs}");
            let words = if is_tensor { "takes tensor" } else { "takes stages" };
            assert!(costs.to_string().contains(words), "{costs}");
        }
    }
}
