//! Codes that are packed along the rows of a matrix, brought into the order of its columns.
//!
//! GPTQ and AWQ store [i, o], the transpose of a weight, and their scales too.

use rayon::prelude::*;

use crate::{Codes, NibbleOrder};

/// Elements of a side of the squares that are transposed at a time: 64 bytes of words, a line of the
/// cache.
const SQUARE: usize = 16;

/// The transpose of `[rows, columns]` elements of `N` bytes each: `[columns, rows]`.
pub(super) fn transpose<const N: usize>(bytes: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    let mut transposed = vec![0; bytes.len()];
    let (source, _) = bytes.as_chunks::<N>();
    transposed.par_chunks_mut((SQUARE * rows * N).max(1)).enumerate().for_each(|(strip, out)| {
        let (out, _) = out.as_chunks_mut::<N>();
        let first = strip * SQUARE;
        for start in (0..rows).step_by(SQUARE) {
            for (column, out) in out.chunks_mut(rows).enumerate() {
                for row in start..rows.min(start + SQUARE) {
                    out[row] = source[row * columns + first + column];
                }
            }
        }
    });
    transposed
}

/// The codes of `[rows · bits / 32, columns]` words, each column of which is a stream of bits along
/// the rows: `[rows, columns]` codes, a byte each.
pub(super) fn along_rows(bytes: &[u8], rows: usize, columns: usize, bits: usize) -> Vec<u8> {
    let words = (rows * bits).div_ceil(32);
    let streams = Codes::new(transpose::<4>(bytes, words, columns), bits, 32 * words, NibbleOrder::LowFirst);
    let code = |place: usize| streams.code(place % columns, place / columns) as u8;
    (0..rows * columns).into_par_iter().map(code).collect()
}

/// The codes of `[groups, words]` words, each row of which is a stream of bits: `[columns, groups]`
/// codes, a byte each.
pub(super) fn along_columns(bytes: Vec<u8>, groups: usize, columns: usize, bits: usize) -> Vec<u8> {
    let words = (columns * bits).div_ceil(32);
    let streams = Codes::new(bytes, bits, 32 * words, NibbleOrder::LowFirst);
    let code = |place: usize| streams.code(place % groups, place / groups) as u8;
    (0..columns * groups).into_par_iter().map(code).collect()
}

/// The output that each nibble of an AWQ word is of, from the lowest on.
pub(super) const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// AWQ's words [i, o / 8], 8 outputs each: rows of 4-bit codes [o, i / 2], the first code low.
pub(super) fn awq_codes(bytes: &[u8], inputs: usize, outputs: usize) -> Vec<u8> {
    let (words, _) = bytes.as_chunks::<4>();
    let (width, row) = (outputs / 8, inputs.div_ceil(2));
    let mut codes = vec![0; outputs * row];
    // So many words are a line of the cache, of which nothing is read twice.
    codes.par_chunks_mut((SQUARE * 8 * row).max(1)).enumerate().for_each(|(strip, out)| {
        let first = strip * SQUARE;
        for input in (0..inputs).step_by(8) {
            for (word, out) in out.chunks_mut(8 * row).enumerate() {
                let mut square = [0; 8];
                let inputs = words[input * width..].iter().skip(first + word).step_by(width);
                square.iter_mut().zip(inputs).for_each(|(square, word)| *square = u32::from_le_bytes(*word));
                transpose_nibbles(&mut square);
                for (codes, output) in square.into_iter().zip(AWQ_ORDER) {
                    let end = row.min(input / 2 + 4);
                    let place = &mut out[output * row..][input / 2..end];
                    place.copy_from_slice(&codes.to_le_bytes()[..place.len()]);
                }
            }
        }
    });
    codes
}

/// Nibble `j` of word `k` becomes nibble `k` of word `j`: squares of 1, 2 and 4 nibbles above and
/// below the diagonal change places.
fn transpose_nibbles(words: &mut [u32; 8]) {
    for (size, mask) in [(4, 0x0000_ffff), (2, 0x00ff_00ff), (1, 0x0f0f_0f0f)] {
        for word in (0..8).filter(|word| word & size == 0) {
            let changed = (words[word] >> (4 * size) ^ words[word + size]) & mask;
            words[word + size] ^= changed;
            words[word] ^= changed << (4 * size);
        }
    }
}

/// AWQ's zero points [o, groups], a byte each, whose outputs are in the order of their nibbles, in
/// the order of the outputs.
pub(super) fn awq_zeros(zeros: &[u8], groups: usize) -> Vec<u8> {
    let mut ordered = vec![0; zeros.len()];
    for (nibble, zeros) in zeros.chunks(groups.max(1)).enumerate() {
        let output = nibble / 8 * 8 + AWQ_ORDER[nibble % 8];
        ordered[output * groups..][..groups].copy_from_slice(zeros);
    }
    ordered
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that differ from their neighbours.
    fn bytes(count: usize) -> Vec<u8> {
        (0..count).map(|place| (place * 89 + place / 251) as u8).collect()
    }

    #[test]
    fn a_transpose_has_each_element_at_its_place() {
        for (rows, columns) in [(1, 1), (1, 40), (40, 1), (16, 16), (37, 53), (53, 37), (33, 16)] {
            let source = bytes(4 * rows * columns);
            let transposed = transpose::<4>(&source, rows, columns);
            for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
                let (from, to) = (4 * (row * columns + column), 4 * (column * rows + row));
                assert_eq!(transposed[to..to + 4], source[from..from + 4], "{rows} x {columns} at {row}, {column}");
            }
        }
    }

    #[test]
    fn awq_words_are_rows_of_codes() {
        for (inputs, outputs) in [(1, 8), (33, 8), (64, 136), (7, 264)] {
            let source = bytes(inputs * outputs / 2);
            let codes =
                Codes::new(awq_codes(&source, inputs, outputs), 4, 8 * inputs.div_ceil(2), NibbleOrder::LowFirst);
            for (input, output) in (0..inputs).flat_map(|input| (0..outputs).map(move |output| (input, output))) {
                let nibble = AWQ_ORDER.iter().position(|own| *own == output % 8).expect("one of eight");
                let byte = source[4 * (input * outputs / 8 + output / 8) + nibble / 2];
                let code = u32::from(byte >> (4 * (nibble % 2)) & 15);
                assert_eq!(codes.code(output, input), code, "{inputs} x {outputs} at {input}, {output}");
            }
        }
    }
}
