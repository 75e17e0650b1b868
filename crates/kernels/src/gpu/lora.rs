//! `y = x Wᵀ + s · drop(x) Aᵀ Bᵀ` on the GPU. A and B stay f32; they are multiplied in the number type of x, and their
//! gradients come out in f32.

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

use super::product::{product, transposed};
use super::tensor::{each_element, element, empty, upload_u32};
use super::{elements, elements_of, last, scaled};
use crate::linear::Dropout;

/// What the backward pass needs. `h` is drop(x) Aᵀ, [t, r].
#[derive(Clone, Debug)]
pub(crate) struct SavedLora {
    x: CubeTensor,
    w: CubeTensor,
    a: CubeTensor,
    b: CubeTensor,
    h: CubeTensor,
    scale: f32,
    dropout: Option<Dropout>,
}

fn add(a: CubeTensor, b: CubeTensor) -> CubeTensor {
    <burn_cubecl::CubeBackend as crate::fused::Fused>::forward_add(a, b)
}

pub(super) fn forward(
    x: CubeTensor,
    w: CubeTensor,
    a: CubeTensor,
    b: CubeTensor,
    scale: f32,
    dropout: Option<Dropout>,
) -> (CubeTensor, SavedLora) {
    let dtype = x.dtype;
    let y = product(&x, &transposed(&scaled(&w, dtype, 1.0)), dtype);
    let h = product(&dropped(&x, dropout.as_ref()), &transposed(&scaled(&a, dtype, 1.0)), dtype);
    let branch = product(&h, &transposed(&scaled(&b, dtype, scale)), dtype);
    (add(y, branch), SavedLora { x, w, a, b, h, scale, dropout })
}

/// The gradients of x, A and B that are asked for.
pub(super) fn backward(saved: SavedLora, d_y: &CubeTensor, wanted: [bool; 3]) -> [Option<CubeTensor>; 3] {
    let SavedLora { x, w, a, b, h, scale, dropout } = saved;
    let dtype = x.dtype;
    let d_h = product(d_y, &scaled(&b, dtype, scale), dtype);
    let d_b = wanted[2].then(|| scaled(&product(&transposed(d_y), &h, DType::F32), b.dtype, scale));
    let d_a = wanted[1].then(|| product(&transposed(&d_h), &dropped(&x, dropout.as_ref()), a.dtype));
    let d_x = wanted[0].then(|| {
        let branch = product(&d_h, &scaled(&a, dtype, 1.0), dtype);
        // The mask multiplies, so it is its own backward pass.
        add(product(d_y, &scaled(&w, dtype, 1.0), dtype), dropped(&branch, dropout.as_ref()))
    });
    [d_x, d_a, d_b]
}

/// drop(x), with the mask that the CPU draws.
fn dropped(x: &CubeTensor, dropout: Option<&Dropout>) -> CubeTensor {
    let Some(Dropout { probability, stream, tokens }) = dropout else { return x.clone() };
    let flat: Vec<u32> = tokens.iter().flat_map(|&(row, position)| [row, position]).collect();
    let tokens = upload_u32(x, &flat);
    let out = empty(x, x.shape(), x.dtype);
    let [key0, key1] = stream.key();
    let (cubes, dim) = each_element(&x.client, elements_of(x));
    // SAFETY: the kernel checks the position against the length of `out`; there is a pair of `tokens` for each row of x.
    unsafe {
        elements::dropout::launch_unchecked(
            &x.client,
            cubes,
            dim,
            x.clone().into_buffer_arg(),
            tokens.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            last(x),
            key0,
            key1,
            *probability,
            1.0 / (1.0 - *probability),
            element(x.dtype),
        );
    }
    out
}

/// Rows of x, each times its factor; the factor of row n is `factors[first + n]`.
pub(super) fn rows_scaled(x: &CubeTensor, factors: &CubeTensor, first: usize, dtype: DType) -> CubeTensor {
    let x = scaled(x, dtype, 1.0);
    let out = empty(&x, x.shape(), dtype);
    let (cubes, dim) = each_element(&x.client, elements_of(&x));
    let (client, width) = (x.client.clone(), last(&x));
    // SAFETY: the kernel checks the position against the length of `out`; there is a factor for each row from `first` on.
    unsafe {
        elements::scale_rows::launch_unchecked(
            &client,
            cubes,
            dim,
            x.into_buffer_arg(),
            factors.clone().into_buffer_arg(),
            out.clone().into_buffer_arg(),
            first,
            width,
            element(dtype),
        );
    }
    out
}
