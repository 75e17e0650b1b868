//! Every way to decode, with every instruction set of this processor, against `value()`.

use std::ops::Range;

use crate::all_forms::{ROWS, for_all};
use crate::simd::InstructionSet;
use crate::{PackedMatrix, Rounding};

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
fn a_block_has_the_bits_of_its_values() {
    for_all(|matrix| {
        if matrix.rounding != Rounding::None {
            return;
        }
        let (rows, columns) = (1..ROWS, 3..matrix.shape[1] - 2);
        let mut out = vec![f32::NAN; rows.len() * columns.len()];
        matrix.decode_block(rows.clone(), columns.clone(), &mut out);
        let (r, c) = (rows.clone(), columns.clone());
        check(matrix, "block", &out, r.flat_map(|row| c.clone().map(move |column| (row, column))));
        for set in InstructionSet::here() {
            out.fill(f32::NAN);
            matrix.decode_transposed_with(set, rows.clone(), columns.clone(), &mut out);
            let (r, c) = (rows.clone(), columns.clone());
            let places = c.flat_map(|column| r.clone().map(move |row| (row, column)));
            check(matrix, &format!("{set:?}, transposed"), &out, places);
        }
    });
}

#[test]
fn nothing_is_decoded_into_an_empty_buffer() {
    for_all(|matrix| {
        let width = matrix.shape[1];
        matrix.decode_row(0, width..width, &mut []);
        matrix.decode_block(2..2, 0..width, &mut []);
        matrix.decode_block(0..ROWS, 4..4, &mut []);
        matrix.decode_transposed(0..ROWS, 4..4, &mut []);
        matrix.decode_transposed(3..3, 0..width, &mut []);
    });
}
