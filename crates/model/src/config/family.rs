//! The families of models: one decoder with these differences, as data. What each is like stands in the
//! table.

mod table;

use finetune_kernels::Scores;

pub(crate) use self::table::FAMILIES;

use crate::config::Activation;

/// What makes a family of models different from the others.
#[derive(Debug, PartialEq)]
pub struct Family {
    /// The name of the model class in transformers.
    pub architecture: &'static str,
    /// `model_type` of config.json.
    pub model_type: &'static str,
    /// What the parts of its layers are called.
    pub(crate) names: Names,
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
    pub(crate) query_key_norm: Asked,
    /// Whether norms multiply by 1 + their weights.
    pub(crate) norms_add_one: bool,
    /// The key of what norms add to the mean square, and its value if that is left out.
    pub(crate) norm_eps: (&'static str, f64),
    /// Whether the norms of queries and keys are over all heads together.
    pub(crate) norms_all_heads: bool,
    /// Whether one projection makes queries, keys and values.
    pub(crate) fused_qkv: bool,
    /// Whether one projection makes the gate and what it is multiplied with.
    pub(crate) fused_gate_up: bool,
    /// Whether queries and keys have norms without weights, and queries a factor (`qk_scale_factor`); its
    /// value if the key is left out.
    pub(crate) bare_head_norms: Option<f64>,
    /// What the norms of what a layer's parts add, add to the mean square (`post_norm_eps`), where that is
    /// another number than in the others; its value if the key is left out.
    pub(crate) post_norm_eps: Option<f64>,
    /// Whether the last norm multiplies by its weights as they are where those of layers add one.
    pub(crate) last_norm_is_plain: bool,
    /// Whether embeddings have a norm without weights.
    pub(crate) embedding_norm: bool,
    /// What logits are multiplied by (`output_multiplier`) if the key is left out, where there is such a key.
    pub(crate) output_multiplier: Option<f64>,
    /// Whether embeddings are multiplied by √hidden_size.
    pub(crate) scaled_embeddings: bool,
    /// Elements of a head of layers that see all keys if `global_head_dim` is left out, where those layers
    /// have heads of their own.
    pub(crate) wide_heads: Option<usize>,
    /// Whether values have a norm, without weights.
    pub(crate) value_norm: bool,
    /// Whether what comes out of a layer is multiplied by a number of its own.
    pub(crate) has_layer_scale: bool,
    /// Elements of each layer's own inputs if `hidden_size_per_layer_input` is left out, where there are such.
    pub(crate) per_layer_inputs: Option<usize>,
    /// Whether config.json has factors of embeddings, scores, residual branches and logits.
    pub(crate) has_multipliers: bool,
    /// Soft caps of scores and logits if their keys are left out, where there are such; `None`: the keys are
    /// refused.
    pub(crate) softcaps: [Option<Softcap>; 2],
    /// Whether attention has sinks.
    pub(crate) has_sinks: bool,
    /// `llama_4_scaling_beta` and `original_max_position_embeddings` if the keys are left out, where queries
    /// grow with their position.
    pub(crate) growth: Option<[f64; 2]>,
    /// What the feed-forward part applies to its gate: the key of config.json, and the names that it
    /// may have there.
    pub(crate) activation: (&'static str, &'static [&'static str], Activation),
    /// `query_pre_attn_scalar` if the key is left out, where attention's scores are divided by the root
    /// of that; `None`: by that of head_dim.
    pub(crate) query_scalar: Option<f64>,
    /// What layers have in the place of attention, but for those that config.json names.
    pub(crate) other_mixer: OtherMixer,
    /// Whether its feed-forward parts are wider or narrower than config.json says, by LFM2's rule.
    pub(crate) adjusts_width: bool,
    /// Sizes of latent attention if their keys are left out; `None`: keys and values are not compressed.
    pub(crate) latent: Option<LatentSizes>,
    /// What makes the gate that attention's output is multiplied by.
    pub(crate) attention_gate: AttentionGate,
    /// `partial_rotary_factor` if the key is left out.
    pub(crate) partial_rotary: PartialRotary,
    /// Whether the elements of a head that turn together are neighbours.
    pub(crate) rope_pairs: bool,
    /// Its mixtures of experts; `None`: feed-forward parts are dense.
    pub(crate) mixture: Option<Mixture>,
    /// Whether its activations exceed the largest number of float16.
    pub exceeds_f16: bool,
    /// Which layers see only a window of keys.
    pub(crate) windows: Windows,
    /// `sliding_window` if the key is left out.
    pub(crate) sliding_window: Option<usize>,
    /// `rope_theta` if the key is left out.
    pub(crate) rope_theta: f64,
    /// `rope_parameters` as JSON if config.json says nothing of them; `None`: nothing is stretched then.
    pub(crate) rope_of_class: Option<&'static str>,
    /// `rope_theta` of layers with a window if its key is left out, where they have a rotary embedding of
    /// their own.
    pub(crate) window_rope_theta: Option<f64>,
    /// Which layers have a rotary embedding.
    pub(crate) rope_layers: RopeLayers,
    /// Whether it is Granite's form of layers that may be recurrent: those have attention alone here.
    pub(crate) is_hybrid: bool,
    /// `tie_word_embeddings` if the key is left out.
    pub(crate) tied_embeddings: bool,
    /// `max_position_embeddings` if the key is left out.
    pub(crate) max_position_embeddings: usize,
}

/// What a family calls the parts of a layer, under `model.layers.N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Names {
    /// Norms of what attention reads, of what it adds, of what the feed-forward part reads and of what that
    /// adds; `None`: there is none.
    pub(crate) norms: [Option<&'static str>; 4],
    /// The output projection of attention.
    pub(crate) output: &'static str,
    /// The norms of queries and of keys.
    pub(crate) head_norms: [&'static str; 2],
    /// The dense feed-forward part.
    pub(crate) feed_forward: &'static str,
    /// Gate, up and down in it.
    pub(crate) gated: [&'static str; 3],
    /// One projection to gate and up, and down; where they are so.
    pub(crate) fused: [&'static str; 2],
    /// The router.
    pub(crate) router: &'static str,
    /// The experts.
    pub(crate) experts: &'static str,
    /// The expert that every token goes through.
    pub(crate) shared: &'static str,
    /// The last norm of the model.
    pub(crate) last_norm: &'static str,
}

/// What some layers have in the place of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OtherMixer {
    None,
    /// Gated delta nets.
    Delta {
        /// Whether two projections make all that they take, key head by key head.
        is_grouped: bool,
    },
    /// Short convolutions.
    Convolution,
}

/// What makes the gate that attention's output is multiplied by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AttentionGate {
    /// There is none.
    None,
    /// The query projection, head by head behind the queries.
    WithQueries,
    /// A projection of its own, `self_attn.gate_proj`.
    Apart,
}

/// Which layers have a rotary embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RopeLayers {
    All,
    /// Those that `no_rope_layers` has 1 for. Without it: all but every fourth.
    Listed,
    /// Those that `layer_rope_theta` has no 0 for. Without it: all but every fourth, counted from the last.
    WithTheta,
    /// All if `position_embedding_type` is "rope", else none.
    Asked,
}

/// Whether a family has a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Never,
    Always,
    /// It has one if this key of config.json is true.
    Key(&'static str),
}

/// A bound of scores or logits, by a key of config.json.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Softcap {
    /// Its value if the key is left out.
    pub(crate) default: Option<f64>,
}

/// What share of a head's elements turns with the position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum PartialRotary {
    /// All; the class knows no other share.
    All,
    /// `partial_rotary_factor`, or this if it is left out.
    Share(f64),
}

/// Sizes of latent attention (DeepSeek-AI 2024, "DeepSeek-V2") if their keys are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LatentSizes {
    /// `q_lora_rank`
    pub(crate) query_rank: usize,
    /// `qk_nope_head_dim`
    pub(crate) plain: usize,
    /// `v_head_dim`
    pub(crate) value: usize,
}

/// What a family's mixtures of experts are like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Mixture {
    /// How many experts there are, how many a token goes through, and the elements of a token inside of
    /// one, if the keys are left out.
    pub(crate) sizes: [usize; 3],
    /// What makes scores of the router's logits.
    pub(crate) scores: Scores,
    /// Whether the weights of a token's experts are divided by their sum, and what is added to that.
    pub(crate) normalized: (Normalized, f32),
    /// `routed_scaling_factor` if the key is left out.
    pub(crate) scale: f64,
    /// Whether the router and the experts have biases.
    pub(crate) has_biases: bool,
    /// The vector in the layer that is added to the scores by which experts are chosen.
    pub(crate) correction: Option<&'static str>,
    /// `n_group` and `topk_group` if the keys are left out.
    pub(crate) groups: [usize; 2],
    /// How many of the first layers are dense if no key says it.
    pub(crate) dense: usize,
    /// The expert that every token goes through.
    pub(crate) shared: Shared,
    /// How experts lie in files.
    pub(crate) layout: ExpertLayout,
    /// Whether they stand beside a dense part, and only if `enable_moe_block` is true.
    pub(crate) is_beside: bool,
    /// Whether PEFT 0.21 turns branches of single experts into those of its stacks.
    pub(crate) peft_reads: bool,
    /// Whether transformers can add an auxiliary loss of its routers.
    pub(crate) has_router_loss: bool,
    /// What mlx-lm 0.32 makes of it.
    pub(crate) in_mlx: InMlx,
}

/// What mlx-lm makes of a family's mixtures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InMlx {
    /// Routers are linear layers, which it packs in 8 bits; experts are in stacks, packed or not.
    LinearRouter,
    /// The same, but routers are no linear layers: they are never packed.
    PlainRouter,
    /// It does not read what is packed here, and why.
    Unread(&'static str),
}

/// Whether the weights of a token's experts are divided by their sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Normalized {
    Always,
    /// If `norm_topk_prob` is true; its value if the key is left out.
    Asked(bool),
}

/// The expert that every token goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shared {
    None,
    /// With a gate. Elements inside if `shared_expert_intermediate_size` is left out.
    Gated(usize),
    /// `n_shared_experts` times as wide as an expert; their number if the key is left out.
    Plain(usize),
}

/// How experts lie in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExpertLayout {
    /// One by one, or in stacks [e, o, i].
    Plain,
    /// gpt-oss's: stacks [e, i, o] with biases, in which rows of gate and up take turns; or in MXFP4.
    TakingTurns,
}

/// Whether a linear layer has a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bias {
    Never,
    /// It has one, whatever config.json says.
    Always,
    /// It has one if `attention_bias` is true.
    Asked,
    /// It has one if `attention_bias` is true or left out.
    AskedOrLeftOut,
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
    /// The layers that `layer_types` names. Without `layer_types`: every other one from the first on.
    EveryOther,
    /// The layers that `layer_types` names. Without `layer_types`: all but every so many, counted from the
    /// last layer on, which has none.
    AllButEveryFromLast(usize),
}

impl Family {
    /// The family of a model, by `model_type` of its config.json.
    pub(crate) fn of_model(model_type: Option<&str>) -> Option<&'static Family> {
        FAMILIES.iter().find(|family| Some(family.model_type) == model_type)
    }

    /// Whether the norm whose weights have this name multiplies by 1 + them. That of a delta net's outputs never does.
    pub(crate) fn adds_one_to(&self, weights: &str) -> bool {
        self.norms_add_one && weights.ends_with("norm.weight") && !weights.ends_with(".linear_attn.norm.weight")
    }

    /// Whether mlx-lm's files have the 1 in the norms' weights, and not only its program.
    pub(crate) fn has_one_in_mlx_files(&self) -> bool {
        matches!(self.other_mixer, OtherMixer::Delta { .. })
    }

    /// Whether PEFT 0.21 turns branches of single experts into those of its stacks.
    pub(crate) fn peft_reads_experts(&self) -> bool {
        self.mixture.is_some_and(|mixture| mixture.peft_reads)
    }

    /// Whether transformers reads its experts in stacks alone.
    pub(crate) fn has_stacks_only(&self) -> bool {
        self.mixture.is_some_and(|mixture| mixture.is_beside)
    }

    /// Whether gate and up of an expert are one parameter, with one branch (gpt-oss). Then an adapter's files
    /// have one branch for all experts of a layer, as PEFT has.
    pub(crate) fn has_expert_parameters(&self) -> bool {
        self.expert_layout() == ExpertLayout::TakingTurns
    }

    /// How its experts lie in files.
    pub(crate) fn expert_layout(&self) -> ExpertLayout {
        self.mixture.map_or(ExpertLayout::Plain, |mixture| mixture.layout)
    }
}
