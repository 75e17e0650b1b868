//! The tree of a config: which tensors a model of it has, with their names, shapes and places.

use super::{
    Attention, Decoder, DeltaNet, Experts, FeedForward, Gated, Head, Layer, Linear, Matrix, Mixer, Norm, Role, Vector,
};
use crate::config::{DeltaConfig, LayerConfig, ModelConfig};

impl Decoder {
    /// The tree of a config, with absent tensors.
    pub(crate) fn new(config: &ModelConfig) -> Decoder {
        let hidden = config.hidden_size;
        let mut linears = 0;
        let layers = config.layers.iter().enumerate();
        let layers = layers.map(|(n, layer)| layer_tree(config, n, layer, &mut linears)).collect();
        Decoder {
            embedding: Matrix::new("model.embed_tokens.weight".to_owned(), [config.vocabulary, hidden]),
            embedding_scale: config.embedding_scale,
            embedding_lora: None,
            layers,
            head: Head {
                norm: norm("model.norm", hidden, config),
                divisor: config.logits_divisor,
                output: (!config.tied_embeddings)
                    .then(|| Matrix::new("lm_head.weight".to_owned(), [config.vocabulary, hidden])),
                index: linears,
                lora: None,
            },
        }
    }
}

impl Gated {
    /// The same as an expert.
    fn of_expert(mut self) -> Gated {
        for linear in [&mut self.gate, &mut self.up, &mut self.down] {
            linear.weight.is_of_expert = true;
        }
        self
    }
}

/// The tree of layer `n`. `linears` counts the linear layers so far.
fn layer_tree(config: &ModelConfig, n: usize, layer: &LayerConfig, linears: &mut u32) -> Layer {
    let hidden = config.hidden_size;
    let name = |part: &str| format!("model.layers.{n}.{part}");
    let norm = |part: &str, length| norm(&name(part), length, config);
    let mut linear = |part: &str, role, shape, bias| {
        let index = *linears;
        *linears += 1;
        linear(name(part), role, index, shape, bias)
    };
    let (query, key) = (config.heads * config.head_dim, config.key_value_heads * config.head_dim);
    let qkv_bias = config.qkv_bias;
    let head_norm = |part: &str, all: usize| {
        let length = if config.family.norms_all_heads { all } else { config.head_dim };
        config.query_key_norm.then(|| norm(part, length))
    };
    // With norms on both sides of a part, the one behind attention has the name of the one before the
    // feed-forward part of other families.
    let (is_sandwich, is_before) = (config.family.sandwich_norms, config.family.norms_before);
    let post_norm = if is_sandwich { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
    let is_gated = config.family.gated_attention;
    let mixer = match config.delta.filter(|_| layer.is_recurrent) {
        Some(delta) => Mixer::Delta(delta_net(config, n, delta, &mut linear)),
        None => Mixer::Attention(Attention {
            q: linear("self_attn.q_proj", Role::Query, [if is_gated { 2 * query } else { query }, hidden], qkv_bias),
            k: linear("self_attn.k_proj", Role::Key, [key, hidden], qkv_bias),
            v: linear("self_attn.v_proj", Role::Value, [key, hidden], qkv_bias),
            o: linear("self_attn.o_proj", Role::Output, [hidden, query], config.output_bias),
            q_norm: head_norm("self_attn.q_norm", query),
            k_norm: head_norm("self_attn.k_norm", key),
            heads: config.heads,
            key_value_heads: config.key_value_heads,
            head_dim: config.head_dim,
            scale: config.score_scale,
            window: layer.window,
            rope: layer.rope,
            query_rope: if config.family.growth.is_some() { Some(1) } else { layer.rope },
            is_gated,
        }),
    };
    Layer {
        input_norm: is_before.then(|| norm("input_layernorm", hidden)),
        mixer,
        mixer_norm: is_sandwich.then(|| norm("post_attention_layernorm", hidden)),
        post_norm: is_before.then(|| norm(post_norm, hidden)),
        feed_forward: match config.experts.as_ref().filter(|_| layer.has_experts) {
            None => FeedForward::Gated(gated(config, "mlp", config.intermediate_size, &mut linear)),
            Some(experts) => FeedForward::Experts(Experts {
                router: linear("mlp.gate", Role::Router, [experts.count, hidden], false),
                experts: (0..experts.count)
                    .map(|n| format!("mlp.experts.{n}"))
                    .map(|module| gated(config, &module, experts.intermediate_size, &mut linear).of_expert())
                    .collect(),
                choices: experts.choices,
                weights: experts.weights,
                shared: experts.shared.map(|inner| {
                    let expert = gated(config, "mlp.shared_expert", inner, &mut linear);
                    (expert, linear("mlp.shared_expert_gate", Role::Router, [1, hidden], false))
                }),
            }),
        },
        feed_forward_norm: is_sandwich.then(|| norm("post_feedforward_layernorm", hidden)),
        residual_scale: config.residual_scale,
    }
}

/// A gated part of this inner width, of the linear layers that `linear` makes.
fn gated(
    config: &ModelConfig,
    module: &str,
    inner: usize,
    mut linear: impl FnMut(&str, Role, [usize; 2], bool) -> Linear,
) -> Gated {
    let hidden = config.hidden_size;
    Gated {
        activation: config.activation,
        gate: linear(&format!("{module}.gate_proj"), Role::Gate, [inner, hidden], false),
        up: linear(&format!("{module}.up_proj"), Role::Up, [inner, hidden], false),
        down: linear(&format!("{module}.down_proj"), Role::Down, [hidden, inner], false),
    }
}

/// The gated delta net of layer `n`.
fn delta_net(
    config: &ModelConfig,
    n: usize,
    delta: DeltaConfig,
    mut linear: impl FnMut(&str, Role, [usize; 2], bool) -> Linear,
) -> DeltaNet {
    let DeltaConfig { key_heads, value_heads, key_dim, value_dim, taps } = delta;
    let (hidden, values) = (config.hidden_size, value_heads * value_dim);
    let channels = 2 * key_heads * key_dim + values;
    let mut projection =
        |part: &str, shape: [usize; 2]| linear(&format!("linear_attn.{part}"), Role::Recurrent, shape, false);
    let name = |part: &str| format!("model.layers.{n}.linear_attn.{part}");
    DeltaNet {
        qkv: projection("in_proj_qkv", [channels, hidden]),
        z: projection("in_proj_z", [values, hidden]),
        b: projection("in_proj_b", [value_heads, hidden]),
        a: projection("in_proj_a", [value_heads, hidden]),
        out: projection("out_proj", [hidden, values]),
        convolution: Vector::new(name("conv1d.weight"), channels * taps, 0.0),
        decay: Vector::new(name("A_log"), value_heads, 0.0),
        bias: Vector::new(name("dt_bias"), value_heads, 1.0),
        // Unlike the others it multiplies by its weights as they are.
        norm: Norm { adds_one: false, ..norm(&name("norm"), value_dim, config) },
        key_heads,
        value_heads,
        key_dim,
        value_dim,
        taps,
    }
}

fn norm(module: &str, length: usize, config: &ModelConfig) -> Norm {
    let adds_one = config.family.norms_add_one;
    let fresh = if adds_one { 0.0 } else { 1.0 };
    Norm { gamma: Vector::new(format!("{module}.weight"), length, fresh), adds_one, eps: config.rms_norm_eps }
}

fn linear(module: String, role: Role, index: u32, shape: [usize; 2], bias: bool) -> Linear {
    Linear {
        weight: Matrix::new(format!("{module}.weight"), shape),
        bias: bias.then(|| Vector::new(format!("{module}.bias"), shape[0], 0.0)),
        module,
        role,
        index,
        lora: None,
    }
}
