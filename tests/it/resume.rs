//! A run that is killed at any point goes on with `--resume` and ends with the same bits.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::failpoints::{OF_EVERY_RANK, OF_RANK_0, REPLACING};
use crate::folder::{CRASH_RECIPE, Folder, RunResult, metrics};
use crate::program::start;
use crate::random::Random;

/// Steps between checkpoints in [`CRASH_RECIPE`]. At most this many steps may be done twice.
const CHECKPOINT_EVERY: u64 = 2;

/// The run that nothing interrupts.
fn undisturbed(folder: &Folder) -> RunResult {
    folder.run("undisturbed", &[]).expect(0);
    let result = folder.result("undisturbed");
    let steps: Vec<u64> = metrics(&folder.path("undisturbed"))
        .iter()
        .filter(|row| row.get("loss").is_some())
        .map(|row| row["step"].as_u64().expect("a number"))
        .collect();
    assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>());
    result
}

/// The last step in metrics.jsonl, or 0.
fn last_step(folder: &Folder, output: &str) -> u64 {
    // A kill leaves no torn line, because a row is one write.
    metrics(&folder.path(output)).last().map_or(0, |row| row["step"].as_u64().expect("a number"))
}

/// The step that `--resume` said it goes on from.
fn resumed_from(stderr: &str) -> u64 {
    if stderr.contains("starting from the beginning") {
        return 0;
    }
    let (_, rest) = stderr.split_once("(step ").unwrap_or_else(|| panic!("no word of where from:\n{stderr}"));
    rest.split_once(')').and_then(|(step, _)| step.parse().ok()).expect("a step")
}

#[test]
fn a_kill_at_any_point_changes_no_bit() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let want = undisturbed(&folder);
    assert_eq!(want.checkpoints().len(), 2, "the last checkpoint and a best one before it: {:?}", want.checkpoints());
    let mut kills = 0;
    for point in OF_EVERY_RANK.iter().chain(OF_RANK_0) {
        for hit in 1.. {
            let failpoint = format!("{point}:{hit}");
            let output = failpoint.replace(':', "-");
            if !folder.run_killed_at(&output, &["--resume"], &failpoint) {
                assert!(hit > 1, "{point} is never hit");
                break;
            }
            kills += 1;
            let reached = last_step(&folder, &output);
            let ended = folder.run(&output, &["--resume"]).expect(0);
            let from = resumed_from(&ended.stderr);
            assert!(reached - from <= CHECKPOINT_EVERY, "{failpoint}: step {reached} was done, went on from {from}");
            folder.result(&output).expect_same(&want, &failpoint);
            std::fs::remove_dir_all(folder.path(&output)).expect("it is there");
        }
    }
    println!("{kills} kills, no bit differs");
    assert!(kills >= 60, "{kills} kills");
}

#[test]
fn a_run_killed_again_and_again_changes_no_bit() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let want = undisturbed(&folder);
    let points = [OF_EVERY_RANK, OF_RANK_0, &[REPLACING]].concat();
    let mut random = Random::new();
    let (mut kills, mut runs) = (0, 0);
    while kills < 30 {
        // One run is killed again and again until it reaches its end by chance.
        let mut history = Vec::new();
        loop {
            let point = points[random.below(points.len() as u64) as usize];
            let failpoint = format!("{point}:{}", 1 + random.below(4));
            let killed = folder.run_killed_at("run", &["--resume"], &failpoint);
            history.push(failpoint);
            if !killed {
                break;
            }
            kills += 1;
        }
        folder.result("run").expect_same(&want, &format!("{history:?}"));
        std::fs::remove_dir_all(folder.path("run")).expect("it is there");
        runs += 1;
        assert!(runs < 200, "kills do not happen");
    }
}

/// Settings that the run of the other tests leaves out. Each run is killed in a step, in a save and
/// after the last save.
#[test]
fn kinds_of_runs() {
    let kinds: [&[&str]; 9] = [
        &["schedule.name=cosine", "schedule.warmup_steps=3", "schedule.min_lr_ratio=0.1"],
        &["data.shuffle=false", "train.gradient_checkpointing=true"],
        // This run ends after the second evaluation without a new best, and must not go on when it
        // is resumed.
        &["eval.early_stopping_patience=2", "train.max_steps=40"],
        &[
            "lora.use_rslora=true",
            "lora.rank_pattern={ q_proj = 2 }",
            "lora.target_modules=[\"q_proj\", \"down_proj\"]",
        ],
        &["lora.use_dora=true", "train.gradient_checkpointing=true"],
        &["lora.target_modules=[\"q_proj\", \"lm_head\"]", "lora.modules_to_save=[\"embed_tokens\", \"norm\"]"],
        &["checkpoint.every=0", "checkpoint.keep_best=false"],
        &["train.epochs=3"],
        &["model.residency=disk", "lora.use_dora=true", "lora.modules_to_save=[\"k_proj\"]"],
    ];
    for sets in kinds {
        // Epochs are an alternative to steps.
        let epochs = sets.contains(&"train.epochs=3");
        let folder = Folder::with_recipe(&if epochs {
            CRASH_RECIPE.replace("max_steps = 10", "")
        } else {
            CRASH_RECIPE.to_owned()
        });
        let arguments: Vec<&str> = ["--resume"].into_iter().chain(sets.iter().flat_map(|set| ["--set", set])).collect();
        folder.run("undisturbed", &arguments).expect(0);
        let want = folder.result("undisturbed");
        for failpoint in ["train.step:6", "checkpoint.file:3", "train.publish"] {
            assert!(folder.run_killed_at("run", &arguments, failpoint), "{sets:?} {failpoint}");
            folder.run("run", &arguments).expect(0);
            folder.result("run").expect_same(&want, &format!("{sets:?} {failpoint}"));
            std::fs::remove_dir_all(folder.path("run")).expect("it is there");
        }
    }
}

/// All weights are trained, and answers are generated before and after. A resume keeps the answers
/// from before the first step.
#[test]
fn all_weights_and_answers() {
    let folder = Folder::with_chat_model(ALL_WEIGHTS);
    let row = |n: usize| format!("{{\"prompt\": \"Say {n}\", \"completion\": \"It is {n}.\"}}\n");
    folder.write("train.jsonl", (0..12).map(row).collect::<String>().as_bytes());
    folder.write("eval.jsonl", (12..15).map(row).collect::<String>().as_bytes());
    folder.run("undisturbed", &[]).expect(0);
    let want = folder.result("undisturbed");
    let answers = |output: &str| std::fs::read_to_string(folder.path(output).join("samples.json")).expect("answers");
    assert!(answers("undisturbed").contains("Say 12"));
    for failpoint in
        ["train.step:1", "train.step:2", "train.step:6", "checkpoint.file:3", "prune.trashed", "train.published"]
    {
        assert!(folder.run_killed_at("run", &["--resume"], failpoint), "{failpoint}");
        folder.run("run", &["--resume"]).expect(0);
        folder.result("run").expect_same(&want, failpoint);
        assert_eq!(answers("run"), answers("undisturbed"), "{failpoint}");
        std::fs::remove_dir_all(folder.path("run")).expect("it is there");
    }
}

const ALL_WEIGHTS: &str = r#"
[model]
path = "model"
[data]
train = "train.jsonl"
eval = "eval.jsonl"
[train]
method = "full"
epochs = 3
global_batch_size = 5
micro_batch_size = 2
[optimizer]
learning_rate = 1e-2
[eval]
every = 2
samples = 2
exact_match = 3
max_new_tokens = 8
[checkpoint]
every = 2
keep_last = 1
"#;

/// A finished run that is run again writes its adapter anew. There is a moment when the old one has
/// made way already.
#[test]
fn a_kill_while_the_adapter_is_replaced() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let want = undisturbed(&folder);
    for point in ["checkpoint.begin", "checkpoint.file:2", "checkpoint.synced", REPLACING, "checkpoint.done"] {
        assert!(folder.run_killed_at("undisturbed", &["--resume"], point), "{point}");
        folder.run("undisturbed", &["--resume"]).expect(0);
        folder.result("undisturbed").expect_same(&want, point);
    }
}

/// Real SIGKILLs at random moments. How far a process gets depends on the machine, so its time
/// grows while it makes no progress.
#[test]
fn murder_changes_no_bit() {
    const TIME: Duration = Duration::from_secs(30);
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let longer = ["--resume", "--set", "train.max_steps=80", "--set", "checkpoint.every=3", "--set", "eval.every=7"];
    folder.run("undisturbed", &longer).expect(0);
    let want = folder.result("undisturbed");
    let mut random = Random::new();
    let (begin, mut kills, mut reached) = (Instant::now(), 0, 0);
    let mut window = Duration::from_millis(60);
    while begin.elapsed() < TIME {
        let mut running = start(&mut folder.command("run", &longer));
        let moment = Duration::from_micros(random.below(window.as_micros() as u64));
        if running.ends_within(moment) {
            running.wait().expect(0);
            break;
        }
        running.signal("KILL");
        let ended = running.wait();
        if ended.code == Some(0) {
            break;
        }
        assert_eq!(ended.signal, Some(9), "{ended:?}");
        kills += 1;
        let step = last_step(&folder, "run");
        if step <= reached {
            window = window.mul_f64(1.2);
        }
        reached = reached.max(step);
    }
    folder.run("run", &longer).expect(0);
    folder.result("run").expect_same(&want, &format!("{kills} kills, seed {}", random.seed));
    println!("{kills} kills, no bit differs (seed {})", random.seed);
}

/// The number of threads does not change the numbers.
#[test]
fn the_number_of_threads_changes_no_bit() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let want = undisturbed(&folder);
    for threads in ["1", "3"] {
        let output = format!("threads-{threads}");
        crate::program::run(folder.command(&output, &[]).env("RAYON_NUM_THREADS", threads)).expect(0);
        folder.result(&output).expect_same(&want, &format!("{threads} threads"));
    }
}

#[test]
fn resume_without_a_checkpoint_starts_fresh_and_says_so() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let want = undisturbed(&folder);
    folder.run("run", &["--resume"]).expect(0).says("no checkpoint in run/checkpoints: starting from the beginning");
    folder.result("run").expect_same(&want, "a fresh start");
}

#[test]
fn a_finished_run_resumed_is_left_as_it_is() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let want = undisturbed(&folder);
    for _ in 0..2 {
        folder.run("undisturbed", &["--resume"]).expect(0).says("step 10 was the last");
        folder.result("undisturbed").expect_same(&want, "a finished run");
    }
}

#[test]
fn an_occupied_directory_is_refused_untouched() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    // Once with a checkpoint and no result yet, once with the result.
    assert!(folder.run_killed_at("run", &[], "train.step:4"));
    for arguments in [["--resume"].as_slice(), &[]] {
        let before = crate::folder::tree(&folder.path("run"));
        folder.run("run", &[]).expect(2).says("run holds a run already");
        assert!(before == crate::folder::tree(&folder.path("run")), "something has changed");
        if !arguments.is_empty() {
            folder.run("run", arguments).expect(0);
        }
    }
}

/// A run with the checkpoints of steps 2, 4 and 6, killed in step 7.
fn three_checkpoints(folder: &Folder) {
    assert!(folder.run_killed_at("run", &KEEP_ALL, "train.step:7"));
    assert_eq!(folder.result("run").checkpoints(), ["step-000002", "step-000004", "step-000006"]);
}

const KEEP_ALL: [&str; 3] = ["--resume", "--set", "checkpoint.keep_last=9"];

#[test]
fn a_named_checkpoint_is_the_one_taken() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("undisturbed", &KEEP_ALL).expect(0);
    let want = folder.result("undisturbed");
    three_checkpoints(&folder);
    let path = folder.path("run/checkpoints/step-000002");
    let named = ["--resume", path.to_str().expect("UTF-8"), "--set", "checkpoint.keep_last=9"];
    let ended = folder.run("run", &named).expect(0).says("training steps 3 to 10");
    // The two later checkpoints are kept, under names that no later resume takes.
    for step in ["step-000004", "step-000006"] {
        let line = format!("run/checkpoints/{step} is kept aside as run/checkpoints/aside-{step}");
        assert!(ended.stderr.contains(&line), "{}", ended.stderr);
        std::fs::remove_dir_all(folder.path(&format!("run/checkpoints/aside-{step}"))).expect("it is there");
    }
    folder.result("run").expect_same(&want, "from step 2");
}

#[test]
fn a_named_checkpoint_that_is_torn_is_refused() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    three_checkpoints(&folder);
    let torn = folder.path("run/checkpoints/step-000006");
    std::fs::remove_file(torn.join("optimizer.safetensors")).expect("it is there");
    let named = ["--resume", torn.to_str().expect("UTF-8")];
    folder.run("run", &named).expect(2).says("optimizer.safetensors");
}

#[test]
fn a_torn_checkpoint_is_passed_over_and_named() {
    type Damage = fn(&Path);
    let cases: [(&str, Damage, &str); 6] = [
        ("a flipped bit", |path| flip_bit(&path.join("adapter_model.safetensors")), "adapter_model.safetensors"),
        ("a flipped bit", |path| flip_bit(&path.join("trainer_state.json")), "trainer_state.json"),
        ("a flipped bit", |path| flip_bit(&path.join("manifest.json")), "manifest.json"),
        ("a lost file", |path| remove(&path.join("optimizer.safetensors")), "optimizer.safetensors"),
        ("a lost manifest", |path| remove(&path.join("manifest.json")), "manifest.json"),
        ("a cut file", |path| cut(&path.join("optimizer.safetensors")), "optimizer.safetensors"),
    ];
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("undisturbed", &KEEP_ALL).expect(0);
    let want = folder.result("undisturbed");
    for (what, damage, file) in cases {
        let what = format!("{what}, {file}");
        three_checkpoints(&folder);
        damage(&folder.path("run/checkpoints/step-000006"));
        let ended = folder.run("run", &KEEP_ALL).expect(0);
        let line = ended.stderr.lines().find(|line| line.contains("step-000006 is passed over"));
        assert!(line.is_some_and(|line| line.contains(file)), "{what}: {}", ended.stderr);
        assert_eq!(resumed_from(&ended.stderr), 4, "{what}");
        std::fs::remove_dir_all(folder.path("run/checkpoints/aside-step-000006")).expect("kept aside");
        folder.result("run").expect_same(&want, &what);
        std::fs::remove_dir_all(folder.path("run")).expect("it is there");
    }
}

/// With `keep_last = 1` a torn newest checkpoint must not push out the good one before it.
#[test]
fn a_torn_checkpoint_is_not_one_of_those_to_keep() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let want = undisturbed(&folder);
    three_checkpoints(&folder);
    flip_bit(&folder.path("run/checkpoints/step-000006/optimizer.safetensors"));
    // The run is killed right after the next checkpoint was saved and the old ones were removed.
    assert!(folder.run_killed_at("run", &["--resume"], "train.step:3"));
    let ended = folder.run("run", &["--resume"]).expect(0);
    assert_eq!(resumed_from(&ended.stderr), 6);
    std::fs::remove_dir_all(folder.path("run/checkpoints/aside-step-000006")).expect("kept aside");
    folder.result("run").expect_same(&want, "keep_last = 1");
}

#[test]
fn with_every_checkpoint_torn_the_run_starts_from_the_beginning() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let want = undisturbed(&folder);
    assert!(folder.run_killed_at("run", &[], "train.step:4"));
    flip_bit(&folder.path("run/checkpoints/step-000002/adapter_model.safetensors"));
    let ended = folder.run("run", &["--resume"]).expect(0).says("step-000002 is passed over");
    assert_eq!(resumed_from(&ended.stderr), 0);
    std::fs::remove_dir_all(folder.path("run/checkpoints/aside-step-000002")).expect("kept aside");
    folder.result("run").expect_same(&want, "all torn");
}

fn flip_bit(path: &Path) {
    let mut bytes = std::fs::read(path).expect("a file");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path, bytes).expect("a file");
}

fn remove(path: &Path) {
    std::fs::remove_file(path).expect("a file");
}

fn cut(path: &Path) {
    let file = std::fs::OpenOptions::new().write(true).open(path).expect("a file");
    file.set_len(1000).expect("a file longer than that");
}

/// The card beside the tensors says what they were made of. It has no path and no time, so it is
/// the same everywhere.
#[test]
fn the_model_card_names_what_was_trained() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &[]).expect(0);
    let rows = metrics(&folder.path("run"));
    let eval = rows.iter().rev().find_map(|row| row.get("eval_loss")?.as_f64()).expect("an evaluation");
    for place in ["adapter", "checkpoints/step-000010"] {
        let card = std::fs::read_to_string(folder.path("run").join(place).join("README.md")).expect("a card");
        let eval = format!("{eval:.4} |\n");
        for part in [
            "base_model: \"model\"",
            "library_name: peft",
            "`train.jsonl`: 12 rows",
            "`eval.jsonl`",
            "after 10 steps",
            "lora.rank = 4",
            &eval,
        ] {
            assert!(card.contains(part), "{place} lacks {part:?}:\n{card}");
        }
        assert!(!card.contains(&*folder.path("").to_string_lossy()), "{place}: a path of this machine:\n{card}");
    }
}

/// Another number of steps is another curve of the learning rate. The run says so if the rate
/// jumps.
#[test]
fn a_longer_run_goes_on_along_another_curve() {
    let folder = Folder::with_recipe(&CRASH_RECIPE.replace("constant", "cosine"));
    folder.run("run", &[]).expect(0);
    let longer = ["--resume", "--set", "train.max_steps=20"];
    folder.run("run", &longer).expect(0).says("the learning rate goes on along another curve: step 10 had 1.2e-3");
    // The same number of steps again is no change.
    let ended = folder.run("run", &longer).expect(0);
    assert!(!ended.stderr.contains("another curve"), "{}", ended.stderr);
}
