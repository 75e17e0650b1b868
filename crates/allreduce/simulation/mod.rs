//! The whole group in one thread: the shipped session, verdict, seals, frames, plans, operations
//! and drivers, between simulated links and with a virtual clock. Everything that can go wrong is
//! drawn from a seed.
//!
//! - `world.rs`: the clock and the queue; `network.rs`: what is between the ranks; `faults.rs`:
//!   what goes wrong there.
//! - `rank.rs`: one rank, with the shipped drivers of control connections and operations;
//!   `wires.rs`: its data links, like TCP or like RDMA.
//! - `work.rs`: what the ranks compute, and what has to come out; `plans.rs`: plans with planted
//!   bugs.
//! - `scenario.rs`: what goes wrong in a run, and what the ranks must say of it; `checks.rs`:
//!   whether they did.
//!
//! Each run has one kind of trouble, so the right verdict is known. One run in a few has several at
//! once. Then only the promises remain that always hold: no wrong result, no hang, and one verdict
//! among the untouched ranks.
//!
//! ```text
//! # that many seeds
//! FINETUNE_SIM_SEEDS=1000000 cargo test --release -p finetune-allreduce simulation
//! # one, and what happens in it
//! FINETUNE_SIM_SEED=9 cargo test --release -p finetune-allreduce simulation -- --nocapture
//! # the same with a planted bug
//! FINETUNE_SIM_SEED=9 FINETUNE_SIM_BUG=JudgedAlone cargo test …
//! ```

mod checks;
mod faults;
mod network;
mod plans;
mod random;
mod rank;
mod scenario;
mod wires;
mod work;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::mutations::{Bug, Mutations};
use world::World;

/// Seeds of the ordinary test run.
const SEEDS: u64 = 20_000;

/// Failures after which a run of many seeds stops.
const ENOUGH: usize = 10;

/// Runs one seed and counts its events. The error says which promise was broken, and in which
/// scenario.
fn simulate(seed: u64, bug: Option<Bug>, traced: bool) -> Result<u64, String> {
    let run = || {
        let mut world = World::new(seed, Mutations::with(bug), traced);
        let outcome = world.run().and_then(|()| checks::check(&world));
        outcome.map(|()| world.events).map_err(|why| format!("seed={seed}: {why}\n    in {}", world.scenario))
    };
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err(format!("seed={seed}: panicked")))
}

fn variable<T>(name: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
    let text = std::env::var(name).ok()?;
    Some(parse(&text).unwrap_or_else(|| panic!("{name} cannot be {text:?}")))
}

#[test]
fn no_seed_breaks_a_promise() {
    let number = |text: &str| text.parse().ok();
    if let Some(seed) = variable("FINETUNE_SIM_SEED", number) {
        let bug = variable("FINETUNE_SIM_BUG", |name| BUGS.into_iter().find(|bug| format!("{bug:?}") == name));
        simulate(seed, bug, true).unwrap_or_else(|why| panic!("{why}"));
        return;
    }
    let seeds = variable("FINETUNE_SIM_SEEDS", number).unwrap_or(SEEDS);
    let began = Instant::now();
    let (next, events, failures) = (AtomicU64::new(0), AtomicU64::new(0), Mutex::new(Vec::new()));
    let run_some = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds || failures.lock().expect("nobody panics").len() >= ENOUGH {
                return;
            }
            match simulate(seed, None, false) {
                Ok(count) => drop(events.fetch_add(count, Ordering::Relaxed)),
                Err(why) => failures.lock().expect("nobody panics").push(why),
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(run_some);
        }
    });
    let failures = failures.into_inner().expect("nobody panics");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    println!("{seeds} seeds, {} events, {:.1} s", events.into_inner(), began.elapsed().as_secs_f64());
}

#[test]
fn a_seed_is_always_the_same_run() {
    for seed in 0..100 {
        assert_eq!(simulate(seed, None, false), simulate(seed, None, false), "seed {seed}");
    }
}

const BUGS: [Bug; 14] = [
    Bug::ChecksumNotChecked,
    Bug::SequenceNotChecked,
    Bug::StaleSessionAccepted,
    Bug::DivergenceNotChecked,
    Bug::ArrivalOrderSum,
    Bug::ChunkOffByOne,
    Bug::SentBeforeReduced,
    Bug::AbortNotForwarded,
    Bug::HeartbeatFromBlockedThread,
    Bug::SilenceIgnored,
    Bug::SealNotChecked,
    Bug::OwnFreezeNotNoticed,
    Bug::SealCountKept,
    Bug::JudgedAlone,
];

/// The test of this test: a simulator that does not find these finds nothing.
#[test]
fn every_planted_bug_is_caught() {
    const WITHIN: u64 = 2000;
    for bug in BUGS {
        let found = (0..WITHIN).find_map(|seed| Some((seed, simulate(seed, Some(bug), false).err()?)));
        let (seed, why) = found.unwrap_or_else(|| panic!("{bug:?} is not caught within {WITHIN} seeds"));
        println!("{bug:?} is caught after {} seeds: {}", seed + 1, why.lines().next().unwrap_or_default());
        assert_eq!(simulate(seed, None, false).err(), None, "without {bug:?}");
    }
}

/// Seeds that once found something, and what. A change of what is drawn from a seed makes them
/// other runs.
const FOUND: [(u64, &str); 13] = [
    (9, "a rank that slept through its own loss blamed the others' connections"),
    (19, "a link that was closed for sending hid the frames that had arrived on it"),
    (37, "a group that was stopped as a whole called it a standstill when it went on"),
    (26328, "a rank's farewell overtook its last frames and made a standstill of them"),
    (36556, "a rank that had left well was called lost by one that had not heard its farewell"),
    (59611, "ranks that waited for each other blamed one another"),
    (66969, "one end of a connection closed it for a message that did not open, and the other waited on"),
    (137711, "a partition was called a standstill"),
    (167464, "two ranks reported one divergence, and not all heard both before they judged"),
    (169860, "a rank that was still stopped was counted as standing still"),
    (191439, "a frozen rank was called a standstill"),
    (241462, "a rank closed its connections while the others judged it"),
    (328240, "a rank woke up while the others judged it"),
];

#[test]
fn what_was_found_stays_fixed() {
    for (seed, what) in FOUND {
        simulate(seed, None, false).unwrap_or_else(|why| panic!("{what}: {why}"));
    }
}
