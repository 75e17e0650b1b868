//! Products of each head's vector with the head's own rows of a matrix: how latent attention reads short
//! vectors without keys and values of all heads being made of them.

use burn::tensor::Tensor;

use crate::devices::is_cpu;
use crate::weight::{Weight, packed_rows};
use crate::{composed, operations};

/// The rows of a matrix that belong to heads: those of head n are `count` rows from `first + n · step` on.
/// With a `step` of 0 all heads have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadRows {
    /// The first row of head 0.
    pub first: usize,
    /// Rows from one head to the next.
    pub step: usize,
    /// Rows of a head.
    pub count: usize,
}

impl HeadRows {
    /// The rows of a head.
    pub(crate) fn of(self, head: usize) -> std::ops::Range<usize> {
        let start = self.first + head * self.step;
        start..start + self.count
    }
}

/// Each head's vector times its rows W of a matrix: x [t, h, n], w [o, i] -> x W, [t, h, i], where n is the
/// count of the rows. It has no gradient.
///
/// On the CPU an element is one sum in one order, whatever t is and however the matrix is held.
///
/// # Panics
/// If the sizes do not fit, or x requires a gradient.
pub fn times(x: Tensor<3>, w: Weight, rows: HeadRows) -> Tensor<3> {
    product(x, w, rows, false)
}

/// As [`times`] with the transposed rows: x [t, h, i], w [o, i] -> x Wᵀ, [t, h, n].
///
/// # Panics
/// As [`times`].
pub fn times_transposed(x: Tensor<3>, w: Weight, rows: HeadRows) -> Tensor<3> {
    product(x, w, rows, true)
}

fn product(x: Tensor<3>, w: Weight, rows: HeadRows, is_transposed: bool) -> Tensor<3> {
    let ([_, heads, width], [outputs, inputs]) = (x.dims(), w.shape());
    let wanted = if is_transposed { inputs } else { rows.count };
    assert!(width == wanted, "vectors of {wanted} elements, not of {width}");
    assert!(heads == 0 || rows.of(heads - 1).end <= outputs, "rows of {heads} heads within {outputs}");
    if is_cpu(&x.device()) {
        return match w {
            Weight::Dense(w) => operations::head_product(x, w, rows, is_transposed),
            Weight::Packed(w) => operations::packed_head_product(x, w, rows, is_transposed),
        };
    }
    let dtype = x.dtype();
    let of_heads = match w {
        Weight::Dense(w) => composed::rows_by_head(w.cast(dtype), rows, heads),
        Weight::Packed(w) => {
            // Only the rows that are multiplied are decoded.
            let distinct = if rows.step == 0 { heads.min(1) } else { heads };
            let numbers = (0..distinct).flat_map(|head| rows.of(head)).map(|row| row as u32).collect();
            let like = Tensor::<1>::zeros([1], (&x.device(), dtype));
            packed_rows(like, w, numbers).reshape([distinct, rows.count, inputs]).expand([heads, rows.count, inputs])
        }
    };
    composed::product_by_head(x, of_heads, is_transposed)
}
