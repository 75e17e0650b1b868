//! The output layer with a LoRA branch, and its cross-entropy in one, on a GPU. The method is that
//! of `cpu/lora_cross_entropy.rs`.

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use super::cross_entropy::{by_token, ensure_inside, indices, pieces, rows_together, scale_of};
use super::matrix::Matrix;
use super::pointwise::{add, gather_rows, scale_rows, scaled, scatter_rows};
use super::product::{product, transposed};
use super::reduce;
use super::tensor::{empty, upload_u32};
use crate::arguments::Targets;
use crate::fused::Fused;
use crate::operations::{LoraCrossEntropy, PackedLoraCrossEntropy};

/// What the backward pass needs: all inputs, to compute the logits again.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    h: CubeTensor,
    w: Matrix,
    g: CubeTensor,
    b: CubeTensor,
    scale: f32,
    targets: Targets,
}

impl Saved {
    /// The weight and the scaled B in the number type of h.
    fn matrices(&self) -> (CubeTensor, CubeTensor) {
        (self.w.in_type(self.h.dtype), scaled(&self.b, self.h.dtype, self.scale))
    }

    /// One piece: its rows of g, and the gradients of its logits if `with_gradient`. Its losses are
    /// written into `losses`.
    fn piece(
        &self,
        (w, b): &(CubeTensor, CubeTensor),
        range: std::ops::Range<usize>,
        losses: &CubeTensor,
        with_gradient: bool,
    ) -> (CubeTensor, Option<CubeTensor>) {
        let (positions, tokens) = indices(&self.targets, &self.h);
        let h_rows = gather_rows(&self.h, &positions, range.start, range.len());
        let g_rows = gather_rows(&self.g, &positions, range.start, range.len());
        let logits = add(&product(&h_rows, &transposed(w), DType::F32), &product(&g_rows, &transposed(b), DType::F32));
        let gradient = with_gradient.then(|| (self.h.dtype, scale_of(self.h.dtype)));
        (g_rows, reduce::cross_entropy(&logits, &tokens, losses, range, self.targets.softcap, gradient))
    }
}

/// Losses [n].
fn losses([h, g, b]: [CubeTensor; 3], w: Matrix, scale: f32, targets: Targets) -> (CubeTensor, Saved) {
    let [vocabulary, _] = w.shape();
    ensure_inside(&targets, h.shape()[0], vocabulary);
    let losses = empty(&h, [targets.len()], DType::F32);
    let saved = Saved { h, w, g, b, scale, targets };
    let matrices = saved.matrices();
    for range in pieces(&saved.targets, vocabulary) {
        saved.piece(&matrices, range, &losses, false);
    }
    (losses, saved)
}

/// The gradients of h, g and B.
fn gradients(saved: &Saved, d_losses: &CubeTensor) -> [Option<CubeTensor>; 3] {
    let matrices = saved.matrices();
    let (w, b) = &matrices;
    let Saved { h, g, targets, scale, .. } = saved;
    let (dtype, unscale) = (h.dtype, 1.0 / scale_of(h.dtype));
    let unread = empty(h, [targets.len()], DType::F32);
    let (mut h_parts, mut g_parts) = (Vec::new(), Vec::new());
    let mut d_b: Option<CubeTensor> = None;
    for range in pieces(targets, w.shape()[0]) {
        let (g_rows, d_logits) = saved.piece(&matrices, range.clone(), &unread, true);
        let d_logits = d_logits.expect("asked for");
        h_parts.push(product(&d_logits, w, DType::F32));
        g_parts.push(product(&d_logits, b, DType::F32));
        // The upstream gradient multiplies the rows of g instead of the logit gradients: the same
        // product, and far fewer numbers.
        let g_rows = scale_rows(&g_rows, d_losses, range.start);
        let part = product(&transposed(&d_logits), &g_rows, DType::F32);
        let part = scaled(&part, DType::F32, unscale * scale);
        d_b = Some(match d_b {
            None => part,
            Some(sum) => add(&sum, &part),
        });
    }
    let (tokens, d_h_rows, d_g_rows) = (h.shape()[0], rows_together(h_parts), rows_together(g_parts));
    let (starts, order) = targets.on_device.get(1, || {
        let (starts, order) = by_token(targets, tokens);
        (upload_u32(h, &starts), upload_u32(h, &order))
    });
    let scatter = |rows: &CubeTensor, like: &CubeTensor| {
        scatter_rows(rows, d_losses, &starts, &order, [tokens, like.shape()[1]], dtype, unscale)
    };
    [Some(scatter(&d_h_rows, h)), Some(scatter(&d_g_rows, g)), d_b.map(|d_b| scaled(&d_b, saved.b.dtype, 1.0))]
}

impl Fused<CubeBackend, 4> for LoraCrossEntropy {
    type Saved = Saved;

    fn forward(self, [h, w, g, b]: [CubeTensor; 4], _: [bool; 4]) -> (CubeTensor, Saved) {
        losses([h, g, b], Matrix::Dense(w), self.scale, self.targets)
    }

    fn backward(saved: Saved, d_losses: CubeTensor, _: [bool; 4]) -> [Option<CubeTensor>; 4] {
        let [d_h, d_g, d_b] = gradients(&saved, &d_losses);
        [d_h, None, d_g, d_b]
    }
}

impl Fused<CubeBackend, 3> for PackedLoraCrossEntropy {
    type Saved = Saved;

    fn forward(self, inputs: [CubeTensor; 3], _: [bool; 3]) -> (CubeTensor, Saved) {
        losses(inputs, Matrix::Packed(self.w), self.scale, self.targets)
    }

    fn backward(saved: Saved, d_losses: CubeTensor, _: [bool; 3]) -> [Option<CubeTensor>; 3] {
        gradients(&saved, &d_losses)
    }
}
