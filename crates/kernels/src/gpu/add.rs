//! Sums of two tensors on a GPU: the residual connection and the bias.

use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use super::pointwise::{add, add_bias, scaled};
use super::product::column_sums;
use crate::fused::Fused;
use crate::operations::{Bias, Residual};

impl Fused<CubeBackend, 2> for Residual {
    type Saved = ();

    fn forward(self, [a, b]: [CubeTensor; 2], _: [bool; 2]) -> (CubeTensor, ()) {
        (add(&a, &b), ())
    }

    fn backward(_: (), d_out: CubeTensor, wanted: [bool; 2]) -> [Option<CubeTensor>; 2] {
        wanted.map(|wanted| wanted.then(|| d_out.clone()))
    }
}

impl Fused<CubeBackend, 2> for Bias {
    type Saved = ();

    fn forward(self, [y, bias]: [CubeTensor; 2], _: [bool; 2]) -> (CubeTensor, ()) {
        (add_bias(&y, &scaled(&bias, DType::F32, 1.0)), ())
    }

    fn backward(_: (), d_y: CubeTensor, [y_wanted, bias_wanted]: [bool; 2]) -> [Option<CubeTensor>; 2] {
        let d_bias = bias_wanted.then(|| column_sums(&d_y));
        [y_wanted.then_some(d_y), d_bias]
    }
}
