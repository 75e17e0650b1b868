//! `y = x Wᵀ` and `y = x Wᵀ + s · drop(x) Aᵀ Bᵀ` on a GPU.
//!
//! A and B stay f32. They are multiplied in the number type of x, and their gradients come out in
//! f32.

use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use super::matrix::Matrix;
use super::pointwise::{self, add, scaled};
use super::product::{product, transposed};
use super::tensor::upload_u32;
use crate::arguments::Dropout;
use crate::fused::Fused;
use crate::operations::{AddLowRank, Linear, LoraLinear, PackedLinear, PackedLoraLinear};
use crate::weight::PackedWeight;

/// The gradient of x, `d_y W`.
fn input_gradient(d_y: &CubeTensor, w: &Matrix) -> CubeTensor {
    product(d_y, &w.in_type(d_y.dtype), d_y.dtype)
}

impl Fused<CubeBackend, 2> for Linear {
    /// x, if W is trained; and W.
    type Saved = (Option<CubeTensor>, CubeTensor);

    fn forward(self, [x, w]: [CubeTensor; 2], [_, w_trained]: [bool; 2]) -> (CubeTensor, Self::Saved) {
        let y = Matrix::Dense(w.clone()).times(&x);
        // Nothing of x has to be kept for a frozen weight.
        (y, (w_trained.then_some(x), w))
    }

    fn backward((x, w): Self::Saved, d_y: CubeTensor, [x_wanted, w_wanted]: [bool; 2]) -> [Option<CubeTensor>; 2] {
        let d_w = x.filter(|_| w_wanted).map(|x| product(&transposed(&d_y), &x, w.dtype));
        let d_x = x_wanted.then(|| input_gradient(&d_y, &Matrix::Dense(w)));
        [d_x, d_w]
    }
}

impl Fused<CubeBackend, 1> for PackedLinear {
    type Saved = PackedWeight;

    fn forward(self, [x]: [CubeTensor; 1], _: [bool; 1]) -> (CubeTensor, PackedWeight) {
        (Matrix::Packed(self.w.clone()).times(&x), self.w)
    }

    fn backward(w: PackedWeight, d_y: CubeTensor, [x_wanted]: [bool; 1]) -> [Option<CubeTensor>; 1] {
        [x_wanted.then(|| input_gradient(&d_y, &Matrix::Packed(w)))]
    }
}

/// What the backward pass of a LoRA linear needs. `h` is drop(x) Aᵀ, [t, r].
#[derive(Clone, Debug)]
pub(crate) struct SavedLora {
    x: CubeTensor,
    w: Matrix,
    a: CubeTensor,
    b: CubeTensor,
    h: CubeTensor,
    scale: f32,
    dropout: Option<Dropout>,
}

impl SavedLora {
    /// The forward pass.
    fn forward([x, a, b]: [CubeTensor; 3], w: Matrix, scale: f32, dropout: Option<Dropout>) -> (CubeTensor, SavedLora) {
        let dtype = x.dtype;
        let y = w.times(&x);
        let h = product(&dropped(&x, dropout.as_ref()), &transposed(&scaled(&a, dtype, 1.0)), dtype);
        let branch = product(&h, &transposed(&scaled(&b, dtype, scale)), dtype);
        (add(&y, &branch), SavedLora { x, w, a, b, h, scale, dropout })
    }

    /// The gradients of x, A and B.
    fn backward(self, d_y: &CubeTensor, [x_wanted, a_wanted, b_wanted]: [bool; 3]) -> [Option<CubeTensor>; 3] {
        let SavedLora { x, w, a, b, h, scale, dropout } = self;
        let dtype = x.dtype;
        let d_h = product(d_y, &scaled(&b, dtype, scale), dtype);
        let d_b = b_wanted.then(|| scaled(&product(&transposed(d_y), &h, DType::F32), b.dtype, scale));
        let d_a = a_wanted.then(|| product(&transposed(&d_h), &dropped(&x, dropout.as_ref()), a.dtype));
        let d_x = x_wanted.then(|| {
            let branch = product(&d_h, &scaled(&a, dtype, 1.0), dtype);
            // The mask multiplies, so it is its own backward pass.
            add(&input_gradient(d_y, &w), &dropped(&branch, dropout.as_ref()))
        });
        [d_x, d_a, d_b]
    }
}

impl Fused<CubeBackend, 4> for LoraLinear {
    type Saved = SavedLora;

    fn forward(self, [x, w, a, b]: [CubeTensor; 4], _: [bool; 4]) -> (CubeTensor, SavedLora) {
        SavedLora::forward([x, a, b], Matrix::Dense(w), self.scale, self.dropout)
    }

    fn backward(saved: SavedLora, d_y: CubeTensor, [x, _, a, b]: [bool; 4]) -> [Option<CubeTensor>; 4] {
        let [d_x, d_a, d_b] = saved.backward(&d_y, [x, a, b]);
        [d_x, None, d_a, d_b]
    }
}

impl Fused<CubeBackend, 3> for PackedLoraLinear {
    type Saved = SavedLora;

    fn forward(self, inputs: [CubeTensor; 3], _: [bool; 3]) -> (CubeTensor, SavedLora) {
        SavedLora::forward(inputs, Matrix::Packed(self.w), self.scale, self.dropout)
    }

    fn backward(saved: SavedLora, d_y: CubeTensor, wanted: [bool; 3]) -> [Option<CubeTensor>; 3] {
        saved.backward(&d_y, wanted)
    }
}

/// Not there: [`crate::row_branch`] composes it, so nothing reaches this.
impl Fused<CubeBackend, 4> for AddLowRank {
    type Saved = ();

    fn forward(self, _: [CubeTensor; 4], _: [bool; 4]) -> (CubeTensor, ()) {
        unreachable!("branches of some rows are composed on a GPU")
    }

    fn backward((): (), _: CubeTensor, _: [bool; 4]) -> [Option<CubeTensor>; 4] {
        unreachable!("branches of some rows are composed on a GPU")
    }
}

/// drop(x), with the mask that the CPU draws.
pub(super) fn dropped(x: &CubeTensor, dropout: Option<&Dropout>) -> CubeTensor {
    let Some(Dropout { probability, stream, tokens }) = dropout else { return x.clone() };
    let flat: Vec<u32> = tokens.iter().flat_map(|&(row, position)| [row, position]).collect();
    pointwise::dropout(x, &upload_u32(x, &flat), stream.key(), *probability)
}
