//! The families, one row each.
//!
//! The values are those of the configuration classes of transformers for keys that config.json
//! leaves out. What config.json cannot say is as in the model classes.

mod parts;

use finetune_kernels::Scores;

use self::parts::{DEEPSEEK_EXPERTS, NAMES, QWEN3_EXPERTS, SANDWICH};
use super::{
    Asked, AttentionGate, Bias, ExpertLayout, Family, InMlx, LatentSizes, Mixture, Names, Normalized, OtherMixer,
    PartialRotary, RopeLayers, Shared, Softcap, Windows,
};
use crate::config::Activation;

const LLAMA: Family = Family {
    architecture: "LlamaForCausalLM",
    model_type: "llama",
    names: NAMES,
    vocabulary: None,
    key_value_heads: None,
    head_dim: None,
    qkv_bias: Bias::Asked,
    output_bias: Bias::Asked,
    query_key_norm: Asked::Never,
    norms_add_one: false,
    norm_eps: ("rms_norm_eps", 1e-6),
    norms_all_heads: false,
    fused_qkv: false,
    fused_gate_up: false,
    bare_head_norms: None,
    post_norm_eps: None,
    last_norm_is_plain: false,
    embedding_norm: false,
    output_multiplier: None,
    scaled_embeddings: false,
    wide_heads: None,
    value_norm: false,
    has_layer_scale: false,
    per_layer_inputs: None,
    has_multipliers: false,
    softcaps: [None; 2],
    has_sinks: false,
    growth: None,
    // Both are names of the same function.
    activation: ("hidden_act", &["silu", "swish"], Activation::Silu),
    query_scalar: None,
    other_mixer: OtherMixer::None,
    adjusts_width: false,
    latent: None,
    attention_gate: AttentionGate::None,
    partial_rotary: PartialRotary::All,
    rope_pairs: false,
    mixture: None,
    exceeds_f16: false,
    windows: Windows::Never,
    sliding_window: None,
    rope_theta: 10_000.0,
    rope_of_class: None,
    window_rope_theta: None,
    rope_layers: RopeLayers::All,
    is_hybrid: false,
    tied_embeddings: false,
    max_position_embeddings: 2048,
};

const QWEN3_5: Family = Family {
    architecture: "Qwen3_5ForCausalLM",
    model_type: "qwen3_5_text",
    vocabulary: Some(248_320),
    key_value_heads: Some(4),
    head_dim: Some(256),
    query_key_norm: Asked::Always,
    norms_add_one: true,
    other_mixer: OtherMixer::Delta { is_grouped: false },
    attention_gate: AttentionGate::WithQueries,
    partial_rotary: PartialRotary::Share(0.25),
    exceeds_f16: true,
    max_position_embeddings: 32_768,
    ..LLAMA
};

const GEMMA3: Family = Family {
    architecture: "Gemma3ForCausalLM",
    model_type: "gemma3_text",
    names: SANDWICH,
    vocabulary: Some(262_208),
    key_value_heads: Some(4),
    head_dim: Some(256),
    query_key_norm: Asked::Always,
    norms_add_one: true,
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
};

const GEMMA4: Family = Family {
    architecture: "Gemma4ForCausalLM",
    model_type: "gemma4_text",
    names: Names { router: "router.proj", experts: "experts", ..SANDWICH },
    vocabulary: Some(262_144),
    norms_add_one: false,
    wide_heads: Some(512),
    value_norm: true,
    has_layer_scale: true,
    per_layer_inputs: Some(256),
    softcaps: [None, Some(Softcap { default: None })],
    // Scores keep their size.
    query_scalar: Some(1.0),
    mixture: Some(Mixture {
        sizes: [128, 8, 704],
        normalized: (Normalized::Always, 0.0),
        is_beside: true,
        peft_reads: false,
        has_router_loss: false,
        ..QWEN3_EXPERTS
    }),
    sliding_window: Some(512),
    ..GEMMA3
};

const DEEPSEEK_V3: Family = Family {
    architecture: "DeepseekV3ForCausalLM",
    model_type: "deepseek_v3",
    names: Names { shared: "mlp.shared_experts", ..NAMES },
    vocabulary: Some(129_280),
    latent: Some(LatentSizes { query_rank: 1536, plain: 128, value: 128 }),
    rope_pairs: true,
    mixture: Some(DEEPSEEK_EXPERTS),
    max_position_embeddings: 4096,
    ..LLAMA
};

const LFM2: Family = Family {
    architecture: "Lfm2ForCausalLM",
    model_type: "lfm2",
    names: Names {
        norms: [Some("operator_norm"), None, Some("ffn_norm"), None],
        output: "out_proj",
        head_norms: ["q_layernorm", "k_layernorm"],
        feed_forward: "feed_forward",
        router: "feed_forward.gate",
        experts: "feed_forward.experts",
        gated: ["w1", "w3", "w2"],
        last_norm: "embedding_norm",
        ..NAMES
    },
    vocabulary: Some(65_536),
    key_value_heads: Some(8),
    qkv_bias: Bias::Never,
    output_bias: Bias::Never,
    query_key_norm: Asked::Always,
    norm_eps: ("norm_eps", 1e-5),
    other_mixer: OtherMixer::Convolution,
    adjusts_width: true,
    rope_theta: 1_000_000.0,
    tied_embeddings: true,
    max_position_embeddings: 128_000,
    ..LLAMA
};

/// The text model of Muse Glimmer, which transformers has no class of its own for.
const MUSE_GLIMMER: Family = Family {
    architecture: "MuseGlimmerForConditionalGeneration",
    model_type: "muse_glimmer_text",
    names: SANDWICH,
    vocabulary: Some(202_048),
    key_value_heads: Some(2),
    head_dim: Some(128),
    norms_add_one: true,
    norm_eps: ("rms_norm_eps", 1e-5),
    bare_head_norms: Some(3.87),
    post_norm_eps: Some(1e-8),
    last_norm_is_plain: true,
    embedding_norm: true,
    output_multiplier: Some(0.196_116_135_138_184_04),
    softcaps: [None, Some(Softcap { default: Some(20.0) })],
    activation: ("hidden_activation", &["silu", "swish"], Activation::Silu),
    attention_gate: AttentionGate::Apart,
    exceeds_f16: true,
    windows: Windows::AllButEveryFromLast(4),
    sliding_window: Some(2048),
    rope_layers: RopeLayers::WithTheta,
    max_position_embeddings: 131_072,
    ..LLAMA
};

/// All families.
pub(crate) static FAMILIES: [Family; 28] = [
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
        query_key_norm: Asked::Always,
        windows: Windows::Later,
        sliding_window: Some(4096),
        max_position_embeddings: 32_768,
        ..LLAMA
    },
    Family {
        architecture: "Qwen3MoeForCausalLM",
        model_type: "qwen3_moe",
        key_value_heads: Some(4),
        query_key_norm: Asked::Always,
        mixture: Some(QWEN3_EXPERTS),
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
        mixture: Some(Mixture {
            sizes: [256, 8, 512],
            normalized: (Normalized::Always, 0.0),
            shared: Shared::Gated(512),
            peft_reads: false,
            ..QWEN3_EXPERTS
        }),
        ..QWEN3_5
    },
    Family {
        architecture: "SmolLM3ForCausalLM",
        model_type: "smollm3",
        key_value_heads: Some(4),
        windows: Windows::WithoutRope,
        rope_theta: 2_000_000.0,
        rope_layers: RopeLayers::Listed,
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
        rope_of_class: Some(
            r#"{"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 16384, "mscale": 1,
                "mscale_all_dim": 1}"#,
        ),
        max_position_embeddings: 262_144,
        ..LLAMA
    },
    Family { architecture: "GraniteForCausalLM", model_type: "granite", has_multipliers: true, ..LLAMA },
    Family {
        architecture: "Olmo3ForCausalLM",
        model_type: "olmo3",
        names: Names {
            norms: [None, Some("post_attention_layernorm"), None, Some("post_feedforward_layernorm")],
            ..NAMES
        },
        query_key_norm: Asked::Always,
        norms_all_heads: true,
        windows: Windows::AllButEvery(4),
        sliding_window: Some(4096),
        rope_theta: 500_000.0,
        window_rope_theta: Some(500_000.0),
        ..LLAMA
    },
    GEMMA3,
    Family {
        architecture: "Gemma2ForCausalLM",
        model_type: "gemma2",
        vocabulary: Some(256_000),
        query_key_norm: Asked::Never,
        softcaps: [Some(Softcap { default: Some(50.0) }), Some(Softcap { default: Some(30.0) })],
        windows: Windows::EveryOther,
        rope_theta: 10_000.0,
        window_rope_theta: None,
        max_position_embeddings: 8192,
        ..GEMMA3
    },
    Family {
        architecture: "Phi3ForCausalLM",
        model_type: "phi3",
        vocabulary: Some(32_064),
        qkv_bias: Bias::Never,
        output_bias: Bias::Never,
        norm_eps: ("rms_norm_eps", 1e-5),
        fused_qkv: true,
        fused_gate_up: true,
        partial_rotary: PartialRotary::Share(1.0),
        windows: Windows::EveryLayer,
        max_position_embeddings: 4096,
        ..LLAMA
    },
    Family {
        architecture: "GptOssForCausalLM",
        model_type: "gpt_oss",
        names: Names { router: "mlp.router", ..NAMES },
        vocabulary: Some(201_088),
        key_value_heads: Some(8),
        head_dim: Some(64),
        qkv_bias: Bias::AskedOrLeftOut,
        output_bias: Bias::AskedOrLeftOut,
        norm_eps: ("rms_norm_eps", 1e-5),
        has_sinks: true,
        activation: ("hidden_act", &["silu"], Activation::Clamped),
        mixture: Some(Mixture {
            sizes: [128, 4, 2880],
            // The softmax of the chosen logits is that of all, divided by its sum over the chosen.
            normalized: (Normalized::Always, 0.0),
            has_biases: true,
            layout: ExpertLayout::TakingTurns,
            peft_reads: false,
            in_mlx: InMlx::Unread("gpt-oss is published in the one form that it reads, MXFP4"),
            ..QWEN3_EXPERTS
        }),
        exceeds_f16: true,
        windows: Windows::EveryOther,
        sliding_window: Some(128),
        rope_theta: 150_000.0,
        rope_of_class: Some(
            r#"{"rope_type": "yarn", "factor": 32, "original_max_position_embeddings": 4096, "truncate": false}"#,
        ),
        max_position_embeddings: 131_072,
        ..LLAMA
    },
    DEEPSEEK_V3,
    // Kimi K2: the same under a name of its own.
    Family { model_type: "kimi_k2", ..DEEPSEEK_V3 },
    Family {
        architecture: "Glm4MoeLiteForCausalLM",
        model_type: "glm4_moe_lite",
        vocabulary: Some(154_880),
        norm_eps: ("rms_norm_eps", 1e-5),
        latent: Some(LatentSizes { query_rank: 768, plain: 192, value: 256 }),
        mixture: Some(Mixture { sizes: [64, 4, 1536], scale: 1.8, groups: [1, 1], dense: 1, ..DEEPSEEK_EXPERTS }),
        exceeds_f16: true,
        max_position_embeddings: 202_752,
        ..DEEPSEEK_V3
    },
    Family {
        architecture: "Glm4MoeForCausalLM",
        model_type: "glm4_moe",
        names: Names { shared: "mlp.shared_experts", ..NAMES },
        vocabulary: Some(151_552),
        key_value_heads: Some(8),
        output_bias: Bias::Never,
        query_key_norm: Asked::Key("use_qk_norm"),
        norm_eps: ("rms_norm_eps", 1e-5),
        partial_rotary: PartialRotary::Share(0.5),
        mixture: Some(Mixture { sizes: [128, 8, 1408], scale: 1.0, groups: [1, 1], dense: 1, ..DEEPSEEK_EXPERTS }),
        exceeds_f16: true,
        max_position_embeddings: 131_072,
        ..LLAMA
    },
    Family {
        architecture: "Glm4ForCausalLM",
        model_type: "glm4",
        names: Names {
            norms: [
                Some("input_layernorm"),
                Some("post_self_attn_layernorm"),
                Some("post_attention_layernorm"),
                Some("post_mlp_layernorm"),
            ],
            ..NAMES
        },
        vocabulary: Some(151_552),
        key_value_heads: Some(2),
        head_dim: Some(128),
        qkv_bias: Bias::AskedOrLeftOut,
        output_bias: Bias::Never,
        norm_eps: ("rms_norm_eps", 1.562_5e-7),
        fused_gate_up: true,
        partial_rotary: PartialRotary::Share(0.5),
        rope_pairs: true,
        max_position_embeddings: 131_072,
        ..LLAMA
    },
    GEMMA4,
    // The text model of the 12B, whose wrapper has no towers.
    Family { model_type: "gemma4_unified_text", ..GEMMA4 },
    Family {
        architecture: "GraniteMoeHybridForCausalLM",
        model_type: "granitemoehybrid",
        names: Names { feed_forward: "shared_mlp", fused: ["input_linear", "output_linear"], ..NAMES },
        vocabulary: Some(32_000),
        has_multipliers: true,
        fused_gate_up: true,
        rope_layers: RopeLayers::Asked,
        is_hybrid: true,
        ..LLAMA
    },
    LFM2,
    Family {
        architecture: "Lfm2MoeForCausalLM",
        model_type: "lfm2_moe",
        adjusts_width: false,
        mixture: Some(Mixture {
            sizes: [32, 4, 1792],
            scores: Scores::Sigmoid,
            normalized: (Normalized::Asked(true), 1e-6),
            correction: Some("feed_forward.expert_bias"),
            dense: 2,
            peft_reads: false,
            has_router_loss: false,
            ..QWEN3_EXPERTS
        }),
        ..LFM2
    },
    MUSE_GLIMMER,
    // The same where mlx-community's files have no model around it.
    Family { model_type: "muse_glimmer", ..MUSE_GLIMMER },
    Family {
        architecture: "Qwen3NextForCausalLM",
        model_type: "qwen3_next",
        vocabulary: Some(151_936),
        key_value_heads: Some(2),
        other_mixer: OtherMixer::Delta { is_grouped: true },
        mixture: Some(Mixture {
            sizes: [512, 10, 512],
            normalized: (Normalized::Asked(true), 0.0),
            shared: Shared::Gated(512),
            ..QWEN3_EXPERTS
        }),
        ..QWEN3_5
    },
];
