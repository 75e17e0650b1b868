//! The tensors of a decoder, written once: names, shapes, roles and places.
//!
//! [`Decoder::new`] builds the tree from a config, with absent tensors. `files::load` fills it.
//! Everything that has to know a model's tensors walks this tree: checking files, loading, LoRA,
//! the order of trained parameters, merging, the memory estimate.

mod build;
mod cut;
mod lists;
mod parts;
mod tensors;

use std::sync::Arc;

use finetune_kernels::ExpertWeights;

pub use self::lists::{LinearLayer, expected_tensors, linear_layers, linear_modules};
pub(crate) use self::parts::{Home, Slot};
pub(crate) use self::tensors::{Matrix, Vector};
use crate::branch::{GateUp, LoraBranch};
use crate::config::{Activation, LatentConfig};
use crate::layer_source::LayerSource;
use crate::slice::Sliced;
use crate::stage::Connected;

/// What a linear layer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The projection to queries.
    Query,
    /// The projection to keys.
    Key,
    /// The projection to values.
    Value,
    /// The output projection of attention.
    Output,
    /// The projection that the activation of the feed-forward part is applied to.
    Gate,
    /// The projection that is multiplied with the activated gate.
    Up,
    /// The projection back to the hidden size.
    Down,
    /// The projection to a logit for each expert.
    Router,
    /// The projections into and out of a gated delta net.
    Recurrent,
    /// One projection to queries, keys and values, or to gate and up.
    Fused,
    /// The projections to the short vectors that queries, keys and values are made of.
    Latent,
    /// The projection to a gate of attention's output.
    OutputGate,
}

/// Along which dimension a linear layer can be cut into parts that several devices hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Each part computes some of the outputs from all inputs.
    Outputs,
    /// Each part takes some of the inputs. The parts' outputs are summed.
    Inputs,
    /// Every device holds it whole.
    Nowhere,
}

impl Role {
    /// How the layer may be cut, so that one sum per mixer and one per feed-forward suffices
    /// (Shoeybi et al. 2019, "Megatron-LM").
    pub fn split(self) -> Split {
        match self {
            Role::Query | Role::Key | Role::Value | Role::OutputGate | Role::Gate | Role::Up | Role::Recurrent => {
                Split::Outputs
            }
            Role::Output | Role::Down => Split::Inputs,
            Role::Router | Role::Fused | Role::Latent => Split::Nowhere,
        }
    }
}

/// RMS norm: `gamma · x / sqrt(mean(x²) + eps)` (Zhang and Sennrich 2019).
#[derive(Clone, Debug)]
pub(crate) struct Norm {
    pub(crate) gamma: Vector,
    /// Whether gamma is 1 + the values of the vector.
    pub(crate) adds_one: bool,
    pub(crate) eps: f64,
}

/// A linear layer, `x Wᵀ + bias`, perhaps with a LoRA branch.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    /// The module's name, such as `model.layers.0.self_attn.q_proj`.
    pub(crate) module: String,
    pub(crate) role: Role,
    /// Its number among all linear layers of the model, which keys the random numbers of its
    /// branch.
    pub(crate) index: u32,
    /// [o, i]
    pub(crate) weight: Matrix,
    /// [o]
    pub(crate) bias: Option<Vector>,
    pub(crate) lora: Option<LoraBranch>,
}

/// What makes queries, keys and values.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a model has some dozen layers")]
pub(crate) enum Projections {
    Apart {
        q: Linear,
        k: Linear,
        /// `None`: values are the keys, before their norm and positions.
        v: Option<Linear>,
    },
    /// Keys and values are those of an earlier layer.
    Queries {
        q: Linear,
        /// Its number.
        source: usize,
    },
    /// The outputs of the three one behind the other.
    Fused(Linear),
}

/// Grouped-query attention (Ainslie et al. 2023).
#[derive(Clone, Debug)]
pub(crate) struct Attention {
    pub(crate) projections: Projections,
    pub(crate) o: Linear,
    /// To the gate of the output, where a projection of its own makes it.
    pub(crate) gate: Option<Linear>,
    /// [h]: the score of each query head's sink.
    pub(crate) sinks: Option<Vector>,
    /// What the norm of values adds to their mean square; `None`: they have no norm.
    pub(crate) value_norm: Option<f64>,
    /// What norms without weights of each head's queries and keys add; `None`: they have no such.
    pub(crate) bare_norm: Option<f64>,
    /// Norms of each head's queries and keys, or of those of all heads together.
    pub(crate) q_norm: Option<Norm>,
    pub(crate) k_norm: Option<Norm>,
    pub(crate) heads: usize,
    pub(crate) key_value_heads: usize,
    pub(crate) head_dim: usize,
    /// The factor of the scores.
    pub(crate) scale: f32,
    /// What they are bounded to.
    pub(crate) softcap: Option<f32>,
    /// How many keys a query sees; `None`: all.
    pub(crate) window: Option<usize>,
    /// Which of the config's rotary embeddings turns queries and keys; `None`: they have no
    /// positions (Kazemnejad et al. 2023, "NoPE").
    pub(crate) rope: Option<usize>,
    /// The same of queries, which is another one where they grow with their position.
    pub(crate) query_rope: Option<usize>,
    /// Whether elements that turn together are neighbours.
    pub(crate) rope_pairs: bool,
    /// Whether the query projection makes a gate of the output too, head by head behind the query.
    pub(crate) is_gated: bool,
}

/// What makes queries in latent attention.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a model has some dozen layers")]
pub(crate) enum LatentQueries {
    /// A projection of the token.
    Direct(Linear),
    /// A projection of a short vector, which is normed, of the token.
    Compressed { down: Linear, norm: Norm, up: Linear },
}

/// Attention over compressed keys and values (DeepSeek-AI 2024, "DeepSeek-V2").
#[derive(Clone, Debug)]
pub(crate) struct LatentAttention {
    pub(crate) queries: LatentQueries,
    /// To the short vector of a token, and behind it the elements of its keys that turn.
    pub(crate) down: Linear,
    pub(crate) norm: Norm,
    /// From the short vector to each head's keys that do not turn, and values.
    pub(crate) up: Linear,
    pub(crate) o: Linear,
    pub(crate) heads: usize,
    pub(crate) sizes: LatentConfig,
    /// The factor of the scores.
    pub(crate) scale: f32,
    /// How many keys a query sees; `None`: all.
    pub(crate) window: Option<usize>,
    /// Which of the config's rotary embeddings turns queries and keys.
    pub(crate) rope: Option<usize>,
}

/// A short convolution between two gates (Liquid AI 2025, "LFM2").
#[derive(Clone, Debug)]
pub(crate) struct ShortConvolution {
    /// [3 hidden, hidden]: to both gates and to what is convolved.
    pub(crate) input: Linear,
    pub(crate) out: Linear,
    /// [hidden · taps], channel by channel.
    pub(crate) kernel: Vector,
    /// [hidden]
    pub(crate) bias: Option<Vector>,
    /// Tokens that it sees.
    pub(crate) taps: usize,
}

/// What makes the inputs of a gated delta net.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a model has some dozen layers")]
pub(crate) enum DeltaInputs {
    Apart {
        /// To queries, keys and values.
        qkv: Linear,
        /// To the gate of the result.
        z: Linear,
        /// To how much of a head's error is made good.
        b: Linear,
        /// To how much of a head's state is forgotten.
        a: Linear,
    },
    /// The same, each with the outputs of one key head behind those of another.
    Grouped { qkvz: Linear, ba: Linear },
}

/// A gated delta net (Yang et al. 2024, "Gated Delta Networks") behind a short convolution.
#[derive(Clone, Debug)]
pub(crate) struct DeltaNet {
    pub(crate) inputs: DeltaInputs,
    pub(crate) out: Linear,
    /// [channels · taps], channel by channel.
    pub(crate) convolution: Vector,
    /// The logarithm of each head's rate of forgetting.
    pub(crate) decay: Vector,
    /// What is added to what a says.
    pub(crate) bias: Vector,
    /// Of each head's result.
    pub(crate) norm: Norm,
    pub(crate) key_heads: usize,
    pub(crate) value_heads: usize,
    pub(crate) key_dim: usize,
    pub(crate) value_dim: usize,
    /// Tokens that the convolution sees.
    pub(crate) taps: usize,
}

/// `down(activation(gate(x)) · up(x))` (Shazeer 2020, "GLU Variants Improve Transformer").
#[derive(Clone, Debug)]
pub(crate) struct Gated {
    pub(crate) activation: Activation,
    pub(crate) gate: Linear,
    pub(crate) up: Linear,
    /// The place of one branch for both, if they have none of their own.
    pub(crate) gate_up: Option<GateUp>,
    pub(crate) down: Linear,
}

/// The same with one projection to gate and up.
#[derive(Clone, Debug)]
pub(crate) struct FusedGated {
    pub(crate) activation: Activation,
    /// [2 f, hidden], the rows of the gate first.
    pub(crate) gate_up: Linear,
    pub(crate) down: Linear,
}

/// A mixture of experts (Shazeer et al. 2017, "Outrageously Large Neural Networks"): each token goes
/// through the few that its router chooses.
#[derive(Clone, Debug)]
pub(crate) struct Experts {
    /// [e, hidden]
    pub(crate) router: Linear,
    /// e of them
    pub(crate) experts: Vec<Gated>,
    /// How many a token goes through.
    pub(crate) choices: usize,
    /// How the router's logits become the weights of their outputs.
    pub(crate) weights: ExpertWeights,
    /// [e]: what is added to the scores by which they are chosen.
    pub(crate) correction: Option<Vector>,
    /// How many groups they are in, and how many of those a token chooses from.
    pub(crate) groups: Option<[usize; 2]>,
    /// [e]: what the weights of their outputs are multiplied by.
    pub(crate) scales: Option<Vector>,
    /// The expert that every token goes through, and its gate if it has one.
    pub(crate) shared: Option<(Gated, Option<Linear>)>,
}

/// A dense part and a mixture of experts beside it, each with norms of its own (Gemma 4). The router reads
/// the residual stream.
#[derive(Clone, Debug)]
pub(crate) struct Beside {
    pub(crate) dense: Gated,
    /// Of what the dense part adds.
    pub(crate) dense_norm: Norm,
    pub(crate) experts: Experts,
    /// Of what the router reads.
    pub(crate) router_norm: Norm,
    /// Of what the experts read, and of what they add.
    pub(crate) experts_norms: [Norm; 2],
}

/// What a layer makes of its own inputs (Gemma 3n, Gemma 4):
/// `x + norm(projection(gelu(gate(x)) · input))`
#[derive(Clone, Debug)]
pub(crate) struct OwnInput {
    pub(crate) gate: Linear,
    pub(crate) projection: Linear,
    pub(crate) norm: Norm,
}

/// What makes the inputs that each layer has of its own.
#[derive(Clone, Debug)]
pub(crate) struct PerLayer {
    /// [v, layers · width]
    pub(crate) table: Matrix,
    /// Of the embeddings.
    pub(crate) projection: Linear,
    /// Of what the projection makes, layer by layer.
    pub(crate) norm: Norm,
}

/// The part of a layer in which tokens see each other.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a model has some dozen layers")]
pub(crate) enum Mixer {
    Attention(Attention),
    Latent(LatentAttention),
    Delta(DeltaNet),
    Convolution(ShortConvolution),
}

/// The part of a layer that works on each token alone.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a model has some dozen layers")]
pub(crate) enum FeedForward {
    Gated(Gated),
    Fused(FusedGated),
    Experts(Experts),
    Beside(Beside),
}

/// `x + mixer(norm(x))`, then `x + feed_forward(norm(x))`.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    /// Of what the mixer reads, if that has one.
    pub(crate) input_norm: Option<Norm>,
    pub(crate) mixer: Mixer,
    /// Of what the mixer adds, if that has one.
    pub(crate) mixer_norm: Option<Norm>,
    /// Of what the feed-forward part reads, if that has one.
    pub(crate) post_norm: Option<Norm>,
    pub(crate) feed_forward: FeedForward,
    /// Of what the feed-forward part adds, if that has one.
    pub(crate) feed_forward_norm: Option<Norm>,
    /// What both parts add is multiplied by.
    pub(crate) residual_scale: Option<f32>,
    /// What it makes of its own inputs, if it has such.
    pub(crate) own_input: Option<OwnInput>,
    /// [1]: what comes out of it is multiplied by.
    pub(crate) scale: Option<Vector>,
}

/// The end of the model: the last norm, then the output layer.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) norm: Norm,
    /// What logits are divided by.
    pub(crate) divisor: Option<f32>,
    /// What they are bounded to.
    pub(crate) softcap: Option<f32>,
    /// [v, hidden]; `None` if the output layer is the embedding.
    pub(crate) output: Option<Matrix>,
    /// The output layer's number, which keys the random numbers of its branch: that of the linear
    /// layers inside the decoder.
    pub(crate) index: u32,
    pub(crate) lora: Option<LoraBranch>,
}

/// All tensors of a model.
#[derive(Clone, Debug)]
pub(crate) struct Decoder {
    /// [v, hidden]
    pub(crate) embedding: Matrix,
    /// What the norm of its rows, which has no weights, adds to their mean square; `None`: they have no norm.
    pub(crate) embedding_norm: Option<f64>,
    /// What its rows are multiplied by.
    pub(crate) embedding_scale: Option<f32>,
    pub(crate) embedding_lora: Option<LoraBranch>,
    pub(crate) layers: Vec<Layer>,
    /// What makes the inputs that layers have of their own.
    pub(crate) per_layer: Option<PerLayer>,
    pub(crate) head: Head,
    /// What reads the frozen matrices of the layers, if they are not in memory.
    pub(crate) source: Option<Arc<LayerSource>>,
    /// The layers of this process, if several hold the model together.
    pub(crate) stage: Option<Connected>,
    /// The slice of every layer that is here, if several processes hold each layer together.
    pub(crate) sliced: Option<Sliced>,
}
