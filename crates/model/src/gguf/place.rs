//! Which architecture of llama.cpp a model is written as, and which models it has none for.

use crate::config::{LayerConfig, ModelConfig, RopeScaling, Values};
use crate::error::ModelError;
use crate::gguf::architecture::{Architecture, Kind, written_as};
use crate::tree::expected_tensors;

/// What most refusals say to do next.
const MERGED: &str = "--format merged writes it for transformers and mlx-lm";

/// Epsilon in the lengths of queries and keys of delta nets, and in the norms inside of latent attention, whatever
/// config.json says of the other norms. llama.cpp has one number for all of them.
pub(super) const INNER_EPS: f32 = 1e-6;

/// The refusal of a model that llama.cpp does not have.
pub(super) fn refused(what: &str) -> ModelError {
    ModelError::NotExpressible { what: format!("llama.cpp cannot compute this model: {what}"), hint: MERGED.to_owned() }
}

/// The architecture that a model is written as. That llama.cpp takes the keys of the file as they are meant is
/// checked once they are made (`agreement.rs`).
///
/// # Errors
/// [`ModelError::NotExpressible`] if llama.cpp would compute something else, or nothing at all.
pub(super) fn architecture_for(config: &ModelConfig) -> Result<&'static Architecture, ModelError> {
    let family = config.family;
    let Some(architecture) = written_as(family) else {
        return Err(refused(&format!("no place for {} is known here", family.architecture)));
    };
    match what_is_missing(config, architecture) {
        None => Ok(architecture),
        Some(what) => Err(refused(&what)),
    }
}

/// What a model has that llama.cpp's loader does not ask for, or the reverse.
fn what_is_missing(config: &ModelConfig, architecture: &Architecture) -> Option<String> {
    let (name, kind) = (architecture.name, architecture.keys);
    let [qkv, output] = architecture.biases;
    if config.qkv_bias && !qkv {
        return Some(format!("its `{name}` has no biases of query, key and value projections"));
    }
    if config.output_bias && !output {
        return Some(format!("its `{name}` has no bias of the attention's output"));
    }
    if config.convolution.is_some_and(|sizes| sizes.bias) {
        return Some(format!("its `{name}` has no biases of convolutions"));
    }
    if let Some(scaling) = config.ropes.iter().find_map(|rope| missing_scaling(&rope.scaling, architecture)) {
        return Some(format!("its `{name}` has no rope scaling `{scaling}`"));
    }
    let dense = config.layers.iter().position(|layer| !layer.has_experts);
    let has_experts = config.layers.iter().any(|layer| layer.has_experts);
    if let (Some(layer), true) = (dense, kind == Kind::Qwen3Moe || (kind == Kind::Delta && has_experts)) {
        return Some(format!("its `{name}` has experts in every layer, and layer {layer} of this model has none"));
    }
    let has_windows = config.layers.iter().any(|layer| layer.window.is_some());
    if matches!(kind, Kind::Gemma2 | Kind::Gemma4 | Kind::GptOss) && !has_windows {
        return Some(format!("its `{name}` has layers with a window of attention, and this model none"));
    }
    if config.tied_embeddings && matches!(kind, Kind::Olmo2 | Kind::GptOss) {
        return Some(format!("the output layer of its `{name}` is a matrix of its own, here it is the embedding"));
    }
    if !config.tied_embeddings && kind == Kind::Gemma2 {
        return Some(format!("the output layer of its `{name}` is the embedding, here it is a matrix of its own"));
    }
    if config.per_layer.is_some_and(|sizes| sizes.vocabulary != config.vocabulary) {
        return Some(format!("the inputs of layers of its `{name}` have a row for each token, here other numbers"));
    }
    if let Some(sizes) = config.delta.filter(|sizes| sizes.value_dim != sizes.key_dim) {
        let (values, keys) = (sizes.value_dim, sizes.key_dim);
        return Some(format!(
            "its `{name}` has heads of values as wide as those of keys, this model {values} and {keys}"
        ));
    }
    if config.delta.is_some() && config.rms_norm_eps as f32 != INNER_EPS {
        return Some(format!(
            "its `{name}` has rms_norm_eps in the lengths of a delta net's queries and keys, too: {} and not {INNER_EPS}",
            config.rms_norm_eps as f32
        ));
    }
    if let Some(what) = other_sharing(config, name) {
        return Some(what);
    }
    let is_bias = |name: &str| name.ends_with(".bias") && !has_bias(name, architecture);
    let bias = expected_tensors(config).into_iter().map(|(name, _)| name).find(|name| is_bias(name));
    bias.map(|bias| format!("its `{name}` has no place for `{bias}`"))
}

/// A layer of Gemma 4 whose keys and values are those of another layer than llama.cpp takes: the last with its own,
/// or in layers with a window the one before that.
fn other_sharing(config: &ModelConfig, name: &str) -> Option<String> {
    let own = config.layers.iter().take_while(|layer| !matches!(layer.values, Values::OfLayer(_))).count();
    let differs = |(n, layer): (usize, &LayerConfig)| {
        let Values::OfLayer(source) = layer.values else { return None };
        let theirs = own.checked_sub(if layer.window.is_some() { 2 } else { 1 });
        (theirs != Some(source)).then(|| {
            let theirs = theirs.map_or("none".to_owned(), |theirs| theirs.to_string());
            format!("layer {n} of its `{name}` has keys and values of layer {theirs}, here of layer {source}")
        })
    };
    config.layers.iter().enumerate().find_map(differs)
}

/// The scaling of a rotary embedding, as config.json calls it, that llama.cpp does not have there.
fn missing_scaling(scaling: &RopeScaling, architecture: &Architecture) -> Option<&'static str> {
    let kind = architecture.keys;
    match scaling {
        RopeScaling::None | RopeScaling::Linear { .. } => None,
        RopeScaling::Llama3 { .. } => (!architecture.rope_factors).then_some("llama3"),
        RopeScaling::Yarn { .. } => (!kind.has_yarn()).then_some("yarn"),
        RopeScaling::Long { .. } => (kind != Kind::Phi3).then_some("longrope"),
        RopeScaling::Proportional { .. } => (kind != Kind::Gemma4).then_some("proportional"),
    }
}

/// Whether llama.cpp reads the bias of this name.
fn has_bias(name: &str, architecture: &Architecture) -> bool {
    let module = name.strip_suffix(".bias").unwrap_or(name);
    let [qkv, output] = architecture.biases;
    let of_attention = |part: &str| module.ends_with(&format!(".self_attn.{part}"));
    // Router and experts of gpt-oss have biases.
    architecture.keys == Kind::GptOss && module.contains(".mlp.")
        || qkv && ["q_proj", "k_proj", "v_proj"].into_iter().any(of_attention)
        || output && of_attention("o_proj")
}

/// Whether llama.cpp computes branches on a matrix, of this module's name in a layer.
pub(super) fn has_branch(module: &str, kind: Kind) -> bool {
    // What makes queries and the short vectors is multiplied without them.
    let part = module.rsplit('.').next().unwrap_or(module);
    kind != Kind::Deepseek2 || !["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"].contains(&part)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A golden model, and what is said of a GGUF file of it.
    #[test]
    fn what_is_not_written_is_said() {
        let goldens = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models");
        for (family, part) in [
            ("muse_glimmer", Some("llama.cpp cannot compute this model: no place for MuseGlimmer")),
            ("lfm2", Some("its `lfm2` has no biases of convolutions")),
            ("qwen3", None),
            ("qwen3_moe_experts", None),
            ("gemma4_k_eq_v", None),
            ("gemma4", Some("layer 4 of its `gemma4` has keys and values of layer 2, here of layer 3")),
            ("qwen3_5", Some("its `qwen35` has heads of values as wide as those of keys, this model 12 and 16")),
        ] {
            let config = ModelConfig::load(&goldens.join(family)).expect("a config");
            let told = architecture_for(&config).err().map(|error| error.to_string());
            match (&told, part) {
                (Some(told), Some(part)) => assert!(told.contains(part), "{family}: {told}"),
                _ => assert_eq!(told.as_deref(), part, "{family}"),
            }
        }
    }

    /// Layers and output layers that llama.cpp's loader asks for, or does not.
    #[test]
    fn what_the_loader_asks_for() {
        let goldens = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models");
        type Change = fn(&mut ModelConfig);
        let table: [(&str, Change, &str); 7] = [
            ("qwen3_moe_experts", |c| c.layers[1].has_experts = false, "experts in every layer, and layer 1"),
            ("gpt_oss", |c| c.layers.iter_mut().for_each(|layer| layer.window = None), "with a window of attention"),
            ("olmo3", |c| c.tied_embeddings = true, "here it is the embedding"),
            ("gemma2", |c| c.tied_embeddings = false, "here it is a matrix of its own"),
            ("qwen3", |c| c.qkv_bias = true, "no biases of query, key and value projections"),
            ("qwen2", |c| c.output_bias = true, "no bias of the attention's output"),
            (
                "qwen3_next",
                |c| c.delta.iter_mut().for_each(|sizes| sizes.value_dim = sizes.key_dim),
                "queries and keys, too: 0.01 and not 0.000001",
            ),
        ];
        for (family, change, part) in table {
            let mut config = ModelConfig::load(&goldens.join(family)).expect("a config");
            change(&mut config);
            let told = architecture_for(&config).expect_err(part).to_string();
            assert!(told.contains(part), "{family}: {told}");
        }
    }

    #[test]
    fn branches_that_llama_cpp_leaves_out() {
        let query = "model.layers.0.self_attn.q_a_proj";
        assert!(!has_branch(query, Kind::Deepseek2));
        assert!(has_branch(query, Kind::Plain));
        assert!(has_branch("model.layers.0.mlp.up_proj", Kind::Deepseek2));
    }
}
