//! The operations composed of plain tensor operations: slow, easy to check, correct on every
//! backend.
//!
//! The tests compare the fused operations of each backend with these. Shapes and meaning are those
//! of the functions of the same names in [`crate::operations`].

use std::ops::Range;

use burn::tensor::{Int, Tensor, TensorData, activation};

use crate::arguments::{Activation, AttentionShape, Dropout, RopeTable, Targets};
use crate::by_head::HeadRows;
use crate::delta::DeltaShape;
use crate::dispatch::{Dispatch, ExpertWeights, Scores};

/// [`crate::operations::linear`]
pub fn linear(x: Tensor<2>, w: Tensor<2>) -> Tensor<2> {
    x.matmul(w.transpose())
}

/// [`crate::operations::lora_linear`]
pub fn lora_linear(
    x: Tensor<2>,
    w: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f32,
    dropout: Option<Dropout>,
) -> Tensor<2> {
    let branch = match dropout {
        None => x.clone(),
        Some(dropout) => drop_input(x.clone(), &dropout),
    };
    linear(x, w) + linear(linear(branch, a), b) * scale
}

/// [`crate::operations::add_low_rank`], with A and B in the number type of x.
pub fn add_low_rank(
    y: Tensor<2>,
    x: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    rows: Range<usize>,
    scale: f32,
) -> Tensor<2> {
    let (dtype, [_, outputs]) = (x.dtype(), y.dims());
    let low = linear(linear(x.narrow(0, rows.start, rows.len()), a.cast(dtype)), b.cast(dtype)) * scale;
    let some = y.clone().narrow(0, rows.start, rows.len()) + low;
    y.slice_assign([rows, 0..outputs], some)
}

/// [`crate::operations::drop_input`]
pub fn drop_input(x: Tensor<2>, dropout: &Dropout) -> Tensor<2> {
    let [tokens, width] = x.dims();
    let mask = dropout.apply(&vec![1.0; tokens * width]);
    let mask = Tensor::<2>::from_data(TensorData::new(mask, [tokens, width]), &x.device());
    x * mask
}

/// [`crate::operations::magnitude`]
pub fn magnitude(z: Tensor<2>, m: Tensor<1>, n: Tensor<1>) -> Tensor<2> {
    z * (m / n).unsqueeze()
}

/// [`crate::operations::dropped_magnitude`]
pub fn dropped_magnitude(
    y: Tensor<2>,
    dropped: Tensor<2>,
    branch: Tensor<2>,
    m: Tensor<1>,
    n: Tensor<1>,
    scale: f32,
) -> Tensor<2> {
    let factor: Tensor<2> = (m / n).unsqueeze();
    y + (factor.clone() - 1.0) * dropped + factor * branch * scale
}

/// [`crate::operations::merged_norms`]
pub fn merged_norms(w: Tensor<2>, a: Tensor<2>, b: Tensor<2>, scale: f32) -> Tensor<1> {
    let rows = w.dims()[0];
    (w + b.matmul(a) * scale).square().sum_dim(1).sqrt().reshape([rows])
}

/// [`crate::operations::rms_norm`]
pub fn rms_norm<const D: usize>(x: Tensor<D>, gamma: Tensor<1>, eps: f64) -> Tensor<D> {
    let factor = (x.clone().square().mean_dim(D - 1) + eps).sqrt().recip();
    x * factor * gamma.unsqueeze()
}

/// [`crate::operations::rope`]
pub fn rope(x: Tensor<3>, table: &RopeTable) -> Tensor<3> {
    let [tokens, _, width] = x.dims();
    let device = x.device();
    let angles = |values: &[f32]| -> Tensor<3> {
        Tensor::from_data(TensorData::new(values.to_vec(), [tokens, 1, width / 2]), &device)
    };
    let (cosines, sines) = (angles(&table.cosines), angles(&table.sines));
    let a = x.clone().narrow(2, 0, width / 2);
    let b = x.narrow(2, width / 2, width / 2);
    Tensor::cat(vec![a.clone() * cosines.clone() - b.clone() * sines.clone(), b * cosines + a * sines], 2)
}

/// cap · tanh(x / cap); x itself without a cap.
pub fn soft_cap<const D: usize>(x: Tensor<D>, cap: Option<f32>) -> Tensor<D> {
    match cap {
        Some(cap) => (x / cap).tanh() * cap,
        None => x,
    }
}

/// [`crate::operations::causal_attention`], row by row, each row with its whole score matrix.
pub fn causal_attention(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, shape: &AttentionShape) -> Tensor<3> {
    attention(q, k, v, None, shape)
}

/// [`crate::operations::sink_attention`], likewise.
pub fn sink_attention(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, sinks: Tensor<1>, shape: &AttentionShape) -> Tensor<3> {
    attention(q, k, v, Some(sinks), shape)
}

fn attention(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, sinks: Option<Tensor<1>>, shape: &AttentionShape) -> Tensor<3> {
    let [_, query_heads, width] = q.dims();
    let [_, key_heads, value_width] = v.dims();
    let group = query_heads / key_heads;
    let device = q.device();
    let mut rows = Vec::new();
    for segment in shape.segments.iter() {
        let (queries, keys) = (segment.queries, segment.keys);
        // [heads, tokens, d]. The queries of one key head's group follow each other.
        let q = q.clone().narrow(0, segment.query_start, queries).swap_dims(0, 1).reshape([
            key_heads,
            group * queries,
            width,
        ]);
        let k = k.clone().narrow(0, segment.key_start, keys).swap_dims(0, 1);
        let v = v.clone().narrow(0, segment.key_start, keys).swap_dims(0, 1);
        let mut mask = vec![0.0f32; group * queries * keys];
        for (n, hidden) in mask.iter_mut().enumerate() {
            let (query, key) = ((n / keys) % queries + keys - queries, n % keys);
            if key > query || shape.window.is_some_and(|window| key + window <= query) {
                // Far below every score, and finite: a row that is masked in full gets no NaN.
                *hidden = -1e4;
            }
        }
        let mask = Tensor::<3>::from_data(TensorData::new(mask, [1, group * queries, keys]), &device);
        let scores = soft_cap(q.matmul(k.swap_dims(1, 2)) * shape.scale, shape.softcap) + mask;
        let probabilities = match &sinks {
            None => activation::softmax(scores, 2),
            Some(sinks) => {
                let sinks = sinks.clone().reshape([key_heads, group, 1]).expand([key_heads, group, queries]);
                let all = Tensor::cat(vec![scores, sinks.reshape([key_heads, group * queries, 1])], 2);
                activation::softmax(all, 2).narrow(2, 0, keys)
            }
        };
        let out = probabilities.matmul(v);
        rows.push(out.reshape([query_heads, queries, value_width]).swap_dims(0, 1));
    }
    Tensor::cat(rows, 0)
}

/// The rows of each head: w [o, i] -> [h, n, i].
pub fn rows_by_head(w: Tensor<2>, rows: HeadRows, heads: usize) -> Tensor<3> {
    let [outputs, inputs] = w.dims();
    if outputs == heads * rows.step {
        return w.reshape([heads, rows.step, inputs]).narrow(1, rows.first, rows.count);
    }
    let rows_of = |head: usize| w.clone().narrow(0, rows.of(head).start, rows.count).reshape([1, rows.count, inputs]);
    if rows.step == 0 {
        return rows_of(0).expand([heads, rows.count, inputs]);
    }
    Tensor::cat((0..heads).map(rows_of).collect(), 0)
}

/// [`crate::by_head::times`] and [`crate::by_head::times_transposed`], with the rows of each head: x
/// [t, h, n], w [h, n, i] -> [t, h, i]; or x [t, h, i] -> [t, h, n].
pub fn product_by_head(x: Tensor<3>, w: Tensor<3>, is_transposed: bool) -> Tensor<3> {
    let w = if is_transposed { w.swap_dims(1, 2) } else { w };
    x.swap_dims(0, 1).matmul(w).swap_dims(0, 1)
}

/// [`crate::operations::gated`]
pub fn gated(gate: Tensor<2>, up: Tensor<2>, activation: Activation) -> Tensor<2> {
    let activated = match activation {
        Activation::Clamped => {
            let (gate, up) = (gate.clamp_max(7.0), up.clamp(-7.0, 7.0));
            return gate.clone() * activation::sigmoid(gate * 1.702) * (up + 1.0);
        }
        Activation::Silu => activation::silu(gate),
        Activation::GeluTanh => {
            let inner = (gate.clone() + gate.clone().powi_scalar(3) * 0.044_715) * std::f32::consts::FRAC_2_PI.sqrt();
            gate * (inner.tanh() + 1.0) * 0.5
        }
    };
    activated * up
}

/// [`crate::operations::linear_cross_entropy`]
pub fn linear_cross_entropy(h: Tensor<2>, w: Tensor<2>, targets: &Targets) -> Tensor<1> {
    cross_entropy(linear(h, w), targets)
}

/// [`crate::operations::lora_cross_entropy`]
pub fn lora_cross_entropy(
    h: Tensor<2>,
    w: Tensor<2>,
    g: Tensor<2>,
    b: Tensor<2>,
    scale: f32,
    targets: &Targets,
) -> Tensor<1> {
    cross_entropy(linear(h, w) + linear(g, b) * scale, targets)
}

/// `-ln softmax(logits[position_n])[target_n]`: logits [t, v] -> [n].
fn cross_entropy(logits: Tensor<2>, targets: &Targets) -> Tensor<1> {
    let count = targets.len();
    let wanted = indices(&targets.tokens, &logits).reshape([count, 1]);
    let positions = indices(&targets.positions, &logits);
    let rows = soft_cap(logits.select(0, positions), targets.softcap);
    activation::log_softmax(rows, 1).gather(1, wanted).reshape([count]).neg()
}

/// [`crate::operations::expert_weights`]
pub fn expert_weights(logits: Tensor<2>, chosen: &[u32], rule: ExpertWeights) -> Tensor<2> {
    let tokens = logits.dims()[0];
    let choices = chosen.len() / tokens;
    let scores = match rule.scores {
        Scores::Softmax => activation::softmax(logits, 1),
        Scores::Sigmoid => activation::sigmoid(logits),
    };
    let weights = scores.clone().gather(1, indices(chosen, &scores).reshape([tokens, choices]));
    let weights = match rule.normalized {
        None => weights,
        Some(epsilon) => weights.clone() / (weights.sum_dim(1) + epsilon),
    };
    weights * rule.scale
}

/// [`crate::operations::dispatch_rows`]
pub fn dispatch_rows(x: Tensor<2>, dispatch: &Dispatch) -> Tensor<2> {
    let tokens = indices(&dispatch.tokens, &x);
    x.select(0, tokens)
}

/// [`crate::operations::combine`]
pub fn combine(y: Tensor<2>, weights: Tensor<2>, dispatch: &Dispatch) -> Tensor<2> {
    let (tokens, choices) = (weights.dims()[0], dispatch.choices);
    let mut sum: Option<Tensor<2>> = None;
    for choice in 0..choices {
        let rows: Vec<u32> = dispatch.rows.iter().skip(choice).step_by(choices).copied().collect();
        let part = y.clone().select(0, indices(&rows, &y)) * weights.clone().slice([0..tokens, choice..choice + 1]);
        sum = Some(match sum {
            None => part,
            Some(sum) => sum + part,
        });
    }
    sum.expect("a token has an expert at least")
}

/// [`crate::operations::expert_linear`]
pub fn expert_linear(x: Tensor<2>, experts: &[Tensor<2>], dispatch: &Dispatch) -> Tensor<2> {
    let products = dispatch.used().map(|(expert, rows)| linear(x.clone().slice([rows]), experts[expert].clone()));
    Tensor::cat(products.collect(), 0)
}

/// [`crate::operations::expert_lora_linear`]
pub fn expert_lora_linear(
    x: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    experts: &[Tensor<2>],
    dispatch: &Dispatch,
    scale: f32,
) -> Tensor<2> {
    let (rank, outputs) = (b.dims()[1], experts[0].dims()[0]);
    let products = dispatch.used().map(|(expert, rows)| {
        let a = a.clone().narrow(0, expert * rank, rank);
        let b = b.clone().narrow(0, expert * outputs, outputs);
        lora_linear(x.clone().slice([rows]), experts[expert].clone(), a, b, scale, None)
    });
    Tensor::cat(products.collect(), 0)
}

/// [`crate::operations::short_convolution`]
pub fn short_convolution(u: Tensor<2>, w: Tensor<2>, past: Tensor<2>, rows: &[usize], has_silu: bool) -> Tensor<2> {
    let taps = w.dims()[1];
    let (mut start, mut out) = (0, Vec::new());
    for (row, &tokens) in rows.iter().enumerate() {
        let before = past.clone().narrow(0, row * (taps - 1), taps - 1);
        let all = Tensor::cat(vec![before, u.clone().narrow(0, start, tokens)], 0);
        let products = (0..taps).map(|tap| {
            let w: Tensor<2> = w.clone().narrow(1, tap, 1).transpose();
            all.clone().narrow(0, tap, tokens) * w
        });
        let sum = products.reduce(|sum, product| sum + product).expect("a tap");
        out.push(if has_silu { activation::silu(sum) } else { sum });
        start += tokens;
    }
    Tensor::cat(out, 0)
}

/// [`crate::operations::delta_rule`]
pub fn delta_rule(u: Tensor<2>, g: Tensor<2>, beta: Tensor<2>, states: Tensor<2>, shape: &DeltaShape) -> Tensor<2> {
    let (x, y, keys) = (shape.key_dim, shape.value_dim, shape.keys());
    let unit = |v: Tensor<2>| v.clone() / ((v.clone() * v).sum_dim(1) + 1e-6).sqrt();
    let states = match shape.begins_empty {
        true => Tensor::zeros([shape.rows.len() * x, shape.values()], &u.device()),
        false => states,
    };
    let (mut out, mut last) = (Vec::new(), Vec::new());
    for (row, (first, tokens)) in shape.starts().enumerate() {
        let (mut of_heads, mut states_of_heads) = (Vec::new(), Vec::new());
        for head in 0..shape.value_heads {
            let key_head = head / shape.group();
            let mut state = states.clone().slice([row * x..(row + 1) * x, head * y..(head + 1) * y]);
            let mut of_tokens = Vec::new();
            for token in first..first + tokens {
                let part = |column: usize, width: usize| u.clone().slice([token..token + 1, column..column + width]);
                let number = |of: &Tensor<2>| of.clone().slice([token..token + 1, head..head + 1]);
                let q = unit(part(key_head * x, x)) / (x as f32).sqrt();
                let k = unit(part(keys + key_head * x, x));
                let v = part(2 * keys + head * y, y);
                state = state * number(&g).exp();
                let error = v - k.clone().matmul(state.clone());
                state = state + k.transpose().matmul(error * number(&beta));
                of_tokens.push(q.matmul(state.clone()));
            }
            of_heads.push(Tensor::cat(of_tokens, 0));
            states_of_heads.push(state);
        }
        out.push(Tensor::cat(of_heads, 1));
        last.push(Tensor::cat(states_of_heads, 1));
    }
    if shape.keeps_states {
        out.extend(last);
    }
    Tensor::cat(out, 0)
}

/// Indices on the device of `like`.
fn indices(values: &[u32], like: &Tensor<2>) -> Tensor<1, Int> {
    let values: Vec<i32> = values.iter().map(|&value| value as i32).collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), &like.device().inner())
}
