//! What a pass over the model depends on besides weights and tokens, and the modules that all parts
//! of a layer are made of.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use finetune_kernels::{Dropout, FloatType, RopeTable, Segments, Weight, operations, weight};
use finetune_random::Stream;

use crate::batch::Randomness;
use crate::branch::{Dora, LoraBranch};
use crate::decoder::balance::Balance;
use crate::decoder::expert_use::ExpertUse;
use crate::decoder::row_branches::RowBranches;
use crate::error::ModelError;
use crate::random_stream::RandomStream;
use crate::slice::Sliced;
use crate::tree::{Linear, Matrix, Norm};

/// What a pass depends on besides weights and tokens.
#[derive(Clone)]
pub(crate) struct Context {
    /// One table for each of the config's rotary embeddings.
    pub(crate) ropes: Vec<RopeTable>,
    /// Where rows begin, and which keys are cached.
    pub(crate) segments: Segments,
    /// The same in layers whose caches may have forgotten keys, by their windows.
    pub(crate) windowed: BTreeMap<usize, Segments>,
    /// The number type of activations.
    pub(crate) compute: FloatType,
    /// Whether trained parameters are tracked for gradients.
    pub(crate) training: bool,
    /// `None` outside of training, and at probability 0.
    pub(crate) dropout: Option<BatchDropout>,
    /// Where choices of experts are counted; `None` outside of training.
    pub(crate) expert_use: Option<Arc<ExpertUse>>,
    /// The balance of the routers, where it is part of what is minimised.
    pub(crate) balance: Option<Arc<Balance>>,
    /// The slice of every layer that is here; `None`: all of it.
    pub(crate) sliced: Option<Sliced>,
    /// The branches of each row, in the place of those of the tree; `None`: all rows have those.
    pub(crate) branches: Option<Arc<RowBranches>>,
}

/// Dropout of a micro-batch. The modules differ in their random streams only.
#[derive(Clone)]
pub(crate) struct BatchDropout {
    /// The probability that an element is dropped.
    pub(crate) probability: f32,
    /// What the random numbers depend on besides token and module.
    pub(crate) randomness: Randomness,
    /// (row, position) of each token.
    pub(crate) tokens: Arc<[(u32, u32)]>,
}

impl Context {
    /// Where rows and their keys lie in layers with this window.
    pub(crate) fn segments_of(&self, window: Option<usize>) -> Segments {
        window.and_then(|window| self.windowed.get(&window)).unwrap_or(&self.segments).clone()
    }

    /// What all slices of a part make together: x [t, hidden] -> [t, hidden]
    ///
    /// # Errors
    /// If another process cannot be reached, or the device fails.
    pub(crate) fn summed(&self, x: Tensor<2>) -> Result<Tensor<2>, ModelError> {
        match &self.sliced {
            Some(sliced) => sliced.sum(&x),
            None => Ok(x),
        }
    }

    /// The same pass without a graph.
    pub(crate) fn untracked(&self) -> Context {
        Context { training: false, ..self.clone() }
    }

    /// The same pass with a graph.
    pub(crate) fn tracked(&self) -> Context {
        Context { training: true, ..self.clone() }
    }

    /// A parameter as this pass uses it: tracked for gradients in training only.
    pub(crate) fn parameter<const D: usize>(&self, tensor: &Tensor<D>) -> Tensor<D> {
        if self.training { tensor.clone() } else { tensor.clone().inner() }
    }

    /// A matrix as this pass uses it. A packed one has no gradient.
    pub(crate) fn weight(&self, matrix: &Matrix) -> Weight {
        match matrix.weight() {
            Weight::Dense(tensor) => Weight::Dense(self.parameter(tensor)),
            Weight::Packed(packed) => Weight::Packed(packed.clone()),
        }
    }

    /// Dropout of a LoRA branch. `index`: the linear layer's number among all of the model.
    pub(crate) fn dropout(&self, index: u32) -> Option<Dropout> {
        self.dropout.as_ref().map(|BatchDropout { probability, randomness, tokens }| Dropout {
            probability: *probability,
            stream: Stream::new(randomness.seed, RandomStream::Dropout as u32, randomness.step, index),
            tokens: tokens.clone(),
        })
    }
}

/// RMS norm of the last dimension: x [.., d] -> [.., d].
pub(crate) fn norm<const D: usize>(norm: &Norm, x: Tensor<D>, context: &Context) -> Tensor<D> {
    let gamma = context.parameter(norm.gamma.values());
    operations::rms_norm(x, if norm.adds_one { gamma + 1.0 } else { gamma }, norm.eps)
}

/// RMS norm of the last dimension without weights: x [.., d] -> [.., d].
pub(crate) fn bare_norm<const D: usize>(x: Tensor<D>, eps: f64) -> Tensor<D> {
    let [length] = x.dims()[D - 1..] else { unreachable!("one dimension is the last") };
    // A gamma of ones, without a gradient.
    let ones = Tensor::ones([length], (&x.device().inner(), DType::F32));
    operations::rms_norm(x, ones, eps)
}

/// A linear layer with its branch and bias: x [t, i] -> [t, o].
pub(crate) fn linear(linear: &Linear, x: Tensor<2>, context: &Context) -> Tensor<2> {
    let matrix = context.weight(&linear.weight);
    let y = match (&context.branches, &linear.lora) {
        (Some(branches), _) => branches.linear(linear.index, x, matrix, context),
        (None, None) => weight::linear(x, matrix),
        (None, Some(branch)) => {
            let dropout = context.dropout(linear.index);
            match &branch.dora {
                None => {
                    let (a, b) = (context.parameter(branch.a.dense()), context.parameter(branch.b.dense()));
                    weight::lora_linear(x, matrix, a, b, branch.scale, dropout)
                }
                Some(dora) => dora_linear(x, matrix, branch, dora, dropout, context),
            }
        }
    };
    match &linear.bias {
        Some(bias) => operations::bias(y, context.parameter(bias.values())),
        None => y,
    }
}

/// A linear layer with a DoRA branch, without its bias: x [t, i] -> [t, o].
///
/// As in PEFT, dropout acts on what the magnitudes change of the layer's own output too.
fn dora_linear(
    x: Tensor<2>,
    matrix: Weight,
    branch: &LoraBranch,
    dora: &Dora,
    dropout: Option<Dropout>,
    context: &Context,
) -> Tensor<2> {
    let (a, b) = (context.parameter(branch.a.dense()), context.parameter(branch.b.dense()));
    let (m, n) = (context.parameter(dora.magnitude.values()), dora.norms.clone());
    let Some(dropout) = dropout else {
        return operations::magnitude(weight::lora_linear(x, matrix, a, b, branch.scale, None), m, n);
    };
    let y = weight::linear(x.clone(), matrix.clone());
    let x = operations::drop_input(x, dropout);
    let dropped = weight::linear(x.clone(), matrix);
    let low = operations::linear(operations::linear(x, a), b);
    operations::dropped_magnitude(y, dropped, low, m, n, branch.scale)
}
