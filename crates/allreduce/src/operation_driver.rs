//! The rules of one operation on its way, without threads, clocks and sockets: how long it waits,
//! and what ends it.
//!
//! [`OperationDriver::poll`] moves what can be moved and says what to do next. `engine.rs` calls it
//! with a real clock and transport, the simulation with its own.

use std::sync::Arc;
use std::time::Duration;

use crate::frame::FrameError;
use crate::group_status::GroupStatus;
use crate::operation::{Buffers, Fault, Links, Operation, Polled};
use crate::transport::{Broken, Transport, Want};
use crate::verdict::Cause;

/// How long a closed data connection is given to be explained by its rank's death.
pub(crate) const EXPLANATION: Duration = Duration::from_millis(500);

/// A gap between two looks at the clock that means that this process was stopped. Looks are 0.64 s
/// apart at most.
pub(crate) const OWN_STOP: Duration = Duration::from_secs(2);

/// How long an operation waits for others.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// Longest time without any progress while every rank is alive.
    pub(crate) operation_timeout: Duration,
    /// Longest time for which all ranks may stand still.
    pub(crate) timeout: Duration,
    /// The other ranks of the first group, all of which must stand still.
    pub(crate) peers: usize,
    /// Rounds of waiting between two looks at the clock.
    pub(crate) rounds_per_look: u32,
}

impl Patience {
    /// Whether waiting on is of no use: the time is up, or all ranks are inside operations and none has moved a byte
    /// for the timeout. Then a frame was lost, or the ranks wait for each other in operations that do not fit
    /// together.
    pub(crate) fn is_over(&self, now: Duration, idle: Duration, status: &GroupStatus) -> bool {
        let Patience { operation_timeout, timeout, peers, .. } = *self;
        idle > operation_timeout || (idle > timeout && status.is_standstill(now, peers, timeout))
    }
}

/// What the caller of [`OperationDriver::poll`] does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// The operation is complete.
    Done,
    /// Something moved: poll again at once.
    Again,
    /// Nothing moved, for the `round`-th time in a row (from 0): wait for the links in
    /// [`OperationDriver::wants`].
    Wait { round: u32 },
    /// A link closed: wait a moment for a verdict that explains it, then poll again.
    AwaitVerdict,
    /// The group has failed, and the verdict is there.
    Failed,
    /// The operation cannot be completed: report this cause.
    GiveUp(Cause),
}

/// An operation on its way.
pub(crate) struct OperationDriver {
    operation: Operation,
    /// This group's ranks as ranks of the first group.
    members: Arc<Vec<usize>>,
    patience: Patience,
    /// Bytes that this rank has moved over other transports.
    moved_elsewhere: u64,
    wants: Vec<Want>,
    round: u32,
    /// Since when nothing has moved.
    idle_since: Option<Duration>,
    /// The last look at the clock while nothing moved.
    looked: Duration,
    /// A link closed then: its rank's death, or what it sent on another link, may explain it.
    closed_since: Option<Duration>,
}

impl OperationDriver {
    pub(crate) fn new(
        operation: Operation,
        members: Arc<Vec<usize>>,
        patience: Patience,
        moved_elsewhere: u64,
    ) -> OperationDriver {
        OperationDriver {
            operation,
            members,
            patience,
            moved_elsewhere,
            wants: Vec::new(),
            round: 0,
            idle_since: None,
            looked: Duration::ZERO,
            closed_since: None,
        }
    }

    /// The links that had to move when the operation last waited.
    pub(crate) fn wants(&self) -> &[Want] {
        &self.wants
    }

    /// Moves what can be moved now. `now` is asked only when the time matters. `waited` is how long
    /// this rank has waited for each rank of the group so far.
    pub(crate) fn poll(
        &mut self,
        now: &dyn Fn() -> Duration,
        links: &mut Links,
        transport: &mut dyn Transport,
        buffers: &mut Buffers<'_>,
        status: &GroupStatus,
        waited: &mut [Duration],
    ) -> Next {
        match self.operation.poll(links, transport, buffers) {
            Ok(polled @ (Polled::Done | Polled::Moved)) => {
                if let Some(since) = self.idle_since.take() {
                    let idle = now().saturating_sub(since);
                    self.wants.iter().for_each(|want| waited[want.peer] += idle);
                }
                (self.round, self.closed_since) = (0, None);
                if polled == Polled::Done { Next::Done } else { Next::Again }
            }
            Ok(Polled::Idle) => self.wait(now, links, status),
            Err(fault) => self.on_fault(now(), fault, links, status),
        }
    }

    fn wait(&mut self, now: &dyn Fn() -> Duration, links: &Links, status: &GroupStatus) -> Next {
        if status.has_failed() {
            return Next::Failed;
        }
        self.operation.wants(&mut self.wants);
        match self.idle_since {
            None => {
                let now = now();
                (self.idle_since, self.looked) = (Some(now), now);
                status.set_moved(self.moved(links));
            }
            Some(_) if self.round.is_multiple_of(self.patience.rounds_per_look) => {
                let now = now();
                let idle = self.look(now);
                if self.patience.is_over(now, idle, status) {
                    return Next::GiveUp(self.stalled(idle));
                }
            }
            Some(_) => {}
        }
        self.round += 1;
        Next::Wait { round: self.round - 1 }
    }

    /// Looks at the clock. Returns for how long nothing has moved. A process that was stopped has
    /// not waited, and the others may have been stopped with it.
    pub(crate) fn look(&mut self, now: Duration) -> Duration {
        if now.saturating_sub(self.looked) > OWN_STOP {
            self.idle_since = self.idle_since.map(|_| now);
        }
        self.looked = now;
        self.idle_since.map_or(Duration::ZERO, |since| now.saturating_sub(since))
    }

    fn stalled(&self, idle: Duration) -> Cause {
        Cause::Stalled {
            waiting_for: self.wants.iter().map(|want| self.members[want.peer]).collect(),
            seconds: idle.as_secs(),
            operation: self.operation.number,
            mine: self.operation.descriptor,
        }
    }

    fn on_fault(&mut self, now: Duration, fault: Fault, links: &Links, status: &GroupStatus) -> Next {
        status.set_moved(self.moved(links));
        let closed = matches!(&fault, Fault::Broken(broken) if broken.closed);
        let since = *self.closed_since.get_or_insert(now);
        if !closed || now.saturating_sub(since) > EXPLANATION {
            return Next::GiveUp(cause_of(fault, &self.members));
        }
        // The peer's death may explain it, or what the peer sent on another link.
        if status.has_failed() { Next::Failed } else { Next::AwaitVerdict }
    }

    /// Payload bytes that this rank has moved so far.
    fn moved(&self, links: &Links) -> u64 {
        self.moved_elsewhere + links.bytes_sent + links.bytes_received
    }
}

/// What is reported of a fault. `members`: the group's ranks as ranks of the first group.
pub(crate) fn cause_of(fault: Fault, members: &[usize]) -> Cause {
    let (peer, link, error) = match fault {
        Fault::Broken(Broken { peer, link, what, .. }) => return Cause::Broken { peer: members[peer], link, what },
        Fault::Frame { peer, link, error } => (members[peer], link, error),
    };
    match error {
        FrameError::Diverged { mine_operation, mine, theirs_operation, theirs } => {
            Cause::Diverged { peer, operation: mine_operation, mine, peer_operation: theirs_operation, theirs }
        }
        error => Cause::Damaged { peer, link, what: error.to_string() },
    }
}

/// What only the simulation asks: it jumps from event to event instead of looking at the clock
/// again and again.
#[cfg(test)]
impl OperationDriver {
    /// Since when nothing has moved.
    pub(crate) fn idle_since(&self) -> Option<Duration> {
        self.idle_since
    }

    /// Whether a closed link waits for its explanation.
    pub(crate) fn awaits_verdict(&self) -> bool {
        self.closed_since.is_some()
    }

    /// The process ran until `now`, so it looked at the clock then at the latest.
    pub(crate) fn ran_until(&mut self, now: Duration) {
        self.looked = now;
    }

    /// The links that have to move now.
    pub(crate) fn wants_now(&self) -> Vec<Want> {
        let mut wants = Vec::new();
        self.operation.wants(&mut wants);
        wants
    }
}
