//! The tree of a config: which tensors a model of it has, with their names, shapes and places.

use super::{
    Attention, Beside, Decoder, DeltaInputs, DeltaNet, Experts, FeedForward, FusedGated, Gated, Head, LatentAttention,
    LatentQueries, Layer, Linear, Matrix, Mixer, Norm, OwnInput, PerLayer, Projections, Role, ShortConvolution, Vector,
};
use crate::branch::GateUp;
use crate::config::family::{AttentionGate, OtherMixer, Shared};
use crate::config::{
    ConvolutionConfig, DeltaConfig, LatentConfig, LayerConfig, MixerKind, ModelConfig, PerLayerConfig, Values,
};
use crate::files::by_row::PER_LAYER_TABLE;

impl Decoder {
    /// The tree of a config, with absent tensors.
    pub(crate) fn new(config: &ModelConfig) -> Decoder {
        let hidden = config.hidden_size;
        let mut linears = 0;
        let layers = config.layers.iter().enumerate();
        let layers = layers.map(|(n, layer)| layer_tree(config, n, layer, &mut linears)).collect();
        let per_layer = config.per_layer.map(|inputs| per_layer(config, inputs, &mut linears));
        Decoder {
            embedding: Matrix::new("model.embed_tokens.weight".to_owned(), [config.vocabulary, hidden]),
            embedding_norm: config.family.embedding_norm.then_some(config.rms_norm_eps),
            embedding_scale: config.embedding_scale,
            embedding_lora: None,
            layers,
            per_layer,
            head: Head {
                norm: last_norm(config),
                divisor: config.logits_divisor,
                softcap: config.logits_cap,
                output: (!config.tied_embeddings)
                    .then(|| Matrix::new("lm_head.weight".to_owned(), [config.vocabulary, hidden])),
                index: linears,
                lora: None,
            },
            source: None,
            stage: None,
            sliced: None,
        }
    }
}

impl Gated {
    /// The same as an expert, of this module. `takes_turns`: whether gate and up have one branch.
    fn of_expert(mut self, module: String, takes_turns: bool) -> Gated {
        for linear in [&mut self.gate, &mut self.up, &mut self.down] {
            linear.weight.is_of_expert = true;
        }
        self.gate_up = takes_turns.then(|| {
            let [inner, hidden] = self.gate.weight.shape;
            let module = format!("{module}.gate_up_proj");
            let weight = Matrix::new(format!("{module}.weight"), [2 * inner, hidden]);
            GateUp { module, index: self.gate.index, weight, lora: None }
        });
        self
    }
}

/// What makes the inputs that layers have of their own.
fn per_layer(config: &ModelConfig, inputs: PerLayerConfig, linears: &mut u32) -> PerLayer {
    let all = config.layers.len() * inputs.width;
    let module = "model.per_layer_model_projection".to_owned();
    let projection = linear(module, Role::Latent, *linears, [all, config.hidden_size], false);
    *linears += 1;
    let table = Matrix::new(PER_LAYER_TABLE.to_owned(), [inputs.vocabulary, all]);
    PerLayer {
        table: Matrix { is_by_row: true, ..table },
        projection,
        norm: norm("model.per_layer_projection_norm", inputs.width, config),
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
    let family = config.family;
    let mixer = match layer.mixer {
        MixerKind::Delta => {
            let delta = config.delta.expect("the sizes of a layer's delta net");
            Mixer::Delta(delta_net(config, n, delta, &mut linear))
        }
        MixerKind::Convolution => {
            let sizes = config.convolution.expect("the sizes of a layer's convolution");
            Mixer::Convolution(convolution(config, n, sizes, &mut linear))
        }
        MixerKind::Latent => {
            let sizes = config.latent.expect("the sizes of a layer's latent attention");
            Mixer::Latent(latent_attention(config, n, layer, sizes, &mut linear))
        }
        MixerKind::Attention => Mixer::Attention(attention(config, n, layer, &mut linear)),
    };
    let [input_norm, mixer_norm, post_norm, feed_forward_norm] =
        family.names.norms.map(|part| part.map(|part| norm(part, hidden)));
    let of_added = |norm: Norm| Norm { eps: config.post_norm_eps.unwrap_or(norm.eps), ..norm };
    let [mixer_norm, feed_forward_norm] = [mixer_norm, feed_forward_norm].map(|norm| norm.map(of_added));
    Layer {
        input_norm,
        mixer,
        mixer_norm,
        post_norm,
        feed_forward: feed_forward(config, n, layer, &mut linear),
        feed_forward_norm,
        residual_scale: config.residual_scale,
        own_input: config.per_layer.map(|inputs| OwnInput {
            gate: linear("per_layer_input_gate", Role::Latent, [inputs.width, hidden], false),
            projection: linear("per_layer_projection", Role::Latent, [hidden, inputs.width], false),
            norm: norm("post_per_layer_input_norm", hidden),
        }),
        scale: family.has_layer_scale.then(|| Vector::new(name("layer_scalar"), 1, 1.0)),
    }
}

/// The attention of layer `n`.
fn attention(
    config: &ModelConfig,
    n: usize,
    layer: &LayerConfig,
    mut linear: impl FnMut(&str, Role, [usize; 2], bool) -> Linear,
) -> Attention {
    let (family, hidden, qkv_bias) = (config.family, config.hidden_size, config.qkv_bias);
    let (query, key) = (config.heads * layer.head_dim, layer.key_value_heads * layer.head_dim);
    let is_gated = family.attention_gate == AttentionGate::WithQueries;
    let name = |part: &str| format!("model.layers.{n}.self_attn.{part}");
    let head_norm = |part: &str, all: usize| {
        let length = if family.norms_all_heads { all } else { layer.head_dim };
        config.query_key_norm.then(|| norm(&name(part), length, config))
    };
    let output = format!("self_attn.{}", family.names.output);
    Attention {
        projections: if family.fused_qkv {
            Projections::Fused(linear("self_attn.qkv_proj", Role::Fused, [query + 2 * key, hidden], qkv_bias))
        } else {
            let of_queries = [if is_gated { 2 * query } else { query }, hidden];
            let q = linear("self_attn.q_proj", Role::Query, of_queries, qkv_bias);
            match layer.values {
                Values::OfLayer(source) => Projections::Queries { q, source },
                Values::Own | Values::Keys => Projections::Apart {
                    q,
                    k: linear("self_attn.k_proj", Role::Key, [key, hidden], qkv_bias),
                    v: (layer.values == Values::Own)
                        .then(|| linear("self_attn.v_proj", Role::Value, [key, hidden], qkv_bias)),
                },
            }
        },
        o: linear(&output, Role::Output, [hidden, query], config.output_bias),
        gate: (family.attention_gate == AttentionGate::Apart)
            .then(|| linear("self_attn.gate_proj", Role::OutputGate, [query, hidden], false)),
        sinks: family.has_sinks.then(|| Vector::new(name("sinks"), config.heads, 0.0)),
        q_norm: head_norm(family.names.head_norms[0], query),
        k_norm: head_norm(family.names.head_norms[1], key).filter(|_| !matches!(layer.values, Values::OfLayer(_))),
        value_norm: family.value_norm.then_some(config.rms_norm_eps),
        bare_norm: family.bare_head_norms.map(|_| config.rms_norm_eps),
        heads: config.heads,
        key_value_heads: layer.key_value_heads,
        head_dim: layer.head_dim,
        scale: config.score_scale,
        softcap: config.score_cap,
        window: layer.window,
        rope: layer.rope,
        query_rope: if family.growth.is_some() { Some(1) } else { layer.rope },
        rope_pairs: family.rope_pairs,
        is_gated,
    }
}

/// The short convolution of layer `n`.
fn convolution(
    config: &ModelConfig,
    n: usize,
    sizes: ConvolutionConfig,
    mut linear: impl FnMut(&str, Role, [usize; 2], bool) -> Linear,
) -> ShortConvolution {
    let (hidden, ConvolutionConfig { taps, bias }) = (config.hidden_size, sizes);
    let name = |part: &str| format!("model.layers.{n}.conv.conv.{part}");
    ShortConvolution {
        input: linear("conv.in_proj", Role::Recurrent, [3 * hidden, hidden], bias),
        out: linear("conv.out_proj", Role::Recurrent, [hidden, hidden], bias),
        kernel: Vector::new(name("weight"), hidden * taps, 0.0),
        bias: bias.then(|| Vector::new(name("bias"), hidden, 0.0)),
        taps,
    }
}

/// The feed-forward part of layer `n`.
fn feed_forward(
    config: &ModelConfig,
    n: usize,
    layer: &LayerConfig,
    mut linear: impl FnMut(&str, Role, [usize; 2], bool) -> Linear,
) -> FeedForward {
    let (hidden, names) = (config.hidden_size, &config.family.names);
    let part = names.feed_forward;
    let (Some(experts), Some(mixture)) = (config.experts.as_ref().filter(|_| layer.has_experts), config.family.mixture)
    else {
        let inner = layer.intermediate_size;
        if !config.family.fused_gate_up {
            return FeedForward::Gated(gated(config, part, inner, false, &mut linear));
        }
        return FeedForward::Fused(FusedGated {
            activation: config.activation,
            gate_up: linear(&format!("{part}.{}", names.fused[0]), Role::Fused, [2 * inner, hidden], false),
            down: linear(&format!("{part}.{}", names.fused[1]), Role::Down, [hidden, inner], false),
        });
    };
    let name = |part: &str| format!("model.layers.{n}.{part}");
    let dense = mixture.is_beside.then(|| gated(config, part, layer.intermediate_size, false, &mut linear));
    let experts = Experts {
        router: linear(names.router, Role::Router, [experts.count, hidden], mixture.has_biases),
        correction: mixture.correction.map(|tensor| Vector::new(name(tensor), experts.count, 0.0)),
        scales: mixture.is_beside.then(|| Vector::new(name("router.per_expert_scale"), experts.count, 1.0)),
        experts: (0..experts.count)
            .map(|n| format!("{}.{n}", names.experts))
            .map(|module| {
                gated(config, &module, experts.intermediate_size, mixture.has_biases, &mut linear)
                    .of_expert(name(&module), config.family.has_expert_parameters())
            })
            .collect(),
        choices: experts.choices,
        weights: experts.weights,
        groups: experts.groups,
        shared: experts.shared.map(|inner| {
            let expert = gated(config, names.shared, inner, false, &mut linear);
            let has_gate = matches!(mixture.shared, Shared::Gated(_));
            let gate = format!("{}_gate", names.shared);
            (expert, has_gate.then(|| linear(&gate, Role::Router, [1, hidden], false)))
        }),
    };
    let Some(dense) = dense else { return FeedForward::Experts(experts) };
    let norm = |part: &str| norm(&name(part), hidden, config);
    FeedForward::Beside(Beside {
        dense,
        dense_norm: norm("post_feedforward_layernorm_1"),
        experts,
        router_norm: Norm {
            gamma: Vector::new(name("router.scale"), hidden, 1.0),
            adds_one: false,
            eps: config.rms_norm_eps,
        },
        experts_norms: ["pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"].map(norm),
    })
}

/// A gated part of this inner width, of the linear layers that `linear` makes.
fn gated(
    config: &ModelConfig,
    module: &str,
    inner: usize,
    bias: bool,
    mut linear: impl FnMut(&str, Role, [usize; 2], bool) -> Linear,
) -> Gated {
    let (hidden, [gate, up, down]) = (config.hidden_size, config.family.names.gated);
    Gated {
        activation: config.activation,
        gate: linear(&format!("{module}.{gate}"), Role::Gate, [inner, hidden], bias),
        up: linear(&format!("{module}.{up}"), Role::Up, [inner, hidden], bias),
        gate_up: None,
        down: linear(&format!("{module}.{down}"), Role::Down, [hidden, inner], bias),
    }
}

/// The latent attention of layer `n`.
fn latent_attention(
    config: &ModelConfig,
    n: usize,
    layer: &LayerConfig,
    sizes: LatentConfig,
    mut linear: impl FnMut(&str, Role, [usize; 2], bool) -> Linear,
) -> LatentAttention {
    let (hidden, heads, bias) = (config.hidden_size, config.heads, config.qkv_bias);
    let LatentConfig { query_rank, rank, plain, turned, value } = sizes;
    let query = heads * (plain + turned);
    // These two norms have an epsilon of their own, whatever config.json says of the others.
    let norm =
        |part: &str, length| Norm { eps: 1e-6, ..norm(&format!("model.layers.{n}.self_attn.{part}"), length, config) };
    LatentAttention {
        queries: match query_rank {
            None => LatentQueries::Direct(linear("self_attn.q_proj", Role::Query, [query, hidden], false)),
            Some(rank) => LatentQueries::Compressed {
                down: linear("self_attn.q_a_proj", Role::Latent, [rank, hidden], bias),
                norm: norm("q_a_layernorm", rank),
                up: linear("self_attn.q_b_proj", Role::Query, [query, rank], false),
            },
        },
        down: linear("self_attn.kv_a_proj_with_mqa", Role::Latent, [rank + turned, hidden], bias),
        norm: norm("kv_a_layernorm", rank),
        up: linear("self_attn.kv_b_proj", Role::Key, [heads * (plain + value), rank], false),
        o: linear("self_attn.o_proj", Role::Output, [hidden, heads * value], config.output_bias),
        heads,
        sizes,
        scale: config.score_scale,
        window: layer.window,
        rope: layer.rope,
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
        inputs: if config.family.other_mixer == (OtherMixer::Delta { is_grouped: true }) {
            DeltaInputs::Grouped {
                qkvz: projection("in_proj_qkvz", [channels + values, hidden]),
                ba: projection("in_proj_ba", [2 * value_heads, hidden]),
            }
        } else {
            DeltaInputs::Apart {
                qkv: projection("in_proj_qkv", [channels, hidden]),
                z: projection("in_proj_z", [values, hidden]),
                b: projection("in_proj_b", [value_heads, hidden]),
                a: projection("in_proj_a", [value_heads, hidden]),
            }
        },
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

/// The norm behind the last layer.
fn last_norm(config: &ModelConfig) -> Norm {
    let name = format!("model.{}", config.family.names.last_norm);
    let mut norm = norm(&name, config.hidden_size, config);
    if config.family.last_norm_is_plain {
        (norm.adds_one, norm.gamma.fresh) = (false, 1.0);
    }
    norm
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
