//! The values of floats of 4 and 8 bits, by their code.

use finetune_store::TensorView;
use rayon::prelude::*;

use super::module::wrong;
use crate::PackedError;
use crate::numbers::e4m3;

/// E2M1 (OCP Microscaling 1.0): the upper eight codes are the negative ones, of -0.0 too.
pub(super) const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// E4M3. The two codes of NaN have 0 here: matrices with them are refused.
pub(super) fn e4m3_table() -> Vec<f32> {
    (0..=255).map(|code| if is_nan(code) { 0.0 } else { e4m3(code) }).collect()
}

/// Whether an E4M3 code is NaN. The format has no infinities.
pub(super) fn is_nan(code: u8) -> bool {
    code & 0x7f == 0x7f
}

/// Refuses codes that are NaN.
pub(super) fn check_e4m3(tensor: &TensorView<'_>, codes: &[u8]) -> Result<(), PackedError> {
    match codes.par_iter().position_first(|code| is_nan(*code)) {
        Some(place) => Err(wrong(tensor, format!("element {place} is NaN"))),
        None => Ok(()),
    }
}
