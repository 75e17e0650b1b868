//! A run takes no directory that is not its own. It goes on in the directory where it lies, and
//! says what it was given.

use std::path::Path;

use crate::folder::{CRASH_RECIPE, Folder, metrics, tree};
use crate::program::run;

fn copy(from: &Path, to: &Path) {
    for (name, bytes) in tree(from) {
        let path = to.join(name);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a new directory");
        std::fs::write(path, bytes).expect("a file in a temporary directory");
    }
}

/// (output_dir, part of what is said)
#[test]
fn places_with_something_of_the_users_are_refused_untouched() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    std::fs::create_dir_all(folder.path("notes")).expect("a new directory");
    folder.write("notes/report.html", b"<p>mine</p>");
    std::fs::create_dir_all(folder.path("empty")).expect("a new directory");
    let before = tree(&folder.path(""));
    for (output, what) in [
        (".", "recipe.toml is the recipe itself"),
        ("model", "is the directory of the base model"),
        ("model/run", "lies in the directory of the base model"),
        ("notes", "is not empty and holds no run of finetune: it has `report.html`"),
        ("train.jsonl", "is a file"),
    ] {
        for resume in [&[][..], &["--resume"]] {
            let ended = folder.run(output, resume).expect(2).says(what).says("such as output_dir = \"runs/NAME\"");
            assert!(before == tree(&folder.path("")), "{output}: {}", ended.stderr);
        }
        let validated = folder.finetune(&["validate", "recipe.toml", "--set", &format!("output_dir={output}")]);
        validated.expect(2).says(what);
    }
    folder.run("empty", &["--set", "train.max_steps=1"]).expect(0);
}

/// A run goes on in the directory that its recipe lies in, not in the one that it was copied from.
#[test]
fn a_copied_run_goes_on_in_the_copy() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("undisturbed", &[]).expect(0);
    assert!(folder.run_killed_at("run", &[], "train.step:6"));
    let before = tree(&folder.path("run"));
    for (name, argument) in [("one", "one/recipe.toml"), ("two", "two")] {
        copy(&folder.path("run"), &folder.path(name));
        folder.finetune(&["run", argument, "--resume"]).expect(0).says("(step 4)");
        folder.result(name).expect_same(&folder.result("undisturbed"), argument);
        assert!(before == tree(&folder.path("run")), "{argument}: the original was written to");
    }
    folder.finetune(&["run", "two"]).expect(2).says("two holds a run already");
}

/// What a person has written into the run's recipe is not lost.
#[test]
fn words_in_a_runs_recipe_are_kept() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    assert!(folder.run_killed_at("run", &[], "train.step:6"));
    let text = std::fs::read_to_string(folder.path("run/recipe.toml")).expect("the recipe") + "# rank 8 was worse\n";
    folder.write("run/recipe.toml", text.as_bytes());
    folder.finetune(&["run", "run", "--resume"]).expect(0).says("aside-recipe.toml");
    assert_eq!(std::fs::read_to_string(folder.path("run/aside-recipe.toml")).expect("kept"), text);
}

#[test]
fn a_finished_result_without_checkpoints_is_not_replaced() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &[]).expect(0);
    std::fs::remove_dir_all(folder.path("run/checkpoints")).expect("checkpoints");
    let before = tree(&folder.path("run"));
    for more in [&[][..], &["--set", "seed=9"]] {
        let arguments: Vec<&str> = ["--resume"].iter().chain(more).copied().collect();
        let ended = folder.run("run", &arguments).expect(2).says("run/adapter is the result of a run");
        ended.says("`--output-dir` with another name").says("move or remove run/adapter first");
        assert!(before == tree(&folder.path("run")), "something has changed");
    }
    std::fs::remove_dir_all(folder.path("run/adapter")).expect("a result");
    folder.run("run", &["--resume", "--set", "seed=9"]).expect(0).says("starting from the beginning");
}

/// The best evaluation's parameters become the result if the run stops early or if the recipe asks
/// for them.
#[test]
fn the_best_is_the_result() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let adapter =
        |place: &str| std::fs::read(folder.path(place).join("adapter_model.safetensors")).expect("an adapter");
    let state = |path: &Path| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(path.join("trainer_state.json")).expect("a state")).expect("JSON")
    };
    for (output, sets) in [
        ("asked", &["--set", "checkpoint.result=best", "--set", "checkpoint.keep_best=false"][..]),
        ("early", &["--set", "eval.early_stopping_patience=2"]),
        ("last", &["--set", "eval.early_stopping_patience=2", "--set", "checkpoint.result=last"]),
    ] {
        folder.run(output, sets).expect(0);
        let newest = folder.result(output).checkpoints().pop().expect("a checkpoint");
        let newest = format!("{output}/checkpoints/{newest}");
        let best = state(&folder.path(&newest))["best"]["step"].as_u64().expect("a best one");
        let best = format!("{output}/checkpoints/step-{best:06}");
        assert_ne!(best, newest, "the learning rate is far too high");
        let want = if output == "last" { &newest } else { &best };
        assert!(adapter(&format!("{output}/adapter")) == adapter(want), "{output}: not {want}");
        // A resume publishes the same result again, also after a kill in the middle of it.
        let before = folder.result(output);
        let resume: Vec<&str> = ["--resume"].iter().chain(sets).copied().collect();
        assert!(folder.run_killed_at(output, &resume, "replace.aside"));
        folder.run(output, &resume).expect(0);
        folder.result(output).expect_same(&before, output);
    }
    // If the best checkpoint is gone, no other one is handed out in its place.
    let best = folder.result("asked").checkpoints().remove(0);
    std::fs::remove_dir_all(folder.path("asked/checkpoints").join(&best)).expect("the best checkpoint");
    folder
        .run("asked", &["--resume", "--set", "checkpoint.result=best"])
        .expect(2)
        .says(&best)
        .says("checkpoint.result=last");
    folder.run("asked", &["--resume", "--set", "checkpoint.result=last"]).expect(0);
}

/// The command that is offered after numbers that are not finite works as it stands.
#[test]
fn the_way_on_after_a_divergence_works() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let quiet = ["--set", "eval.every=0", "--set", "checkpoint.every=1", "--set", "checkpoint.keep_last=9"];
    let with = |more: &[&'static str]| quiet.iter().chain(more).copied().collect::<Vec<&str>>();
    folder.run("run", &with(&["--set", "train.max_steps=4", "--set", "optimizer.learning_rate=1e-4"])).expect(0);
    let wild = ["--resume", "--set", "optimizer.learning_rate=1e30", "--set", "train.max_grad_norm=0"];
    let ended = folder.run("run", &with(&wild)).expect(4);
    assert!(folder.path("run/checkpoints/step-000005").is_dir(), "saved with the numbers that go wrong in step 6");
    let line = ended
        .stderr
        .lines()
        .find(|line| line.contains("step 4 is from before that"))
        .unwrap_or_else(|| panic!("{}", ended.stderr));
    let (_, command) = line.split_once(": finetune ").expect("a command");
    let words: Vec<&str> = command.split(' ').collect();
    folder.finetune(&words).expect(0).says("going on from").says("optimizer.learning_rate is");
    let last = metrics(&folder.path("run")).last().expect("a row")["step"].as_u64();
    assert_eq!(last, Some(10));
}

/// What people give to `--resume`: (argument, exit code, part of what is said)
#[test]
fn arguments_of_resume() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &[]).expect(0);
    copy(&folder.path("run/adapter"), &folder.path("plain"));
    std::fs::remove_file(folder.path("plain/manifest.json")).expect("a manifest");
    for (argument, code, what) in [
        ("run", 0, "run/checkpoints/step-000010 (step 10)"),
        ("run/checkpoints", 0, "run/checkpoints/step-000010 (step 10)"),
        ("run/checkpoints/step-000010", 0, "going on from run/checkpoints/step-000010"),
        ("run/adapter", 2, "lora.init_from = \"run/adapter\""),
        ("plain", 2, "lora.init_from = \"plain\""),
        ("recipe.toml", 2, "the recipe comes first: finetune run recipe.toml --resume"),
        ("model", 2, "model.path = \"model\""),
        ("run/checkpoints/step-000010/optimizer.safetensors", 2, "is meant: run/checkpoints/step-000010"),
        ("latest", 2, "`--resume` alone takes the newest of other/checkpoints, which has none yet"),
    ] {
        let ended = folder.run("other", &["--resume", argument]).expect(code).says(what);
        assert!(code == 0 || !folder.path("other").exists(), "{argument}: {}", ended.stderr);
        if code == 0 {
            std::fs::remove_dir_all(folder.path("other")).expect("a run");
        }
    }
    folder.run("run", &["--resume", "run/checkpoints/step-000100"]).expect(2).says("run/checkpoints has step-000010");
}

/// A directory that has the name of a checkpoint but is none is passed over. The run goes on from
/// the one before it.
#[test]
fn what_is_no_checkpoint_is_passed_over() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let keep = ["--set", "checkpoint.keep_last=9"];
    folder.run("undisturbed", &keep).expect(0);
    for (place, from, why) in [
        ("step-000006", "run/adapter", "calls it `adapter`"),
        ("step-000006", "run/checkpoints/step-000002", "its manifest is of step 2"),
    ] {
        folder.run("run", &keep).expect(0);
        for step in ["step-000006", "step-000008", "step-000010"] {
            std::fs::remove_dir_all(folder.path("run/checkpoints").join(step)).expect("a checkpoint");
        }
        copy(&folder.path(from), &folder.path("run/checkpoints").join(place));
        let resume: Vec<&str> = ["--resume"].iter().chain(&keep).copied().collect();
        folder.run("run", &resume).expect(0).says("step-000006 is passed over").says(why).says("(step 4)");
        std::fs::remove_dir_all(folder.path("run/checkpoints/aside-step-000006")).expect("kept aside");
        folder.result("run").expect_same(&folder.result("undisturbed"), from);
        std::fs::remove_dir_all(folder.path("run")).expect("a run");
    }
}

#[test]
fn a_damaged_line_of_the_metrics_is_said_and_kept() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    assert!(folder.run_killed_at("run", &[], "train.step:6"));
    let path = folder.path("run/metrics.jsonl");
    let text = std::fs::read_to_string(&path).expect("metrics");
    let damaged = text.replacen("\"loss\"", "\"l\u{0}ss\"", 1);
    let line = 1 + text.lines().position(|line| line.contains("\"loss\"")).expect("a row");
    folder.write("run/metrics.jsonl", damaged.as_bytes());
    let ended = folder.run("run", &["--resume"]).expect(0).says(&format!("run/metrics.jsonl:{line} cannot be read"));
    ended.says("has no rows of step 1");
    assert_eq!(std::fs::read_to_string(folder.path("run/aside-metrics.jsonl")).expect("kept"), damaged);
    // The file is removed.
    std::fs::remove_file(&path).expect("metrics");
    folder.run("run", &["--resume"]).expect(0).says("has no rows of steps 1 to 10");
}

/// `validate` says everything that is wrong at once, for people and for programs.
#[test]
fn validate_lists_every_problem() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let sets =
        ["--set", "data.train=none.jsonl", "--set", "lora.target_modules=[\"c_attn\"]", "--set", "output_dir=model"];
    let ended = folder.finetune(&[&["validate", "recipe.toml"], &sets[..]].concat()).expect(2);
    let json = folder.finetune(&[&["validate", "recipe.toml", "--json"], &sets[..]].concat()).expect(2);
    let problems = json.json()["problems"].as_array().expect("a list").clone();
    assert_eq!(problems.len(), 3, "{problems:?}");
    for (problem, part) in problems.iter().zip(["base model", "none.jsonl", "c_attn"]) {
        assert!(problem["message"].as_str().expect("text").contains(part), "{problem}");
        assert!(ended.stderr.contains(part), "{}", ended.stderr);
    }
    assert_eq!(json.stderr, "");
}

/// Values that no run can have: `validate` and `run` say the same, and name the key.
#[test]
fn settings_that_no_run_can_have() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    for (set, what) in [
        ("distributed.timeout=1ms", "too short to tell a slow rank from a lost one"),
        ("distributed.virtual_ranks=9223372036854775807", "distributed.virtual_ranks"),
        ("train.micro_batch_size=9223372036854775807", "train.micro_batch_size"),
        ("lora.rank=9223372036854775807", "lora.rank"),
        ("log.prometheus=256.1.1.1:1", "log.prometheus"),
    ] {
        folder.finetune(&["validate", "recipe.toml", "--set", set]).expect(2).says(what);
        folder.run("run", &["--set", set]).expect(2).says(what);
    }
}

/// A base model with a weight that is no number.
#[test]
fn a_weight_that_is_no_number_is_named() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let path = folder.path("model/model.safetensors");
    let mut bytes = std::fs::read(&path).expect("a model");
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let tensors: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).expect("a header");
    let norm = &tensors["model.norm.weight"];
    let begin = 8 + header + norm["data_offsets"][0].as_u64().expect("an offset") as usize;
    let nan: &[u8] = if norm["dtype"] == "F32" { &[0, 0, 0xc0, 0x7f] } else { &[0xff, 0x7f] };
    bytes[begin..begin + nan.len()].copy_from_slice(nan);
    folder.write("model/model.safetensors", &bytes);
    folder.finetune(&["validate", "recipe.toml"]).expect(2).says("`model.norm.weight`");
}

/// A template writes the day of the first start, also after a resume on another day.
#[test]
fn a_run_goes_on_on_another_day() {
    let folder = Folder::with_chat_model(DATED);
    let template = "{{ strftime_now('%d %b %Y') }}\n{% for message in messages %}<|{{ message.role }}|>\n\
                    {{ message.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}";
    folder.write("date.jinja", template.as_bytes());
    let row = "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}, {\"role\": \"assistant\", \"content\": \"Hello\"}]}\n";
    folder.write("train.jsonl", row.repeat(4).as_bytes());
    // One of these two time zones is always a day ahead of the other.
    let [ahead, behind] = ["Pacific/Kiritimati", "Etc/GMT+12"];
    let at = |zone: &str, output: &str, more: &[&str]| run(folder.command(output, more).env("TZ", zone));
    at(ahead, "run", &["--set", "train.max_steps=2"]).expect(0);
    at(behind, "run", &["--resume"]).expect(0).says("(step 2)");
    at(ahead, "whole", &[]).expect(0);
    folder.result("run").expect_same(&folder.result("whole"), "two days");
    // With a date in the recipe, the day of the start does not matter.
    for (zone, output) in [(ahead, "one"), (behind, "two")] {
        at(zone, output, &["--set", "data.date=2024-02-29"]).expect(0);
    }
    folder.result("one").expect_same(&folder.result("two"), "a date of the recipe");
}

const DATED: &str = r#"
[model]
path = "model"
[data]
train = "train.jsonl"
chat_template = "date.jinja"
[train]
method = "full"
max_steps = 4
global_batch_size = 2
[schedule]
name = "constant"
[checkpoint]
every = 1
keep_last = 9
"#;
