//! A mixture of experts, and what its backward pass keeps.
//!
//! Shape letters: `t` tokens, `e` experts, `k` experts of a token.

use std::sync::Arc;

use burn::tensor::{DType, Tensor, activation};
use finetune_kernels::{Dispatch, PackedWeight, operations};
use rayon::prelude::*;

use crate::branch::LoraBranch;
use crate::decoder::adapted::Adapted;
use crate::decoder::feed_forward;
use crate::decoder::pass::{Context, linear};
use crate::tree::{Experts, Gated, Linear};

/// The weighted sum of each token's experts: x [t, hidden] -> [t, hidden].
///
/// The router's scores are computed in f32. A token's experts are summed in the order of their
/// numbers, as transformers does.
pub(crate) fn forward(mixture: &Experts, x: Tensor<2>, context: &Context) -> Tensor<2> {
    let Experts { router, experts, choices, weights, shared } = mixture;
    let of_all = shared.as_ref().map(|(expert, gate)| {
        let out = feed_forward::forward(expert, x.clone(), context);
        out * activation::sigmoid(linear(gate, x.clone(), context))
    });
    let logits = linear(router, x.clone(), context).cast(DType::F32);
    let values = logits.clone().into_data().try_to_vec::<f32>().expect("logits in f32");
    let chosen: Arc<[u32]> = highest(&values, experts.len(), *choices).into();
    let dispatch = Dispatch::new(&chosen, *choices, experts.len());
    let weights = operations::expert_weights(logits, chosen, *weights);
    let rows = operations::dispatch_rows(x, dispatch.clone());
    let product = |part: fn(&Gated) -> &Linear, rows: Tensor<2>| {
        let part: Vec<&Linear> = experts.iter().map(part).collect();
        products(&part, rows, &dispatch, context)
    };
    let gate = product(|expert| &expert.gate, rows.clone());
    let up = product(|expert| &expert.up, rows);
    let inner = operations::gated(gate, up, experts[0].activation);
    let of_chosen = operations::combine(product(|expert| &expert.down, inner), weights, dispatch);
    match of_all {
        Some(of_all) => operations::residual(of_chosen, of_all),
        None => of_chosen,
    }
}

/// The `choices` experts of each token with the highest logits, in ascending order of their numbers:
/// logits [t, e] -> [t, k]. Of equal ones the first are taken.
fn highest(logits: &[f32], experts: usize, choices: usize) -> Vec<u32> {
    let mut chosen = vec![0; logits.len() / experts * choices];
    logits.par_chunks(experts).zip(chosen.par_chunks_mut(choices)).for_each(|(logits, chosen)| {
        let mut order: Vec<u32> = (0..experts as u32).collect();
        let before = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if choices < experts {
            order.select_nth_unstable_by(choices, before);
        }
        chosen.copy_from_slice(&order[..choices]);
        chosen.sort_unstable();
    });
    chosen
}

/// One part of each row's expert, with its branch: rows [t · k, i] -> [t · k, o].
fn products(part: &[&Linear], rows: Tensor<2>, dispatch: &Dispatch, context: &Context) -> Tensor<2> {
    let experts: Arc<[PackedWeight]> = part.iter().map(|linear| linear.weight.frozen().clone()).collect();
    match stacked(part, context) {
        None => operations::expert_linear(rows, experts, dispatch.clone()),
        Some((a, b, scale)) => operations::expert_lora_linear(rows, a, b, experts, dispatch.clone(), scale),
    }
}

/// The branches of all experts, one below the other: A [e · r, i], B [e · o, r], and the factor of their
/// product. `None`: no expert has one.
///
/// r is the highest rank. A lower one is filled up with zeros, and so is an expert without a branch.
fn stacked(part: &[&Linear], context: &Context) -> Option<(Tensor<2>, Tensor<2>, f32)> {
    let branches = || part.iter().filter_map(|linear| linear.lora.as_ref());
    let rank = branches().map(|branch| branch.a.shape[0]).max()?;
    let first = branches().next()?;
    let is_one_scale = branches().all(|branch| branch.scale == first.scale);
    let scale = if is_one_scale { first.scale } else { 1.0 };
    let device = context.parameter(first.a.dense()).device();
    let halves = |linear: &&Linear| {
        let [outputs, inputs] = linear.weight.shape;
        let zeros = |shape: [usize; 2]| Tensor::<2>::zeros(shape, &device);
        let Some(LoraBranch { a, b, scale: own, .. }) = &linear.lora else {
            return (zeros([rank, inputs]), zeros([outputs, rank]));
        };
        let (a, b) = (context.parameter(a.dense()), context.parameter(b.dense()));
        let b = if is_one_scale { b } else { b * *own };
        match rank - a.dims()[0] {
            0 => (a, b),
            missing => {
                (Tensor::cat(vec![a, zeros([missing, inputs])], 0), Tensor::cat(vec![b, zeros([outputs, missing])], 1))
            }
        }
    };
    let (a, b): (Vec<_>, Vec<_>) = part.iter().map(halves).unzip();
    Some((Tensor::cat(a, 0), Tensor::cat(b, 0), scale))
}

impl Experts {
    /// Elements that the backward pass keeps of each token: for each of its experts what a gated part
    /// keeps and its branches', and the output; the input of the router, if that is trained.
    pub(crate) fn kept(&self, adapted: &Adapted<'_>) -> u64 {
        let of_expert = |expert: &Gated| {
            let branches: u64 =
                [&expert.gate, &expert.up, &expert.down].iter().map(|linear| adapted.of_branch(linear)).sum();
            expert.kept(adapted) + branches
        };
        let most = self.experts.iter().map(of_expert).max().unwrap_or(0);
        let of_shared = |(expert, _): &(Gated, Linear)| expert.kept(adapted) + self.hidden() + 2;
        let of_shared = self.shared.as_ref().map_or(0, of_shared);
        self.choices as u64 * (most + self.hidden()) + of_shared + adapted.input_of(&[&self.router])
    }

    /// Elements that the backward pass takes of each token on top: for each of its experts what a gated
    /// part takes, and the gradients of its input and output.
    pub(crate) fn taken(&self) -> u64 {
        let most = self.experts.iter().map(Gated::taken).max().unwrap_or(0);
        self.choices as u64 * (most + 2 * self.hidden())
    }

    /// f32 numbers that the backward pass keeps of each token: its scores, and the weights of its experts.
    pub(crate) fn statistics(&self) -> u64 {
        (self.experts.len() + 2 * self.choices) as u64
    }

    fn hidden(&self) -> u64 {
        self.router.weight.shape[1] as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (logits of five experts, the two that are chosen)
    #[test]
    fn the_highest_are_chosen() {
        for (logits, want) in [
            ([0.1, 0.5, -1.0, 0.4, 0.2], [1, 3]),
            ([3.0, 2.0, 1.0, 0.0, -1.0], [0, 1]),
            ([-1.0, 0.0, 1.0, 2.0, 3.0], [3, 4]),
            ([1.0, 1.0, 1.0, 1.0, 1.0], [0, 1]),
            ([0.0, 2.0, 2.0, 3.0, 2.0], [1, 3]),
        ] {
            assert_eq!(highest(&logits, 5, 2), want, "{logits:?}");
        }
        assert_eq!(highest(&[0.0, 1.0, 2.0], 3, 3), [0, 1, 2]);
    }
}
