//! Memory: no more than was estimated, and no more after a thousand steps than after a hundred. If
//! there is none left, the program says which setting takes less.

use std::borrow::Cow;
use std::process::Command;

use finetune_model::{ModelConfig, expected_tensors};
use finetune_random::Stream;
use finetune_store::{Dtype, encode_tensors};
use serde_json::json;

use crate::folder::{CRASH_RECIPE, Folder};
use crate::program::{BINARY, finetune, run};

/// The peak in MiB, from `peak memory 94.2 MiB (estimated 81.0 MiB)` or from the GPU's line.
pub(crate) fn peak(stderr: &str) -> f64 {
    let (_, rest) = stderr.split_once("peak memory ").unwrap_or_else(|| panic!("no peak in {stderr}"));
    let rest = rest.strip_prefix("of the GPU ").unwrap_or(rest);
    let mut words = rest.split_whitespace();
    let number: f64 = words.next().and_then(|word| word.parse().ok()).expect("a number");
    number * if words.next() == Some("GiB") { 1024.0 } else { 1.0 }
}

/// A Llama of 11 million parameters in bf16, and rows of 400 tokens.
pub(crate) fn larger_model(recipe: &str) -> Folder {
    model_of(5, 384, 4096, recipe)
}

/// A Llama in bf16 with so many layers of this width and so many tokens, and rows of 400 tokens.
fn model_of(layers: usize, hidden: usize, vocabulary: usize, recipe: &str) -> Folder {
    let folder = Folder::empty();
    std::fs::create_dir(folder.path("model")).expect("a new directory");
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": 1024,
        "num_hidden_layers": layers, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64,
        "vocab_size": vocabulary, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": false, "attention_bias": false, "mlp_bias": false
    });
    folder.write("model/config.json", config.to_string().as_bytes());
    let config = ModelConfig::load(&folder.path("model")).expect("a config");
    type Tensor = (String, Dtype, Vec<usize>, Cow<'static, [u8]>);
    let tensors: Vec<Tensor> = expected_tensors(&config)
        .into_iter()
        .enumerate()
        .map(|(n, (name, shape))| {
            let count = shape.iter().product();
            let values = match shape.len() {
                1 => vec![1.0f32; count],
                _ => Stream::new(3, 1, 0, n as u32).uniform(count, 0.03),
            };
            // bf16 is the upper half of f32.
            let bytes: Vec<u8> =
                values.iter().flat_map(|value| ((value.to_bits() >> 16) as u16).to_le_bytes()).collect();
            (name, Dtype::BF16, shape, bytes.into())
        })
        .collect();
    folder.write("model/model.safetensors", &encode_tensors(&tensors, &Default::default()).expect("a file"));
    let rows: String = (0..8)
        .map(|row| {
            let ids: Vec<u32> = (0..400).map(|n| (row * 131 + n * 17) % 4096).collect();
            json!({"input_ids": ids, "labels": ids}).to_string() + "\n"
        })
        .collect();
    folder.write("train.jsonl", rows.as_bytes());
    folder.write("recipe.toml", recipe.as_bytes());
    folder
}

pub(crate) const LARGER_RECIPE: &str = r#"output_dir = "run"
[model]
path = "model"
device = "cpu"
[data]
train = "train.jsonl"
[train]
max_steps = 2
global_batch_size = 8
micro_batch_size = 8
[checkpoint]
every = 0
"#;

#[test]
fn the_estimate_is_within_fifteen_percent() {
    let folder = larger_model(LARGER_RECIPE);
    expect_estimates(
        &folder,
        &[
            &[],
            &["train.gradient_checkpointing=true"],
            &["lora.target_modules=[\"q_proj\", \"v_proj\"]"],
            &["model.dtype=f32"],
        ],
    );
}

/// The estimate of `validate` is within 15 % of the peak of `run`.
pub(crate) fn expect_estimates(folder: &Folder, settings: &[&[&str]]) {
    for sets in settings {
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        let command = [&["validate", "recipe.toml", "--json"], &sets[..]].concat();
        let validated = run(finetune(command).current_dir(folder.path(""))).expect(0).json();
        let estimate = validated["estimate"]["total"].as_f64().expect("bytes") / f64::from(1 << 20);
        let ended = folder.run("measured", &sets).expect(0);
        std::fs::remove_dir_all(folder.path("measured")).expect("removed");
        let peak = peak(&ended.stderr);
        assert!((estimate / peak - 1.0).abs() < 0.15, "{sets:?}: {estimate:.0} MiB estimated, {peak:.0} MiB used");
    }
}

/// Buffers are used again from step to step, whatever the lengths of the rows.
#[test]
fn a_thousand_steps_take_no_more_than_a_hundred() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let few =
        ["model.device=cpu", "eval.every=0", "checkpoint.every=0", "log.every=1000", "optimizer.learning_rate=1e-4"];
    let peak_of = |steps: usize| {
        let mut sets: Vec<String> = few.iter().map(|set| (*set).to_owned()).collect();
        sets.push(format!("train.max_steps={steps}"));
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set.as_str()]).collect();
        // Huge pages are switched off. One touched byte of a huge page counts for 2 MiB, and the
        // kernel makes such pages depending on its load.
        let mut command = folder.command(&format!("run-{steps}"), &sets);
        peak(&run(command.env("MIMALLOC_ALLOW_THP", "0")).expect(0).stderr)
    };
    let (hundred, thousand) = (peak_of(100), peak_of(1000));
    // The report keeps the rows of metrics.jsonl: a mebibyte.
    assert!(thousand < hundred + 4.0, "{hundred} MiB after 100 steps, {thousand} MiB after 1,000");
}

/// The system refuses memory in the middle of a run. The exit code is 5, the message names a
/// setting that takes less and how much, and what was saved is whole.
#[test]
fn memory_that_is_not_there() {
    let folder = larger_model(LARGER_RECIPE);
    let base = 740_000; // KiB of address space that the program itself and one small micro-batch live in
    let script = |limit: u32, sets: &str| format!("ulimit -v {limit}; exec {BINARY} run recipe.toml --resume {sets}");
    let shell = |script: String| {
        run(Command::new("bash").args(["-c", &script]).current_dir(folder.path("")).env("NO_COLOR", "1"))
    };
    let ended = shell(script(base, "")).expect(5);
    assert!(ended.stderr.contains("error: the system gives this process no more memory"), "{}", ended.stderr);
    assert!(ended.stderr.contains("hint: train.gradient_checkpointing = true: about "), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("hint: this process may have 722.7 MiB of addresses (`ulimit -v`)"),
        "{}",
        ended.stderr
    );
    // With less there is no room for the stacks of threads either.
    let ended = shell(script(300_000, "")).expect(5);
    assert!(ended.stderr.contains("this process may have 293.0 MiB of addresses (`ulimit -v`)"), "{}", ended.stderr);
    // The first hint works.
    shell(script(base, "--set train.gradient_checkpointing=true --set train.micro_batch_size=1 --output-dir small"))
        .expect(0);
}

/// Layers that stay on the disk take the memory of two, and train to the same bits.
#[test]
fn layers_from_the_disk_take_the_memory_of_two() {
    // 140 MB in 24 layers; one row of 400 tokens.
    let folder = model_of(24, 640, 4096, LARGER_RECIPE);
    let one = ["--set", "train.micro_batch_size=1", "--set", "train.global_batch_size=1"];
    let with = |residency: &'static str| [&one[..], &["--set", residency]].concat();
    let layers = 24.0 * (640.0 * 64.0 * 18.0 + 3.0 * 640.0 * 1024.0) * 2.0 / f64::from(1 << 20);
    let in_memory = folder.run("memory", &with("model.residency=memory")).expect(0);
    let on_disk = folder.run("disk", &with("model.residency=disk")).expect(0);
    let on_disk = on_disk.says("are read from the disk, twice a step").says(", waiting for the disk ");
    assert!(!in_memory.stderr.contains("waiting for the disk"), "{}", in_memory.stderr);
    let adapter = |run: &str| {
        std::fs::read(folder.path(&format!("{run}/adapter/adapter_model.safetensors"))).expect("an adapter")
    };
    let saved = peak(&in_memory.stderr) - peak(&on_disk.stderr);
    assert!(saved > 0.8 * layers, "{saved} MiB less, of {layers} MiB of layers:\n{}", on_disk.stderr);
    assert_eq!(adapter("memory"), adapter("disk"));
    expect_estimates(&folder, &[&["model.residency=disk", "train.micro_batch_size=1", "train.global_batch_size=2"]]);
}

/// The rows of an embedding that is no output layer stay on the disk with the layers.
#[test]
fn an_embedding_on_the_disk_takes_no_memory() {
    const VOCABULARY: usize = 65_536;
    let folder = model_of(3, 640, VOCABULARY, LARGER_RECIPE);
    let table = (VOCABULARY * 640 * 2) as f64 / f64::from(1 << 20);
    // Layers are computed again in both: what is kept of them is no difference.
    let one = ["train.gradient_checkpointing=true", "train.micro_batch_size=1", "train.global_batch_size=1"];
    let with = |residency: &'static str| one.into_iter().chain([residency]).flat_map(|set| ["--set", set]);
    let [in_memory, on_disk] = [("memory", "model.residency=memory"), ("disk", "model.residency=disk")]
        .map(|(name, residency)| folder.run(name, &with(residency).collect::<Vec<_>>()).expect(0));
    let saved = peak(&in_memory.stderr) - peak(&on_disk.stderr);
    // The threads that read keep some 30 MiB of freed blocks.
    assert!(saved > 0.5 * table, "{saved} MiB less, of {table} MiB of the embedding:\n{}", on_disk.stderr);
    let adapter = |run: &str| {
        std::fs::read(folder.path(&format!("{run}/adapter/adapter_model.safetensors"))).expect("an adapter")
    };
    assert_eq!(adapter("memory"), adapter("disk"));
}

/// A model that fits no machine is refused before anything is read or written.
#[test]
fn a_run_that_cannot_fit_is_refused() {
    let folder = larger_model(LARGER_RECIPE);
    let text = std::fs::read_to_string(folder.path("model/config.json")).expect("config.json");
    std::fs::remove_file(folder.path("model/model.safetensors")).expect("removed");
    let text = text
        .replace("\"hidden_size\":384", "\"hidden_size\":65536")
        .replace("\"num_hidden_layers\":5", "\"num_hidden_layers\":900");
    folder.write("model/config.json", text.as_bytes());
    let ended = folder.run("run", &["--set", "train.method=full"]).expect(5);
    let ended = ended.says("error: the run needs about ").says(" are available");
    assert!(ended.stderr.contains("take a smaller model") || ended.stderr.contains("hint: "), "{}", ended.stderr);
    assert!(!folder.path("run/metrics.jsonl").exists());
}
