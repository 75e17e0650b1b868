//! Runs one operation after the other over the transports of a group.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::choose::{Choice, Reach};
use crate::control::Control;
use crate::error::{GroupError, GroupFailure, Who};
use crate::flight::Flight;
use crate::frame::{Algorithm, Descriptor, Kind};
use crate::group::Inner;
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
    /// Who waits has links send something so often.
    pub(crate) keep_alive: Duration,
    /// The first group and those split off it.
    pub(crate) groups: Mutex<Vec<Weak<Inner>>>,
}

impl GroupContext {
    /// Adds a group, and forgets those that are dropped.
    pub(crate) fn add(&self, group: &Arc<Inner>) {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.retain(|group| group.strong_count() > 0);
        groups.push(Arc::downgrade(group));
    }

    /// Has the links of all groups send something that have sent nothing for long. A group inside an operation is passed
    /// over: who waits in it does it.
    pub(crate) fn keep_alive(&self) {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for group in groups.iter().filter_map(Weak::upgrade) {
            if let Ok(mut engine) = group.engine.try_lock() {
                engine.keep_alive();
            }
        }
    }

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

    /// Has links send something that have sent nothing for long.
    pub(crate) fn keep_alive(&mut self) {
        for network in &mut self.networks {
            // A broken link reports itself when it is to move something.
            let _ = network.transport.keep_alive(KEEP_ALIVE);
        }
    }

    /// The same for all groups, if `since` is long ago. A rank may wait for another one that computes for longer than
    /// idle links last, and so may the links that carry nothing in this operation.
    fn keep_alive_while_waiting(&mut self, since: &mut Instant) {
        if since.elapsed() >= self.context.keep_alive {
            self.keep_alive();
            self.context.keep_alive();
            *since = Instant::now();
        }
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
        let Network { links, .. } = &self.networks[network];
        let moved_elsewhere = moved.0 + moved.1 - links.bytes_sent - links.bytes_received;
        let mut driver =
            OperationDriver::new(operation, Arc::clone(&self.members), context.patience(), moved_elsewhere);
        let mut kept_alive = Instant::now();
        loop {
            let Network { transport, links, .. } = &mut self.networks[network];
            match driver.poll(&now, links, transport.as_mut(), buffers, status, &mut self.waited) {
                Next::Done => return Ok(()),
                Next::Again => {}
                Next::Wait { round } => {
                    transport.idle(driver.wants(), round);
                    if round.is_multiple_of(ROUNDS_PER_LOOK) {
                        self.keep_alive_while_waiting(&mut kept_alive);
                    }
                }
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
        let step = self.context.membership.status().step.load(std::sync::atomic::Ordering::Relaxed);
        self.flight.begin(step, number, descriptor, self.moved());
        let outcome = self.drive_beside(network, Operation::new(plan, number, descriptor), &mut buffers, goes_on);
        self.flight.end(outcome.is_ok(), self.moved());
        outcome
    }

    fn drive_beside(
        &mut self,
        network: usize,
        mut operation: Operation,
        buffers: &mut Buffers<'_>,
        goes_on: &mut dyn FnMut(bool) -> bool,
    ) -> Result<(), Interrupted> {
        let context = Arc::clone(&self.context);
        let status = context.membership.status();
        let (mut wants, mut round, mut begun, mut kept_alive) = (Vec::new(), 0u32, false, Instant::now());
        loop {
            let Network { transport, links, .. } = &mut self.networks[network];
            let polled = operation.poll(links, transport.as_mut(), buffers);
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
                    operation.wants(&mut wants);
                    transport.idle(&wants, round);
                    round = round.wrapping_add(1);
                    self.keep_alive_while_waiting(&mut kept_alive);
                }
            }
        }
    }

    /// Why the group has failed.
    pub(crate) fn failure(&self, operation: Option<(u64, Descriptor)>) -> GroupError {
        let context = &self.context;
        let status = context.membership.status();
        status.tell();
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::frame::HEADER_BYTES;
    use crate::group::Group;
    use crate::split::SplitContext;
    use crate::transport::{Backend, Broken, Want};

    /// Links on which nothing comes. They break once they have been kept alive three times, or after a while.
    struct Quiet {
        kept_alive: Arc<AtomicUsize>,
        looks: usize,
    }

    impl Transport for Quiet {
        fn backend(&self) -> Backend {
            Backend::Rdma
        }

        fn frame_bytes(&self, remaining: usize) -> usize {
            remaining
        }

        fn send(
            &mut self,
            _: usize,
            _: usize,
            _: &[u8; HEADER_BYTES],
            payload: &[u8],
            sent: &mut usize,
        ) -> Result<bool, Broken> {
            *sent = HEADER_BYTES + payload.len();
            Ok(true)
        }

        fn receive(
            &mut self,
            peer: usize,
            link: usize,
            _: &mut [u8; HEADER_BYTES],
            _: &mut [u8],
            _: &mut usize,
        ) -> Result<bool, Broken> {
            self.looks += 1;
            match self.kept_alive.load(Ordering::Relaxed) >= 3 || self.looks > 1_000_000 {
                true => Err(Broken { peer, link, closed: false, what: "the test is over".into() }),
                false => Ok(false),
            }
        }

        fn keep_alive(&mut self, _: Duration) -> Result<(), Broken> {
            self.kept_alive.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }

        fn idle(&mut self, _: &[Want], _: u32) {}
    }

    /// Who waits keeps the links of all its groups alive, those that the operation does not use too.
    #[test]
    fn links_are_kept_alive_while_another_rank_computes() {
        let context = Arc::new(GroupContext {
            membership: Membership::Threads(Arc::new(GroupStatus::new())),
            who: Arc::new(vec![Who { host: "here".into(), pid: 1 }, Who { host: "there".into(), pid: 2 }]),
            rank: 0,
            operation_timeout: Duration::from_secs(600),
            timeout: Duration::from_secs(5),
            keep_alive: Duration::ZERO,
            groups: Mutex::default(),
        });
        let links = || {
            let kept_alive = Arc::new(AtomicUsize::new(0));
            let transport = Box::new(Quiet { kept_alive: Arc::clone(&kept_alive), looks: 0 });
            (Network::new(transport, 0, 2, 7, Reach::Pairs, 1, None), kept_alive)
        };
        let group = |networks: Vec<Network>| {
            let (members, split) = (Arc::new(vec![0, 1]), SplitContext::threads(None));
            Group::assemble(0, 7, networks, members, Arc::clone(&context), split)
        };
        let [(first, in_use), (second, beside), (third, of_other_group)] = [links(), links(), links()];
        let waiting = group(vec![first, second]);
        let other = group(vec![third]);
        drop(group(Vec::new()));
        waiting.barrier().expect_err("the test is over");
        let all = [in_use, beside, of_other_group];
        let counts = || [0, 1, 2].map(|n: usize| all[n].load(Ordering::Relaxed));
        assert_eq!(counts(), [3; 3]);
        // Between operations it is asked for, of any of them.
        other.keep_alive();
        assert_eq!(counts(), [4; 3]);
    }
}
