//! The backward pass of the chunked delta rule.
//!
//! `d_` before a letter of the module's formulas is the gradient of what it stands for. With D the gradient of
//! the state S' behind a chunk:
//!
//! ```text
//! d_W = Pᵀ d_O + (e^(G_C - G) K) D
//! d_S = e^G_C D + (e^G Q)ᵀ d_O - (T β e^G K)ᵀ d_W
//! d_V = β (Tᵀ d_W)
//! d_A = -(Tᵀ d_W) Wᵀ                         for j < i
//! d_P = d_O Wᵀ                               for j ≤ i
//! ```
//!
//! The rest is the derivative of the products that A, P and the three kinds of keys and queries are.

use std::ops::Range;

use super::Inputs;
use super::array::Array;
use super::made::{Made, Unit, mask};
use crate::fused::Contiguous;

/// The gradients of u [t, 2 a x + h y], g and beta [t, h] and the states [m x, h y], from that of the result;
/// with `at_once` key heads at a time.
pub(super) fn backward<B: Contiguous>(inputs: &Inputs<'_, B>, d_all: &Array<B>, at_once: usize) -> [Array<B>; 4] {
    let mut parts: [Vec<Array<B>>; 6] = Default::default();
    for keys in inputs.parts(at_once) {
        let of_part = of_heads(inputs, d_all, &keys);
        parts.iter_mut().zip(of_part).for_each(|(parts, part)| parts.push(part));
    }
    let [queries, keys, values, g, beta, states] = parts.map(|parts| Array::together(parts, 1));
    [Array::together(vec![queries, keys, values], 1), g, beta, states]
}

/// The gradients of some heads' queries, keys, values, g and beta, each [t, ..], and of their states.
fn of_heads<B: Contiguous>(inputs: &Inputs<'_, B>, d_all: &Array<B>, keys: &Range<usize>) -> [Array<B>; 6] {
    let made = Made::new(inputs, keys);
    let (heads, size, tokens) = (inputs.values_of(keys), inputs.plan.size, inputs.plan.places.len());
    let (count, width) = (heads.len(), inputs.shape.value_dim);
    let d_out = inputs.by_chunk(&d_all.part(0, 0..tokens), 0, &heads, width);
    let (ends, d_added, d_states) = run(inputs, &made, &d_out, d_all, &heads);

    let (added_t, starts_t) = (made.added.transposed(), made.starts.transposed());
    let d_wrong = made.solved.transposed().times(&d_added);
    let d_values = &d_wrong * &made.beta;
    let strict = mask(&d_out, size, |i, j| j < i);
    let d_corrections = d_wrong.times(&added_t).scaled(-1.0) * strict;
    let d_scores = d_out.times(&added_t) * mask(&d_out, size, |i, j| j <= i);
    // V - e^G K S, which β weighs.
    let wrong = &made.values - made.reading_keys.times(&made.starts);
    let d_products = &d_corrections * &made.between;
    let d_beta = (&d_wrong * wrong).sum(2) + (&d_products * &made.key_products).sum(2);
    let (d_key_products, d_score_products) = (d_products * &made.beta, &d_scores * &made.between);

    let d_reading_queries = d_out.times(&starts_t);
    let d_reading_keys = d_values.times(&starts_t).scaled(-1.0);
    let d_writing_keys = made.added.times(&ends.transposed());
    let d_queries = d_score_products.times(&made.keys) + &d_reading_queries * &made.since_start;
    let d_keys = d_key_products.times(&made.keys)
        + d_key_products.transposed().times(&made.keys)
        + d_score_products.transposed().times(&made.queries)
        + &d_reading_keys * &made.since_start
        + &d_writing_keys * &made.until_end;

    // The gradients of the logarithm of E, row by row and column by column, then of the other powers of e.
    let of_between = d_corrections * &made.corrections + d_scores * &made.scores;
    let of_reading = (d_reading_queries * &made.reading_queries + d_reading_keys * &made.reading_keys).sum(2);
    let of_writing = (d_writing_keys * &made.writing_keys).sum(2);
    let all = of_between.len_of(0);
    let columns = of_between.sum(1).shaped([all, size, 1]);
    let d_sums = of_between.sum(2) - columns + of_reading - &of_writing;
    let of_end = of_writing.sum(1) + &made.of_chunk * (&made.starts * ends).sum(2).sum(1);
    // G_i is a sum of all g up to i.
    let later = mask(&d_out, size, |i, j| j <= i).shaped([size, size]);
    let d_g = d_sums.shaped([all, size]).times(&later).shaped([all, size, 1]) + of_end;

    [
        of_key_heads(inputs, &d_queries, &made.unit_queries, keys.len()),
        of_key_heads(inputs, &d_keys, &made.unit_keys, keys.len()),
        inputs.by_token(&d_values, count),
        inputs.by_token(&d_g, count),
        inputs.by_token(&d_beta, count),
        inputs.as_states(&d_states, count),
    ]
}

/// From gradients of normalized queries or keys of value heads [b, c, x] to those of key heads' before they were
/// normalized: [t, heads · x].
fn of_key_heads<B: Contiguous>(
    inputs: &Inputs<'_, B>,
    gradient: &Array<B>,
    unit: &Unit<B>,
    key_heads: usize,
) -> Array<B> {
    let (size, width, group) = (gradient.len_of(1), gradient.len_of(2), inputs.shape.group());
    let count = inputs.plan.chunks * key_heads;
    let of_group = gradient.shaped([count, group, size, width]).sum(1).shaped([count, size, width]);
    inputs.by_token(&unit.backward(&of_group), key_heads)
}

/// The gradients of the states behind all chunks [b, x, y], of W [b, c, y], and of the states that rows begin
/// with [m · heads, x, y]: from the last chunk of each row to its first.
fn run<B: Contiguous>(
    inputs: &Inputs<'_, B>,
    made: &Made<B>,
    d_out: &Array<B>,
    d_all: &Array<B>,
    heads: &Range<usize>,
) -> (Array<B>, Array<B>, Array<B>) {
    let tokens = inputs.plan.places.len();
    let (rows, all) = (inputs.plan.order.len() * heads.len(), d_all.len_of(0));
    let of_last = match inputs.shape.keeps_states {
        true => inputs.by_row(&d_all.part(0, tokens..all), heads),
        false => made.last.scaled(0.0),
    };
    let of_scores = made.scores.transposed().times(d_out);
    let of_queries = made.reading_queries.transposed().times(d_out);
    let mut first = of_scores.len_of(0);
    let mut d_state: Option<Array<B>> = None;
    let (mut ends, mut all_d_added) = (Vec::new(), Vec::new());
    // The states of rows that end with this turn are those that were returned.
    let with_rows = |d_state: Option<Array<B>>, count: usize| match d_state {
        None => of_last.part(0, 0..count),
        Some(before) if before.len_of(0) == count => before,
        Some(before) => {
            let known = before.len_of(0);
            Array::together(vec![before, of_last.part(0, known..count)], 0)
        }
    };
    for count in inputs.plan.turns.iter().rev().map(|chunks| chunks * heads.len()) {
        first -= count;
        let end = with_rows(d_state, count);
        let of_turn = |x: &Array<B>| x.part(0, first..first + count);
        let d_added = of_turn(&of_scores) + of_turn(&made.writing_keys).times(&end);
        let through = of_turn(&made.of_chunk) * &end + of_turn(&of_queries);
        d_state = Some(through - of_turn(&made.seen).transposed().times(&d_added));
        ends.push(end);
        all_d_added.push(d_added);
    }
    ends.reverse();
    all_d_added.reverse();
    (Array::together(ends, 0), Array::together(all_d_added, 0), with_rows(d_state, rows))
}
