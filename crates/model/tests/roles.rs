//! How linear layers may be cut for tensor parallelism, against the plans of transformers.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use finetune_model::{LinearLayer, ModelConfig, Role, Split, linear_layers};

const FAMILIES: [&str; 10] =
    ["llama", "llama3", "mistral", "qwen2", "qwen3", "smollm3", "gemma3", "ministral3", "granite", "olmo3"];

/// (last part of the module's name, role, split, entry of `base_model_tp_plan`). The entries are
/// those of all these families' configuration classes in transformers 5.23: `colwise` cuts the
/// outputs of a linear layer, `rowwise` its inputs. (Qwen3's plan also names the heads' norms.)
const PLAN: [(&str, Role, Split, &str); 7] = [
    ("q_proj", Role::Query, Split::Outputs, "layers.*.self_attn.q_proj: colwise"),
    ("k_proj", Role::Key, Split::Outputs, "layers.*.self_attn.k_proj: colwise"),
    ("v_proj", Role::Value, Split::Outputs, "layers.*.self_attn.v_proj: colwise"),
    ("o_proj", Role::Output, Split::Inputs, "layers.*.self_attn.o_proj: rowwise"),
    ("gate_proj", Role::Gate, Split::Outputs, "layers.*.mlp.gate_proj: colwise"),
    ("up_proj", Role::Up, Split::Outputs, "layers.*.mlp.up_proj: colwise"),
    ("down_proj", Role::Down, Split::Inputs, "layers.*.mlp.down_proj: rowwise"),
];

fn config(family: &str) -> ModelConfig {
    // Asked at run time: the tests also travel to machines with a GPU.
    let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").to_owned());
    let directory: PathBuf = Path::new(&here).join("../../tests/goldens/models").join(family);
    ModelConfig::load(&directory).unwrap_or_else(|error| panic!("{family}: {error}"))
}

/// A layer as the plan of transformers writes it: `layers.*.self_attn.q_proj: colwise`.
fn entry(layer: &LinearLayer) -> String {
    let within = layer.module.strip_prefix("model.layers.").expect("a layer of the decoder");
    let (number, part) = within.split_once('.').expect("the number of the layer");
    number.parse::<usize>().expect("a number");
    let cut = match layer.role.split() {
        Split::Outputs => "colwise",
        Split::Inputs => "rowwise",
        Split::Nowhere => "replicated",
    };
    format!("layers.*.{part}: {cut}")
}

#[test]
fn layers_are_cut_as_transformers_plans_it() {
    let want: BTreeSet<String> = PLAN.iter().map(|(.., entry)| (*entry).to_owned()).collect();
    for family in FAMILIES {
        let config = config(family);
        let layers = linear_layers(&config);
        assert_eq!(layers.len(), PLAN.len() * config.layers.len(), "{family}");
        assert_eq!(layers.iter().map(entry).collect::<BTreeSet<_>>(), want, "{family}");
        for (layer, (name, role, split, _)) in layers.iter().zip(PLAN.iter().cycle()) {
            assert!(layer.module.ends_with(&format!(".{name}")), "{family}: {} is not {name}", layer.module);
            assert_eq!((layer.role, layer.role.split()), (*role, *split), "{family}: {}", layer.module);
        }
    }
}

/// Muse Glimmer has a gate of attention's output, `layers.*.self_attn.gate_proj: colwise` in its plan.
#[test]
fn a_gate_of_attention_is_cut_as_queries() {
    let config = config("muse_glimmer");
    let layers = linear_layers(&config);
    let mut want: BTreeSet<String> = PLAN.iter().map(|(.., entry)| (*entry).to_owned()).collect();
    want.insert("layers.*.self_attn.gate_proj: colwise".to_owned());
    assert_eq!(layers.iter().map(entry).collect::<BTreeSet<_>>(), want);
    let gates: Vec<_> = layers.iter().filter(|layer| layer.role == Role::OutputGate).collect();
    assert_eq!(gates.len(), config.layers.len());
    assert!(gates.iter().all(|gate| gate.outputs == config.heads * config.head_dim));
}

/// The outputs of one layer are cut along the same dimension as the inputs of the next one. It is
/// query heads, key/value heads, or the inside of the feed-forward part.
#[test]
fn cut_outputs_meet_cut_inputs() {
    for family in FAMILIES {
        let config = config(family);
        let (query, key) = (config.heads * config.head_dim, config.key_value_heads * config.head_dim);
        for layer in linear_layers(&config) {
            let cut = match layer.role.split() {
                Split::Outputs => layer.outputs,
                Split::Inputs => layer.inputs,
                Split::Nowhere => continue,
            };
            let want = match layer.role {
                Role::Query | Role::Output | Role::OutputGate => query,
                Role::Key | Role::Value => key,
                Role::Gate | Role::Up | Role::Down => config.intermediate_size,
                Role::Router | Role::Recurrent | Role::Fused | Role::Latent => {
                    unreachable!("no layer of these families")
                }
            };
            assert_eq!(cut, want, "{family}: {}", layer.module);
        }
    }
}

/// `base_model_tp_plan` cuts `experts.gate_up_proj` by its outputs and `experts.down_proj` by its inputs, and
/// leaves the router whole.
#[test]
fn experts_are_cut_as_dense_layers() {
    let layers = linear_layers(&config("qwen3_moe"));
    let of_experts: Vec<_> = layers.iter().filter(|layer| layer.module.contains(".experts.")).collect();
    assert!(!of_experts.is_empty());
    for layer in of_experts {
        let want = if layer.module.ends_with(".down_proj") { Split::Inputs } else { Split::Outputs };
        assert_eq!(layer.role.split(), want, "{}", layer.module);
    }
    let routers: Vec<_> = layers.iter().filter(|layer| layer.role == Role::Router).collect();
    assert!(routers.iter().all(|layer| layer.module.ends_with(".mlp.gate") && layer.role.split() == Split::Nowhere));
    assert_eq!(routers.len(), 2, "two of the three layers have experts");
}
