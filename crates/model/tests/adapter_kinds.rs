//! DoRA, modules trained in full, LoRA on embedding and output layer, against PEFT
//! (`scripts/make_adapter_goldens.py` made the files). Bounds are those of `goldens.rs`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use finetune_model::adapter::Adapter;
use finetune_model::merge::{MergedForm, compare, write_merged};
use finetune_model::{Adaptation, Backward, BaseName, Batch, Coefficients, Model, Randomness};
use finetune_store::{RealDisk, Staging, TensorFile};
use serde_json::Value;

mod checkpoint;
mod golden;

use golden::{
    ANY, GRADIENTS, LOGITS, Rows, batch, floats, goldens, greedy_as_in_whole_passes, json, largest_difference,
    placement, relative_norm, rows,
};

/// Makes one test of a check for each case, `CHECK::CASE`. The second form names the cases.
macro_rules! of_each_case {
    ($check:ident) => {
        of_each_case!($check: dora dora_biases saved_tied saved_embedding_tied saved_both saved_untied embedding_tied
            head_tied vocabulary_untied);
    };
    ($check:ident: $($case:ident)+) => {
        mod $check {
            $(
                #[test]
                fn $case() {
                    super::$check(stringify!($case));
                }
            )+
        }
    };
}

/// Merged weights, of up to about 2: a few units in the last place.
const WEIGHTS: f32 = 1e-6;

struct Case {
    name: &'static str,
    directory: PathBuf,
    base: PathBuf,
    about: Value,
    tensors: TensorFile,
    rows: Rows,
}

impl Case {
    fn load(name: &'static str) -> Case {
        let directory = goldens().join("adapters").join(name);
        let about = json(&directory.join("case.json"));
        let base = golden::directory(about["family"].as_str().expect("a family"));
        let rows = rows(&json(&base.join("golden.json")));
        let tensors = TensorFile::open(&directory.join("golden.safetensors")).expect("golden.safetensors");
        Case { name, directory, base, about, tensors, rows }
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        floats(&self.tensors, name)
    }

    fn model(&self) -> Model {
        Model::load(&self.base, &placement()).expect("the model loads")
    }

    fn adapter(&self, model: &Model) -> Adapter {
        let adapter = Adapter::read(&self.directory.join("adapter"), &model.config).expect("the adapter loads");
        assert!(adapter.notices.is_empty(), "{}: {:?}", self.name, adapter.notices);
        adapter
    }

    fn with_adapter(&self) -> Model {
        let mut model = self.model();
        let adapter = self.adapter(&model);
        model.attach(&adapter).expect("attached");
        model
    }

    fn batch(&self) -> Batch<'_> {
        batch(&self.rows)
    }

    fn expect_logits(&self, model: &Model, what: &str) {
        for (n, (tokens, _)) in self.rows.iter().enumerate() {
            let got = model.logits(tokens).expect("tokens of the vocabulary");
            let difference = largest_difference(&got, &self.floats(&format!("logits.{n}")));
            assert!(difference < LOGITS, "{} {what} {n}: {difference:e}", self.name);
        }
    }

    /// Every gradient of the mean loss, against `prefix` and its name.
    fn expect_gradients(&self, model: &Model, got: &[f32], prefix: &str) {
        let mut found = BTreeSet::new();
        let tokens = self.about["trained_tokens"].as_u64().expect("a count") as f32;
        for parameter in model.layout().iter() {
            let got: Vec<f32> = got[parameter.range.clone()].iter().map(|g| g / tokens).collect();
            let name = format!("{prefix}{}", parameter.name);
            let difference = relative_norm(&got, &self.floats(&name));
            assert!(difference < GRADIENTS, "{} {name}: {difference:e}", self.name);
            found.insert(name);
        }
        let expected: BTreeSet<String> =
            self.tensors.names().filter(|name| name.starts_with(prefix)).map(str::to_owned).collect();
        assert_eq!(found, expected, "{}", self.name);
    }
}

fn gradients(model: &mut Model, batch: &Batch, randomness: Randomness, checkpointing: bool) -> (f64, Vec<f32>) {
    let mut gradients = vec![0.0; model.layout().len()];
    let backward = Backward { randomness, checkpointing, loss_scale: 1.0, coefficients: Coefficients::Ones };
    let sums = model.loss_and_gradients(batch, backward, &mut gradients).expect("a device that works");
    (sums.loss, gradients)
}

fn logits_loss_and_every_gradient(name: &'static str) {
    let case = Case::load(name);
    let mut model = case.with_adapter();
    case.expect_logits(&model, "logits");
    let (loss, got) = gradients(&mut model, &case.batch(), ANY, false);
    let want = case.about["loss_sum"].as_f64().expect("a loss");
    assert!((loss - want).abs() < 1e-6 * want, "{name}: loss {loss} against {want}");
    assert!((model.loss(&case.batch()).expect("sums").loss - loss).abs() < 1e-6 * want, "{name}: evaluation");
    case.expect_gradients(&model, &got, "grad.");
}

of_each_case!(logits_loss_and_every_gradient);

/// The golden's mask is drawn in Python as it is drawn here.
fn gradients_with_dropout(name: &'static str) {
    let case = Case::load(name);
    let mut model = case.model();
    let adapter = case.adapter(&model);
    let dropout = &case.about["dropout"];
    let number = |key: &str| dropout[key].as_u64().expect("a number");
    let probability = dropout["probability"].as_f64().expect("a probability");
    model.add_adapter(Adaptation { dropout: probability, ..adapter.adaptation() }, 1).expect("a fresh adapter");
    model.set_parameters(&adapter.values);
    let randomness = Randomness { seed: number("seed"), step: number("step") };
    for checkpointing in [false, true] {
        let (loss, got) = gradients(&mut model, &case.batch(), randomness, checkpointing);
        let want = dropout["loss_sum"].as_f64().expect("a loss");
        assert!((loss - want).abs() < 1e-6 * want, "{name}: loss {loss} against {want}");
        case.expect_gradients(&model, &got, "dropout.grad.");
    }
}

of_each_case!(gradients_with_dropout: dora dora_biases vocabulary_untied);

fn checkpointing_changes_no_bit(name: &'static str) {
    let case = Case::load(name);
    let mut model = case.with_adapter();
    let plain = gradients(&mut model, &case.batch(), ANY, false);
    let again = gradients(&mut model, &case.batch(), ANY, true);
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(plain.0, again.0, "{name}");
    assert!(bits(&plain.1) == bits(&again.1), "{name}: {}", relative_norm(&again.1, &plain.1));
}

of_each_case!(checkpointing_changes_no_bit);

/// Exactly the tensors that PEFT's merge changes are changed, and the merged model has the adapter's
/// logits. The second directory has several files.
fn merged_models_equal_their_adapters(name: &'static str) {
    let case = Case::load(name);
    let adapter = case.adapter(&case.model());
    let parent = tempfile::tempdir().expect("a directory");
    let base = TensorFile::open(&case.base.join("model.safetensors")).expect("the base");
    for (folder, shard_bytes) in [("whole", u64::MAX), ("sharded", 20_000)] {
        let mut staging = Staging::begin(&RealDisk, parent.path(), folder).expect("a new directory");
        write_merged(
            &RealDisk,
            &case.base,
            &adapter,
            &mut staging,
            MergedForm::of_shards(shard_bytes),
            &[],
            &|_, _| {},
        )
        .expect("a merge");
        let merged = staging.publish(&serde_json::json!({"kind": "merged"})).expect("published");
        case.expect_logits(&Model::load(&merged, &placement()).expect("the merged model loads"), "merged");
        let comparison = compare(&case.base, &adapter, &merged, &placement()).expect("a comparison");
        assert!(comparison.largest < LOGITS && comparison.agreeing == comparison.positions, "{comparison:?}");
        if folder == "sharded" {
            continue;
        }
        let file = TensorFile::open(&merged.join("model.safetensors")).expect("one file");
        for tensor in file.names() {
            let got = floats(&file, tensor);
            let reference = format!("merged.{tensor}");
            if case.tensors.get(&reference).is_some() {
                let difference = largest_difference(&got, &case.floats(&reference));
                assert!(difference < WEIGHTS, "{name} {tensor}: {difference:e}");
            } else {
                // A tied output layer that stays as it was.
                let own = if base.get(tensor).is_some() { tensor } else { "model.embed_tokens.weight" };
                assert!(got == floats(&base, own), "{name}: {tensor} has changed");
            }
        }
        let changed = case.about["changed"].as_array().expect("a list");
        assert!(changed.iter().all(|tensor| file.get(tensor.as_str().expect("a name")).is_some()), "{name}");
        let tied = json(&merged.join("config.json"))["tie_word_embeddings"] == Value::Bool(true);
        assert_eq!(tied, file.get("lm_head.weight").is_none(), "{name}: config.json");
    }
}

of_each_case!(merged_models_equal_their_adapters);

/// What is written is read again, with the settings that PEFT had.
fn files_are_read_again(name: &'static str) {
    let case = Case::load(name);
    let mut model = case.with_adapter();
    let values = model.parameters().expect("values");
    let adapter = case.adapter(&model);
    assert!(adapter.values == values, "{name}");
    let made = tempfile::tempdir().expect("a directory");
    for (file, bytes) in checkpoint::files(&model, &values, &BaseName::default()) {
        use std::io::Write as _;
        let file = std::fs::File::create_new(made.path().join(file));
        file.expect("a new file").write_all(&bytes).expect("written");
    }
    let again = Adapter::read(made.path(), &model.config).expect("what was written is read");
    assert_eq!((&again.targets, &again.saved), (&adapter.targets, &adapter.saved), "{name}");
    assert!(again.values == values && again.notices.is_empty(), "{name}: {:?}", again.notices);
    assert!(checkpoint::values(&model, made.path()) == values, "{name}");
    let read = |path: &Path| json(&path.join("adapter_config.json"));
    let (ours, theirs) = (read(made.path()), read(&case.directory.join("adapter")));
    for key in ["use_dora", "use_rslora"] {
        assert_eq!(ours[key], theirs[key], "{name}: {key}");
    }
    let set = |value: &Value| -> BTreeSet<String> {
        value.as_array().into_iter().flatten().map(|name| name.as_str().expect("a name").to_owned()).collect()
    };
    assert_eq!(set(&ours["target_modules"]), set(&theirs["target_modules"]), "{name}");
    let parts = set(&theirs["modules_to_save"]).contains("mlp");
    assert!(
        parts || set(&ours["modules_to_save"]) == set(&theirs["modules_to_save"]) || name == "saved_both",
        "{name}"
    );
}

of_each_case!(files_are_read_again);

/// A fresh adapter changes nothing: B, or A on the embedding, is zero, and magnitudes are the norms.
fn a_fresh_adapter_gives_the_base(name: &'static str) {
    let case = Case::load(name);
    let base = case.model();
    let mut model = case.model();
    let adaptation = case.adapter(&model).adaptation();
    model.add_adapter(adaptation, 7).expect("a fresh adapter");
    let tokens = &case.rows[1].0;
    assert_eq!(base.logits(tokens).expect("logits"), model.logits(tokens).expect("logits"), "{name}");
}

of_each_case!(a_fresh_adapter_gives_the_base);

fn greedy_generation_equals_whole_passes(name: &'static str) {
    greedy_as_in_whole_passes(name, &Case::load(name).with_adapter(), 8);
}

of_each_case!(greedy_generation_equals_whole_passes: dora saved_both vocabulary_untied);
