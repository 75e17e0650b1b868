//! What a test lets go wrong.

use std::time::Duration;

use super::Seen;

/// What happens to an answer.
#[derive(Clone, Debug)]
pub enum What {
    /// Another status, with these headers and this message.
    Status(u16, Vec<(&'static str, String)>, &'static str),
    /// The connection is cut after so many bytes of the body.
    Cut(usize),
    /// Nothing more comes after so many bytes of the body.
    Stall(usize, Duration),
    /// Pauses of this length between pieces of so many bytes.
    Slow(usize, Duration),
    /// The range is passed over: the whole body comes, with status 200.
    NoRange,
    /// One byte of the body is another one.
    Corrupt,
    /// The body is longer by these bytes than it should be.
    Longer(usize),
}

/// A fault, and which requests it hits.
#[derive(Clone, Debug)]
pub struct Fault {
    /// The method.
    pub method: &'static str,
    /// A part of the target.
    pub on: String,
    /// Requests of this kind that pass before.
    pub after: usize,
    /// Requests that are hit.
    pub times: usize,
    pub what: What,
}

impl Fault {
    /// Hits every GET of a target with this text.
    pub fn get(on: &str, what: What) -> Fault {
        Fault { method: "GET", on: on.to_owned(), after: 0, times: usize::MAX, what }
    }

    /// Hits every request with this method.
    pub fn with(method: &'static str, on: &str, what: What) -> Fault {
        Fault { method, ..Fault::get(on, what) }
    }

    /// Hits so many requests only.
    pub fn times(mut self, times: usize) -> Fault {
        self.times = times;
        self
    }

    /// Lets so many requests pass before.
    pub fn after(mut self, after: usize) -> Fault {
        self.after = after;
        self
    }
}

/// The fault of a request, if there is one.
pub(super) fn take(faults: &mut [Fault], seen: &Seen) -> Option<What> {
    let hits = |fault: &&mut Fault| fault.method == seen.method && seen.target.contains(&fault.on) && fault.times > 0;
    for fault in faults.iter_mut().filter_map(|fault| Some(fault).filter(hits)) {
        if fault.after > 0 {
            fault.after -= 1;
            continue;
        }
        fault.times -= 1;
        return Some(fault.what.clone());
    }
    None
}
