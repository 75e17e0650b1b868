//! Names and mixtures that several rows of the table have.

use finetune_kernels::Scores;

use crate::config::family::{ExpertLayout, InMlx, Mixture, Names, Normalized, Shared};

pub(super) const NAMES: Names = Names {
    norms: [Some("input_layernorm"), None, Some("post_attention_layernorm"), None],
    output: "o_proj",
    head_norms: ["q_norm", "k_norm"],
    feed_forward: "mlp",
    gated: ["gate_proj", "up_proj", "down_proj"],
    fused: ["gate_up_proj", "down_proj"],
    router: "mlp.gate",
    experts: "mlp.experts",
    shared: "mlp.shared_expert",
    last_norm: "norm",
};

/// With norms on both sides of a part, the one behind attention has the name of the one before the
/// feed-forward part of other families.
pub(super) const SANDWICH: Names = Names {
    norms: [
        Some("input_layernorm"),
        Some("post_attention_layernorm"),
        Some("pre_feedforward_layernorm"),
        Some("post_feedforward_layernorm"),
    ],
    ..NAMES
};

pub(super) const QWEN3_EXPERTS: Mixture = Mixture {
    sizes: [128, 8, 768],
    scores: Scores::Softmax,
    normalized: (Normalized::Asked(false), 0.0),
    scale: 1.0,
    has_biases: false,
    correction: None,
    groups: [1, 1],
    dense: 0,
    shared: Shared::None,
    layout: ExpertLayout::Plain,
    is_beside: false,
    peft_reads: true,
    has_router_loss: true,
    in_mlx: InMlx::LinearRouter,
};

pub(super) const DEEPSEEK_EXPERTS: Mixture = Mixture {
    sizes: [256, 8, 2048],
    scores: Scores::Sigmoid,
    normalized: (Normalized::Asked(true), 1e-20),
    scale: 2.5,
    correction: Some("mlp.gate.e_score_correction_bias"),
    groups: [8, 4],
    dense: 3,
    shared: Shared::Plain(1),
    has_router_loss: false,
    in_mlx: InMlx::PlainRouter,
    ..QWEN3_EXPERTS
};
