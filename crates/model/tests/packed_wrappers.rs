//! Multimodal models whose text model is packed: in plain numbers the other parts are put back, decoded if they are
//! packed too, and what MLX packed is written as the text model alone. Packed for bitsandbytes, other parts stay.

use std::collections::BTreeMap;
use std::path::Path;

use finetune_model::adapter::Adapter;
use finetune_model::merge::{Merged, MergedForm, write_merged};
use finetune_model::{Model, ModelConfig, ModelError, Placement, Scheme, quantize_model};
use finetune_store::{Dtype, RealDisk, Staging};
use serde_json::{Value, json};
use tempfile::TempDir;

mod golden;
mod made;

use crate::golden::goldens;
use crate::made::{MODEL, Tensor, changed, read_json, read_tensors};

/// Where the text model's matrix of this name is a second time, as one of another part.
const COPIED: &str = "multi_modal_projector.linear";
/// Tensors of other parts that are not packed.
const PLAIN: [(&str, Dtype, usize); 2] =
    [("vision_tower.ln_pre.weight", Dtype::BF16, 2), ("vision_tower.position_ids", Dtype::I64, 8)];

/// A golden packed text model in a multimodal one.
struct Case {
    golden: &'static str,
    /// Its type there, and the type and class of the whole.
    types: [&'static str; 3],
    /// How names of the text model begin in the files.
    spelling: &'static str,
    /// The module that another part has, too.
    module: &'static str,
    /// Whether config.json of the text model says how it is packed, and not that of the whole.
    in_text: bool,
}

const MISTRAL3: [&str; 3] = ["mistral", "mistral3", "Mistral3ForConditionalGeneration"];
const KIMI: [&str; 3] = ["kimi_k2", "kimi_k25", "KimiK25ForConditionalGeneration"];
const OLDER: &str = "language_model.model.";
const NEWER: &str = "model.language_model.";
const DOWN: &str = "model.layers.0.mlp.down_proj";

const fn mistral3(golden: &'static str, spelling: &'static str) -> Case {
    Case { golden, types: MISTRAL3, spelling, module: DOWN, in_text: false }
}

const CASES: [Case; 5] = [
    mistral3("fp8_channels", OLDER),
    mistral3("nf4", NEWER),
    mistral3("int8", OLDER),
    Case {
        golden: "int4_kimi_k2",
        types: KIMI,
        spelling: OLDER,
        module: "model.layers.1.mlp.experts.0.down_proj",
        in_text: true,
    },
    Case { golden: "fp8_deepseek_v3", types: KIMI, spelling: OLDER, module: DOWN, in_text: false },
];

impl Case {
    /// The text model by itself.
    fn alone(&self) -> TempDir {
        changed(&goldens().join("packed").join(self.golden), MODEL, |config, _| {
            config["model_type"] = self.types[0].into();
            if self.types[0] == "mistral" {
                config["sliding_window"] = Value::Null;
            }
        })
    }

    fn name(&self, name: &str) -> String {
        match (name.strip_prefix("model."), self.spelling) {
            (Some(rest), spelling) => format!("{spelling}{rest}"),
            (None, OLDER) => format!("language_model.{name}"),
            (None, _) => name.to_owned(),
        }
    }

    fn wrapped(&self) -> TempDir {
        changed(self.alone().path(), MODEL, |config, tensors| {
            let copied = |tensor: &Tensor| {
                let end = tensor.0.strip_prefix(self.module).filter(|end| end.starts_with('.'))?;
                Some((format!("{COPIED}{end}"), tensor.1, tensor.2.clone(), tensor.3.clone()))
            };
            let copies: Vec<Tensor> = tensors.iter().filter_map(copied).collect();
            tensors.iter_mut().for_each(|tensor| tensor.0 = self.name(&tensor.0));
            tensors.extend(copies);
            tensors.extend(PLAIN.map(|(name, dtype, bytes)| {
                (name.to_owned(), dtype, vec![bytes / dtype.size()], vec![7; bytes].into())
            }));
            let mut text = std::mem::take(config);
            let mut whole = json!({"architectures": [self.types[2]], "model_type": self.types[1], "dtype": "bfloat16"});
            for key in ["quantization", "quantization_config"] {
                if let (Some(value), false) = (text.get(key).cloned(), self.in_text) {
                    whole[key] = value;
                    text.as_object_mut().expect("an object").remove(key);
                }
            }
            whole["tie_word_embeddings"] = text["tie_word_embeddings"].clone();
            whole["text_config"] = text;
            *config = whole;
        })
    }
}

fn merged(base: &Path, adapter: Option<&Path>, form: MergedForm, parent: &Path) -> Result<Merged, ModelError> {
    let config = ModelConfig::load(base).expect("a config");
    let adapter = match adapter {
        Some(adapter) => Adapter::read(adapter, &config).expect("an adapter"),
        None => Adapter::none(&config),
    };
    let mut staging = Staging::begin(&RealDisk, parent, "merged").expect("a new directory");
    let merged = write_merged(&RealDisk, base, &adapter, &mut staging, form, &[], &|_, _| {})?;
    staging.publish(&json!({"kind": "merged"})).expect("published");
    Ok(merged)
}

/// Type, shape and bytes of each tensor, by name.
type Weights = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn weights(directory: &Path) -> Weights {
    let tensors = read_tensors(&directory.join("model.safetensors"));
    tensors.into_iter().map(|(name, dtype, shape, bytes)| (name, (dtype, shape, bytes.to_vec()))).collect()
}

fn bits(directory: &Path, placement: &Placement) -> Vec<u32> {
    let model = Model::load(directory, placement).expect("the model loads");
    model.logits(&[5, 17, 42, 9, 33, 8, 61]).expect("tokens").into_iter().map(f32::to_bits).collect()
}

fn plain() -> MergedForm {
    MergedForm::of_shards(u64::MAX)
}

#[test]
fn other_parts_are_put_back_and_decoded() {
    for case in &CASES {
        let (alone, whole, name) = (case.alone(), case.wrapped(), case.golden);
        let base = read_json(&goldens().join("packed").join(name).join("golden.json"))["base"].clone();
        let adapter = goldens().join("packed/bases").join(base.as_str().expect("a base")).join("adapter");
        let folders = [(); 3].map(|()| tempfile::tempdir().expect("a directory"));
        let [of_whole, of_text, of_base] = folders.each_ref().map(|folder| folder.path());
        let said = merged(whole.path(), Some(&adapter), plain(), of_whole).expect("a merge");
        assert_eq!(said.alone, None, "{name}");
        assert!(said.notice.is_some_and(|notice| notice.contains("packed weights")), "{name}");
        merged(alone.path(), Some(&adapter), plain(), of_text).expect("a merge");
        merged(alone.path(), None, plain(), of_base).expect("a merge");
        let [of_whole, of_text, of_base] = [of_whole, of_text, of_base].map(|folder| folder.join("merged"));

        let mut found = weights(&of_whole);
        for (part, dtype, bytes) in PLAIN {
            let part = found.remove(part).unwrap_or_else(|| panic!("{name}: {part} was there"));
            assert_eq!(part, (dtype, vec![bytes / dtype.size()], vec![7; bytes]), "{name}");
        }
        // Nothing was trained of the copy, so it is what the base has.
        let copy = found.remove(&format!("{COPIED}.weight")).expect("decoded");
        assert!(copy == weights(&of_base)[&format!("{}.weight", case.module)], "{name}: another value of {COPIED}");
        let text = weights(&of_text).into_iter().map(|(own, tensor)| (case.name(&own), tensor));
        assert!(found == text.collect::<Weights>(), "{name}: {:?}", found.keys());
        assert!(weights(&of_text) != weights(&of_base), "{name}: nothing was merged");

        let config = read_json(&of_whole.join("config.json"));
        assert_eq!(config["model_type"], case.types[1], "{name}");
        for object in [&config, &config["text_config"]] {
            assert_eq!((object.get("quantization"), object.get("quantization_config")), (None, None), "{name}");
        }
        let cpu = Placement::cpu(None);
        assert!(bits(&of_whole, &cpu) == bits(&of_text, &cpu), "{name}: other logits");
    }
}

/// What mlx-vlm has beside the text model is in no form of transformers.
#[test]
fn of_mlx_the_text_model_is_written_alone() {
    let case = mistral3("mlx4", OLDER);
    let case = Case { module: "model.layers.0.mlp.gate_proj", ..case };
    let (alone, whole) = (case.alone(), case.wrapped());
    let folders = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
    let [of_whole, of_text] = folders.each_ref().map(|folder| folder.path());
    let said = merged(whole.path(), None, plain(), of_whole).expect("a merge").alone.expect("said");
    let want = "written as MistralForCausalLM, the text model of Mistral3ForConditionalGeneration alone: MLX has \
                multi_modal_projector, vision_tower in another form than transformers";
    assert_eq!(said, want);
    merged(alone.path(), None, plain(), of_text).expect("a merge");
    let [of_whole, of_text] = [of_whole, of_text].map(|folder| folder.join("merged"));
    assert!(weights(&of_whole) == weights(&of_text));
    let config = read_json(&of_whole.join("config.json"));
    assert_eq!(config["architectures"], json!(["MistralForCausalLM"]));
    assert_eq!((&config["model_type"], config.get("text_config")), (&json!("mistral"), None));
    // What is said of the fixture's own class does not matter here.
    let load = |directory: &Path| {
        let config = ModelConfig::load(directory).expect("a config");
        ModelConfig { notices: Vec::new(), ..config }
    };
    assert_eq!(load(&of_whole), load(&of_text));
}

#[test]
fn codes_that_do_not_tell_their_shape_are_refused() {
    let whole = mistral3("gptq", NEWER).wrapped();
    let folder = tempfile::tempdir().expect("a directory");
    let error = merged(whole.path(), None, plain(), folder.path()).expect_err("no shape").to_string();
    assert!(error.contains("`multi_modal_projector.linear.qweight`") && error.contains("tell its shape"), "{error}");
}

/// bitsandbytes packs the text model as `model.quantization` does, and is told to leave all else.
#[test]
fn for_bitsandbytes_other_parts_stay() {
    let base = golden::directory("gemma3_multimodal");
    for scheme in [Scheme::Nf4, Scheme::Int8] {
        let folder = tempfile::tempdir().expect("a directory");
        let mut staging = Staging::begin(&RealDisk, folder.path(), "packed").expect("a new directory");
        quantize_model(&RealDisk, &base, scheme, &mut staging, &|_, _| {}).expect("packed");
        let packed = staging.publish(&json!({"kind": "packed model"})).expect("published");
        let (before, after) = (weights(&base), weights(&packed));
        for (name, tensor) in before.iter().filter(|(name, _)| !name.starts_with("language_model.")) {
            assert!(after[name] == *tensor, "{name}");
        }
        let query = "language_model.model.layers.0.self_attn.q_proj";
        let part = if scheme == Scheme::Nf4 { ".weight.absmax" } else { ".SCB" };
        assert!(after.contains_key(&format!("{query}{part}")), "{:?}", after.keys());
        let config = read_json(&packed.join("config.json"));
        let skipped = &config["quantization_config"]["llm_int8_skip_modules"];
        let want =
            ["lm_head", "model.multi_modal_projector", "multi_modal_projector", "model.vision_tower", "vision_tower"];
        assert_eq!(*skipped, json!(want));
        let while_loaded = Placement::cpu(None).quantized(Some(scheme));
        assert!(bits(&packed, &Placement::cpu(None)) == bits(&base, &while_loaded), "{scheme:?}");
        // It is a base again, whose other parts are plain.
        let again = tempfile::tempdir().expect("a directory");
        let adapter = base.join("adapter");
        merged(&packed, Some(&adapter), plain(), again.path()).expect("a merge");
        assert!(before.keys().eq(weights(&again.path().join("merged")).keys()));
    }
}
