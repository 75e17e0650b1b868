//! What the gated delta rule takes beside tensors.

use std::sync::Arc;

/// Rows, heads and widths of a gated delta rule (Yang et al. 2024, "Gated Delta Networks").
///
/// Letters: `a` key heads, `h` value heads (a multiple of a), `x` elements of a key head, `y` of a value
/// head, `m` rows.
#[derive(Clone, Debug)]
pub struct DeltaShape {
    /// Tokens of each row, one row after the other.
    pub rows: Arc<[usize]>,
    /// a
    pub key_heads: usize,
    /// h
    pub value_heads: usize,
    /// x
    pub key_dim: usize,
    /// y
    pub value_dim: usize,
    /// Whether all rows begin with a state of zeros. The states that they are given with are not read then, and
    /// get no gradient.
    pub begins_empty: bool,
    /// Whether the states behind the last token of each row are returned too.
    pub keeps_states: bool,
}

impl DeltaShape {
    /// Value heads that share a key head.
    pub(crate) fn group(&self) -> usize {
        self.value_heads / self.key_heads
    }

    /// Elements of all key heads.
    pub(crate) fn keys(&self) -> usize {
        self.key_heads * self.key_dim
    }

    /// Elements of all value heads.
    pub(crate) fn values(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// The first token of each row, and their number.
    pub(crate) fn starts(&self) -> impl Iterator<Item = (usize, usize)> {
        self.rows.iter().scan(0, |start, &count| {
            *start += count;
            Some((*start - count, count))
        })
    }
}
