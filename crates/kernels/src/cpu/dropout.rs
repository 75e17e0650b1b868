//! Dropout of a LoRA branch's input.

use finetune_random::unit;
use rayon::prelude::*;

use super::buffer::uninitialized;
use crate::arguments::Dropout;

impl Dropout {
    /// drop(x): elements of x are set to zero, the others are divided by 1 - p. `x` is [t, width],
    /// row-major.
    pub(crate) fn apply(&self, x: &[f32]) -> Vec<f32> {
        let width = x.len() / self.tokens.len();
        let keep_factor = 1.0 / (1.0 - self.probability);
        let mut out = uninitialized(x.len());
        out.par_chunks_mut(width).zip(x.par_chunks(width)).zip(self.tokens.par_iter()).with_min_len(16).for_each(
            |((out, x), &(row, position))| {
                for (n, (out, x)) in out.chunks_mut(4).zip(x.chunks(4)).enumerate() {
                    let words = self.stream.block([n as u32, position, row, 0]);
                    for ((out, x), word) in out.iter_mut().zip(x).zip(words) {
                        *out = if unit(word) < self.probability { 0.0 } else { x * keep_factor };
                    }
                }
            },
        );
        out
    }
}
