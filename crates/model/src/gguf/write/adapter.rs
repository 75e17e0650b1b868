//! An adapter alone.

use std::path::Path;

use finetune_gguf::{TensorInfo, TensorType, Value};
use finetune_store::Disk;

use super::output::{Output, Problem, encode};
use crate::adapter::mlx::{is_power_of_two, most_frequent};
use crate::adapter::{Adapter, IS_IN_MERGED};
use crate::config::ModelConfig;
use crate::error::{ModelError, list};
use crate::gguf::architecture::{Architecture, Kind};
use crate::gguf::making::{Making, Makings};
use crate::gguf::metadata::general;
use crate::gguf::place::{architecture_for, has_branch};
use crate::lora::LoraTarget;
use crate::merge::branches;

/// An adapter that is to be written.
#[derive(Debug)]
pub struct AdapterFile<'a> {
    /// The adapter.
    pub adapter: &'a Adapter,
    /// The config of its base.
    pub config: &'a ModelConfig,
    /// The number type of its matrices: no packed one.
    pub kind: TensorType,
    /// `general.name`.
    pub name: &'a str,
}

/// alpha of plain LoRA (scale = alpha / rank) that gives a branch's scale.
fn plain_alpha(target: &LoraTarget) -> f64 {
    if target.use_rslora { target.alpha * (target.rank as f64).sqrt() } else { target.alpha }
}

/// Writes an adapter to the new file `path`. llama.cpp has one alpha for all branches: a branch of
/// another one has the ratio in its B. Returns what the user should know.
///
/// # Errors
/// [`ModelError::NotExpressible`] for a branch that llama.cpp has no place for. Otherwise as
/// [`write_model`].
pub fn write_adapter(disk: &dyn Disk, file: &AdapterFile<'_>, path: &Path) -> Result<Vec<String>, ModelError> {
    let architecture = architecture_for(file.config)?;
    file.adapter.expect_branches_only("llama.cpp has no place for the whole adapter", IS_IN_MERGED)?;
    let alphas: Vec<f64> = file.adapter.targets.iter().map(plain_alpha).filter(|alpha| *alpha != 0.0).collect();
    let alpha = most_frequent(&alphas).unwrap_or(1.0);
    let mut metadata = general(architecture, "adapter", file.name, file.kind);
    metadata.push(("adapter.type".to_owned(), Value::String("lora".to_owned())));
    metadata.push(("adapter.lora.alpha".to_owned(), Value::F32(alpha as f32)));
    let branches = branches(file.adapter);
    let (mut infos, mut makings) = (Vec::new(), Vec::new());
    for (branch, &(outputs, inputs)) in branches.iter().zip(&file.adapter.shapes) {
        let making = making_of(branch.module, &[outputs, inputs], file.config, architecture)?;
        let name = making.sources[0].0.clone();
        makings.push(making);
        for (half, shape) in [("lora_a", [branch.rank, inputs]), ("lora_b", [outputs, branch.rank])] {
            infos.push(TensorInfo { name: format!("{name}.{half}"), shape: shape.to_vec(), kind: file.kind });
        }
    }
    let mut output = Output::begin(disk, path, &metadata, &infos)?;
    let mut rounded = Vec::new();
    for ((branch, target), making) in branches.iter().zip(&file.adapter.targets).zip(&makings) {
        let factor = plain_alpha(target) / alpha;
        if factor != 0.0 && !is_power_of_two(factor) {
            rounded.push(target.module.clone());
        }
        let scaled: Vec<f32> = branch.b.iter().map(|value| (f64::from(*value) * factor) as f32).collect();
        let halves = making.halves_of_branch(branch.a.to_vec(), scaled);
        for values in halves.ok_or_else(|| no_branch(branch.module))? {
            let bytes = encode(&values, file.kind).map_err(|problem| match problem {
                Problem::Other(error) => error,
                Problem::NotFinite(element) => ModelError::NotFinite {
                    path: path.to_owned(),
                    name: branch.module.to_owned(),
                    element,
                    after: format!(" once rounded to {}", file.kind.name()),
                },
            })?;
            output.append(&bytes)?;
            output.end_tensor()?;
        }
    }
    Ok(match rounded.is_empty() {
        true => Vec::new(),
        false => vec![format!(
            "llama.cpp has one alpha for all branches, {alpha}: B of {} is multiplied by the ratio and rounded to f32 (relative error at most 6e-8)",
            list(&rounded)
        )],
    })
}

/// How the matrix that a branch belongs to lies in the model's file.
fn making_of(
    module: &str,
    shape: &[usize],
    config: &ModelConfig,
    architecture: &'static Architecture,
) -> Result<Making, ModelError> {
    let writes = |name: &str| architecture.writes(name);
    let making = Makings { has: &writes, config, architecture }.of(&format!("{module}.weight"), shape);
    // llama.cpp computes a tied output layer from token_embd, which has a branch of its own kind.
    let has_place = match module.strip_prefix("model.layers.") {
        Some(_) => has_branch(module, architecture.keys),
        None => module == "lm_head" && !config.tied_embeddings && architecture.keys != Kind::Deepseek2,
    };
    making.filter(|making| has_place && making.has_branch()).ok_or_else(|| no_branch(module))
}

fn no_branch(module: &str) -> ModelError {
    ModelError::NotExpressible {
        what: format!("llama.cpp has no place for the branch on `{module}` in an adapter"),
        hint: "without --adapter-only it is merged into the model".to_owned(),
    }
}
