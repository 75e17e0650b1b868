//! Layers that are read from the disk whenever a pass comes to them: the bits of the model in memory, for every
//! golden model, packed form and kind of adapter.

use std::path::PathBuf;

use finetune_model::adapter::Adapter;
use finetune_model::{
    Backward, Batch, BatchRow, Coefficients, FloatType, Model, Part, Placement, Randomness, RowRequest, Sampling,
};

mod golden;

use golden::families::{self, folders_with};
use golden::{Rows, goldens, json, placement, rows};

/// A base, an adapter on it, and rows.
struct Case {
    name: String,
    base: PathBuf,
    adapter: PathBuf,
    rows: Rows,
}

fn models() -> Vec<Case> {
    let case = |name: String| {
        let base = golden::directory(&name);
        let rows = rows(&json(&base.join("golden.json")));
        Case { name, adapter: base.join("adapter"), base, rows }
    };
    families::names().into_iter().map(case).collect()
}

fn packed() -> Vec<Case> {
    let packed = goldens().join("packed");
    let case = |name: String| {
        let about = json(&packed.join(&name).join("golden.json"));
        let whole = packed.join("bases").join(about["base"].as_str().expect("a base"));
        let base = packed.join(&name);
        let base = if name.starts_with("gguf") { base.join("model.gguf") } else { base };
        Case { rows: rows(&json(&whole.join("rows.json"))), adapter: whole.join("adapter"), base, name }
    };
    folders_with(&packed, "golden.json").into_iter().map(case).collect()
}

fn kinds_of_adapters() -> Vec<Case> {
    let adapters = goldens().join("adapters");
    let case = |name: String| {
        let about = json(&adapters.join(&name).join("case.json"));
        let base = golden::directory(about["family"].as_str().expect("a family"));
        Case { rows: rows(&json(&base.join("golden.json"))), adapter: adapters.join(&name).join("adapter"), base, name }
    };
    folders_with(&adapters, "case.json").into_iter().map(case).collect()
}

/// Where the frozen matrices of the layers are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layers {
    InMemory,
    FromDisk,
    /// The experts among them are read when they are multiplied.
    ByExperts,
}

impl Case {
    fn model(&self, layers: Layers) -> Model {
        let from_disk = layers != Layers::InMemory;
        let placement = placement().with_layers_from_disk(from_disk);
        // Too little memory to keep a file: what is large is read past the system's cache.
        let placement = placement.with_experts_from_disk(layers == Layers::ByExperts).with_host_memory(Some(0));
        let mut model = Model::load(&self.base, &placement).unwrap_or_else(|error| panic!("{}: {error}", self.name));
        let adapter = Adapter::read(&self.adapter, &model.config).unwrap_or_else(|e| panic!("{}: {e}", self.name));
        model.attach(&adapter).expect("an adapter of this model");
        assert_eq!(model.reads_layers(), from_disk);
        model
    }

    /// One batch for each row.
    fn batches(&self) -> Vec<Batch<'_>> {
        let rows = self.rows.iter().enumerate();
        rows.map(|(id, (tokens, trained))| Batch { rows: vec![BatchRow { id: id as u32, tokens, trained }] }).collect()
    }

    /// Two steps of descent, with this many micro-batches at a time and two sums of gradients: losses and
    /// gradients of both steps, and the losses afterwards.
    fn steps(&self, model: &mut Model, at_once: usize) -> Vec<u64> {
        let parts: Vec<Part<'_>> =
            self.batches().into_iter().enumerate().map(|(n, batch)| Part { batch, sum: n % 2 }).collect();
        let mut bits = Vec::new();
        for step in 0..2 {
            let backward = Backward {
                randomness: Randomness { seed: 7, step },
                checkpointing: false,
                loss_scale: 1.0,
                coefficients: Coefficients::Ones,
            };
            let mut gradients = [0, 1].map(|_| vec![0.0; model.layout().len()]);
            for group in parts.chunks(at_once) {
                let [a, b] = &mut gradients;
                let sums = &mut [a.as_mut_slice(), b.as_mut_slice()];
                let losses = model.losses_and_gradients(group, backward, sums, &mut || ()).expect("a step");
                bits.extend(losses.iter().map(|sum| sum.loss.to_bits()));
            }
            bits.extend(gradients.iter().flatten().map(|gradient| u64::from(gradient.to_bits())));
            let mut values = model.parameters().expect("values");
            for (value, (a, b)) in values.iter_mut().zip(gradients[0].iter().zip(&gradients[1])) {
                *value -= 0.01 * (a + b);
            }
            model.set_parameters(&values);
        }
        let losses = model.losses(&self.batches(), &mut || true).expect("losses").expect("nothing ends it");
        bits.extend(losses.iter().map(|sum| sum.loss.to_bits()));
        bits
    }

    /// Returns whether there are experts.
    fn expect_same_bits(&self) -> bool {
        let mut in_memory = self.model(Layers::InMemory);
        let (logits, answer) = (self.logits(&in_memory), self.answer(&in_memory));
        let want = self.steps(&mut in_memory, 1);
        let has_experts = in_memory.config.experts.is_some();
        let by_experts = has_experts.then_some(Layers::ByExperts);
        for layers in [Layers::FromDisk].into_iter().chain(by_experts) {
            let name = format!("{}, {layers:?}", self.name);
            let mut from_disk = self.model(layers);
            assert!(logits == self.logits(&from_disk), "{name}: logits");
            assert_eq!(answer, self.answer(&from_disk), "{name}: an answer");
            let all = self.rows.len();
            from_disk.take_waited();
            assert!(want == self.steps(&mut from_disk, all), "{name}: all micro-batches at once");
            let (_, read) = from_disk.take_waited();
            // Each step goes forward and back, the layer at the turn is read once, and at the end comes a pass
            // without gradients. Below trained layers nothing is read twice.
            let layers_of_model = from_disk.config.layers.len() as u64;
            let most = 2 * (2 * layers_of_model - 1) + layers_of_model;
            assert!(read <= most, "{name}: {read} layers were read, of {layers_of_model}");
            assert!(want == self.steps(&mut self.model(layers), 1), "{name}: one micro-batch at a time");
        }
        has_experts
    }

    fn logits(&self, model: &Model) -> Vec<u32> {
        let logits = model.logits(&self.rows[0].0).expect("tokens of the vocabulary");
        logits.into_iter().map(f32::to_bits).collect()
    }

    fn answer(&self, model: &Model) -> Vec<u32> {
        let tokens = &self.rows[0].0;
        let answer = model.generate(&tokens[..3.min(tokens.len())], 5, Sampling::GREEDY, &[], &mut |_| ());
        answer.expect("an answer").tokens
    }
}

#[test]
fn every_family_has_the_bits_of_the_model_in_memory() {
    let cases = models();
    assert!(cases.len() > 30, "{} golden models", cases.len());
    let with_experts = cases.iter().filter(|case| case.expect_same_bits()).count();
    assert!(with_experts > 8, "{with_experts} golden models with experts");
}

#[test]
fn every_packed_form_has_the_bits_of_the_model_in_memory() {
    let cases = packed();
    assert!(cases.len() > 15, "{} golden models", cases.len());
    // Kimi K2's experts in INT4 among them.
    let with_experts: Vec<&str> =
        cases.iter().filter(|case| case.expect_same_bits()).map(|case| case.name.as_str()).collect();
    assert!(with_experts.len() > 3 && with_experts.contains(&"int4_kimi_k2"), "{with_experts:?} have experts");
}

#[test]
fn every_kind_of_adapter_has_the_bits_of_the_model_in_memory() {
    let cases = kinds_of_adapters();
    assert!(cases.len() > 7, "{} golden adapters", cases.len());
    cases.iter().for_each(|case| {
        case.expect_same_bits();
    });
}

/// All prompts are one pass over the disk, and so is the next token of all rows, with the answers of the model in
/// memory.
#[test]
fn several_prompts_read_each_layer_once() {
    for case in models() {
        let tokens = &case.rows[0].0;
        let prompts: Vec<&[u32]> = (1..=5).map(|length| &tokens[..length.min(tokens.len())]).collect();
        let limits = [3, 3, 1, 0, 2];
        let request = |(prompt, max_new_tokens)| RowRequest {
            prompt,
            max_new_tokens,
            sampling: Sampling { temperature: 1.0, top_p: 1.0, seed: 5 },
            end_ids: &[],
        };
        let requests: Vec<RowRequest<'_>> = prompts.into_iter().zip(limits).map(request).collect();
        let answers = |model: &Model| model.generate_rows(&requests, &mut |_, _| true).expect("answers");
        let (want, name) = (answers(&case.model(Layers::InMemory)), &case.name);
        for from in [Layers::FromDisk, Layers::ByExperts] {
            let model = case.model(from);
            model.take_waited();
            assert_eq!(answers(&model), want, "{name} {from:?}");
            let (_, read) = model.take_waited();
            // Where texts may become long (LongRoPE), each is answered alone.
            let passes = if name == "phi3" { 9 } else { 3 };
            let layers = model.config.layers.len() as u64;
            assert_eq!(read, passes * layers, "{name} {from:?}: layers that were read, of {layers}");
        }
    }
}

/// Passes may hold every thread of the shared pool while they wait for a layer or an expert.
#[test]
fn one_thread_is_enough() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    let cases = models();
    for name in ["qwen3", "qwen3_moe"] {
        let case = cases.iter().find(|case| case.name == name).expect("a golden model");
        pool.install(|| case.expect_same_bits());
    }
}

/// The golden models are too small to be read past the system's cache. The matrices of this one are not.
#[test]
fn layers_that_are_read_past_the_cache_have_the_same_bits() {
    let base = goldens().join("../../datasets/quickstart/base");
    let tokens: Vec<u32> = (0..40).map(|n| n * 25).collect();
    let logits = |placement: Placement| -> Vec<u32> {
        let model = Model::load(&base, &placement).expect("the model loads");
        model.logits(&tokens).expect("tokens of the vocabulary").into_iter().map(f32::to_bits).collect()
    };
    let want = logits(placement());
    // None of it is past the cache, or all that is large.
    for memory in [None, Some(1 << 40), Some(0)] {
        let found = logits(placement().with_layers_from_disk(true).with_host_memory(memory));
        assert!(found == want, "{memory:?}");
    }
}

/// What is held in another number type than the file has is rounded, and so is each row of an embedding that stays there.
#[test]
fn rounded_numbers_are_those_of_the_model_in_memory() {
    for case in models().iter().filter(|case| ["llama3", "qwen3"].contains(&case.name.as_str())) {
        for held in [FloatType::BF16, FloatType::F16] {
            let logits = |placement: &Placement| -> Vec<u32> {
                let model = Model::load(&case.base, placement).expect("the model loads");
                model.logits(&case.rows[0].0).expect("tokens of the vocabulary").into_iter().map(f32::to_bits).collect()
            };
            let placement = Placement::cpu(Some(held));
            let want = logits(&placement);
            assert!(want != logits(&Placement::cpu(None)), "{} {held:?}: nothing was rounded", case.name);
            assert!(logits(&placement.with_layers_from_disk(true)) == want, "{} {held:?}", case.name);
        }
    }
}

/// A copy of a golden model with numbers that are not finite. `places`: their bytes behind the header, which it is given.
#[expect(clippy::disallowed_methods, reason = "a test damages a file")]
fn damaged(model: &str, places: impl FnOnce(&serde_json::Value) -> Vec<usize>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let source = golden::directory(model);
    std::fs::copy(source.join("config.json"), folder.path().join("config.json")).expect("a copy");
    let mut bytes = std::fs::read(source.join("model.safetensors")).expect("the weights");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let header = serde_json::from_slice(&bytes[8..8 + length]).expect("a header");
    for place in places(&header) {
        bytes[8 + length + place..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    }
    std::fs::write(folder.path().join("model.safetensors"), bytes).expect("a damaged copy");
    folder
}

/// A number of the embedding that is not finite is found when a token needs its row, and named.
#[test]
fn a_damaged_row_of_the_embedding_is_named() {
    let mut element = 0;
    let folder = damaged("llama3", |header| {
        let table = &header["model.embed_tokens.weight"];
        let (start, columns) = (table["data_offsets"][0].as_u64(), table["shape"][1].as_u64());
        let (start, columns) = (start.expect("a place") as usize, columns.expect("columns") as usize);
        assert_eq!(table["dtype"], "F32");
        element = 5 * columns + 1;
        vec![start + 4 * element]
    });
    let model =
        Model::load(folder.path(), &Placement::cpu(None).with_layers_from_disk(true)).expect("rows are read later");
    model.logits(&[1, 2, 3]).expect("tokens with other rows");
    let error = model.logits(&[1, 5, 3]).expect_err("a damaged row").to_string();
    let element = format!("element {element}");
    assert!(error.contains("model.embed_tokens.weight") && error.contains(&element), "{error}");
}

/// What is found wrong in a layer ends a pass with an error that names the file.
#[test]
fn a_damaged_layer_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let source = goldens().join("../../datasets/quickstart/base");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(source.join(name), folder.path().join(name)).expect("a copy");
    }
    // Through the system's cache, and past it.
    let placements =
        [None, Some(0)].map(|memory| Placement::cpu(None).with_layers_from_disk(true).with_host_memory(memory));
    let models = placements.map(|placement| Model::load(folder.path(), &placement).expect("the model loads"));
    let file = std::fs::OpenOptions::new().write(true).open(folder.path().join("model.safetensors")).expect("the file");
    let length = file.metadata().expect("metadata").len();
    file.set_len(length / 4).expect("a shorter file");
    for model in models {
        let error = model.logits(&[1, 2, 3]).expect_err("a layer is missing").to_string();
        let lengths = format!("it had {length} bytes, and has {} now", length / 4);
        assert!(error.contains("model.safetensors") && error.contains(&lengths), "{error}");
    }
}

/// A number in a file that is not finite is found when its expert is multiplied, and named, forward and in a step.
#[test]
fn a_damaged_expert_is_named() {
    let folder = damaged("qwen3_moe", |header| {
        // In all experts of the last layer, so that one that is used is among them.
        let is_of_last = |name: &str| name.contains(".layers.2.") && name.contains(".experts.");
        let experts = header.as_object().expect("tensors").iter().filter(|(name, _)| is_of_last(name));
        let places: Vec<usize> =
            experts.map(|(_, tensor)| tensor["data_offsets"][0].as_u64().expect("a place") as usize).collect();
        assert!(!places.is_empty(), "experts of layer 2");
        places
    });
    let placement = Placement::cpu(None).with_layers_from_disk(true).with_experts_from_disk(true);
    let model = Model::load(folder.path(), &placement).expect("layers are read later");
    for _ in 0..2 {
        let error = model.logits(&[1, 2, 3]).expect_err("an expert is damaged").to_string();
        assert!(error.contains("model.safetensors") && error.contains("layers.2.mlp.experts."), "{error}");
    }
}
