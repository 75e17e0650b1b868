//! Every family against transformers and PEFT (`scripts/make_goldens.py` made the files).
//!
//! Bounds are ten times the reference's own f32 noise: 3e-5 absolute for logits, 2e-5 of the norm
//! for gradients.

use std::path::Path;

use burn::tensor::Device;
use finetune_kernels::devices::is_cpu;
use finetune_model::adapter::Adapter;
use finetune_model::merge::{MergedForm, compare, write_merged};
use finetune_model::{
    Adaptation, Backward, Batch, Coefficients, FloatType, LossSum, Model, ModelConfig, Placement, Randomness, Sampling,
};
use finetune_store::{RealDisk, Staging, TensorFile};
use serde_json::Value;

#[macro_use]
#[path = "golden/each_family.rs"]
mod each_family;
mod golden;

use golden::{
    ANY, GRADIENTS, LOGITS, PROMPT, Rows, batch, directory, families, floats, gpu, greedy_as_in_whole_passes, json,
    largest_difference, placement, relative_norm, rows,
};

struct Golden {
    family: &'static str,
    json: Value,
    tensors: TensorFile,
    rows: Rows,
}

impl Golden {
    fn load(family: &'static str) -> Golden {
        let json = json(&directory(family).join("golden.json"));
        let rows = rows(&json);
        let tensors = TensorFile::open(&directory(family).join("golden.safetensors")).expect("golden.safetensors");
        Golden { family, json, tensors, rows }
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        floats(&self.tensors, name)
    }

    fn batch(&self) -> Batch<'_> {
        batch(&self.rows)
    }

    fn model(&self) -> Model {
        Model::load(&directory(self.family), &placement()).expect("the model loads")
    }

    fn adapter(&self, config: &ModelConfig) -> Adapter {
        Adapter::read(&directory(self.family).join("adapter"), config).expect("the adapter loads")
    }

    fn with_adapter(&self) -> Model {
        let mut model = self.model();
        model.attach(&self.adapter(&model.config)).expect("an adapter of this model");
        model
    }
}

/// Without dropout, so that the random numbers do not matter.
fn backward(checkpointing: bool) -> Backward<'static> {
    Backward { randomness: ANY, checkpointing, loss_scale: 1.0, coefficients: Coefficients::Ones }
}

fn gradients(model: &mut Model, batch: &Batch, checkpointing: bool) -> (LossSum, Vec<f32>) {
    let mut gradients = vec![0.0; model.layout().len()];
    let sums = model.loss_and_gradients(batch, backward(checkpointing), &mut gradients).expect("a device that works");
    (sums, gradients)
}

#[test]
fn runs_on_the_cpu_kernels() {
    assert!(is_cpu(&Device::flex()) && is_cpu(&Device::flex().autodiff()));
}

fn logits_of_base_adapter_and_merged_model(family: &'static str) {
    let golden = Golden::load(family);
    let (base, adapted) = (golden.model(), golden.with_adapter());
    for (n, (tokens, _)) in golden.rows.iter().enumerate() {
        for (model, name) in [(&base, "base_logits"), (&adapted, "logits")] {
            let got = model.logits(tokens).expect("tokens of the vocabulary");
            let difference = largest_difference(&got, &golden.floats(&format!("{name}.{n}")));
            assert!(difference < LOGITS, "{family} {name}.{n}: {difference:e}");
        }
    }
}

of_each_family!(logits_of_base_adapter_and_merged_model);

fn loss_and_every_lora_gradient(family: &'static str) {
    let golden = Golden::load(family);
    let mut model = golden.with_adapter();
    let (sums, got) = gradients(&mut model, &golden.batch(), false);
    let want = &golden.json["micro_batch"];
    assert_eq!(sums.trained_tokens, want["trained_tokens"].as_u64().expect("a count"), "{family}");
    let loss = want["loss_sum"].as_f64().expect("a loss");
    assert!((sums.loss - loss).abs() < 1e-6 * loss, "{family}: loss {} against {loss}", sums.loss);
    assert!((model.loss(&golden.batch()).expect("sums").loss - sums.loss).abs() < 1e-9 * loss, "{family}: evaluation");
    let mut found = 0;
    for parameter in model.layout().iter() {
        // The reference differentiates the mean.
        let got: Vec<f32> = got[parameter.range.clone()].iter().map(|g| g / sums.trained_tokens as f32).collect();
        let difference = relative_norm(&got, &golden.floats(&format!("grad.{}", parameter.name)));
        assert!(difference < GRADIENTS, "{family} {}: {difference:e}", parameter.name);
        found += 1;
    }
    let expected = golden.tensors.names().filter(|name| name.starts_with("grad.")).count();
    assert_eq!(found, expected, "{family}: as many gradients as in the reference");
}

of_each_family!(loss_and_every_lora_gradient);

fn the_loss_is_the_same_however_rows_are_split(family: &'static str) {
    let golden = Golden::load(family);
    let mut model = golden.with_adapter();
    let (whole, whole_gradients) = gradients(&mut model, &golden.batch(), false);
    let mut sum = 0.0;
    let mut split_gradients = vec![0.0; model.layout().len()];
    for n in 0..golden.rows.len() {
        let rows = &golden.rows[n..=n];
        sum += model.loss_and_gradients(&batch(rows), backward(false), &mut split_gradients).expect("sums").loss;
    }
    assert!((whole.loss - sum).abs() < 1e-6 * sum, "{family}");
    assert!(relative_norm(&split_gradients, &whole_gradients) < 2e-6, "{family}");
}

of_each_family!(the_loss_is_the_same_however_rows_are_split);

fn checkpointing_changes_no_bit(family: &'static str) {
    let golden = Golden::load(family);
    // Experts, and models with inputs of each layer, are trained by LoRA alone.
    let config = golden.model().config;
    let only_lora = config.experts.is_some() || config.per_layer.is_some();
    let methods: &[bool] = if only_lora { &[false] } else { &[false, true] };
    for &all in methods {
        let mut model = if all { golden.model() } else { golden.with_adapter() };
        if all {
            model.train_all();
            let values = model.parameters().expect("values");
            model.set_parameters(&values);
        }
        let plain = gradients(&mut model, &golden.batch(), false);
        let again = gradients(&mut model, &golden.batch(), true);
        assert_eq!(plain.0, again.0, "{family}, all weights {all}");
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        if all && model.config.tied_embeddings {
            // The two parts of the embedding's gradient are added in another order of operations.
            assert!(relative_norm(&again.1, &plain.1) < 1e-6, "{family}");
        } else {
            assert!(bits(&plain.1) == bits(&again.1), "{family}, all weights {all}");
        }
    }
}

of_each_family!(checkpointing_changes_no_bit);

/// `full` in curves.json has the norm of each weight's gradient in the first step.
fn gradients_of_all_weights(family: &'static str) {
    let mut model = Golden::load(family).model();
    model.train_all();
    let values = model.parameters().expect("values");
    model.set_parameters(&values);
    let read = |name: &str| std::fs::read_to_string(directory(family).join(name)).expect("a golden file");
    let rows: Vec<(Vec<u32>, Vec<bool>)> = read("rows.jsonl")
        .lines()
        .take(4)
        .map(|line| {
            let row: Value = serde_json::from_str(line).expect("JSON");
            let list = |key: &str| row[key].as_array().expect("a list").clone();
            let tokens = list("input_ids").iter().map(|v| v.as_u64().expect("an id") as u32).collect();
            (tokens, list("labels").iter().map(|v| v != -100).collect())
        })
        .collect();
    let (sums, got) = gradients(&mut model, &batch(&rows), false);
    let curves: Value = serde_json::from_str(&read("curves.json")).expect("JSON");
    let norms = &curves["variants"]["full"]["first_gradient_norms"];
    for parameter in model.layout().iter() {
        let want = norms[&parameter.name].as_f64().unwrap_or_else(|| panic!("{family}: {}", parameter.name));
        let norm = got[parameter.range.clone()].iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        let norm = norm / sums.trained_tokens as f64;
        assert!((norm - want).abs() < GRADIENTS * want, "{family} {}: {norm} against {want}", parameter.name);
    }
    assert_eq!(model.layout().iter().len(), norms.as_object().expect("an object").len(), "{family}");
}

of_each_family!(gradients_of_all_weights: llama qwen2 smollm3 gemma3 granite olmo3 gemma2 phi3 glm4 granitemoehybrid lfm2
    muse_glimmer);

fn merged_models_equal_their_adapters(family: &'static str) {
    let golden = Golden::load(family);
    let adapter = golden.adapter(&golden.model().config);
    let parent = tempfile::tempdir().expect("a directory");
    // A shard limit of 20 kB makes an index with several files.
    for (name, shard_bytes) in [("whole", u64::MAX), ("sharded", 20_000)] {
        let mut staging = Staging::begin(&RealDisk, parent.path(), name).expect("a new directory");
        write_merged(
            &RealDisk,
            &directory(family),
            &adapter,
            &mut staging,
            MergedForm::of_shards(shard_bytes),
            &[],
            &|_, _| {},
        )
        .expect("a merge");
        let merged = staging.publish(&serde_json::json!({"kind": "merged"})).expect("published");
        let model = Model::load(&merged, &placement()).expect("the merged model loads");
        for (n, (tokens, _)) in golden.rows.iter().enumerate() {
            let got = model.logits(tokens).expect("tokens of the vocabulary");
            let difference = largest_difference(&got, &golden.floats(&format!("merged_logits.{n}")));
            assert!(difference < LOGITS, "{family} merged {n}: {difference:e}");
        }
        let comparison = compare(&directory(family), &adapter, &merged, &placement()).expect("a comparison");
        assert!(comparison.largest < LOGITS && comparison.agreeing == comparison.positions, "{comparison:?}");
    }
}

of_each_family!(merged_models_equal_their_adapters);

/// The names in `each_family.rs` are the folders'. Each has what its tests read.
#[test]
fn every_golden_model_is_listed() {
    let mut listed = with_families!(names_of!()).map(str::to_owned).to_vec();
    listed.sort();
    assert_eq!(listed, families::names());
    for file in ["config.hub.json", "generation.json"] {
        assert_eq!(listed, families::folders_with(&families::models(), file), "{file}");
    }
}

/// PEFT saves one branch for all experts of a layer. It is read as the branches that it was made of.
#[test]
fn stacked_experts_are_those_of_single_ones() {
    let golden = Golden::load("qwen3_moe_experts");
    let values = |folder: &str| {
        let mut model = golden.model();
        let adapter = Adapter::read(&directory(golden.family).join(folder), &model.config).expect("an adapter");
        model.attach(&adapter).expect("an adapter of this model");
        (adapter.targets, model.parameters().expect("values"))
    };
    assert_eq!(values("adapter_stacked"), values("adapter"));
}

/// The published Llama 3.1 and 3.2 scalings reach all branches. The frequencies are transformers',
/// to one unit in the last place.
#[test]
fn llama3_rope_frequencies() {
    let text = std::fs::read_to_string(directory("rope.json")).expect("rope.json");
    let cases: Value = serde_json::from_str(&text).expect("JSON");
    let base = std::fs::read_to_string(directory("llama3").join("config.json")).expect("config.json");
    for (name, case) in cases.as_object().expect("an object") {
        let mut config: Value = serde_json::from_str(&base).expect("JSON");
        config["head_dim"] = case["head_dim"].clone();
        config["rope_parameters"] = case["rope_parameters"].clone();
        let config = ModelConfig::parse(&config.to_string(), Path::new("config.json")).expect("a config");
        let want = case["inverse_frequencies"].as_array().expect("a list");
        for (n, (got, want)) in config.ropes[0].frequencies().iter().zip(want).enumerate() {
            let want = want.as_f64().expect("a number");
            assert!((f64::from(*got) - want).abs() <= 3e-7 * want, "{name} {n}: {got} against {want}");
        }
    }
}

fn greedy_generation_equals_whole_passes(family: &'static str) {
    let model = Golden::load(family).with_adapter();
    let got = greedy_as_in_whole_passes(family, &model, 12);
    let stopped = model.generate(&PROMPT, 12, Sampling::GREEDY, &[got[3]], &mut |_| {}).expect("a generation");
    let first = got.iter().position(|token| *token == got[3]).expect("it is there");
    assert_eq!((stopped.tokens.as_slice(), stopped.stopped_by), (&got[..=first], Some(got[3])), "{family}");
}

of_each_family!(greedy_generation_equals_whole_passes);

/// Branches of gpt-oss's experts: the tokens that PEFT's model says.
fn greedy_tokens_are_those_of_peft(family: &'static str) {
    let golden = Golden::load(family);
    let numbers = |key: &str| -> Vec<u32> {
        let list = golden.json["greedy"][key].as_array().expect("a list");
        list.iter().map(|token| token.as_u64().expect("a token") as u32).collect()
    };
    let tokens = numbers("tokens");
    let got = golden
        .with_adapter()
        .generate(&numbers("prompt"), tokens.len(), Sampling::GREEDY, &[], &mut |_| {})
        .expect("a generation");
    assert_eq!(got.tokens, tokens, "{family}");
}

of_each_family!(greedy_tokens_are_those_of_peft: gpt_oss_experts gpt_oss_mxfp4_experts);

/// A fresh adapter has B = 0: it changes nothing.
#[test]
fn a_new_adapter_gives_the_base() {
    let golden = Golden::load("qwen3");
    let base = golden.model();
    let mut model = golden.model();
    let adaptation = golden.adapter(&model.config).adaptation();
    model.add_adapter(Adaptation { dropout: 0.1, ..adaptation }, 7).expect("a fresh adapter");
    let tokens = &golden.rows[1].0;
    assert_eq!(base.logits(tokens).expect("logits"), model.logits(tokens).expect("logits"));
}

/// Dropout depends on (seed, step, row). It does not depend on the batch that a row is in, nor on
/// the order of rows.
#[test]
fn dropout_is_a_function_of_seed_step_and_row() {
    let golden = Golden::load("llama3");
    let mut model = golden.model();
    let adapter = golden.adapter(&model.config);
    model.add_adapter(Adaptation { dropout: 0.4, ..adapter.adaptation() }, 7).expect("a fresh adapter");
    model.set_parameters(&adapter.values);
    let mut run = |rows: Vec<usize>, randomness: Randomness| {
        let whole = golden.batch();
        let batch = Batch { rows: rows.iter().map(|&n| whole.rows[n]).collect() };
        let mut gradients = vec![0.0; model.layout().len()];
        model
            .loss_and_gradients(&batch, Backward { randomness, ..backward(false) }, &mut gradients)
            .expect("sums")
            .row_losses
    };
    let at = |seed, step| Randomness { seed, step };
    let together = run(vec![0, 1, 2], at(1, 5));
    assert_eq!(together, run(vec![0, 1, 2], at(1, 5)));
    let turned = run(vec![2, 0], at(1, 5));
    assert!((turned[0] - together[2]).abs() < 1e-5 && (turned[1] - together[0]).abs() < 1e-5);
    assert!((run(vec![0], at(1, 6))[0] - together[0]).abs() > 1e-4, "another step drops other elements");
    assert!((run(vec![0], at(2, 5))[0] - together[0]).abs() > 1e-4, "another seed drops other elements");
}

/// An adapter that the model or the program cannot use is refused.
#[test]
fn every_key_of_an_adapter_is_accounted_for() {
    let golden = Golden::load("llama3");
    let config = golden.model().config;
    let source = directory("llama3").join("adapter");
    let other = Golden::load("qwen3").model().config;
    let error = Adapter::read(&source, &ModelConfig { layers: config.layers[..1].to_vec(), ..config.clone() })
        .expect_err("a layer too many");
    assert!(error.to_string().contains("belong to no LoRA branch"), "{error}");
    let error = Adapter::read(&source, &other).expect_err("another model");
    assert!(error.to_string().contains("has the shape"), "{error}");
    let text = std::fs::read_to_string(source.join("adapter_config.json")).expect("adapter_config.json");
    for (from, to, message) in [
        ("\"use_dora\": false", "\"use_dora\": true", "magnitudes of DoRA are missing"),
        ("\"LORA\"", "\"IA3\"", "peft_type"),
        ("\"lora_alpha\": 8", "\"lora_alpha\": null", "lora_alpha"),
        ("\"bias\": \"none\"", "\"bias\": \"all\"", "bias"),
    ] {
        let changed = tempfile::tempdir().expect("a directory");
        assert!(text.contains(from), "{from}");
        std::fs::copy(source.join("adapter_model.safetensors"), changed.path().join("adapter_model.safetensors"))
            .expect("a copy");
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(changed.path().join("adapter_config.json"))
            .expect("a file");
        std::io::Write::write_all(&mut file, text.replace(from, to).as_bytes()).expect("written");
        let error = Adapter::read(changed.path(), &config).expect_err(to);
        assert!(error.to_string().contains(message), "{error}");
    }
}

/// f16 and bf16, if the GPU has them: results are within what their 11 and 8 bits allow, and the
/// same for any loss scale that does not make gradients overflow.
fn gpu_sixteen_bit_types_are_close_to_f32(family: &'static str) {
    let Some(gpu) = gpu() else {
        println!("SKIPPED: FINETUNE_TEST_DEVICE is not gpu");
        return;
    };
    let golden = Golden::load(family);
    let want = gradients(&mut golden.with_adapter(), &golden.batch(), false);
    for kind in gpu.types.iter().filter(|kind| **kind != FloatType::F32) {
        let (loss_bound, bound) = if *kind == FloatType::F16 { (1e-3, 1e-2) } else { (1e-2, 1e-1) };
        let at = Placement::gpu(gpu.device.clone(), *kind);
        let mut model = Model::load(&directory(family), &at).expect("the model loads");
        model.attach(&golden.adapter(&model.config)).expect("an adapter of this model");
        for checkpointing in [false, true] {
            for scale in [64.0, 1024.0] {
                let mut got = vec![0.0; model.layout().len()];
                let sums = model
                    .loss_and_gradients(
                        &golden.batch(),
                        Backward { loss_scale: scale, ..backward(checkpointing) },
                        &mut got,
                    )
                    .expect("a device that works");
                let loss = (sums.loss - want.0.loss).abs() / want.0.loss;
                assert!(loss < loss_bound, "{family} {kind:?} {scale}: {loss:e}");
                if scale > 64.0 && got.iter().any(|number| !number.is_finite()) {
                    // The loop sees it, and computes the step again with half the scale.
                    println!("{family} {kind:?}, loss scale {scale}: gradients overflow");
                    continue;
                }
                let difference = relative_norm(&got, &want.1);
                println!("{family} {kind:?}, loss scale {scale}: loss {loss:.1e}, gradients {difference:.1e}");
                assert!(difference < bound, "{family} {kind:?} {scale}: {difference:e}");
            }
        }
    }
}

of_each_family!(gpu_sixteen_bit_types_are_close_to_f32);

/// The gradient is linear in the coefficients of rows, one at a time or together, also with
/// checkpointing. The gradient of row 0 alone is that of a batch of row 0.
#[test]
fn gradients_are_linear_in_the_coefficients() {
    let golden = Golden::load("qwen3");
    let mut model = golden.with_adapter();
    let counts: Vec<usize> =
        golden.rows.iter().map(|(_, trained)| trained.iter().skip(1).filter(|&&t| t).count()).collect();
    let mut of = |by_row: &[f32], checkpointing: bool| {
        let coefficients = |losses: &[f32]| -> Vec<f32> {
            let each: Vec<f32> =
                counts.iter().zip(by_row).flat_map(|(&count, &by)| std::iter::repeat_n(by, count)).collect();
            assert_eq!(losses.len(), each.len(), "a loss for each target");
            each
        };
        let backward = Backward { coefficients: Coefficients::Of(&coefficients), ..backward(checkpointing) };
        let mut gradients = vec![0.0; model.layout().len()];
        model.loss_and_gradients(&golden.batch(), backward, &mut gradients).expect("a device that works");
        gradients
    };
    let (first, last, both) = (of(&[1.0, 0.0, 0.0], false), of(&[0.0, 0.0, 1.0], true), of(&[0.5, 0.0, -2.0], false));
    let sum: Vec<f32> = first.iter().zip(&last).map(|(a, b)| 0.5 * a - 2.0 * b).collect();
    assert!(relative_norm(&both, &sum) < GRADIENTS, "{}", relative_norm(&both, &sum));
    assert!(relative_norm(&of(&[0.5, 0.0, -2.0], true), &sum) < GRADIENTS);
    let mut alone = golden.with_adapter();
    let (_, want) = gradients(&mut alone, &batch(&golden.rows[..1]), false);
    assert!(relative_norm(&first, &want) < GRADIENTS, "{}", relative_norm(&first, &want));
}
