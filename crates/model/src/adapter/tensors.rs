//! The tensors of an adapter's file by module and half, in all known spellings.

use std::collections::BTreeMap;
use std::path::Path;

use finetune_store::{TensorFile, TensorView};

use crate::adapter::files::Format;
use crate::error::ModelError;
use crate::files::floats::to_finite_f32;

/// The halves of one branch, `lora_A` first.
pub(super) type Halves<'a> = [Option<TensorView<'a>>; 2];

/// All halves of a file by module, and the names of the tensors that are no half.
pub(super) struct Branches<'a> {
    pub(super) by_module: BTreeMap<String, Halves<'a>>,
    pub(super) others: Vec<String>,
}

impl<'a> Branches<'a> {
    pub(super) fn sort(file: &'a TensorFile, format: Format, path: &Path) -> Result<Branches<'a>, ModelError> {
        let mut branches = Branches { by_module: BTreeMap::new(), others: Vec::new() };
        for view in file.names().filter_map(|name| file.get(name)) {
            let found = match format {
                Format::Peft => peft_name(view.name),
                Format::Mlx => mlx_name(view.name),
            };
            let Some((module, half)) = found else {
                branches.others.push(view.name.to_owned());
                continue;
            };
            let halves = branches.by_module.entry(module.to_owned()).or_default();
            if let Some(first) = halves[half].replace(view) {
                let names = vec![first.name.to_owned(), view.name.to_owned()];
                return Err(ModelError::AdapterKeys {
                    path: path.to_owned(),
                    what: "two tensors for one place",
                    names,
                });
            }
        }
        Ok(branches)
    }
}

/// Module and half of PEFT's `base_model.model.MODULE.lora_A.weight`. State dicts in memory add the
/// adapter's name (`lora_A.default.weight`). That spelling, and one without the first two words,
/// mean the same.
fn peft_name(name: &str) -> Option<(&str, usize)> {
    let stem = name.strip_prefix("base_model.model.").unwrap_or(name).strip_suffix(".weight")?;
    let (before, last) = stem.rsplit_once('.')?;
    let half = |part: &str| ["lora_A", "lora_B"].iter().position(|known| *known == part);
    if let Some(half) = half(last) {
        return Some((before, half));
    }
    let (module, part) = before.rsplit_once('.')?;
    Some((module, half(part)?))
}

/// Module and half of mlx-lm's `MODULE.lora_a`.
fn mlx_name(name: &str) -> Option<(&str, usize)> {
    let (module, part) = name.rsplit_once('.')?;
    Some((module, ["lora_a", "lora_b"].iter().position(|known| *known == part)?))
}

/// Values of both halves in PEFT's order, A [rank, inputs] and B [outputs, rank], and the rank.
pub(super) fn values(
    a: &TensorView<'_>,
    b: &TensorView<'_>,
    shape: (usize, usize),
    format: Format,
) -> Result<(Vec<f32>, Vec<f32>, usize), ModelError> {
    let (outputs, inputs) = shape;
    // mlx-lm stores both transposed.
    let rank = a.shape.get(if format == Format::Mlx { 1 } else { 0 }).copied().unwrap_or(0);
    let wanted = match format {
        Format::Peft => [vec![rank, inputs], vec![outputs, rank]],
        Format::Mlx => [vec![inputs, rank], vec![rank, outputs]],
    };
    for (view, expected) in [a, b].into_iter().zip(wanted) {
        if view.shape != expected.as_slice() || rank == 0 {
            let (path, name, found) = (view.path().to_owned(), view.name.to_owned(), view.shape.to_vec());
            return Err(ModelError::AdapterShape { path, name, found, expected });
        }
    }
    let (a, b) = (to_finite_f32(a)?, to_finite_f32(b)?);
    Ok(match format {
        Format::Peft => (a, b, rank),
        Format::Mlx => (transposed(&a, rank), transposed(&b, outputs), rank),
    })
}

/// A matrix [rows, columns] as [columns, rows].
pub(super) fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns;
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_every_spelling() {
        let q = "model.layers.0.self_attn.q_proj";
        for (name, want) in [
            (format!("base_model.model.{q}.lora_A.weight"), Some((q, 0))),
            (format!("base_model.model.{q}.lora_B.default.weight"), Some((q, 1))),
            (format!("{q}.lora_A.weight"), Some((q, 0))),
            (format!("base_model.model.{q}.lora_A.bias"), None),
            (format!("base_model.model.{q}.lora_magnitude_vector.weight"), None),
            (format!("base_model.model.{q}.weight"), None),
            ("base_model.model.model.embed_tokens.lora_embedding_A".to_owned(), None),
            ("weight".to_owned(), None),
        ] {
            assert_eq!(peft_name(&name), want, "{name}");
        }
        assert_eq!(mlx_name(&format!("{q}.lora_b")), Some((q, 1)));
        assert_eq!(mlx_name(&format!("{q}.m")), None);
    }

    #[test]
    fn a_transposed_matrix() {
        assert_eq!(transposed(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }
}
