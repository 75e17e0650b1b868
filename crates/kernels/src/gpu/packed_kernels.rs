//! Kernels over packed matrices: rows decoded into a tensor, and the product with a few rows.
//!
//! A value is computed in f32 by the operations of `PackedMatrix::value`, in its order
//! ([`super::packed_numbers`] has the numbers). What cannot be held to: devices may take f32 numbers
//! below 2^-126 for zero.

#![allow(clippy::too_many_arguments, reason = "a kernel takes its buffers and sizes one by one")]
#![allow(clippy::collapsible_if, reason = "what is known at compile time is asked on its own")]
#![allow(clippy::needless_range_loop, reason = "loops over registers are unrolled by their index")]

use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;

use super::packed_numbers::{Grid, NumberKind, byte_of, f16_value, number_of, on_grid};
use super::reduce::sum_of_units;

/// The [`Form::group_shift`] of groups whose size is no power of two.
pub(super) const NO_SHIFT: u32 = 32;

/// What a code means: `finetune_packed::Decoder`, and the bits of a float.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Meaning {
    Affine,
    Shifted,
    Table,
    /// The code is a number of 16 bits, of the kind of the scales. There are no groups.
    Float,
}

/// Which elements share a scale: `finetune_packed::Groups`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Grouping {
    Blocks,
    Flat,
    OfColumns,
}

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Form {
    /// Bits of a code: 2 to 8, or 16.
    pub(super) bits: usize,
    /// Whether the high half of a byte comes first.
    pub(super) high_first: bool,
    /// Whether a code may lie in two words.
    pub(super) crossing: bool,
    /// Whether each row starts with a word, and each word with a code.
    pub(super) aligned: bool,
    /// Columns that a unit of [`few_rows_kernel`] decodes at a time: those of one word if rows are
    /// aligned.
    pub(super) span: usize,
    /// Whether the columns of a span share a group.
    pub(super) steady: bool,
    pub(super) grouping: Grouping,
    /// log2 of the elements (of a row) in a group, or [`NO_SHIFT`].
    pub(super) group_shift: u32,
    pub(super) meaning: Meaning,
    pub(super) scales: NumberKind,
    /// Of [`Meaning::Affine`].
    pub(super) biases: NumberKind,
    /// Whether each group has a zero point of its own.
    pub(super) each_zero: bool,
    /// Whether a value is multiplied by [`PackedArgument::factor`].
    pub(super) factor: bool,
    /// What the file rounds a value to.
    pub(super) rounding: Grid,
}

impl Form {
    /// The bits of a code, set.
    fn mask(&self) -> u32 {
        (1 << self.bits) - 1
    }

    /// The first bit of code `n` of a word.
    fn bit_of(&self, n: usize) -> u32 {
        let bit = (n * self.bits) as u32;
        if self.high_first { bit ^ 4 } else { bit }
    }
}

/// Sizes of a packed matrix, and where its lists begin among the words of the tables.
#[derive(CubeType, CubeLaunch, Clone, Copy, Debug)]
pub(super) struct PackedArgument {
    pub(super) columns: usize,
    /// Whole words from the start of one row to that of the next.
    pub(super) row_words: usize,
    /// Bits from the start of one row to that of the next, beyond the whole words.
    pub(super) row_bits: usize,
    /// Rows of a group.
    pub(super) group_rows: usize,
    /// Columns of a group, or elements of a flat one.
    pub(super) group_size: usize,
    /// Groups of a row.
    pub(super) row_groups: usize,
    pub(super) scales: usize,
    /// The factors of scales that are products, and how many share a scale.
    pub(super) scale_factors: usize,
    pub(super) factors_a_scale: usize,
    pub(super) biases: usize,
    /// The factors of biases that are products, and how many share a bias.
    pub(super) bias_factors: usize,
    pub(super) factors_a_bias: usize,
    /// Zero points of the groups.
    pub(super) zeros: usize,
    /// The zero point of all elements.
    pub(super) zero: f32,
    /// Multiplied last.
    pub(super) factor: f32,
    /// The values of the codes.
    pub(super) table: usize,
    /// The group of each column.
    pub(super) column_groups: usize,
    /// 0. See [`rounded`].
    pub(super) nothing: u32,
}

impl PackedArgument {
    /// The argument of a launch.
    pub(super) fn launch(&self) -> PackedArgumentLaunch {
        PackedArgumentLaunch::new(
            self.columns,
            self.row_words,
            self.row_bits,
            self.group_rows,
            self.group_size,
            self.row_groups,
            self.scales,
            self.scale_factors,
            self.factors_a_scale,
            self.biases,
            self.bias_factors,
            self.factors_a_bias,
            self.zeros,
            self.zero,
            self.factor,
            self.table,
            self.column_groups,
            self.nothing,
        )
    }
}

/// The product, rounded. A compiler that fuses it with the sum that follows would have to know that
/// `nothing` is 0, and it is an argument of the kernel.
#[cube]
fn rounded(product: f32, nothing: u32) -> f32 {
    f32::reinterpret(u32::reinterpret(product) ^ nothing)
}

/// `n / size`, where size is 2^shift unless shift is [`NO_SHIFT`].
#[cube]
fn divided(n: usize, size: usize, #[comptime] shift: u32) -> usize {
    if comptime!(shift < NO_SHIFT) { ((n as u32) >> shift) as usize } else { n / size }
}

/// The group of an element: `finetune_packed::Groups::of`.
#[cube]
fn group_of(tables: &[u32], place: &PackedArgument, row: usize, column: usize, #[comptime] form: Form) -> usize {
    if comptime!(form.grouping == Grouping::OfColumns) {
        row * place.row_groups + tables[place.column_groups + column] as usize
    } else if comptime!(form.grouping == Grouping::Flat) {
        divided(row * place.columns + column, place.group_size, form.group_shift)
    } else {
        row / place.group_rows * place.row_groups + divided(column, place.group_size, form.group_shift)
    }
}

/// The scale of a group.
#[cube]
fn scale_of(tables: &[u32], place: &PackedArgument, group: usize, #[comptime] form: Form) -> f32 {
    number_of(tables, place.scales, place.scale_factors, place.factors_a_scale, group, form.scales)
}

/// The bias of a group, or its zero point.
#[cube]
fn offset_of(tables: &[u32], place: &PackedArgument, group: usize, #[comptime] form: Form) -> f32 {
    if comptime!(form.meaning == Meaning::Affine) {
        number_of(tables, place.biases, place.bias_factors, place.factors_a_bias, group, form.biases)
    } else if comptime!(form.each_zero) {
        f32::cast_from(byte_of(tables, place.zeros, group))
    } else {
        place.zero
    }
}

/// The code of an element: `finetune_packed::Codes::code`.
#[cube]
fn code_of(words: &[u32], place: &PackedArgument, row: usize, column: usize, #[comptime] form: Form) -> u32 {
    let start = row * place.row_bits + column * form.bits;
    let word = row * place.row_words + start / 32;
    let bit = (start % 32) as u32;
    let bit = if comptime!(form.high_first) { bit ^ 4u32 } else { bit };
    let low = words[word] >> bit;
    let mut code = low;
    if comptime!(form.crossing) {
        if bit + comptime!(form.bits as u32) > 32u32 {
            code = low | (words[word + 1] << (32u32 - bit));
        }
    }
    code & comptime!(form.mask())
}

/// The value of a code: `finetune_packed::PackedMatrix::value_of`, then rounded to `grid`.
#[cube]
fn value_of(
    tables: &[u32],
    place: &PackedArgument,
    code: u32,
    scale: f32,
    offset: f32,
    #[comptime] form: Form,
    #[comptime] grid: Grid,
) -> f32 {
    let value = if comptime!(form.meaning == Meaning::Affine) {
        rounded(f32::cast_from(code) * scale, place.nothing) + offset
    } else if comptime!(form.meaning == Meaning::Shifted && form.factor) {
        rounded((f32::cast_from(code) - offset) * scale, place.nothing) * place.factor
    } else if comptime!(form.meaning == Meaning::Shifted) {
        (f32::cast_from(code) - offset) * scale
    } else if comptime!(form.meaning == Meaning::Table) {
        f32::reinterpret(tables[place.table + code as usize]) * scale
    } else if comptime!(form.scales == NumberKind::F16) {
        f16_value(code)
    } else {
        f32::reinterpret(code << 16u32)
    };
    on_grid(on_grid(value, form.rounding), grid)
}

/// Rows of a packed matrix: `rows` if `gathered`, else from row `first` on. One cube a row.
#[cube(launch_unchecked)]
pub(super) fn decode_kernel<T: Float>(
    words: &[u32],
    tables: &[u32],
    rows: &[u32],
    out: &mut [T],
    place: &PackedArgument,
    first: usize,
    #[comptime] form: Form,
    #[comptime] grid: Grid,
    #[comptime] gathered: bool,
    #[comptime] units: usize,
    #[define(T)] _dtype: ElemType,
) {
    let out_row = CUBE_POS;
    let start = out_row * place.columns;
    if start >= out.len() {
        terminate!();
    }
    let mut row = first + out_row;
    if comptime!(gathered) {
        row = rows[out_row] as usize;
    }
    let mut column = UNIT_POS as usize;
    while column < place.columns {
        let code = code_of(words, place, row, column, form);
        let group = group_of(tables, place, row, column, form);
        let scale = scale_of(tables, place, group, form);
        let offset = offset_of(tables, place, group, form);
        let value = value_of(tables, place, code, scale, offset, form, grid);
        out[start + column] = T::cast_from(value);
        column += units;
    }
}

/// `x Wᵀ` for x [tokens, columns] of a few tokens. One cube an output.
///
/// Each unit sums every `units`-th span of the row, column after column. The sums of the units are
/// then added in a tree. The order does not depend on the number of tokens.
#[cube(launch_unchecked)]
pub(super) fn few_rows_kernel<T: Float>(
    words: &[u32],
    tables: &[u32],
    x: &[T],
    out: &mut [T],
    place: &PackedArgument,
    outputs: usize,
    #[comptime] form: Form,
    #[comptime] grid: Grid,
    #[comptime] tokens: usize,
    #[comptime] units: usize,
    #[define(T)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= outputs {
        terminate!();
    }
    let span = comptime!(form.span);
    let columns = place.columns;
    let mut sums = Array::<f32>::new(tokens);
    #[unroll]
    for t in 0..tokens {
        sums[t] = 0.0f32;
    }
    let mut first = UNIT_POS as usize * span;
    while first < columns {
        let mut word = 0u32;
        if comptime!(form.aligned) {
            word = words[row * place.row_words + first / span];
        }
        let mut scale = 0.0f32;
        let mut offset = 0.0f32;
        if comptime!(form.steady && form.meaning != Meaning::Float) {
            let group = group_of(tables, place, row, first, form);
            scale = scale_of(tables, place, group, form);
            offset = offset_of(tables, place, group, form);
        }
        #[unroll]
        for n in 0..span {
            let column = first + n;
            if column < columns {
                if comptime!(!form.steady) {
                    let group = group_of(tables, place, row, column, form);
                    scale = scale_of(tables, place, group, form);
                    offset = offset_of(tables, place, group, form);
                }
                let code = if comptime!(form.aligned) {
                    (word >> comptime!(form.bit_of(n))) & comptime!(form.mask())
                } else {
                    code_of(words, place, row, column, form)
                };
                let weight = value_of(tables, place, code, scale, offset, form, grid);
                #[unroll]
                for t in 0..tokens {
                    sums[t] += weight * f32::cast_from(x[t * columns + column]);
                }
            }
        }
        first += units * span;
    }
    #[unroll]
    for t in 0..tokens {
        let sum = sum_of_units(sums[t], units);
        if UNIT_POS == 0 {
            out[t * outputs + row] = T::cast_from(sum);
        }
    }
}
