//! Multimodal models: the text model in them is read, trained and merged, and the rest stays as it is.

mod checkpoint;
mod made;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use finetune_model::adapter::{Adapter, BaseName};
use finetune_model::merge::{MergedForm, write_merged};
use finetune_model::{Model, ModelConfig, Placement};
use finetune_store::{Dtype, RealDisk, Staging};

use crate::made::{Tensor, golden, model, read_json, read_tensors};

const FAMILY: &str = "gemma3_multimodal";

fn bits(directory: &Path) -> Vec<u32> {
    let model = Model::load(directory, &Placement::cpu(None)).expect("the model loads");
    model.logits(&[5, 17, 42, 9, 33, 8, 61]).expect("tokens").into_iter().map(f32::to_bits).collect()
}

/// Names of transformers 5 in memory, which some files have too.
fn as_in_memory(tensors: &mut [Tensor]) {
    for tensor in tensors {
        tensor.0 = match tensor.0.strip_prefix("language_model.model.") {
            Some(rest) => format!("model.language_model.{rest}"),
            None => format!("model.{}", tensor.0),
        };
    }
}

#[test]
fn both_spellings_are_read() {
    let made = model(FAMILY, |_, tensors| as_in_memory(tensors));
    assert!(bits(made.path()) == bits(&golden(FAMILY)));
}

#[test]
fn what_takes_no_part_is_said() {
    for (directory, part) in [
        (golden(FAMILY), "tensors of `multi_modal_projector`, `vision_tower` take no part"),
        (
            model(FAMILY, |_, tensors| as_in_memory(tensors)).keep(),
            "tensors of `model.multi_modal_projector`, `model.vision_tower` take no part",
        ),
    ] {
        let config = Model::check(&directory).expect("a model");
        assert_eq!(config.wrapper.map(|wrapper| wrapper.class).as_deref(), Some("Gemma3ForConditionalGeneration"));
        assert!(config.notices.iter().any(|notice| notice.contains(part)), "{:?}", config.notices);
    }
}

/// Type, shape and bytes of each tensor of a model, by its name.
fn weights(directory: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let tensors = read_tensors(&directory.join("model.safetensors"));
    tensors.into_iter().map(|(name, dtype, shape, bytes)| (name, (dtype, shape, bytes.to_vec()))).collect()
}

/// The base with the adapter in it, below this folder.
fn merged(base: &Path, adapter: &Adapter, parent: &Path) -> PathBuf {
    let mut staging = Staging::begin(&RealDisk, parent, "merged").expect("a new directory");
    let form = MergedForm::of_shards(u64::MAX);
    write_merged(&RealDisk, base, adapter, &mut staging, form, &[], &|_, _| {}).expect("a merge");
    staging.publish(&serde_json::json!({"kind": "merged"})).expect("published")
}

/// A merged model has every tensor of its base under the same name, and changes those that have branches.
#[test]
fn a_merged_model_has_all_parts() {
    for (spelling, base) in
        [("hub", golden(FAMILY)), ("in memory", model(FAMILY, |_, tensors| as_in_memory(tensors)).keep())]
    {
        let config = ModelConfig::load(&base).expect("a config");
        let adapter = Adapter::read(&golden(FAMILY).join("adapter"), &config).expect("an adapter");
        let parent = tempfile::tempdir().expect("a directory");
        let merged = merged(&base, &adapter, parent.path());
        let (before, after) = (weights(&base), weights(&merged));
        assert!(before.keys().eq(after.keys()), "{spelling}: {:?}", after.keys());
        for (name, tensor) in &before {
            let has_branch =
                ["q_proj.weight", "v_proj.weight", "down_proj.weight"].iter().any(|end| name.ends_with(end))
                    && !name.contains("vision_tower");
            assert_eq!(after[name] != *tensor, has_branch, "{spelling}: {name}");
        }
        assert_eq!(read_json(&merged.join("config.json")), read_json(&base.join("config.json")), "{spelling}");
        assert!(bits(&merged) != bits(&base), "{spelling}");
    }
}

/// PEFT's names are those of the whole model, and the modules are named in full: the last parts of their
/// names would choose modules of the vision tower too.
#[test]
fn an_adapter_names_modules_of_the_whole_model() {
    let mut model = Model::load(&golden(FAMILY), &Placement::cpu(None)).expect("the model loads");
    let adapter = Adapter::read(&golden(FAMILY).join("adapter"), &model.config).expect("an adapter");
    model.attach(&adapter).expect("attached");
    let values = model.parameters().expect("values");
    let files = checkpoint::files(&model, &values, &BaseName { name: "base".to_owned(), revision: None });
    let written = tempfile::tempdir().expect("a directory");
    for (name, bytes) in &files {
        made::write(&written.path().join(name), bytes);
    }
    let config = read_json(&written.path().join("adapter_config.json"));
    let modules = config["target_modules"].as_array().expect("a list");
    assert!(
        modules.iter().all(|name| name.as_str().is_some_and(|name| name.starts_with("model.language_model.layers.")))
    );
    let names = |directory: &Path| -> BTreeMap<String, Vec<u8>> {
        let tensors = read_tensors(&directory.join("adapter_model.safetensors"));
        tensors.into_iter().map(|(name, _, _, bytes)| (name, bytes.to_vec())).collect()
    };
    assert_eq!(names(written.path()), names(&golden(FAMILY).join("adapter")));
    let again = Adapter::read(written.path(), &model.config).expect("an adapter");
    assert_eq!(again.targets, adapter.targets);
    assert_eq!(checkpoint::values(&model, written.path()), values);
}

/// A text model as the hub has it in a wrapper.
struct Wrapped {
    /// The golden text model, and its `model_type` in the wrapper.
    text: (&'static str, &'static str),
    /// `model_type` and class of the wrapper.
    wrapper: (&'static str, &'static str),
    /// What `model.` of the text model is in the files, and whether its output layer is renamed too.
    spelling: (&'static str, bool),
    /// A tensor of each of the other parts, which are a vision tower, a projector, a head that predicts further tokens.
    others: [&'static str; 2],
    /// These parts, as they are said.
    parts: &'static str,
    /// What parameters of an adapter begin with: modules of the whole where transformers' `AutoModelForCausalLM`
    /// loads that, otherwise of the text model alone.
    adapter: &'static str,
}

const WRAPPED: [Wrapped; 5] = [
    Wrapped {
        text: ("qwen3_5", "qwen3_5_text"),
        wrapper: ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
        spelling: ("model.language_model.", false),
        others: ["model.visual.merger.norm.weight", "mtp.norm.weight"],
        parts: "`model.visual`, `mtp`",
        adapter: "base_model.model.model.layers.",
    },
    Wrapped {
        text: ("qwen3_5_moe", "qwen3_5_moe_text"),
        wrapper: ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
        spelling: ("model.language_model.", false),
        others: ["model.visual.merger.norm.weight", "mtp.norm.weight"],
        parts: "`model.visual`, `mtp`",
        adapter: "base_model.model.model.layers.",
    },
    Wrapped {
        text: ("gemma4", "gemma4_text"),
        wrapper: ("gemma4", "Gemma4ForConditionalGeneration"),
        spelling: ("model.language_model.", false),
        others: ["model.embed_vision.embedding_projection.weight", "model.vision_tower.std_scale"],
        parts: "`model.embed_vision`, `model.vision_tower`",
        adapter: "base_model.model.model.language_model.",
    },
    Wrapped {
        text: ("ministral3", "ministral3"),
        wrapper: ("mistral3", "Mistral3ForConditionalGeneration"),
        spelling: ("language_model.model.", true),
        others: ["multi_modal_projector.norm.weight", "vision_tower.ln_pre.weight"],
        parts: "`multi_modal_projector`, `vision_tower`",
        adapter: "base_model.model.model.language_model.",
    },
    Wrapped {
        text: ("deepseek_v3", "kimi_k2"),
        wrapper: ("kimi_k25", "KimiK25ForConditionalGeneration"),
        spelling: ("language_model.model.", true),
        others: ["mm_projector.pre_norm.weight", "vision_tower.encoder.final_layernorm.weight"],
        parts: "`mm_projector`, `vision_tower`",
        adapter: "base_model.model.model.layers.",
    },
];

/// The golden text model in its wrapper.
fn wrapped(case: &Wrapped) -> tempfile::TempDir {
    model(case.text.0, |config, tensors| {
        let mut text = config.clone();
        text.as_object_mut().expect("an object").remove("architectures");
        text["model_type"] = case.text.1.into();
        *config = serde_json::json!({
            "architectures": [case.wrapper.1], "model_type": case.wrapper.0, "text_config": text,
        });
        let (spelling, renames_output) = case.spelling;
        for (name, ..) in tensors.iter_mut() {
            *name = match name.strip_prefix("model.") {
                Some(rest) => format!("{spelling}{rest}"),
                None if renames_output => format!("language_model.{name}"),
                None => name.clone(),
            };
        }
        for name in case.others {
            tensors.push((name.to_owned(), Dtype::F32, vec![2], vec![0; 8].into()));
        }
    })
}

/// The text model computes what it computes alone, what else is there is said, and an adapter has the names that
/// transformers has.
#[test]
fn text_models_in_their_wrappers() {
    for case in &WRAPPED {
        let (made, alone, class) = (wrapped(case), golden(case.text.0), case.wrapper.1);
        assert!(bits(made.path()) == bits(&alone), "{class}: other logits than those of the text model alone");
        let mut model = Model::load(made.path(), &Placement::cpu(None)).expect("the model loads");
        let notices = model.notices().to_vec();
        let said = format!("2 tensors of {} take no part", case.parts);
        assert!(notices.iter().any(|notice| notice.contains(&said)), "{class}: {notices:?}");
        let adapter = Adapter::read(&alone.join("adapter"), &model.config).expect("an adapter");
        model.attach(&adapter).expect("attached");
        let names: Vec<&str> = model.layout().iter().map(|parameter| parameter.name.as_str()).collect();
        assert!(!names.is_empty() && names.iter().all(|name| name.starts_with(case.adapter)), "{class}: {names:?}");
    }
}

/// An adapter is merged into the text model where it lies in its wrapper: every tensor has its name, type and shape,
/// those without a branch their bytes, and the text model computes what it computes merged alone.
#[test]
fn text_models_are_merged_in_their_wrappers() {
    for case in &WRAPPED {
        let (made, alone, class) = (wrapped(case), golden(case.text.0), case.wrapper.1);
        let read = |base: &Path| {
            let config = ModelConfig::load(base).expect("a config");
            Adapter::read(&alone.join("adapter"), &config).expect("an adapter")
        };
        let (parent, parent_alone) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("another"));
        let adapter = read(made.path());
        let whole = merged(made.path(), &adapter, parent.path());
        let text = merged(&alone, &read(&alone), parent_alone.path());
        let in_files = |module: &str| {
            let rest = module.strip_prefix("model.").expect("a module of the text model");
            format!("{}{rest}.weight", case.spelling.0)
        };
        let changed: BTreeSet<String> = adapter.targets.iter().map(|target| in_files(&target.module)).collect();
        let (before, after) = (weights(made.path()), weights(&whole));
        assert!(before.keys().eq(after.keys()), "{class}: {:?}", after.keys());
        assert!(changed.iter().all(|name| before.contains_key(name)), "{class}: {changed:?}");
        for (name, (dtype, shape, bytes)) in &before {
            let (new_dtype, new_shape, new_bytes) = &after[name];
            assert_eq!((new_dtype, new_shape), (dtype, shape), "{class}: {name}");
            assert_eq!(new_bytes != bytes, changed.contains(name), "{class}: {name}");
        }
        let config = |directory: &Path| read_json(&directory.join("config.json"));
        for key in ["architectures", "model_type", "text_config"] {
            assert_eq!(config(&whole)[key], config(made.path())[key], "{class}: {key}");
        }
        assert!(bits(&whole) == bits(&text), "{class}: other logits than those of the text model merged alone");
        assert!(bits(&whole) != bits(&alone), "{class}: nothing was merged");
    }
}
