//! What can be known about a run before it starts: counts, lengths, an estimate of memory and time.

use finetune_dataset::{Dataset, Plan};
use finetune_model::{FloatType, Model, ModelConfig, matmul_rate};
use finetune_recipe::{Method, Recipe};
use finetune_store::RealDisk;
use serde::Serialize;

use crate::error::TrainError;
use crate::journal::{check_results, is_occupied};
use crate::memory::{self, Estimate, Sizes};
use crate::place::{Machine, Place};
use crate::prepare::{
    Start, check_available, has_weights, length_notice, load_data, model_directory, stored_type, total_steps,
};

/// The findings of `finetune validate`.
#[derive(Clone, Debug, Serialize)]
pub struct Findings {
    pub architecture: &'static str,
    pub parameters: u64,
    pub trained_parameters: u64,
    pub train: DataFindings,
    pub eval: Option<DataFindings>,
    pub steps: u64,
    pub steps_per_epoch: u64,
    /// Where it would be computed, and in what.
    pub device: String,
    pub estimate: Estimate,
    pub notices: Vec<String>,
}

/// Rows that stay, and what happened to the others.
#[derive(Clone, Debug, Serialize)]
pub struct DataFindings {
    pub rows: usize,
    pub tokens: u64,
    pub trained_tokens: u64,
    pub median_length: usize,
    /// 95 % of rows are no longer than this.
    pub length_95: usize,
    pub longest: usize,
    pub truncated: usize,
    pub dropped: usize,
    pub zero_label: usize,
    /// Rows in which every token is trained on.
    pub unmasked: usize,
}

/// Checks all that [`crate::prepare`] checks, and touches nothing.
pub fn findings(recipe: &Recipe, machine: &Machine, progress: &dyn Fn(u64)) -> Result<Findings, TrainError> {
    let mut notices = check_available(recipe)?;
    check_results(&RealDisk, &recipe.output_dir)?;
    if is_occupied(&RealDisk, &recipe.output_dir)? {
        let occupied = recipe.output_dir.display();
        notices.push(format!("{occupied} holds a run already: `run` wants --resume, or another --output-dir"));
    }
    let directory = model_directory(recipe)?;
    let stored = stored_type(&directory);
    let place = Place::choose(&recipe.model, machine, stored)?;
    notices.extend(place.notices.iter().cloned());
    let full = recipe.train.method == Method::Full;
    let config =
        if full && !has_weights(&directory) { ModelConfig::load(&directory)? } else { Model::check(&directory)? };
    let data = load_data(recipe, &directory, &config, progress)?;
    notices.extend(config.notices.iter().cloned());
    let start = Start::read(recipe, &config)?;
    notices.extend(start.iter().flat_map(|start| start.notices.iter().cloned()));
    let targets = start.as_ref().map(|start| &start.targets);
    let Sizes { parameters, trained: trained_parameters } = memory::sizes(&config, targets);
    notices.extend(length_notice(&data.train, &config));
    if data.train.counts.unmasked == data.train.rows.len()
        && data.train.rows.iter().any(|row| !row.prompt_text.is_empty())
    {
        notices.push("every token of every row is trained on, prompts included".to_owned());
    }
    let plan = Plan::new(data.train.rows.len(), recipe.train.global_batch_size, recipe.seed, recipe.data.shuffle);
    let steps = total_steps(recipe, &plan);
    let estimate = memory::of_recipe(recipe, &config, start.as_ref(), &data.train, &place.placement, stored);
    memory::check(&estimate, place.memory(machine), || {
        let has_bf16 = place.found.types.contains(&FloatType::BF16);
        memory::knobs(recipe, &config, targets, &data.train, &place.placement, stored, has_bf16)
    })?;
    Ok(Findings {
        architecture: config.family.architecture(),
        parameters,
        trained_parameters,
        device: place.describe(),
        estimate: Estimate { seconds: seconds(recipe, &data.train, steps, parameters, &place), ..estimate },
        train: data_findings(&data.train),
        eval: data.eval.as_ref().map(data_findings),
        steps,
        steps_per_epoch: plan.steps_per_epoch(),
        notices,
    })
}

fn data_findings(data: &Dataset) -> DataFindings {
    let mut lengths: Vec<usize> = data.rows.iter().map(|row| row.tokens.len()).collect();
    lengths.sort_unstable();
    let at = |share: f64| lengths.get(((lengths.len() - 1) as f64 * share) as usize).copied().unwrap_or(0);
    DataFindings {
        rows: data.rows.len(),
        tokens: data.counts.tokens,
        trained_tokens: data.counts.trained_tokens,
        median_length: if lengths.is_empty() { 0 } else { at(0.5) },
        length_95: if lengths.is_empty() { 0 } else { at(0.95) },
        longest: data.counts.longest,
        truncated: data.counts.truncated,
        dropped: data.counts.dropped,
        zero_label: data.counts.zero_label,
        unmasked: data.counts.unmasked,
    }
}

/// Seconds of the whole run at the rate of matrix products measured now; `None` on a GPU, whose kernels would have to be
/// compiled to know.
fn seconds(recipe: &Recipe, data: &Dataset, steps: u64, parameters: u64, place: &Place) -> Option<f64> {
    if !place.placement.is_cpu() {
        return None;
    }
    // Operations per token and parameter: 2 forward, 2 backward through activations, 2 more for weights if all are trained.
    let passes = if recipe.train.method == Method::Full { 6.0 } else { 4.0 };
    let rows_per_step = recipe.train.global_batch_size.min(data.rows.len()) as f64;
    let tokens_per_step = data.counts.tokens as f64 / data.rows.len() as f64 * rows_per_step;
    Some(steps as f64 * tokens_per_step * parameters as f64 * passes / matmul_rate())
}
