//! The architectures of llama.cpp that are read as a base and written: the family of each, and what its layers
//! are called.
//!
//! The reference is llama.cpp's converters (`conversion/*.py`) and its loader (`src/models/*.cpp`).

use crate::config::family::Family;

/// An architecture of llama.cpp, as far as its files have to be read in a way of their own.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Architecture {
    /// `general.architecture`, which the keys of the metadata begin with too.
    pub(crate) name: &'static str,
    /// `model_type` of the config.json of the same model.
    pub(crate) model_type: &'static str,
    /// Whether the rows of the query and key projections are in llama.cpp's order: it turns neighbouring
    /// elements of a head, transformers element i and i + width / 2.
    pub(crate) interleaved: bool,
    /// Whether the value heads of delta nets are one of each key head, then the next of each: transformers
    /// has those of a key head behind each other.
    pub(crate) tiled: bool,
    /// Whether llama.cpp reads biases of the query, key and value projections, and one of attention's output.
    pub(super) biases: [bool; 2],
    /// Whether it reads Llama 3's factors of rotary frequencies.
    pub(super) rope_factors: bool,
    /// Whether the norm of what the feed-forward part reads is called after what it is behind of.
    norm_is_behind: bool,
    /// What its keys say beyond those that all have.
    pub(super) keys: Kind,
}

/// Which further keys an architecture has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Plain,
    Mistral3,
    Granite,
    GraniteHybrid,
    Phi3,
    Olmo2,
    Glm4,
    Gemma2,
    Gemma3,
    Gemma4,
    Qwen3Moe,
    GptOss,
    Deepseek2,
    Glm4Moe,
    Lfm2,
    Delta,
}

impl Kind {
    /// Whether YaRN's keys are read.
    pub(super) fn has_yarn(self) -> bool {
        matches!(self, Kind::Mistral3 | Kind::Olmo2 | Kind::GptOss | Kind::Deepseek2)
    }

    /// Whether llama.cpp computes windows of attention.
    pub(super) fn has_windows(self) -> bool {
        matches!(self, Kind::Gemma2 | Kind::Gemma3 | Kind::Gemma4 | Kind::Olmo2 | Kind::GptOss)
    }
}

impl Architecture {
    /// Whether llama.cpp's converter writes a tensor, where files of different age have different ones.
    pub(super) fn writes(&self, name: &str) -> bool {
        let part = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).map_or(name, |(_, part)| part);
        match part {
            "attn_kv_b.weight" => false,
            // Asked where one projection of the model makes gate and up.
            "ffn_gate.weight" => matches!(self.keys, Kind::Granite | Kind::GraniteHybrid),
            "ffn_gate_exps.weight" | "ffn_up_exps.weight" => self.keys != Kind::Gemma4,
            "ffn_norm.weight" => !self.norm_is_behind,
            "post_attention_norm.weight" => self.norm_is_behind,
            _ => true,
        }
    }
}

const fn known(name: &'static str, model_type: &'static str, keys: Kind) -> Architecture {
    Architecture {
        name,
        model_type,
        interleaved: false,
        tiled: false,
        biases: [false; 2],
        rope_factors: false,
        norm_is_behind: false,
        keys,
    }
}

const fn interleaved(name: &'static str, model_type: &'static str, keys: Kind) -> Architecture {
    Architecture { interleaved: true, ..known(name, model_type, keys) }
}

/// Llama's forms: with all biases, and factors of rotary frequencies.
const fn like_llama(name: &'static str, model_type: &'static str, keys: Kind) -> Architecture {
    Architecture { biases: [true; 2], rope_factors: true, ..interleaved(name, model_type, keys) }
}

/// With biases of the query, key and value projections.
const fn with_biases(of: Architecture) -> Architecture {
    Architecture { biases: [true, false], ..of }
}

/// The norm of what the feed-forward part reads is called after what it is behind of.
const fn behind(of: Architecture) -> Architecture {
    Architecture { norm_is_behind: true, ..of }
}

const fn tiled(of: Architecture) -> Architecture {
    Architecture { tiled: true, ..of }
}

/// All architectures that are read. Mistral's first models are `llama` there.
static ARCHITECTURES: [Architecture; 22] = [
    like_llama("llama", "llama", Kind::Plain),
    with_biases(known("qwen2", "qwen2", Kind::Plain)),
    known("qwen3", "qwen3", Kind::Plain),
    interleaved("smollm3", "smollm3", Kind::Plain),
    known("qwen3moe", "qwen3_moe", Kind::Qwen3Moe),
    known("gemma2", "gemma2", Kind::Gemma2),
    known("gemma3", "gemma3_text", Kind::Gemma3),
    known("gemma4", "gemma4_text", Kind::Gemma4),
    Architecture { biases: [true; 2], ..behind(known("gpt-oss", "gpt_oss", Kind::GptOss)) },
    known("deepseek2", "deepseek_v3", Kind::Deepseek2),
    with_biases(behind(known("glm4moe", "glm4_moe", Kind::Glm4Moe))),
    with_biases(known("glm4", "glm4", Kind::Glm4)),
    known("lfm2", "lfm2", Kind::Lfm2),
    known("lfm2moe", "lfm2_moe", Kind::Lfm2),
    known("phi3", "phi3", Kind::Phi3),
    like_llama("mistral3", "mistral", Kind::Mistral3),
    known("olmo2", "olmo3", Kind::Olmo2),
    like_llama("granite", "granite", Kind::Granite),
    like_llama("granitehybrid", "granitemoehybrid", Kind::GraniteHybrid),
    behind(known("qwen3next", "qwen3_next", Kind::Delta)),
    tiled(behind(known("qwen35", "qwen3_5_text", Kind::Delta))),
    tiled(behind(known("qwen35moe", "qwen3_5_moe_text", Kind::Delta))),
];

/// Families that are written as another architecture than the first that is read as their class: as llama.cpp's
/// converter does. Granite 4 without Mamba layers is Granite there.
const WRITTEN: [(&str, &str); 4] =
    [("mistral", "llama"), ("ministral3", "mistral3"), ("glm4_moe_lite", "deepseek2"), ("granitemoehybrid", "granite")];

/// The architecture of this `general.architecture`. `None`: it is not read here.
pub(crate) fn architecture(name: &str) -> Option<&'static Architecture> {
    ARCHITECTURES.iter().find(|known| known.name == name)
}

/// The architecture that a model of a family is written as. `None`: llama.cpp's is not known here.
pub(super) fn written_as(family: &Family) -> Option<&'static Architecture> {
    if let Some((_, name)) = WRITTEN.iter().find(|(model_type, _)| *model_type == family.model_type) {
        return architecture(name);
    }
    let is_alike = |known: &&Architecture| {
        Family::of_model(Some(known.model_type)).is_some_and(|other| other.architecture == family.architecture)
    };
    ARCHITECTURES.iter().find(is_alike)
}

/// All architectures that are read, as a hint.
pub(crate) fn architectures() -> String {
    let names: Vec<&str> = ARCHITECTURES.iter().map(|known| known.name).collect();
    names.join(", ")
}

/// Parts beside the layers, and their names in llama.cpp.
const WHOLE: [(&str, &str); 7] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.embedding_norm", "token_embd_norm"),
    ("model.embed_tokens_per_layer", "per_layer_token_embd"),
    ("model.per_layer_model_projection", "per_layer_model_proj"),
    ("model.per_layer_projection_norm", "per_layer_proj_norm"),
];

/// Modules of a layer that all families call the same, and their names in llama.cpp.
const MODULES: [(&str, &str); 28] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.q_a_proj", "attn_q_a"),
    ("self_attn.q_a_layernorm", "attn_q_a_norm"),
    ("self_attn.q_b_proj", "attn_q_b"),
    ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
    ("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
    ("self_attn.kv_b_proj", "attn_kv_b"),
    ("linear_attn.in_proj_qkv", "attn_qkv"),
    ("linear_attn.in_proj_z", "attn_gate"),
    ("linear_attn.in_proj_b", "ssm_beta"),
    ("linear_attn.in_proj_a", "ssm_alpha"),
    ("linear_attn.in_proj_ba", "ssm_ba"),
    ("linear_attn.conv1d", "ssm_conv1d"),
    ("linear_attn.norm", "ssm_norm"),
    ("linear_attn.out_proj", "ssm_out"),
    ("conv.conv", "shortconv.conv"),
    ("conv.in_proj", "shortconv.in_proj"),
    ("conv.out_proj", "shortconv.out_proj"),
    ("post_feedforward_layernorm_1", "post_ffw_norm_1"),
    ("pre_feedforward_layernorm_2", "pre_ffw_norm_2"),
    ("post_feedforward_layernorm_2", "post_ffw_norm_2"),
    ("per_layer_input_gate", "inp_gate"),
    ("per_layer_projection", "proj"),
    ("post_per_layer_input_norm", "post_norm"),
    ("mlp.shared_expert_gate", "ffn_gate_inp_shexp"),
];

/// Tensors of a layer whose names have no half such as `weight` in transformers.
const VECTORS: [(&str, &str); 6] = [
    ("linear_attn.A_log", "ssm_a"),
    ("linear_attn.dt_bias", "ssm_dt.bias"),
    ("self_attn.sinks", "attn_sinks.weight"),
    ("layer_scalar", "layer_output_scale.weight"),
    ("router.scale", "ffn_gate_inp.scale"),
    ("router.per_expert_scale", "ffn_down_exps.scale"),
];

/// Norms of what attention reads, of what it adds, of what the feed-forward part reads and of what that adds.
const NORMS: [&str; 4] = ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"];
/// Gate, up and down.
pub(super) const GATED: [&str; 3] = ["gate", "up", "down"];

/// `model.layers.3.mlp.up_proj.weight` as (3, `mlp.up_proj.weight`). `None`: it is beside the layers.
pub(super) fn in_layer(name: &str) -> Option<(usize, &str)> {
    let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
    Some((layer.parse().ok()?, part))
}

/// The name in a GGUF file of a tensor such as `model.layers.0.self_attn.q_proj.weight`, if it is there by
/// itself. `None`: llama.cpp has none for it.
pub(super) fn name_in_file(family: &Family, name: &str) -> Option<String> {
    let Some((layer, part)) = in_layer(name) else {
        let (module, half) = name.rsplit_once('.')?;
        let (_, theirs) = WHOLE.iter().find(|(ours, _)| *ours == module)?;
        return Some(format!("{theirs}.{half}"));
    };
    if let Some((_, theirs)) = VECTORS.iter().find(|(ours, _)| *ours == part) {
        return Some(format!("blk.{layer}.{theirs}"));
    }
    if family.mixture.and_then(|mixture| mixture.correction) == Some(part) {
        return Some(format!("blk.{layer}.exp_probs_b.bias"));
    }
    let (module, half) = part.rsplit_once('.')?;
    let theirs = of_module(family, module)?;
    Some(format!("blk.{layer}.{theirs}.{half}"))
}

/// The name of a module of a layer, by what its family calls it.
fn of_module(family: &Family, module: &str) -> Option<String> {
    let names = &family.names;
    if let Some(place) = names.norms.iter().position(|norm| *norm == Some(module)) {
        return Some(NORMS[place].to_owned());
    }
    if let Some(part) = module.strip_prefix("self_attn.") {
        let own =
            [(names.output, "attn_output"), (names.head_norms[0], "attn_q_norm"), (names.head_norms[1], "attn_k_norm")];
        if let Some((_, theirs)) = own.iter().find(|(ours, _)| *ours == part) {
            return Some((*theirs).to_owned());
        }
    }
    if module == names.router {
        return Some("ffn_gate_inp".to_owned());
    }
    let gated = |inside: &str| names.gated.iter().position(|part| *part == inside).map(|place| GATED[place]);
    if let Some(part) = inside(module, names.shared).and_then(gated) {
        return Some(format!("ffn_{part}_shexp"));
    }
    if let Some(part) = inside(module, names.feed_forward) {
        if family.fused_gate_up && part == names.fused[0] {
            return Some("ffn_up".to_owned());
        }
        if family.fused_gate_up && part == names.fused[1] {
            return Some("ffn_down".to_owned());
        }
        if let Some(part) = gated(part) {
            return Some(format!("ffn_{part}"));
        }
    }
    let (_, theirs) = MODULES.iter().find(|(ours, _)| *ours == module)?;
    Some((*theirs).to_owned())
}

/// The part of a module that lies in another.
fn inside<'a>(module: &'a str, outer: &str) -> Option<&'a str> {
    module.strip_prefix(outer)?.strip_prefix('.')
}

/// An expert's tensor such as `mlp.experts.3.up_proj.weight`: its number, which of [`GATED`] it is, and its
/// half.
pub(super) fn of_expert<'a>(family: &Family, part: &'a str) -> Option<(usize, usize, &'a str)> {
    let (number, rest) = inside(part, family.names.experts)?.split_once('.')?;
    let (projection, half) = rest.split_once('.')?;
    let place = family.names.gated.iter().position(|known| *known == projection)?;
    Some((number.parse().ok()?, place, half))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(model_type: &str) -> &'static Family {
        Family::of_model(Some(model_type)).expect("a family")
    }

    #[test]
    fn names_in_files() {
        for (model_type, ours, theirs) in [
            ("llama", "model.embed_tokens.weight", Some("token_embd.weight")),
            ("llama", "model.layers.11.self_attn.o_proj.weight", Some("blk.11.attn_output.weight")),
            ("llama", "model.layers.0.post_attention_layernorm.weight", Some("blk.0.ffn_norm.weight")),
            ("llama", "model.layers.0.mlp.experts.3.up_proj.weight", None),
            ("llama", "model.layers.x.mlp.up_proj.weight", None),
            ("gemma2", "model.layers.0.post_attention_layernorm.weight", Some("blk.0.post_attention_norm.weight")),
            ("gemma2", "model.layers.0.post_feedforward_layernorm.weight", Some("blk.0.post_ffw_norm.weight")),
            ("gemma4_text", "model.layers.0.layer_scalar", Some("blk.0.layer_output_scale.weight")),
            ("gemma4_text", "model.layers.0.router.proj.weight", Some("blk.0.ffn_gate_inp.weight")),
            ("gpt_oss", "model.layers.1.self_attn.sinks", Some("blk.1.attn_sinks.weight")),
            ("gpt_oss", "model.layers.1.mlp.router.bias", Some("blk.1.ffn_gate_inp.bias")),
            ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias", Some("blk.1.exp_probs_b.bias")),
            ("deepseek_v3", "model.layers.1.mlp.shared_experts.up_proj.weight", Some("blk.1.ffn_up_shexp.weight")),
            ("lfm2_moe", "model.layers.1.feed_forward.expert_bias", Some("blk.1.exp_probs_b.bias")),
            ("lfm2", "model.layers.1.feed_forward.w3.weight", Some("blk.1.ffn_up.weight")),
            ("lfm2", "model.layers.1.conv.conv.weight", Some("blk.1.shortconv.conv.weight")),
            ("phi3", "model.layers.1.mlp.gate_up_proj.weight", Some("blk.1.ffn_up.weight")),
            ("glm4", "model.layers.1.post_mlp_layernorm.weight", Some("blk.1.post_ffw_norm.weight")),
            ("olmo3", "model.layers.1.self_attn.q_norm.weight", Some("blk.1.attn_q_norm.weight")),
            ("qwen3_5_text", "model.layers.1.linear_attn.A_log", Some("blk.1.ssm_a")),
            (
                "qwen3_5_moe_text",
                "model.layers.1.mlp.shared_expert_gate.weight",
                Some("blk.1.ffn_gate_inp_shexp.weight"),
            ),
            ("qwen3_next", "model.layers.1.linear_attn.dt_bias", Some("blk.1.ssm_dt.bias")),
        ] {
            assert_eq!(name_in_file(of(model_type), ours).as_deref(), theirs, "{model_type} {ours}");
        }
        let experts = [
            ("qwen3_moe", "mlp.experts.3.up_proj.weight", Some((3, 1, "weight"))),
            ("gpt_oss", "mlp.experts.12.down_proj.bias", Some((12, 2, "bias"))),
            ("lfm2_moe", "feed_forward.experts.0.w1.weight", Some((0, 0, "weight"))),
            ("gemma4_text", "experts.5.gate_proj.weight", Some((5, 0, "weight"))),
            ("qwen3_moe", "mlp.up_proj.weight", None),
        ];
        for (model_type, part, found) in experts {
            assert_eq!(of_expert(of(model_type), part), found, "{model_type} {part}");
        }
    }

    #[test]
    fn every_architecture_has_a_family() {
        assert!(ARCHITECTURES.iter().all(|known| Family::of_model(Some(known.model_type)).is_some()));
        assert_eq!(architecture("gemma3").map(|known| known.model_type), Some("gemma3_text"));
        assert_eq!(architecture("gemma3n"), None);
        for (model_type, name) in [
            ("llama", Some("llama")),
            ("mistral", Some("llama")),
            ("ministral3", Some("mistral3")),
            ("kimi_k2", Some("deepseek2")),
            ("gemma4_unified_text", Some("gemma4")),
            ("granitemoehybrid", Some("granite")),
            ("qwen3_5_moe_text", Some("qwen35moe")),
            ("muse_glimmer_text", None),
        ] {
            assert_eq!(written_as(of(model_type)).map(|known| known.name), name, "{model_type}");
        }
    }
}
