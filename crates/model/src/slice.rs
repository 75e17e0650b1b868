//! The slice of every layer that this process holds, where several hold each layer together.
//!
//! A slice has some of the attention heads and some of the columns inside the feed-forward part, so that one sum
//! per mixer and one per feed-forward part suffices (Shoeybi et al. 2019, "Megatron-LM"). Norms, embedding, output
//! layer, routers and the short vectors of latent attention are whole in every process. Which layer is cut how is
//! in `tree/cut.rs`.

mod cut;
mod refusal;

use std::error::Error;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, Tensor, TensorData};

use crate::error::ModelError;

pub(crate) use self::cut::{Along, Cut, VectorCut};
pub(crate) use self::refusal::adapter_not_in_slices;
pub use self::refusal::{not_in_slices, slice_bytes};

/// What adds up the numbers of the processes that hold slices of the same layers.
pub trait Sums: Send + Sync {
    /// Every process's `values` become their sum over all processes, with the same bits everywhere.
    ///
    /// # Errors
    /// If another process cannot be reached.
    fn sum(&self, values: &mut [f32]) -> Result<(), Box<dyn Error + Send + Sync>>;

    /// Every process's `values` become the largest of all processes, place by place.
    ///
    /// # Errors
    /// If another process cannot be reached.
    fn largest(&self, values: &mut [f32]) -> Result<(), Box<dyn Error + Send + Sync>>;
}

/// Which slice of every layer a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Its number, from 0.
    pub mine: usize,
    /// How many there are.
    pub count: usize,
}

/// Widths of pieces that a feed-forward part is cut into, the best first: packed matrices have groups of such
/// widths, which stay whole.
const PIECES: [usize; 4] = [256, 128, 64, 32];

impl Slice {
    /// This slice's of so many heads. If there are fewer heads than slices, several slices have the same one.
    pub(crate) fn heads(self, heads: usize) -> Range<usize> {
        let first = self.mine * heads / self.count;
        first..(first + (heads / self.count).max(1))
    }

    /// This slice's columns of a feed-forward part of this width: as many as any other's if they can be cut into
    /// equal parts, of whole pieces if that is possible.
    pub(crate) fn columns(self, width: usize) -> Range<usize> {
        let even = PIECES.into_iter().find(|piece| width.is_multiple_of(piece * self.count));
        let smallest = PIECES[PIECES.len() - 1];
        let uneven = (width.is_multiple_of(smallest) && width / smallest >= self.count).then_some(smallest);
        let piece = even.or(uneven).unwrap_or(1);
        let place = |slice: usize| slice * (width / piece) / self.count * piece;
        place(self.mine)..place(self.mine + 1)
    }

    /// Whether it adds what is added once: biases of layers whose outputs are summed.
    pub(crate) fn is_first(self) -> bool {
        self.mine == 0
    }
}

/// A slice, and what connects it with the others.
#[derive(Clone)]
pub(crate) struct Sliced {
    pub(crate) slice: Slice,
    /// `None`: not connected yet.
    pub(crate) sums: Option<Arc<dyn Sums>>,
}

impl std::fmt::Debug for Sliced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Sliced").field(&self.slice).finish()
    }
}

impl Sliced {
    fn sums(&self) -> Result<&dyn Sums, ModelError> {
        self.sums.as_deref().ok_or_else(|| ModelError::Sum("this process is not connected with the others".into()))
    }

    /// The sum over all slices: x [t, hidden] -> [t, hidden], in the number type of x. It is taken in f32.
    ///
    /// # Errors
    /// If another process or the device fails.
    pub(crate) fn sum(&self, x: &Tensor<2>) -> Result<Tensor<2>, ModelError> {
        let sums = self.sums()?;
        let (shape, dtype, device) = (x.dims(), x.dtype(), x.device());
        let data = x.clone().cast(DType::F32).try_into_data();
        let data = data.map_err(|error| ModelError::device(error.to_string()))?;
        let mut values = data.try_to_vec::<f32>().map_err(|error| ModelError::device(error.to_string()))?;
        sums.sum(&mut values).map_err(ModelError::Sum)?;
        Ok(Tensor::<2>::from_data(TensorData::new(values, shape), (&device, DType::F32)).cast(dtype))
    }

    /// Checks that all slices have come to the same logits. Otherwise they would choose different tokens, and wait
    /// for each other in different layers.
    ///
    /// # Errors
    /// If they have not, or another process cannot be reached.
    pub(crate) fn check_alike(&self, logits: &[f32]) -> Result<(), ModelError> {
        let digest = digest(logits);
        // Numbers of 16 bits are exact in f32. The largest of the negated ones is the smallest.
        let parts = [0, 16, 32, 48].map(|shift| (digest >> shift & 0xffff) as f32);
        let mut ends: Vec<f32> = parts.iter().copied().chain(parts.iter().map(|part| -part)).collect();
        self.sums()?.largest(&mut ends).map_err(ModelError::Sum)?;
        let (largest, smallest) = ends.split_at(parts.len());
        match largest.iter().zip(smallest).all(|(largest, smallest)| *largest == -smallest) {
            true => Ok(()),
            false => Err(ModelError::Unlike),
        }
    }
}

/// A number that other bits would hardly have, and neither would the same ones at other places.
fn digest(numbers: &[f32]) -> u64 {
    let term = |(place, number): (usize, &f32)| {
        u64::from(number.to_bits()).wrapping_mul((2 * place as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    };
    numbers.iter().enumerate().map(term).fold(0, u64::wrapping_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all<T>(count: usize, of: impl Fn(Slice) -> T) -> Vec<T> {
        (0..count).map(|mine| of(Slice { mine, count })).collect()
    }

    /// (width, slices, where each begins)
    #[test]
    fn columns_are_cut_into_whole_pieces() {
        for (width, count, begins) in [
            (80, 2, vec![0, 40]),
            (80, 4, vec![0, 20, 40, 60]),
            (352, 2, vec![0, 160]),
            (2880, 4, vec![0, 704, 1440, 2144]),
            (2880, 2, vec![0, 1440]),
            (768, 2, vec![0, 384]),
            (14336, 8, vec![0, 1792, 3584, 5376, 7168, 8960, 10752, 12544]),
            (7, 3, vec![0, 2, 4]),
            (64, 4, vec![0, 16, 32, 48]),
        ] {
            let ranges = all(count, |slice| slice.columns(width));
            assert_eq!(ranges.iter().map(|range| range.start).collect::<Vec<_>>(), begins, "{width} in {count}");
            assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start), "{ranges:?}");
            assert!(ranges.iter().all(|range| !range.is_empty()) && ranges[count - 1].end == width, "{ranges:?}");
        }
    }

    /// Query heads of a slice look at its key/value heads, as those of one process do.
    #[test]
    fn queries_stay_with_their_keys() {
        for (heads, key_value_heads, count) in [(4, 4, 2), (4, 2, 4), (32, 8, 4), (64, 8, 16), (8, 1, 4), (6, 3, 3)] {
            let group = heads / key_value_heads;
            for slice in all(count, |slice| slice) {
                let (queries, keys) = (slice.heads(heads), slice.heads(key_value_heads));
                let own_group = queries.len() / keys.len();
                for (n, query) in queries.clone().enumerate() {
                    assert_eq!(keys.start + n / own_group, query / group, "{slice:?} {heads} {key_value_heads}");
                }
            }
        }
    }

    #[test]
    fn other_logits_have_another_digest() {
        let numbers = [1.5, -2.0, 0.0, 3.0];
        for other in [[1.5, -2.0, -0.0, 3.0], [-2.0, 1.5, 0.0, 3.0], [1.5, -2.0, 0.0, 3.000_000_2]] {
            assert_ne!(digest(&numbers), digest(&other), "{other:?}");
        }
        assert_eq!(digest(&numbers), digest(&[1.5, -2.0, 0.0, 3.0]));
    }
}
