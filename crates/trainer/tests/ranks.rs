//! Several ranks, each a thread of this process. The result is that of one rank, to the bit if
//! virtual ranks promise it.

mod common;

use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use finetune_allreduce::Algorithm;
use finetune_trainer::{Event, Outcome, Resume, Run, TrainError};

use common::{adapter, goldens, recipe, run, run_altered, run_watched, state, whole};

#[test]
fn the_number_of_ranks_changes_nothing_but_rounding() {
    let folder = tempfile::tempdir().expect("a directory");
    let alone = whole(1, None, &folder.path().join("1"), &[]);
    for world in [2, 3, 4, 8] {
        let together = whole(world, None, &folder.path().join(world.to_string()), &[]);
        assert_eq!(together.steps.len(), alone.steps.len());
        for (one, many) in alone.steps.iter().zip(&together.steps) {
            let bound = if one.step == 1 { 1e-6 } else { 1e-5 };
            assert!(
                (one.loss - many.loss).abs() <= bound * one.loss,
                "{world} ranks, step {}: {one:?} {many:?}",
                one.step
            );
            assert_eq!((one.trained_tokens, one.tokens), (many.trained_tokens, many.tokens));
            assert_eq!(many.ranks.len(), world, "a row per rank");
        }
        for (one, many) in alone.evaluations.iter().zip(&together.evaluations) {
            assert!((one.eval_loss - many.eval_loss).abs() <= 1e-5 * one.eval_loss);
            assert_eq!(one.eval_tokens, many.eval_tokens);
        }
    }
}

/// Rows that no rank trains on, and ranks without rows: 7 rows of a step on 8 ranks, 5 left for the
/// last step of an epoch.
#[test]
fn ranks_without_rows_neither_hang_nor_skew() {
    let folder = tempfile::tempdir().expect("a directory");
    let sets = ["train.global_batch_size=2"];
    let alone = whole(1, None, &folder.path().join("1"), &sets);
    let together = whole(5, None, &folder.path().join("5"), &sets);
    for (one, many) in alone.steps.iter().zip(&together.steps) {
        assert!((one.loss - many.loss).abs() <= 1e-5 * one.loss, "{one:?} {many:?}");
    }
}

#[test]
fn virtual_ranks_give_the_same_bits_on_any_number_of_processes() {
    let folder = tempfile::tempdir().expect("a directory");
    let four = folder.path().join("four");
    let expected = whole(4, None, &four, &[]);
    let sets = ["distributed.virtual_ranks=4"];
    for (world, topology) in [(1, None), (2, None), (4, None), (2, Some(Algorithm::Ring)), (4, Some(Algorithm::Ring))] {
        let output = folder.path().join(format!("{world} {topology:?}"));
        let told = whole(world, topology, &output, &sets);
        assert_eq!(told.losses(), expected.losses(), "{world} ranks, {topology:?}");
        assert_eq!(told.evaluations, expected.evaluations, "{world} ranks, {topology:?}");
        assert!(adapter(&output) == adapter(&four), "{world} ranks, {topology:?}: another adapter");
    }
    let (_, outcomes) = run(3, None, &Resume::No, |_| recipe(&folder.path().join("3"), &sets), |_, _| 0);
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Err(TrainError::VirtualRanks { .. }))), "{outcomes:?}");
}

/// The golden models of all families.
fn all_families() -> Vec<String> {
    let entries = std::fs::read_dir(goldens("")).expect("golden models").map(|entry| entry.expect("an entry"));
    let models = entries.filter(|entry| entry.path().join("golden.json").is_file());
    let mut names: Vec<String> = models.map(|entry| entry.file_name().into_string().expect("a name")).collect();
    names.sort();
    names
}

/// All families, with LoRA on their experts where the golden model is made for that: the same bits with 1, 2 and 4
/// ranks, whether layers are in memory or read from the disk, on each rank as it likes.
#[test]
fn every_family_gives_the_same_bits_on_any_number_of_processes() {
    let families = all_families();
    assert!(families.len() >= 35, "{families:?}");
    for family in &families {
        // Experts have no dropout, as in PEFT.
        let lora = match family.ends_with("_experts") {
            true => [r#"lora.target_modules=["v_proj", "experts"]"#, "lora.dropout=0"],
            false => ["lora.rank=4", "lora.dropout=0.1"],
        };
        let folder = tempfile::tempdir().expect("a directory");
        let rows = goldens(family).join("rows.jsonl");
        let paths = [("model.path", goldens(family)), ("data.train", rows.clone()), ("data.eval", rows)];
        let paths = paths.map(|(key, path)| format!("{key}={path:?}"));
        let told = |world: usize, on_disk: fn(usize) -> bool| {
            let output = folder.path().join(format!("{world} {}", on_disk(0)));
            let of_rank = |rank: usize| {
                let residency = if on_disk(rank) { "model.residency=disk" } else { "model.residency=memory" };
                let short = ["train.max_steps=3", "eval.every=3", "checkpoint.every=0", "distributed.virtual_ranks=4"];
                let sets = paths.iter().map(String::as_str).chain(lora).chain(short);
                recipe(&output, &sets.chain(["model.device=cpu", residency]).collect::<Vec<_>>())
            };
            let (told, outcomes) = run(world, None, &Resume::No, of_rank, |_, _| 0);
            assert!(outcomes.iter().all(Result::is_ok), "{family}, {world} ranks: {outcomes:?}");
            (told.losses(), told.norms(), told.evaluations, adapter(&output))
        };
        let expected = told(1, |_| false);
        assert!(told(1, |_| true) == expected, "{family}, from the disk: other bits");
        assert!(told(2, |rank| rank == 1) == expected, "{family}, 2 ranks: other bits");
        assert!(told(4, |rank| rank % 2 == 0) == expected, "{family}, 4 ranks: other bits");
    }
}

/// Steps that ranks make alone: the same bits on any number of processes, in one go or stopped on the way, where a
/// signal waits for the next average.
#[test]
fn steps_made_alone_give_the_same_bits_on_any_number_of_processes() {
    let folder = tempfile::tempdir().expect("a directory");
    let sets = ["virtual_ranks=4", "sync_every=2", "outer_momentum=0.5"].map(|set| format!("distributed.{set}"));
    let sets = sets.iter().map(String::as_str).chain(["checkpoint.every=1", "eval.every=3"]);
    let sets: Vec<&str> = sets.collect();
    let together = folder.path().join("together");
    let every_step = whole(4, None, &together, &["distributed.virtual_ranks=4", "eval.every=3"]);
    let output = folder.path().join("1");
    let expected = whole(1, None, &output, &sets);
    assert_ne!(expected.losses(), every_step.losses());
    let evaluated: Vec<u64> = expected.evaluations.iter().map(|row| row.step).collect();
    assert_eq!(evaluated, [0, 4, 6], "evaluations wait for the next average");
    for world in [2, 4] {
        let other = folder.path().join(world.to_string());
        let told = whole(world, None, &other, &sets);
        assert_eq!(told.losses(), expected.losses(), "{world} ranks");
        assert_eq!(told.evaluations, expected.evaluations, "{world} ranks");
        assert!(state(&other) == state(&output), "{world} ranks: another state");
    }
    for (before, after) in [(4, 1), (1, 4), (2, 2)] {
        let other = folder.path().join(format!("{before} then {after}"));
        let stop = |rank, step| if rank == 0 && step >= 3 { 15 } else { 0 };
        let (first, outcomes) = run(before, None, &Resume::No, |_| recipe(&other, &sets), stop);
        for outcome in outcomes {
            assert!(matches!(outcome, Ok(Outcome::Stopped { step: 4, signal: 15 })), "{before} ranks: {outcome:?}");
        }
        let second = whole(after, None, &other, &sets);
        assert_eq!([first.losses(), second.losses()].concat(), expected.losses(), "{before} then {after} ranks");
        assert!(state(&other) == state(&output), "{before} then {after} ranks: another state");
    }
}

/// Gradients in bf16 on the way: close to the exact ones, and the same on all ranks.
#[test]
fn rounded_gradients_train_as_exact_ones_do() {
    let folder = tempfile::tempdir().expect("a directory");
    let exact = whole(4, None, &folder.path().join("exact"), &[]);
    let rounded = whole(4, None, &folder.path().join("rounded"), &["distributed.wire=bf16"]);
    assert_ne!(exact.losses(), rounded.losses());
    for (one, other) in exact.steps.iter().zip(&rounded.steps) {
        assert!((one.loss - other.loss).abs() < 2e-2 * one.loss, "{one:?} {other:?}");
    }
}

/// Stopped on any rank after step 3, a run goes on with another number of ranks. With virtual ranks
/// it gives the same bits.
#[test]
fn a_run_moves_between_numbers_of_ranks() {
    let folder = tempfile::tempdir().expect("a directory");
    let sets = ["distributed.virtual_ranks=4", "checkpoint.every=0"];
    let undisturbed = folder.path().join("undisturbed");
    let expected = whole(1, None, &undisturbed, &sets);
    for (before, after, who) in [(4, 1, 2), (1, 4, 0), (4, 2, 3), (2, 4, 1)] {
        let output = folder.path().join(format!("{before} then {after}"));
        let stop = |rank, step| if rank == who && step == 3 { 15 } else { 0 };
        let (first, outcomes) = run(before, None, &Resume::No, |_| recipe(&output, &sets), stop);
        for outcome in outcomes {
            assert!(matches!(outcome, Ok(Outcome::Stopped { step: 3, signal: 15 })), "{before} ranks: {outcome:?}");
        }
        let second = whole(after, None, &output, &sets);
        assert_eq!([first.losses(), second.losses()].concat(), expected.losses(), "{before} then {after} ranks");
        assert!(adapter(&output) == adapter(&undisturbed), "{before} then {after} ranks: another adapter");
    }
}

/// A host that is slower than the others gets fewer shares, and no bit changes.
#[test]
fn shares_by_measured_speed_change_no_bit() {
    let folder = tempfile::tempdir().expect("a directory");
    let sets = ["distributed.virtual_ranks=6", "train.max_steps=12", "distributed.shares=\"measured\""];
    let even = folder.path().join("even");
    let undisturbed = |_: usize| recipe(&even, &sets);
    let (expected, _) = run(1, None, &Resume::No, undisturbed, |_, _| 0);
    assert_eq!(expected.steps.len(), 12);
    for (world, slow) in [(2, 0), (2, 1), (3, 1)] {
        let output = folder.path().join(format!("{world} {slow}"));
        let delay = |rank: usize, event: &Event<'_>, _: &AtomicI32| {
            // It takes this long whatever it has to do: longer than all others together, also on a busy machine. After
            // the first steps shares are assigned.
            if rank == slow && matches!(event, Event::Working { step: ..=4, .. }) {
                std::thread::sleep(Duration::from_secs(1));
            }
        };
        let (told, outcomes) = run_watched(world, None, &Resume::No, |_| recipe(&output, &sets), |_, _| {}, delay);
        assert!(
            outcomes.iter().all(|outcome| matches!(outcome, Ok(Outcome::Finished { step: 12, .. }))),
            "{outcomes:?}"
        );
        let first = told.assignments.first().expect("shares are assigned by speed");
        assert_eq!((first.len(), first[slow], first.iter().sum::<usize>()), (world, 1, 6), "{first:?}");
        assert_eq!(told.losses(), expected.losses(), "{world} ranks, rank {slow} is slow");
        assert_eq!(told.evaluations, expected.evaluations, "{world} ranks, rank {slow} is slow");
        assert!(adapter(&output) == adapter(&even), "{world} ranks, rank {slow} is slow: another adapter");
    }
}

/// What a slow rank costs is told after a few steps.
#[test]
fn a_slow_rank_is_named_at_once() {
    let folder = tempfile::tempdir().expect("a directory");
    let named = Mutex::new(Vec::new());
    let watch = |rank: usize, event: &Event<'_>, _: &AtomicI32| match event {
        Event::Working { .. } if rank == 1 => std::thread::sleep(Duration::from_secs(1)),
        Event::Straggler { rank: slow, factor, steps, seconds, without } if rank == 0 => {
            named.lock().expect("a lock").push((*slow, *factor, *steps, *seconds, *without));
        }
        _ => {}
    };
    let sets = ["train.max_steps=8"];
    let (_, outcomes) =
        run_watched(2, None, &Resume::No, |_| recipe(&folder.path().join("run"), &sets), |_, _| {}, watch);
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    let named = named.into_inner().expect("a lock");
    let [(slow, factor, steps, seconds, without)] = named[..] else { panic!("said once in so short a run: {named:?}") };
    assert!(slow == 1 && (3..=7).contains(&steps) && factor > 1.3, "{named:?}");
    // Rank 0 may begin a step after rank 1: by a moment, or by more on a busy machine.
    assert!(seconds > 0.3 && without.is_some_and(|without| without < seconds), "{named:?}");
}

/// One rank gets a signal in the middle of an evaluation. All give it up, and the resumed run makes
/// it as if nothing had happened.
#[test]
fn a_signal_on_one_rank_gives_the_evaluation_up_on_all() {
    let folder = tempfile::tempdir().expect("a directory");
    let sets = ["distributed.virtual_ranks=4", "train.micro_batch_size=1"];
    let undisturbed = folder.path().join("undisturbed");
    let expected = whole(1, None, &undisturbed, &sets);
    for (world, who, at) in [(1, 0, 3), (2, 1, 3), (4, 2, 6)] {
        let output = folder.path().join(format!("{world} {at}"));
        let (done, rows_begun) = (AtomicI32::new(0), AtomicI32::new(0));
        let watch = |rank: usize, event: &Event<'_>, signal: &AtomicI32| match event {
            Event::Step { row, .. } if rank == who => done.store(row.step as i32, Ordering::SeqCst),
            Event::EvaluatedRows { .. } if rank == who && done.load(Ordering::SeqCst) == at => {
                rows_begun.fetch_add(1, Ordering::SeqCst);
                signal.store(15, Ordering::SeqCst);
            }
            _ => {}
        };
        let (first, outcomes) = run_watched(world, None, &Resume::No, |_| recipe(&output, &sets), |_, _| {}, watch);
        for outcome in outcomes {
            let stopped = matches!(outcome, Ok(Outcome::Stopped { step, signal: 15 }) if step == at as u64);
            assert!(stopped, "{world} ranks: {outcome:?}");
        }
        assert!(first.evaluations.iter().all(|row| row.step < at as u64), "{:?}", first.evaluations);
        assert_eq!(rows_begun.into_inner(), 1, "{world} ranks: no row is evaluated behind the signal");
        let second = whole(world, None, &output, &sets);
        assert_eq!([first.losses(), second.losses()].concat(), expected.losses(), "{world} ranks");
        assert_eq!([first.evaluations, second.evaluations].concat(), expected.evaluations, "{world} ranks");
        assert!(adapter(&output) == adapter(&undisturbed), "{world} ranks: another adapter");
    }
}

/// The loss on held-back rows before the first step is the base's. No checkpoint holds it, so it is
/// never the best.
#[test]
fn the_first_look_is_before_the_first_step() {
    let folder = tempfile::tempdir().expect("a directory");
    let (one, other) = (folder.path().join("one"), folder.path().join("other"));
    let good = whole(1, None, &one, &[]);
    let (bad, outcomes) = run(2, None, &Resume::No, |_| recipe(&other, &["optimizer.learning_rate=50.0"]), |_, _| 0);
    let before = good.evaluations.first().expect("an evaluation");
    let steps: Vec<u64> = good.evaluations.iter().map(|row| row.step).collect();
    assert_eq!(steps, [0, 3, 6]);
    assert_eq!(before, bad.evaluations.first().expect("an evaluation"));
    let Some(Ok(Outcome::Finished { summary, .. })) = outcomes.first() else { panic!("{outcomes:?}") };
    let best = summary.best.expect("a best evaluation");
    let after = bad.evaluations.last().expect("an evaluation").eval_loss;
    assert!(best.step > 0, "{summary:?}");
    assert_eq!((summary.eval, summary.result_step), (Some((before.eval_loss, after)), 6));
}

#[test]
fn ranks_that_are_made_of_other_things_refuse_to_start() {
    let folder = tempfile::tempdir().expect("a directory");
    let other_rows = folder.path().join("rows.jsonl");
    let rows = std::fs::read_to_string(goldens("qwen3").join("rows.jsonl")).expect("rows");
    let shorter = rows.trim_end().rsplit_once('\n').expect("several rows").0;
    #[expect(clippy::disallowed_methods, reason = "a file of the test")]
    std::fs::write(&other_rows, shorter).expect("written");
    let other_rows = format!("data.train={other_rows:?}");
    let other_model = format!("model.path={:?}", goldens("llama"));
    let cases: [(&str, &str); 3] = [
        ("set of training rows", &other_rows),
        ("base model", &other_model),
        ("recipe", "optimizer.learning_rate=2e-2"),
    ];
    for (what, set) in cases {
        let output = folder.path().join(what);
        let sets = [set];
        let recipe = |rank| recipe(&output, if rank == 2 { &sets } else { &[] });
        let (_, outcomes) = run(3, None, &Resume::No, recipe, |_, _| 0);
        for outcome in outcomes {
            let error = outcome.expect_err("a rank differs").to_string();
            assert!(error.contains("rank 2 (") && error.contains(what), "{what}: {error}");
        }
    }
}

/// If a bit changes in one rank's memory, no checkpoint is written: not all ranks have the same
/// numbers.
#[test]
fn ranks_that_drift_apart_stop_before_they_save() {
    let folder = tempfile::tempdir().expect("a directory");
    let output = folder.path().join("run");
    let flip = |rank, run: &mut Run| {
        if rank == 1 {
            let value =
                run.state.parameters.iter_mut().find(|value| **value != 0.0).expect("a branch that is not zero");
            *value = f32::from_bits(value.to_bits() ^ (1 << 10));
        }
    };
    let (_, outcomes) = run_altered(3, None, &Resume::No, |_| recipe(&output, &[]), |_, _| 0, flip);
    for outcome in outcomes {
        let error = outcome.expect_err("a bit is another").to_string();
        assert!(error.starts_with("after step 2 the ranks no longer have the same numbers: rank 1 ("), "{error}");
    }
    assert_eq!(std::fs::read_dir(output.join("checkpoints")).expect("a directory").count(), 0, "nothing was saved");
}

/// A rank that cannot start or go on stops the others, and they say why.
#[test]
fn what_ends_one_rank_ends_all() {
    let folder = tempfile::tempdir().expect("a directory");
    let output = folder.path().join("run");
    let recipe = |rank| recipe(&output, if rank == 1 { &["model.path=\"nowhere\""] } else { &[] });
    let (_, outcomes) = run(3, None, &Resume::No, recipe, |_, _| 0);
    for (rank, outcome) in outcomes.into_iter().enumerate() {
        let error = outcome.expect_err("rank 1 has no model").to_string();
        assert!(error.contains("nowhere"), "rank {rank}: {error}");
        assert_eq!(error.contains("rank 1 ("), rank != 1, "rank {rank}: {error}");
    }
}
