//! An adapter as mlx-lm's files.
//!
//! mlx-lm 0.32 (`tuner/utils.py`) has one rank and one scale for all layers. It takes the layers
//! from the settings, and refuses tensors of other shapes. So ranks are filled up with zeros, and a
//! branch of another scale has the ratio in its B. Experts are stacks (`mlx_names.rs`).

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use finetune_store::{Dtype, encode_tensors};
use serde_json::json;

use crate::adaptation::is_of_vocabulary;
use crate::adapter::mlx_names::{Halves, MlxModule, Stack, names_of, of_branch, without_branch};
use crate::adapter::tensors::transposed;
use crate::adapter::{Adapter, CONFIG_FILE, MLX_FILE};
use crate::config::ModelConfig;
use crate::error::{ModelError, list};
use crate::files::floats::from_f32;
use crate::files::wrapper::name_in_mlx;
use crate::lora::{LoraTarget, layer_of};
use crate::merge::{BranchValues, branches};

/// The number of layers, as the names of all modules say.
fn layers_of(modules: &[String]) -> usize {
    modules.iter().filter_map(|module| layer_of(module)).max().map_or(0, |last| last + 1)
}

/// The name of a module within its layer, such as `self_attn.q_proj`.
pub(super) fn within(module: &str) -> &str {
    module.splitn(4, '.').nth(3).unwrap_or(module)
}

/// The value that most have; of several equally frequent ones, the first.
pub(crate) fn most_frequent(values: &[f64]) -> Option<f64> {
    let count = |value: &f64| values.iter().filter(|other| *other == value).count();
    let most = values.iter().map(count).max()?;
    values.iter().copied().find(|value| count(value) == most)
}

/// Whether multiplying by this changes only the exponent of numbers.
pub(crate) fn is_power_of_two(factor: f64) -> bool {
    factor.is_normal() && factor.to_bits().trailing_zeros() >= 52
}

/// The name in mlx-lm of a module or tensor of the text model.
pub(crate) fn in_whole(module: &str, config: &ModelConfig) -> String {
    let is_inside = config.wrapper.as_ref().is_some_and(|wrapper| !wrapper.is_text_in_mlx);
    if is_inside { name_in_mlx(module) } else { module.to_owned() }
}

/// The modules of mlx-lm that a branch is one of, with their B: two of gate and up together.
fn apart<'b>(name: String, branch: &BranchValues<'b>) -> Vec<(String, Cow<'b, [f32]>)> {
    let Some(halves) = Halves::of(&name) else { return vec![(name, Cow::from(branch.b))] };
    let rows = [0, 1].map(|half| Cow::from(halves.rows_of(half, branch.b, branch.rank)));
    halves.names.into_iter().zip(rows).collect()
}

/// Part, shape and values of a tensor.
type Part = (&'static str, Vec<usize>, Vec<f32>);

/// The tensors of a branch: [inputs, r], [r, outputs] and magnitudes. What is filled up is behind
/// the last column, and below the last row. B is multiplied by `factor`.
fn parts_of(branch: &BranchValues<'_>, (outputs, inputs): (usize, usize), rank: usize, factor: f64) -> Vec<Part> {
    let mut a = vec![0.0; inputs * rank];
    for (row, values) in branch.a.chunks(inputs).enumerate() {
        for (column, value) in values.iter().enumerate() {
            a[column * rank + row] = *value;
        }
    }
    let mut b = transposed(branch.b, branch.rank);
    if factor != 1.0 {
        b.iter_mut().for_each(|value| *value = (f64::from(*value) * factor) as f32);
    }
    b.resize(rank * outputs, 0.0);
    let mut parts = vec![("lora_a", vec![inputs, rank], a), ("lora_b", vec![rank, outputs], b)];
    parts.extend(branch.magnitudes.map(|values| ("m", vec![outputs], values.to_vec())));
    parts
}

/// Names and bytes of files.
type Files = Vec<(String, Vec<u8>)>;

impl Adapter {
    /// adapter_config.json and adapters.safetensors, in f32, for a base of this config. `dropout` is
    /// the training's. Returns also what the user should know: branches that could not be written
    /// without rounding.
    ///
    /// # Errors
    /// [`ModelError::NotExpressible`] for what mlx-lm's adapters do not have: modules trained in full,
    /// DoRA on some layers only, and branches on one of embedding and output layer if they are one
    /// matrix. [`ModelError::Store`] for more tensors than a file may have.
    pub fn mlx_files(&self, dropout: f64, config: &ModelConfig) -> Result<(Files, Vec<String>), ModelError> {
        self.expect_mlx(config)?;
        let use_dora = self.targets.iter().any(|target| target.use_dora);
        let scale_of = |target: &LoraTarget| f64::from(target.scale());
        let scales: Vec<f64> = self.targets.iter().map(scale_of).filter(|scale| *scale != 0.0).collect();
        let scale = most_frequent(&scales).unwrap_or(1.0);
        let rank = self.targets.iter().map(|target| target.rank).max().unwrap_or(1);
        let (num_layers, keys) = self.mlx_choice(config);
        let written = json!({
            "fine_tune_type": if use_dora { "dora" } else { "lora" },
            "model": self.base.name,
            "num_layers": num_layers,
            "lora_parameters": {"rank": rank, "scale": scale, "dropout": dropout, "keys": keys},
        });
        let settings = serde_json::to_vec_pretty(&written).expect("a JSON value can be written");
        let (mut tensors, mut rounded, mut stacks) = (Vec::new(), Vec::new(), BTreeMap::new());
        let mut add = |module: &str, part: &str, shape: Vec<usize>, values: &[f32]| {
            let name = format!("{}.{part}", in_whole(module, config));
            tensors.push((name, Dtype::F32, shape, Cow::from(from_f32(values, Dtype::F32))));
        };
        let experts = config.experts.as_ref().map_or(0, |experts| experts.count);
        for ((branch, target), &shape) in branches(self).iter().zip(&self.targets).zip(&self.shapes) {
            let factor = scale_of(target) / scale;
            if factor != 0.0 && !is_power_of_two(factor) {
                rounded.push(target.module.clone());
            }
            let MlxModule { name, expert } = of_branch(&target.module, config);
            let apart = apart(name, branch);
            let shape = (shape.0 / apart.len(), shape.1);
            for (name, b) in apart {
                let branch = &BranchValues { b: &b, ..*branch };
                if let Some(expert) = expert {
                    let stack = stacks.entry(name).or_insert_with(|| Stack::new(experts, shape, rank));
                    stack.put(expert, branch, factor);
                    continue;
                }
                for (part, shape, values) in parts_of(branch, shape, rank, factor) {
                    add(&name, part, shape, &values);
                }
            }
        }
        for (name, stack) in stacks {
            for (part, shape, values) in stack.tensors(experts) {
                add(&name, part, shape, &values);
            }
        }
        let metadata = BTreeMap::from([("format".to_owned(), "mlx".to_owned())]);
        let tensors = encode_tensors(&tensors, &metadata)?;
        let files = vec![(CONFIG_FILE.to_owned(), settings), (MLX_FILE.to_owned(), tensors)];
        Ok((files, self.mlx_notices(scale, rank, &rounded)))
    }

    /// Refuses what mlx-lm's adapters do not have.
    fn expect_mlx(&self, config: &ModelConfig) -> Result<(), ModelError> {
        let refused = |what: &str| {
            Err(ModelError::NotExpressible {
                what: format!("mlx-lm's adapters have no place for {what}"),
                hint: "--format merged writes the model with it, which mlx-lm loads".to_owned(),
            })
        };
        let doras = self.targets.iter().filter(|target| target.use_dora).count();
        if !self.saved.is_empty() || !self.vocabulary.is_empty() {
            return refused("modules that were trained in full, or an embedding of the adapter's own");
        }
        if doras != 0 && doras != self.targets.len() {
            return refused("DoRA on some layers only");
        }
        if let Some(what) = self.targets.iter().find_map(|target| without_branch(target, config)) {
            let hint = "--format merged writes the model with it".to_owned();
            return Err(ModelError::NotExpressible { what, hint });
        }
        let of_vocabulary = self.targets.iter().any(|target| is_of_vocabulary(&target.module));
        if config.tied_embeddings && of_vocabulary {
            return refused("a branch on one of embedding and output layer, which are one matrix in this model");
        }
        Ok(())
    }

    /// The number of layers from the last one back, and the names that choose the branches' modules.
    /// The names are those within a layer, if the modules are the same in all these layers.
    /// Otherwise they are whole names, which mlx-lm looks for in the whole model.
    fn mlx_choice(&self, config: &ModelConfig) -> (usize, Vec<String>) {
        let all = layers_of(&self.modules);
        let first = self.targets.iter().filter_map(|target| layer_of(&target.module)).min().unwrap_or(0);
        let named = |module: &String| names_of(module, config);
        let targets: BTreeSet<String> = self.targets.iter().flat_map(|target| named(&target.module)).collect();
        let keys: BTreeSet<&str> = targets.iter().map(|target| within(target)).collect();
        let modules: BTreeSet<String> = self.modules.iter().flat_map(named).collect();
        let chosen = modules
            .iter()
            .filter(|module| layer_of(module).is_some_and(|layer| layer >= first) && keys.contains(within(module)));
        if chosen.eq(&targets) {
            return (all - first, keys.into_iter().map(str::to_owned).collect());
        }
        (all, targets.iter().map(|target| in_whole(target, config)).collect())
    }

    fn mlx_notices(&self, scale: f64, rank: usize, rounded: &[String]) -> Vec<String> {
        let mut notices = Vec::new();
        if self.targets.iter().any(|target| target.rank != rank) {
            notices
                .push(format!("mlx-lm has one rank for all layers: smaller ones are filled up to {rank} with zeros"));
        }
        if !rounded.is_empty() {
            notices.push(format!(
                "mlx-lm has one scale for all layers, {scale}: B of {} is multiplied by the ratio and rounded to f32 (relative error at most 6e-8)",
                list(rounded)
            ));
        }
        notices
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two() {
        for (factor, want) in
            [(1.0, true), (0.25, true), (-2.0, true), (3.0, false), (0.0, false), (f64::INFINITY, false), (1.5, false)]
        {
            assert_eq!(is_power_of_two(factor), want, "{factor}");
        }
    }

    #[test]
    fn the_most_frequent_value() {
        assert_eq!(most_frequent(&[2.0, 1.0, 1.0, 2.0, 3.0]), Some(2.0));
        assert_eq!(most_frequent(&[]), None);
    }
}
