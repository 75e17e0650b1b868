//! The last operations of a rank, for a look at them after a failure.

use std::collections::VecDeque;
use std::time::Instant;

use serde::Serialize;

use crate::frame::Descriptor;

/// Operations that are remembered.
pub(crate) const REMEMBERED: usize = 4096;

/// One operation of one rank.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FlightEntry {
    /// The caller's step.
    pub step: u64,
    /// The number of the operation in its group.
    pub operation: u64,
    /// The group.
    pub session: String,
    /// What it was.
    pub descriptor: Descriptor,
    /// Seconds from the group's beginning to the operation's.
    pub began: f64,
    /// Seconds it took; none if it never ended.
    pub took: Option<f64>,
    /// Payload bytes of it that this rank sent.
    pub sent: u64,
    /// Payload bytes of it that this rank received.
    pub received: u64,
}

/// A ring of the last operations.
pub(crate) struct Flight {
    session: u64,
    start: Instant,
    entries: VecDeque<(Entry, Instant)>,
}

struct Entry {
    step: u64,
    operation: u64,
    descriptor: Descriptor,
    took: Option<f64>,
    sent: u64,
    received: u64,
}

impl Flight {
    pub(crate) fn new(session: u64) -> Flight {
        Flight { session, start: Instant::now(), entries: VecDeque::with_capacity(64) }
    }

    /// The group.
    pub(crate) fn session(&self) -> u64 {
        self.session
    }

    /// An operation begins; `moved` are the bytes sent and received before it.
    pub(crate) fn begin(&mut self, step: u64, operation: u64, descriptor: Descriptor, moved: (u64, u64)) {
        if self.entries.len() == REMEMBERED {
            self.entries.pop_front();
        }
        let entry = Entry { step, operation, descriptor, took: None, sent: moved.0, received: moved.1 };
        self.entries.push_back((entry, Instant::now()));
    }

    /// The last operation has ended, well or not; `moved` are the bytes sent and received by now.
    pub(crate) fn end(&mut self, well: bool, moved: (u64, u64)) {
        if let Some((entry, began)) = self.entries.back_mut() {
            entry.took = well.then(|| began.elapsed().as_secs_f64());
            entry.sent = moved.0 - entry.sent;
            entry.received = moved.1 - entry.received;
        }
    }

    /// All that is remembered, oldest first.
    pub(crate) fn record(&self) -> Vec<FlightEntry> {
        let entry = |(entry, began): &(Entry, Instant)| FlightEntry {
            step: entry.step,
            operation: entry.operation,
            session: format!("{:016x}", self.session),
            descriptor: entry.descriptor,
            began: (*began - self.start).as_secs_f64(),
            took: entry.took,
            sent: entry.sent,
            received: entry.received,
        };
        self.entries.iter().map(entry).collect()
    }
}
