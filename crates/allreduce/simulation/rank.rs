//! One simulated rank: the shipped drivers of the control connections and of operations, called
//! with a virtual clock.
//!
//! `control.rs` and `engine.rs` call them from threads that wait. Here the same two callers are
//! turned inside out: each goes as far as it gets without waiting.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::plans;
use super::wires::SimTransport;
use super::work::{Memory, Task};
use crate::control_driver::{Arrived, ControlDriver, Effect, Inbox};
use crate::group_status::GroupStatus;
use crate::mutations::Mutations;
use crate::operation::{Links, Operation};
use crate::operation_driver::{Next, OperationDriver, Patience};
use crate::progress::CurrentOperation;
use crate::sealed::Seals;
use crate::session::{Session, Timing};
use crate::transport::{LONGEST_SLEEP, Want};
use crate::verdict::{Cause, Verdict};

/// How often a rank that waits looks whether all stand still.
const LOOK: Duration = Duration::from_millis(200);

/// What has come in on one control connection and was not read.
#[derive(Default)]
struct Unread {
    bytes: Vec<u8>,
    ended: bool,
}

/// A sealed message that leaves.
pub(super) struct SealedMessage {
    pub(super) to: usize,
    pub(super) bytes: Vec<u8>,
}

/// Whether the process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Process {
    Running,
    Frozen,
    Dead,
}

/// Where the rank's program is.
enum Phase {
    /// Computing until then.
    Pausing {
        until: Duration,
    },
    Inside(Box<ActiveOperation>),
    /// Reported; the verdict must follow.
    GivenUp {
        since: Duration,
    },
    /// All operations done, or failed; the group is dropped then.
    Over {
        leaves: Duration,
    },
    Left,
}

/// An operation on its way.
struct ActiveOperation {
    driver: OperationDriver,
    memory: Memory,
}

/// When a rank does what, as drawn for the run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// The control thread starts; heartbeats of different ranks are out of step.
    pub(super) start: Duration,
    /// The group is complete and its caller begins.
    pub(super) begin: Duration,
    /// From the last operation to the end of the program.
    pub(super) linger: Duration,
    /// From a failure to the end of the program.
    pub(super) last_words: Duration,
}

/// What is the same for all ranks of a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    pub(super) world: usize,
    pub(super) timing: Timing,
    pub(super) timeout: Duration,
    pub(super) operation_timeout: Duration,
    pub(super) frame_bytes: usize,
    pub(super) mutations: Mutations,
}

pub(super) struct Rank {
    pub(super) rank: usize,
    settings: Settings,
    group: u64,
    pace: Pace,
    pub(super) process: Process,
    status: Arc<GroupStatus>,
    // What the control thread has.
    control: ControlDriver,
    unread: BTreeMap<usize, Unread>,
    orders: Vec<Cause>,
    pub(super) sealed_messages: Vec<SealedMessage>,
    /// Connections that this rank has shut because a message on them did not open.
    pub(super) shut: Vec<usize>,
    pub(super) verdict: Option<(Duration, Verdict)>,
    pub(super) warnings: usize,
    // What the caller's thread has.
    pub(super) transport: SimTransport,
    links: Links,
    members: Arc<Vec<usize>>,
    waited: Vec<Duration>,
    tasks: Vec<Task>,
    /// Operations done.
    pub(super) done: usize,
    phase: Phase,
    /// Operations that are done and not yet checked.
    pub(super) results: Vec<(usize, Memory)>,
    /// A promise broken that only this rank can see.
    pub(super) complaint: Option<String>,
}

impl Rank {
    pub(super) fn new(
        rank: usize,
        settings: Settings,
        pace: Pace,
        group: u64,
        seals: BTreeMap<usize, Seals>,
        transport: SimTransport,
        tasks: Vec<Task>,
    ) -> Rank {
        let until = pace.begin + tasks.first().map_or(Duration::ZERO, |task| task.pause);
        let status = Arc::new(GroupStatus::new());
        let session = Session::new(rank, settings.world, settings.timing, pace.start).with(settings.mutations);
        let unread = seals.keys().map(|&peer| (peer, Unread::default())).collect();
        Rank {
            rank,
            settings,
            group,
            pace,
            process: Process::Running,
            control: ControlDriver::new(session, seals, Arc::clone(&status)),
            status,
            unread,
            orders: Vec::new(),
            sealed_messages: Vec::new(),
            shut: Vec::new(),
            verdict: None,
            warnings: 0,
            transport,
            links: Links::new(rank, settings.world, group).with(settings.mutations),
            members: Arc::new((0..settings.world).collect()),
            waited: vec![Duration::ZERO; settings.world],
            tasks,
            done: 0,
            phase: Phase::Pausing { until },
            results: Vec::new(),
            complaint: None,
        }
    }

    pub(super) fn tasks(&self) -> &Vec<Task> {
        &self.tasks
    }

    fn runs(&self, now: Duration) -> bool {
        self.process == Process::Running && now >= self.pace.start && !self.has_left()
    }

    pub(super) fn has_left(&self) -> bool {
        matches!(self.phase, Phase::Left)
    }

    pub(super) fn has_finished(&self) -> bool {
        self.done == self.tasks.len()
    }

    pub(super) fn arrive(&mut self, from: usize, bytes: &[u8]) {
        self.unread.get_mut(&from).expect("a connection per peer").bytes.extend_from_slice(bytes);
    }

    pub(super) fn end(&mut self, from: usize) {
        self.unread.get_mut(&from).expect("a connection per peer").ended = true;
    }

    /// When something happens without anything arriving.
    pub(super) fn next_control(&self) -> Duration {
        self.control.next_poll().max(self.pace.start)
    }

    pub(super) fn next_engine(&self, now: Duration) -> Option<Duration> {
        match &self.phase {
            Phase::Pausing { until } => Some(*until),
            Phase::Over { leaves } => Some(*leaves),
            Phase::GivenUp { since } => Some(*since + self.settings.timeout * 2),
            Phase::Inside(doing) if doing.driver.awaits_verdict() => Some(now + LONGEST_SLEEP),
            Phase::Inside(doing) => {
                doing.driver.idle_since().map(|since| (since + self.settings.timeout).max(now + LOOK))
            }
            Phase::Left => None,
        }
    }

    /// The process goes on after it was stopped for so long. While it ran it looked at the clock
    /// often, last when it was stopped.
    pub(super) fn thaw(&mut self, now: Duration, stopped: Duration) {
        self.process = Process::Running;
        if let Phase::Inside(doing) = &mut self.phase {
            doing.driver.ran_until(now - stopped);
            doing.driver.look(now);
        }
    }

    /// What the control thread does: turns until nothing is left to read.
    pub(super) fn control(&mut self, now: Duration) {
        while self.runs(now) {
            self.turn(now, false);
            let unread = |(&peer, unread): (&usize, &Unread)| unread.ended && self.control.is_open(peer);
            if !self.unread.iter().any(unread) {
                return;
            }
        }
    }

    /// One turn of the control thread.
    fn turn(&mut self, now: Duration, leaving: bool) {
        let mut inbox = Inbox { reports: std::mem::take(&mut self.orders), leaving, ..Inbox::default() };
        for (&from, unread) in &mut self.unread {
            let arrived = Arrived { from, bytes: std::mem::take(&mut unread.bytes), ended: unread.ended };
            inbox.arrived.push(arrived);
        }
        for effect in self.control.poll(now, inbox) {
            match effect {
                Effect::Send { to, bytes } => self.sealed_messages.push(SealedMessage { to, bytes }),
                Effect::Ended { .. } => {}
                Effect::Distrusted { peer } => self.shut.push(peer),
                Effect::Warn(_) => self.warnings += 1,
                Effect::End(verdict) => {
                    if self.verdict.is_some() {
                        self.complaint = Some("a second verdict".into());
                    }
                    self.status.end(verdict.clone());
                    self.verdict.get_or_insert((now, verdict));
                }
            }
        }
    }

    /// One turn of the thread that calls the group: as far as it gets without waiting.
    pub(super) fn engine(&mut self, now: Duration) {
        while self.runs(now) {
            match std::mem::replace(&mut self.phase, Phase::Left) {
                Phase::Pausing { until } if now < until => return self.phase = Phase::Pausing { until },
                Phase::Pausing { .. } => self.begin(now),
                Phase::Inside(doing) => {
                    if !self.poll(now, doing) {
                        return;
                    }
                }
                Phase::GivenUp { since } if self.verdict.is_none() => {
                    if now >= since + self.settings.timeout * 2 {
                        self.complaint = Some("reported a failure and got no verdict".into());
                    }
                    return self.phase = Phase::GivenUp { since };
                }
                Phase::GivenUp { .. } => self.stop(now),
                Phase::Over { leaves } if now < leaves => return self.phase = Phase::Over { leaves },
                Phase::Over { .. } => return self.leave(now),
                Phase::Left => unreachable!("does not run"),
            }
        }
    }

    fn begin(&mut self, now: Duration) {
        if self.verdict.is_some() {
            return self.stop(now);
        }
        let Some(task) = self.tasks.get(self.done) else {
            return self.phase = Phase::Over { leaves: now + self.pace.linger };
        };
        let (group, number, descriptor) = (self.group, self.done as u64, task.descriptor);
        self.status.enter(Some(CurrentOperation { group, operation: number, descriptor }));
        let mut plan = task.plan(self.rank, self.settings.world, self.settings.frame_bytes);
        plans::plant(self.settings.mutations, &mut plan);
        let memory = task.memory(self.rank, self.settings.world);
        let patience = Patience {
            operation_timeout: self.settings.operation_timeout,
            timeout: self.settings.timeout,
            peers: self.settings.world - 1,
            rounds_per_look: 1,
        };
        let operation = Operation::new(plan, number, descriptor);
        let driver = OperationDriver::new(operation, Arc::clone(&self.members), patience, 0);
        self.phase = Phase::Inside(Box::new(ActiveOperation { driver, memory }));
    }

    /// What the engine does with the driver's answers. Whether there is more to do at once.
    fn poll(&mut self, now: Duration, mut doing: Box<ActiveOperation>) -> bool {
        doing.driver.ran_until(now);
        let next = loop {
            let mut buffers = doing.memory.buffers();
            let (links, transport) = (&mut self.links, &mut self.transport);
            match doing.driver.poll(&|| now, links, transport, &mut buffers, &self.status, &mut self.waited) {
                Next::Again => {}
                next => break next,
            }
        };
        match next {
            Next::Again => unreachable!("polled again"),
            Next::Wait { .. } | Next::AwaitVerdict => {
                self.phase = Phase::Inside(doing);
                return false;
            }
            Next::Done => {
                self.idle();
                self.results.push((self.done, doing.memory));
                self.done += 1;
                let pause = self.tasks.get(self.done).map_or(Duration::ZERO, |task| task.pause);
                self.phase = Phase::Pausing { until: now + pause };
            }
            Next::Failed => self.stop(now),
            Next::GiveUp(cause) => {
                // A closed link explains the least, so frames that have arrived come first.
                let unread = |want: &Want| want.receive && self.transport.has_unread(want.peer, want.link);
                if let Cause::Broken { peer, link, .. } = cause
                    && self.transport.is_closed(peer, link)
                    && doing.driver.wants_now().iter().any(unread)
                {
                    self.complaint = Some("gave up on a closed link with frames unread".into());
                }
                self.give_up(now, cause);
            }
        }
        true
    }

    fn give_up(&mut self, now: Duration, cause: Cause) {
        self.orders.push(cause);
        self.phase = Phase::GivenUp { since: now };
    }

    /// Its caller says that it stops.
    pub(super) fn abort(&mut self) {
        self.orders.push(Cause::Failed { message: "the loss is not finite".into(), code: 4 });
    }

    fn stop(&mut self, now: Duration) {
        self.idle();
        self.phase = Phase::Over { leaves: now + self.pace.last_words };
    }

    /// The group is dropped: an ordinary turn may come before the last one.
    fn leave(&mut self, now: Duration) {
        self.phase = Phase::Over { leaves: now };
        self.control(now);
        self.turn(now, true);
        self.phase = Phase::Left;
    }

    /// The operation has ended, well or not.
    fn idle(&mut self) {
        self.status.leave(self.links.bytes_sent + self.links.bytes_received);
    }

    /// Whether the control thread was woken by the caller's.
    pub(super) fn has_orders(&self) -> bool {
        !self.orders.is_empty()
    }
}
