//! What a backend brings for each operation: its forward pass and its backward pass.
//!
//! The CPU's are in the files of `cpu`, the GPUs' in those of `gpu`. [`crate::extension`] makes a
//! differentiable operation of them, the same way for every operation and every backend.

use std::fmt::Debug;

use burn::backend::Backend;
use burn::backend::tensor::FloatTensor;

/// A backend that has the operations.
pub(crate) trait Contiguous: Backend {
    /// The tensor with its elements in row-major order, from the start of its storage and without
    /// gaps.
    fn contiguous(tensor: FloatTensor<Self>) -> FloatTensor<Self>;

    /// `a b` of f32 matrices, [.., m, k] [.., k, n] -> [.., m, n], summed in f32. The leading dimensions are
    /// the same.
    fn multiplied(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// An operation of `N` tensors on backend `B`. The value holds what the operation takes beside
/// tensors.
///
/// All tensors arrive contiguous. Their shapes and meaning are documented at the operation's
/// function in [`crate::operations`], which also fixes their order.
///
/// Activations have the number type that the run computes in. Norms, biases, trained parameters and
/// losses are f32. A gradient has the type of what it is the gradient of. Statistics, softmax and
/// losses are computed in f32.
pub(crate) trait Fused<B: Contiguous, const N: usize>: Debug + Send + Sized + 'static {
    /// What the backward pass needs.
    type Saved: Clone + Debug + Send + 'static;

    /// The result, and what the backward pass needs. `trained` tells which inputs require
    /// gradients.
    fn forward(self, inputs: [FloatTensor<B>; N], trained: [bool; N]) -> (FloatTensor<B>, Self::Saved);

    /// The result alone, for when no input requires gradients.
    fn without_gradients(self, inputs: [FloatTensor<B>; N]) -> FloatTensor<B> {
        self.forward(inputs, [false; N]).0
    }

    /// The gradients of the inputs, from the gradient `d_out` of the result. `wanted` tells which
    /// of them are used: the others may be `None`.
    fn backward(saved: Self::Saved, d_out: FloatTensor<B>, wanted: [bool; N]) -> [Option<FloatTensor<B>>; N];
}
