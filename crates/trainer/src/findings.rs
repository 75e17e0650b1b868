//! What can be known about a run before it starts: counts, lengths, an estimate of memory and time.

use finetune_dataset::{Dataset, Plan};
use finetune_model::{Model, ModelConfig, expected_tensors, matmul_rate};
use finetune_recipe::{Method, Recipe};
use finetune_store::RealDisk;
use serde::Serialize;

use crate::error::TrainError;
use crate::journal::{check_results, is_occupied};
use crate::prepare::{Start, check_available, has_weights, length_notice, load_data, model_directory, total_steps};

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

/// Bytes at the largest step, and seconds for the whole run.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Estimate {
    pub weights: u64,
    /// Trained parameters, their gradients and moments.
    pub trained: u64,
    pub activations: u64,
    pub logits: u64,
    /// The program itself: code, tokenizer, rows, what the allocator holds back.
    pub program: u64,
    pub total: u64,
    pub seconds: f64,
}

/// Checks all that [`crate::prepare`] checks, and touches nothing.
pub fn findings(recipe: &Recipe, machine_bytes: Option<u64>, progress: &dyn Fn(u64)) -> Result<Findings, TrainError> {
    let mut notices = check_available(recipe)?;
    check_results(&RealDisk, &recipe.output_dir)?;
    if is_occupied(&RealDisk, &recipe.output_dir)? {
        let occupied = recipe.output_dir.display();
        notices.push(format!("{occupied} holds a run already: `run` wants --resume, or another --output-dir"));
    }
    let directory = model_directory(recipe)?;
    let full = recipe.train.method == Method::Full;
    let config =
        if full && !has_weights(&directory) { ModelConfig::load(&directory)? } else { Model::check(&directory)? };
    let data = load_data(recipe, &directory, &config, progress)?;
    let start = Start::read(recipe, &config)?;
    let Sizes { parameters, trained: trained_parameters } = sizes(&config, start.as_ref());
    notices.extend(length_notice(&data.train, &config));
    if data.train.counts.unmasked == data.train.rows.len()
        && data.train.rows.iter().any(|row| !row.prompt_text.is_empty())
    {
        notices.push("every token of every row is trained on, prompts included".to_owned());
    }
    let plan = Plan::new(data.train.rows.len(), recipe.train.global_batch_size, recipe.seed, recipe.data.shuffle);
    let steps = total_steps(recipe, &plan);
    let memory = memory(recipe, &config, &data.train, parameters, trained_parameters);
    check_memory(&memory, machine_bytes)?;
    Ok(Findings {
        architecture: config.family.architecture(),
        parameters,
        trained_parameters,
        estimate: Estimate { seconds: seconds(recipe, &data.train, steps, parameters), ..memory },
        train: data_findings(&data.train),
        eval: data.eval.as_ref().map(data_findings),
        steps,
        steps_per_epoch: plan.steps_per_epoch(),
        notices,
    })
}

/// Parameters of the model, and how many of them are trained.
pub(crate) struct Sizes {
    pub(crate) parameters: u64,
    pub(crate) trained: u64,
}

pub(crate) fn sizes(config: &ModelConfig, start: Option<&Start>) -> Sizes {
    let shapes = expected_tensors(config);
    let parameters: u64 = shapes.iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum();
    let Some(Start { targets, .. }) = start else { return Sizes { parameters, trained: parameters } };
    let width = |module: &str| {
        let found = shapes.iter().find(|(name, _)| name.strip_suffix(".weight") == Some(module));
        found.map_or(0, |(_, shape)| shape.iter().sum::<usize>())
    };
    let trained = targets.iter().map(|target| (target.rank * width(&target.module)) as u64).sum();
    Sizes { parameters, trained }
}

/// Refuses a run whose estimate is beyond all memory of the machine.
pub(crate) fn check_memory(estimate: &Estimate, machine_bytes: Option<u64>) -> Result<(), TrainError> {
    match machine_bytes {
        Some(available) if estimate.total > available => {
            let Estimate { weights, activations, total, .. } = *estimate;
            Err(TrainError::Memory { needed: total, available, weights, activations })
        }
        _ => Ok(()),
    }
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

/// Measured: a run of a model of 4 MB with activations of 37 MB peaks at 135 MB.
const PROGRAM_BYTES: u64 = 80 << 20;

/// What the CPU path keeps, counted in f32 numbers. Seconds are left 0: to know them costs a measurement.
pub(crate) fn memory(recipe: &Recipe, config: &ModelConfig, data: &Dataset, parameters: u64, trained: u64) -> Estimate {
    const FLOAT: u64 = 4;
    let mut lengths: Vec<usize> = data.rows.iter().map(|row| row.tokens.len()).collect();
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    // The largest micro-batch: the longest rows together.
    let tokens: u64 = lengths.iter().take(recipe.train.micro_batch_size).map(|&length| length as u64).sum();
    let hidden = config.hidden_size as u64;
    let query = (config.heads * config.head_dim) as u64;
    let key = (config.key_value_heads * config.head_dim) as u64;
    let inner = config.intermediate_size as u64;
    // Kept for the backward pass of a layer: both norms' inputs and outputs, rotated queries and keys, values,
    // attention's output, gate, up and their product.
    let layer = tokens * (4 * hidden + 2 * query + 2 * key + 3 * inner);
    // Alive on top of that while one layer is worked on: gradients of its widest tensors.
    let working = tokens * (3 * inner + 3 * hidden);
    let layers = config.layers as u64;
    let kept = if recipe.train.gradient_checkpointing { layers * tokens * hidden + layer } else { layers * layer };
    let trained_rows = tokens.min(1024);
    let piece = ((32 << 20) / FLOAT / config.vocabulary as u64).clamp(32, 1024).min(trained_rows);
    let (weights, activations, logits) =
        (parameters * FLOAT, (kept + working) * FLOAT, 2 * piece * config.vocabulary as u64 * FLOAT);
    // Twice as tensor and as flat vector, gradient twice, two moments.
    let trained_state = trained * FLOAT * 6;
    let weights = if recipe.train.method == Method::Full { 0 } else { weights };
    Estimate {
        weights,
        trained: trained_state,
        activations,
        logits,
        program: PROGRAM_BYTES,
        total: weights + trained_state + activations + logits + PROGRAM_BYTES,
        seconds: 0.0,
    }
}

/// Seconds of the whole run at the rate of matrix products measured now.
fn seconds(recipe: &Recipe, data: &Dataset, steps: u64, parameters: u64) -> f64 {
    // Operations per token and parameter: 2 forward, 2 backward through activations, 2 more for weights if all are trained.
    let passes = if recipe.train.method == Method::Full { 6.0 } else { 4.0 };
    let rows_per_step = recipe.train.global_batch_size.min(data.rows.len()) as f64;
    let tokens_per_step = data.counts.tokens as f64 / data.rows.len() as f64 * rows_per_step;
    steps as f64 * tokens_per_step * parameters as f64 * passes / matmul_rate()
}
