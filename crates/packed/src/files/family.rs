//! Which reader a weight is for, by the tensors beside it.

use finetune_store::Dtype;

use super::config::PackedConfig;
use super::foreign;
use super::module::{FLOATS, Module};
use crate::PackedError;

/// Formats that one reader knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Mlx,
    Bitsandbytes4,
    Bitsandbytes8,
}

/// The ends of names that only tensors of one family have.
const OWN: [(Family, &[&str]); 3] = [
    (Family::Mlx, &[".biases", ".qbiases"]),
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
];

/// The ends of names that several families have.
const SHARED: [&str; 2] = [".weight", ".scales"];

impl Family {
    /// The family of a weight. `None`: it is plain floats, or not there.
    pub(super) fn of(module: &Module<'_>, config: &PackedConfig) -> Result<Option<Family>, PackedError> {
        foreign::check(module)?;
        let mut families: Vec<(Family, &str)> = Vec::new();
        for (family, ends) in OWN {
            families.extend(module.names(ends).first().map(|name| (family, *name)));
        }
        if let Some(scales) = module.get(".scales")
            && families.is_empty()
        {
            families.push((Family::Mlx, scales.name));
        }
        if let [(_, first), (_, second), ..] = families.as_slice() {
            return Err(module.wrong(format!("it is packed in two formats: `{first}` and `{second}` are both there")));
        }
        let plain = module.get(".weight").filter(|tensor| FLOATS.contains(&tensor.dtype));
        let family = match (families.first(), plain) {
            (None, Some(_)) => return Ok(None),
            (None, None) => match of_weight_alone(module)? {
                Some(family) => family,
                None => return absent(module, config),
            },
            (Some((Family::Bitsandbytes4, sign)), Some(plain)) if plain.shape == [module.rows, module.columns] => {
                return Err(both(module, sign));
            }
            (Some((family, _)), _) if *family == Family::Bitsandbytes4 => *family,
            (Some((_, sign)), Some(_)) => return Err(both(module, sign)),
            (Some((family, _)), None) => *family,
        };
        match config.foreign() {
            Some(foreign) => Err(refuse(module, foreign)),
            None => Ok(Some(family)),
        }
    }
}

/// The family by the type of the weight, whose reader then says which parts are missing.
fn of_weight_alone(module: &Module<'_>) -> Result<Option<Family>, PackedError> {
    Ok(match module.get(".weight").map(|tensor| tensor.dtype) {
        Some(Dtype::U32) => Some(Family::Mlx),
        _ => None,
    })
}

fn absent(module: &Module<'_>, config: &PackedConfig) -> Result<Option<Family>, PackedError> {
    match config.foreign() {
        Some(foreign) if module.has_other_tensors() => Err(refuse(module, foreign)),
        _ => Ok(None),
    }
}

fn both(module: &Module<'_>, sign: &str) -> PackedError {
    module.wrong(format!("it is there twice: in plain floats, and packed with `{sign}`"))
}

fn refuse(module: &Module<'_>, foreign: &foreign::Foreign) -> PackedError {
    PackedError::NotRead {
        path: module.path(),
        name: module.weight.clone(),
        format: foreign.format.clone(),
        instead: foreign.instead,
    }
}

/// The ends of the names of all tensors that a packed weight may have.
pub(super) fn all_ends() -> impl Iterator<Item = &'static str> {
    OWN.iter().flat_map(|(_, ends)| ends.iter()).chain(&SHARED).copied()
}
