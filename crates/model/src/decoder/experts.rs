//! A mixture of experts, and what its backward pass keeps.
//!
//! Shape letters: `t` tokens, `e` experts, `k` experts of a token.

use std::sync::Arc;

use burn::tensor::{DType, Tensor, TensorData, activation};
use finetune_kernels::{Dispatch, PackedWeight, Scores, operations};
use rayon::prelude::*;

use crate::branch::LoraBranch;
use crate::decoder::adapted::Adapted;
use crate::decoder::pass::{Context, linear};
use crate::decoder::{feed_forward, indices};
use crate::tree::{Experts, Gated, Linear};

/// The weighted sum of each token's experts: x [t, hidden] -> [t, hidden].
///
/// The router's scores are computed in f32. A token's experts are summed in the order of their
/// numbers, as transformers does.
pub(crate) fn forward(mixture: &Experts, x: Tensor<2>, context: &Context) -> Tensor<2> {
    routed(mixture, x.clone(), x, context)
}

/// The same, with what the router reads beside what the experts read.
pub(crate) fn routed(mixture: &Experts, of_router: Tensor<2>, x: Tensor<2>, context: &Context) -> Tensor<2> {
    let Experts { router, experts, choices, weights, shared, .. } = mixture;
    let of_all = shared.as_ref().map(|(expert, gate)| {
        let out = feed_forward::forward(expert, x.clone(), context);
        match gate {
            Some(gate) => out * activation::sigmoid(linear(gate, x.clone(), context)),
            None => out,
        }
    });
    // The product is in the number type of the rest, what is made of it in f32.
    let logits = linear(router, of_router, context).cast(DType::F32);
    let (chosen, logits) = chosen(mixture, logits, context);
    if let Some(counts) = &context.expert_use {
        counts.count(&router.module, experts.len(), &chosen);
    }
    let dispatch = Dispatch::new(&chosen, *choices, experts.len());
    let weights = operations::expert_weights(logits, chosen.clone(), *weights);
    let weights = match &mixture.scales {
        Some(scales) => {
            let [tokens, choices] = weights.dims();
            let scales = context.parameter(scales.values()).select(0, indices(&chosen, &weights.device()));
            weights * scales.reshape([tokens, choices])
        }
        None => weights,
    };
    let rows = operations::dispatch_rows(x, dispatch.clone());
    let [of_gate, of_up, of_down] = branches(experts, context);
    let product = |part: fn(&Gated) -> &Linear, branches: Option<Branches>, rows: Tensor<2>| {
        let part: Vec<&Linear> = experts.iter().map(part).collect();
        let y = products(&part, branches, rows, &dispatch);
        match biases(&part, &y, &dispatch, context) {
            Some(biases) => operations::residual(y, biases),
            None => y,
        }
    };
    let gate = product(|expert| &expert.gate, of_gate, rows.clone());
    let up = product(|expert| &expert.up, of_up, rows);
    let inner = operations::gated(gate, up, experts[0].activation);
    let of_chosen = operations::combine(product(|expert| &expert.down, of_down, inner), weights, dispatch);
    match of_all {
        Some(of_all) => operations::residual(of_chosen, of_all),
        None => of_chosen,
    }
}

/// The experts of each token [t, k], and the logits [t, e] of the router, which carry the gradient of its
/// auxiliary loss from here on, if there is one.
fn chosen(mixture: &Experts, logits: Tensor<2>, context: &Context) -> (Arc<[u32]>, Tensor<2>) {
    let values = floats(logits.clone().into_data());
    let Some(balance) = &context.balance else { return (choices_of(mixture, values).into(), logits) };
    let chosen: Arc<[u32]> = choices_of(mixture, values.clone()).into();
    let logits = balance.through(logits, &values, &chosen, context.training);
    (chosen, logits)
}

fn floats(data: TensorData) -> Vec<f32> {
    data.try_to_vec::<f32>().expect("numbers in f32")
}

/// The experts of each token, in ascending order of their numbers: [t, k]. `values` [t, e] are the logits of the
/// router.
fn choices_of(mixture: &Experts, mut values: Vec<f32>) -> Vec<u32> {
    let (experts, choices) = (mixture.experts.len(), mixture.choices);
    // Scores have the order of the logits, as long as nothing is added to them.
    if mixture.weights.scores == Scores::Sigmoid {
        let correction = mixture.correction.as_ref().map(|correction| floats(correction.values().clone().into_data()));
        let correction = correction.unwrap_or_else(|| vec![0.0; experts]);
        values.par_chunks_mut(experts).for_each(|values| {
            for (value, correction) in values.iter_mut().zip(&correction) {
                *value = 1.0 / (1.0 + (-*value).exp()) + correction;
            }
        });
    }
    if let Some([groups, kept]) = mixture.groups {
        values.par_chunks_mut(experts).for_each(|scores| leave_groups(scores, groups, kept));
    }
    highest(&values, experts, choices)
}

/// Lets a token choose from the `kept` best of its groups only. A group is as good as the sum of its two
/// best scores; of equal ones the first are kept.
fn leave_groups(scores: &mut [f32], groups: usize, kept: usize) {
    let size = scores.len() / groups;
    let of_groups: Vec<f32> = scores
        .chunks(size)
        .map(|scores| {
            let (mut best, mut next) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
            for &score in scores {
                if score > best {
                    (best, next) = (score, best);
                } else if score > next {
                    next = score;
                }
            }
            best + next
        })
        .collect();
    let best = highest(&of_groups, groups, kept);
    for (group, scores) in scores.chunks_mut(size).enumerate() {
        if !best.contains(&(group as u32)) {
            scores.fill(f32::NEG_INFINITY);
        }
    }
}

/// The biases of each row's expert, [t · k, o], if experts have any.
fn biases(part: &[&Linear], like: &Tensor<2>, dispatch: &Dispatch, context: &Context) -> Option<Tensor<2>> {
    let of_experts: Vec<Tensor<2>> =
        part.iter().filter_map(|linear| Some(context.parameter(linear.bias.as_ref()?.values()).unsqueeze())).collect();
    if of_experts.is_empty() {
        return None;
    }
    let experts: Vec<u32> = dispatch.experts().map(|expert| expert as u32).collect();
    Some(Tensor::cat(of_experts, 0).select(0, indices(&experts, &like.device())).cast(like.dtype()))
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
fn products(part: &[&Linear], branches: Option<Branches>, rows: Tensor<2>, dispatch: &Dispatch) -> Tensor<2> {
    let experts: Arc<[PackedWeight]> = part.iter().map(|linear| linear.weight.frozen().clone()).collect();
    match branches {
        None => operations::expert_linear(rows, experts, dispatch.clone()),
        Some((a, b, scale)) => operations::expert_lora_linear(rows, a, b, experts, dispatch.clone(), scale),
    }
}

/// The branches of one part of all experts, one below the other: A [e · r, i], B [e · o, r], and the factor
/// of their product.
type Branches = (Tensor<2>, Tensor<2>, f32);

/// The branches of gate, up and down of all experts; `None`: no expert has one.
fn branches(experts: &[Gated], context: &Context) -> [Option<Branches>; 3] {
    let of = |part: fn(&Gated) -> &Linear| {
        let part: Vec<_> = experts.iter().map(part).map(|linear| (linear.lora.as_ref(), linear.weight.shape)).collect();
        stacked(&part, context)
    };
    let both: Option<Vec<_>> = experts
        .iter()
        .map(|expert| expert.gate_up.as_ref().map(|both| (both.lora.as_ref(), both.weight.shape)))
        .collect();
    let Some(both) = both else {
        return [of(|expert| &expert.gate), of(|expert| &expert.up), of(|expert| &expert.down)];
    };
    let both = stacked(&both, context);
    let half = |n: usize| {
        let (a, b, scale) = both.clone()?;
        let [rows, rank] = b.dims();
        Some((a, b.reshape([rows / 2, 2 * rank]).narrow(1, n * rank, rank), scale))
    };
    [half(0), half(1), of(|expert| &expert.down)]
}

/// As [`Branches`], of each expert's branch of a matrix [o, i]; `None`: no expert has one.
///
/// r is the highest rank. A lower one is filled up with zeros, and so is an expert without a branch.
fn stacked(part: &[(Option<&LoraBranch>, [usize; 2])], context: &Context) -> Option<Branches> {
    let branches = || part.iter().filter_map(|(branch, _)| *branch);
    let rank = branches().map(|branch| branch.a.shape[0]).max()?;
    let first = branches().next()?;
    let is_one_scale = branches().all(|branch| branch.scale == first.scale);
    let scale = if is_one_scale { first.scale } else { 1.0 };
    let device = context.parameter(first.a.dense()).device();
    let halves = |(branch, [outputs, inputs]): &(Option<&LoraBranch>, [usize; 2])| {
        let (outputs, inputs) = (*outputs, *inputs);
        let zeros = |shape: [usize; 2]| Tensor::<2>::zeros(shape, &device);
        let Some(LoraBranch { a, b, scale: own, .. }) = branch else {
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
            expert.kept(adapted) + branches + adapted.of_both(expert.gate_up.as_ref())
        };
        let most = self.experts.iter().map(of_expert).max().unwrap_or(0);
        let of_shared = |(expert, _): &(Gated, Option<Linear>)| expert.kept(adapted) + self.hidden() + 2;
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

    /// Groups of three: the sums of their two best are 1.4, 1.3 and 1.5.
    #[test]
    fn experts_of_the_best_groups_are_left() {
        let mut scores = [0.9, 0.5, 0.1, 0.7, 0.6, 0.65, 1.4, 0.1, 0.0];
        leave_groups(&mut scores, 3, 2);
        assert_eq!(highest(&scores, 9, 3), [0, 1, 6]);
        assert_eq!(scores[3..6], [f32::NEG_INFINITY; 3]);
    }
}
