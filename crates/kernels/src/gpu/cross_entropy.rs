//! The output layer and its cross-entropy in one, on a GPU, a piece of the trained positions at a
//! time. The method is that of `cpu/cross_entropy.rs`.

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use super::matrix::Matrix;
use super::pointwise::{gather_rows, scale_rows, scaled, scatter_rows};
use super::product::{product, transposed};
use super::reduce;
use super::tensor::{empty, upload_u32};
use crate::arguments::Targets;
use crate::footprint::gpu_logit_rows;
use crate::fused::Fused;
use crate::operations::{LinearCrossEntropy, PackedCrossEntropy};

/// The factor of logit gradients held in f16. They are below 1, mostly far below, where f16 has no
/// numbers.
const F16_SCALE: f32 = 4096.0;

/// What the backward pass needs.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    targets: Targets,
    h_shape: [usize; 2],
    dtype: DType,
    kept: Kept,
}

#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "one of a micro-batch, moved twice")]
enum Kept {
    /// With a frozen W: the gradient of the h of each trained position, [n, i] in f32. It is
    /// [`scale_of`] times the gradient for an upstream gradient of 1.
    Rows(CubeTensor),
    /// With a trained W: the inputs, to compute the logits again.
    Inputs { h: CubeTensor, w: CubeTensor },
}

/// The factor of logit gradients in this number type.
pub(super) fn scale_of(dtype: DType) -> f32 {
    if dtype == DType::F16 { F16_SCALE } else { 1.0 }
}

/// The positions and the tokens of the targets on the device.
pub(super) fn indices(targets: &Targets, like: &CubeTensor) -> (CubeTensor, CubeTensor) {
    targets.on_device.get(0, || (upload_u32(like, &targets.positions), upload_u32(like, &targets.tokens)))
}

/// One piece: its rows of h, and the gradients of their logits if `with_gradient`. Their losses are
/// written into `losses`.
fn piece(
    h: &CubeTensor,
    w: &CubeTensor,
    targets: &Targets,
    range: std::ops::Range<usize>,
    losses: &CubeTensor,
    with_gradient: bool,
) -> (CubeTensor, Option<CubeTensor>) {
    let (positions, tokens) = indices(targets, h);
    let h_rows = gather_rows(h, &positions, range.start, range.len());
    let logits = product(&h_rows, &transposed(w), DType::F32);
    let gradient = with_gradient.then(|| (h.dtype, scale_of(h.dtype)));
    let d_logits = reduce::cross_entropy(&logits, &tokens, losses, range, targets.softcap, gradient);
    (h_rows, d_logits)
}

/// The ranges of the targets that are worked on at a time.
pub(super) fn pieces(targets: &Targets, vocabulary: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let (rows, len) = (gpu_logit_rows(vocabulary), targets.len());
    (0..len).step_by(rows).map(move |start| start..(start + rows).min(len))
}

/// Panics if a target lies beyond the tokens or the vocabulary: kernels do not check.
pub(super) fn ensure_inside(targets: &Targets, tokens: usize, vocabulary: usize) {
    assert!(targets.positions.iter().all(|&position| (position as usize) < tokens), "a position beyond the tokens");
    assert!(targets.tokens.iter().all(|&token| (token as usize) < vocabulary), "a target beyond the vocabulary");
}

/// Losses [n] alone.
fn losses(h: &CubeTensor, w: &Matrix, targets: &Targets) -> CubeTensor {
    let [vocabulary, _] = w.shape();
    ensure_inside(targets, h.shape()[0], vocabulary);
    let w = w.in_type(h.dtype);
    let losses = empty(h, [targets.len()], DType::F32);
    for range in pieces(targets, vocabulary) {
        piece(h, &w, targets, range, &losses, false);
    }
    losses
}

/// Losses [n], and the gradients of h with a frozen W.
fn losses_and_rows(h: &CubeTensor, w: &Matrix, targets: Targets) -> (CubeTensor, Saved) {
    let [vocabulary, _] = w.shape();
    let (h_shape, dtype) = ([h.shape()[0], h.shape()[1]], h.dtype);
    ensure_inside(&targets, h_shape[0], vocabulary);
    let w = w.in_type(dtype);
    let losses = empty(h, [targets.len()], DType::F32);
    let parts: Vec<CubeTensor> = pieces(&targets, vocabulary)
        .map(|range| {
            let (_, d_logits) = piece(h, &w, &targets, range, &losses, true);
            product(&d_logits.expect("asked for"), &w, DType::F32)
        })
        .collect();
    (losses, Saved { targets, h_shape, dtype, kept: Kept::Rows(rows_together(parts)) })
}

/// The rows of all parts, one part after the other.
pub(super) fn rows_together(mut parts: Vec<CubeTensor>) -> CubeTensor {
    if parts.len() == 1 {
        return parts.remove(0);
    }
    <CubeBackend as burn::backend::ops::FloatTensorOps<_>>::float_cat(parts, 0)
}

/// The gradients of h, and of W if it is trained.
fn gradients(saved: Saved, d_losses: &CubeTensor) -> (CubeTensor, Option<CubeTensor>) {
    let Saved { targets, h_shape, dtype, kept } = saved;
    let scale = 1.0 / scale_of(dtype);
    let (d_rows, d_w) = match kept {
        Kept::Rows(d_rows) => (d_rows, None),
        Kept::Inputs { h, w } => {
            let vocabulary = w.shape()[0];
            let w_like_h = scaled(&w, dtype, 1.0);
            let mut parts = Vec::new();
            let mut d_w: Option<CubeTensor> = None;
            let unread = empty(&h, [targets.len()], DType::F32);
            for range in pieces(&targets, vocabulary) {
                let (h_rows, d_logits) = piece(&h, &w_like_h, &targets, range.clone(), &unread, true);
                let d_logits = d_logits.expect("asked for");
                parts.push(product(&d_logits, &w_like_h, DType::F32));
                // The upstream gradient multiplies the rows of h instead of the logit gradients: the
                // same product, and far fewer numbers.
                let h_rows = scale_rows(&h_rows, d_losses, range.start);
                let part = scaled(&product(&transposed(&d_logits), &h_rows, DType::F32), DType::F32, scale);
                d_w = Some(match d_w {
                    None => part,
                    Some(sum) => burn_cubecl::ops::numeric::add(sum, part),
                });
            }
            (rows_together(parts), d_w.map(|d_w| scaled(&d_w, w.dtype, 1.0)))
        }
    };
    let (starts, order) = targets.on_device.get(1, || {
        let (starts, order) = by_token(&targets, h_shape[0]);
        (upload_u32(&d_rows, &starts), upload_u32(&d_rows, &order))
    });
    (scatter_rows(&d_rows, d_losses, &starts, &order, h_shape, dtype, scale), d_w)
}

impl Fused<CubeBackend, 2> for LinearCrossEntropy {
    type Saved = Saved;

    fn forward(self, [h, w]: [CubeTensor; 2], [_, w_trained]: [bool; 2]) -> (CubeTensor, Saved) {
        let targets = self.targets;
        if !w_trained {
            return losses_and_rows(&h, &Matrix::Dense(w), targets);
        }
        let (h_shape, dtype) = ([h.shape()[0], h.shape()[1]], h.dtype);
        let losses = losses(&h, &Matrix::Dense(w.clone()), &targets);
        (losses, Saved { targets, h_shape, dtype, kept: Kept::Inputs { h, w } })
    }

    fn without_gradients(self, [h, w]: [CubeTensor; 2]) -> CubeTensor {
        losses(&h, &Matrix::Dense(w), &self.targets)
    }

    fn backward(saved: Saved, d_losses: CubeTensor, _: [bool; 2]) -> [Option<CubeTensor>; 2] {
        let (d_h, d_w) = gradients(saved, &d_losses);
        [Some(d_h), d_w]
    }
}

impl Fused<CubeBackend, 1> for PackedCrossEntropy {
    type Saved = Saved;

    fn forward(self, [h]: [CubeTensor; 1], _: [bool; 1]) -> (CubeTensor, Saved) {
        losses_and_rows(&h, &Matrix::Packed(self.w), self.targets)
    }

    fn without_gradients(self, [h]: [CubeTensor; 1]) -> CubeTensor {
        losses(&h, &Matrix::Packed(self.w), &self.targets)
    }

    fn backward(saved: Saved, d_losses: CubeTensor, _: [bool; 1]) -> [Option<CubeTensor>; 1] {
        [Some(gradients(saved, &d_losses).0)]
    }
}

/// (starts, order): `order` lists the targets by token. Those of token t are
/// `order[starts[t]..starts[t + 1]]`.
pub(super) fn by_token(targets: &Targets, tokens: usize) -> (Vec<u32>, Vec<u32>) {
    let mut order: Vec<u32> = (0..targets.len() as u32).collect();
    order.sort_by_key(|&n| targets.positions[n as usize]);
    let mut starts = vec![0u32; tokens + 1];
    for &position in targets.positions.iter() {
        starts[position as usize + 1] += 1;
    }
    for token in 0..tokens {
        starts[token + 1] += starts[token];
    }
    (starts, order)
}
