//! The group: what callers hold.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytemuck::{Pod, cast_slice, cast_slice_mut};

use crate::background::{Pending, TicketLock, Worker};
use crate::choose::{Choice, MEASURED_BYTES, RANK_ORDERED, Reach};
use crate::config::Config;
use crate::control::Control;
use crate::engine::{Engine, GroupContext, KEEP_ALIVE, Membership, Network};
use crate::error::{GroupError, Who};
use crate::frame::{Algorithm, Reduction, WireDtype};
use crate::group_status::GroupStatus;
use crate::join;
use crate::join_error::JoinError;
use crate::notice::Notice;
use crate::session::Timing;
use crate::split::SplitContext;
use crate::transport::tcp::Tcp;
use crate::transport::{Backend, in_process};
use crate::verdict::Cause;

/// How often each algorithm is tried when a group is made; the fastest try counts.
const MEASUREMENTS: std::ops::RangeInclusive<u64> = 4..=20;

/// Time after which the algorithms have been tried enough.
const MEASURING: Duration = Duration::from_millis(30);

/// Longest message of [`Group::abort`], in bytes. Even with every byte escaped it fits a control
/// message many times over.
const LONGEST_REASON: usize = 4 << 10;

/// A reduction and how it travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reduce {
    /// How elements are combined.
    pub reduction: Reduction,
    /// What elements are on the wire.
    pub wire: WireDtype,
    /// What the elements are: a digest that ranks compare. 0: nothing.
    pub tag: u64,
    /// Always this algorithm. None: the one that suits the size.
    pub algorithm: Option<Algorithm>,
}

impl Reduce {
    /// The sum, exact.
    pub const SUM: Reduce = Reduce::of(Reduction::Sum);

    /// A reduction, exact on the wire.
    pub const fn of(reduction: Reduction) -> Reduce {
        Reduce { reduction, wire: WireDtype::Exact, tag: 0, algorithm: None }
    }
}

pub(crate) struct Inner {
    pub(crate) rank: usize,
    pub(crate) world: usize,
    pub(crate) engine: Mutex<Engine>,
    pub(crate) ticket_lock: TicketLock,
    pub(crate) context: Arc<GroupContext>,
    pub(crate) members: Arc<Vec<usize>>,
    pub(crate) split_context: SplitContext,
    pub(crate) splits: AtomicU64,
}

/// Ranks that reduce and exchange data together.
///
/// Every rank calls the same operations in the same order; a rank that does not gets an error, and
/// so do the others. All calls block until this rank's part is done. Any length works, zero
/// included. An operation of zero elements still waits for the ranks it depends on.
///
/// **Order of summation.** `star`, `direct` and `mesh` sum in rank order, ((x0 + x1) + x2) + …, and
/// give the same bits. `ring` sums segment s of N around the ring and ends at its owner: ((x(s+1) +
/// x(s+2)) + …) + x(s), the second half of each segment in the other direction if N > 2. Every rank
/// gets the same bits, whatever the transport and the order of arrival. Sums are taken in f32. With
/// a narrow wire type each contribution is rounded once before it is added (around a ring: each
/// partial sum), and the total once more. The payload of a NaN is not part of the promise.
///
/// **After an error** the group is of no more use, and the buffers of the failed operation are
/// undefined.
pub struct Group {
    pub(crate) inner: Arc<Inner>,
    worker: Mutex<Option<Worker>>,
}

impl Group {
    /// For a rank that failed before it could join: tells the others why, and with which exit code
    /// it ends, for two seconds at most. The ranks that wait for it get [`JoinError::Failed`].
    pub fn excuse(config: &Config, why: &str, code: u8) {
        if config.world > 1 && config.check().is_ok() {
            join::excuse(config, why, code);
        }
    }

    /// Joins the group of separate processes that `config` describes.
    ///
    /// # Errors
    /// If the configuration cannot work, ranks are missing, differ or cannot reach each other, or
    /// RDMA was asked for and is not there.
    pub fn join(config: &Config) -> Result<Group, JoinError> {
        config.check()?;
        let began = Instant::now();
        if config.world == 1 {
            return Ok(Group::alone(config));
        }
        let joined = join::join(config)?;
        let who = joined.members.iter().map(|member| Who { host: member.host.clone(), pid: member.pid });
        let who: Arc<Vec<Who>> = Arc::new(who.collect());
        let ranks_here = who.iter().filter(|other| other.host == who[config.rank].host).count();
        let system = |what| move |error| JoinError::System { what, error };
        let timing = Timing::new(config.timeout);
        let control = Control::start(config.rank, Arc::clone(&who), joined.control, timing, config.notices.clone())
            .map_err(system("the control thread cannot be started"))?;
        let context = Arc::new(GroupContext {
            membership: Membership::Control(control),
            who,
            rank: config.rank,
            operation_timeout: config.operation_timeout,
            timeout: config.timeout,
            keep_alive: KEEP_ALIVE,
            groups: Mutex::default(),
        });
        let tcp =
            Tcp::new(joined.data, &config.tcp, ranks_here).map_err(system("a data connection cannot be set up"))?;
        let (rank, world, session) = (config.rank, config.world, joined.session);
        let asked = config.topology;
        let network = Network::new(Box::new(tcp), rank, world, session, Reach::Pairs, joined.streams, asked);
        let split_context = SplitContext::processes(config, joined.listener, joined.members, joined.streams, session);
        let members = Arc::new((0..world).collect());
        let group = Group::assemble(rank, session, vec![network], members, context, split_context);
        group.measure_algorithms().map_err(JoinError::Group)?;
        crate::rdma_group::attach(&group, session, config)?;
        group.engine().flight = crate::flight::Flight::new(session);
        let (latency, algorithms) = {
            let network = &group.engine().networks[0];
            (network.latency, network.choice.by_size())
        };
        (config.notices)(Notice::Joined { world, backend: group.backend(), took: began.elapsed() });
        (config.notices)(Notice::Chosen { latency, algorithms });
        Ok(group)
    }

    /// The groups of `world` threads of this process, to be used by one thread each.
    pub fn in_process(world: usize, topology: Option<Algorithm>) -> Vec<Group> {
        let status = Arc::new(GroupStatus::new());
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let who: Arc<Vec<Who>> =
            Arc::new((0..world).map(|_| Who { host: host.clone(), pid: std::process::id() }).collect());
        let split_context = SplitContext::threads(topology);
        let members: Arc<Vec<usize>> = Arc::new((0..world).collect());
        let groups = in_process::connect(world, 1).into_iter().enumerate().map(|(rank, transport)| {
            let context = Arc::new(GroupContext {
                membership: Membership::Threads(Arc::clone(&status)),
                who: Arc::clone(&who),
                rank,
                operation_timeout: Duration::from_secs(600),
                timeout: Duration::from_secs(5),
                keep_alive: KEEP_ALIVE,
                groups: Mutex::default(),
            });
            let network = Network::new(Box::new(transport), rank, world, 0, Reach::Pairs, 1, topology);
            Group::assemble(rank, 0, vec![network], Arc::clone(&members), context, split_context.clone())
        });
        groups.collect()
    }

    fn alone(config: &Config) -> Group {
        let group = Group::in_process(1, None).remove(0);
        (config.notices)(Notice::Joined { world: 1, backend: group.backend(), took: Duration::ZERO });
        group
    }

    pub(crate) fn assemble(
        rank: usize,
        session: u64,
        networks: Vec<Network>,
        members: Arc<Vec<usize>>,
        context: Arc<GroupContext>,
        split_context: SplitContext,
    ) -> Group {
        let engine = Engine::new(networks, session, Arc::clone(&members), Arc::clone(&context));
        let inner = Arc::new(Inner {
            rank,
            world: members.len(),
            engine: Mutex::new(engine),
            ticket_lock: TicketLock::default(),
            context,
            members,
            split_context,
            splits: AtomicU64::new(0),
        });
        inner.context.add(&inner);
        Group { inner, worker: Mutex::new(None) }
    }

    /// Waits until all ranks are here, and measures the algorithms that may be chosen from.
    ///
    /// # Errors
    /// If the group fails meanwhile.
    pub(crate) fn measure_algorithms(&self) -> Result<(), GroupError> {
        self.barrier()?;
        if matches!(self.engine().networks[0].choice, Choice::Always(_)) {
            return Ok(());
        }
        let mut times = [f32::INFINITY; RANK_ORDERED.len() * MEASURED_BYTES.len()];
        let measured = RANK_ORDERED.iter().flat_map(|algorithm| MEASURED_BYTES.map(|bytes| (algorithm, bytes)));
        let mut data = vec![0f32; MEASURED_BYTES.iter().max().unwrap_or(&0) / 4];
        // One after the other in each round: what else the machine does meets all of them.
        let mut round = || -> Result<Duration, GroupError> {
            let began = Instant::now();
            for ((algorithm, bytes), time) in measured.clone().zip(&mut times) {
                let reduce = Reduce { algorithm: Some(*algorithm), ..Reduce::SUM };
                let began = Instant::now();
                self.all_reduce_with(&mut data[..bytes / 4], &reduce)?;
                *time = time.min(began.elapsed().as_secs_f32());
            }
            Ok(began.elapsed())
        };
        round()?;
        let took = round()?;
        // As many further rounds as rank 0 has time for.
        let rounds = MEASURING.as_nanos() / took.as_nanos().max(1);
        let mut rounds = [u64::try_from(rounds).unwrap_or(u64::MAX).clamp(*MEASUREMENTS.start(), *MEASUREMENTS.end())];
        self.broadcast(&mut rounds, 0)?;
        for _ in 2..rounds[0] {
            round()?;
        }
        // All ranks must choose alike, so the slowest rank's times count for all.
        let agree = Reduce { algorithm: Some(Algorithm::Direct), ..Reduce::of(Reduction::Max) };
        self.all_reduce_with(&mut times, &agree)?;
        let times = times.map(f64::from);
        let network = &mut self.engine().networks[0];
        network.choice = network.choice.measured([[times[0], times[1]], [times[2], times[3]], [times[4], times[5]]]);
        network.latency = times.iter().copied().fold(f64::INFINITY, f64::min);
        Ok(())
    }

    pub(crate) fn engine(&self) -> MutexGuard<'_, Engine> {
        self.inner.engine()
    }

    /// This process's rank.
    pub fn rank(&self) -> usize {
        self.inner.rank
    }

    /// The number of ranks.
    pub fn world(&self) -> usize {
        self.inner.world
    }

    /// The hosts and processes of all ranks of the first group.
    pub fn who(&self) -> &[Who] {
        &self.inner.context.who
    }

    /// What carries most of the data.
    pub fn backend(&self) -> Backend {
        self.engine().networks[0].transport.backend()
    }

    /// The algorithm that a reduction of `bytes` bytes takes.
    pub fn algorithm(&self, bytes: usize) -> Algorithm {
        self.engine().networks[0].choice.algorithm(bytes)
    }

    /// Payload bytes that this rank has sent and received.
    pub fn bytes_moved(&self) -> (u64, u64) {
        self.engine().moved()
    }

    /// How long this rank has waited in operations for each rank; for itself always zero. Waits for
    /// several ranks at once count for each of them.
    pub fn waited(&self) -> Vec<Duration> {
        self.engine().waited.clone()
    }

    /// Sets the step that the following operations belong to; messages and heartbeats repeat it.
    pub fn set_step(&self, step: u64) {
        self.inner.context.membership.status().step.store(step, Ordering::Relaxed);
    }

    /// Whether the group has failed. Looks without waiting, for ranks that are busy with something
    /// else.
    ///
    /// # Errors
    /// If the group has failed.
    pub fn check(&self) -> Result<(), GroupError> {
        if self.inner.context.membership.status().has_failed() {
            return Err(self.engine().failure(None));
        }
        Ok(())
    }

    /// Tells all ranks that this one stops, and why. Their operations end with that error. They get
    /// the first 4 KiB of a long message. `code`: the caller's own number for the error.
    pub fn abort(&self, message: &str, code: i32) {
        let context = &self.inner.context;
        context.membership.status().tell();
        let message = &message[..message.floor_char_boundary(LONGEST_REASON)];
        context.membership.report(context.rank, Cause::Failed { message: message.into(), code });
        context.membership.status().wait_for_verdict(context.timeout);
    }

    /// Every rank's `data` becomes the reduction of all ranks' data.
    ///
    /// # Errors
    /// If the group has failed, as for every operation.
    pub fn all_reduce(&self, data: &mut [f32], reduction: Reduction) -> Result<(), GroupError> {
        self.all_reduce_with(data, &Reduce::of(reduction))
    }

    /// [`Group::all_reduce`] with a wire type, a layout to compare, or a fixed algorithm.
    pub fn all_reduce_with(&self, data: &mut [f32], reduce: &Reduce) -> Result<(), GroupError> {
        self.inner.turn(|inner| inner.all_reduce(data, reduce))
    }

    /// Begins an all-reduce that goes on while this thread does something else. [`Pending::wait`]
    /// gives the buffer back. Such reductions run in the order in which they began; other
    /// operations of the group wait for them.
    ///
    /// Decision: `finetune` does not use this yet. It stays because layers spread over machines
    /// will reduce one layer's gradients while the next layer is computed.
    pub fn start_all_reduce(&self, data: Vec<f32>, reduce: Reduce) -> Pending {
        let mut worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        let worker = worker.get_or_insert_with(|| Worker::start(&self.inner));
        worker.start_all_reduce(&self.inner, data, reduce)
    }

    /// This rank's [`segment`] of `data` becomes that of the reduction of all ranks' data. The rest
    /// of `data` is undefined afterwards. Returns the segment.
    ///
    /// Decision: `finetune` uses this only in its benchmark. Ranks that hold layers together need it no
    /// more: each adds up its own part in a group of the ranks that have the same layers.
    ///
    /// # Errors
    /// If the group has failed.
    pub fn reduce_scatter(&self, data: &mut [f32], reduction: Reduction) -> Result<Range<usize>, GroupError> {
        self.inner.turn(|inner| inner.reduce_scatter(data, reduction))
    }

    /// `all` becomes every rank's `mine`, in rank order.
    ///
    /// # Errors
    /// If the group has failed.
    ///
    /// # Panics
    /// If `all` is not `world` times as long as `mine`.
    pub fn all_gather<T: Pod>(&self, mine: &[T], all: &mut [T]) -> Result<(), GroupError> {
        assert_eq!(all.len(), mine.len() * self.world(), "all_gather needs one block per rank");
        all[mine.len() * self.rank()..][..mine.len()].copy_from_slice(mine);
        self.inner.turn(|inner| inner.all_gather(cast_slice_mut(all)))
    }

    /// Every rank's `data` becomes that of `root`.
    ///
    /// # Errors
    /// If the group has failed.
    ///
    /// # Panics
    /// If there is no rank `root`.
    pub fn broadcast<T: Pod>(&self, data: &mut [T], root: usize) -> Result<(), GroupError> {
        assert!(root < self.world(), "there is no rank {root}");
        self.inner.turn(|inner| inner.broadcast(cast_slice_mut(data), root))
    }

    /// Block j of `send` goes to rank j; block j of `receive` comes from rank j.
    ///
    /// # Errors
    /// If the group has failed.
    ///
    /// # Panics
    /// If the two are not of the same length, or that length is no multiple of `world`.
    pub fn all_to_all<T: Pod>(&self, send: &[T], receive: &mut [T]) -> Result<(), GroupError> {
        let (world, rank) = (self.world(), self.rank());
        assert_eq!(send.len(), receive.len(), "all_to_all needs buffers of one length");
        assert_eq!(send.len() % world, 0, "all_to_all needs one block per rank");
        let own = rank * (send.len() / world)..(rank + 1) * (send.len() / world);
        receive[own.clone()].copy_from_slice(&send[own]);
        self.inner.turn(|inner| inner.all_to_all(cast_slice(send), cast_slice_mut(receive)))
    }

    /// Sends `data` to rank `to`, which calls [`Group::recv`] with a buffer of the same length.
    ///
    /// Decision: `finetune` sends copies of checkpoints with this, and to rank 0 what it writes of other
    /// ranks' layers. What goes between layers on several machines travels beside the computing: see
    /// [`Group::sender`].
    ///
    /// # Errors
    /// If the group has failed.
    ///
    /// # Panics
    /// If `to` is this rank or none.
    pub fn send<T: Pod>(&self, data: &[T], to: usize) -> Result<(), GroupError> {
        assert!(to < self.world() && to != self.rank(), "cannot send to rank {to}");
        self.inner.turn(|inner| inner.message(to, &mut [], cast_slice(data), true))
    }

    /// Receives what rank `from` sends with [`Group::send`].
    ///
    /// # Errors
    /// If the group has failed.
    ///
    /// # Panics
    /// If `from` is this rank or none.
    pub fn recv<T: Pod>(&self, data: &mut [T], from: usize) -> Result<(), GroupError> {
        assert!(from < self.world() && from != self.rank(), "cannot receive from rank {from}");
        self.inner.turn(|inner| inner.message(from, cast_slice_mut(data), &[], false))
    }

    /// Keeps links usable through a long rest, those of this group, of the one that it was split off and of all others
    /// that were: Apple's RDMA queues go bad when idle for about 20 minutes. Cheap; call it every few minutes while no
    /// operation runs. Whoever waits in an operation does it itself.
    pub fn keep_alive(&self) {
        self.inner.context.keep_alive();
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// If the group has failed.
    pub fn barrier(&self) -> Result<(), GroupError> {
        self.inner.turn(Inner::barrier)
    }

    /// Says farewell: this rank takes part in nothing any more, and the others do not take it for lost when its process
    /// ends. Dropping the group, its lines and all groups split off it does the same.
    pub fn leave(&self) {
        if let Membership::Control(control) = &self.inner.context.membership {
            control.leave();
        }
    }
}
