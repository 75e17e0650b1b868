//! What a model is called in llama.cpp, and where its tensors go.

use crate::config::{LayerConfig, ModelConfig, RopeScaling};
use crate::error::ModelError;
use crate::gguf::architecture::architecture_of;

/// What llama.cpp calls a family, and how it holds the family's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// `general.architecture`, which the keys of the metadata begin with too.
    pub architecture: &'static str,
    /// llama.cpp turns neighbouring elements of a head, transformers element i and i + width / 2.
    /// If true, the rows of the query and key projections are written in llama.cpp's order.
    pub(crate) interleaved: bool,
    /// Whether it reads biases of the query, key and value projections.
    qkv_bias: bool,
    /// Whether it reads a bias of the attention's output projection.
    output_bias: bool,
    /// Whether it reads Llama 3's factors of rotary frequencies.
    rope_factors: bool,
}

const DESTINATIONS: [(&str, Destination); 5] = [
    ("llama", LLAMA),
    ("mistral", LLAMA),
    (
        "qwen2",
        Destination { architecture: "qwen2", interleaved: false, output_bias: false, rope_factors: false, ..LLAMA },
    ),
    (
        "qwen3",
        Destination {
            architecture: "qwen3",
            interleaved: false,
            qkv_bias: false,
            output_bias: false,
            rope_factors: false,
        },
    ),
    (
        "smollm3",
        Destination { architecture: "smollm3", qkv_bias: false, output_bias: false, rope_factors: false, ..LLAMA },
    ),
];

const LLAMA: Destination =
    Destination { architecture: "llama", interleaved: true, qkv_bias: true, output_bias: true, rope_factors: true };

/// Parts beside the layers, and their names in llama.cpp.
const WHOLE: [(&str, &str); 3] =
    [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];

/// Parts of a layer, and their names in llama.cpp.
const PARTS: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// In SmolLM3, llama.cpp leaves the rotary embedding out of every so many layers, whatever the
/// config says.
const WITHOUT_ROPE: usize = 4;

/// The name in a GGUF file of a tensor such as `model.layers.0.self_attn.q_proj.weight`. `None`:
/// llama.cpp has none for it.
pub(crate) fn tensor_name(name: &str) -> Option<String> {
    let (module, half) = name.rsplit_once('.')?;
    if let Some((_, theirs)) = WHOLE.iter().find(|(ours, _)| *ours == module) {
        return Some(format!("{theirs}.{half}"));
    }
    let (layer, part) = module.strip_prefix("model.layers.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let (_, theirs) = PARTS.iter().find(|(ours, _)| *ours == part)?;
    Some(format!("blk.{layer}.{theirs}.{half}"))
}

/// The heads whose rows are written in llama.cpp's order, of a module such as
/// `model.layers.0.self_attn.k_proj`. `None`: the rows stay as they are.
pub(crate) fn interleaved_heads(module: &str, destination: Destination, config: &ModelConfig) -> Option<usize> {
    let heads = match module.rsplit('.').next()? {
        "q_proj" => config.heads,
        "k_proj" => config.key_value_heads,
        _ => return None,
    };
    destination.interleaved.then_some(heads)
}

/// Rows [heads · d, columns] in llama.cpp's order: within each head, row `2 i` is row `i` of
/// transformers, and row `2 i + 1` is row `i + d / 2`.
pub(crate) fn interleave(values: &[f32], heads: usize, columns: usize) -> Vec<f32> {
    let width = values.len() / columns / heads;
    let mut out = Vec::with_capacity(values.len());
    for row in 0..heads * width {
        let (head, place) = (row / width, row % width);
        let from = (head * width + (place % 2) * (width / 2) + place / 2) * columns;
        out.extend_from_slice(&values[from..from + columns]);
    }
    out
}

/// Where a model goes in llama.cpp.
///
/// # Errors
/// [`ModelError::NotExpressible`] if llama.cpp would compute something else, or nothing at all.
pub fn destination(config: &ModelConfig) -> Result<Destination, ModelError> {
    let family = config.family;
    let refused = |what: String| {
        Err(ModelError::NotExpressible {
            what: format!("llama.cpp cannot compute this model: {what}"),
            hint: "--format merged writes it for transformers and mlx-lm".to_owned(),
        })
    };
    let found = DESTINATIONS.iter().find(|(model_type, _)| *model_type == family.model_type);
    let Some((_, destination)) = found else {
        return match architecture_of(family) {
            // It has one, which is read here as a base.
            Some(_) => Err(ModelError::NotExpressible {
                what: format!("finetune does not write GGUF files of {} yet", family.architecture),
                hint: "--format merged writes the model for transformers, and llama.cpp's convert_hf_to_gguf.py \
                       makes a GGUF file of that"
                    .to_owned(),
            }),
            None => refused(format!("no place for {} is known here", family.architecture)),
        };
    };
    let name = destination.architecture;
    if config.qkv_bias && !destination.qkv_bias {
        return refused(format!("its `{name}` has no biases of query, key and value projections"));
    }
    if config.output_bias && !destination.output_bias {
        return refused(format!("its `{name}` has no bias of the attention's output"));
    }
    if config.query_key_norm != (name == "qwen3") {
        return refused(format!("norms of queries and keys do not go with its `{name}`"));
    }
    let [rope] = config.ropes.as_slice() else {
        return refused(format!("its `{name}` has one rotary embedding, this model {}", config.ropes.len()));
    };
    if rope.width != config.head_dim {
        let (width, dim) = (rope.width, config.head_dim);
        return refused(format!("its `{name}` turns whole heads, this model {width} of {dim} elements"));
    }
    if matches!(rope.scaling, RopeScaling::Llama3 { .. }) && !destination.rope_factors {
        return refused(format!("its `{name}` has no rope scaling `llama3`"));
    }
    if matches!(rope.scaling, RopeScaling::Yarn { .. }) {
        return refused(format!("its `{name}` has no rope scaling `yarn` here"));
    }
    let turned = |n: usize| name != "smollm3" || !(n + 1).is_multiple_of(WITHOUT_ROPE);
    let differs = |(n, layer): &(usize, &LayerConfig)| layer.rope.is_some() != turned(*n);
    if let Some((n, _)) = config.layers.iter().enumerate().find(differs) {
        return refused(format!("layer {n} has the rotary embedding where its `{name}` has none, or the reverse"));
    }
    Ok(*destination)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_tensors() {
        for (ours, theirs) in [
            ("model.embed_tokens.weight", Some("token_embd.weight")),
            ("lm_head.weight", Some("output.weight")),
            ("model.norm.weight", Some("output_norm.weight")),
            ("model.layers.11.self_attn.o_proj.weight", Some("blk.11.attn_output.weight")),
            ("model.layers.0.self_attn.q_proj.bias", Some("blk.0.attn_q.bias")),
            ("model.layers.0.post_attention_layernorm.weight", Some("blk.0.ffn_norm.weight")),
            ("model.layers.0.mlp.experts.3.up_proj.weight", None),
            ("model.layers.x.mlp.up_proj.weight", None),
            ("weight", None),
        ] {
            assert_eq!(tensor_name(ours).as_deref(), theirs, "{ours}");
        }
    }

    /// A golden model, and what is said of a GGUF file of it.
    #[test]
    fn what_is_not_written_is_said() {
        let goldens = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models");
        for (family, part) in [
            ("qwen3_moe", Some("finetune does not write GGUF files of Qwen3MoeForCausalLM yet")),
            ("gemma3", Some("finetune does not write GGUF files of Gemma3ForCausalLM yet")),
            ("muse_glimmer", Some("llama.cpp cannot compute this model: no place for MuseGlimmer")),
            ("qwen3", None),
        ] {
            let config = ModelConfig::load(&goldens.join(family)).expect("a config");
            let told = destination(&config).err().map(|error| error.to_string());
            match (&told, part) {
                (Some(told), Some(part)) => assert!(told.contains(part), "{family}: {told}"),
                _ => assert_eq!(told.as_deref(), part, "{family}"),
            }
        }
    }

    /// Two heads of four rows, of two columns each: llama.cpp's
    /// `reshape(heads, 2, 2, columns).swapaxes(1, 2)`.
    #[test]
    fn rows_in_the_order_of_llama_cpp() {
        let rows: Vec<f32> = (0..8).flat_map(|row| [row as f32, row as f32 + 0.5]).collect();
        let out = interleave(&rows, 2, 2);
        let order: Vec<f32> = out.chunks(2).map(|row| row[0]).collect();
        assert_eq!(order, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        assert!(out.chunks(2).all(|row| row[1] == row[0] + 0.5));
    }
}
