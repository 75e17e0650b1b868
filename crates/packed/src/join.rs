//! Packed matrices one behind the other as one, with the values that they have.
//!
//! Nothing is quantized again: codes and scales are put behind each other.

use crate::codes::Codes;
use crate::matrix::{Decoder, Groups, PackedMatrix, Zeros};
use crate::numbers::Numbers;

impl PackedMatrix {
    /// The rows of all of them, in their order. `None`: there are none, they are packed in different ways, or elements
    /// that share a scale would not begin with a matrix.
    pub fn joined(parts: impl IntoIterator<Item = PackedMatrix>) -> Option<PackedMatrix> {
        let mut parts = parts.into_iter();
        let first = parts.next()?;
        parts.try_fold(first, PackedMatrix::with)
    }

    fn with(self, other: PackedMatrix) -> Option<PackedMatrix> {
        let [rows, columns] = self.shape;
        let fits = match (&self.groups, &other.groups) {
            (
                Groups::Blocks { rows: high, columns: wide },
                Groups::Blocks { rows: other_high, columns: other_wide },
            ) => (high, wide) == (other_high, other_wide) && rows.is_multiple_of(*high),
            (Groups::Flat { elements }, Groups::Flat { elements: other }) => {
                elements == other && (rows * columns).is_multiple_of(*elements)
            }
            (Groups::OfColumns { group, count }, Groups::OfColumns { group: other, count: other_count }) => {
                (group, count) == (other, other_count)
            }
            _ => false,
        };
        if !fits || other.shape[1] != columns || other.rounding != self.rounding {
            return None;
        }
        let decoder = self.decoder.with(other.decoder)?;
        let (codes, scales) = (self.codes.with(other.codes, rows)?, self.scales.with(other.scales)?);
        Some(PackedMatrix { shape: [rows + other.shape[0], columns], codes, scales, decoder, ..self })
    }
}

impl Decoder {
    fn with(self, other: Decoder) -> Option<Decoder> {
        match (self, other) {
            (Decoder::Affine { biases }, Decoder::Affine { biases: other }) => {
                Some(Decoder::Affine { biases: biases.with(other)? })
            }
            (Decoder::Shifted { zeros, factor }, Decoder::Shifted { zeros: others, factor: other }) => {
                let zeros = match (zeros, others) {
                    (Zeros::All(zero), Zeros::All(other)) if zero == other => Zeros::All(zero),
                    (Zeros::Each(zeros), Zeros::Each(others)) => Zeros::Each([zeros, others].concat()),
                    _ => return None,
                };
                (factor == other).then_some(Decoder::Shifted { zeros, factor })
            }
            (Decoder::Table { table }, Decoder::Table { table: other }) => {
                // Some codes mean no number.
                let is_one = table.iter().map(|value| value.to_bits()).eq(other.iter().map(|value| value.to_bits()));
                is_one.then_some(Decoder::Table { table })
            }
            _ => None,
        }
    }
}

impl Codes {
    /// These codes of `rows` rows, and others behind them.
    fn with(self, other: Codes, rows: usize) -> Option<Codes> {
        let form = |codes: &Codes| (codes.bits(), codes.row_bits(), codes.order());
        // The next row has to begin where the bytes end.
        let is_whole = self.bytes().len() * 8 == rows * self.row_bits();
        if !is_whole || form(&self) != form(&other) {
            return None;
        }
        Some(Codes::new([self.bytes(), other.bytes()].concat(), self.bits(), self.row_bits(), self.order()))
    }
}

impl Numbers {
    fn with(self, other: Numbers) -> Option<Numbers> {
        Some(match (self, other) {
            (Numbers::F32(all), Numbers::F32(more)) => Numbers::F32([all, more].concat()),
            (Numbers::F16(all), Numbers::F16(more)) => Numbers::F16([all, more].concat()),
            (Numbers::BF16(all), Numbers::BF16(more)) => Numbers::BF16([all, more].concat()),
            (Numbers::E8M0(all), Numbers::E8M0(more)) => Numbers::E8M0([all, more].concat()),
            (Numbers::E4M3(all), Numbers::E4M3(more)) => Numbers::E4M3([all, more].concat()),
            (
                Numbers::Product { scales, factors, per },
                Numbers::Product { scales: more_scales, factors: more_factors, per: other },
            ) if per == other && scales.len() * per == factors.len() => Numbers::Product {
                scales: [scales, more_scales].concat(),
                factors: [factors, more_factors].concat(),
                per,
            },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::all_forms::for_all;

    /// A matrix that is cut and joined has the values of itself, in every form that can be cut so; and many can.
    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "lists of one range")]
    fn a_joined_matrix_has_the_values_of_its_parts() {
        let mut joined = 0;
        for_all(|matrix| {
            let [rows, columns] = matrix.shape;
            let parts = [vec![0..8], vec![8..9], vec![9..rows]].map(|rows| matrix.rows(&rows));
            let parts: Result<Vec<PackedMatrix>, _> = parts.into_iter().collect();
            let Some(whole) = parts.ok().and_then(PackedMatrix::joined) else { return };
            joined += 1;
            assert_eq!(whole.shape, matrix.shape);
            for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
                let want = matrix.value(row, column).to_bits();
                assert_eq!(whole.value(row, column).to_bits(), want, "{:?} {row} {column}", matrix.groups);
            }
        });
        assert!(joined > 100, "{joined}");
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "lists of one range")]
    fn other_forms_are_not_joined() {
        let mut first: Option<PackedMatrix> = None;
        let (mut alike, mut other) = (0, 0);
        for_all(|matrix| {
            // With whole bytes in the last row, too.
            let matrix = matrix.rows(&[0..matrix.shape[0]]).expect("all rows");
            let before = first.get_or_insert_with(|| matrix.clone());
            let form = |matrix: &PackedMatrix| (matrix.codes.bits(), std::mem::discriminant(&matrix.decoder));
            let forms = [form(before), form(&matrix)];
            match PackedMatrix::joined([before.clone(), matrix]) {
                Some(_) => {
                    assert_eq!(forms[0], forms[1]);
                    alike += 1;
                }
                None => other += 1,
            }
        });
        assert!(alike > 0 && other > 0, "{alike} {other}");
        assert!(PackedMatrix::joined([]).is_none());
    }
}
