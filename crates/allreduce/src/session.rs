//! Who is alive and what is to blame: the membership of a group as a pure state machine.
//!
//! [`Session::on`] takes an event and the time and returns what to do. It touches no socket and no
//! clock. `control_driver.rs` calls it, in the control thread and in the simulation.
//!
//! Every rank has a control connection to every other, whatever transport carries the data. In
//! every heartbeat interval it says there where it is. A connection that closes without a farewell
//! is a lost rank at once. A rank that says nothing for the timeout is lost then. A rank that
//! notices a loss broadcasts a [`Record`] of what it sees. All records of a short collecting time
//! go into one [`Verdict`], a pure function of the records: so every survivor names the same
//! culprit.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::mutations::{Bug, Mutations};
use crate::progress::Progress;
use crate::verdict::{Cause, Record, Verdict, judge};

/// How long things may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Timing {
    /// Between two heartbeats of a rank.
    pub(crate) heartbeat: Duration,
    /// Silence after which a warning is given.
    pub(crate) suspect: Duration,
    /// Silence after which a rank is lost.
    pub(crate) silence: Duration,
    /// Between the first record and the verdict, when a rank fell silent.
    pub(crate) collect_silent: Duration,
    /// The same when a connection closed or a rank reported a failure.
    pub(crate) collect: Duration,
    /// A gap between two of our own ticks that means that this process was stopped.
    pub(crate) own_freeze: Duration,
}

impl Timing {
    /// A silent rank is known everywhere within `timeout`: the collecting time is taken off the
    /// silence.
    pub(crate) fn new(timeout: Duration) -> Timing {
        let heartbeat = timeout / 25;
        let collect_silent = heartbeat * 3 / 2;
        Timing {
            heartbeat,
            suspect: timeout * 2 / 5,
            silence: timeout - collect_silent - heartbeat / 2,
            collect_silent,
            collect: (timeout / 50).min(Duration::from_millis(100)),
            own_freeze: timeout / 5,
        }
    }
}

/// How a peer's operation and ours differ, if both have the same number. Frames tell too, if
/// any meet. With some pairs of operations each rank waits for a frame that the other does not
/// send.
fn divergence(mine: &Progress, peer: usize, theirs: &Progress, mutations: Mutations) -> Option<Cause> {
    let (mine, theirs) = (mine.doing?, theirs.doing?);
    let same_place = (mine.group, mine.operation) == (theirs.group, theirs.operation);
    let checked = !mutations.has(Bug::DivergenceNotChecked);
    (same_place && mine.descriptor != theirs.descriptor && checked).then_some(Cause::Diverged {
        peer,
        operation: mine.operation,
        mine: mine.descriptor,
        peer_operation: theirs.operation,
        theirs: theirs.descriptor,
    })
}

/// What ranks say to each other on the control connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Message {
    Heartbeat(Progress),
    /// What a rank sees. Each rank that gets it forwards it once.
    Record(Record),
    /// What happened, as one rank has judged for all. Each rank that gets it forwards it once.
    Verdict(Verdict),
    /// The rank is done and will close its connections.
    Farewell,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Received {
        from: usize,
        message: Message,
    },
    /// A control connection ended.
    Closed {
        from: usize,
    },
    /// This rank itself has something to report.
    Report(Cause),
    /// This rank leaves.
    Leave,
    Tick,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Send {
        to: usize,
        message: Message,
    },
    Warn(Warning),
    /// The group has failed. Only forwarded records follow.
    End(Verdict),
}

/// Something to tell the user that is no failure yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Warning {
    Silent { rank: usize, for_: Duration, progress: Progress },
    Back { rank: usize },
}

#[derive(Clone, Debug)]
struct Peer {
    heard: Duration,
    progress: Progress,
    warned: bool,
    left: bool,
    closed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Running,
    /// Collecting records until then.
    Collecting {
        until: Duration,
    },
    /// Another rank judges for all. If it has not by then, this one does.
    Listening {
        until: Duration,
    },
    Ended(Verdict),
}

/// One rank's view of its group.
pub(crate) struct Session {
    rank: usize,
    timing: Timing,
    peers: BTreeMap<usize, Peer>,
    records: BTreeMap<usize, Record>,
    state: State,
    progress: Progress,
    left: bool,
    last_tick: Duration,
    next_heartbeat: Duration,
    mutations: Mutations,
}

impl Session {
    pub(crate) fn new(rank: usize, world: usize, timing: Timing, now: Duration) -> Session {
        let peer = Peer { heard: now, progress: Progress::default(), warned: false, left: false, closed: false };
        Session {
            rank,
            timing,
            peers: (0..world).filter(|&peer| peer != rank).map(|rank| (rank, peer.clone())).collect(),
            records: BTreeMap::new(),
            state: State::Running,
            progress: Progress::default(),
            left: false,
            last_tick: now,
            next_heartbeat: now,
            mutations: Mutations::default(),
        }
    }

    /// The same with planted bugs.
    #[cfg(test)]
    pub(crate) fn with(self, mutations: Mutations) -> Session {
        Session { mutations, ..self }
    }

    /// Sets where this rank is; heartbeats say it.
    pub(crate) fn set_progress(&mut self, progress: Progress) {
        self.progress = progress;
    }

    /// When this session wants its next tick at the latest.
    pub(crate) fn next_tick(&self) -> Duration {
        match self.state {
            State::Collecting { until } | State::Listening { until } => until.min(self.next_heartbeat),
            _ => self.next_heartbeat,
        }
    }

    pub(crate) fn on(&mut self, now: Duration, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Received { from, message } => self.received(now, from, message, &mut actions),
            Event::Closed { from } => self.closed(now, from, &mut actions),
            Event::Report(cause) => self.report(now, cause, &mut actions),
            Event::Leave => self.leave(&mut actions),
            Event::Tick => self.tick(now, &mut actions),
        }
        actions
    }

    fn received(&mut self, now: Duration, from: usize, message: Message, actions: &mut Vec<Action>) {
        let Some(peer) = self.peers.get_mut(&from) else { return };
        peer.heard = now;
        if std::mem::take(&mut peer.warned) {
            actions.push(Action::Warn(Warning::Back { rank: from }));
        }
        match message {
            Message::Heartbeat(progress) => {
                peer.progress = progress;
                if let Some(cause) = divergence(&self.progress, from, &progress, self.mutations) {
                    self.report(now, cause, actions);
                }
            }
            Message::Farewell => peer.left = true,
            Message::Record(record) => self.on_record(now, record, actions),
            Message::Verdict(_) if self.mutations.has(Bug::JudgedAlone) => {}
            Message::Verdict(verdict) => self.end(verdict, actions),
        }
    }

    /// Takes in a record and tells the others, once.
    fn on_record(&mut self, now: Duration, record: Record, actions: &mut Vec<Action>) {
        let known = self.records.get(&record.from).is_some_and(|known| known.version >= record.version);
        if known || record.from == self.rank || matches!(self.state, State::Ended(_)) {
            return;
        }
        self.broadcast_record(&record, actions);
        let silent = record.cause.is_none() && record.closed.is_empty();
        self.records.insert(record.from, record);
        self.collect_records(now, silent, actions);
    }

    fn broadcast_record(&self, record: &Record, actions: &mut Vec<Action>) {
        self.broadcast(&Message::Record(record.clone()), Some(record.from), actions);
    }

    fn broadcast(&self, message: &Message, but: Option<usize>, actions: &mut Vec<Action>) {
        if self.mutations.has(Bug::AbortNotForwarded) {
            return;
        }
        for (&to, peer) in &self.peers {
            if !peer.closed && Some(to) != but {
                actions.push(Action::Send { to, message: message.clone() });
            }
        }
    }

    fn closed(&mut self, now: Duration, from: usize, actions: &mut Vec<Action>) {
        let Some(peer) = self.peers.get_mut(&from) else { return };
        peer.closed = true;
        // A rank that said farewell, or that gave up and told us why, is not lost.
        if peer.left || self.left || self.records.contains_key(&from) {
            return;
        }
        self.amend_own_record(|record| record.closed.insert(from), actions);
        self.collect_records(now, false, actions);
    }

    fn report(&mut self, now: Duration, cause: Cause, actions: &mut Vec<Action>) {
        // The data link to a rank that said farewell has not broken: the rank has left.
        let cause = match cause {
            Cause::Broken { peer, .. } if self.peers.get(&peer).is_some_and(|peer| peer.left) => Cause::Left { peer },
            cause => cause,
        };
        self.amend_own_record(
            |record| {
                let first = record.cause.is_none();
                if first {
                    record.cause = Some(cause);
                }
                first
            },
            actions,
        );
        self.collect_records(now, false, actions);
    }

    /// Changes our own record and tells the others if it did change.
    fn amend_own_record(&mut self, change: impl FnOnce(&mut Record) -> bool, actions: &mut Vec<Action>) {
        if matches!(self.state, State::Ended(_)) {
            return;
        }
        let mut record = self.records.get(&self.rank).cloned().unwrap_or_else(|| Record::new(self.rank));
        if !change(&mut record) {
            return;
        }
        record.version += 1;
        record.progress = self.progress;
        record.last_seen = record
            .silent
            .iter()
            .chain(&record.closed)
            .filter_map(|rank| self.peers.get(rank).map(|peer| (*rank, peer.progress)))
            .collect();
        self.broadcast_record(&record, actions);
        self.records.insert(self.rank, record);
    }

    /// Begins to collect records. A rank that learns of a failure adds what it sees itself: the
    /// verdict can then tell a lost rank from a broken connection.
    fn collect_records(&mut self, now: Duration, silent: bool, actions: &mut Vec<Action>) {
        if self.state != State::Running {
            return;
        }
        self.state =
            State::Collecting { until: now + if silent { self.timing.collect_silent } else { self.timing.collect } };
        if !self.records.contains_key(&self.rank) {
            self.amend_own_record(|_| true, actions);
        }
    }

    fn leave(&mut self, actions: &mut Vec<Action>) {
        self.left = true;
        for (&to, peer) in &self.peers {
            if !peer.closed {
                actions.push(Action::Send { to, message: Message::Farewell });
            }
        }
    }

    fn tick(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let gap = now.saturating_sub(self.last_tick);
        self.last_tick = now;
        if gap > self.timing.own_freeze && !self.mutations.has(Bug::OwnFreezeNotNoticed) {
            // This process was stopped or starved, so the silence was its own. What the peers said
            // meanwhile has been read by now.
            for peer in self.peers.values_mut() {
                peer.heard = now;
            }
        }
        if now >= self.next_heartbeat {
            self.next_heartbeat = now + self.timing.heartbeat;
            let mute = self.mutations.has(Bug::HeartbeatFromBlockedThread) && self.progress.inside;
            for (&to, peer) in self.peers.iter().filter(|_| !mute) {
                if !peer.closed && !self.left {
                    actions.push(Action::Send { to, message: Message::Heartbeat(self.progress) });
                }
            }
        }
        if !matches!(self.state, State::Ended(_)) && !self.left {
            self.judge_silence(now, actions);
        }
        match self.state {
            State::Collecting { until } if now >= until && self.speaker() != self.rank => {
                self.state = State::Listening { until: now + self.timing.collect };
            }
            State::Collecting { until } | State::Listening { until } if now >= until => {
                self.end(judge(self.rank, self.peers.len() + 1, &self.records_and_farewells()), actions);
            }
            _ => {}
        }
    }

    /// The rank that judges for all. Of the ranks that wrote a record and are heard, it is the one
    /// with the least part in any accusation, then the lowest. Records that arrive late can make
    /// two ranks judge differently, so one judges and the others repeat it.
    fn speaker(&self) -> usize {
        let records = &self.records;
        let accuses = |record: &Record, rank: usize| record.silent.contains(&rank) || record.closed.contains(&rank);
        let part = |rank: usize| {
            let others = records.values().filter(|record| accuses(record, rank)).count();
            others + records.get(&rank).map_or(0, |own| own.silent.len() + own.closed.len())
        };
        let heard = |rank: &usize| self.peers.get(rank).is_none_or(|peer| !peer.closed && !peer.left);
        records.keys().copied().filter(heard).min_by_key(|&rank| (part(rank), rank)).unwrap_or(self.rank)
    }

    /// All records, and an empty one of each rank that left in good order: a rank that accuses it
    /// has not heard its farewell.
    fn records_and_farewells(&self) -> BTreeMap<usize, Record> {
        let mut records = self.records.clone();
        for (&rank, _) in self.peers.iter().filter(|(_, peer)| peer.left) {
            records.entry(rank).or_insert_with(|| Record::new(rank));
        }
        records
    }

    /// The group has failed. All ranks repeat the verdict, unless it is that this rank is cut off.
    fn end(&mut self, verdict: Verdict, actions: &mut Vec<Action>) {
        if matches!(self.state, State::Ended(_)) {
            return;
        }
        if verdict != Verdict::CutOff {
            self.broadcast(&Message::Verdict(verdict.clone()), None, actions);
        }
        self.state = State::Ended(verdict.clone());
        actions.push(Action::End(verdict));
    }

    fn judge_silence(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.mutations.has(Bug::SilenceIgnored) {
            return;
        }
        let mut silent = BTreeSet::new();
        for (&rank, peer) in &mut self.peers {
            if peer.left || peer.closed || self.records.contains_key(&rank) {
                continue;
            }
            let silence = now.saturating_sub(peer.heard);
            if silence >= self.timing.silence {
                silent.insert(rank);
            } else if silence >= self.timing.suspect && !peer.warned {
                peer.warned = true;
                actions.push(Action::Warn(Warning::Silent { rank, for_: silence, progress: peer.progress }));
            }
        }
        if self.state != State::Running {
            // Ranks that are nearly due count with the first one: they fell silent together.
            let nearly = self.timing.silence - self.timing.heartbeat * 2;
            silent.extend(self.peers.iter().filter_map(|(&rank, peer)| {
                let silence = now.saturating_sub(peer.heard);
                let judged = peer.left || peer.closed || self.records.contains_key(&rank);
                (!judged && silence >= nearly).then_some(rank)
            }));
        }
        if !silent.is_empty() {
            let add = |record: &mut Record| {
                let before = record.silent.len();
                record.silent.extend(silent.iter().copied());
                record.silent.len() > before
            };
            self.amend_own_record(add, actions);
            self.collect_records(now, true, actions);
        }
    }
}
