//! Measures a group's operations: the table that nccl-tests prints, for any transport.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::{Algorithm, Backend, Group, GroupError, Reduce, Reduction, WireDtype};

/// Time boxes: for one trial, and for all trials of a size.
const TRIAL: Duration = Duration::from_millis(400);

/// Trials per size; the median is of these.
const TRIALS: usize = 5;

/// Most repetitions of an operation in a trial.
const MOST_REPETITIONS: usize = 200;

/// Bytes after which a trial has moved enough.
const ENOUGH_BYTES: usize = 8 << 20;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// Every rank gets the sum.
    AllReduce,
    /// Every rank gets its segment of the sum.
    ReduceScatter,
    /// Every rank gets every block.
    AllGather,
    /// Every rank gets rank 0's data.
    Broadcast,
    /// Every rank sends a block to every rank.
    AllToAll,
    /// Rank 0 sends to rank 1 and gets as much back.
    SendRecv,
    /// No data.
    Barrier,
}

impl Operation {
    /// All of them, by the name that the command line uses.
    pub const NAMES: [(&'static str, Operation); 7] = [
        ("all_reduce", Operation::AllReduce),
        ("reduce_scatter", Operation::ReduceScatter),
        ("all_gather", Operation::AllGather),
        ("broadcast", Operation::Broadcast),
        ("all_to_all", Operation::AllToAll),
        ("send_recv", Operation::SendRecv),
        ("barrier", Operation::Barrier),
    ];

    /// The name that the command line uses.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, operation)| *operation == self).map_or("", |(name, _)| name)
    }

    /// Bytes that cross the busiest rank's link, over the bytes of the buffer: what makes figures
    /// of different worlds comparable (nccl-tests' bus bandwidth).
    fn bus_factor(self, world: usize) -> f64 {
        let n = world as f64;
        match self {
            Operation::AllReduce => 2.0 * (n - 1.0) / n,
            Operation::ReduceScatter | Operation::AllGather | Operation::AllToAll => (n - 1.0) / n,
            Operation::Broadcast | Operation::SendRecv => 1.0,
            Operation::Barrier => 0.0,
        }
    }
}

/// What to measure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// The operation.
    pub operation: Operation,
    /// Smallest buffer in bytes.
    pub min_bytes: usize,
    /// Largest buffer in bytes.
    pub max_bytes: usize,
    /// Each size is so many times the one before.
    pub step: usize,
    /// What elements are on the wire.
    pub wire: WireDtype,
    /// Always this way.
    pub topology: Option<Algorithm>,
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The operation's name.
    pub op: String,
    /// The number of ranks.
    pub ranks: usize,
    /// What carried the data.
    pub backend: Backend,
    /// The way it went.
    pub topology: String,
    /// Bytes of the buffer.
    pub bytes: usize,
    /// Median over the trials of the mean time of one operation, in microseconds.
    pub latency_us_median: f64,
    /// The fastest trial's.
    pub latency_us_min: f64,
    /// Bytes of the buffer over the median time, in 10^9 bytes per second.
    pub algbw_gb_s: f64,
    /// The same for the bytes that cross the busiest link.
    pub busbw_gb_s: f64,
    /// Elements that were not as they should be, over all ranks.
    pub wrong: u64,
}

/// What the reductions of a size cost this rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Operations carried out.
    pub operations: u64,
    /// Bytes of the buffer.
    pub bytes: usize,
    /// Payload bytes that this rank sent for them.
    pub sent: u64,
}

/// Carries out `operations` operations of the largest size, and returns what this rank sent for
/// them.
///
/// # Errors
/// If the group fails.
pub fn cost(group: &Group, options: &Options, operations: u64) -> Result<Cost, GroupError> {
    let elements = options.max_bytes / 4;
    let reduce = Reduce { wire: options.wire, algorithm: options.topology, ..Reduce::SUM };
    let mut bench = Bench { group, operation: options.operation, reduce, data: vec![0.0; elements], block: Vec::new() };
    bench.fill();
    bench.data.fill(0.0); // repeated sums must not overflow
    let before = group.bytes_moved().0;
    for _ in 0..operations {
        bench.once()?;
    }
    Ok(Cost { operations, bytes: elements * 4, sent: group.bytes_moved().0 - before })
}

/// Measures every size; all ranks get all rows. `report` gets each row as it is done.
///
/// # Errors
/// If the group fails.
pub fn run(group: &Group, options: &Options, report: &mut dyn FnMut(&Row)) -> Result<Vec<Row>, GroupError> {
    let mut rows = Vec::new();
    let mut bytes = options.min_bytes;
    measure(group, options, bytes)?; // a warm-up of everything
    loop {
        let row = measure(group, options, bytes)?;
        report(&row);
        rows.push(row);
        match bytes.max(1).checked_mul(options.step.max(2)) {
            Some(next) if next <= options.max_bytes && options.operation != Operation::Barrier => bytes = next,
            _ => return Ok(rows),
        }
    }
}

/// Buffers of one size, and the operation on them.
struct Bench<'a> {
    group: &'a Group,
    operation: Operation,
    reduce: Reduce,
    data: Vec<f32>,
    block: Vec<f32>,
}

impl Bench<'_> {
    fn once(&mut self) -> Result<(), GroupError> {
        let Bench { group, operation, reduce, data, block } = self;
        match operation {
            Operation::AllReduce => group.all_reduce_with(data, reduce),
            Operation::ReduceScatter => group.reduce_scatter(data, Reduction::Sum).map(|_| ()),
            Operation::AllGather => group.all_gather(block, data),
            Operation::Broadcast => group.broadcast(data, 0),
            Operation::AllToAll => group.all_to_all(block, data),
            Operation::SendRecv => match group.rank() {
                0 => group.send(data, 1).and_then(|()| group.recv(data, 1)),
                1 => group.recv(data, 0).and_then(|()| group.send(data, 0)),
                _ => Ok(()),
            },
            Operation::Barrier => group.barrier(),
        }
    }

    /// Whole numbers that differ from rank to rank and element to element, and whose sums are exact
    /// in f32 (and, up to 256, in bf16 too).
    fn value(rank: usize, element: usize) -> f32 {
        ((element % 7) + rank % 8) as f32
    }

    fn fill(&mut self) {
        let (rank, group) = (self.group.rank(), self.group);
        let length = self.data.len();
        for (element, value) in self.data.iter_mut().enumerate() {
            *value =
                if self.operation == Operation::Broadcast && rank != 0 { -1.0 } else { Self::value(rank, element) };
        }
        let block = if self.operation == Operation::AllToAll { length } else { length / group.world() };
        self.block = (0..block).map(|element| Self::value(rank, element)).collect();
    }

    /// Elements that one operation left wrong on this rank.
    fn wrong(&mut self) -> Result<u64, GroupError> {
        self.fill();
        self.once()?;
        let (world, rank, length) = (self.group.world(), self.group.rank(), self.data.len());
        let sum = |element: usize| (0..world).map(|rank| Self::value(rank, element)).sum::<f32>();
        let block = (length / world).max(1);
        let mine = crate::segment(length, world, rank);
        let expected = |element: usize| match self.operation {
            Operation::AllReduce => sum(element),
            Operation::ReduceScatter if mine.contains(&element) => sum(element),
            Operation::ReduceScatter => self.data[element],
            Operation::AllGather => Self::value(element / block, element % block),
            Operation::Broadcast => Self::value(0, element),
            Operation::AllToAll => Self::value(element / block, rank * block + element % block),
            Operation::SendRecv if rank == 1 => Self::value(0, element),
            Operation::SendRecv | Operation::Barrier => Self::value(rank, element),
        };
        Ok((0..length).filter(|&element| self.data[element] != expected(element)).count() as u64)
    }

    fn timed(&mut self, repetitions: usize) -> Result<Duration, GroupError> {
        self.data.fill(0.0); // repeated sums must not overflow
        self.group.barrier()?;
        let began = Instant::now();
        for _ in 0..repetitions {
            self.once()?;
        }
        Ok(began.elapsed())
    }
}

fn measure(group: &Group, options: &Options, bytes: usize) -> Result<Row, GroupError> {
    let world = group.world();
    let mut elements = if options.operation == Operation::Barrier { 0 } else { bytes / 4 };
    if matches!(options.operation, Operation::AllGather | Operation::AllToAll) {
        elements -= elements % world;
    }
    let reduce = Reduce { wire: options.wire, algorithm: options.topology, ..Reduce::SUM };
    let mut bench = Bench { group, operation: options.operation, reduce, data: vec![0.0; elements], block: Vec::new() };
    let wrong = bench.wrong()?;
    let mut all = vec![0u64; world];
    group.all_gather(&[wrong], &mut all)?;

    let estimate = bench.timed(2)?.as_secs_f64() / 2.0;
    // Every rank repeats as often as rank 0 does.
    let mut repetitions = [(TRIAL.as_secs_f64() / estimate.max(1e-9)) as u64];
    group.broadcast(&mut repetitions, 0)?;
    let most = (ENOUGH_BYTES / bytes.max(1)).clamp(2, MOST_REPETITIONS);
    let repetitions = (repetitions[0] as usize).clamp(1, most);
    // Not counted: caches fill, and the processes that started the ranks come to rest.
    bench.timed(repetitions)?;
    let mut trials = Vec::new();
    for _ in 0..TRIALS {
        trials.push(bench.timed(repetitions)?.as_secs_f64() / repetitions as f64);
    }
    trials.sort_by(f64::total_cmp);
    let (median, min) = (trials[TRIALS / 2], trials[0]);
    let moved = elements as f64 * 4.0;
    let halves = if options.operation == Operation::SendRecv { 2.0 } else { 1.0 };
    let algbw = halves * moved / median / 1e9;
    Ok(Row {
        op: options.operation.name().into(),
        ranks: world,
        backend: group.backend(),
        topology: options.topology.unwrap_or_else(|| group.algorithm(elements * 4)).name().into(),
        bytes: elements * 4,
        latency_us_median: median * 1e6,
        latency_us_min: min * 1e6,
        algbw_gb_s: algbw,
        busbw_gb_s: algbw * options.operation.bus_factor(world),
        wrong: all.iter().sum(),
    })
}
