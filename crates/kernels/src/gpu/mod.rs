//! [`Fused`] on GPUs: Metal and Vulkan are one backend of burn's, and one set of kernels here.
//!
//! Start reading here; [`product`] multiplies, [`rows`], [`elements`] and [`heads`] are the kernels written for this, [`attention`]
//! and [`cross_entropy`] work in pieces so that neither all scores nor all logits ever exist at once.

mod attention;
mod cross_entropy;
pub(crate) mod devices;
mod elements;
mod heads;
mod lora;
mod product;
mod rows;
mod tensor;
pub(crate) mod watch;

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use crate::arguments::{AttentionShape, Dropout, RopeTable, Targets};
use crate::fused::Fused;
use elements::scaled;
use product::{product, transposed};
use tensor::{elements_of, last, reshaped, upload_f32};

/// The input of a norm, gamma in f32, and each row's factor.
#[derive(Clone, Debug)]
pub(crate) struct SavedNorm {
    x: CubeTensor,
    gamma: CubeTensor,
    factors: CubeTensor,
}

/// Σ over the first dimension of x [t, o], in f32.
fn column_sums(x: &CubeTensor) -> CubeTensor {
    let (tokens, outputs) = (x.shape()[0], x.shape()[1]);
    // A product with a row of ones sums in the order of the product's kernel.
    let ones = reshaped(upload_f32(x, &vec![1.0; tokens]), [1, tokens]);
    reshaped(product(&scaled(&ones, x.dtype, 1.0), x, DType::F32), [outputs])
}

impl Fused for CubeBackend {
    type SavedLora = lora::SavedLora;
    type SavedNorm = SavedNorm;
    type SavedAttention = attention::Saved;
    type SavedCrossEntropy = cross_entropy::Saved;

    fn contiguous(tensor: CubeTensor) -> CubeTensor {
        tensor::contiguous(tensor)
    }

    fn forward_linear(x: &CubeTensor, w: &CubeTensor) -> CubeTensor {
        product(x, &transposed(&scaled(w, x.dtype, 1.0)), x.dtype)
    }

    fn backward_linear_x(w: &CubeTensor, d_y: &CubeTensor) -> CubeTensor {
        product(d_y, &scaled(w, d_y.dtype, 1.0), d_y.dtype)
    }

    fn backward_linear_w(x: &CubeTensor, w: &CubeTensor, d_y: &CubeTensor) -> CubeTensor {
        product(&transposed(d_y), x, w.dtype)
    }

    fn forward_lora(
        x: CubeTensor,
        w: CubeTensor,
        a: CubeTensor,
        b: CubeTensor,
        scale: f32,
        dropout: Option<Dropout>,
    ) -> (CubeTensor, lora::SavedLora) {
        lora::forward(x, w, a, b, scale, dropout)
    }

    fn backward_lora(saved: lora::SavedLora, d_y: &CubeTensor, wanted: [bool; 3]) -> [Option<CubeTensor>; 3] {
        lora::backward(saved, d_y, wanted)
    }

    fn forward_norm(x: CubeTensor, gamma: CubeTensor, eps: f64) -> (CubeTensor, SavedNorm) {
        let gamma = scaled(&gamma, DType::F32, 1.0);
        let (out, factors) = rows::rms_norm(&x, &gamma, eps as f32);
        (out, SavedNorm { x, gamma, factors })
    }

    fn backward_norm_x(saved: &SavedNorm, d_out: &CubeTensor) -> CubeTensor {
        rows::rms_norm_backward(&saved.x, &saved.gamma, &saved.factors, d_out)
    }

    fn backward_norm_gamma(saved: &SavedNorm, d_out: &CubeTensor) -> CubeTensor {
        let SavedNorm { x, gamma, factors } = saved;
        let width = last(x);
        let rows = elements_of(x) / width;
        // Only full fine-tuning asks for it: Σ x · factor · d_out, through f32 copies.
        let [x, d_out] = [x, d_out].map(|t| reshaped(scaled(t, DType::F32, 1.0), [rows, width]));
        let product = burn_cubecl::ops::numeric::mul(elements::scale_rows(&x, factors, 0), d_out);
        reshaped(column_sums(&product), gamma.shape())
    }

    fn rotate(x: &CubeTensor, table: &RopeTable, sign: f32) -> CubeTensor {
        let upload = || (upload_f32(x, &table.cosines), upload_f32(x, &table.sines));
        let (cosines, sines) = table.on_device.get(0, upload);
        elements::rotate(x, &cosines, &sines, sign)
    }

    fn forward_attention(
        q: CubeTensor,
        k: CubeTensor,
        v: CubeTensor,
        shape: AttentionShape,
    ) -> (CubeTensor, attention::Saved) {
        attention::forward(q, k, v, shape)
    }

    fn backward_attention(saved: &attention::Saved, d_out: &CubeTensor) -> [CubeTensor; 3] {
        attention::backward(saved, d_out)
    }

    fn forward_swiglu(gate: &CubeTensor, up: &CubeTensor) -> CubeTensor {
        elements::swiglu(gate, up)
    }

    fn backward_swiglu(gate: &CubeTensor, up: &CubeTensor, d_out: &CubeTensor) -> (CubeTensor, CubeTensor) {
        elements::swiglu_backward(gate, up, d_out)
    }

    fn losses(h: &CubeTensor, w: &CubeTensor, targets: &Targets) -> CubeTensor {
        cross_entropy::losses(h, w, targets)
    }

    fn forward_cross_entropy(
        h: CubeTensor,
        w: CubeTensor,
        targets: Targets,
        trained_weight: bool,
    ) -> (CubeTensor, cross_entropy::Saved) {
        cross_entropy::forward(h, w, targets, trained_weight)
    }

    fn backward_cross_entropy(saved: cross_entropy::Saved, d_losses: &CubeTensor) -> (CubeTensor, Option<CubeTensor>) {
        cross_entropy::backward(saved, d_losses)
    }

    fn forward_add(a: CubeTensor, b: CubeTensor) -> CubeTensor {
        elements::add(&a, &b)
    }

    fn forward_bias(y: CubeTensor, bias: CubeTensor) -> CubeTensor {
        elements::add_bias(&y, &scaled(&bias, DType::F32, 1.0))
    }

    fn backward_bias(d_y: &CubeTensor) -> CubeTensor {
        column_sums(d_y)
    }
}
