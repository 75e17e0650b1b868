//! The ranks of a run: which shares of a step this rank computes, and how the sums of all shares
//! become one.
//!
//! A step's rows are cut into shares: one for each rank, or as many as `distributed.virtual_ranks`
//! says. The sums of each share are kept apart until all are added in the order of the shares. So
//! the bits do not show how many processes computed them.

mod of_stages;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use finetune_allreduce::{Algorithm, Group, GroupError, Reduce, WireDtype, segment};

use finetune_model::Stage;

use crate::error::TrainError;
use crate::metrics::RankRow;
use crate::share_assignment::ShareAssignment;
use crate::stages::Connections;
use crate::state::TrainState;

/// What a rank tells as its seconds of waiting for the disk if all of its layers are in memory.
const NO_LAYERS_READ: f64 = -1.0;

/// Σ over the rows of a share, or of a whole step. Means are formed from it once.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Sums {
    /// Σ of token losses in nats.
    pub(crate) loss: f64,
    /// Tokens that the loss counts.
    pub(crate) trained_tokens: u64,
    /// Tokens of all rows.
    pub(crate) tokens: u64,
    /// Σ of the rows' auxiliary losses of routers, each as often as the row has tokens that the loss counts.
    pub(crate) router_loss: f64,
}

impl Sums {
    const NUMBERS: usize = 4;

    fn add(&mut self, other: Sums) {
        self.loss += other.loss;
        self.trained_tokens += other.trained_tokens;
        self.tokens += other.tokens;
        self.router_loss += other.router_loss;
    }

    /// Counts below 2^53 travel as f64 without loss.
    fn to_numbers(self) -> [f64; Sums::NUMBERS] {
        [self.loss, self.trained_tokens as f64, self.tokens as f64, self.router_loss]
    }

    fn from_numbers(numbers: &[f64]) -> Sums {
        let [loss, trained_tokens, tokens, router_loss] = [0, 1, 2, 3].map(|place| numbers[place]);
        Sums { loss, trained_tokens: trained_tokens as u64, tokens: tokens as u64, router_loss }
    }
}

/// The group of all ranks, and how a step is cut into shares among them.
pub struct Ranks {
    group: Group,
    /// Shares of a step, over all ranks, if the recipe says it: then the sums must not depend on which rank
    /// computes which share.
    virtual_ranks: Option<usize>,
    /// How many ranks hold one model together, once that is settled.
    stages: OnceLock<usize>,
    /// What connects those ranks.
    connections: OnceLock<Arc<Connections>>,
    /// Those that hold the same layers, where several ranks hold a model together and there are several models.
    same_layers: OnceLock<Group>,
}

impl Ranks {
    /// The ranks of `group`, with the arithmetic of `virtual_ranks` if given.
    ///
    /// # Errors
    /// If `virtual_ranks` is 0.
    pub fn new(group: Group, virtual_ranks: Option<usize>) -> Result<Ranks, TrainError> {
        if virtual_ranks == Some(0) {
            return Err(TrainError::VirtualRanks { virtual_ranks: 0, replicas: group.world() });
        }
        Ok(Ranks {
            group,
            virtual_ranks,
            stages: OnceLock::new(),
            connections: OnceLock::new(),
            same_layers: OnceLock::new(),
        })
    }

    /// Settles how many ranks hold one model together.
    ///
    /// # Errors
    /// If the number of ranks is no multiple of it, or `virtual_ranks` is no multiple of the models.
    pub(crate) fn settle(&self, stages: usize) -> Result<(), TrainError> {
        let world = self.group.world();
        if stages == 0 || !world.is_multiple_of(stages) {
            return Err(TrainError::UnevenStages { stages, world });
        }
        let replicas = world / stages;
        if let Some(virtual_ranks) = self.virtual_ranks.filter(|shares| !shares.is_multiple_of(replicas)) {
            return Err(TrainError::VirtualRanks { virtual_ranks, replicas });
        }
        let _ = self.stages.set(stages);
        Ok(())
    }

    /// Connects the ranks that hold a model together, and those that hold the same layers. All call it together.
    /// `queue`: the most messages that wait for one of the others.
    ///
    /// # Errors
    /// If one cannot be reached.
    pub(crate) fn connect(&self, stage: &Stage, queue: usize) -> Result<Arc<Connections>, TrainError> {
        let connections = Arc::new(Connections::new(self, [stage.mine, stage.count()], stage.links(), queue)?);
        let _ = self.connections.set(Arc::clone(&connections));
        self.connect_same_layers(stage)?;
        Ok(connections)
    }

    /// Keeps the links of all groups usable while no operation runs: see [`Group::keep_alive`].
    pub(crate) fn keep_alive(&self) {
        self.group.keep_alive();
    }

    /// Payload bytes that this rank has sent and received, and how long it has waited for each rank.
    fn moved(&self) -> (u64, u64, Vec<Duration>) {
        let (mut sent, mut received) = self.group.bytes_moved();
        let mut waited = self.group.waited();
        if let Some(connections) = self.connections.get() {
            let between = connections.moved();
            sent += between.sent;
            received += between.received;
            let first = self.replica() * self.stages();
            between.waited.iter().for_each(|(stage, time)| waited[first + stage] += *time);
        }
        if let Some(same_layers) = self.same_layers.get() {
            let moved = same_layers.bytes_moved();
            (sent, received) = (sent + moved.0, received + moved.1);
            let ranks = (self.group.rank() % self.stages()..).step_by(self.stages());
            ranks.zip(same_layers.waited()).for_each(|(rank, time)| waited[rank] += time);
        }
        (sent, received, waited)
    }

    /// Whether [`Ranks::settle`] accepts so many stages.
    pub(crate) fn can_have(&self, stages: usize) -> bool {
        let world = self.group.world();
        let evenly = |shares: usize| shares.is_multiple_of(world / stages);
        world.is_multiple_of(stages) && self.virtual_ranks.is_none_or(evenly)
    }

    /// How many ranks hold one model together.
    pub(crate) fn stages(&self) -> usize {
        self.stages.get().copied().unwrap_or(1)
    }

    /// How many models there are.
    pub(crate) fn replicas(&self) -> usize {
        self.group.world() / self.stages()
    }

    /// The number of the model that this rank holds layers of.
    pub(crate) fn replica(&self) -> usize {
        self.group.rank() / self.stages()
    }

    /// This process alone.
    ///
    /// # Errors
    /// If `virtual_ranks` is 0.
    pub fn alone(virtual_ranks: Option<usize>) -> Result<Ranks, TrainError> {
        Ranks::new(Group::in_process(1, None).remove(0), virtual_ranks)
    }

    /// The group that the ranks communicate in.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// Whether this is rank 0, which writes all files.
    pub fn is_first(&self) -> bool {
        self.group.rank() == 0
    }

    /// The same number of shares for each model.
    pub(crate) fn even(&self) -> ShareAssignment {
        let replicas = self.replicas();
        ShareAssignment::even(self.virtual_ranks.unwrap_or(replicas), replicas, self.stages())
    }

    /// Tells the others that this rank stops, unless they have found the same error.
    pub(crate) fn abort(&self, error: &TrainError) {
        let found_by_all = matches!(
            error,
            TrainError::Group { .. }
                | TrainError::Differ { .. }
                | TrainError::Drifted { .. }
                | TrainError::NotFinite { .. }
                | TrainError::NotFiniteEvaluation { .. }
        );
        if self.group.world() > 1 && !found_by_all {
            self.group.abort(&error.to_string(), error.fault().number());
        }
    }

    /// The largest of all ranks' values. So a signal that one rank gets stops all.
    pub(crate) fn largest(&self, value: i32) -> Result<i32, GroupError> {
        let mut all = vec![0i32; self.group.world()];
        self.group.all_gather(&[value], &mut all)?;
        Ok(all.into_iter().max().unwrap_or(value))
    }

    /// Σ over all shares, in their order, and each rank's part. `mine`: the sums of this rank's
    /// shares. `seconds`: what this rank took to compute them; `reading`: what of it this rank has waited for layers
    /// from the disk, if it reads any.
    pub(crate) fn sum_losses(
        &self,
        assignment: &ShareAssignment,
        mine: &[Sums],
        seconds: f64,
        reading: Option<f64>,
    ) -> Result<(Sums, Vec<RankRow>), GroupError> {
        let world = self.group.world();
        let (sent, received, waited) = self.moved();
        // All blocks have the length of the largest, because ranks may have different numbers of
        // shares.
        let numbers = assignment.largest() * Sums::NUMBERS;
        let mut block: Vec<f64> = mine.iter().flat_map(|sums| sums.to_numbers()).collect();
        block.resize(numbers, 0.0);
        block.extend([seconds, reading.unwrap_or(NO_LAYERS_READ), sent as f64, received as f64]);
        block.extend(waited.iter().map(Duration::as_secs_f64));
        let mut all = vec![0.0; block.len() * world];
        self.group.all_gather(&block, &mut all)?;
        let mut total = Sums::default();
        let mut rows = Vec::new();
        for (rank, block) in all.chunks(block.len()).enumerate() {
            let (sums, about) = block.split_at(numbers);
            let mut tokens = 0;
            // Of the ranks that hold a model together, only one has sums. The others add 0.
            for numbers in sums.chunks(Sums::NUMBERS).take(assignment.count_of(rank)) {
                let sums = Sums::from_numbers(numbers);
                tokens += sums.tokens;
                total.add(sums);
            }
            if world > 1 {
                let (sent, received) = (about[2] as u64, about[3] as u64);
                let reading_seconds = Some(about[1]).filter(|seconds| *seconds != NO_LAYERS_READ);
                let (seconds, waited_for) = (about[0], about[4..].to_vec());
                rows.push(RankRow { rank, seconds, tokens, reading_seconds, sent, received, waited_for });
            }
        }
        Ok((total, rows))
    }

    /// Sums gradients over all ranks' shares, in their order. Ranks that hold one model together have the gradients of
    /// their own layers, and sum them with those that hold the same.
    /// `mine`: the gradients of this rank's shares. The first becomes the sum, and the others are left undefined.
    /// `wire`: what they are on the way; shares that one rank has are added before.
    pub(crate) fn sum_gradients(
        &self,
        assignment: &ShareAssignment,
        mine: &mut [Vec<f32>],
        wire: WireDtype,
    ) -> Result<(), GroupError> {
        self.sum_first_shares(mine);
        let Some(group) = self.with_same_layers() else { return Ok(()) };
        if assignment.counts()[1..].iter().all(|count| *count == 1) {
            // A ring adds in another order than that of the shares, which virtual ranks promise.
            let algorithm = self.virtual_ranks.and(Some(Algorithm::Mesh));
            return group.all_reduce_with(&mut mine[0], &Reduce { algorithm, wire, ..Reduce::SUM });
        }
        sum_segments(group, assignment, mine)
    }

    /// Sums vectors over all ranks' shares, in their order, as [`Ranks::sum_gradients`] does. Nothing is rounded on
    /// the way, and no algorithm adds in another order.
    pub(crate) fn sum_exactly(&self, assignment: &ShareAssignment, mine: &mut [Vec<f32>]) -> Result<(), GroupError> {
        self.sum_first_shares(mine);
        self.with_same_layers().map_or(Ok(()), |group| sum_segments(group, assignment, mine))
    }

    /// Adds the shares of the first model, so that the sum of all begins with their sum.
    fn sum_first_shares(&self, mine: &mut [Vec<f32>]) {
        if self.replica() == 0 {
            let (first, rest) = mine.split_first_mut().expect("every rank has a share");
            rest.iter().for_each(|share| add(first, share));
        }
    }

    /// Gives what rank 0's state has beside its vectors to all ranks, because only rank 0 reads the checkpoint.
    /// Returns whether there is one, which rank 0 says.
    pub(crate) fn share_state(&self, state: &mut TrainState, is_loaded: bool) -> Result<bool, GroupError> {
        let mut numbers = state.to_numbers();
        self.group.broadcast(&mut numbers, 0)?;
        state.set_numbers(&numbers);
        let mut is_loaded = [u8::from(is_loaded)];
        self.group.broadcast(&mut is_loaded, 0)?;
        Ok(is_loaded[0] > 0)
    }

    /// The numbers of all ranks, one after the other in rank order. All ranks give the same count.
    pub(crate) fn gather(&self, mine: &[f64]) -> Result<Vec<f64>, GroupError> {
        let mut all = vec![0.0; mine.len() * self.group.world()];
        self.group.all_gather(mine, &mut all)?;
        Ok(all)
    }

    /// The texts of all ranks, in rank order.
    pub(crate) fn gather_texts(&self, mine: &str) -> Result<Vec<String>, GroupError> {
        let mut lengths = vec![0u64; self.group.world()];
        self.group.all_gather(&[mine.len() as u64], &mut lengths)?;
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        let mut padded = mine.as_bytes().to_vec();
        padded.resize(longest, b' ');
        let mut all = vec![0u8; longest * self.group.world()];
        self.group.all_gather(&padded, &mut all)?;
        let text = |(rank, length): (usize, &u64)| {
            String::from_utf8_lossy(&all[rank * longest..][..*length as usize]).into_owned()
        };
        Ok(lengths.iter().enumerate().map(text).collect())
    }

    /// Refuses to go on if a rank has other content than rank 0 under one of these names.
    pub(crate) fn expect_same(&self, contents: &[(&'static str, blake3::Hash)]) -> Result<(), TrainError> {
        self.expect_same_as(contents, &|_| 0)
    }

    /// Refuses to go on if a rank has other content than the one that `first` names for it.
    fn expect_same_as(
        &self,
        contents: &[(&'static str, blake3::Hash)],
        first: &dyn Fn(usize) -> usize,
    ) -> Result<(), TrainError> {
        let mine: Vec<u8> = contents.iter().flat_map(|(_, hash)| *hash.as_bytes()).collect();
        let mut all = vec![0u8; mine.len() * self.group.world()];
        self.group.all_gather(&mine, &mut all)?;
        let of = |rank: usize| all[rank * mine.len()..][..mine.len()].chunks(blake3::OUT_LEN);
        let mut differences = Vec::new();
        for (rank, who) in self.group.who().iter().enumerate() {
            let (first, host) = (first(rank), &who.host);
            for ((name, _), (ours, theirs)) in contents.iter().zip(of(first).zip(of(rank))) {
                if ours != theirs {
                    differences.push(format!("rank {rank} ({host}) has another {name} than rank {first}"));
                }
            }
        }
        if differences.is_empty() { Ok(()) } else { Err(TrainError::Differ { differences }) }
    }
}

/// Every rank gets its segment of all shares and adds them in order. Then all ranks get all sums. The ranks of `group`
/// are counted as the assignment's models.
fn sum_segments(group: &Group, assignment: &ShareAssignment, mine: &mut [Vec<f32>]) -> Result<(), GroupError> {
    let (world, length) = (group.world(), mine[0].len());
    // The first has added its own shares already.
    let count = |rank: usize| if rank == 0 { 1 } else { assignment.counts()[rank] };
    let most = (0..world).map(count).max().unwrap_or(1);
    let longest = length.div_ceil(world).max(1);
    let mut send = vec![0f32; longest * most * world];
    for (owner, block) in send.chunks_mut(longest * most).enumerate() {
        let segment = segment(length, world, owner);
        let shares = &mine[..count(group.rank())];
        for (place, share) in block.chunks_mut(longest).zip(shares) {
            place[..segment.len()].copy_from_slice(&share[segment.clone()]);
        }
    }
    let mut received = vec![0f32; send.len()];
    group.all_to_all(&send, &mut received)?;
    let blocks = received.chunks(longest * most).enumerate();
    let mut shares = blocks.flat_map(|(rank, block)| block.chunks(longest).take(count(rank)));
    let mut sum = shares.next().unwrap_or_default().to_vec();
    shares.for_each(|share| add(&mut sum, share));
    let mut all = vec![0f32; longest * world];
    group.all_gather(&sum, &mut all)?;
    for (owner, sum) in all.chunks(longest).enumerate() {
        let segment = segment(length, world, owner);
        let length = segment.len();
        mine[0][segment].copy_from_slice(&sum[..length]);
    }
    Ok(())
}

/// `sum[i] += more[i]`
fn add(sum: &mut [f32], more: &[f32]) {
    for (sum, more) in sum.iter_mut().zip(more) {
        *sum += more;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sums have the bits of one rank that adds all shares one after the other, however shares
    /// are assigned.
    #[test]
    fn sums_do_not_depend_on_the_deal() {
        const SHARES: usize = 6;
        const LENGTH: usize = 7;
        // Of very different size, so that another order of adding shows.
        let gradient = |share: usize| -> Vec<f32> {
            let sign = if share.is_multiple_of(2) { 1.0 } else { -1.0 };
            // Multiplied out, because `powi` may give other bits at another place in the program.
            let power = |exponent: usize| (0..exponent).fold(sign, |product: f32, _| product * 1.1);
            (0..LENGTH).map(|n| power((share * 37 + n * 11) % 90)).collect()
        };
        let losses = |share: usize| {
            let loss = (0..share * 5).fold(1.0, |product: f64, _| product * 1.3);
            Sums { loss, trained_tokens: 3, tokens: share as u64, router_loss: 2.0 * loss }
        };
        let mut want = gradient(0);
        (1..SHARES).for_each(|share| add(&mut want, &gradient(share)));
        let mut want_loss = Sums::default();
        (0..SHARES).for_each(|share| want_loss.add(losses(share)));
        let speeds: [&[f64]; 7] =
            [&[1.0], &[1.0, 1.0], &[1.0, 9.0], &[9.0, 1.0], &[1.0, 1.0, 1.0], &[9.0, 1.0, 9.0], &[9.0, 9.0, 1.0]];
        for seconds in speeds {
            let assignment = ShareAssignment::by_speed(SHARES, seconds);
            let sums = std::thread::scope(|scope| {
                let assignment = &assignment;
                let start = |group: Group| {
                    scope.spawn(move || {
                        let mine = assignment.shares_of(group.rank());
                        let ranks = Ranks::new(group, Some(SHARES)).expect("ranks");
                        let mut gradients: Vec<Vec<f32>> = mine.clone().map(gradient).collect();
                        let shares: Vec<Sums> = mine.map(losses).collect();
                        let (loss, rows) = ranks.sum_losses(assignment, &shares, 1.0, None).expect("a sum");
                        ranks.sum_gradients(assignment, &mut gradients, WireDtype::Exact).expect("a sum");
                        (gradients.swap_remove(0), loss, rows.len())
                    })
                };
                let threads: Vec<_> = Group::in_process(seconds.len(), None).into_iter().map(start).collect();
                threads.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Vec<_>>()
            });
            for (gradient, loss, rows) in sums {
                assert_eq!(gradient, want, "{:?}", assignment.counts());
                assert_eq!(loss, want_loss, "{:?}", assignment.counts());
                assert_eq!(rows, if seconds.len() > 1 { seconds.len() } else { 0 });
            }
        }
    }
}
