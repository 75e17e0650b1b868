//! Groups of real processes on this machine: right results, losses noticed in time, strangers kept
//! out.
//!
//! The ranks are this very test binary, started again with `rank_process` as its only test and told
//! by a variable what to do (`rank.rs`). They print what happens to them as lines of JSON; the
//! parent (`children.rs`) waits for those lines, always with a deadline, and ends its children
//! whatever happens. Times are taken from the system's monotonic clock, which all processes share.
//!
//! Tests about time need the machine for themselves: each takes [`alone`] first.

mod attacks;
mod children;
mod endings;
mod flood;
mod holders;
mod join;
#[path = "../lines/mod.rs"]
mod lines;
mod loss;
mod partition;
mod rank;
mod results;
mod script;
mod system;
mod timing;
mod wire;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Not a test of its own: what a rank does. Returns at once if no test asked for one.
#[test]
fn rank_process() {
    if let Ok(spec) = std::env::var(rank::VARIABLE) {
        rank::run(&spec);
    }
}

/// One test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}
