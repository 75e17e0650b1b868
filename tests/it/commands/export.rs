//! `finetune export`: the model that it writes, and what it never replaces.

use serde_json::Value;

use super::{chat_model, json_of, loss};
use crate::folder::{CRASH_RECIPE, Folder, tree};
use crate::program::{finetune, start};

/// Three ways to the same model: base and adapter, the run merged, base and adapter merged.
#[test]
fn a_merged_model_is_base_and_adapter() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &[]).expect(0);
    let with_adapter = loss(&folder, &["model", "--adapter", "run/adapter"]);
    let base = loss(&folder, &["model"]);
    assert!((with_adapter - base).abs() > 1e-2, "the adapter does something: {base} and {with_adapter}");
    let ways: [(&str, &[&str]); 3] = [
        ("from-run", &["run"]),
        ("from-checkpoint", &["run/checkpoints/step-000010"]),
        ("from-model", &["model", "--adapter", "run/adapter"]),
    ];
    for (output, source) in ways {
        let arguments = [&["export"], source, &["--format", "merged", "--output", output]].concat();
        let ended = folder.finetune(&arguments).expect(0);
        assert!(ended.stdout.starts_with("merged and adapter agree: "), "{}", ended.stdout);
        assert!(ended.stdout.contains("largest difference of logits"), "{}", ended.stdout);
        let merged = loss(&folder, &[output]);
        assert!((merged - with_adapter).abs() < 1e-5, "{output}: {merged} against {with_adapter}");
    }
    let names: Vec<String> = tree(&folder.path("from-run")).into_keys().collect();
    assert_eq!(names, ["config.json", "manifest.json", "model.safetensors"]);
}

/// The export has the weights without the files that only the run needs. There is no adapter to
/// export.
#[test]
fn export_of_a_run_that_trained_all_weights() {
    let folder = chat_model();
    folder.finetune(&["export", "run", "--format", "merged", "--output", "out"]).expect(0);
    let names: Vec<String> = tree(&folder.path("out")).into_keys().collect();
    assert!(names.contains(&"model.safetensors".to_owned()), "{names:?}");
    assert!(!names.iter().any(|name| name.starts_with("optimizer") || name.starts_with("trainer_state")), "{names:?}");
    let answer =
        |model: &str| json_of(&folder, &["generate", model, "--prompt", "Hi", "--max-new-tokens", "8", "--json"]);
    assert_eq!(answer("out")["text"], answer("run")["text"]);
    folder.finetune(&["export", "run", "--format", "peft", "--output", "p"]).expect(2).says("all weights were trained");
}

/// The run's best evaluation is not its last (`CRASH_RECIPE`).
#[test]
fn export_of_the_best_checkpoint() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &[]).expect(0);
    let state =
        std::fs::read_to_string(folder.path("run/checkpoints/step-000010/trainer_state.json")).expect("a state");
    let best = serde_json::from_str::<Value>(&state).expect("JSON")["best"]["step"].as_u64().expect("a step");
    let export = |more: &[&str], output: &str| {
        folder.finetune(&[&["export", "run", "--format", "peft", "--output", output], more].concat()).expect(0)
    };
    export(&[], "last").says(&format!("step {best} had the best evaluation")).says("--best");
    export(&["--best"], "best").says("the best evaluation");
    let tensors = |path: &str| std::fs::read(folder.path(path).join("adapter_model.safetensors")).expect("tensors");
    assert!(tensors("best") == tensors(&format!("run/checkpoints/step-{best:06}")));
    assert!(tensors("last") == tensors("run/checkpoints/step-000010"));
}

/// Only an earlier export is replaced: no checkpoint, no run's result, and nothing that the export
/// reads.
#[test]
fn export_never_takes_the_place_of_a_run() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &[]).expect(0);
    let before = tree(&folder.path("run"));
    for output in ["run", "run/adapter", "run/checkpoints", "run/checkpoints/step-000010"] {
        for format in ["peft", "merged"] {
            folder.finetune(&["export", "run", "--format", format, "--output", output]).expect(2);
            assert!(before == tree(&folder.path("run")), "{format} {output}");
        }
    }
    folder.finetune(&["export", "run", "--format", "merged", "--output", "out"]).expect(0);
    folder
        .finetune(&["export", "run", "--format", "peft", "--output", "out"])
        .expect(2)
        .says("a merged model of finetune");
    let onto_itself = ["export", "out", "--adapter", "run", "--format", "merged", "--output", "out", "--force"];
    folder.finetune(&onto_itself).expect(2).says("which the export reads");
}

/// A link in a model that came from elsewhere may lead to any file of this machine.
#[test]
fn export_follows_no_link_out_of_the_model() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &[]).expect(0);
    folder.write("id_rsa", b"secret");
    std::os::unix::fs::symlink(folder.path("id_rsa"), folder.path("model/chat_template.jinja")).expect("a link");
    folder.finetune(&["export", "run", "--format", "merged", "--output", "out"]).expect(2).says("chat_template.jinja");
    assert!(!folder.path("out").exists());
}

/// A signal leaves a whole export or nothing, whenever it comes.
#[test]
fn an_interrupted_export_leaves_nothing() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &[]).expect(0);
    std::fs::create_dir(folder.path("exports")).expect("a new directory");
    for (n, signal) in ["INT", "TERM", "HUP"].iter().cycle().take(30).enumerate() {
        let arguments = ["export", "run", "--format", "merged", "--output", "exports/out", "--quiet"];
        let mut running = start(finetune(arguments).current_dir(folder.path("")));
        if !running.ends_within(std::time::Duration::from_millis(2 * n as u64)) {
            running.signal(signal);
        }
        let ended = running.wait();
        let names: Vec<_> = std::fs::read_dir(folder.path("exports"))
            .expect("a directory")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        assert!(names.iter().all(|name| name == "out"), "{signal} after {} ms: {names:?} {ended:?}", 2 * n);
    }
    folder.finetune(&["export", "run", "--format", "merged", "--output", "exports/out"]).expect(0);
}

#[test]
fn export_of_the_adapter_alone() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &[]).expect(0);
    folder.finetune(&["export", "run", "--format", "peft", "--output", "out"]).expect(0);
    let (run, out) = (tree(&folder.path("run/adapter")), tree(&folder.path("out")));
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        assert!(run[name] == out[name], "{name}");
    }
    // An export replaces its own files.
    folder.finetune(&["export", "run", "--format", "peft", "--output", "out"]).expect(0);
    assert!(out == tree(&folder.path("out")));
}

#[test]
fn export_never_replaces_what_it_did_not_write() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &[]).expect(0);
    for format in ["merged", "peft"] {
        let export = ["export", "run", "--format", format, "--output", "out"];
        folder.finetune(&export).expect(0);
        folder.write("out/thesis.txt", b"ten years of work");
        let before = tree(&folder.path("out"));
        folder.finetune(&export).expect(2).says("thesis.txt");
        assert!(before == tree(&folder.path("out")), "{format}");
        std::fs::remove_dir_all(folder.path("out")).expect("it is there");
    }
    // The base model's own directory is not replaced either.
    let before = tree(&folder.path("model"));
    folder.finetune(&["export", "run", "--format", "merged", "--output", "model"]).expect(2);
    assert!(before == tree(&folder.path("model")));
}
