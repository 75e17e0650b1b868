//! Which chunk each token lies in: rows cut into chunks, and the chunks put into the order in which states
//! go through them.

use crate::delta::DeltaShape;
use crate::footprint::DELTA_CHUNK;

/// The chunks of all rows. No chunk has tokens of two rows; the last one of a row is filled up with places
/// that have no token.
///
/// The first chunks of all rows come first, then the second ones of those that have any, and so on. Rows with
/// more chunks come first, so the chunks of a turn belong to the first rows of [`Plan::order`].
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Places of a chunk, a power of two.
    pub(super) size: usize,
    /// The number of chunks.
    pub(super) chunks: usize,
    /// Chunks of each turn.
    pub(super) turns: Vec<usize>,
    /// The rows, those with more chunks first.
    pub(super) order: Vec<usize>,
    /// Of each place of each chunk: its token; t if it has none.
    pub(super) tokens: Vec<usize>,
    /// The place of each token.
    pub(super) places: Vec<usize>,
}

impl Plan {
    pub(super) fn new(shape: &DeltaShape) -> Plan {
        let longest = shape.rows.iter().copied().max().unwrap_or(1);
        let size = longest.next_power_of_two().min(DELTA_CHUNK);
        let rows: Vec<(usize, usize)> = shape.starts().collect();
        let chunks_of = |row: usize| rows[row].1.div_ceil(size);
        let all = rows.iter().map(|(_, tokens)| tokens).sum();
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|&row| std::cmp::Reverse(chunks_of(row)));
        let mut plan = Plan { size, chunks: 0, turns: Vec::new(), order, tokens: Vec::new(), places: vec![0; all] };
        for turn in 0..longest.div_ceil(size) {
            let count = plan.order.iter().take_while(|&&row| chunks_of(row) > turn).count();
            for &(first, tokens) in plan.order[..count].iter().map(|&row| &rows[row]) {
                for n in turn * size..(turn + 1) * size {
                    if n < tokens {
                        plan.places[first + n] = plan.tokens.len();
                    }
                    plan.tokens.push(if n < tokens { first + n } else { all });
                }
            }
            plan.turns.push(count);
            plan.chunks += count;
        }
        plan
    }

    /// The place of each row in [`Plan::order`].
    pub(super) fn ranks(&self) -> Vec<usize> {
        let mut ranks = vec![0; self.order.len()];
        self.order.iter().enumerate().for_each(|(rank, &row)| ranks[row] = rank);
        ranks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(rows: &[usize]) -> Plan {
        let (heads, width) = (1, 1);
        Plan::new(&DeltaShape {
            rows: rows.into(),
            key_heads: heads,
            value_heads: heads,
            key_dim: width,
            value_dim: width,
            keeps_states: false,
        })
    }

    #[test]
    fn short_rows_have_small_chunks() {
        let found = plan(&[1, 3]);
        assert_eq!((found.size, found.chunks, found.turns.as_slice()), (4, 2, [2].as_slice()));
        assert_eq!(found.tokens, [0, 4, 4, 4, 1, 2, 3, 4]);
        assert_eq!(found.places, [0, 4, 5, 6]);
        assert_eq!(plan(&[1, 1]).size, 1);
    }

    /// Rows of 2, 1, 3 and no chunks: the first chunks of three rows, the second of two, the third of one.
    #[test]
    fn longer_rows_come_first() {
        let found = plan(&[70, 5, 192, 0]);
        assert_eq!((found.size, found.chunks), (64, 6));
        assert_eq!(found.turns, [3, 2, 1]);
        assert_eq!(found.order, [2, 0, 1, 3]);
        assert_eq!(found.ranks(), [1, 2, 0, 3]);
        assert_eq!(found.tokens[..64], (75..139).collect::<Vec<_>>(), "the first chunk is that of row 2");
        assert_eq!(found.tokens[2 * 64..2 * 64 + 6], [70, 71, 72, 73, 74, 267], "then row 1 ends");
        for (token, &place) in found.places.iter().enumerate() {
            assert_eq!(found.tokens[place], token);
        }
        assert_eq!(found.tokens.iter().filter(|&&token| token < 267).count(), 267);
    }
}
