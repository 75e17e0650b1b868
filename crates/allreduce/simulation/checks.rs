//! What must be true after a run. Wrong results and hangs have been found during it.

use std::collections::BTreeSet;
use std::time::Duration;

use super::rank::{Process, Rank};
use super::scenario::{Change, Damage, Expected};
use super::work::Task;

use super::world::World;
use crate::frame::{Algorithm, Kind};
use crate::verdict::{Cause, Verdict};

/// Time in which a closed connection is known to all.
const CRASH_BOUND: Duration = Duration::from_secs(1);

/// What a silence may take beyond the timeout.
const SILENCE_SLACK: Duration = Duration::from_millis(500);

pub(super) fn check(world: &World) -> Result<(), String> {
    for rank in survivors(world) {
        if rank.verdict.is_none() && !rank.has_finished() {
            return Err(format!("rank {} did not finish and has no verdict", rank.rank));
        }
        if let Some((at, verdict)) = &rank.verdict {
            if says_nothing(verdict) {
                return Err(format!("rank {} says {verdict:?}", rank.rank));
            }
            is_right(world, rank.rank, verdict).map_err(|why| format!("rank {} says {verdict:?}: {why}", rank.rank))?;
            is_in_time(world, *at, verdict).map_err(|why| format!("rank {}: {why}", rank.rank))?;
        }
    }
    agreement(world)?;
    is_noticed(world)
}

fn survivors(world: &World) -> impl Iterator<Item = &Rank> {
    world.ranks.iter().filter(|rank| rank.process == Process::Running)
}

/// Whether some rank was done with everything and left before the others knew of the failure. Then
/// a pair that cannot hear each other may have had no rank in between.
fn somebody_left_early(world: &World) -> bool {
    let last = world.ranks.iter().filter_map(|rank| rank.verdict.as_ref().map(|(at, _)| *at)).max();
    let early = |rank: &Rank| rank.verdict.is_none() && world.left[rank.rank].is_some_and(|left| Some(left) < last);
    world.ranks.iter().any(early)
}

/// Whether a verdict names no rank.
fn says_nothing(verdict: &Verdict) -> bool {
    match verdict {
        Verdict::Lost { closed, silent, .. } => closed.is_empty() && silent.is_empty(),
        Verdict::Separated { pairs } => pairs.is_empty(),
        Verdict::Reported { .. } | Verdict::CutOff => false,
    }
}

/// Whether a rank was done with everything and left.
fn is_gone(world: &World, rank: &usize) -> bool {
    world.ranks[*rank].verdict.is_none() && world.left[*rank].is_some()
}

/// A fault can come between a rank's farewell, which arrives, and its last data, which do not. No
/// rank misses one that said farewell, so only the operation's own timeout ends the wait.
fn waits_for_the_gone(world: &World, verdict: &Verdict) -> bool {
    let gone = |rank: &usize| is_gone(world, rank);
    let Verdict::Reported { cause: Cause::Stalled { waiting_for, .. }, .. } = verdict else { return false };
    !world.scenario.changes.is_empty() && waiting_for.iter().all(gone)
}

/// Whether `verdict` is what `rank` has to say.
fn is_right(world: &World, rank: usize, verdict: &Verdict) -> Result<(), String> {
    let size = world.scenario.world;
    let gone = |rank: &usize| is_gone(world, rank);
    if waits_for_the_gone(world, verdict) {
        return Ok(());
    }
    let right = match &world.scenario.expected {
        Expected::Nothing => false,
        Expected::NoHang => true,
        Expected::Lost { crashed, certain, possible } => match verdict {
            Verdict::Lost { closed, silent, .. } => {
                let (named, other) = if *crashed { (closed, silent) } else { (silent, closed) };
                let certain = certain.iter().copied().filter(|rank| !gone(rank)).collect();
                other.is_empty() && named.is_superset(&certain) && named.is_subset(&(&certain | possible))
            }
            // The only rank left cannot tell the silence of all others from its own.
            Verdict::CutOff => !crashed && size > 2 && certain.len() + possible.len() + 1 == size,
            _ => false,
        },
        Expected::Separated(a, b) if size == 2 || somebody_left_early(world) => names_only(verdict, &[*a, *b]),
        Expected::Separated(a, b) => *verdict == Verdict::Separated { pairs: [(*a.min(b), *a.max(b))].into() },
        Expected::CutOff(lost) => {
            let others: Vec<usize> = (0..size).filter(|other| other != lost).collect();
            match rank == *lost {
                true if size > 2 && !somebody_left_early(world) => *verdict == Verdict::CutOff,
                true => *verdict == Verdict::CutOff || names_only(verdict, &others),
                false => is_lost_silent(verdict, &[*lost].into()),
            }
        }
        Expected::HalfCutOff(lost) => match verdict {
            Verdict::CutOff => rank == *lost,
            Verdict::Separated { pairs } => pairs.iter().all(|(a, b)| a == lost || b == lost),
            Verdict::Lost { .. } if size == 2 || rank == *lost => true,
            verdict => is_lost_silent(verdict, &[*lost].into()),
        },
        Expected::Halves(side) => is_of_the_other_half(world, rank, verdict, side),
        Expected::Slept { rank: sleeper, surely } => match verdict {
            Verdict::Separated { pairs } if !surely => pairs.iter().all(|(a, b)| a == sleeper || b == sleeper),
            verdict => is_lost_silent(verdict, &[*sleeper].into()),
        },
        Expected::Diverged(stray) => match verdict {
            Verdict::Reported { by, cause: Cause::Diverged { peer, .. }, .. } => by == stray || peer == stray,
            // If data go one way only, some ranks are through before any rank sees a frame that
            // would tell.
            Verdict::Reported { cause: Cause::Broken { peer, .. }, .. } => gone(peer) && goes_one_way(world, stray),
            _ => false,
        },
        Expected::Aborted(stopped) => {
            matches!(verdict, Verdict::Reported { by, cause: Cause::Failed { .. }, .. } if by == stopped)
        }
        Expected::Damaged { from, to, damage } => match verdict {
            Verdict::Reported { by, cause: Cause::Damaged { peer, .. }, .. } => (peer, by) == (from, to),
            // Without a later frame no rank knows that one was lost.
            Verdict::Reported { cause: Cause::Stalled { .. }, .. } => *damage == Damage::Drop,
            _ => false,
        },
        Expected::Broken(a, b) => match verdict {
            Verdict::Reported { by, cause: Cause::Broken { peer, .. }, .. } => {
                (*by, *peer) == (*a, *b) || (*by, *peer) == (*b, *a)
            }
            _ => false,
        },
    };
    if right { Ok(()) } else { Err(format!("expected {:?}", world.scenario.expected)) }
}

/// Whether `verdict` is what `rank` has to say when the ranks of `side` and the others do not hear
/// each other.
fn is_of_the_other_half(world: &World, rank: usize, verdict: &Verdict, side: &BTreeSet<usize>) -> bool {
    let size = world.scenario.world;
    let all: BTreeSet<usize> = (0..size).collect();
    let beyond = if side.contains(&rank) { &all - side } else { side.clone() };
    let alone = size > 2 && beyond.len() + 1 == size;
    match verdict {
        Verdict::CutOff => alone,
        Verdict::Lost { closed, silent, .. } if somebody_left_early(world) => {
            closed.is_empty() && silent.is_subset(&beyond)
        }
        verdict => is_lost_silent(verdict, &beyond) && !alone,
    }
}

/// Whether one of the two operations that met is one in which some ranks only receive, or only talk
/// to one other.
fn goes_one_way(world: &World, stray: &usize) -> bool {
    let at = world.scenario.divergent.map_or(0, |stray| stray.task);
    let one_way = |task: &Task| task.descriptor.kind == Kind::Broadcast || task.descriptor.algorithm == Algorithm::Star;
    [&world.tasks, world.ranks[*stray].tasks()].iter().any(|tasks| tasks.get(at).is_some_and(one_way))
}

fn is_lost_silent(verdict: &Verdict, lost: &BTreeSet<usize>) -> bool {
    matches!(verdict, Verdict::Lost { closed, silent, .. } if closed.is_empty() && silent == lost)
}

/// Whether a verdict names only `ranks` as lost or unheard.
fn names_only(verdict: &Verdict, ranks: &[usize]) -> bool {
    match verdict {
        Verdict::Lost { closed, silent, .. } => closed.union(silent).all(|rank| ranks.contains(rank)),
        Verdict::Separated { pairs } => pairs.iter().all(|(a, b)| ranks.contains(a) && ranks.contains(b)),
        _ => false,
    }
}

/// Whether the verdict came soon enough.
fn is_in_time(world: &World, at: Duration, verdict: &Verdict) -> Result<(), String> {
    let struck = world.struck.unwrap_or_default();
    let bound = match &world.scenario.expected {
        Expected::Lost { crashed: true, .. } | Expected::Aborted(_) => CRASH_BOUND,
        Expected::Lost { .. }
        | Expected::Separated(..)
        | Expected::CutOff(_)
        | Expected::HalfCutOff(_)
        | Expected::Halves(_) => world.scenario.timeout + SILENCE_SLACK,
        _ => return Ok(()),
    };
    if waits_for_the_gone(world, verdict) {
        return Ok(());
    }
    let took = at - struck;
    if took <= bound { Ok(()) } else { Err(format!("the verdict came after {took:?}; the bound is {bound:?}")) }
}

/// Ranks that hear each other say the same, to the letter.
fn agreement(world: &World) -> Result<(), String> {
    let size = world.scenario.world;
    let all = || (0..size).collect::<Vec<usize>>();
    let without = |rank: &usize| (0..size).filter(|other| other != rank).collect::<Vec<usize>>();
    let circles: Vec<Vec<usize>> = match &world.scenario.expected {
        Expected::Nothing => Vec::new(),
        Expected::NoHang => vec![untouched(world)],
        Expected::Separated(..) if size == 2 || somebody_left_early(world) => Vec::new(),
        Expected::Halves(side) => {
            vec![side.iter().copied().collect(), (0..size).filter(|r| !side.contains(r)).collect()]
        }
        Expected::CutOff(rank) | Expected::HalfCutOff(rank) => vec![without(rank)],
        _ => vec![all()],
    };
    for circle in circles {
        let mut verdicts = survivors(world)
            .filter(|rank| circle.contains(&rank.rank))
            .filter_map(|rank| rank.verdict.as_ref().map(|(_, verdict)| (rank.rank, verdict)));
        let Some((first, said)) = verdicts.next() else { continue };
        if let Some((other, says)) = verdicts.find(|(_, verdict)| *verdict != said) {
            return Err(format!("rank {first} says {said:?}, rank {other} says {says:?}"));
        }
    }
    Ok(())
}

/// The ranks that nothing happened to, and whose connections to each other were never disturbed.
fn untouched(world: &World) -> Vec<usize> {
    let mut untouched: BTreeSet<usize> = (0..world.scenario.world).collect();
    for (_, change) in &world.scenario.changes {
        match change {
            Change::Freeze(rank) | Change::Thaw(rank) | Change::Crash { rank, .. } => drop(untouched.remove(rank)),
            Change::Block { from: a, to: b, .. }
            | Change::Unblock { from: a, to: b }
            | Change::CloseControl { a, b }
            | Change::Attack { from: a, to: b, .. } => {
                if untouched.contains(a) {
                    untouched.remove(b);
                }
            }
            Change::BreakData { .. } | Change::Abort(_) => {}
        }
    }
    untouched.into_iter().collect()
}

/// Whether some rank has a verdict if one is due.
fn is_noticed(world: &World) -> Result<(), String> {
    let noticed = world.ranks.iter().any(|rank| rank.verdict.is_some());
    let must = match world.scenario.expected {
        Expected::Diverged(_) => true,
        Expected::Damaged { damage, .. } => {
            world.struck.is_some() && !matches!(damage, Damage::Double | Damage::Delay | Damage::StaleBefore)
        }
        Expected::Separated(..) => world.struck.is_some() && world.scenario.linger > world.scenario.timeout,
        _ => false,
    };
    if must && !noticed {
        return Err(format!("nobody noticed: {:?}", world.scenario.expected));
    }
    let quiet = world.scenario.expected == Expected::Nothing
        && world.scenario.straggler.is_none()
        && !world.scenario.changes.iter().any(|(_, change)| matches!(change, Change::Freeze(_) | Change::Block { .. }));
    match world.ranks.iter().find(|rank| quiet && rank.warnings > 0) {
        Some(rank) => Err(format!("rank {} warned though nothing happened", rank.rank)),
        None => Ok(()),
    }
}
