//! Twenty steps against torch's AdamW on transformers and PEFT (`scripts/make_goldens.py` made the
//! files), and the identities that a run must keep.
//!
//! The tests run on the CPU. With `FINETUNE_TEST_DEVICE=gpu` they run on a GPU in f32, or on a
//! software renderer if there is no GPU.

#[macro_use]
#[path = "../../model/tests/golden/each_family.rs"]
mod each_family;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicI32;

use finetune_advice::Advice as _;
use finetune_allreduce::Group;
use finetune_recipe::Recipe;
use finetune_store::TensorFile;
use finetune_trainer::{Event, Ranks, Resume, StepRow, ThisHost, prepare, train};
use serde_json::Value;

mod curve;

use curve::{alone, json, run, variant_sets};

fn goldens(family: &str) -> PathBuf {
    // The variable is read at run time, because the tests also travel to other machines.
    let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").to_owned());
    Path::new(&here).join("../../tests/goldens/models").join(family)
}

/// A recipe on a golden model, with more keys given by `sets`.
fn recipe(family: &str, output: &Path, sets: &[String]) -> Recipe {
    let directory = goldens(family);
    let device = std::env::var("FINETUNE_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    let text = format!(
        "[model]\npath = {:?}\ndevice = {device:?}\n[data]\ntrain = {:?}\nformat = \"tokens\"\nshuffle = false\n",
        directory,
        directory.join("rows.jsonl"),
    );
    Recipe::parse(&text, Path::new("golden.toml"), sets, Some(output)).unwrap_or_else(|error| panic!("{error}"))
}

/// As [`run`] on several ranks, each a thread. Gives the rows of rank 0.
fn run_on(world: usize, recipe: impl Fn() -> Recipe + Sync) -> Vec<StepRow> {
    std::thread::scope(|scope| {
        let recipe = &recipe;
        let start = |group| {
            scope.spawn(move || {
                let ranks = Arc::new(Ranks::new(group, None).expect("ranks"));
                let mut prepared =
                    prepare(recipe(), &Resume::No, &ranks, &ThisHost::default(), &|_| {}).expect("a run");
                let mut rows = Vec::new();
                let outcome = train(&mut prepared.run, &AtomicI32::new(0), &mut |event| {
                    if let Event::Step { row, .. } = event {
                        rows.push(row.clone());
                    }
                });
                outcome.map(|_| rows).unwrap_or_else(|error| panic!("{error}"))
            })
        };
        let ranks: Vec<_> = Group::in_process(world, None).into_iter().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().expect("no panic")).next().expect("rank 0")
    })
}

/// `[lora]` keys that fit the golden adapter of a family.
fn adapter_sets(family: &str) -> Vec<String> {
    let mut config = json(&goldens(family).join("adapter/adapter_config.json"));
    // PEFT names the parameters of experts apart.
    if let (true, Some(modules)) = (
        config["target_parameters"].as_array().is_some_and(|list| !list.is_empty()),
        config["target_modules"].as_array_mut(),
    ) {
        modules.push("experts".into());
    }
    vec![
        format!("lora.rank={}", config["r"]),
        format!("lora.alpha={}", config["lora_alpha"]),
        format!("lora.use_rslora={}", config["use_rslora"]),
        format!("lora.target_modules={}", config["target_modules"]),
        format!("lora.init_from={:?}", goldens(family).join("adapter")),
    ]
}

/// Bounds: 1e-5 relative for losses, or ten times the noise of the reference if that is more.
fn check_curve(what: &str, rows: &[StepRow], variant: &Value) {
    let noise = |key: &str| variant["noise"][key].as_f64().expect("a noise figure");
    let (loss_bound, norm_bound) =
        (1e-5f64.max(10.0 * noise("loss_relative")), 2e-5f64.max(10.0 * noise("grad_norm_relative")));
    let curve = variant["curve"].as_array().expect("a curve");
    assert_eq!(rows.len(), curve.len(), "{what}: steps");
    for (row, want) in rows.iter().zip(curve) {
        let number = |key: &str| want[key].as_f64().expect("a number");
        let close = |got: f64, key: &str, bound: f64| {
            let want = number(key);
            assert!((got - want).abs() <= bound * want.abs(), "{what} step {}: {key} {got} against {want}", row.step);
        };
        assert_eq!(row.trained_tokens as f64, number("trained_tokens"), "{what} step {}", row.step);
        close(row.loss, "loss", loss_bound);
        close(row.grad_norm, "grad_norm", norm_bound);
        close(row.learning_rate, "learning_rate", 1e-12);
    }
}

fn lora_curves_equal_torch(family: &str) {
    let curves = json(&goldens(family).join("curves.json"));
    for variant in ["constant", "clip_cosine", "linear"] {
        let settings = &curves["variants"][variant];
        let output = tempfile::tempdir().expect("a directory");
        let sets = [adapter_sets(family), variant_sets(&curves, settings)].concat();
        let (rows, _) = run(recipe(family, output.path(), &sets));
        check_curve(&format!("{family} {variant}"), &rows, settings);
        if variant == "clip_cosine" {
            let ours = TensorFile::open(&output.path().join("adapter/adapter_model.safetensors")).expect("the adapter");
            let theirs =
                TensorFile::open(&goldens(family).join("final_clip_cosine.safetensors")).expect("the golden adapter");
            assert_eq!(ours.names().count(), theirs.names().count(), "{family}: tensors of the adapter");
            for name in theirs.names() {
                let floats = |file: &TensorFile| -> Vec<f64> {
                    let view = file.get(name).unwrap_or_else(|| panic!("{family}: {name}"));
                    view.bytes()
                        .expect("the file is whole")
                        .chunks_exact(4)
                        .map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
                        .collect()
                };
                let (a, b) = (floats(&ours), floats(&theirs));
                let norm = |values: Vec<f64>| values.iter().map(|v| v * v).sum::<f64>().sqrt();
                let difference = norm(a.iter().zip(&b).map(|(a, b)| a - b).collect()) / norm(b);
                let bound = 2e-5f64.max(10.0 * settings["noise"]["final_relative_norm"].as_f64().expect("noise"));
                assert!(difference < bound, "{family} {name}: {difference:e}");
            }
        }
    }
}

of_each_family!(lora_curves_equal_torch);

/// A few steps of adapters that are more than LoRA on linear layers: DoRA, modules trained in full,
/// LoRA on embedding and output layer (`scripts/make_adapter_goldens.py` made the files).
fn curves_of_other_adapters_equal_torch(case: &str) {
    let directory = goldens("../adapters").join(case);
    let (about, curve) = (json(&directory.join("case.json")), json(&directory.join("curve.json")));
    let config = json(&directory.join("adapter/adapter_config.json"));
    let table = |key: &str| {
        let entries = config[key].as_object().expect("an object").iter();
        let entries: Vec<String> = entries.map(|(name, value)| format!("{name:?} = {value}")).collect();
        format!("lora.{key}={{ {} }}", entries.join(", "))
    };
    let mut adapter: Vec<String> = ["rank_pattern", "alpha_pattern"].map(table).to_vec();
    for (ours, theirs) in
        [("rank", "r"), ("alpha", "lora_alpha"), ("use_rslora", "use_rslora"), ("use_dora", "use_dora")]
    {
        adapter.push(format!("lora.{ours}={}", config[theirs]));
    }
    adapter.push(format!("lora.target_modules={}", config["target_modules"]));
    if !config["modules_to_save"].is_null() {
        adapter.push(format!("lora.modules_to_save={}", config["modules_to_save"]));
    }
    adapter.push(format!("lora.init_from={:?}", directory.join("adapter")));
    let family = about["family"].as_str().expect("a family");
    let sets = [adapter, variant_sets(&curve, &curve)].concat();
    let output = tempfile::tempdir().expect("a directory");
    let (rows, _) = run(recipe(family, output.path(), &sets));
    check_curve(case, &rows, &curve);
    let output = tempfile::tempdir().expect("a directory");
    let rows = run_on(2, || {
        recipe(family, output.path(), &[&sets[..], &["train.gradient_checkpointing=true".to_owned()]].concat())
    });
    check_curve(&format!("{case}, 2 ranks"), &rows, &curve);
}

of_each_family!(curves_of_other_adapters_equal_torch: dora dora_biases saved_tied saved_embedding_tied saved_both
    saved_untied embedding_tied head_tied vocabulary_untied);

/// Ten steps with the auxiliary loss of routers: rows count alone, whatever lies beside them, however often layers
/// are computed, on one rank or two.
fn curves_with_the_loss_of_routers_equal_torch(family: &str) {
    let reference = json(&goldens(family).join("router_loss.json"));
    let variant = &reference["variant"];
    let check = |what: &str, rows: &[StepRow]| {
        check_curve(what, rows, variant);
        for (row, want) in rows.iter().zip(variant["curve"].as_array().expect("a curve")) {
            let (got, want) = (row.objective["router_aux_loss"], want["router_aux_loss"].as_f64().expect("a number"));
            assert!((got - want).abs() <= 1e-5 * want, "{what} step {}: {got} against {want}", row.step);
        }
    };
    let sets_of = |micro: usize, again: bool| {
        let of_loss = vec![
            format!("train.router_aux_loss_coef={}", reference["coefficient"]),
            format!("train.micro_batch_size={micro}"),
            format!("train.gradient_checkpointing={again}"),
        ];
        [adapter_sets(family), variant_sets(&reference, variant), of_loss].concat()
    };
    for (micro, again) in [(1, false), (2, true), (4, false), (4, true)] {
        let output = tempfile::tempdir().expect("a directory");
        let (rows, _) = run(recipe(family, output.path(), &sets_of(micro, again)));
        check(&format!("{family}, {micro} rows together, again {again}"), &rows);
    }
    let output = tempfile::tempdir().expect("a directory");
    let rows = run_on(2, || recipe(family, output.path(), &sets_of(2, false)));
    check(&format!("{family}, 2 ranks"), &rows);
}

of_each_family!(curves_with_the_loss_of_routers_equal_torch: qwen3_moe gpt_oss);

/// Two, three and four ranks follow the same curves. Losses are weighted by tokens, however rows
/// are shared out.
#[test]
fn curves_of_several_ranks_equal_torch() {
    for (family, world) in [("qwen3", 2), ("llama", 3), ("mistral", 4)] {
        let curves = json(&goldens(family).join("curves.json"));
        for variant in ["constant", "clip_cosine"] {
            let settings = &curves["variants"][variant];
            let output = tempfile::tempdir().expect("a directory");
            let sets = [adapter_sets(family), variant_sets(&curves, settings)].concat();
            let rows = run_on(world, || recipe(family, output.path(), &sets));
            check_curve(&format!("{family} {variant}, {world} ranks"), &rows, settings);
        }
    }
}

/// After 200 steps the losses differ by noise only.
#[test]
fn two_hundred_steps_on_any_number_of_ranks() {
    let sets =
        ["train.max_steps=200", "train.global_batch_size=6", "optimizer.learning_rate=1e-3", "lora.dropout=0.05"];
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    let losses = |world| {
        let output = tempfile::tempdir().expect("a directory");
        run_on(world, || recipe("qwen2", output.path(), &sets)).iter().map(|row| row.loss).collect::<Vec<_>>()
    };
    let alone = losses(1);
    for world in [2, 3, 4] {
        let together = losses(world);
        assert_eq!(together.len(), 200);
        let worst = alone.iter().zip(&together).map(|(a, b)| (a - b).abs() / a).fold(0.0, f64::max);
        assert!((alone[0] - together[0]).abs() <= 1e-6 * alone[0], "{world} ranks, step 1");
        assert!(worst <= 1e-4, "{world} ranks: {worst:e}");
        println!("{world} ranks: losses of 200 steps within {worst:.1e} of one rank's");
    }
}

fn full_curves_equal_torch(family: &str) {
    let curves = json(&goldens(family).join("curves.json"));
    let settings = &curves["variants"]["full"];
    let output = tempfile::tempdir().expect("a directory");
    let sets = [vec!["train.method=full".to_owned()], variant_sets(&curves, settings)].concat();
    let (rows, _) = run(recipe(family, output.path(), &sets));
    check_curve(&format!("{family} full"), &rows, settings);
    assert!(output.path().join("model/config.json").is_file(), "a full run leaves a model directory");
}

of_each_family!(full_curves_equal_torch: llama qwen2 smollm3 gemma3 granite olmo3 gemma2 phi3 glm4 granitemoehybrid lfm2);

/// 8 × 1 = 4 × 2 = 1 × 8: how the rows of a step are cut into micro-batches changes nothing but
/// rounding.
#[test]
fn micro_batches_do_not_matter() {
    let losses = |micro: usize| {
        let output = tempfile::tempdir().expect("a directory");
        let sets =
            ["train.max_steps=6", "train.global_batch_size=8", "optimizer.learning_rate=1e-2", "lora.dropout=0.1"];
        let mut sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        sets.push(format!("train.micro_batch_size={micro}"));
        let (rows, _) = run(recipe("qwen3", output.path(), &sets));
        rows.iter().map(|row| row.loss).collect::<Vec<_>>()
    };
    let whole = losses(8);
    assert_eq!(whole.len(), 6);
    for micro in [1, 2, 3, 4] {
        for (step, (a, b)) in whole.iter().zip(losses(micro)).enumerate() {
            assert!((a - b).abs() < 1e-5 * a, "micro-batches of {micro}, step {}: {b} against {a}", step + 1);
        }
    }
}

/// 12 rows in batches of 5: the last step of an epoch has 2 rows, and is not dropped.
#[test]
fn the_last_partial_step_of_an_epoch_is_trained() {
    let output = tempfile::tempdir().expect("a directory");
    let sets = ["train.epochs=2", "train.global_batch_size=5"].map(str::to_owned);
    let (rows, _) = run(recipe("llama3", output.path(), &sets));
    let trained: Vec<u64> = rows.iter().map(|row| row.trained_tokens).collect();
    assert_eq!(trained.len(), 6);
    let all = json(&goldens("llama3").join("golden.json"))["rows_jsonl"]["trained_tokens"].as_u64().expect("a count");
    assert_eq!(trained[..3].iter().sum::<u64>(), all);
    assert_eq!(trained[3..].iter().sum::<u64>(), all);
    assert_eq!(rows[2].epoch, 1.0);
}

/// With a learning rate that is far too high, no update is made from a number that is not finite,
/// and the rows are named.
#[test]
fn numbers_that_are_not_finite_stop_the_run() {
    let output = tempfile::tempdir().expect("a directory");
    let sets =
        ["train.max_steps=20", "train.max_grad_norm=0", "optimizer.learning_rate=1e30", "train.global_batch_size=4"];
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    let mut prepared =
        prepare(recipe("llama3", output.path(), &sets), &Resume::No, &alone(), &ThisHost::default(), &|_| {})
            .expect("a run");
    let error = train(&mut prepared.run, &AtomicI32::new(0), &mut |_| {}).expect_err("numbers overflow");
    assert!(error.to_string().contains("is not finite in step"), "{error}");
    assert!(error.hints()[0].contains("rows.jsonl:"), "{:?}", error.hints());
}

/// Layers 0 and 2 of this model have six experts, of which a token chooses two. How often a layer is computed
/// does not matter, nor how rows are put together.
#[test]
fn rows_say_how_evenly_experts_were_used() {
    let output = tempfile::tempdir().expect("a directory");
    let rows = |name: &str, more: &[&str]| {
        let sets: Vec<String> =
            ["train.max_steps=2", "train.global_batch_size=4"].iter().chain(more).map(|s| (*s).to_owned()).collect();
        run(recipe("qwen3_moe", &output.path().join(name), &sets)).0
    };
    let plain = rows("plain", &["train.micro_batch_size=4"]);
    for row in &plain {
        assert_eq!(row.experts.iter().map(|of_layer| of_layer.layer).collect::<Vec<_>>(), [0, 2]);
        assert!(
            row.experts.iter().all(|of_layer| (1.0 / 6.0..=0.5).contains(&of_layer.busiest) && of_layer.unused <= 4)
        );
    }
    let again = rows("again", &["train.micro_batch_size=1", "train.gradient_checkpointing=true"]);
    assert_eq!(plain[0].experts, again[0].experts);
    let dense = run(recipe("qwen3", &output.path().join("dense"), &["train.max_steps=1".to_owned()])).0;
    assert!(dense[0].experts.is_empty());
}
