//! `y = x Wᵀ` and `y = x Wᵀ + s · drop(x) Aᵀ Bᵀ`, weights in PyTorch's layout: W [o, i], A [r, i],
//! B [o, r].
//!
//! The low-rank product is applied to activations: `W + s B A` is never formed, and no gradient of
//! a frozen W is computed.

use std::sync::Arc;

use burn::backend::{Flex, TensorMetadata};
use burn_flex::FlexTensor;

use super::buffer::{floats, tensor, uninitialized, with_last};
use super::matmul::{Matrix, matmul};
use super::simd;
use super::weight::{CpuWeight, times, times_transposed};
use crate::arguments::Dropout;
use crate::fused::Fused;
use crate::operations::{AddLowRank, Linear, LoraLinear, PackedLinear, PackedLoraLinear};

/// A tensor of two dimensions as a matrix.
fn matrix(t: &FlexTensor) -> Matrix<'_> {
    let [rows, columns] = t.shape().dims::<2>();
    Matrix::new(floats(t), rows, columns)
}

/// The tensor as a matrix whose columns are its last dimension.
fn flat(t: &FlexTensor) -> Matrix<'_> {
    let shape = t.shape();
    let columns = shape[shape.num_dims() - 1];
    Matrix::new(floats(t), shape.num_elements() / columns, columns)
}

/// The number of rows of [`flat`].
fn tokens_of(t: &FlexTensor) -> usize {
    let shape = t.shape();
    shape.num_elements() / shape[shape.num_dims() - 1]
}

/// d_w [o, i] of d_y [.., o] and x [.., i].
fn weight_gradient(x: &FlexTensor, d_y: &FlexTensor) -> FlexTensor {
    let (x, d_y) = (flat(x), flat(d_y));
    let shape = [d_y.columns(), x.columns()];
    let mut d_w = uninitialized(shape[0] * shape[1]);
    matmul(&mut d_w, false, 1.0, d_y.transposed(), x);
    tensor(d_w, shape)
}

/// x Wᵀ, [.., o]
fn product(x: &FlexTensor, w: &CpuWeight) -> FlexTensor {
    let [outputs, _] = w.shape();
    let mut y = uninitialized(tokens_of(x) * outputs);
    times_transposed(&mut y, false, 1.0, flat(x), w);
    tensor(y, with_last(&x.shape(), outputs))
}

/// d_x of [`product`], [.., i]
fn input_gradient(d_y: &FlexTensor, w: &CpuWeight) -> FlexTensor {
    let [_, inputs] = w.shape();
    let mut d_x = uninitialized(tokens_of(d_y) * inputs);
    times(&mut d_x, false, 1.0, flat(d_y), w);
    tensor(d_x, with_last(&d_y.shape(), inputs))
}

impl Fused<Flex, 2> for Linear {
    /// x, if W is trained; and W.
    type Saved = (Option<FlexTensor>, CpuWeight);

    fn forward(self, [x, w]: [FlexTensor; 2], [_, w_trained]: [bool; 2]) -> (FlexTensor, Self::Saved) {
        let w = w.into();
        let y = product(&x, &w);
        // Nothing of x has to be kept for a frozen weight.
        (y, (w_trained.then_some(x), w))
    }

    fn backward((x, w): Self::Saved, d_y: FlexTensor, [x_wanted, w_wanted]: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let d_w = x.filter(|_| w_wanted).map(|x| weight_gradient(&x, &d_y));
        [x_wanted.then(|| input_gradient(&d_y, &w)), d_w]
    }
}

impl Fused<Flex, 1> for PackedLinear {
    type Saved = CpuWeight;

    fn forward(self, [x]: [FlexTensor; 1], _: [bool; 1]) -> (FlexTensor, CpuWeight) {
        let w = self.w.into();
        (product(&x, &w), w)
    }

    fn backward(w: CpuWeight, d_y: FlexTensor, [x_wanted]: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [x_wanted.then(|| input_gradient(&d_y, &w))]
    }
}

/// What the backward pass of a LoRA linear needs. `h` is drop(x) Aᵀ, [t, r].
#[derive(Clone, Debug)]
pub(crate) struct SavedLora {
    x: FlexTensor,
    w: CpuWeight,
    a: FlexTensor,
    b: FlexTensor,
    h: Arc<[f32]>,
    scale: f32,
    dropout: Option<Dropout>,
}

impl SavedLora {
    /// The result, and what its backward pass needs.
    fn forward(
        [x, a, b]: [FlexTensor; 3],
        w: CpuWeight,
        scale: f32,
        dropout: Option<Dropout>,
    ) -> (FlexTensor, SavedLora) {
        let (tokens, [outputs, _], rank) = (tokens_of(&x), w.shape(), a.shape()[0]);
        let mut y = uninitialized(tokens * outputs);
        times_transposed(&mut y, false, 1.0, flat(&x), &w);
        let mut h = uninitialized(tokens * rank);
        let dropped = dropout.as_ref().map(|dropout| dropout.apply(floats(&x)));
        let branch = Matrix::new(dropped.as_deref().unwrap_or(floats(&x)), tokens, a.shape()[1]);
        matmul(&mut h, false, 1.0, branch, matrix(&a).transposed());
        matmul(&mut y, true, scale, Matrix::new(&h, tokens, rank), matrix(&b).transposed());
        let y = tensor(y, with_last(&x.shape(), outputs));
        (y, SavedLora { x, w, a, b, h: h.into(), scale, dropout })
    }

    /// The gradients of x, a and b.
    fn backward(self, d_y: &FlexTensor, [x_wanted, a_wanted, b_wanted]: [bool; 3]) -> [Option<FlexTensor>; 3] {
        let SavedLora { x, w, a, b, h, scale, dropout } = self;
        let (tokens, inputs, outputs, rank) = (tokens_of(&x), a.shape()[1], b.shape()[0], a.shape()[0]);
        let d_outs = flat(d_y);
        let mut d_h = uninitialized(tokens * rank);
        matmul(&mut d_h, false, scale, d_outs, matrix(&b));
        let d_h_matrix = Matrix::new(&d_h, tokens, rank);
        let d_b = b_wanted.then(|| {
            let mut d_b = uninitialized(outputs * rank);
            matmul(&mut d_b, false, scale, d_outs.transposed(), Matrix::new(&h, tokens, rank));
            tensor(d_b, [outputs, rank])
        });
        let d_a = a_wanted.then(|| {
            let dropped = dropout.as_ref().map(|dropout| dropout.apply(floats(&x)));
            let branch = Matrix::new(dropped.as_deref().unwrap_or(floats(&x)), tokens, inputs);
            let mut d_a = uninitialized(rank * inputs);
            matmul(&mut d_a, false, 1.0, d_h_matrix.transposed(), branch);
            tensor(d_a, [rank, inputs])
        });
        let d_x = x_wanted.then(|| {
            let mut d_x = uninitialized(tokens * inputs);
            times(&mut d_x, false, 1.0, d_outs, &w);
            match &dropout {
                None => matmul(&mut d_x, true, 1.0, d_h_matrix, matrix(&a)),
                Some(dropout) => {
                    let mut branch = uninitialized(tokens * inputs);
                    matmul(&mut branch, false, 1.0, d_h_matrix, matrix(&a));
                    // The mask multiplies, so it is its own backward pass.
                    simd::add_scaled(&mut d_x, 1.0, &dropout.apply(&branch));
                }
            }
            tensor(d_x, x.shape())
        });
        [d_x, d_a, d_b]
    }
}

impl Fused<Flex, 4> for LoraLinear {
    type Saved = SavedLora;

    fn forward(self, [x, w, a, b]: [FlexTensor; 4], _: [bool; 4]) -> (FlexTensor, SavedLora) {
        SavedLora::forward([x, a, b], w.into(), self.scale, self.dropout)
    }

    fn backward(saved: SavedLora, d_y: FlexTensor, [x, _, a, b]: [bool; 4]) -> [Option<FlexTensor>; 4] {
        let [d_x, d_a, d_b] = saved.backward(&d_y, [x, a, b]);
        [d_x, None, d_a, d_b]
    }
}

impl Fused<Flex, 3> for PackedLoraLinear {
    type Saved = SavedLora;

    fn forward(self, inputs: [FlexTensor; 3], _: [bool; 3]) -> (FlexTensor, SavedLora) {
        SavedLora::forward(inputs, self.w.into(), self.scale, self.dropout)
    }

    fn backward(saved: SavedLora, d_y: FlexTensor, wanted: [bool; 3]) -> [Option<FlexTensor>; 3] {
        saved.backward(&d_y, wanted)
    }
}

impl Fused<Flex, 4> for AddLowRank {
    type Saved = ();

    /// The products are those of [`SavedLora::forward`] with these rows of x.
    fn forward(self, [mut y, x, a, b]: [FlexTensor; 4], _: [bool; 4]) -> (FlexTensor, ()) {
        let AddLowRank { rows, scale } = self;
        let ([rank, inputs], outputs) = (a.shape().dims::<2>(), b.shape()[0]);
        let x = Matrix::new(&floats(&x)[rows.start * inputs..rows.end * inputs], rows.len(), inputs);
        let mut h = uninitialized(rows.len() * rank);
        matmul(&mut h, false, 1.0, x, matrix(&a).transposed());
        // y is copied only if something else holds it.
        let out = &mut y.storage_mut::<f32>()[rows.start * outputs..rows.end * outputs];
        matmul(out, true, scale, Matrix::new(&h, rows.len(), rank), matrix(&b).transposed());
        (y, ())
    }

    fn backward((): (), _: FlexTensor, _: [bool; 4]) -> [Option<FlexTensor>; 4] {
        unreachable!("text is generated without gradients")
    }
}
