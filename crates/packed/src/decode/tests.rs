//! Every way to decode, with every instruction set of this processor, against `value()`.

use std::ops::Range;

use crate::PackedMatrix;
use crate::all_forms::{ROWS, for_all};
use crate::simd::InstructionSet;

#[track_caller]
fn check(matrix: &PackedMatrix, what: &str, found: &[f32], expected: impl Iterator<Item = (usize, usize)>) {
    for (found, (row, column)) in found.iter().zip(expected) {
        let value = matrix.value(row, column);
        let same = found.to_bits() == value.to_bits() || found.is_nan() && value.is_nan();
        assert!(same, "{what}: {found:e}, not {value:e} at {row}, {column} of {matrix:?}");
    }
}

/// All columns; parts that begin and end anywhere.
fn ranges(width: usize) -> [Range<usize>; 4] {
    [0..width, 1..width, 5..width - 3, width / 2..width / 2 + 9]
}

#[test]
fn a_row_has_the_bits_of_its_values() {
    let mut matrices = 0;
    for_all(|matrix| {
        matrices += 1;
        for set in InstructionSet::here() {
            for columns in ranges(matrix.shape[1]) {
                for row in [0, 1, ROWS - 1] {
                    let mut out = vec![f32::NAN; columns.len()];
                    matrix.decode_row_with(set, row, columns.clone(), &mut out);
                    check(matrix, &format!("{set:?}"), &out, columns.clone().map(|column| (row, column)));
                }
            }
        }
    });
    assert!(matrices > 2000, "{matrices}");
}

#[test]
fn nothing_is_decoded_into_an_empty_buffer() {
    for_all(|matrix| {
        for place in [0, matrix.shape[1]] {
            matrix.decode_row(0, place..place, &mut []);
        }
    });
}
