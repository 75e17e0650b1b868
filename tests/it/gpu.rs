//! The main job on a GPU, or on a software renderer if there is no GPU. It runs only with
//! `FINETUNE_TEST_DEVICE=gpu`, in a build with a GPU backend.

use finetune_model::HAS_GPU_BACKEND;
use serde_json::{Value, json};

use crate::commands::serve::{ask, serve_on};
use crate::folder::{CRASH_RECIPE, Folder};
use crate::memory::{LARGER_RECIPE, expect_estimates, larger_model, peak};
use crate::program::{finetune, run};

/// Whether GPU tests are asked for. If not, says so.
fn asked() -> bool {
    let asked = std::env::var("FINETUNE_TEST_DEVICE").as_deref() == Ok("gpu");
    if !asked {
        println!("SKIPPED: FINETUNE_TEST_DEVICE is not gpu");
    }
    asked
}

const GPU: [&str; 2] = ["--set", "model.device=gpu"];

fn losses(folder: &Folder, name: &str, key: &str) -> Vec<f64> {
    let text = std::fs::read_to_string(folder.path(name).join("metrics.jsonl")).expect("metrics");
    text.lines().filter_map(|line| serde_json::from_str::<Value>(line).expect("JSON")[key].as_f64()).collect()
}

fn expect_close(what: &str, got: &[f64], want: &[f64], bound: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (n, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() < bound * want.abs(), "{what} {n}: {got} against {want}");
    }
}

#[test]
fn devices_are_listed() {
    let text = run(&mut finetune(["devices"])).expect(0).stdout;
    assert!(text.lines().any(|line| line.starts_with("CPU ") && line.ends_with("f32")), "{text}");
    assert!(text.contains("; products: f32 by "), "{text}");
    let lines = run(&mut finetune(["devices", "--json"])).expect(0).stdout;
    let devices: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(devices.last().expect("the CPU")["kind"], "cpu");
    assert!(devices.last().expect("the CPU")["products"]["f32"].is_string(), "{lines}");
    if asked() {
        assert_ne!(devices[0]["kind"], "cpu");
        assert!(devices[0]["types"].as_array().expect("types").contains(&"f32".into()), "{lines}");
    }
}

#[test]
fn a_build_without_a_gpu_backend_says_how_to_get_one() {
    if HAS_GPU_BACKEND {
        return;
    }
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let ended = folder.run("run", &GPU).expect(2).says("this program was built without a GPU backend");
    ended.says("cargo build --release --features gpu");
}

/// Train, stop, resume, evaluate, generate and merge, as on the CPU. A resumed run has the same
/// bits.
#[test]
fn the_whole_job() {
    if !asked() {
        return;
    }
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let steady = ["--set", "optimizer.learning_rate=1e-3", "--set", "train.max_steps=6"];
    let on_gpu = [&GPU[..], &steady].concat();
    folder.run("cpu", &[&["--set", "model.device=cpu"], &steady[..]].concat()).expect(0);
    folder.run("gpu", &on_gpu).expect(0).says("peak memory of the GPU");
    expect_close("loss", &losses(&folder, "gpu", "loss"), &losses(&folder, "cpu", "loss"), 1e-5);
    expect_close("evaluation", &losses(&folder, "gpu", "eval_loss"), &losses(&folder, "cpu", "eval_loss"), 1e-5);

    assert!(folder.run_killed_at("again", &on_gpu, "train.updated:5"));
    folder.run("again", &[&on_gpu[..], &["--resume"]].concat()).expect(0);
    folder.result("again").expect_same(&folder.result("gpu"), "resumed on the GPU");
    let checkpointed = [&on_gpu[..], &["--set", "train.gradient_checkpointing=true"]].concat();
    folder.run("checkpointed", &checkpointed).expect(0);
    assert_eq!(losses(&folder, "checkpointed", "loss"), losses(&folder, "gpu", "loss"), "gradient checkpointing");

    // A run does not go on with a checkpoint of another kind of device.
    std::fs::remove_dir_all(folder.path("again/adapter")).expect("removed");
    let moved = [&steady[..], &["--set", "model.device=cpu", "--resume"]].concat();
    folder.run("again", &moved).expect(2).says("model.device");

    let eval = |device: &str| {
        let arguments =
            ["eval", "model", "--data", "eval.jsonl", "--adapter", "gpu/adapter", "--json", "--device", device];
        folder.finetune(&arguments).expect(0).json()["loss"].as_f64().expect("a loss")
    };
    expect_close("eval", &[eval("gpu")], &[eval("cpu")], 1e-5);
    folder.finetune(&["export", "gpu", "--format", "merged", "--output", "merged"]).expect(0);
    let merged = ["eval", "merged", "--data", "eval.jsonl", "--json", "--device", "gpu"];
    let merged = folder.finetune(&merged).expect(0).json()["loss"].as_f64().expect("a loss");
    expect_close("merged", &[merged], &[eval("cpu")], 1e-5);
}

/// f16 computes close to f32, is named in the output, and goes on with its loss scale. A type that
/// the device lacks falls back, and the output says so.
#[test]
fn reduced_precision() {
    if !asked() {
        return;
    }
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let line = run(&mut finetune(["devices", "--json"])).expect(0).stdout;
    let device: Value = serde_json::from_str(line.lines().next().expect("a device")).expect("JSON");
    let steady = ["--set", "optimizer.learning_rate=1e-3", "--set", "train.max_steps=4", "--set", "model.device=gpu"];
    folder.run("f32", &steady).expect(0).says(", f32");
    for (dtype, bound) in [("f16", 2e-3), ("bf16", 2e-2)] {
        let set = format!("model.dtype={dtype}");
        let sets = [&steady[..], &["--set", &set]].concat();
        let ended = folder.run(dtype, &sets).expect(0);
        if device["types"].as_array().expect("types").contains(&dtype.into()) {
            assert!(ended.stderr.contains(&format!(", {dtype}\n")), "{}", ended.stderr);
        } else {
            ended.says("f32 is used").says(", f32\n");
        }
        expect_close(dtype, &losses(&folder, dtype, "loss"), &losses(&folder, "f32", "loss"), bound);
        assert!(folder.run_killed_at("again", &sets, "train.updated:3"));
        folder.run("again", &[&sets[..], &["--resume"]].concat()).expect(0);
        folder.result("again").expect_same(&folder.result(dtype), dtype);
        std::fs::remove_dir_all(folder.path("again")).expect("removed");
    }
}

/// Two ranks of one machine follow one rank's curve. Here they share one GPU.
#[test]
fn ranks_share_a_gpu() {
    if !asked() {
        return;
    }
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let steady = ["--set", "optimizer.learning_rate=1e-3", "--set", "train.max_steps=4", "--set", "model.device=gpu"];
    folder.run("one", &steady).expect(0);
    let launch = [&["launch", "-n", "2", "--", "recipe.toml", "--output-dir", "two"], &steady[..]].concat();
    folder.finetune(&launch).expect(0).says("share 1 GPU;");
    expect_close("two ranks", &losses(&folder, "two", "loss"), &losses(&folder, "one", "loss"), 1e-5);
}

/// The estimate of the GPU's memory is as good as the CPU's. Memory does not grow from step to
/// step.
#[test]
fn memory_of_the_gpu() {
    if !asked() {
        return;
    }
    let small = ["model.device=gpu", "model.dtype=f32", "train.micro_batch_size=2", "train.global_batch_size=2"];
    let with = |more: &'static str| [&small[..], &["train.max_steps=1", more]].concat();
    let settings = [with("train.gradient_checkpointing=false"), with("train.gradient_checkpointing=true")];
    expect_estimates(&larger_model(LARGER_RECIPE), &settings.each_ref().map(Vec::as_slice));

    let folder = Folder::with_recipe(CRASH_RECIPE);
    let peak_of = |steps: usize| {
        let steps = format!("train.max_steps={steps}");
        let sets = ["model.device=gpu", "eval.every=0", "checkpoint.every=0", "optimizer.learning_rate=1e-4", &steps];
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        peak(&folder.run(&steps, &sets).expect(0).stderr)
    };
    let (few, many) = (peak_of(20), peak_of(120));
    assert!(many <= few * 1.02 + 0.1, "{few} MiB after 20 steps, {many} MiB after 120");
}

/// A server on the GPU answers several requests at once, prompts of different lengths, some of which begin alike, and
/// each gets the tokens of the CPU.
#[test]
fn a_server_gives_the_tokens_of_the_cpu() {
    if !asked() {
        return;
    }
    let answers = |device: &str| -> Vec<String> {
        let (_running, address) = serve_on(device, &["--port", "0", "--slots", "4"]);
        let prompt = |n: usize| format!("{}Hello, {}", "A letter to all of us. ".repeat(n / 2), ["Leon", "Mia"][n % 2]);
        let answer = |n: usize| {
            let asked = json!({"prompt": prompt(n), "temperature": 0, "max_tokens": 16});
            let (status, body) = ask(&address, "POST", "/v1/completions", "", &asked.to_string());
            assert_eq!(status, 200, "{device}: {body}");
            let answer: Value = serde_json::from_str(&body).expect("JSON");
            answer["choices"][0]["text"].as_str().expect("a text").to_owned()
        };
        std::thread::scope(|scope| {
            let answer = &answer;
            let asked: Vec<_> = (0..8).map(|n| scope.spawn(move || answer(n))).collect();
            asked.into_iter().map(|asked| asked.join().expect("an answer")).collect()
        })
    };
    assert_eq!(answers("gpu"), answers("cpu"));
}

/// `auto` is for real GPUs: a software renderer is slower than the CPU's own kernels.
#[test]
fn auto_takes_no_software_renderer() {
    if !asked() {
        return;
    }
    let line = run(&mut finetune(["devices", "--json"])).expect(0).stdout;
    let device: Value = serde_json::from_str(line.lines().next().expect("a device")).expect("JSON");
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let ended = folder.run("auto", &["--set", "train.max_steps=1"]).expect(0);
    let expected = if device["kind"] == "software_gpu" { "training on CPU, f32" } else { "training on " };
    ended.says(expected);
}
