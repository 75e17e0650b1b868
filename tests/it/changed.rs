//! A run goes on only with the settings, rows and weights that it was started with. Only what
//! changes no number may change.

use std::time::{Duration, SystemTime};

use finetune_recipe::keys::KEYS;

use crate::folder::{CRASH_RECIPE, Folder, golden, metrics, tree};
use crate::program::{Ended, start};

/// A folder with a run that was killed in step 5, with the checkpoint of step 4.
fn killed() -> Folder {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.write("template.jinja", b"{{ messages }}");
    assert!(folder.run_killed_at("run", &[], "train.step:5"));
    folder
}

fn resume(folder: &Folder, sets: &[&str]) -> Ended {
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    folder.run("run", &["--resume"].into_iter().chain(sets).collect::<Vec<_>>())
}

/// Keys that fix the numbers of a run, each with another value than the run was started with.
const FIXED: &[(&str, &str)] = &[
    ("seed", "8"),
    ("model.device", "cpu"),
    ("model.dtype", "f32"),
    ("model.quantization", "nf4"),
    ("lora.rank", "5"),
    ("lora.alpha", "9"),
    ("lora.dropout", "0.2"),
    ("lora.target_modules", "[\"q_proj\"]"),
    ("lora.use_rslora", "true"),
    ("lora.rank_pattern", "{ q_proj = 2 }"),
    ("lora.alpha_pattern", "{ q_proj = 2.0 }"),
    ("lora.layers_to_transform", "[1]"),
    ("lora.init_from", "start"),
    ("data.format", "tokens"),
    ("data.max_seq_len", "64"),
    ("data.overlong", "drop"),
    ("data.packing", "true"),
    ("lora.use_dora", "true"),
    ("lora.modules_to_save", "[\"lm_head\"]"),
    ("data.train_on", "all"),
    ("data.chat_template_kwargs", "{ enable_thinking = false }"),
    ("data.shuffle", "false"),
    ("train.global_batch_size", "6"),
    ("optimizer.betas", "[0.9, 0.99]"),
    ("optimizer.eps", "1e-7"),
    ("optimizer.weight_decay", "0.1"),
    ("schedule.name", "linear"),
    ("schedule.warmup_steps", "1"),
    ("schedule.warmup_ratio", "0.1"),
    ("schedule.min_lr_ratio", "0.1"),
    // The model has no experts: any other value is refused before anything else.
    ("train.router_aux_loss_coef", "0"),
    ("distributed.sync_every", "2"),
    ("distributed.wire", "bf16"),
];

/// Keys that may change on a resume, with other values, and what is said then.
const MAY_CHANGE: &[(&str, &str, &str)] = &[
    ("optimizer.learning_rate", "1e-3", "optimizer.learning_rate is 0.001 from here on; it was 0.05"),
    ("train.max_grad_norm", "0.5", "train.max_grad_norm is 0.5 from here on; it was 1.0"),
    ("train.micro_batch_size", "1", "train.micro_batch_size is 1 from here on; it was 2"),
    ("eval.early_stopping_patience", "9", "eval.early_stopping_patience is 9 from here on; it was none"),
];

/// Keys of the digest without a second value that could be tried here, and why.
const NOT_TRIED: &[(&str, &str)] = &[
    ("data.chat_template", "needs a tokenizer; the next test changes what it does"),
    ("train.method", "the recipe's [lora] is refused with `full` before anything else"),
    ("lora.experts", "the model has none: refused before anything else"),
    ("optimizer.name", "there is one"),
    ("distributed.virtual_ranks", "not available yet"),
    ("distributed.outer_learning_rate", "refused without sync_every before anything else"),
    ("distributed.outer_momentum", "refused without sync_every before anything else"),
];

#[test]
fn a_changed_key_is_refused_by_name() {
    let folder = killed();
    // The run did not start from an adapter.
    folder.run("other", &["--set", "train.max_steps=1"]).expect(0);
    std::fs::rename(folder.path("other/adapter"), folder.path("start")).expect("an adapter");
    let before = tree(&folder.path("run"));
    for (key, value) in FIXED {
        let ended = resume(&folder, &[&format!("{key}={value}")]).expect(2);
        let line = ended.stderr.lines().find(|line| line.trim_start().starts_with(&format!("{key}: ")));
        assert!(line.is_some_and(|line| line.contains("the checkpoint has")), "{key}:\n{}", ended.stderr);
        assert!(ended.stderr.contains("cannot be resumed with this recipe"), "{key}:\n{}", ended.stderr);
        assert!(before == tree(&folder.path("run")), "{key}: the refusal has changed the run directory");
    }
    resume(&folder, &[]).expect(0);
}

/// A key that joins the digest must join one of the two lists.
#[test]
fn every_key_of_the_digest_is_tried() {
    let may_change = MAY_CHANGE.iter().map(|(key, ..)| *key);
    let tried: Vec<&str> = FIXED.iter().chain(NOT_TRIED).map(|(key, _)| *key).chain(may_change).collect();
    for key in KEYS.iter().filter(|key| key.in_digest) {
        assert!(tried.contains(&key.path), "{} is in the digest and in no list of this test", key.path);
    }
    for path in tried {
        assert!(KEYS.iter().any(|key| key.path == path && key.in_digest), "{path} is not in the digest");
    }
}

#[test]
fn changed_rows_and_weights_are_refused_by_name() {
    let swapped_lines = |bytes: &[u8]| {
        let mut lines: Vec<&[u8]> = bytes.split_inclusive(|byte| *byte == b'\n').collect();
        lines.swap(0, 1);
        lines.concat()
    };
    let flipped_bit = |bytes: &[u8]| {
        // The last byte belongs to a weight, not to the header.
        let mut bytes = bytes.to_vec();
        *bytes.last_mut().expect("a byte") ^= 1;
        bytes
    };
    let other_norm = |bytes: &[u8]| {
        let text = String::from_utf8(bytes.to_vec()).expect("JSON").replace("1e-06", "1e-05");
        assert!(text.as_bytes() != bytes);
        text.into_bytes()
    };
    let one_label_less = |bytes: &[u8]| {
        let text = String::from_utf8(bytes.to_vec()).expect("JSON").replacen("75, 66, 73", "-100, 66, 73", 2);
        // The first occurrence is in input_ids, where it must stay as it was.
        text.replacen("29, -100, 66", "29, 75, 66", 1).into_bytes()
    };
    type Change<'a> = &'a dyn Fn(&[u8]) -> Vec<u8>;
    let cases: [(&str, Change, &str); 6] = [
        ("train.jsonl", &swapped_lines, "data.train: the rows have changed"),
        ("train.jsonl", &one_label_less, "data.train: the rows have changed"),
        ("train.jsonl", &|_| std::fs::read(golden("qwen2/rows.jsonl")).expect("rows"), "data.train: the rows"),
        ("eval.jsonl", &swapped_lines, "data.eval: the rows have changed"),
        ("model/model.safetensors", &flipped_bit, "model.path: the weights or config.json have changed"),
        ("model/config.json", &other_norm, "model.path: the weights or config.json have changed"),
    ];
    let folder = killed();
    let before = tree(&folder.path("run"));
    for (file, change, message) in cases {
        let original = std::fs::read(folder.path(file)).expect("a file");
        folder.write(file, &change(&original));
        resume(&folder, &[]).expect(2).says(message);
        assert!(before == tree(&folder.path("run")), "{file}: the refusal has changed the run directory");
        folder.write(file, &original);
    }
    resume(&folder, &[]).expect(0);
}

/// Layers are read from a file that is written over in the middle of a run. With the file as it was, the run goes on
/// from its checkpoint to the bits of one that nothing disturbed.
#[test]
fn weights_that_change_during_a_run_are_refused_by_name() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let weights = folder.path("model/model.safetensors");
    let original = std::fs::read(&weights).expect("the weights");
    let mut other = original.clone();
    *other.last_mut().expect("a byte") ^= 1;
    // Some systems know times by a few milliseconds only.
    let file = std::fs::OpenOptions::new().write(true).open(&weights).expect("the weights");
    file.set_modified(SystemTime::now() - Duration::from_secs(60)).expect("an earlier time");

    let disk = ["--set", "model.residency=disk", "--set", "eval.every=0"];
    let keep = ["--set", "checkpoint.keep_best=false", "--set", "train.max_steps=10000000"];
    let mut running = start(&mut folder.command("run", &[disk, keep].concat()));
    running.wait_until("a few steps", |_| {
        std::fs::read_to_string(folder.path("run/metrics.jsonl")).is_ok_and(|text| text.lines().count() > 5)
    });
    folder.write("model/model.safetensors", &other);
    let ended = running.wait().expect(2);
    let ended = ended.says("model.safetensors was changed while it was in use").says("--resume");
    assert!(!folder.path("run/adapter").exists(), "a run that is not done has no result: {}", ended.stderr);

    let newest = folder.result("run").checkpoints().last().expect("a checkpoint").clone();
    let done: u64 = newest.strip_prefix("step-").and_then(|step| step.parse().ok()).expect("a step");
    let steps = format!("train.max_steps={}", done + 3);
    let sets = [disk.as_slice(), &["--set", "checkpoint.keep_best=false", "--set", steps.as_str()]].concat();
    let resumed = [["--resume"].as_slice(), &sets].concat();
    folder.run("run", &resumed).expect(2).says("model.path: the weights or config.json have changed");
    folder.write("model/model.safetensors", &original);
    folder.run("run", &resumed).expect(0).says(&format!("(step {done})"));
    folder.run("undisturbed", &sets).expect(0);
    folder.result("run").expect_same(&folder.result("undisturbed"), "written over");
}

/// The next checkpoint has the new value. The same command goes on, and the command with the old
/// value is told of the change.
#[test]
fn what_may_change_is_named() {
    for (key, value, notice) in MAY_CHANGE {
        let folder = killed();
        let set = format!("{key}={value}");
        let sets = ["--resume", "--set", &set];
        assert!(folder.run_killed_at("run", &sets, "train.step:4"), "{key}");
        let again = resume(&folder, &[&set]).expect(0);
        assert!(!again.stderr.contains("from here on"), "{key}: {}", again.stderr);
        let folder = killed();
        let ended = resume(&folder, &[&set]).expect(0).says(notice).says("(step 4)");
        assert_eq!(metrics(&folder.path("run")).last().expect("a row")["step"], 10, "{key}: {}", ended.stderr);
        resume(&folder, &[]).expect(0).says(&format!("{key} is "));
    }
}

/// The size of micro-batches changes nothing but rounding.
#[test]
fn a_smaller_micro_batch_goes_on_to_the_same_losses() {
    let folder = killed();
    folder.run("undisturbed", &[]).expect(0);
    resume(&folder, &["train.micro_batch_size=1"]).expect(0);
    let losses = |output: &str| -> Vec<f64> {
        metrics(&folder.path(output)).iter().filter_map(|row| row["loss"].as_f64()).collect()
    };
    for (one, other) in losses("run").iter().zip(losses("undisturbed")) {
        assert!((one - other).abs() < 1e-2 * other, "{one} {other}");
    }
}

/// A run that early stopping has ended says so, and goes on with more patience.
#[test]
fn early_stopping_can_be_told_to_go_on() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let sets = ["--set", "eval.early_stopping_patience=1", "--set", "train.max_steps=40"];
    folder.run("run", &sets).expect(0);
    let last = || metrics(&folder.path("run")).last().expect("a row")["step"].as_u64().expect("a number");
    let stopped = last();
    assert!(stopped < 40, "the learning rate is far too high");
    let resumed: Vec<&str> = ["--resume"].iter().chain(&sets).copied().collect();
    folder.run("run", &resumed).expect(0).says(&format!("early stopping has ended this run after step {stopped}"));
    assert_eq!(last(), stopped);
    let patient = ["--resume", "--set", "eval.early_stopping_patience=30", "--set", "train.max_steps=40"];
    folder.run("run", &patient).expect(0);
    assert_eq!(last(), 40);
}

#[test]
fn what_changes_no_number_may_change() {
    for set in [
        "log.every=5",
        "checkpoint.every=3",
        "checkpoint.keep_last=5",
        "checkpoint.keep_best=false",
        "eval.every=5",
        "train.max_steps=12",
        "distributed.timeout=9s",
    ] {
        let folder = killed();
        resume(&folder, &[set]).expect(0).says("(step 4)");
        let last = metrics(&folder.path("run")).last().expect("a row")["step"].as_u64();
        assert_eq!(last, Some(if set == "train.max_steps=12" { 12 } else { 10 }), "{set}");
    }
}

#[test]
fn a_run_directory_may_move() {
    let folder = killed();
    folder.run("undisturbed", &[]).expect(0);
    std::fs::rename(folder.path("run"), folder.path("moved")).expect("a directory");
    folder.run("moved", &["--resume"]).expect(0).says("(step 4)");
    folder.result("moved").expect_same(&folder.result("undisturbed"), "moved");
}

#[test]
fn fewer_steps_than_are_done_are_refused() {
    resume(&killed(), &["train.max_steps=3"]).expect(2).says("step 4 is past the last step of the recipe, 3");
}
