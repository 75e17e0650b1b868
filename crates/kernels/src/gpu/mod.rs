//! [`Fused`] on GPUs: Metal, Vulkan and CUDA are one backend of burn's, and one set of kernels here.
//!
//! Start reading here; [`product`] multiplies, [`rows`] and [`elements`] are the kernels written for this, [`attention`]
//! and [`cross_entropy`] work in pieces so that neither all scores nor all logits ever exist at once.

mod attention;
mod cross_entropy;
pub(crate) mod devices;
mod elements;
mod lora;
mod product;
mod rows;
mod tensor;

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use crate::attention::AttentionShape;
use crate::cross_entropy::Targets;
use crate::fused::Fused;
use crate::linear::Dropout;
use crate::rope::RopeTable;
use product::{product, transposed};
use tensor::{each_element, each_row, element, empty, reshaped, upload_f32};

/// The input of a norm, gamma in f32, and each row's factor.
#[derive(Clone, Debug)]
pub(crate) struct SavedNorm {
    x: CubeTensor,
    gamma: CubeTensor,
    factors: CubeTensor,
}

fn last(tensor: &CubeTensor) -> usize {
    let shape = tensor.shape();
    shape[shape.num_dims() - 1]
}

fn elements_of(tensor: &CubeTensor) -> usize {
    tensor.shape().num_elements()
}

/// The tensor in another number type, times a factor.
fn scaled(x: &CubeTensor, dtype: DType, factor: f32) -> CubeTensor {
    if x.dtype == dtype && factor == 1.0 {
        return x.clone();
    }
    let out = empty(x, x.shape(), dtype);
    let count = elements_of(x);
    let (cubes, dim) = each_element(&x.client, count);
    // SAFETY: the kernel checks the position against the length of `out`, and `x` has the same length.
    unsafe {
        elements::scaled::launch_unchecked(
            &x.client,
            cubes,
            dim,
            x.clone().into_buffer_arg(),
            out.clone().into_buffer_arg(),
            factor,
            [element(x.dtype), element(dtype)],
        );
    }
    out
}

/// Σ over the first dimension of x [t, o], in f32.
fn column_sums(x: &CubeTensor) -> CubeTensor {
    let (tokens, outputs) = (x.shape()[0], x.shape()[1]);
    // A product with a row of ones sums in the order of the product's kernel.
    let ones = reshaped(upload_f32(x, &vec![1.0; tokens]), [1, tokens]);
    let ones = scaled(&ones, x.dtype, 1.0);
    reshaped(product(&ones, x, DType::F32), [outputs])
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
        let (width, gamma) = (last(&x), scaled(&gamma, DType::F32, 1.0));
        let rows = elements_of(&x) / width;
        let (out, factors) = (empty(&x, x.shape(), x.dtype), empty(&x, [rows], DType::F32));
        let (cubes, dim, units) = each_row(rows, width);
        // SAFETY: a cube works on row `CUBE_POS` below the length of `factors`, and each row has `width` elements, as
        // many as gamma.
        unsafe {
            rows::rms_norm::launch_unchecked(
                &x.client,
                cubes,
                dim,
                x.clone().into_buffer_arg(),
                gamma.clone().into_buffer_arg(),
                out.clone().into_buffer_arg(),
                factors.clone().into_buffer_arg(),
                width,
                eps as f32,
                units,
                element(x.dtype),
            );
        }
        (out, SavedNorm { x, gamma, factors })
    }

    fn backward_norm_x(saved: &SavedNorm, d_out: &CubeTensor) -> CubeTensor {
        let SavedNorm { x, gamma, factors } = saved;
        let width = last(x);
        let d_x = empty(x, x.shape(), x.dtype);
        let (cubes, dim, units) = each_row(elements_of(x) / width, width);
        // SAFETY: as in the forward pass.
        unsafe {
            rows::rms_norm_backward::launch_unchecked(
                &x.client,
                cubes,
                dim,
                x.clone().into_buffer_arg(),
                gamma.clone().into_buffer_arg(),
                factors.clone().into_buffer_arg(),
                d_out.clone().into_buffer_arg(),
                d_x.clone().into_buffer_arg(),
                width,
                units,
                element(x.dtype),
            );
        }
        d_x
    }

    fn backward_norm_gamma(saved: &SavedNorm, d_out: &CubeTensor) -> CubeTensor {
        let SavedNorm { x, gamma, factors } = saved;
        let width = last(x);
        let rows = elements_of(x) / width;
        // Only full fine-tuning asks for it: Σ x · factor · d_out, through f32 copies.
        let [x, d_out] = [x, d_out].map(|t| reshaped(scaled(t, DType::F32, 1.0), [rows, width]));
        let normed = lora::rows_scaled(&x, factors, 0, DType::F32);
        let product = burn_cubecl::ops::numeric::mul(normed, d_out);
        reshaped(column_sums(&product), gamma.shape())
    }

    fn rotate(x: &CubeTensor, table: &RopeTable, sign: f32) -> CubeTensor {
        let (heads, width) = (x.shape()[1], x.shape()[2]);
        assert!(width == 2 * table.half, "rope table of another shape");
        let (cosines, sines) =
            table.on_device.get(0, || (upload_f32(x, &table.cosines), upload_f32(x, &table.sines)));
        let out = empty(x, x.shape(), x.dtype);
        let (cubes, dim) = each_element(&x.client, elements_of(x) / 2);
        // SAFETY: a unit works on one pair below half the length of `out`; the table has `half` angles for each token.
        unsafe {
            elements::rotate::launch_unchecked(
                &x.client,
                cubes,
                dim,
                x.clone().into_buffer_arg(),
                cosines.into_buffer_arg(),
                sines.into_buffer_arg(),
                out.clone().into_buffer_arg(),
                heads,
                table.half,
                sign,
                element(x.dtype),
            );
        }
        out
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
        let out = empty(gate, gate.shape(), gate.dtype);
        let (cubes, dim) = each_element(&gate.client, elements_of(gate));
        // SAFETY: the kernel checks the position against the length of `out`; all three have the same shape.
        unsafe {
            elements::swiglu::launch_unchecked(
                &gate.client,
                cubes,
                dim,
                gate.clone().into_buffer_arg(),
                up.clone().into_buffer_arg(),
                out.clone().into_buffer_arg(),
                element(gate.dtype),
            );
        }
        out
    }

    fn backward_swiglu(gate: &CubeTensor, up: &CubeTensor, d_out: &CubeTensor) -> (CubeTensor, CubeTensor) {
        let (d_gate, d_up) = (empty(gate, gate.shape(), gate.dtype), empty(gate, gate.shape(), gate.dtype));
        let (cubes, dim) = each_element(&gate.client, elements_of(gate));
        // SAFETY: the kernel checks the position against the length of `d_out`; all have the same shape.
        unsafe {
            elements::swiglu_backward::launch_unchecked(
                &gate.client,
                cubes,
                dim,
                gate.clone().into_buffer_arg(),
                up.clone().into_buffer_arg(),
                d_out.clone().into_buffer_arg(),
                d_gate.clone().into_buffer_arg(),
                d_up.clone().into_buffer_arg(),
                element(gate.dtype),
            );
        }
        (d_gate, d_up)
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

    fn backward_cross_entropy(
        saved: cross_entropy::Saved,
        d_losses: &CubeTensor,
    ) -> (CubeTensor, Option<CubeTensor>) {
        cross_entropy::backward(saved, d_losses)
    }

    fn forward_add(a: CubeTensor, b: CubeTensor) -> CubeTensor {
        let out = empty(&a, a.shape(), a.dtype);
        let (cubes, dim) = each_element(&a.client, elements_of(&a));
        let (client, dtype) = (a.client.clone(), element(a.dtype));
        // SAFETY: the kernel checks the position against the length of `out`; all three have the same shape.
        unsafe {
            elements::add::launch_unchecked(
                &client,
                cubes,
                dim,
                a.into_buffer_arg(),
                b.into_buffer_arg(),
                out.clone().into_buffer_arg(),
                dtype,
            );
        }
        out
    }

    fn forward_bias(y: CubeTensor, bias: CubeTensor) -> CubeTensor {
        let out = empty(&y, y.shape(), y.dtype);
        let (cubes, dim) = each_element(&y.client, elements_of(&y));
        let (client, dtype) = (y.client.clone(), element(y.dtype));
        // SAFETY: the kernel checks the position against the length of `out`, and takes it modulo the bias's length.
        unsafe {
            elements::add_bias::launch_unchecked(
                &client,
                cubes,
                dim,
                y.into_buffer_arg(),
                scaled(&bias, DType::F32, 1.0).into_buffer_arg(),
                out.clone().into_buffer_arg(),
                dtype,
            );
        }
        out
    }

    fn backward_bias(d_y: &CubeTensor) -> CubeTensor {
        column_sums(d_y)
    }
}
