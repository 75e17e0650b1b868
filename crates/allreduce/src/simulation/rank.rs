//! One simulated rank: the real session, links and operations, driven as `control.rs` and `engine.rs` drive them.
//!
//! Those two are threads that wait; this is the same two loops turned inside out, so that a virtual clock can run them.

use std::collections::BTreeMap;
use std::time::Duration;

use super::wires::SimTransport;
use super::work::{Memory, Task};
use crate::frame::FrameError;
use crate::operation::{Fault, Links, Operation, Standing};
use crate::sealed::{Opener, seal};
use crate::secret::Seal;
use crate::session::{self, Action, Event, Message, Progress, Session, Timing};
use crate::transport::{LONGEST_SLEEP, Want};
use crate::verdict::{Cause, Verdict};

/// As in `engine.rs`.
const EXPLANATION: Duration = Duration::from_millis(500);

/// As in `engine.rs`.
const OWN_STOP: Duration = Duration::from_secs(2);

/// How often a rank that waits looks whether all stand still.
const LOOK: Duration = Duration::from_millis(200);

/// A rank's end of one control connection.
pub(super) struct Line {
    seal: Seal,
    opener: Opener,
    arrived: Vec<u8>,
    ended: bool,
    open: bool,
}

impl Line {
    pub(super) fn new(seal: Seal, opener: Opener) -> Line {
        Line { seal, opener, arrived: Vec::new(), ended: false, open: true }
    }
}

/// What a peer last said, as `control.rs` keeps it.
struct Heard {
    progress: Progress,
    since: Duration,
    last: Duration,
    left: bool,
}

/// A sealed message that leaves.
pub(super) struct Letter {
    pub(super) to: usize,
    pub(super) bytes: Vec<u8>,
    pub(super) message: Message,
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
    Inside(Box<Doing>),
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
struct Doing {
    operation: Operation,
    memory: Memory,
    idle_since: Option<Duration>,
    /// A link closed: its rank's death, or what it sent on another link, may explain it.
    closed_since: Option<Duration>,
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
}

pub(super) struct Rank {
    pub(super) rank: usize,
    settings: Settings,
    group: u64,
    pace: Pace,
    pub(super) process: Process,
    // What the control thread has.
    session: Session,
    lines: BTreeMap<usize, Line>,
    orders: Vec<Cause>,
    heard: BTreeMap<usize, Heard>,
    pub(super) letters: Vec<Letter>,
    /// Connections that this rank has shut because a message on them did not open.
    pub(super) shut: Vec<usize>,
    pub(super) verdict: Option<(Duration, Verdict)>,
    pub(super) warnings: usize,
    // What the caller's thread has.
    pub(super) transport: SimTransport,
    links: Links,
    tasks: Vec<Task>,
    /// Operations done.
    pub(super) done: usize,
    phase: Phase,
    progress: Progress,
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
        lines: BTreeMap<usize, Line>,
        transport: SimTransport,
        tasks: Vec<Task>,
    ) -> Rank {
        let until = pace.begin + tasks.first().map_or(Duration::ZERO, |task| task.pause);
        Rank {
            rank,
            settings,
            group,
            pace,
            process: Process::Running,
            session: Session::new(rank, settings.world, settings.timing, pace.start),
            lines,
            orders: Vec::new(),
            heard: BTreeMap::new(),
            letters: Vec::new(),
            shut: Vec::new(),
            verdict: None,
            warnings: 0,
            transport,
            links: Links::new(rank, settings.world, group),
            tasks,
            done: 0,
            phase: Phase::Pausing { until },
            progress: Progress::default(),
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
        self.lines.get_mut(&from).expect("a line per peer").arrived.extend_from_slice(bytes);
    }

    pub(super) fn end(&mut self, from: usize) {
        self.lines.get_mut(&from).expect("a line per peer").ended = true;
    }

    /// When something happens without anything arriving.
    pub(super) fn next_control(&self) -> Duration {
        self.session.next_tick().max(self.pace.start)
    }

    pub(super) fn next_engine(&self, now: Duration) -> Option<Duration> {
        match &self.phase {
            Phase::Pausing { until } => Some(*until),
            Phase::Over { leaves } => Some(*leaves),
            Phase::GivenUp { since } => Some(*since + self.settings.timeout * 2),
            Phase::Inside(doing) => match (doing.closed_since, doing.idle_since) {
                (Some(_), _) => Some(now + LONGEST_SLEEP),
                (None, Some(since)) => Some((since + self.settings.timeout).max(now + LOOK)),
                (None, None) => None,
            },
            Phase::Left => None,
        }
    }

    /// The process goes on after it was stopped for so long.
    pub(super) fn thaw(&mut self, now: Duration, stopped: Duration) {
        self.process = Process::Running;
        if let Phase::Inside(doing) = &mut self.phase
            && stopped > OWN_STOP
        {
            doing.idle_since = doing.idle_since.map(|_| now);
        }
    }

    /// One turn of the control thread.
    pub(super) fn control(&mut self, now: Duration) {
        while self.runs(now) {
            self.session.set_progress(self.progress);
            let read_more = self.read(now);
            for cause in std::mem::take(&mut self.orders) {
                self.feed(now, Event::Report(cause));
            }
            self.feed(now, Event::Tick);
            if !read_more {
                return;
            }
        }
    }

    /// As `Thread::read` and `Trusted::read_available`. Whether an end of a connection is still to be read.
    fn read(&mut self, now: Duration) -> bool {
        let mut read_more = false;
        for peer in 0..self.settings.world {
            let Some(line) = self.lines.get_mut(&peer).filter(|line| line.open) else { continue };
            line.opener.push(&std::mem::take(&mut line.arrived));
            let mut messages = Vec::new();
            let intact = loop {
                match line.opener.next::<Message>() {
                    Ok(Some(message)) => messages.push(message),
                    Ok(None) => break true,
                    Err(_) => break false,
                }
            };
            if !intact || (line.ended && messages.is_empty()) {
                line.open = false;
                if !intact {
                    self.shut.push(peer);
                }
                self.feed(now, Event::Closed { from: peer });
                continue;
            }
            read_more |= line.ended;
            for message in messages {
                self.hear(now, peer, &message);
                self.feed(now, Event::Received { from: peer, message });
            }
        }
        read_more
    }

    /// As `Board::hear`.
    fn hear(&mut self, now: Duration, peer: usize, message: &Message) {
        match (message, self.heard.get_mut(&peer)) {
            (Message::Heartbeat(progress), Some(heard)) if heard.progress == *progress => heard.last = now,
            (Message::Heartbeat(progress), _) => {
                self.heard.insert(peer, Heard { progress: *progress, since: now, last: now, left: false });
            }
            (Message::Farewell, Some(heard)) => (heard.left, heard.since) = (true, now),
            _ => {}
        }
    }

    fn feed(&mut self, now: Duration, event: Event) {
        for action in self.session.on(now, event) {
            match action {
                Action::Send { to, message } => {
                    let line = self.lines.get_mut(&to).expect("a line per peer");
                    if line.open {
                        let bytes = seal(&message, &mut line.seal);
                        self.letters.push(Letter { to, bytes, message });
                    }
                }
                Action::Warn(_) => self.warnings += 1,
                Action::End(verdict) => {
                    if self.verdict.is_some() {
                        self.complaint = Some("a second verdict".into());
                    }
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
        self.progress.operation += 1;
        self.progress.inside = true;
        let (group, operation) = (self.group, self.done as u64);
        self.progress.doing = Some(session::Doing { group, operation, descriptor: task.descriptor });
        let plan = task.plan(self.rank, self.settings.world, self.settings.frame_bytes);
        let operation = Operation::new(plan, self.done as u64, task.descriptor);
        let memory = task.memory(self.rank, self.settings.world);
        self.phase = Phase::Inside(Box::new(Doing { operation, memory, idle_since: None, closed_since: None }));
    }

    /// As `Engine::drive`. Whether there is more to do at once.
    fn poll(&mut self, now: Duration, mut doing: Box<Doing>) -> bool {
        let standing = loop {
            match doing.operation.poll(&mut self.links, &mut self.transport, &mut doing.memory.buffers()) {
                Ok(Standing::Moved) => (doing.idle_since, doing.closed_since) = (None, None),
                other => break other,
            }
        };
        self.progress.moved = self.links.bytes_sent + self.links.bytes_received;
        match standing {
            Ok(Standing::Done) => {
                self.idle();
                self.results.push((self.done, doing.memory));
                self.done += 1;
                let pause = self.tasks.get(self.done).map_or(Duration::ZERO, |task| task.pause);
                self.phase = Phase::Pausing { until: now + pause };
            }
            Ok(_) if self.verdict.is_some() => self.stop(now),
            Ok(_) => {
                let since = *doing.idle_since.get_or_insert(now);
                if !self.is_stuck(now, now - since) {
                    self.phase = Phase::Inside(doing);
                    return false;
                }
                let cause = Cause::Stalled {
                    waiting_for: wants(&doing).iter().map(|want| want.peer).collect(),
                    seconds: (now - since).as_secs(),
                    operation: self.done as u64,
                    mine: self.tasks[self.done].descriptor,
                };
                self.give_up(now, cause);
            }
            Err(fault) => {
                let closed = matches!(&fault, Fault::Broken(broken) if broken.closed);
                let since = *doing.closed_since.get_or_insert(now);
                if !closed || now - since > EXPLANATION {
                    // A closed link is the poorest explanation: whatever has arrived comes first.
                    let unread = |want: &Want| want.receive && self.transport.has_unread(want.peer, want.link);
                    if closed && wants(&doing).iter().any(unread) {
                        self.complaint = Some("gave up on a closed link with frames unread".into());
                    }
                    self.give_up(now, cause(fault));
                } else if self.verdict.is_some() {
                    self.stop(now);
                } else {
                    self.phase = Phase::Inside(doing);
                    return false;
                }
            }
        }
        true
    }

    /// As `Engine::is_stuck`.
    fn is_stuck(&self, now: Duration, idle: Duration) -> bool {
        let Settings { world, timeout, operation_timeout, .. } = self.settings;
        let stands = |heard: &Heard| {
            let says_so = heard.progress.inside && now - heard.last < timeout / 5;
            (heard.left || says_so) && now - heard.since >= timeout
        };
        let standstill = || self.heard.len() == world - 1 && self.heard.values().all(stands);
        idle > operation_timeout || (idle > timeout && standstill())
    }

    fn give_up(&mut self, now: Duration, cause: Cause) {
        self.orders.push(cause);
        self.phase = Phase::GivenUp { since: now };
    }

    /// As `Group::abort`.
    pub(super) fn abort(&mut self) {
        self.orders.push(Cause::Failed { message: "the loss is not finite".into(), code: 4 });
    }

    fn stop(&mut self, now: Duration) {
        self.idle();
        self.phase = Phase::Over { leaves: now + self.pace.last_words };
    }

    /// As `Control::drop`.
    fn leave(&mut self, now: Duration) {
        self.phase = Phase::Over { leaves: now };
        self.control(now);
        self.feed(now, Event::Leave);
        self.feed(now, Event::Tick);
        self.phase = Phase::Left;
    }

    /// As `Board::leave`.
    fn idle(&mut self) {
        (self.progress.inside, self.progress.doing) = (false, None);
    }

    /// Whether the control thread was woken by the caller's.
    pub(super) fn has_orders(&self) -> bool {
        !self.orders.is_empty()
    }
}

fn wants(doing: &Doing) -> Vec<Want> {
    let mut wants = Vec::new();
    doing.operation.wants(&mut wants);
    wants
}

/// As `Engine::cause`.
fn cause(fault: Fault) -> Cause {
    match fault {
        Fault::Broken(broken) => Cause::Broken { peer: broken.peer, link: broken.link, what: broken.what },
        Fault::Frame { peer, error, .. } if matches!(error, FrameError::Diverged { .. }) => match error {
            FrameError::Diverged { mine_operation, mine, theirs_operation, theirs } => {
                Cause::Diverged { peer, operation: mine_operation, mine, peer_operation: theirs_operation, theirs }
            }
            _ => unreachable!(),
        },
        Fault::Frame { peer, link, error } => Cause::Damaged { peer, link, what: error.to_string() },
    }
}
