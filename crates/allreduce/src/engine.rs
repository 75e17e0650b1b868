//! Runs one operation after the other over the transports of a group.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::choose::{Choice, Reach};
use crate::control::Control;
use crate::error::{GroupError, GroupFailure, Who};
use crate::flight::Flight;
use crate::frame::{Algorithm, Descriptor, Kind};
use crate::group_status::GroupStatus;
use crate::operation::{Buffers, Fault, Links, Operation, Polled};
use crate::operation_driver::{Next, OperationDriver, Patience};
use crate::plan::Plan;
use crate::progress::CurrentOperation;
use crate::transport::{LONGEST_SLEEP, Transport};
use crate::verdict::{Cause, Verdict};

/// Rounds of waiting between two looks at the clock. One round takes 10 ms at most.
const ROUNDS_PER_LOOK: u32 = 64;

/// Links that have sent nothing for so long send something: Apple's RDMA queues go bad when idle for about 20 minutes.
pub(crate) const KEEP_ALIVE: Duration = Duration::from_secs(300);

/// What tells whether the group has failed.
pub(crate) enum Membership {
    /// The control connections of separate processes.
    Control(Control),
    /// Threads of one process: the first failure is the failure of all.
    Threads(Arc<GroupStatus>),
}

impl Membership {
    pub(crate) fn status(&self) -> &GroupStatus {
        match self {
            Membership::Control(control) => &control.status,
            Membership::Threads(status) => status,
        }
    }

    pub(crate) fn report(&self, by: usize, cause: Cause) {
        match self {
            Membership::Control(control) => control.report(cause),
            Membership::Threads(status) => status.end(Verdict::Reported { by, cause, at: status.progress() }),
        }
    }
}

/// What a group needs to explain itself, shared with the groups split off it.
pub(crate) struct GroupContext {
    pub(crate) membership: Membership,
    pub(crate) who: Arc<Vec<Who>>,
    /// This rank in the first group.
    pub(crate) rank: usize,
    /// Longest time without any progress in an operation while every rank is alive.
    pub(crate) operation_timeout: Duration,
    /// A silent rank is lost after this.
    pub(crate) timeout: Duration,
}

impl GroupContext {
    /// How long operations and messages wait for others.
    pub(crate) fn patience(&self) -> Patience {
        Patience {
            operation_timeout: self.operation_timeout,
            timeout: self.timeout,
            peers: self.who.len() - 1,
            rounds_per_look: ROUNDS_PER_LOOK,
        }
    }
}

/// What ended a message that travels beside the operations.
#[derive(Debug)]
pub(crate) enum Interrupted {
    /// It is of no more use, or the group has failed.
    Stopped,
    /// `begun`: a part of it has moved.
    Fault { fault: Fault, begun: bool },
}

/// A transport, the state of its links, and what is known of its speed. A group has one or two of
/// these: TCP, and RDMA before it.
pub(crate) struct Network {
    pub(crate) transport: Box<dyn Transport>,
    pub(crate) links: Links,
    pub(crate) reach: Reach,
    /// Links from each rank to each peer.
    pub(crate) wires: usize,
    pub(crate) choice: Choice,
    /// Seconds that the smallest operation took; 0 if it was not measured.
    pub(crate) latency: f64,
}

impl Network {
    pub(crate) fn new(
        transport: Box<dyn Transport>,
        rank: usize,
        world: usize,
        session: u64,
        reach: Reach,
        wires: usize,
        asked: Option<Algorithm>,
    ) -> Network {
        let choice = Choice::new(world, reach, asked);
        Network { transport, links: Links::new(rank, world, session), reach, wires, choice, latency: 0.0 }
    }
}

/// The part of a group that one operation at a time has to itself.
pub(crate) struct Engine {
    /// The preferred network first; the last one reaches every pair.
    pub(crate) networks: Vec<Network>,
    /// Collective operations begun.
    pub(crate) operations: u64,
    /// Point-to-point operations begun, to and from each peer. They have their own numbers, since
    /// the other ranks take no part.
    pub(crate) messages: Vec<(u64, u64)>,
    pub(crate) flight: Flight,
    /// This group's ranks as ranks of the first group.
    pub(crate) members: Arc<Vec<usize>>,
    pub(crate) context: Arc<GroupContext>,
    /// How long this rank has waited while each member owed it a frame or accepted none.
    pub(crate) waited: Vec<Duration>,
    /// A copy of the caller's data, for operations that change it while they send it.
    pub(crate) snapshot: Vec<f32>,
}

impl Engine {
    pub(crate) fn new(
        networks: Vec<Network>,
        session: u64,
        members: Arc<Vec<usize>>,
        context: Arc<GroupContext>,
    ) -> Engine {
        Engine {
            networks,
            operations: 0,
            messages: vec![(0, 0); members.len()],
            flight: Flight::new(session),
            waited: vec![Duration::ZERO; members.len()],
            members,
            context,
            snapshot: Vec::new(),
        }
    }

    /// The first transport that reaches far enough.
    pub(crate) fn network(&self, reach: Reach) -> usize {
        let enough = |network: &Network| network.reach == Reach::Pairs || reach == Reach::Neighbours;
        self.networks.iter().position(enough).unwrap_or(self.networks.len() - 1)
    }

    /// Payload bytes sent and received so far.
    pub(crate) fn moved(&self) -> (u64, u64) {
        let sum = |of: fn(&Links) -> u64| self.networks.iter().map(|network| of(&network.links)).sum();
        (sum(|links| links.bytes_sent), sum(|links| links.bytes_received))
    }

    /// Carries out `plan` as operation `number`. Returns when it is done or the group has failed.
    pub(crate) fn run(
        &mut self,
        network: usize,
        plan: Plan,
        number: u64,
        descriptor: Descriptor,
        mut buffers: Buffers<'_>,
    ) -> Result<(), GroupError> {
        let context = Arc::clone(&self.context);
        let status = context.membership.status();
        let step = status.step.load(std::sync::atomic::Ordering::Relaxed);
        if status.has_failed() {
            return Err(self.failure(Some((number, descriptor))));
        }
        self.flight.begin(step, number, descriptor, self.moved());
        let group = self.flight.session();
        status.enter((descriptor.kind != Kind::Send).then_some(CurrentOperation {
            group,
            operation: number,
            descriptor,
        }));
        let outcome = self.drive(network, Operation::new(plan, number, descriptor), &mut buffers, &context);
        let moved = self.moved();
        status.leave(moved.0 + moved.1);
        self.flight.end(outcome.is_ok(), moved);
        outcome.map_err(|()| self.failure(Some((number, descriptor))))
    }

    fn drive(
        &mut self,
        network: usize,
        operation: Operation,
        buffers: &mut Buffers<'_>,
        context: &GroupContext,
    ) -> Result<(), ()> {
        let status = context.membership.status();
        let now = || status.now();
        let moved = self.moved();
        let Network { transport, links, .. } = &mut self.networks[network];
        let moved_elsewhere = moved.0 + moved.1 - links.bytes_sent - links.bytes_received;
        let mut driver =
            OperationDriver::new(operation, Arc::clone(&self.members), context.patience(), moved_elsewhere);
        loop {
            match driver.poll(&now, links, transport.as_mut(), buffers, status, &mut self.waited) {
                Next::Done => return Ok(()),
                Next::Again => {}
                Next::Wait { round } => transport.idle(driver.wants(), round),
                Next::AwaitVerdict => {
                    if status.wait_for_verdict(LONGEST_SLEEP).is_some() {
                        return Err(());
                    }
                }
                Next::Failed => return Err(()),
                Next::GiveUp(cause) => {
                    context.membership.report(context.rank, cause);
                    status.wait_for_verdict(context.timeout * 2);
                    return Err(());
                }
            }
        }
    }

    /// Carries out `plan` beside what this rank computes: a rank that computes is not inside an operation, and waits
    /// for nobody. So only what ends the group ends this, or that `goes_on` says no. It is asked whenever something has
    /// moved, or nothing can.
    pub(crate) fn run_beside(
        &mut self,
        network: usize,
        plan: Plan,
        number: u64,
        descriptor: Descriptor,
        mut buffers: Buffers<'_>,
        goes_on: &mut dyn FnMut(bool) -> bool,
    ) -> Result<(), Interrupted> {
        let context = Arc::clone(&self.context);
        let status = context.membership.status();
        let Network { transport, links, .. } = &mut self.networks[network];
        let mut operation = Operation::new(plan, number, descriptor);
        let (mut wants, mut round, mut begun, mut kept_alive) = (Vec::new(), 0u32, false, Instant::now());
        loop {
            let polled = operation.poll(links, transport.as_mut(), &mut buffers);
            match polled.map_err(|fault| Interrupted::Fault { fault, begun })? {
                Polled::Done => {
                    goes_on(true);
                    return Ok(());
                }
                Polled::Moved => {
                    (begun, round) = (true, 0);
                    goes_on(true);
                }
                Polled::Idle => {
                    if status.has_failed() || !goes_on(false) {
                        return Err(Interrupted::Stopped);
                    }
                    if kept_alive.elapsed() > KEEP_ALIVE {
                        // A broken link reports itself when it is to move something.
                        let _ = transport.keep_alive(KEEP_ALIVE);
                        kept_alive = Instant::now();
                    }
                    operation.wants(&mut wants);
                    transport.idle(&wants, round);
                    round = round.wrapping_add(1);
                }
            }
        }
    }

    /// Why the group has failed.
    pub(crate) fn failure(&self, operation: Option<(u64, Descriptor)>) -> GroupError {
        let context = &self.context;
        let status = context.membership.status();
        GroupError(Box::new(GroupFailure {
            rank: context.rank,
            // Without a verdict within twice the timeout not even the control thread answers. Then
            // this rank counts as cut off.
            verdict: status.verdict().unwrap_or(Verdict::CutOff),
            operation,
            step: status.progress().step,
            who: Arc::clone(&context.who),
            flight: self.flight.record(),
        }))
    }
}
