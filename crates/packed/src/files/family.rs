//! Which reader a weight is for, by the tensors beside it.

use finetune_store::{Dtype, TensorView};

use super::config::PackedConfig;
use super::foreign::{self, Foreign};
use super::module::{FLOATS, Module, wrong};
use crate::PackedError;

/// Formats that one reader knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Mlx,
    Bitsandbytes4,
    Bitsandbytes8,
    /// compressed-tensors with packed codes.
    Compressed,
    /// A byte an element.
    Scaled,
    /// GPTQ and AWQ.
    Gptq,
    /// gpt-oss.
    Blocks,
}

/// The ends of names that only tensors of one family have.
const OWN: [(Family, &[&str]); 7] = [
    (Family::Mlx, &[".biases", ".qbiases", ".global_scale"]),
    (
        Family::Bitsandbytes4,
        &[
            ".weight.quant_state.bitsandbytes__nf4",
            ".weight.quant_state.bitsandbytes__fp4",
            ".weight.absmax",
            ".weight.quant_map",
            ".weight.nested_absmax",
            ".weight.nested_quant_map",
        ],
    ),
    (Family::Bitsandbytes8, &[".SCB", ".weight_format"]),
    (Family::Compressed, &[".weight_packed", ".weight_shape", ".weight_g_idx", ".weight_global_scale"]),
    (Family::Scaled, &[".weight_scale_inv", ".weight_scale_2"]),
    (Family::Gptq, &[".qweight", ".qzeros", ".g_idx"]),
    (Family::Blocks, &["_blocks", "_scales"]),
];

/// The ends of names that tensors of several families have, and the family if nothing else tells.
const SHARED: [(Family, &[&str]); 2] =
    [(Family::Mlx, &[".scales"]), (Family::Scaled, &[".weight_scale", ".weight_zero_point"])];

/// The ends of names beside a packed weight that say nothing of its values: scales of products in 8
/// bits.
const PASSED_OVER: [&str; 6] =
    [".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".activation_scale", ".act_scale"];

impl Family {
    /// The family of a weight. `None`: it is plain floats, or not there.
    pub(super) fn of(module: &Module<'_>, config: &PackedConfig) -> Result<Option<Family>, PackedError> {
        foreign::check(module)?;
        let sign = |(family, ends): &(Family, &[&str])| module.names(ends).first().map(|name| (*family, *name));
        let mut signs: Vec<(Family, &str)> = OWN.iter().filter_map(sign).collect();
        if signs.is_empty() {
            signs = SHARED.iter().filter_map(sign).collect();
        }
        if let [(_, first), (_, second), ..] = signs.as_slice() {
            return Err(module.wrong(format!("it is packed in two formats: `{first}` and `{second}` are both there")));
        }
        let weight = module.weight();
        let plain = weight.is_some_and(|tensor| FLOATS.contains(&tensor.dtype));
        let family = match (signs.first(), weight) {
            (None, Some(_)) if plain => return Ok(None),
            (None, Some(weight)) => of_weight_alone(&weight)?,
            (None, None) => return absent(module, config),
            (Some((family, sign)), Some(weight)) => {
                let is_twice = match family {
                    // Storage in another type has the same codes in another shape.
                    Family::Bitsandbytes4 => plain && weight.shape == module.shape(),
                    Family::Compressed | Family::Gptq | Family::Blocks => true,
                    _ => plain,
                };
                if is_twice {
                    let what = format!("it is there twice: as it is, and packed with `{sign}`");
                    return Err(wrong(&weight, what));
                }
                *family
            }
            (Some((family, _)), None) => *family,
        };
        match config.foreign() {
            Some(foreign) => Err(refuse(module, foreign)),
            None => Ok(Some(family)),
        }
    }
}

/// The family by the type of the weight, whose reader then says which parts are missing.
fn of_weight_alone(weight: &TensorView<'_>) -> Result<Family, PackedError> {
    match weight.dtype {
        Dtype::U32 => Ok(Family::Mlx),
        Dtype::F8_E4M3 => Ok(Family::Scaled),
        other => Err(wrong(weight, format!("it is {other}, and no tensor beside it says what its codes mean"))),
    }
}

fn absent(module: &Module<'_>, config: &PackedConfig) -> Result<Option<Family>, PackedError> {
    match config.foreign() {
        Some(foreign) if module.has_other_tensors() => Err(refuse(module, foreign)),
        _ => Ok(None),
    }
}

fn refuse(module: &Module<'_>, foreign: &Foreign) -> PackedError {
    PackedError::NotRead {
        path: module.path(),
        name: module.weight.clone(),
        format: foreign.format.clone(),
        instead: foreign.instead,
    }
}

/// The ends of the names of all tensors that a packed weight may have.
pub(super) fn all_ends() -> impl Iterator<Item = &'static str> {
    let of_families = OWN.iter().chain(&SHARED).flat_map(|(_, ends)| ends.iter());
    [".weight"].iter().chain(of_families).chain(&PASSED_OVER).copied()
}
