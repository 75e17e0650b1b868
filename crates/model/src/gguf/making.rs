//! How the tensors of a model are made of those of a GGUF file: which ones, which of their rows in which
//! order, and what is done to the numbers. `making/reverse.rs` goes the other way, for files that are written.

use finetune_gguf::{FileSet, TensorType};

use crate::config::family::Family;
use crate::config::{LatentConfig, ModelConfig};
use crate::gguf::architecture::{Architecture, GATED, in_layer, name_in_file, of_expert};

mod reverse;

/// Value heads in llama.cpp's order: the first of each key head, then the second of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tiles {
    /// Key heads.
    pub(super) keys: usize,
    /// Value heads of each.
    pub(super) each: usize,
    /// Rows or columns of a value head.
    pub(super) width: usize,
}

impl Tiles {
    /// Where a row or column of transformers' order lies in the file.
    fn place(self, row: usize) -> usize {
        let (head, inside) = (row / self.width, row % self.width);
        let (key, number) = (head / self.each, head % self.each);
        (number * self.keys + key) * self.width + inside
    }
}

/// Which rows of the tensors of the file, in the order of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rows {
    /// All rows of all tensors, one after the other.
    All,
    /// So many from this one on.
    Part { first: usize, count: usize },
    /// Within each of so many heads, first the even and then the odd ones: llama.cpp's order of what it
    /// turns, put back.
    Halves { heads: usize },
    /// The first rows as they are, then value heads.
    Tiled { before: usize, tiles: Tiles },
    /// For each key head its queries and keys, then its rows of the values, and of the second tensor.
    ByKeyHead { heads: usize, key: usize, values: usize },
}

impl Rows {
    /// The rows in the order of the model, as (tensor, row). `None`: as they lie. `counts`: rows of the
    /// tensors.
    pub(super) fn order(self, counts: &[usize]) -> Option<Vec<(usize, usize)>> {
        let rows = counts.first().copied().unwrap_or(0);
        match self {
            Rows::All => None,
            Rows::Part { first, count } => Some((first..first + count).map(|row| (0, row)).collect()),
            Rows::Halves { heads } => {
                let width = (rows / heads.max(1)).max(1);
                let half = (width / 2).max(1);
                let place = |row: usize| row / width * width + 2 * (row % width % half) + row % width / half;
                Some((0..rows).map(|row| (0, place(row))).collect())
            }
            Rows::Tiled { before, tiles } => {
                let place = |row: usize| if row < before { row } else { before + tiles.place(row - before) };
                Some((0..rows).map(|row| (0, place(row))).collect())
            }
            Rows::ByKeyHead { heads, key, values } => {
                let of_head = |head: usize| {
                    let queries = (head * key..(head + 1) * key).map(|row| (0, row));
                    let keys = (head * key..(head + 1) * key).map(move |row| (0, heads * key + row));
                    let own = head * values..(head + 1) * values;
                    let of_values = own.clone().map(move |row| (0, 2 * heads * key + row));
                    queries.chain(keys).chain(of_values).chain(own.map(|row| (1, row)))
                };
                Some((0..heads).flat_map(of_head).collect())
            }
        }
    }
}

/// What is done to the numbers once the rows are in order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Change {
    None,
    /// Norms have 1 added in the file.
    MinusOne,
    /// The file has -exp(x).
    LogOfNegative,
    /// Columns are those of value heads.
    Columns(Tiles),
    /// Keys [heads, rank, plain] and values [heads, value, rank] become heads of [plain + value, rank].
    KeysAndValues(LatentConfig),
}

/// How a tensor of the model is made.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Making {
    /// The tensors of the file, with their shapes.
    pub(super) sources: Vec<(String, Vec<usize>)>,
    pub(super) rows: Rows,
    pub(super) change: Change,
}

/// Rows of a tensor of this shape: all but the last dimension of a matrix or a stack, elements of a vector.
pub(super) fn rows_of(shape: &[usize]) -> usize {
    match shape {
        [elements] => *elements,
        [rows @ .., _] => rows.iter().product(),
        [] => 0,
    }
}

impl Making {
    fn whole(name: String, shape: &[usize]) -> Making {
        Making { sources: vec![(name, shape.to_vec())], rows: Rows::All, change: Change::None }
    }

    /// The number type that the tensor stays in; `None`: it is made of f32. `block`: elements of a block.
    pub(super) fn kind(&self, files: &FileSet, block: fn(TensorType) -> usize) -> Option<TensorType> {
        let mut kinds = self.sources.iter().map(|(name, _)| files.kind(name));
        let first = kinds.next().flatten()?;
        let is_one = kinds.all(|kind| kind == Some(first));
        let is_moved = match self.change {
            Change::None => true,
            Change::Columns(tiles) => tiles.width.is_multiple_of(block(first)),
            Change::MinusOne | Change::LogOfNegative | Change::KeysAndValues(_) => false,
        };
        (is_one && is_moved).then_some(first)
    }
}

/// What decides how tensors are made.
pub(super) struct Makings<'a> {
    /// Whether the file has a tensor of this name, or is written with one.
    pub(super) has: &'a dyn Fn(&str) -> bool,
    pub(super) config: &'a ModelConfig,
    pub(super) architecture: &'a Architecture,
}

impl Makings<'_> {
    /// How the tensor of this Hugging Face name and shape is made. `None`: llama.cpp has no place for it.
    pub(super) fn of(&self, name: &str, shape: &[usize]) -> Option<Making> {
        let family = self.config.family;
        let Some((layer, part)) = in_layer(name) else {
            return Some(self.changed(name, Making::whole(name_in_file(family, name)?, shape)));
        };
        let blk = |theirs: &str| format!("blk.{layer}.{theirs}");
        if let Some(expert) = of_expert(family, part) {
            return self.expert(layer, expert, shape);
        }
        if let (true, Some(sizes)) = (part == "self_attn.kv_b_proj.weight", self.config.latent) {
            return Some(self.keys_and_values(layer, sizes, shape));
        }
        if let (true, Some(delta)) = (part == "linear_attn.in_proj_qkvz.weight", self.config.delta) {
            let values = delta.value_heads * delta.value_dim;
            let hidden = self.config.hidden_size;
            let channels = 2 * delta.key_heads * delta.key_dim + values;
            let sources =
                vec![(blk("attn_qkv.weight"), vec![channels, hidden]), (blk("attn_gate.weight"), vec![values, hidden])];
            let rows = Rows::ByKeyHead { heads: delta.key_heads, key: delta.key_dim, values: values / delta.key_heads };
            return Some(Making { sources, rows, change: Change::None });
        }
        let theirs = name_in_file(family, name)?;
        if theirs.ends_with(".ffn_up.weight") && family.fused_gate_up && (self.has)(&blk("ffn_gate.weight")) {
            let half = vec![shape[0] / 2, shape[1]];
            let sources = vec![(blk("ffn_gate.weight"), half.clone()), (theirs, half)];
            return Some(Making { sources, rows: Rows::All, change: Change::None });
        }
        let mut making = Making::whole(self.norm(family, layer, theirs), shape);
        let taps = self.config.delta.map(|delta| delta.taps).or(self.config.convolution.map(|sizes| sizes.taps));
        if let (Some(taps), true) = (taps, is_convolution(name)) {
            making.sources[0].1 = vec![shape[0] / taps, taps];
        }
        making.rows = self.rows(layer, part);
        Some(self.changed(name, making))
    }

    /// Without a norm of what attention adds, that of what the feed-forward part reads has its name in some
    /// architectures.
    fn norm(&self, family: &Family, layer: usize, theirs: String) -> String {
        let other = format!("blk.{layer}.post_attention_norm.weight");
        let is_free = family.names.norms[1].is_none() && !(self.has)(&theirs) && (self.has)(&other);
        if theirs.ends_with(".ffn_norm.weight") && is_free { other } else { theirs }
    }

    /// An expert's tensor, in a stack of all experts: of one projection, or of gate and up.
    fn expert(&self, layer: usize, (n, place, half): (usize, usize, &str), shape: &[usize]) -> Option<Making> {
        let count = self.config.experts.as_ref()?.count;
        let stack = |part: &str, rows: usize| {
            let shape: Vec<usize> = [count, rows].into_iter().chain(shape.get(1).copied()).collect();
            (format!("blk.{layer}.ffn_{part}_exps.{half}"), shape)
        };
        let (mut source, mut first) = (stack(GATED[place], shape[0]), 0);
        if place < 2 && !(self.has)(&source.0) {
            let both = stack("gate_up", 2 * shape[0]);
            if (self.has)(&both.0) {
                (source, first) = (both, place * shape[0]);
            }
        }
        let all = source.1[1];
        // The rows of a stack of vectors are the vectors. Of those of gate and up half a row would be one's.
        let rows = match (shape.len(), all == shape[0]) {
            (1, true) => Rows::Part { first: n, count: 1 },
            (1, false) => return None,
            _ => Rows::Part { first: n * all + first, count: shape[0] },
        };
        Some(Making { sources: vec![source], rows, change: Change::None })
    }

    /// What makes keys and values of the short vector: as one matrix in older files, apart in newer ones.
    fn keys_and_values(&self, layer: usize, sizes: LatentConfig, shape: &[usize]) -> Making {
        let whole = format!("blk.{layer}.attn_kv_b.weight");
        if (self.has)(&whole) {
            return Making::whole(whole, shape);
        }
        let heads = self.config.heads;
        let sources = vec![
            (format!("blk.{layer}.attn_k_b.weight"), vec![heads, sizes.rank, sizes.plain]),
            (format!("blk.{layer}.attn_v_b.weight"), vec![heads, sizes.value, sizes.rank]),
        ];
        Making { sources, rows: Rows::All, change: Change::KeysAndValues(sizes) }
    }

    /// In which order the rows of a part of a layer lie.
    fn rows(&self, layer: usize, part: &str) -> Rows {
        let module = part.rsplit_once('.').map_or(part, |(module, _)| module);
        if self.architecture.interleaved {
            match module {
                "self_attn.q_proj" => return Rows::Halves { heads: self.config.heads },
                "self_attn.k_proj" => return Rows::Halves { heads: self.config.layers[layer].key_value_heads },
                _ => {}
            }
        }
        let Some(delta) = self.config.delta.filter(|_| self.architecture.tiled) else { return Rows::All };
        let tiled = |before, width| {
            let tiles = Tiles { keys: delta.key_heads, each: delta.value_heads / delta.key_heads, width };
            Rows::Tiled { before, tiles }
        };
        let before = 2 * delta.key_heads * delta.key_dim;
        match part {
            "linear_attn.in_proj_qkv.weight" | "linear_attn.conv1d.weight" => tiled(before, delta.value_dim),
            "linear_attn.in_proj_z.weight" => tiled(0, delta.value_dim),
            "linear_attn.in_proj_b.weight"
            | "linear_attn.in_proj_a.weight"
            | "linear_attn.A_log"
            | "linear_attn.dt_bias" => tiled(0, 1),
            _ => Rows::All,
        }
    }

    /// The making with what is done to the numbers of this tensor.
    fn changed(&self, name: &str, making: Making) -> Making {
        let change = if name.ends_with(".linear_attn.A_log") {
            Change::LogOfNegative
        } else if self.config.family.adds_one_to(name) {
            Change::MinusOne
        } else if let (Some(delta), true) =
            (self.config.delta.filter(|_| self.architecture.tiled), name.ends_with(".linear_attn.out_proj.weight"))
        {
            let each = delta.value_heads / delta.key_heads;
            Change::Columns(Tiles { keys: delta.key_heads, each, width: delta.value_dim })
        } else {
            Change::None
        };
        Making { change, ..making }
    }
}

/// Whether a tensor of this name is the kernel of a convolution: [channels, 1, taps] in a Hugging Face
/// directory.
pub(super) fn is_convolution(name: &str) -> bool {
    name.ends_with(".conv1d.weight") || name.ends_with(".conv.conv.weight")
}

/// Rows of bytes or numbers in another order. `sources`: of each tensor its elements and how many a row has.
pub(super) fn gathered<T: Copy>(sources: &[(Vec<T>, usize)], order: Option<&[(usize, usize)]>) -> Vec<T> {
    match order {
        None => sources.iter().flat_map(|(elements, _)| elements).copied().collect(),
        Some(order) => {
            let row = |&(source, row): &(usize, usize)| {
                let (elements, width) = &sources[source];
                &elements[row * width..(row + 1) * width]
            };
            order.iter().flat_map(row).copied().collect()
        }
    }
}

/// Rows of value heads of `unit` elements a column of [`Tiles::width`], in transformers' order. `width`:
/// elements of a row.
pub(super) fn columns_in_order<T: Copy>(elements: &[T], width: usize, tiles: Tiles) -> Vec<T> {
    let heads = tiles.keys * tiles.each;
    let unit = width / heads;
    let order = Tiles { width: 1, ..tiles };
    let row = |row: &[T]| -> Vec<T> {
        (0..heads).flat_map(|head| &row[order.place(head) * unit..(order.place(head) + 1) * unit]).copied().collect()
    };
    elements.chunks_exact(width).flat_map(row).collect()
}

/// Keys [heads, rank, plain] and values [heads, value, rank] as heads of [plain + value, rank].
pub(super) fn joined(keys: &[f32], values: &[f32], sizes: LatentConfig) -> Vec<f32> {
    let LatentConfig { rank, plain, value, .. } = sizes;
    let mut out = Vec::with_capacity(keys.len() + values.len());
    for (keys, values) in keys.chunks_exact(rank * plain).zip(values.chunks_exact(value * rank)) {
        for row in 0..plain {
            out.extend((0..rank).map(|column| keys[column * plain + row]));
        }
        out.extend_from_slice(values);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rows of tensors whose elements are their numbers.
    fn numbers(rows: Rows, counts: &[usize]) -> Vec<(usize, usize)> {
        rows.order(counts).expect("another order")
    }

    /// Two key heads with three value heads each, of two rows: the file has the first of each, then the second.
    #[test]
    fn value_heads_go_back_to_their_key_heads() {
        let tiles = Tiles { keys: 2, each: 3, width: 2 };
        let order: Vec<usize> = (0..12).map(|row| tiles.place(row)).collect();
        assert_eq!(order, [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]);
        let tiled = numbers(Rows::Tiled { before: 4, tiles }, &[16]);
        assert_eq!(tiled.iter().map(|(_, row)| *row).take(8).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 8, 9]);
        // Each head has bytes of its own, three of them here.
        let row: Vec<u8> = (0..18).collect();
        let columns = columns_in_order(&row, 18, tiles);
        assert_eq!(columns, [0, 1, 2, 6, 7, 8, 12, 13, 14, 3, 4, 5, 9, 10, 11, 15, 16, 17]);
    }

    #[test]
    fn rows_go_key_head_by_key_head() {
        let order = numbers(Rows::ByKeyHead { heads: 2, key: 1, values: 2 }, &[8, 4]);
        let first = [(0, 0), (0, 2), (0, 4), (0, 5), (1, 0), (1, 1)];
        let second = [(0, 1), (0, 3), (0, 6), (0, 7), (1, 2), (1, 3)];
        assert_eq!(order, [first, second].concat());
    }

    /// One head of two keys and one value, made of vectors of three.
    #[test]
    fn keys_are_transposed_in_front_of_values() {
        let sizes = LatentConfig { query_rank: None, rank: 3, plain: 2, turned: 2, value: 1 };
        let joined = joined(&[1.0, 4.0, 2.0, 5.0, 3.0, 6.0], &[7.0, 8.0, 9.0], sizes);
        assert_eq!(joined, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]);
    }
}
