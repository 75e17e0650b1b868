//! The internal form of all packed formats, and the value of an element.

use half::{bf16, f16};

use crate::codes::Codes;
use crate::numbers::Numbers;

/// What a code means.
#[derive(Clone, Debug)]
pub enum Decoder {
    /// `code · scale + bias`: the product is rounded, then the sum.
    Affine {
        /// One for each scale.
        biases: Numbers,
    },
    /// `(code - zero) · scale · factor`, from left to right. Only bitsandbytes' int8 has another
    /// factor than 1.
    Shifted {
        /// What is taken off the codes, exactly.
        zeros: Zeros,
        /// Multiplied last.
        factor: f32,
    },
    /// `table[code] · scale`
    Table {
        /// One value for each code.
        table: Vec<f32>,
    },
}

/// Zero points of [`Decoder::Shifted`].
#[derive(Clone, Debug)]
pub enum Zeros {
    /// The same for all elements.
    All(u8),
    /// One for each scale.
    Each(Vec<u8>),
}

/// Which elements share a scale.
#[derive(Clone, Debug)]
pub enum Groups {
    /// Blocks of `rows × columns`, row-major; those at the edges may be smaller. One row and some
    /// columns are the groups of MLX and most others, one row and all columns a scale a row.
    Blocks {
        /// Rows of a block.
        rows: usize,
        /// Columns of a block.
        columns: usize,
    },
    /// So many elements of the matrix written as one line: they may go on in the next row.
    Flat {
        /// Elements of a block.
        elements: usize,
    },
    /// The group of each column, [columns], in every row: GPTQ's "act-order". `count` groups a row.
    OfColumns {
        /// The group of each column.
        group: Vec<u32>,
        /// Groups of a row.
        count: usize,
    },
}

/// What a value is rounded to at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// It stays f32.
    None,
    /// IEEE half, to the nearest.
    F16,
    /// bfloat16, to the nearest.
    BF16,
}

/// A matrix [rows, columns] in a few bits an element.
#[derive(Clone, Debug)]
pub struct PackedMatrix {
    /// [o, i] of a linear layer, [v, hidden] of an embedding.
    pub shape: [usize; 2],
    /// One code for each element.
    pub codes: Codes,
    /// One for each group.
    pub scales: Numbers,
    /// Which elements share a scale (and a bias, and a zero point).
    pub groups: Groups,
    /// What a code means.
    pub decoder: Decoder,
    /// What the value is rounded to: of bitsandbytes' 4-bit forms the type that their file names.
    pub rounding: Rounding,
}

impl Groups {
    /// How many groups a matrix of this shape has.
    pub fn count(&self, [rows, columns]: [usize; 2]) -> usize {
        match self {
            Groups::Blocks { rows: r, columns: c } => rows.div_ceil(*r) * columns.div_ceil(*c),
            Groups::Flat { elements } => (rows * columns).div_ceil(*elements),
            Groups::OfColumns { count, .. } => rows * count,
        }
    }

    /// The group of an element of a matrix with so many columns.
    #[inline]
    pub fn of(&self, columns: usize, row: usize, column: usize) -> usize {
        match self {
            Groups::Blocks { rows: r, columns: c } => row / r * columns.div_ceil(*c) + column / c,
            Groups::Flat { elements } => (row * columns + column) / elements,
            Groups::OfColumns { group, count } => row * count + group[column] as usize,
        }
    }
}

impl PackedMatrix {
    /// The value of an element. Every other way to decode has the same bits.
    pub fn value(&self, row: usize, column: usize) -> f32 {
        let group = self.groups.of(self.shape[1], row, column);
        self.value_of(self.codes.code(row, column), group)
    }

    /// The value of a code in a group.
    pub fn value_of(&self, code: u32, group: usize) -> f32 {
        let scale = self.scales.get(group);
        let value = match &self.decoder {
            Decoder::Affine { biases } => code as f32 * scale + biases.get(group),
            Decoder::Shifted { zeros, factor } => {
                let zero = match zeros {
                    Zeros::All(zero) => *zero,
                    Zeros::Each(zeros) => zeros[group],
                };
                (code as i32 - i32::from(zero)) as f32 * scale * factor
            }
            Decoder::Table { table } => table[code as usize] * scale,
        };
        match self.rounding {
            Rounding::None => value,
            Rounding::F16 => f16::from_f32(value).to_f32(),
            Rounding::BF16 => bf16::from_f32(value).to_f32(),
        }
    }

    /// Bytes that it takes in memory.
    pub fn bytes(&self) -> usize {
        let of_decoder = match &self.decoder {
            Decoder::Affine { biases } => biases.bytes(),
            Decoder::Shifted { zeros: Zeros::Each(zeros), .. } => zeros.len(),
            Decoder::Shifted { .. } => 0,
            Decoder::Table { table } => 4 * table.len(),
        };
        self.codes.bytes().len() + self.scales.bytes() + of_decoder
    }
}
