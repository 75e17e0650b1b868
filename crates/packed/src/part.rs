//! Some rows or columns of a packed matrix, with the values that they have in it.
//!
//! Nothing is quantized again: codes and scales are copied. So elements that share a scale must stay together,
//! unless all of them are in the same place anyway.

use std::ops::Range;

use crate::codes::{Codes, NibbleOrder};
use crate::error::PackedError;
use crate::matrix::{Decoder, Groups, PackedMatrix, Zeros};
use crate::numbers::Numbers;

impl PackedMatrix {
    /// These rows, in this order.
    ///
    /// # Errors
    /// [`PackedError::Indivisible`] if a block of rows that share scales would be cut.
    ///
    /// # Panics
    /// If a range is beyond the matrix.
    pub fn rows(&self, ranges: &[Range<usize>]) -> Result<PackedMatrix, PackedError> {
        let [rows, columns] = self.shape;
        let (block, is_one) = match &self.groups {
            Groups::Blocks { rows: block, .. } => (*block, *block >= rows),
            // So many rows are whole groups.
            Groups::Flat { elements } => (elements / common(*elements, columns), *elements >= rows * columns),
            Groups::OfColumns { .. } => (1, false),
        };
        if !is_one {
            ranges.iter().try_for_each(|range| divides("rows", block, range, rows))?;
        }
        Ok(self.part(ranges, 0..columns))
    }

    /// These columns.
    ///
    /// # Errors
    /// [`PackedError::Indivisible`] if columns that share scales would be cut.
    ///
    /// # Panics
    /// If the range is beyond the matrix.
    pub fn columns(&self, range: Range<usize>) -> Result<PackedMatrix, PackedError> {
        let [rows, columns] = self.shape;
        match &self.groups {
            Groups::Blocks { columns: block, .. } if *block < columns => divides("columns", *block, &range, columns)?,
            Groups::Flat { elements } if *elements < rows * columns => {
                divides("columns", *elements, &range, columns)?;
                // Each row has to begin with a group, and still has to.
                if !columns.is_multiple_of(*elements) || !range.len().is_multiple_of(*elements) {
                    return Err(indivisible("columns", *elements, &range));
                }
            }
            Groups::Blocks { .. } | Groups::Flat { .. } | Groups::OfColumns { .. } => {}
        }
        Ok(self.part(std::slice::from_ref(&(0..rows)), range))
    }

    /// A part whose groups are whole, or all in one.
    fn part(&self, ranges: &[Range<usize>], columns: Range<usize>) -> PackedMatrix {
        let shape = [ranges.iter().map(Range::len).sum(), columns.len()];
        let (groups, numbers) = self.groups_of(ranges, &columns);
        let decoder = match &self.decoder {
            Decoder::Affine { biases } => Decoder::Affine { biases: biases.pick(&numbers) },
            Decoder::Shifted { zeros: Zeros::Each(zeros), factor } => {
                let zeros = Zeros::Each(numbers.iter().map(|&n| zeros[n]).collect());
                Decoder::Shifted { zeros, factor: *factor }
            }
            same => same.clone(),
        };
        let rows = ranges.iter().flat_map(Clone::clone);
        let (scales, codes) = (self.scales.pick(&numbers), self.codes.part(rows, columns));
        PackedMatrix { shape, codes, scales, groups, decoder, rounding: self.rounding }
    }

    /// The groups of a part, and the number that each of them has in the whole.
    fn groups_of(&self, ranges: &[Range<usize>], columns: &Range<usize>) -> (Groups, Vec<usize>) {
        let [rows, width] = self.shape;
        let numbers = match &self.groups {
            Groups::Blocks { rows: high, columns: wide } => {
                let first_rows: Vec<usize> = match *high >= rows {
                    true => vec![0],
                    false => ranges.iter().flat_map(|range| range.clone().step_by(*high)).collect(),
                };
                let in_row =
                    |row: usize| columns.clone().step_by(*wide).map(move |column| self.groups.of(width, row, column));
                first_rows.into_iter().flat_map(in_row).collect()
            }
            Groups::Flat { elements } if *elements >= rows * width => vec![0],
            Groups::Flat { elements } if columns.len() == width => {
                let of = |range: &Range<usize>| range.start * width / elements..(range.end * width).div_ceil(*elements);
                ranges.iter().flat_map(of).collect()
            }
            Groups::Flat { elements } => {
                let in_row =
                    |row: usize| (row * width + columns.start) / elements..(row * width + columns.end) / elements;
                (0..rows).flat_map(in_row).collect()
            }
            Groups::OfColumns { group, count } => {
                let groups = Groups::OfColumns { group: group[columns.clone()].to_vec(), count: *count };
                let all = ranges.iter().flat_map(|range| range.start * count..range.end * count);
                return (groups, all.collect());
            }
        };
        (self.groups.clone(), numbers)
    }
}

/// The greatest common divisor.
fn common(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common(b, a % b) }
}

/// Refuses a range that cuts blocks of so many rows or columns, of which there are `all`.
fn divides(what: &str, block: usize, range: &Range<usize>, all: usize) -> Result<(), PackedError> {
    let ends = range.end.is_multiple_of(block) || range.end == all;
    if range.start.is_multiple_of(block) && ends { Ok(()) } else { Err(indivisible(what, block, range)) }
}

fn indivisible(what: &str, block: usize, range: &Range<usize>) -> PackedError {
    let what = format!("{what} {} to {} would cut groups of {block} that share scales", range.start, range.end - 1);
    PackedError::Indivisible { name: String::new(), what }
}

impl Codes {
    /// The codes of these rows and columns. Each row begins with a byte.
    fn part(&self, rows: impl Iterator<Item = usize>, columns: Range<usize>) -> Codes {
        let bits = self.bits();
        let row_bits = (columns.len() * bits).next_multiple_of(8);
        let mut bytes = Vec::new();
        for row in rows {
            let start = self.row_bits() * row + columns.start * bits;
            if start.is_multiple_of(8) {
                bytes.extend_from_slice(&self.bytes()[start / 8..][..row_bits / 8]);
                continue;
            }
            let first = bytes.len();
            bytes.resize(first + row_bits / 8, 0);
            for (place, column) in columns.clone().enumerate() {
                put(&mut bytes[first..], place * bits, self.code(row, column), self.order());
            }
        }
        Codes::new(bytes, bits, row_bits, self.order())
    }
}

/// Writes a code into zeros: what [`Codes::code`] reads.
fn put(row: &mut [u8], start: usize, code: u32, order: NibbleOrder) {
    let start = if order == NibbleOrder::HighFirst { start ^ 4 } else { start };
    let pair = code << (start % 8);
    row[start / 8] |= pair as u8;
    if let Some(next) = row.get_mut(start / 8 + 1) {
        *next |= (pair >> 8) as u8;
    }
}

impl Numbers {
    /// The numbers at these places.
    fn pick(&self, places: &[usize]) -> Numbers {
        fn of<T: Copy>(all: &[T], places: &[usize]) -> Vec<T> {
            places.iter().map(|&place| all[place]).collect()
        }
        match self {
            Numbers::F32(all) => Numbers::F32(of(all, places)),
            Numbers::F16(all) => Numbers::F16(of(all, places)),
            Numbers::BF16(all) => Numbers::BF16(of(all, places)),
            Numbers::E8M0(all) => Numbers::E8M0(of(all, places)),
            Numbers::E4M3(all) => Numbers::E4M3(of(all, places)),
            Numbers::Product { scales, factors, per } => {
                let is_whole = |part: &[usize]| {
                    let first = part[0];
                    first.is_multiple_of(*per) && part.iter().zip(first..).all(|(place, wanted)| *place == wanted)
                };
                // Where scales of scales are cut, each factor gets its own: the product has the same bits.
                let whole = places.chunks(*per).all(is_whole);
                let (starts, per): (Vec<usize>, usize) = match whole {
                    true => (places.chunks(*per).map(|part| part[0] / per).collect(), *per),
                    false => (places.iter().map(|place| place / per).collect(), 1),
                };
                Numbers::Product { scales: of(scales, &starts), factors: of(factors, places), per }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::all_forms::for_all;

    fn has_values(part: &PackedMatrix, rows: &[usize], columns: &[usize], whole: &PackedMatrix) {
        // Some of the forms have codes that mean no number.
        if whole.check().is_ok() {
            part.check().expect("a part adds up");
        }
        assert_eq!(part.shape, [rows.len(), columns.len()]);
        let mut decoded = vec![0.0; columns.len()];
        for (n, &row) in rows.iter().enumerate() {
            part.decode_row(n, 0..columns.len(), &mut decoded);
            for (place, &column) in columns.iter().enumerate() {
                let want = whole.value(row, column).to_bits();
                assert_eq!(part.value(n, place).to_bits(), want, "{:?} {row} {column}", whole.groups);
                assert_eq!(decoded[place].to_bits(), want, "{:?} {row} {column}", whole.groups);
            }
        }
    }

    /// Parts have the values of the whole, in every form that can be cut so; and some forms can.
    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "lists of ranges, some of one")]
    fn parts_have_the_values_of_the_whole() {
        let (mut cut_rows, mut cut_columns, mut refused) = (0, 0, 0);
        for_all(|matrix| {
            let [rows, columns] = matrix.shape;
            let all_rows: Vec<usize> = (0..rows).collect();
            let all_columns: Vec<usize> = (0..columns).collect();
            for ranges in [vec![0..8], vec![4..12, 16..24], vec![7..9], vec![0..rows]] {
                let own: Vec<usize> = ranges.iter().flat_map(Clone::clone).collect();
                match matrix.rows(&ranges) {
                    Ok(part) => {
                        cut_rows += 1;
                        has_values(&part, &own, &all_columns, matrix);
                    }
                    Err(_) => refused += 1,
                }
            }
            let half = columns / 2 / 32 * 32;
            for range in [0..half.max(1), half..columns, 5..columns - 3, 10..15] {
                match matrix.columns(range.clone()) {
                    Ok(part) => {
                        cut_columns += 1;
                        has_values(&part, &all_rows, &all_columns[range], matrix);
                    }
                    Err(_) => refused += 1,
                }
            }
        });
        assert!(cut_rows > 1000 && cut_columns > 1000 && refused > 1000, "{cut_rows} {cut_columns} {refused}");
    }

    /// (groups of a matrix of 8 rows and 64 columns, rows, columns, the part of the refusal)
    #[test]
    fn what_shares_a_scale_is_not_cut() {
        let blocks = |rows, columns| Groups::Blocks { rows, columns };
        for (groups, rows, columns, refusal) in [
            (blocks(1, 32), Some(3..5), None, None),
            (blocks(1, 32), None, Some(0..32), None),
            (blocks(1, 32), None, Some(0..16), Some("columns 0 to 15 would cut groups of 32")),
            (blocks(1, 64), None, Some(3..16), None),
            (blocks(4, 16), Some(0..2), None, Some("rows 0 to 1 would cut groups of 4")),
            (blocks(4, 16), Some(4..8), Some(16..48), None),
            (blocks(128, 128), Some(1..2), Some(1..2), None),
            (Groups::Flat { elements: 64 }, Some(1..2), None, None),
            (Groups::Flat { elements: 64 }, None, Some(0..32), Some("columns 0 to 31")),
            (Groups::Flat { elements: 128 }, Some(1..2), None, Some("rows 1 to 1 would cut groups of 2")),
            (Groups::Flat { elements: 128 }, Some(2..4), None, None),
            (Groups::Flat { elements: 16 }, None, Some(16..48), None),
        ] {
            let shape = [8, 64];
            let scales = Numbers::F32((0..groups.count(shape)).map(|n| n as f32 + 1.0).collect());
            let codes = Codes::new((0..=255).collect(), 4, 256, NibbleOrder::LowFirst);
            let decoder = Decoder::Shifted { zeros: Zeros::All(8), factor: 1.0 };
            let rounding = crate::Rounding::None;
            let matrix = PackedMatrix { shape, codes, scales, groups, decoder, rounding };
            let parts = [rows.map(|rows| matrix.rows(&[rows])), columns.map(|columns| matrix.columns(columns))];
            let said = parts.into_iter().flatten().find_map(Result::err).map(|error| error.to_string());
            match refusal {
                None => assert_eq!(said, None, "{:?}", matrix.groups),
                Some(words) => assert!(said.as_deref().is_some_and(|said| said.contains(words)), "{said:?}: {words}"),
            }
        }
    }
}
