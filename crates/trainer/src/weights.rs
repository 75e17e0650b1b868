//! Weights that are no numbers, found before a run is put together of them.

use std::path::Path;

use finetune_model::ModelError;
use finetune_store::{Dtype, TensorSet, TensorView};
use rayon::prelude::*;

use crate::error::TrainError;

/// Refuses a model with a NaN or an infinity in it, naming the tensor.
pub(crate) fn check(directory: &Path) -> Result<(), TrainError> {
    let files = TensorSet::open_model(directory)?;
    let names: Vec<&str> = files.names().collect();
    let found = names.par_iter().find_first(|name| {
        let is_bad = files.get(name).is_some_and(|view| !is_finite(&view));
        // The file is larger than what else a check takes.
        files.release(name);
        is_bad
    });
    match found {
        Some(name) => Err(TrainError::Model(ModelError::Malformed {
            path: directory.to_owned(),
            what: format!("the tensor `{name}` has a weight that is not finite (NaN or infinity)"),
        })),
        None => Ok(()),
    }
}

/// Numbers whose exponent has all its bits are none.
fn is_finite(view: &TensorView<'_>) -> bool {
    let halves = |mask: u16| {
        let (pairs, _) = view.bytes.as_chunks::<2>();
        pairs.iter().all(|pair| u16::from_le_bytes(*pair) & mask != mask)
    };
    match view.dtype {
        Dtype::F32 => {
            let (fours, _) = view.bytes.as_chunks::<4>();
            fours.iter().all(|four| u32::from_le_bytes(*four) & 0x7f80_0000 != 0x7f80_0000)
        }
        Dtype::BF16 => halves(0x7f80),
        Dtype::F16 => halves(0x7c00),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_what_is_none() {
        let shape: &[usize] = &[1];
        for (dtype, bytes, finite) in [
            (Dtype::F32, 1.5f32.to_le_bytes().to_vec(), true),
            (Dtype::F32, f32::MAX.to_le_bytes().to_vec(), true),
            (Dtype::F32, f32::NAN.to_le_bytes().to_vec(), false),
            (Dtype::F32, f32::NEG_INFINITY.to_le_bytes().to_vec(), false),
            (Dtype::BF16, vec![0x80, 0x7f], false),
            (Dtype::BF16, vec![0x7f, 0x7f], true),
            (Dtype::F16, vec![0x00, 0x7c], false),
            (Dtype::F16, vec![0xff, 0x7b], true),
        ] {
            let view = TensorView { name: "weight", dtype, shape, bytes: &bytes };
            assert_eq!(is_finite(&view), finite, "{dtype:?} {bytes:?}");
        }
    }
}
