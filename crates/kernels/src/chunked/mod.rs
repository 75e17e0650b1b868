//! The gated delta rule in chunks of tokens (Yang et al. 2024, "Parallelizing Linear Transformers with the
//! Delta Rule over Sequence Length" and "Gated Delta Networks"), written in tensor operations of any backend.
//! GPUs compute it; `cpu/delta_rule.rs` has the definition, token by token.
//!
//! Of a head and a chunk of C tokens that begins with state S [x, y], with rows q, k, v of Q, K, V, and with
//! G_i = g_1 + .. + g_i:
//!
//! ```text
//! E_ij = e^(G_i - G_j)                       for j ≤ i, else 0
//! A_ij = β_i E_ij k_i·k_j                    for j < i, else 0
//! P_ij = E_ij q_i·k_j                        for j ≤ i, else 0
//! T = (I + A)⁻¹
//! W = T β (V - e^G K S)                      what the tokens add to the state for their keys
//! O = e^G Q S + P W
//! S' = e^G_C S + (e^(G_C - G) K)ᵀ W          the state behind the chunk
//! ```
//!
//! Only S and W of a chunk wait for the chunk before. All else is computed for all chunks at once. A place
//! without a token has k, v, β and g of zero: it changes no state.
//!
//! The backward pass keeps the inputs alone, and computes everything else again. Heads are computed a few at
//! a time ([`crate::footprint::gpu_delta_heads`]).
//!
//! Start reading at [`made`]. [`plan`] says where the tokens lie.

pub(crate) mod array;
mod backward;
mod made;
mod plan;

use std::ops::Range;
use std::sync::Arc;

use burn::backend::TensorMetadata;
use burn::backend::tensor::FloatTensor;
use burn::tensor::DType;

use crate::delta::DeltaShape;
use crate::footprint::{DeltaSizes, gpu_delta_heads};
use crate::fused::{Contiguous, Fused};
use crate::operations::ChunkedDeltaRule;
use array::{Array, Rows};
use backward::backward;
use made::Made;
use plan::Plan;

/// The inputs of a rule and the places of its tokens: u [t, 2 a x + h y], g and beta [t, h], states
/// [m x, h y].
struct Inputs<'a, B: Contiguous> {
    shape: &'a DeltaShape,
    plan: Plan,
    u: Array<B>,
    g: Array<B>,
    beta: Array<B>,
    states: Array<B>,
    /// [`Plan::tokens`], [`Plan::places`], [`Plan::order`] and [`Plan::ranks`].
    tokens: Rows<B>,
    places: Rows<B>,
    order: Rows<B>,
    ranks: Rows<B>,
}

impl<'a, B: Contiguous> Inputs<'a, B> {
    fn new(tensors: &[FloatTensor<B>; 4], shape: &'a DeltaShape) -> Inputs<'a, B> {
        let [u, g, beta, states] = tensors.clone().map(Array::of);
        let plan = Plan::new(shape);
        let [tokens, places, order] = [&plan.tokens, &plan.places, &plan.order].map(|rows| u.numbers(rows));
        let ranks = u.numbers(&plan.ranks());
        Inputs { shape, plan, u, g, beta, states, tokens, places, order, ranks }
    }

    /// Key heads that are computed together.
    fn heads_at_once(&self) -> usize {
        let DeltaShape { key_heads, value_heads, key_dim, value_dim, .. } = *self.shape;
        let places = (self.plan.chunks * self.plan.size) as u64;
        let [key_heads, value_heads, key, value] = [key_heads, value_heads, key_dim, value_dim].map(|n| n as u64);
        gpu_delta_heads(DeltaSizes { key_heads, value_heads, key, value }, places) as usize
    }

    /// All key heads, so many at a time.
    fn parts(&self, at_once: usize) -> impl Iterator<Item = Range<usize>> {
        let all = self.shape.key_heads;
        (0..all).step_by(at_once).map(move |first| first..(first + at_once).min(all))
    }

    /// The value heads that share some key heads.
    fn values_of(&self, keys: &Range<usize>) -> Range<usize> {
        keys.start * self.shape.group()..keys.end * self.shape.group()
    }

    /// Some heads' columns of tokens [t, ..] by chunk: [chunks · heads, C, width]. `offset`: where the columns
    /// of head 0 begin.
    fn by_chunk(&self, all: &Array<B>, offset: usize, heads: &Range<usize>, width: usize) -> Array<B> {
        let Plan { size, chunks, .. } = self.plan;
        let columns = all.part(1, offset + heads.start * width..offset + heads.end * width);
        let nothing = columns.with_values(vec![0.0; heads.len() * width], [1, heads.len() * width]);
        let placed = Array::together(vec![columns, nothing], 0).rows(&self.tokens);
        let placed = placed.shaped([chunks, size, heads.len(), width]).permuted(&[0, 2, 1, 3]);
        placed.shaped([chunks * heads.len(), size, width])
    }

    /// The reverse: [chunks · heads, C, width] -> [t, heads · width].
    fn by_token(&self, x: &Array<B>, heads: usize) -> Array<B> {
        let (Plan { size, chunks, .. }, width) = (&self.plan, x.len_of(2));
        let places = x.shaped([*chunks, heads, *size, width]).permuted(&[0, 2, 1, 3]);
        places.shaped([chunks * size, heads * width]).rows(&self.places)
    }

    /// Some value heads of states [m x, h y], rows in the order of the plan: [m · heads, x, y].
    fn by_row(&self, states: &Array<B>, heads: &Range<usize>) -> Array<B> {
        let DeltaShape { key_dim: x, value_dim: y, .. } = *self.shape;
        let rows = self.plan.order.len();
        let columns = states.part(1, heads.start * y..heads.end * y);
        let by_row = columns.shaped([rows, x, heads.len(), y]).permuted(&[0, 2, 1, 3]).rows(&self.order);
        by_row.shaped([rows * heads.len(), x, y])
    }

    /// The reverse: [m · heads, x, y] -> [m x, heads · y].
    fn as_states(&self, by_row: &Array<B>, heads: usize) -> Array<B> {
        let DeltaShape { key_dim: x, value_dim: y, .. } = *self.shape;
        let rows = self.plan.order.len();
        let by_row = by_row.shaped([rows, heads, x, y]).rows(&self.ranks);
        by_row.permuted(&[0, 2, 1, 3]).shaped([rows * x, heads * y])
    }

    /// The result, with `at_once` key heads at a time.
    fn forward(&self, at_once: usize) -> Array<B> {
        let (mut out, mut states) = (Vec::new(), Vec::new());
        for keys in self.parts(at_once) {
            let heads = self.values_of(&keys).len();
            let made = Made::new(self, &keys);
            out.push(self.by_token(&made.result(), heads));
            if self.shape.keeps_states {
                states.push(self.as_states(&made.last, heads));
            }
        }
        let mut all = vec![Array::together(out, 1)];
        if self.shape.keeps_states {
            all.push(Array::together(states, 1));
        }
        Array::together(all, 0)
    }
}

/// The inputs, and the number type of u.
type Saved<B> = ([FloatTensor<B>; 4], Arc<DeltaShape>, DType);

impl<B: Contiguous> Fused<B, 4> for ChunkedDeltaRule {
    type Saved = Saved<B>;

    fn forward(self, tensors: [FloatTensor<B>; 4], _: [bool; 4]) -> (FloatTensor<B>, Saved<B>) {
        let inputs = Inputs::<B>::new(&tensors, &self.shape);
        let out = inputs.forward(inputs.heads_at_once()).into_type(DType::F32);
        let dtype = tensors[0].dtype();
        (out, (tensors, Arc::new(self.shape), dtype))
    }

    fn backward((tensors, shape, dtype): Saved<B>, d_out: FloatTensor<B>, _: [bool; 4]) -> [Option<FloatTensor<B>>; 4] {
        let inputs = Inputs::<B>::new(&tensors, &shape);
        let [d_u, d_g, d_beta, d_states] = backward(&inputs, &Array::of(d_out), inputs.heads_at_once());
        [d_u.into_type(dtype), d_g.into_type(DType::F32), d_beta.into_type(DType::F32), d_states.into_type(DType::F32)]
            .map(Some)
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use burn::tensor::TensorData;
    use burn_flex::FlexTensor;
    use finetune_random::Stream;

    use super::*;

    /// Heads that are computed a few at a time give what all at once give.
    #[test]
    fn heads_do_not_see_each_other() {
        let shape = DeltaShape {
            rows: [70, 3].into(),
            key_heads: 3,
            value_heads: 6,
            key_dim: 4,
            value_dim: 5,
            keeps_states: true,
        };
        let tensor = |seed: u64, shape: [usize; 2], sign: f32| {
            let values = Stream::new(seed, 9, 0, 0).normal(shape.iter().product(), 1.0);
            let values = values.into_iter().map(|value| if sign == 0.0 { value } else { sign * value.abs() });
            FlexTensor::from_data(TensorData::new(values.collect::<Vec<f32>>(), shape))
        };
        let tensors = [
            tensor(1, [73, 2 * 12 + 30], 0.0),
            tensor(2, [73, 6], -0.3),
            tensor(3, [73, 6], 0.4),
            tensor(4, [2 * 4, 30], 0.0),
        ];
        let inputs = Inputs::<Flex>::new(&tensors, &shape);
        let d_out = Array::of(tensor(5, [73 + 8, 30], 0.0));
        let floats = |array: Array<Flex>| {
            let tensor = Flex::contiguous(array.into_type(DType::F32));
            tensor.into_data().try_to_vec::<f32>().expect("f32 data")
        };
        let of = |at_once: usize| {
            let results = [vec![inputs.forward(at_once)], backward(&inputs, &d_out, at_once).to_vec()].concat();
            results.into_iter().map(floats).collect::<Vec<_>>()
        };
        let whole = of(3);
        for at_once in [1, 2] {
            for (n, (got, want)) in of(at_once).iter().zip(&whole).enumerate() {
                assert_eq!(got.len(), want.len(), "result {n}");
                let apart = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(apart <= 1e-5, "{at_once} at once, result {n}: {apart:e}");
            }
        }
    }
}
