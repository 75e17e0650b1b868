//! The families of models: one decoder with these differences, as data.
//!
//! The values are those of the configuration classes of transformers for keys that config.json
//! leaves out. What config.json cannot say is as in the model classes.

use crate::config::Activation;

/// What makes a family of models different from the others.
#[derive(Debug, PartialEq)]
pub struct Family {
    /// The name of the model class in transformers.
    pub architecture: &'static str,
    /// `model_type` of config.json.
    pub model_type: &'static str,
    /// `vocab_size` if the key is left out; `None`: it must be there.
    pub(crate) vocabulary: Option<usize>,
    /// `num_key_value_heads` if the key is left out; `None`: one for each query head.
    pub(crate) key_value_heads: Option<usize>,
    /// `head_dim` if the key is left out; `None`: hidden_size / num_attention_heads.
    pub(crate) head_dim: Option<usize>,
    /// Biases of the query, key and value projections.
    pub(crate) qkv_bias: Bias,
    /// Bias of the attention's output projection.
    pub(crate) output_bias: Bias,
    /// Whether each head's queries and keys have an RMS norm.
    pub(crate) query_key_norm: bool,
    /// Whether norms multiply by 1 + their weights.
    pub(crate) norms_add_one: bool,
    /// Whether what attention and the feed-forward part add to the residual stream has a norm too.
    pub(crate) sandwich_norms: bool,
    /// Whether what attention and the feed-forward part read has a norm.
    pub(crate) norms_before: bool,
    /// Whether the norms of queries and keys are over all heads together.
    pub(crate) norms_all_heads: bool,
    /// Whether embeddings are multiplied by √hidden_size.
    pub(crate) scaled_embeddings: bool,
    /// Whether config.json has factors of embeddings, scores, residual branches and logits.
    pub(crate) has_multipliers: bool,
    /// `llama_4_scaling_beta` and `original_max_position_embeddings` if the keys are left out, where queries
    /// grow with their position.
    pub(crate) growth: Option<[f64; 2]>,
    /// What the feed-forward part applies to its gate: the key of config.json, and the names that it
    /// may have there.
    pub(crate) activation: (&'static str, &'static [&'static str], Activation),
    /// `query_pre_attn_scalar` if the key is left out, where attention's scores are divided by the root
    /// of that; `None`: by that of head_dim.
    pub(crate) query_scalar: Option<f64>,
    /// Whether layers have gated delta nets, but for those with attention, which config.json names.
    pub(crate) has_delta_nets: bool,
    /// Whether attention's output is multiplied by a gate, which the query projection makes too.
    pub(crate) gated_attention: bool,
    /// `partial_rotary_factor` if the key is left out.
    pub(crate) partial_rotary: f64,
    /// Whether it is computed on the CPU only.
    pub cpu_only: bool,
    /// Whether feed-forward parts are mixtures of experts.
    pub(crate) has_experts: bool,
    /// Whether PEFT 0.21 turns branches of single experts into those of its stacks.
    pub(crate) peft_reads_experts: bool,
    /// Whether each mixture has an expert with a gate that every token goes through, and weights of the
    /// chosen ones that always add up to 1.
    pub(crate) has_shared_expert: bool,
    /// Whether its activations exceed the largest number of float16.
    pub exceeds_f16: bool,
    /// Which layers see only a window of keys.
    pub(crate) windows: Windows,
    /// `sliding_window` if the key is left out.
    pub(crate) sliding_window: Option<usize>,
    /// `rope_theta` if the key is left out.
    pub(crate) rope_theta: f64,
    /// `rope_theta` of layers with a window if its key is left out, where they have a rotary embedding of
    /// their own.
    pub(crate) window_rope_theta: Option<f64>,
    /// Whether config.json names layers without rotary embedding (`no_rope_layers`).
    pub(crate) has_layers_without_rope: bool,
    /// `tie_word_embeddings` if the key is left out.
    pub(crate) tied_embeddings: bool,
    /// `max_position_embeddings` if the key is left out.
    pub(crate) max_position_embeddings: usize,
}

/// Whether a linear layer has a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bias {
    Never,
    /// It has one, whatever config.json says.
    Always,
    /// It has one if `attention_bias` is true.
    Asked,
}

/// Which layers see only a window of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Windows {
    Never,
    EveryLayer,
    /// Every layer, if `use_sliding_window` is true.
    Asked,
    /// If `use_sliding_window` is true: the layers that `layer_types` names. Without `layer_types`:
    /// those from layer `max_window_layers` on.
    Later,
    /// If `use_sliding_window` is true: the layers that `layer_types` names. Without `layer_types`:
    /// those without rotary embedding.
    WithoutRope,
    /// The layers that `layer_types` names. Without `layer_types`: all but every
    /// `sliding_window_pattern`th, this one if that is left out.
    AllButEvery(usize),
}

const LLAMA: Family = Family {
    architecture: "LlamaForCausalLM",
    model_type: "llama",
    vocabulary: None,
    key_value_heads: None,
    head_dim: None,
    qkv_bias: Bias::Asked,
    output_bias: Bias::Asked,
    query_key_norm: false,
    norms_add_one: false,
    sandwich_norms: false,
    norms_before: true,
    norms_all_heads: false,
    scaled_embeddings: false,
    has_multipliers: false,
    growth: None,
    // Both are names of the same function.
    activation: ("hidden_act", &["silu", "swish"], Activation::Silu),
    query_scalar: None,
    has_delta_nets: false,
    gated_attention: false,
    partial_rotary: 1.0,
    cpu_only: false,
    has_experts: false,
    peft_reads_experts: false,
    has_shared_expert: false,
    exceeds_f16: false,
    windows: Windows::Never,
    sliding_window: None,
    rope_theta: 10_000.0,
    window_rope_theta: None,
    has_layers_without_rope: false,
    tied_embeddings: false,
    max_position_embeddings: 2048,
};

const QWEN3_5: Family = Family {
    architecture: "Qwen3_5ForCausalLM",
    model_type: "qwen3_5_text",
    vocabulary: Some(248_320),
    key_value_heads: Some(4),
    head_dim: Some(256),
    query_key_norm: true,
    norms_add_one: true,
    has_delta_nets: true,
    gated_attention: true,
    partial_rotary: 0.25,
    cpu_only: true,
    exceeds_f16: true,
    max_position_embeddings: 32_768,
    ..LLAMA
};

/// All families.
pub(crate) static FAMILIES: [Family; 12] = [
    LLAMA,
    Family {
        architecture: "MistralForCausalLM",
        model_type: "mistral",
        key_value_heads: Some(8),
        qkv_bias: Bias::Never,
        output_bias: Bias::Never,
        windows: Windows::EveryLayer,
        sliding_window: Some(4096),
        max_position_embeddings: 131_072,
        ..LLAMA
    },
    Family {
        architecture: "Qwen2ForCausalLM",
        model_type: "qwen2",
        key_value_heads: Some(32),
        qkv_bias: Bias::Always,
        output_bias: Bias::Never,
        windows: Windows::Later,
        sliding_window: Some(4096),
        max_position_embeddings: 32_768,
        ..LLAMA
    },
    Family {
        architecture: "Qwen3ForCausalLM",
        model_type: "qwen3",
        key_value_heads: Some(32),
        head_dim: Some(128),
        query_key_norm: true,
        windows: Windows::Later,
        sliding_window: Some(4096),
        max_position_embeddings: 32_768,
        ..LLAMA
    },
    Family {
        architecture: "Qwen3MoeForCausalLM",
        model_type: "qwen3_moe",
        key_value_heads: Some(4),
        query_key_norm: true,
        has_experts: true,
        peft_reads_experts: true,
        exceeds_f16: true,
        windows: Windows::Asked,
        sliding_window: Some(4096),
        max_position_embeddings: 32_768,
        ..LLAMA
    },
    QWEN3_5,
    Family {
        architecture: "Qwen3_5MoeForCausalLM",
        model_type: "qwen3_5_moe_text",
        key_value_heads: Some(2),
        has_experts: true,
        has_shared_expert: true,
        ..QWEN3_5
    },
    Family {
        architecture: "SmolLM3ForCausalLM",
        model_type: "smollm3",
        key_value_heads: Some(4),
        windows: Windows::WithoutRope,
        rope_theta: 2_000_000.0,
        has_layers_without_rope: true,
        tied_embeddings: true,
        max_position_embeddings: 32_768,
        ..LLAMA
    },
    Family {
        architecture: "Ministral3ForCausalLM",
        model_type: "ministral3",
        key_value_heads: Some(8),
        head_dim: Some(128),
        qkv_bias: Bias::Never,
        output_bias: Bias::Never,
        windows: Windows::EveryLayer,
        rope_theta: 1_000_000.0,
        growth: Some([0.1, 16_384.0]),
        max_position_embeddings: 262_144,
        ..LLAMA
    },
    Family { architecture: "GraniteForCausalLM", model_type: "granite", has_multipliers: true, ..LLAMA },
    Family {
        architecture: "Olmo3ForCausalLM",
        model_type: "olmo3",
        query_key_norm: true,
        norms_all_heads: true,
        norms_before: false,
        sandwich_norms: true,
        windows: Windows::AllButEvery(4),
        sliding_window: Some(4096),
        rope_theta: 500_000.0,
        window_rope_theta: Some(500_000.0),
        ..LLAMA
    },
    Family {
        architecture: "Gemma3ForCausalLM",
        model_type: "gemma3_text",
        vocabulary: Some(262_208),
        key_value_heads: Some(4),
        head_dim: Some(256),
        query_key_norm: true,
        norms_add_one: true,
        sandwich_norms: true,
        scaled_embeddings: true,
        activation: ("hidden_activation", &["gelu_pytorch_tanh"], Activation::GeluTanh),
        query_scalar: Some(256.0),
        exceeds_f16: true,
        windows: Windows::AllButEvery(6),
        sliding_window: Some(4096),
        rope_theta: 1_000_000.0,
        window_rope_theta: Some(10_000.0),
        tied_embeddings: true,
        max_position_embeddings: 131_072,
        ..LLAMA
    },
];
