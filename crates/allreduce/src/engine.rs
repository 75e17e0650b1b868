//! Runs one operation after the other over the transports of a group.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::choose::{Choice, Reach};
use crate::control::{Board, Control};
use crate::error::{GroupError, GroupFailure, Who};
use crate::flight::Flight;
use crate::frame::{Algorithm, Descriptor, FrameError, Kind};
use crate::operation::{Buffers, Fault, Links, Operation, Standing};
use crate::plan::Plan;
use crate::session::Doing;
use crate::transport::{LONGEST_SLEEP, Transport, Want};
use crate::verdict::{Cause, Verdict};

/// How long a closed data connection is given to be explained by its rank's death.
const EXPLANATION: Duration = Duration::from_millis(500);

/// A gap between two looks at the clock, 64 rounds of waiting apart (0.64 s at most), that means that we were stopped.
const OWN_STOP: Duration = Duration::from_secs(2);

/// Who says whether the group still stands.
pub(crate) enum Membership {
    /// The control connections of separate processes.
    Control(Control),
    /// Threads of one process: the first failure is everybody's.
    Threads(Arc<Board>),
}

impl Membership {
    pub(crate) fn board(&self) -> &Board {
        match self {
            Membership::Control(control) => &control.board,
            Membership::Threads(board) => board,
        }
    }

    pub(crate) fn report(&self, by: usize, cause: Cause) {
        match self {
            Membership::Control(control) => control.report(cause),
            Membership::Threads(board) => board.end(Verdict::Reported { by, cause, at: board.progress() }),
        }
    }
}

/// What a group needs to explain itself, shared with the groups split off it.
pub(crate) struct Standings {
    pub(crate) membership: Membership,
    pub(crate) who: Arc<Vec<Who>>,
    /// This rank in the first group.
    pub(crate) rank: usize,
    /// Longest time without any progress in an operation while every rank is alive.
    pub(crate) operation_timeout: Duration,
    /// A silent rank is lost after this.
    pub(crate) timeout: Duration,
}

/// A transport and the state of its links.
pub(crate) struct Carrier {
    pub(crate) transport: Box<dyn Transport>,
    pub(crate) links: Links,
    pub(crate) reach: Reach,
    /// Links that every rank uses towards each peer.
    pub(crate) wires: usize,
    pub(crate) choice: Choice,
    /// Seconds that the smallest operation took when it was measured; 0 if it was not.
    pub(crate) latency: f64,
}

impl Carrier {
    pub(crate) fn new(
        transport: Box<dyn Transport>,
        rank: usize,
        world: usize,
        session: u64,
        reach: Reach,
        wires: usize,
        asked: Option<Algorithm>,
    ) -> Carrier {
        let choice = Choice::new(world, reach, asked);
        Carrier { transport, links: Links::new(rank, world, session), reach, wires, choice, latency: 0.0 }
    }
}

/// The part of a group that one operation at a time has to itself.
pub(crate) struct Engine {
    /// The preferred one first; the last one reaches every pair.
    pub(crate) carriers: Vec<Carrier>,
    /// Collective operations begun.
    pub(crate) operations: u64,
    /// Point-to-point operations begun: to and from each peer. They have their own numbers, since the other ranks do not
    /// take part.
    pub(crate) messages: Vec<(u64, u64)>,
    pub(crate) flight: Flight,
    /// This group's ranks as ranks of the first group.
    pub(crate) members: Arc<Vec<usize>>,
    pub(crate) standings: Arc<Standings>,
    /// How long this rank has waited while each member owed it a frame or did not take one.
    pub(crate) waited: Vec<Duration>,
    /// A copy of the caller's data, for operations that change it while they send it.
    pub(crate) snapshot: Vec<f32>,
    wants: Vec<Want>,
}

impl Engine {
    pub(crate) fn new(
        carriers: Vec<Carrier>,
        session: u64,
        members: Arc<Vec<usize>>,
        standings: Arc<Standings>,
    ) -> Engine {
        Engine {
            carriers,
            operations: 0,
            messages: vec![(0, 0); members.len()],
            flight: Flight::new(session),
            waited: vec![Duration::ZERO; members.len()],
            members,
            standings,
            snapshot: Vec::new(),
            wants: Vec::new(),
        }
    }

    /// The first transport that reaches far enough.
    pub(crate) fn carrier(&self, reach: Reach) -> usize {
        let enough = |carrier: &Carrier| carrier.reach == Reach::Pairs || reach == Reach::Neighbours;
        self.carriers.iter().position(enough).unwrap_or(self.carriers.len() - 1)
    }

    /// Payload bytes sent and received so far.
    pub(crate) fn moved(&self) -> (u64, u64) {
        let sum = |of: fn(&Links) -> u64| self.carriers.iter().map(|carrier| of(&carrier.links)).sum();
        (sum(|links| links.bytes_sent), sum(|links| links.bytes_received))
    }

    /// Carries out `plan` as operation `number`. Returns when it is done or the group has failed.
    pub(crate) fn run(
        &mut self,
        carrier: usize,
        plan: Plan,
        number: u64,
        descriptor: Descriptor,
        mut buffers: Buffers<'_>,
    ) -> Result<(), GroupError> {
        let standings = Arc::clone(&self.standings);
        let board = standings.membership.board();
        let step = board.step.load(std::sync::atomic::Ordering::Relaxed);
        if board.has_failed() {
            return Err(self.failure(Some((number, descriptor))));
        }
        self.flight.begin(step, number, descriptor, self.moved());
        let group = self.flight.session();
        board.enter((descriptor.kind != Kind::Send).then_some(Doing { group, operation: number, descriptor }));
        let mut operation = Operation::new(plan, number, descriptor);
        let outcome = self.drive(carrier, &mut operation, &mut buffers, &standings, number, descriptor);
        let moved = self.moved();
        board.leave(moved.0 + moved.1);
        self.flight.end(outcome.is_ok(), moved);
        outcome.map_err(|()| self.failure(Some((number, descriptor))))
    }

    fn drive(
        &mut self,
        carrier: usize,
        operation: &mut Operation,
        buffers: &mut Buffers<'_>,
        standings: &Standings,
        number: u64,
        descriptor: Descriptor,
    ) -> Result<(), ()> {
        let board = standings.membership.board();
        let moved = self.moved();
        let Carrier { transport, links, .. } = &mut self.carriers[carrier];
        let moved_before = moved.0 + moved.1 - links.bytes_sent - links.bytes_received;
        let mut round = 0;
        let mut idle_since = Instant::now();
        let mut looked = idle_since;
        let mut closed_since = None;
        loop {
            match operation.poll(links, transport.as_mut(), buffers) {
                Ok(standing @ (Standing::Done | Standing::Moved)) => {
                    if round > 0 {
                        let idle = idle_since.elapsed();
                        self.wants.iter().for_each(|want| self.waited[want.peer] += idle);
                    }
                    if standing == Standing::Done {
                        return Ok(());
                    }
                    (round, closed_since) = (0, None);
                }
                Ok(Standing::Idle) => {
                    if board.has_failed() {
                        return Err(());
                    }
                    operation.wants(&mut self.wants);
                    if round == 0 {
                        idle_since = Instant::now();
                        looked = idle_since;
                        board.set_moved(moved_before + links.bytes_sent + links.bytes_received);
                    } else if round % 64 == 0 {
                        let now = Instant::now();
                        // This process was stopped: it has not waited, and the others may have been stopped with it.
                        if now - looked > OWN_STOP {
                            idle_since = now;
                        }
                        looked = now;
                        if Self::is_stuck(now - idle_since, standings) {
                            let waiting_for = self.wants.iter().map(|want| self.members[want.peer]).collect();
                            let seconds = (now - idle_since).as_secs();
                            let cause = Cause::Stalled { waiting_for, seconds, operation: number, mine: descriptor };
                            return Self::give_up(standings, cause);
                        }
                    }
                    transport.idle(&self.wants, round);
                    round += 1;
                }
                Err(fault) => {
                    let closed = matches!(&fault, Fault::Broken(broken) if broken.closed);
                    let since = *closed_since.get_or_insert_with(Instant::now);
                    if !closed || since.elapsed() > EXPLANATION {
                        return Self::give_up(standings, self.cause(fault));
                    }
                    // Its death may explain it, or what it sent on another link.
                    if board.wait_for_verdict(LONGEST_SLEEP).is_some() {
                        return Err(());
                    }
                }
            }
        }
    }

    /// Whether waiting on is of no use: the operation's time is up, or all ranks are inside operations and none has moved a
    /// byte for the timeout: a frame was lost, or they wait for each other in operations that do not fit together.
    fn is_stuck(idle: Duration, standings: &Standings) -> bool {
        let standstill = || standings.membership.board().is_standstill(standings.who.len() - 1, standings.timeout);
        idle > standings.operation_timeout || (idle > standings.timeout && standstill())
    }

    fn give_up(standings: &Standings, cause: Cause) -> Result<(), ()> {
        standings.membership.report(standings.rank, cause);
        standings.membership.board().wait_for_verdict(standings.timeout * 2);
        Err(())
    }

    fn cause(&self, fault: Fault) -> Cause {
        match fault {
            Fault::Broken(broken) => {
                Cause::Broken { peer: self.members[broken.peer], link: broken.link, what: broken.what }
            }
            Fault::Frame { peer, link, error } => {
                let peer = self.members[peer];
                match error {
                    FrameError::Diverged { mine_operation, mine, theirs_operation, theirs } => Cause::Diverged {
                        peer,
                        operation: mine_operation,
                        mine,
                        peer_operation: theirs_operation,
                        theirs,
                    },
                    error => Cause::Damaged { peer, link, what: error.to_string() },
                }
            }
        }
    }

    /// Why the group has failed.
    pub(crate) fn failure(&self, operation: Option<(u64, Descriptor)>) -> GroupError {
        let standings = &self.standings;
        let board = standings.membership.board();
        GroupError(Box::new(GroupFailure {
            rank: standings.rank,
            // Without a verdict within twice the timeout not even the control thread answers: then nobody is heard.
            verdict: board.verdict().unwrap_or(Verdict::CutOff),
            operation,
            step: board.progress().step,
            who: Arc::clone(&standings.who),
            flight: self.flight.record(),
        }))
    }
}
