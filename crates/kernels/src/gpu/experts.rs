//! Mixtures of experts on a GPU: each used expert multiplies a copy of its rows.

use std::ops::Range;
use std::sync::Arc;

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::tensor::CubeTensor;

use super::heads::{heads_first, put_tokens_first};
use super::matrix::Matrix;
use super::pointwise::{add, gather_rows, scale_rows, scaled, scatter_rows};
use super::product::{product, transposed};
use super::reduce;
use super::tensor::{
    buffer, each_element, elements_of, empty, last, launch_elements as launch, reshaped, upload_f32, upload_u32,
};
use crate::dispatch::{Dispatch, Scores};
use crate::fused::Fused;
use crate::operations::{Combine, DispatchRows, ExpertLinear, ExpertLoraLinear, WeightsOfExperts};
use crate::weight::PackedWeight;

/// Rows of x [n, width], copied: [rows, width].
fn rows_of(x: &CubeTensor, rows: &Range<usize>) -> CubeTensor {
    let (count, width) = (x.shape()[0], last(x));
    let copy = heads_first(&reshaped(x.clone(), [count, 1, width]), rows.start, rows.len());
    reshaped(copy, [rows.len(), width])
}

/// Copies `part` [rows, width] into the rows of out [n, width] from `first` on.
fn put_rows(part: CubeTensor, out: &CubeTensor, first: usize) {
    let (rows, count, width) = (part.shape()[0], out.shape()[0], last(out));
    let out = reshaped(out.clone(), [count, 1, width]);
    put_tokens_first(&reshaped(part, [1, rows, width]), &out, first, rows);
}

fn tokens_of(dispatch: &Dispatch, like: &CubeTensor) -> CubeTensor {
    dispatch.tokens_on_device.get(0, || upload_u32(like, &dispatch.tokens))
}

/// For each token the sum of its rows, each times its factor, in the order of the choices:
/// rows [n, width], factors f32 [t, k] -> [t, width].
fn sums(rows: &CubeTensor, factors: &CubeTensor, dispatch: &Dispatch, dtype: DType) -> CubeTensor {
    let (tokens, width) = (dispatch.len() / dispatch.choices, last(rows));
    // The factors as the rows lie, which is not the order of the choices.
    let by_row =
        reshaped(gather_rows(&flat(factors), &choices_of(dispatch, rows), 0, dispatch.len()), [dispatch.len()]);
    let starts: Vec<u32> = (0..=tokens).map(|token| (token * dispatch.choices) as u32).collect();
    let starts = dispatch.rows_on_device.get(1, || upload_u32(rows, &starts));
    let order = dispatch.rows_on_device.get(0, || upload_u32(rows, &dispatch.rows));
    scatter_rows(&scaled(rows, DType::F32, 1.0), &by_row, &starts, &order, [tokens, width], dtype, 1.0)
}

/// One number a row.
fn flat(numbers: &CubeTensor) -> CubeTensor {
    reshaped(numbers.clone(), [elements_of(numbers), 1])
}

/// The choice that each row is of: u32 [n].
fn choices_of(dispatch: &Dispatch, like: &CubeTensor) -> CubeTensor {
    dispatch.rows_on_device.get(2, || {
        let mut choices = vec![0; dispatch.len()];
        dispatch.rows.iter().zip(0..).for_each(|(&row, choice)| choices[row as usize] = choice);
        upload_u32(like, &choices)
    })
}

impl Fused<CubeBackend, 1> for DispatchRows {
    type Saved = Dispatch;

    fn forward(self, [x]: [CubeTensor; 1], _: [bool; 1]) -> (CubeTensor, Dispatch) {
        (gather_rows(&x, &tokens_of(&self.dispatch, &x), 0, self.dispatch.len()), self.dispatch)
    }

    fn backward(dispatch: Dispatch, d_rows: CubeTensor, _: [bool; 1]) -> [Option<CubeTensor>; 1] {
        let ones = upload_f32(&d_rows, &vec![1.0; dispatch.len()]);
        [Some(sums(&d_rows, &ones, &dispatch, d_rows.dtype))]
    }
}

impl Fused<CubeBackend, 2> for Combine {
    type Saved = (CubeTensor, CubeTensor, Dispatch);

    fn forward(self, [y, weights]: [CubeTensor; 2], _: [bool; 2]) -> (CubeTensor, Self::Saved) {
        let out = sums(&y, &weights, &self.dispatch, y.dtype);
        (out, (y, weights, self.dispatch))
    }

    fn backward(
        (y, weights, dispatch): Self::Saved,
        d_out: CubeTensor,
        [y_wanted, weights_wanted]: [bool; 2],
    ) -> [Option<CubeTensor>; 2] {
        let of_rows = gather_rows(&d_out, &tokens_of(&dispatch, &y), 0, dispatch.len());
        let d_y = y_wanted.then(|| {
            let factors = gather_rows(&flat(&weights), &choices_of(&dispatch, &y), 0, dispatch.len());
            scale_rows(&of_rows, &factors, 0)
        });
        let d_weights = weights_wanted.then(|| {
            let order = dispatch.rows_on_device.get(0, || upload_u32(&y, &dispatch.rows));
            let by_row = reduce::dot(&of_rows, &y);
            reshaped(gather_rows(&flat(&by_row), &order, 0, dispatch.len()), weights.shape())
        });
        [d_y, d_weights]
    }
}

/// The experts' matrices, each [o, i].
type Experts = Arc<[PackedWeight]>;

/// [n, width] of which each used expert computes its rows.
fn by_expert(
    like: &CubeTensor,
    dispatch: &Dispatch,
    width: usize,
    compute: impl Fn(usize, &Range<usize>) -> CubeTensor,
) -> CubeTensor {
    let out = empty(like, [dispatch.len(), width], like.dtype);
    for (expert, rows) in dispatch.used() {
        put_rows(compute(expert, &rows), &out, rows.start);
    }
    out
}

fn products(x: &CubeTensor, experts: &Experts, dispatch: &Dispatch) -> CubeTensor {
    by_expert(x, dispatch, experts[0].shape()[0], |expert, rows| {
        Matrix::frozen(&experts[expert]).times(&rows_of(x, rows))
    })
}

fn input_gradients(d_y: &CubeTensor, experts: &Experts, dispatch: &Dispatch) -> CubeTensor {
    by_expert(d_y, dispatch, experts[0].shape()[1], |expert, rows| {
        product(&rows_of(d_y, rows), &Matrix::frozen(&experts[expert]).in_type(d_y.dtype), d_y.dtype)
    })
}

impl Fused<CubeBackend, 1> for ExpertLinear {
    type Saved = (Experts, Dispatch);

    fn forward(self, [x]: [CubeTensor; 1], _: [bool; 1]) -> (CubeTensor, Self::Saved) {
        (products(&x, &self.experts, &self.dispatch), (self.experts, self.dispatch))
    }

    fn backward((experts, dispatch): Self::Saved, d_y: CubeTensor, _: [bool; 1]) -> [Option<CubeTensor>; 1] {
        [Some(input_gradients(&d_y, &experts, &dispatch))]
    }
}

/// What the backward pass of LoRA over experts needs. `h` is x Aᵀ of each row's expert, [n, r].
#[derive(Clone, Debug)]
pub(crate) struct SavedExpertLora {
    x: CubeTensor,
    a: CubeTensor,
    b: CubeTensor,
    h: CubeTensor,
    operation: Arc<ExpertLoraLinear>,
}

/// The rows of an expert among those of all, `each` of them.
fn block(of_all: &CubeTensor, expert: usize, each: usize) -> CubeTensor {
    rows_of(of_all, &(expert * each..(expert + 1) * each))
}

impl Fused<CubeBackend, 3> for ExpertLoraLinear {
    type Saved = SavedExpertLora;

    fn forward(self, [x, a, b]: [CubeTensor; 3], _: [bool; 3]) -> (CubeTensor, SavedExpertLora) {
        let (dtype, rank, [outputs, _]) = (x.dtype, last(&b), self.experts[0].shape());
        let (a_typed, b_typed) = (scaled(&a, dtype, 1.0), scaled(&b, dtype, self.scale));
        let h = by_expert(&x, &self.dispatch, rank, |expert, rows| {
            product(&rows_of(&x, rows), &transposed(&block(&a_typed, expert, rank)), dtype)
        });
        let branch = by_expert(&x, &self.dispatch, outputs, |expert, rows| {
            product(&rows_of(&h, rows), &transposed(&block(&b_typed, expert, outputs)), dtype)
        });
        let y = add(&products(&x, &self.experts, &self.dispatch), &branch);
        (y, SavedExpertLora { x, a, b, h, operation: Arc::new(self) })
    }

    fn backward(
        saved: SavedExpertLora,
        d_y: CubeTensor,
        [x_wanted, a_wanted, b_wanted]: [bool; 3],
    ) -> [Option<CubeTensor>; 3] {
        let SavedExpertLora { x, a, b, h, operation } = saved;
        let ExpertLoraLinear { experts, dispatch, scale } = &*operation;
        let (dtype, rank, [outputs, inputs]) = (x.dtype, last(&b), experts[0].shape());
        let (a_typed, b_typed) = (scaled(&a, dtype, 1.0), scaled(&b, dtype, *scale));
        let d_h = by_expert(&x, dispatch, rank, |expert, rows| {
            product(&rows_of(&d_y, rows), &block(&b_typed, expert, outputs), dtype)
        });
        let d_b = b_wanted.then(|| {
            let d_b = zeros(&b);
            for (expert, rows) in dispatch.used() {
                let sums = product(&transposed(&rows_of(&d_y, &rows)), &rows_of(&h, &rows), DType::F32);
                put_rows(scaled(&sums, DType::F32, *scale), &d_b, expert * outputs);
            }
            d_b
        });
        let d_a = a_wanted.then(|| {
            let d_a = zeros(&a);
            for (expert, rows) in dispatch.used() {
                let sums = product(&transposed(&rows_of(&d_h, &rows)), &rows_of(&x, &rows), DType::F32);
                put_rows(sums, &d_a, expert * rank);
            }
            d_a
        });
        let d_x = x_wanted.then(|| {
            let branch = by_expert(&x, dispatch, inputs, |expert, rows| {
                product(&rows_of(&d_h, rows), &block(&a_typed, expert, rank), dtype)
            });
            add(&input_gradients(&d_y, experts, dispatch), &branch)
        });
        [d_x, d_a, d_b]
    }
}

/// Zeros like a tensor of f32.
fn zeros(like: &CubeTensor) -> CubeTensor {
    reshaped(upload_f32(like, &vec![0.0; elements_of(like)]), like.shape())
}

impl Fused<CubeBackend, 1> for WeightsOfExperts {
    /// Scores of all experts f32 [t, e], and the choice u32 [t, k].
    type Saved = (CubeTensor, CubeTensor, Arc<WeightsOfExperts>);

    fn forward(self, [logits]: [CubeTensor; 1], _: [bool; 1]) -> (CubeTensor, Self::Saved) {
        assert_eq!(logits.dtype, DType::F32, "a router's logits in f32");
        let (tokens, experts) = (logits.shape()[0], logits.shape()[1]);
        let choices = self.chosen.len() / tokens;
        let chosen = upload_u32(&logits, &self.chosen);
        let (scores, weights) =
            (empty(&logits, [tokens, experts], DType::F32), empty(&logits, [tokens, choices], DType::F32));
        launch!(
            weigh_kernel,
            logits.client,
            tokens,
            buffer(&logits),
            buffer(&chosen),
            buffer(&scores),
            buffer(&weights),
            tokens,
            experts,
            choices,
            self.rule.normalized.unwrap_or(0.0),
            self.rule.scale,
            self.rule.scores == Scores::Softmax,
            self.rule.normalized.is_some(),
        );
        (weights, (scores, chosen, Arc::new(self)))
    }

    fn backward((scores, chosen, operation): Self::Saved, d_out: CubeTensor, _: [bool; 1]) -> [Option<CubeTensor>; 1] {
        let rule = operation.rule;
        let (tokens, experts) = (scores.shape()[0], scores.shape()[1]);
        let d_logits = zeros(&scores);
        launch!(
            weigh_backward_kernel,
            scores.client,
            tokens,
            buffer(&scores),
            buffer(&chosen),
            buffer(&d_out),
            buffer(&d_logits),
            tokens,
            experts,
            elements_of(&chosen) / tokens,
            rule.normalized.unwrap_or(0.0),
            rule.scale,
            rule.scores == Scores::Softmax,
            rule.normalized.is_some(),
        );
        [Some(d_logits)]
    }
}

/// Scores of each token's logits and the weights of its choices, one unit for each token.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments, reason = "a kernel takes its buffers and sizes one by one")]
fn weigh_kernel(
    logits: &[f32],
    chosen: &[u32],
    scores: &mut [f32],
    weights: &mut [f32],
    tokens: usize,
    experts: usize,
    choices: usize,
    epsilon: f32,
    scale: f32,
    #[comptime] is_softmax: bool,
    #[comptime] is_normalized: bool,
) {
    let token = ABSOLUTE_POS;
    if token >= tokens {
        terminate!();
    }
    let first = token * experts;
    if comptime!(is_softmax) {
        let mut largest = logits[first];
        for expert in 0..experts {
            largest = f32::max(largest, logits[first + expert]);
        }
        let mut sum = 0.0f32;
        for expert in 0..experts {
            let score = (logits[first + expert] - largest).exp();
            scores[first + expert] = score;
            sum += score;
        }
        for expert in 0..experts {
            scores[first + expert] /= sum;
        }
    } else {
        for expert in 0..experts {
            scores[first + expert] = 1.0f32 / (1.0f32 + (-logits[first + expert]).exp());
        }
    }
    let mut divisor = 1.0f32;
    if comptime!(is_normalized) {
        divisor = epsilon;
        for choice in 0..choices {
            divisor += scores[first + chosen[token * choices + choice] as usize];
        }
    }
    for choice in 0..choices {
        let score = scores[first + chosen[token * choices + choice] as usize];
        weights[token * choices + choice] = score / divisor * scale;
    }
}

/// The gradient of the logits, which are zeros before, one unit for each token.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments, reason = "a kernel takes its buffers and sizes one by one")]
fn weigh_backward_kernel(
    scores: &[f32],
    chosen: &[u32],
    d_weights: &[f32],
    d_logits: &mut [f32],
    tokens: usize,
    experts: usize,
    choices: usize,
    epsilon: f32,
    scale: f32,
    #[comptime] is_softmax: bool,
    #[comptime] is_normalized: bool,
) {
    let token = ABSOLUTE_POS;
    if token >= tokens {
        terminate!();
    }
    let first = token * experts;
    let mut divisor = 1.0f32;
    let mut mean = 0.0f32;
    if comptime!(is_normalized) {
        divisor = epsilon;
        for choice in 0..choices {
            divisor += scores[first + chosen[token * choices + choice] as usize];
        }
        for choice in 0..choices {
            let place = token * choices + choice;
            mean += d_weights[place] * scores[first + chosen[place] as usize] / divisor * scale;
        }
    }
    let mut sum = 0.0f32;
    for choice in 0..choices {
        let place = token * choices + choice;
        let expert = first + chosen[place] as usize;
        let d_score = (scale * d_weights[place] - mean) / divisor;
        sum += d_score * scores[expert];
        if comptime!(is_softmax) {
            d_logits[expert] = d_score;
        } else {
            d_logits[expert] = d_score * scores[expert] * (1.0f32 - scores[expert]);
        }
    }
    if comptime!(is_softmax) {
        for expert in 0..experts {
            d_logits[first + expert] = scores[first + expert] * (d_logits[first + expert] - sum);
        }
    }
}
