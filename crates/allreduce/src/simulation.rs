//! The whole group in one thread: real sessions, verdicts, seals, frames, plans and operations between simulated wires, by a
//! virtual clock, with everything that can go wrong drawn from a seed.
//!
//! - `world.rs`: the clock, the queue and the network.
//! - `rank.rs`: one rank, driven as `control.rs` and `engine.rs` drive it.
//! - `wires.rs`: its data links, like TCP or like RDMA.
//! - `work.rs`: what the ranks compute and what has to come out.
//! - `scenario.rs`: what goes wrong, and what the ranks must say of it.
//! - `checks.rs`: what must be true in the end.
//!
//! `FINETUNE_SIM_SEEDS=1000000 cargo test --release -p finetune-allreduce simulation` runs that many seeds;
//! `FINETUNE_SIM_SEED=n … -- --nocapture` runs one and tells what happens in it.

mod checks;
mod random;
mod rank;
mod scenario;
mod wires;
mod work;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use crate::planted::{Bug, with_planted};
use world::World;

/// Seeds of the ordinary test run.
const SEEDS: u64 = 20_000;

/// Runs one seed. The error says what was broken, and in which scenario.
fn simulate(seed: u64, traced: bool) -> Result<u64, String> {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(seed, traced);
        let outcome = world.run().and_then(|()| checks::check(&world));
        outcome.map(|()| world.events).map_err(|why| format!("seed={seed}: {why}\n    in {}", world.scenario))
    }));
    outcome.unwrap_or_else(|_| Err(format!("seed={seed}: panicked")))
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable} is not a number")))
}

#[test]
fn no_seed_breaks_a_promise() {
    if let Some(seed) = number("FINETUNE_SIM_SEED") {
        with_planted(
            std::env::var("FINETUNE_SIM_BUG")
                .ok()
                .map(|name| BUGS.into_iter().find(|bug| format!("{bug:?}") == name).expect("a bug")),
            || simulate(seed, true),
        )
        .unwrap_or_else(|why| panic!("{why}"));
        return;
    }
    let seeds = number("FINETUNE_SIM_SEEDS").unwrap_or(SEEDS);
    let began = Instant::now();
    let (next, events, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        return;
                    }
                    match simulate(seed, false) {
                        Ok(count) => drop(events.fetch_add(count, Ordering::Relaxed)),
                        Err(why) => {
                            let mut failures = failures.lock().expect("nobody panics here");
                            failures.push(why);
                            stop.store(
                                failures.len() >= number("FINETUNE_SIM_FAILURES").unwrap_or(10) as usize,
                                Ordering::Relaxed,
                            );
                        }
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("nobody panics here");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    println!("{seeds} seeds, {} events, {:.1} s", events.into_inner(), began.elapsed().as_secs_f64());
}

/// Every planted bug, and a test of the test: a simulator that finds none of them finds nothing.
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

#[test]
fn every_planted_bug_is_caught() {
    const WITHIN: u64 = 2000;
    for bug in BUGS {
        let found = (0..WITHIN).find_map(|seed| with_planted(Some(bug), || simulate(seed, false)).err());
        let found = found.unwrap_or_else(|| panic!("{bug:?} is not caught within {WITHIN} seeds"));
        println!("{bug:?}: {}", found.lines().next().unwrap_or_default());
    }
}
