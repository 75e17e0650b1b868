//! What the forward pass makes of some heads, and the backward pass makes again.

use std::ops::Range;

use super::Inputs;
use super::array::Array;
use crate::delta::DeltaShape;
use crate::fused::Contiguous;

/// What is added to a sum of squares before its root is taken.
const EPSILON: f32 = 1e-6;

/// Vectors of one length: [.., x].
pub(super) struct Unit<B: Contiguous> {
    pub(super) values: Array<B>,
    /// What each was multiplied by to have length 1, [.., 1].
    pub(super) factors: Array<B>,
    pub(super) length: f32,
}

impl<B: Contiguous> Unit<B> {
    fn new(x: &Array<B>, length: f32) -> Unit<B> {
        let factors = (x * x).sum(2).plus(EPSILON).inverse_root();
        Unit { values: (x * &factors).scaled(length), factors, length }
    }

    /// The gradient of the vectors before, from that of these.
    pub(super) fn backward(&self, gradient: &Array<B>) -> Array<B> {
        // n = length · x · f with f = 1 / |x|: d_x = f (length · d_n - n (n · d_n) / length).
        let along = (gradient * &self.values).sum(2).scaled(1.0 / self.length);
        &self.factors * (gradient.scaled(self.length) - &self.values * along)
    }
}

/// The values of some heads. `b` counts chunks and value heads, a chunk's heads one after the other; c are the
/// places of a chunk. The letters are those of the module's formulas.
pub(super) struct Made<B: Contiguous> {
    /// [chunks · key heads, c, x]
    pub(super) unit_queries: Unit<B>,
    pub(super) unit_keys: Unit<B>,
    /// Q and K [b, c, x], V [b, c, y], β [b, c, 1]
    pub(super) queries: Array<B>,
    pub(super) keys: Array<B>,
    pub(super) values: Array<B>,
    pub(super) beta: Array<B>,
    /// e^G and e^(G_C - G) [b, c, 1], e^G_C [b, 1, 1]
    pub(super) since_start: Array<B>,
    pub(super) until_end: Array<B>,
    pub(super) of_chunk: Array<B>,
    /// E [b, c, c]
    pub(super) between: Array<B>,
    /// K Kᵀ, A, T, P [b, c, c]
    pub(super) key_products: Array<B>,
    pub(super) corrections: Array<B>,
    pub(super) solved: Array<B>,
    pub(super) scores: Array<B>,
    /// e^G Q, e^G K, e^(G_C - G) K [b, c, x]
    pub(super) reading_queries: Array<B>,
    pub(super) reading_keys: Array<B>,
    pub(super) writing_keys: Array<B>,
    /// T β e^G K [b, c, x]: what W has of S.
    pub(super) seen: Array<B>,
    /// S [b, x, y] and W [b, c, y]
    pub(super) starts: Array<B>,
    pub(super) added: Array<B>,
    /// The states behind the rows, [m · heads, x, y] in the order of the plan.
    pub(super) last: Array<B>,
}

impl<B: Contiguous> Made<B> {
    pub(super) fn new(inputs: &Inputs<'_, B>, keys: &Range<usize>) -> Made<B> {
        let DeltaShape { key_dim: x, value_dim: y, .. } = *inputs.shape;
        let (size, heads) = (inputs.plan.size, inputs.values_of(keys));
        let all_keys = inputs.shape.keys();
        let unit_queries = Unit::new(&inputs.by_chunk(&inputs.u, 0, keys, x), 1.0 / (x as f32).sqrt());
        let unit_keys = Unit::new(&inputs.by_chunk(&inputs.u, all_keys, keys, x), 1.0);
        let (queries, keys) = (shared(inputs, &unit_queries.values), shared(inputs, &unit_keys.values));
        let values = inputs.by_chunk(&inputs.u, 2 * all_keys, &heads, y);
        let beta = inputs.by_chunk(&inputs.beta, 0, &heads, 1);
        let of_places = inputs.by_chunk(&inputs.g, 0, &heads, 1);
        let count = of_places.len_of(0);
        let sums = of_places.shaped([count, size]).times(&mask(&values, size, |i, j| i <= j).shaped([size, size]));
        let (down, across) = (sums.shaped([count, size, 1]), sums.shaped([count, 1, size]));
        let visible = mask(&values, size, |i, j| j <= i);
        // Differences above the diagonal could be beyond the exponential.
        let between = ((&down - across) * &visible).exp() * &visible;
        let end = down.part(1, size - 1..size);
        let (since_start, until_end, of_chunk) = (down.exp(), (&end - &down).exp(), end.exp());
        let key_products = keys.times(&keys.transposed());
        let corrections = &key_products * &between * mask(&values, size, |i, j| j < i) * &beta;
        let solved = inverse(&corrections, size);
        let scores = queries.times(&keys.transposed()) * &between;
        let (reading_queries, reading_keys) = (&queries * &since_start, &keys * &since_start);
        let writing_keys = &keys * &until_end;
        let weighed = &solved * beta.shaped([count, 1, size]);
        let (fresh, seen) = (weighed.times(&values), weighed.times(&reading_keys));
        let (starts, added, last) = run(inputs, &heads, [&fresh, &seen, &writing_keys, &of_chunk]);
        Made {
            unit_queries,
            unit_keys,
            queries,
            keys,
            values,
            beta,
            since_start,
            until_end,
            of_chunk,
            between,
            key_products,
            corrections,
            solved,
            scores,
            reading_queries,
            reading_keys,
            writing_keys,
            seen,
            starts,
            added,
            last,
        }
    }

    /// O [b, c, y]
    pub(super) fn result(&self) -> Array<B> {
        self.reading_queries.times(&self.starts) + self.scores.times(&self.added)
    }
}

/// Queries or keys [chunks · key heads, c, x] of each value head: [b, c, x].
fn shared<B: Contiguous>(inputs: &Inputs<'_, B>, x: &Array<B>) -> Array<B> {
    let (count, size, width, group) = (x.len_of(0), x.len_of(1), x.len_of(2), inputs.shape.group());
    if group == 1 {
        return x.clone();
    }
    x.shaped([count, 1, size, width]).repeated([count, group, size, width]).shaped([count * group, size, width])
}

/// 1 where it holds of row i and column j, else 0: [1, c, c].
pub(super) fn mask<B: Contiguous>(like: &Array<B>, size: usize, holds: impl Fn(usize, usize) -> bool) -> Array<B> {
    let values = (0..size * size).map(|n| f32::from(holds(n / size, n % size)));
    like.with_values(values.collect(), [1, size, size])
}

/// (I + A)⁻¹ of matrices A [b, c, c] that are zero from the diagonal on.
///
/// The inverse of two blocks on the diagonal is known, first of blocks of one element. Then
/// `[[I + A₁, 0], [A₂₁, I + A₂]]⁻¹ = [[T₁, 0], [-T₂ A₂₁ T₁, T₂]]` is that of the block that they make up. No
/// power of A is formed: it may be as large as 10¹⁷ where keys repeat.
fn inverse<B: Contiguous>(a: &Array<B>, size: usize) -> Array<B> {
    // The elements left of the second of each two blocks of so many elements.
    let below = |block: usize| {
        let place = move |n: usize| (n / block / 2, n / block % 2);
        mask(a, size, move |i, j| place(i).0 == place(j).0 && (place(i).1, place(j).1) == (1, 0))
    };
    let mut inverse = mask(a, size, |i, j| i == j) - a * below(1);
    let mut block = 2;
    while block < size {
        let change = inverse.times(&(a * below(block))).times(&inverse);
        inverse = inverse - change;
        block *= 2;
    }
    inverse
}

/// S and W of all chunks, and the states behind the rows, chunk after chunk of each row. Of `fresh` T β V,
/// `seen`, `writing_keys` and `of_chunk`.
fn run<B: Contiguous>(
    inputs: &Inputs<'_, B>,
    heads: &Range<usize>,
    [fresh, seen, writing_keys, of_chunk]: [&Array<B>; 4],
) -> (Array<B>, Array<B>, Array<B>) {
    let mut state = inputs.by_row(&inputs.states, heads);
    let (mut starts, mut all_added, mut ended) = (Vec::new(), Vec::new(), Vec::new());
    let mut first = 0;
    for count in inputs.plan.turns.iter().map(|chunks| chunks * heads.len()) {
        let going_on = state.len_of(0);
        if going_on > count {
            ended.push(state.part(0, count..going_on));
            state = state.part(0, 0..count);
        }
        let of_turn = |x: &Array<B>| x.part(0, first..first + count);
        let added = of_turn(fresh) - of_turn(seen).times(&state);
        let next = of_turn(of_chunk) * &state + of_turn(writing_keys).transposed().times(&added);
        starts.push(std::mem::replace(&mut state, next));
        all_added.push(added);
        first += count;
    }
    // The rows that went on longest are the first ones.
    ended.push(state);
    ended.reverse();
    (Array::together(starts, 0), Array::together(all_added, 0), Array::together(ended, 0))
}
