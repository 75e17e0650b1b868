//! RMS norm on a GPU.

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use super::pointwise::{scale_rows, scaled};
use super::product::column_sums;
use super::reduce::{rms_norm, rms_norm_backward};
use super::tensor::{elements_of, last, reshaped};
use crate::fused::Fused;
use crate::operations::RmsNorm;

/// What the backward pass needs: the input, gamma in f32, and each row's factor.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    x: CubeTensor,
    gamma: CubeTensor,
    factors: CubeTensor,
}

impl Fused<CubeBackend, 2> for RmsNorm {
    type Saved = Saved;

    fn forward(self, [x, gamma]: [CubeTensor; 2], _: [bool; 2]) -> (CubeTensor, Saved) {
        let gamma = scaled(&gamma, DType::F32, 1.0);
        let (out, factors) = rms_norm(&x, &gamma, self.eps as f32);
        (out, Saved { x, gamma, factors })
    }

    fn backward(saved: Saved, d_out: CubeTensor, [x_wanted, gamma_wanted]: [bool; 2]) -> [Option<CubeTensor>; 2] {
        let d_gamma = gamma_wanted.then(|| gamma_gradient(&saved, &d_out));
        let d_x = x_wanted.then(|| rms_norm_backward(&saved.x, &saved.gamma, &saved.factors, &d_out));
        [d_x, d_gamma]
    }
}

/// Σ x · factor · d_out over the rows, through f32 copies: only full fine-tuning asks for it.
fn gamma_gradient(saved: &Saved, d_out: &CubeTensor) -> CubeTensor {
    let Saved { x, gamma, factors } = saved;
    let width = last(x);
    let rows = elements_of(x) / width;
    let [x, d_out] = [x, d_out].map(|t| reshaped(scaled(t, DType::F32, 1.0), [rows, width]));
    let product = burn_cubecl::ops::numeric::mul(scale_rows(&x, factors, 0), d_out);
    reshaped(column_sums(&product), gamma.shape())
}
