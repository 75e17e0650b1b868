//! `y = x Wᵀ + s · drop(x) Aᵀ Bᵀ` on the GPU. A and B stay f32; they are multiplied in the number type of x, and their
//! gradients come out in f32.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

use super::elements::{self, add, scaled};
use super::product::{product, transposed};
use super::tensor::upload_u32;
use crate::arguments::Dropout;

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
    (add(&y, &branch), SavedLora { x, w, a, b, h, scale, dropout })
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
        add(&product(d_y, &scaled(&w, dtype, 1.0), dtype), &dropped(&branch, dropout.as_ref()))
    });
    [d_x, d_a, d_b]
}

/// drop(x), with the mask that the CPU draws.
fn dropped(x: &CubeTensor, dropout: Option<&Dropout>) -> CubeTensor {
    let Some(Dropout { probability, stream, tokens }) = dropout else { return x.clone() };
    let flat: Vec<u32> = tokens.iter().flat_map(|&(row, position)| [row, position]).collect();
    elements::dropout(x, &upload_u32(x, &flat), stream.key(), *probability)
}
