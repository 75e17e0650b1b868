//! The numbers of a file's tensors, made of those of the model's: the reverse of what is done to read them.

use super::{Change, Making, Rows, Tiles, rows_of};
use crate::config::LatentConfig;

impl Making {
    /// The numbers of one of the file's tensors, or what the model's tensor is of it. `values`: those of the
    /// model's tensor.
    pub(in crate::gguf) fn numbers_of(&self, source: usize, mut values: Vec<f32>) -> Vec<f32> {
        match self.change {
            Change::None => {}
            Change::MinusOne => values.iter_mut().for_each(|value| *value += 1.0),
            Change::LogOfNegative => values.iter_mut().for_each(|value| *value = -value.exp()),
            Change::Columns(tiles) => {
                let width = self.sources[source].1.last().copied().unwrap_or(1);
                values = columns_in_file(&values, width, tiles);
            }
            Change::KeysAndValues(sizes) => return apart(&values, sizes, source == 0),
        }
        self.rows_of(source, values)
    }

    /// Rows of the model's tensor as one of the file's tensors has them.
    fn rows_of(&self, source: usize, values: Vec<f32>) -> Vec<f32> {
        let counts: Vec<usize> = self.sources.iter().map(|(_, shape)| rows_of(shape)).collect();
        let order = match self.rows {
            Rows::Part { .. } => return values,
            Rows::All if counts.len() == 1 => return values,
            Rows::All => (0..counts.len()).flat_map(|n| (0..counts[n]).map(move |row| (n, row))).collect(),
            rows => rows.order(&counts).unwrap_or_default(),
        };
        let width = values.len() / order.len().max(1);
        let mut out = vec![0.0; counts[source] * width];
        for (&(from, row), numbers) in order.iter().zip(values.chunks_exact(width.max(1))) {
            if from == source {
                out[row * width..(row + 1) * width].copy_from_slice(numbers);
            }
        }
        out
    }

    /// Whether the numbers of the model's tensor lie in the file as they are, one behind the other.
    pub(in crate::gguf) fn is_as_it_is(&self) -> bool {
        let is_in_order = matches!(self.rows, Rows::All | Rows::Part { .. });
        self.change == Change::None && is_in_order && self.sources.len() == 1
    }

    /// The first row of the file's tensor that is made of the model's.
    pub(in crate::gguf) fn first_row(&self) -> usize {
        if let Rows::Part { first, .. } = self.rows { first } else { 0 }
    }

    /// Whether the file has a matrix that is this one by itself, so that it can have a branch.
    pub(in crate::gguf) fn has_branch(&self) -> bool {
        let is_moved = matches!(self.change, Change::None | Change::Columns(_));
        is_moved && self.sources.len() == 1 && !matches!(self.rows, Rows::Part { .. })
    }

    /// The halves of a LoRA branch of this matrix as the file's matrix has them. `a`: [r, i], `b`: [o, r]. `None`:
    /// the file has no matrix that is this one by itself.
    pub(in crate::gguf) fn halves_of_branch(&self, a: Vec<f32>, b: Vec<f32>) -> Option<[Vec<f32>; 2]> {
        let (_, shape) = self.sources.first().filter(|_| self.has_branch())?;
        let a = match self.change {
            Change::Columns(tiles) => columns_in_file(&a, shape.last().copied().unwrap_or(1), tiles),
            _ => a,
        };
        Some([a, self.rows_of(0, b)])
    }
}

/// Columns of value heads in llama.cpp's order. `width`: elements of a row.
fn columns_in_file(values: &[f32], width: usize, tiles: Tiles) -> Vec<f32> {
    let heads = tiles.keys * tiles.each;
    let (unit, order) = (width / heads, Tiles { width: 1, ..tiles });
    let mut out = vec![0.0; values.len()];
    for (to, from) in out.chunks_exact_mut(width).zip(values.chunks_exact(width)) {
        for (head, numbers) in from.chunks_exact(unit).enumerate() {
            let place = order.place(head) * unit;
            to[place..place + unit].copy_from_slice(numbers);
        }
    }
    out
}

/// Of heads of [plain + value, rank] the keys as [heads, rank, plain], or the values as [heads, value, rank].
fn apart(values: &[f32], sizes: LatentConfig, are_keys: bool) -> Vec<f32> {
    let LatentConfig { rank, plain, value, .. } = sizes;
    let mut out = Vec::new();
    for head in values.chunks_exact((plain + value) * rank) {
        let (keys, values) = head.split_at(plain * rank);
        if are_keys {
            out.extend((0..rank * plain).map(|place| keys[place % plain * rank + place / plain]));
        } else {
            out.extend_from_slice(values);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::{columns_in_order, gathered, joined};
    use super::*;

    fn making(shapes: &[&[usize]], rows: Rows, change: Change) -> Making {
        let sources = shapes.iter().map(|shape| ("blk.0.attn_q.weight".to_owned(), shape.to_vec())).collect();
        Making { sources, rows, change }
    }

    fn counted(count: usize) -> Vec<f32> {
        (0..count).map(|number| number as f32).collect()
    }

    /// Two heads of four rows, of two columns each: llama.cpp's
    /// `reshape(heads, 2, 2, columns).swapaxes(1, 2)`.
    #[test]
    fn rows_of_heads_in_the_order_of_llama_cpp() {
        let query = making(&[&[8, 2]], Rows::Halves { heads: 2 }, Change::None);
        let out = query.numbers_of(0, counted(16));
        let rows: Vec<f32> = out.chunks(2).map(|row| row[0] / 2.0).collect();
        assert_eq!(rows, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        assert!(out.chunks(2).all(|row| row[1] == row[0] + 1.0));
    }

    /// What is read of what was written is the same, for each order of rows.
    #[test]
    fn rows_go_there_and_back() {
        let tiles = Tiles { keys: 2, each: 3, width: 2 };
        for (shapes, rows) in [
            (vec![vec![12, 3]], Rows::Halves { heads: 2 }),
            (vec![vec![16, 3]], Rows::Tiled { before: 4, tiles }),
            (vec![vec![16]], Rows::Tiled { before: 4, tiles }),
            (vec![vec![8, 3], vec![4, 3]], Rows::ByKeyHead { heads: 2, key: 1, values: 2 }),
            (vec![vec![4, 3], vec![4, 3]], Rows::All),
        ] {
            let shapes: Vec<&[usize]> = shapes.iter().map(Vec::as_slice).collect();
            let making = making(&shapes, rows, Change::None);
            let ours = counted(shapes.iter().map(|shape| shape.iter().product::<usize>()).sum());
            let part = |(n, shape): (usize, &&[usize])| {
                (making.numbers_of(n, ours.clone()), shape.get(1).copied().unwrap_or(1))
            };
            let theirs: Vec<(Vec<f32>, usize)> = shapes.iter().enumerate().map(part).collect();
            let counts: Vec<usize> = shapes.iter().map(|shape| shape[0]).collect();
            assert_eq!(gathered(&theirs, rows.order(&counts).as_deref()), ours, "{rows:?}");
        }
    }

    #[test]
    fn numbers_go_there_and_back() {
        let tiles = Tiles { keys: 2, each: 3, width: 2 };
        let columns = making(&[&[2, 12]], Rows::All, Change::Columns(tiles));
        let written = columns.numbers_of(0, counted(24));
        assert_ne!(written, counted(24));
        assert_eq!(columns_in_order(&written, 12, tiles), counted(24));

        let sizes = LatentConfig { query_rank: None, rank: 3, plain: 2, turned: 2, value: 1 };
        let latent = making(&[&[2, 3, 2], &[2, 1, 3]], Rows::All, Change::KeysAndValues(sizes));
        let (keys, values) = (latent.numbers_of(0, counted(18)), latent.numbers_of(1, counted(18)));
        assert_eq!(keys[..6], [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        assert_eq!(joined(&keys, &values, sizes), counted(18));

        let norm = making(&[&[2]], Rows::All, Change::MinusOne);
        assert_eq!(norm.numbers_of(0, vec![0.5, -1.0]), [1.5, 0.0]);
        let rate = making(&[&[1]], Rows::All, Change::LogOfNegative);
        assert_eq!(rate.numbers_of(0, vec![0.0]), [-1.0]);
    }

    /// B has the rows of the matrix, A its columns.
    #[test]
    fn halves_of_branches() {
        let query = making(&[&[4, 2]], Rows::Halves { heads: 1 }, Change::None);
        let halves = query.halves_of_branch(counted(2), counted(4)).expect("a matrix of its own");
        assert_eq!(halves, [vec![0.0, 1.0], vec![0.0, 2.0, 1.0, 3.0]]);
        let tiles = Tiles { keys: 2, each: 2, width: 1 };
        let output = making(&[&[3, 4]], Rows::All, Change::Columns(tiles));
        let halves = output.halves_of_branch(counted(4), counted(3)).expect("a matrix of its own");
        assert_eq!(halves, [vec![0.0, 2.0, 1.0, 3.0], counted(3)]);
        let expert = making(&[&[2, 4, 2]], Rows::Part { first: 0, count: 4 }, Change::None);
        assert_eq!(expert.halves_of_branch(counted(2), counted(4)), None);
    }
}
