//! Numbers that are not finite, found while weights are read.

use std::path::Path;

use finetune_store::{Dtype, TensorFile, TensorView};
use rayon::prelude::*;

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::files::base_files::BaseFiles;

/// Bytes that one task looks at. They fit into a processor's cache.
const PIECE: usize = 1 << 18;

/// The index of the first element of little-endian numbers that is NaN or infinite. `None` if there
/// is none, or if the type has no such numbers.
pub(crate) fn first_not_finite(bytes: &[u8], dtype: Dtype) -> Option<usize> {
    // NaN and infinity have all bits of the exponent set.
    match dtype {
        Dtype::F32 => find(bytes, |element: [u8; 4]| u32::from_le_bytes(element) & 0x7f80_0000 == 0x7f80_0000),
        Dtype::BF16 => find(bytes, |element: [u8; 2]| u16::from_le_bytes(element) & 0x7f80 == 0x7f80),
        Dtype::F16 => find(bytes, |element: [u8; 2]| u16::from_le_bytes(element) & 0x7c00 == 0x7c00),
        _ => None,
    }
}

fn find<const N: usize>(bytes: &[u8], is_bad: impl Fn([u8; N]) -> bool + Sync) -> Option<usize> {
    let piece = bytes.par_chunks(PIECE).enumerate().find_map_first(|(n, piece)| {
        let (elements, _) = piece.as_chunks::<N>();
        // The loop has no early exit, so that the compiler can vectorize it.
        let bad = elements.iter().fold(false, |bad, &element| bad | is_bad(element));
        bad.then_some(n)
    })?;
    let start = piece * PIECE;
    let (elements, _) = bytes[start..].as_chunks::<N>();
    elements.iter().position(|&element| is_bad(element)).map(|element| start / N + element)
}

/// Refuses numbers that are not finite among bytes of a tensor that begin at element `start`.
pub(crate) fn expect_finite(view: &TensorView<'_>, bytes: &[u8], start: usize) -> Result<(), ModelError> {
    match first_not_finite(bytes, view.dtype) {
        None => Ok(()),
        Some(element) => Err(ModelError::NotFinite {
            path: view.path().to_owned(),
            name: view.name.to_owned(),
            element: start + element,
            after: String::new(),
        }),
    }
}

/// Reads every tensor of the config, one after the other, and refuses one with a number that is not
/// finite. Of a packed matrix these are its scales, biases and tables.
pub(crate) fn expect_all_finite(files: &BaseFiles, config: &ModelConfig) -> Result<(), ModelError> {
    for tensor in files.tensors(config)? {
        // Those of other files, and packed ones, are checked as they are read.
        let Some(view) = tensor.view() else {
            if tensor.packed()?.is_none() {
                tensor.values()?;
            }
            continue;
        };
        expect_finite_view(view)?;
    }
    Ok(())
}

/// Reads a file of tensors, whatever they are for, and refuses one with a number that is not finite.
///
/// # Errors
/// If the file cannot be read or is malformed, or if a number is not finite.
pub fn expect_finite_file(path: &Path) -> Result<(), ModelError> {
    let file = TensorFile::open(path)?;
    file.names().filter_map(|name| file.get(name)).try_for_each(|view| expect_finite_view(&view))
}

fn expect_finite_view(view: &TensorView<'_>) -> Result<(), ModelError> {
    let mut start = 0;
    view.pieces(|piece| {
        expect_finite(view, piece, start)?;
        start += piece.len() / view.dtype.size();
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In every type, at the edges of pieces, with either sign. The largest finite number and zero
    /// are finite.
    #[test]
    fn the_first_is_found() {
        let count = PIECE + 7;
        let f32s = |bits: u32| bits.to_le_bytes().to_vec();
        let halves = |bits: u16| bits.to_le_bytes().to_vec();
        for (dtype, bad, fine) in [
            (
                Dtype::F32,
                vec![f32s(0x7f80_0000), f32s(0xff80_0000), f32s(0x7fc0_0000), f32s(0x7f80_0001)],
                f32s(0x7f7f_ffff),
            ),
            (Dtype::BF16, vec![halves(0x7f80), halves(0xff80), halves(0xffc1)], halves(0xff7f)),
            (Dtype::F16, vec![halves(0x7c00), halves(0xfc00), halves(0x7e00)], halves(0x7bff)),
        ] {
            let good = fine.repeat(count);
            assert_eq!(first_not_finite(&good, dtype), None, "{dtype}");
            let size = fine.len();
            for bad in bad {
                for place in [0, 1, PIECE / size - 1, PIECE / size, count - 1] {
                    let mut bytes = good.clone();
                    for place in [place, count - 1] {
                        bytes[place * size..(place + 1) * size].copy_from_slice(&bad);
                    }
                    assert_eq!(first_not_finite(&bytes, dtype), Some(place), "{dtype} {bad:?}");
                }
            }
        }
        assert_eq!(first_not_finite(&[0xff; 8], Dtype::I64), None);
    }
}
