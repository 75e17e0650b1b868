//! A merged model has the tensors of its base, by name and shape: single experts, or transformers' stacks of all
//! experts of a layer, whichever the base has.

mod made;

use std::collections::BTreeMap;
use std::path::Path;

use finetune_model::ModelConfig;
use finetune_model::adapter::Adapter;
use finetune_model::merge::{MergedForm, write_merged};
use finetune_store::{Dtype, RealDisk, Staging};
use serde_json::{Value, json};

use crate::made::{Tensor, golden, model, read_tensors};

/// Families with an adapter, and what they call gate, up and down.
const FAMILIES: [(&str, [&str; 3]); 6] = [
    ("qwen3_5_moe", PARTS),
    ("qwen3_next", PARTS),
    ("qwen3_moe_experts", PARTS),
    ("glm4_moe", PARTS),
    ("deepseek_v3", PARTS),
    ("lfm2_moe", ["w1", "w3", "w2"]),
];
const PARTS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// Shape and bytes of each tensor, by name.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

fn tensors_of(directory: &Path) -> Tensors {
    let tensors = read_tensors(&directory.join("model.safetensors"));
    tensors.into_iter().map(|(name, _, shape, bytes)| (name, (shape, bytes.to_vec()))).collect()
}

/// The experts of each layer in transformers' stacks: the rows of gate and up behind each other, and down.
fn stacked(tensors: &mut Vec<Tensor>, parts: [&str; 3]) {
    let place = |name: &str| {
        let (layer, rest) = name.split_once(".experts.")?;
        let (expert, part) = rest.strip_suffix(".weight")?.split_once('.')?;
        Some((layer.to_owned(), expert.parse::<usize>().ok()?, parts.iter().position(|known| *known == part)?))
    };
    let mut layers: BTreeMap<(String, bool), BTreeMap<(usize, usize), Tensor>> = BTreeMap::new();
    tensors.retain(|tensor| match place(&tensor.0) {
        None => true,
        Some((layer, expert, part)) => {
            layers.entry((layer, part == 2)).or_default().insert((expert, part), tensor.clone());
            false
        }
    });
    for ((layer, is_down), experts) in layers {
        let (name, of_expert) = if is_down { ("down_proj", 1) } else { ("gate_up_proj", 2) };
        let (_, dtype, shape, _) = experts.values().next().expect("an expert");
        let shape = vec![experts.len() / of_expert, shape[0] * of_expert, shape[1]];
        let bytes: Vec<u8> = experts.values().flat_map(|expert| expert.3.to_vec()).collect();
        tensors.push((format!("{layer}.experts.{name}"), *dtype, shape, bytes.into()));
    }
}

/// The same inside of a multimodal model, as the hub has Qwen3.5.
fn wrapped(config: &mut Value, tensors: &mut [Tensor]) {
    let text = std::mem::take(config);
    *config = json!({
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": false,
        "text_config": text,
    });
    for (name, ..) in tensors {
        if let Some(rest) = name.strip_prefix("model.") {
            *name = format!("model.language_model.{rest}");
        }
    }
}

fn merged(base: &Path, family: &str) -> Tensors {
    let config = ModelConfig::load(base).expect("a config");
    let adapter = Adapter::read(&golden(family).join("adapter"), &config).expect("an adapter of the model");
    let parent = tempfile::tempdir().expect("a directory");
    let mut staging = Staging::begin(&RealDisk, parent.path(), "merged").expect("a new directory");
    let form = MergedForm::of_shards(u64::MAX);
    write_merged(&RealDisk, base, &adapter, &mut staging, form, &[], &|_, _| {}).expect("a merge");
    tensors_of(&staging.publish(&json!({"kind": "merged"})).expect("published"))
}

fn shapes(tensors: &Tensors) -> BTreeMap<&String, &Vec<usize>> {
    tensors.iter().map(|(name, (shape, _))| (name, shape)).collect()
}

#[test]
fn a_merged_model_has_single_experts_or_stacks_as_its_base() {
    for (family, parts) in FAMILIES {
        let single = merged(&golden(family), family);
        assert_eq!(shapes(&single), shapes(&tensors_of(&golden(family))), "{family}, single");
        assert!(single != tensors_of(&golden(family)), "{family}: nothing was merged");

        let base = model(family, |_, tensors| stacked(tensors, parts));
        let in_stacks = merged(base.path(), family);
        assert_eq!(shapes(&in_stacks), shapes(&tensors_of(base.path())), "{family}, in stacks");
        // The numbers are those of the single experts.
        let mut of_single: Vec<Tensor> = single
            .iter()
            .map(|(name, (shape, bytes))| (name.clone(), Dtype::F32, shape.clone(), bytes.clone().into()))
            .collect();
        stacked(&mut of_single, parts);
        for (name, _, _, bytes) in of_single {
            assert!(in_stacks[&name].1 == bytes.to_vec(), "{family}: {name}");
        }
    }
}

#[test]
fn stacks_of_a_multimodal_model_keep_their_names() {
    let base = model("qwen3_5_moe", |config, tensors| {
        stacked(tensors, PARTS);
        wrapped(config, tensors);
    });
    let adapter = Adapter::none(&ModelConfig::load(base.path()).expect("a config"));
    let parent = tempfile::tempdir().expect("a directory");
    let mut staging = Staging::begin(&RealDisk, parent.path(), "merged").expect("a new directory");
    let form = MergedForm::of_shards(u64::MAX);
    write_merged(&RealDisk, base.path(), &adapter, &mut staging, form, &[], &|_, _| {}).expect("a merge");
    let merged = tensors_of(&staging.publish(&json!({"kind": "merged"})).expect("published"));
    assert_eq!(shapes(&merged), shapes(&tensors_of(base.path())));
    let stack = "model.language_model.layers.1.mlp.experts.gate_up_proj";
    assert_eq!(merged.get(stack).map(|(shape, _)| shape.as_slice()), Some(&[6, 48, 32][..]));
}
