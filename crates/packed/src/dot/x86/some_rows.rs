//! Rows of codes that are unpacked together.

use super::{AHEAD, prefetch_at};
use crate::dot::{HALF, LINE};
use crate::matrix::Rounding;
use crate::values::{Meaning, Piece};

// How a code becomes a number.
/// Of 4 bits, `code · scale + bias`, ...
pub(super) const FOUR_AFFINE: usize = 0;
/// ... or the same in one operation, where that has the same bits, ...
pub(super) const FOUR_AFFINE_AT_ONCE: usize = 1;
/// ... `number · scale`, with the number that each code stands for, ...
pub(super) const FOUR_SIGNED: usize = 2;
/// ... `(code - zero) · scale`, ...
pub(super) const FOUR_SHIFTED: usize = 3;
/// ... with a factor, ...
pub(super) const FOUR_SCALED: usize = 4;
/// ... or rounded in the end.
pub(super) const FOUR_ROUNDED: usize = 5;
pub(super) const LAST_OF_FOUR_BITS: usize = FOUR_ROUNDED;
/// Of 8 bits, `code · scale + bias`, ...
pub(super) const EIGHT_AFFINE: usize = 6;
/// ... or the same in one operation, where that has the same bits, ...
pub(super) const EIGHT_AFFINE_AT_ONCE: usize = 7;
/// ... `(code - zero) · scale · factor`, ...
pub(super) const EIGHT_SHIFTED: usize = 8;
/// ... or `code · scale` of codes with a sign.
pub(super) const EIGHT_SIGNED: usize = 9;

/// The zero point of numbers of 8 bits with a sign. Their codes have this bit the other way round.
pub(super) const SIGN: u8 = 0x80;

/// Calls a function that is compiled for each form.
macro_rules! with_form {
    ($some:ident.$function:ident($($argument:expr),*)) => {
        match $some.form {
            0 => $some.$function::<0>($($argument),*),
            1 => $some.$function::<1>($($argument),*),
            2 => $some.$function::<2>($($argument),*),
            3 => $some.$function::<3>($($argument),*),
            4 => $some.$function::<4>($($argument),*),
            5 => $some.$function::<5>($($argument),*),
            6 => $some.$function::<6>($($argument),*),
            7 => $some.$function::<7>($($argument),*),
            8 => $some.$function::<8>($($argument),*),
            _ => $some.$function::<9>($($argument),*),
        }
    };
}
pub(super) use with_form;

/// The form of the codes of a piece.
fn form_of(piece: &Piece) -> usize {
    // Products of codes with scales are not rounded then.
    let are_exact = piece.has_short_scales;
    match (piece.codes.bits(), piece.rounding, piece.meaning) {
        (4, Rounding::None, Meaning::Affine) if are_exact => FOUR_AFFINE_AT_ONCE,
        (4, Rounding::None, Meaning::Affine) => FOUR_AFFINE,
        (4, Rounding::None, Meaning::Shifted { zero: None }) if piece.factor == 1.0 => FOUR_SHIFTED,
        (4, Rounding::None, _) if piece.factor == 1.0 => FOUR_SIGNED,
        (4, Rounding::None, _) => FOUR_SCALED,
        (4, ..) => FOUR_ROUNDED,
        (_, _, Meaning::Affine) if are_exact => EIGHT_AFFINE_AT_ONCE,
        (_, _, Meaning::Affine) => EIGHT_AFFINE,
        (.., Meaning::Shifted { zero: Some(SIGN) }) if piece.factor == 1.0 => EIGHT_SIGNED,
        _ => EIGHT_SHIFTED,
    }
}

/// Rows of whole blocks.
pub(super) struct SomeRows<'a> {
    pub(super) piece: &'a Piece<'a>,
    /// What the codes of 4 bits stand for, less the zero point in [`FOUR_SIGNED`].
    pub(super) factors: [f32; 16],
    /// One of those above.
    pub(super) form: usize,
    /// Halves of blocks in a row.
    pub(super) halves: usize,
    /// Halves of a group, and groups of a row.
    pub(super) period: usize,
    pub(super) groups: usize,
    /// Bytes from one row to the next.
    stride: usize,
}

impl<'a> SomeRows<'a> {
    /// So many rows of a piece.
    pub(super) fn new(piece: &'a Piece<'a>, factors: &'a [f32; 16], rows: usize, halves: usize) -> SomeRows<'a> {
        let (stride, groups) = (piece.codes.row_bits() / 8, piece.scales.len() / rows.max(1));
        let period = (piece.period / HALF).clamp(1, halves.max(1));
        let bytes = rows.saturating_sub(1) * stride + halves * HALF * piece.codes.bits() / 8;
        assert!(matches!(piece.codes.bits(), 4 | 8), "a form for codes of {} bits", piece.codes.bits());
        assert!(piece.bit / 8 + bytes <= piece.codes.bytes().len(), "rows beyond the codes");
        assert!(halves.div_ceil(period) <= groups, "more groups than numbers");
        for numbers in [piece.scales, piece.zeros, piece.biases] {
            assert!(numbers.len() >= rows * groups, "a number for each group");
        }
        let form = form_of(piece);
        let factors = match piece.meaning {
            Meaning::Shifted { zero: Some(zero) } if form == FOUR_SIGNED => factors.map(|code| code - f32::from(zero)),
            _ => *factors,
        };
        SomeRows { piece, factors, form, halves, period, groups, stride }
    }

    /// Calls `half` with the number of half of a block, from 0 on, the place of its codes of B bits in each of N rows from
    /// one on, and what `of_group` says of its group in each.
    #[inline(always)]
    pub(super) fn each_half<const N: usize, const B: usize, T: Copy>(
        &self,
        first: usize,
        empty: T,
        of_group: impl Fn(usize) -> T,
        mut half: impl FnMut(usize, &[*const u8; N], &[T; N]),
    ) {
        let bytes = HALF * B / 8;
        let start = self.piece.codes.bytes().as_ptr().wrapping_add(self.piece.bit / 8);
        let mut codes: [*const u8; N] = std::array::from_fn(|row| start.wrapping_add((first + row) * self.stride));
        // `at`: halves from the start of the group, or of the row.
        let mut one = |n: usize, at: usize, groups: &[T; N]| {
            if (at * bytes).is_multiple_of(LINE) {
                for codes in codes {
                    // As many elements of 8 bits as of 4.
                    // SAFETY: every processor of this architecture has the instruction.
                    unsafe { prefetch_at(codes.wrapping_add(AHEAD * B / 4).cast()) };
                }
            }
            half(n, &codes, groups);
            for codes in &mut codes {
                *codes = codes.wrapping_add(bytes);
            }
        };
        let mut groups = [empty; N];
        for (group, begin) in (0..self.halves).step_by(self.period).enumerate() {
            for (row, of_row) in groups.iter_mut().enumerate() {
                *of_row = of_group((first + row) * self.groups + group);
            }
            // The usual groups without a loop.
            match self.period {
                1 => one(begin, begin, &groups),
                2 if begin + 2 <= self.halves => {
                    one(begin, 0, &groups);
                    one(begin + 1, 1, &groups);
                }
                _ => (begin..self.halves.min(begin + self.period)).for_each(|n| one(n, n - begin, &groups)),
            }
        }
    }
}
