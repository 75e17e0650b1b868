//! The tensors of an adapter's file by module and part, in all known spellings.

use std::collections::BTreeMap;
use std::path::Path;

use finetune_store::{TensorFile, TensorView};

use crate::adapter::files::Format;
use crate::branch::EMBEDDING;
use crate::error::ModelError;
use crate::files::floats::to_finite_f32;
use crate::parameters::PREFIX;

/// The parts of one branch.
#[derive(Default)]
pub(super) struct Parts<'a> {
    /// A, B, and the magnitudes of DoRA.
    pub(super) found: [Option<TensorView<'a>>; 3],
}

/// What a tensor is a part of: the module, and whether its branch is one of an embedding.
pub(super) type BranchName = (String, bool);

/// All parts of a file by branch, and the tensors that are no part of one by their names in the
/// model.
pub(super) struct Branches<'a> {
    pub(super) by_module: BTreeMap<BranchName, Parts<'a>>,
    pub(super) others: BTreeMap<String, TensorView<'a>>,
}

impl<'a> Branches<'a> {
    /// `in_text`: the name in the model of a module that the file names.
    pub(super) fn sort(
        file: &'a TensorFile,
        format: Format,
        path: &Path,
        in_text: impl Fn(&str) -> String,
    ) -> Result<Branches<'a>, ModelError> {
        let mut branches = Branches { by_module: BTreeMap::new(), others: BTreeMap::new() };
        for view in file.names().filter_map(|name| file.get(name)) {
            let found = match format {
                Format::Peft => {
                    peft_name(view.name).map(|(module, is_embedding, part)| (in_text(module), is_embedding, part))
                }
                Format::Mlx => mlx_name(view.name).map(|(module, part)| {
                    let module = in_text(module);
                    let is_embedding = module == EMBEDDING;
                    (module, is_embedding, part)
                }),
            };
            let first = match found {
                None => branches.add_other(view, &in_text),
                Some((module, is_embedding, part)) => {
                    let parts = branches.by_module.entry((module, is_embedding)).or_default();
                    parts.found[part].replace(view)
                }
            };
            if let Some(first) = first {
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

    /// Adds a tensor that is no part of a branch. Returns the one that has its place already.
    ///
    /// PEFT saves an embedding with new rows three times if it is trained in full: as the module, as
    /// the wrapper's copy of it, and as it was before training. The first of these counts.
    fn add_other(&mut self, view: TensorView<'a>, in_text: impl Fn(&str) -> String) -> Option<TensorView<'a>> {
        const COPY: &str = ".modules_to_save.";
        if view.name.contains(".original_module.") {
            return None;
        }
        let name = in_text(&plain_name(view.name));
        let first = self.others.get(&name).copied();
        let is_copy = view.name.contains(COPY);
        match first {
            Some(first) if is_copy == first.name.contains(COPY) => return Some(first),
            Some(_) if is_copy => {}
            _ => {
                self.others.insert(name, view);
            }
        }
        None
    }
}

/// (module, whether of an embedding, part) of PEFT's `base_model.model.MODULE.lora_A.weight`. State
/// dicts in memory add the adapter's name (`lora_A.default.weight`). That spelling, and one without
/// the first two words, mean the same. The parts of an embedding's branch, and magnitudes, are
/// parameters, whose names do not end in `weight`.
fn peft_name(name: &str) -> Option<(&str, bool, usize)> {
    static PARTS: [(&str, bool, usize); 5] = [
        ("lora_A", false, 0),
        ("lora_B", false, 1),
        ("lora_magnitude_vector", false, 2),
        ("lora_embedding_A", true, 0),
        ("lora_embedding_B", true, 1),
    ];
    let name = name.strip_prefix(PREFIX).unwrap_or(name);
    let stem = name.strip_suffix(".weight");
    let (before, last) = stem.unwrap_or(name).rsplit_once('.')?;
    let part = |part: &str| PARTS.iter().find(|(known, ..)| *known == part);
    let (module, &(known, is_embedding, number)) = match part(last) {
        Some(found) => (before, found),
        None => {
            let (module, last) = before.rsplit_once('.')?;
            (module, part(last)?)
        }
    };
    (stem.is_some() || !["lora_A", "lora_B"].contains(&known)).then_some((module, is_embedding, number))
}

/// The name in the model of a tensor that is no part of a branch. In memory, PEFT's names have the
/// words `modules_to_save` and the adapter's name too.
fn plain_name(name: &str) -> String {
    let name = name.strip_prefix(PREFIX).unwrap_or(name);
    match name.split_once(".modules_to_save.") {
        Some((module, rest)) => format!("{module}.{}", rest.rsplit('.').next().unwrap_or(rest)),
        None => name.to_owned(),
    }
}

/// The elements of a tensor of this shape.
pub(super) fn of_shape(view: &TensorView<'_>, expected: &[usize]) -> Result<Vec<f32>, ModelError> {
    if view.shape != expected {
        let (path, name, found) = (view.path().to_owned(), view.name.to_owned(), view.shape.to_vec());
        return Err(ModelError::AdapterShape { path, name, found, expected: expected.to_vec() });
    }
    to_finite_f32(view)
}

/// Module and part of mlx-lm's `MODULE.lora_a`. `m` are the magnitudes of DoRA.
fn mlx_name(name: &str) -> Option<(&str, usize)> {
    let (module, part) = name.rsplit_once('.')?;
    Some((module, ["lora_a", "lora_b", "m"].iter().position(|known| *known == part)?))
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
        let embedding = "model.embed_tokens";
        for (name, want) in [
            (format!("base_model.model.{q}.lora_A.weight"), Some((q, false, 0))),
            (format!("base_model.model.{q}.lora_B.default.weight"), Some((q, false, 1))),
            (format!("{q}.lora_A.weight"), Some((q, false, 0))),
            (format!("base_model.model.{q}.lora_A.bias"), None),
            (format!("base_model.model.{q}.lora_A"), None),
            (format!("base_model.model.{q}.lora_magnitude_vector"), Some((q, false, 2))),
            (format!("base_model.model.{q}.lora_magnitude_vector.weight"), Some((q, false, 2))),
            (format!("base_model.model.{q}.lora_magnitude_vector.default.weight"), Some((q, false, 2))),
            (format!("base_model.model.{q}.weight"), None),
            (format!("base_model.model.{embedding}.lora_embedding_A"), Some((embedding, true, 0))),
            (format!("base_model.model.{embedding}.lora_embedding_B.default"), Some((embedding, true, 1))),
            ("weight".to_owned(), None),
        ] {
            assert_eq!(peft_name(&name), want, "{name}");
        }
        assert_eq!(mlx_name(&format!("{q}.lora_b")), Some((q, 1)));
        assert_eq!(mlx_name(&format!("{q}.m")), Some((q, 2)));
        assert_eq!(mlx_name(&format!("{q}.weight")), None);
        for name in ["lm_head.weight", "base_model.model.lm_head.modules_to_save.default.weight"] {
            assert_eq!(plain_name(name), "lm_head.weight");
        }
    }

    #[test]
    fn a_transposed_matrix() {
        assert_eq!(transposed(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }
}
