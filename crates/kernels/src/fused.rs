//! What a backend has to bring: each operation forwards, with what its backward pass will want, and backwards.
//!
//! [`crate::extension`] makes differentiable operations of these, the same way for every backend.

use std::fmt::Debug;

use burn::backend::Backend;
use burn::backend::tensor::FloatTensor;

use crate::arguments::{AttentionShape, Dropout, RopeTable, Targets};

/// Tensors arrive contiguous. Shapes and meaning of each operation stand at its function in [`crate::operations`].
///
/// Activations have the number type that the run computes in; norms, biases, trained parameters and losses are f32, and a
/// gradient has the type of what it is the gradient of. Statistics, softmax and losses are computed in f32.
pub(crate) trait Fused: Backend {
    type SavedLora: Clone + Debug + Send + Sync + 'static;
    type SavedNorm: Clone + Debug + Send + Sync + 'static;
    type SavedAttention: Clone + Debug + Send + Sync + 'static;
    type SavedCrossEntropy: Clone + Debug + Send + Sync + 'static;

    fn contiguous(tensor: FloatTensor<Self>) -> FloatTensor<Self>;

    fn forward_linear(x: &FloatTensor<Self>, w: &FloatTensor<Self>) -> FloatTensor<Self>;
    fn backward_linear_x(w: &FloatTensor<Self>, d_y: &FloatTensor<Self>) -> FloatTensor<Self>;
    fn backward_linear_w(x: &FloatTensor<Self>, w: &FloatTensor<Self>, d_y: &FloatTensor<Self>) -> FloatTensor<Self>;

    fn forward_lora(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f32,
        dropout: Option<Dropout>,
    ) -> (FloatTensor<Self>, Self::SavedLora);
    /// The gradients of x, A and B that are asked for.
    fn backward_lora(
        saved: Self::SavedLora,
        d_y: &FloatTensor<Self>,
        wanted: [bool; 3],
    ) -> [Option<FloatTensor<Self>>; 3];

    fn forward_norm(x: FloatTensor<Self>, gamma: FloatTensor<Self>, eps: f64) -> (FloatTensor<Self>, Self::SavedNorm);
    fn backward_norm_x(saved: &Self::SavedNorm, d_out: &FloatTensor<Self>) -> FloatTensor<Self>;
    fn backward_norm_gamma(saved: &Self::SavedNorm, d_out: &FloatTensor<Self>) -> FloatTensor<Self>;

    /// `sign` 1 turns, -1 turns back.
    fn rotate(x: &FloatTensor<Self>, table: &RopeTable, sign: f32) -> FloatTensor<Self>;

    fn forward_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        shape: AttentionShape,
    ) -> (FloatTensor<Self>, Self::SavedAttention);
    fn backward_attention(saved: &Self::SavedAttention, d_out: &FloatTensor<Self>) -> [FloatTensor<Self>; 3];

    fn forward_swiglu(gate: &FloatTensor<Self>, up: &FloatTensor<Self>) -> FloatTensor<Self>;
    /// (d_gate, d_up)
    fn backward_swiglu(
        gate: &FloatTensor<Self>,
        up: &FloatTensor<Self>,
        d_out: &FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Losses alone.
    fn losses(h: &FloatTensor<Self>, w: &FloatTensor<Self>, targets: &Targets) -> FloatTensor<Self>;
    fn forward_cross_entropy(
        h: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: Targets,
        trained_weight: bool,
    ) -> (FloatTensor<Self>, Self::SavedCrossEntropy);
    /// (d_h, d_w); d_w only with a trained W.
    fn backward_cross_entropy(
        saved: Self::SavedCrossEntropy,
        d_losses: &FloatTensor<Self>,
    ) -> (FloatTensor<Self>, Option<FloatTensor<Self>>);

    fn forward_add(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self>;
    fn forward_bias(y: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self>;
    /// Σ of d_y over its tokens.
    fn backward_bias(d_y: &FloatTensor<Self>) -> FloatTensor<Self>;
}
