//! What the operations and the control connections of one rank tell each other: its progress, its
//! peers' and the verdict.
//!
//! Every rule takes the time as an argument, so the simulation uses this very type with its own
//! clock. Only [`GroupStatus::now`] and [`GroupStatus::wait_for_verdict`], which the simulation
//! never calls, look at a real one.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::progress::{CurrentOperation, Progress};
use crate::session::Message;
use crate::verdict::Verdict;

/// The state that the threads of one rank share.
pub(crate) struct GroupStatus {
    start: Instant,
    pub(crate) step: AtomicU64,
    operation: AtomicU64,
    inside: AtomicBool,
    moved: AtomicU64,
    /// Frames that lines have moved beside the operations.
    moved_beside: AtomicU64,
    doing: Mutex<Option<CurrentOperation>>,
    /// Set together with `verdict`; cheap to look at.
    failed: AtomicBool,
    verdict: Mutex<Option<Verdict>>,
    /// Whoever uses the group knows that it has failed.
    is_told: AtomicBool,
    ended: Condvar,
    peers: Mutex<BTreeMap<usize, PeerProgress>>,
}

/// What a peer last said. Times count from the start of the status.
struct PeerProgress {
    progress: Progress,
    /// Since when it says so, or since when it has left.
    since: Duration,
    /// When it last spoke.
    last: Duration,
    left: bool,
}

impl GroupStatus {
    pub(crate) fn new() -> GroupStatus {
        GroupStatus {
            start: Instant::now(),
            step: AtomicU64::new(0),
            operation: AtomicU64::new(0),
            inside: AtomicBool::new(false),
            moved: AtomicU64::new(0),
            moved_beside: AtomicU64::new(0),
            doing: Mutex::new(None),
            failed: AtomicBool::new(false),
            verdict: Mutex::new(None),
            is_told: AtomicBool::new(false),
            ended: Condvar::new(),
            peers: Mutex::new(BTreeMap::new()),
        }
    }

    /// The clock that all threads of a rank share.
    pub(crate) fn now(&self) -> Duration {
        self.start.elapsed()
    }

    pub(crate) fn progress(&self) -> Progress {
        Progress {
            step: self.step.load(Ordering::Relaxed),
            operation: self.operation.load(Ordering::Relaxed),
            inside: self.inside.load(Ordering::Relaxed),
            moved: self.moved.load(Ordering::Relaxed).wrapping_add(self.moved_beside.load(Ordering::Relaxed)),
            doing: *self.doing.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// An operation begins. `doing`: what it is, if all ranks of its group take part.
    pub(crate) fn enter(&self, doing: Option<CurrentOperation>) {
        self.operation.fetch_add(1, Ordering::Relaxed);
        self.inside.store(true, Ordering::Relaxed);
        *self.doing.lock().unwrap_or_else(PoisonError::into_inner) = doing;
    }

    /// The operation has ended. `moved` counts the bytes moved so far by all operations.
    pub(crate) fn leave(&self, moved: u64) {
        self.stop_waiting();
        self.set_moved(moved);
    }

    /// What began with [`GroupStatus::enter`] has ended, and has moved nothing itself.
    pub(crate) fn stop_waiting(&self) {
        self.inside.store(false, Ordering::Relaxed);
        *self.doing.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// `moved` counts the bytes moved so far by all operations.
    pub(crate) fn set_moved(&self, moved: u64) {
        self.moved.store(moved, Ordering::Relaxed);
    }

    /// A line has moved a frame, or a part of one.
    pub(crate) fn add_moved_beside(&self) {
        self.moved_beside.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes in what a peer says of itself.
    pub(crate) fn on_message(&self, now: Duration, peer: usize, message: &Message) {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        match (message, peers.get_mut(&peer)) {
            (Message::Heartbeat(progress), Some(known)) if known.progress == *progress => known.last = now,
            (Message::Heartbeat(progress), _) => {
                peers.insert(peer, PeerProgress { progress: *progress, since: now, last: now, left: false });
            }
            (Message::Farewell, Some(known)) => (known.left, known.since) = (true, now),
            _ => {}
        }
    }

    /// Whether each of `peers` other ranks has left, or stayed inside an operation without moving a
    /// byte, for `for_`. A rank inside an operation must still say so: a silent one may be frozen.
    pub(crate) fn is_standstill(&self, now: Duration, peers: usize, for_: Duration) -> bool {
        let known = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let stands = |peer: &PeerProgress| {
            let says_so = peer.progress.inside && now.saturating_sub(peer.last) < for_ / 5;
            (peer.left || says_so) && now.saturating_sub(peer.since) >= for_
        };
        known.len() == peers && known.values().all(stands)
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Whoever uses the group learns that it has failed.
    pub(crate) fn tell(&self) {
        self.is_told.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_told(&self) -> bool {
        self.is_told.load(Ordering::Relaxed)
    }

    pub(crate) fn verdict(&self) -> Option<Verdict> {
        self.verdict.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The group has failed. The first verdict stays.
    pub(crate) fn end(&self, verdict: Verdict) {
        let mut ours = self.verdict.lock().unwrap_or_else(PoisonError::into_inner);
        ours.get_or_insert(verdict);
        self.failed.store(true, Ordering::Release);
        self.ended.notify_all();
    }

    /// Waits at most `longest` for a verdict that is on its way.
    pub(crate) fn wait_for_verdict(&self, longest: Duration) -> Option<Verdict> {
        let verdict = self.verdict.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.ended.wait_timeout_while(verdict, longest, |verdict| verdict.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.clone()
    }
}
