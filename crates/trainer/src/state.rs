//! All that a run has to remember: one closed struct, saved as one directory.
//!
//! Nothing random is in it: which rows a step takes, and what dropout drops, are functions of (seed, step).

use std::path::{Path, PathBuf};

use finetune_model::{BaseName, Model, ModelError, adapter};
use finetune_store::{Disk, NewFile, commit_directory, numbered, remove_directory};
use serde::{Deserialize, Serialize};

use crate::adamw::AdamW;
use crate::error::TrainError;
use crate::identity::Identity;
use crate::loss_scale::LossScale;

/// The folder of a run that holds its checkpoints.
pub const CHECKPOINTS: &str = "checkpoints";
const STATE_FILE: &str = "trainer_state.json";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// Name of the first moment's file part; the second's has `_sq`. These are torch's names.
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];

/// The best evaluation so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub step: u64,
    pub eval_loss: f64,
}

/// Progress of a run after `step` steps.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainState {
    pub step: u64,
    /// Values of the trained parameters, in the order of the layout.
    pub parameters: Vec<f32>,
    pub optimizer: AdamW,
    pub best: Option<Best>,
    pub evaluations_without_improvement: u64,
    /// Early stopping has ended the run.
    pub stopped_early: bool,
    pub(crate) loss_scale: LossScale,
}

/// trainer_state.json.
#[derive(Serialize, Deserialize)]
struct StateFile {
    format: u32,
    /// Version of the program that wrote it.
    version: String,
    step: u64,
    updates: u64,
    best: Option<Best>,
    evaluations_without_improvement: u64,
    stopped_early: bool,
    #[serde(default)]
    loss_scale: LossScale,
    identity: Identity,
}

pub(crate) fn name(step: u64) -> String {
    format!("step-{step:06}")
}

impl TrainState {
    pub(crate) fn new(parameters: Vec<f32>, loss_scale: LossScale) -> TrainState {
        TrainState {
            step: 0,
            optimizer: AdamW::new(parameters.len()),
            parameters,
            best: None,
            evaluations_without_improvement: 0,
            stopped_early: false,
            loss_scale,
        }
    }

    /// BLAKE3 of everything in it: ranks that have done the same have the same.
    pub(crate) fn digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(bytemuck::bytes_of(&self.to_numbers()));
        for values in [&self.parameters, &self.optimizer.first_moment, &self.optimizer.second_moment] {
            hasher.update(bytemuck::cast_slice(values));
        }
        hasher.finalize()
    }

    /// All but the vectors, for other ranks.
    pub(crate) fn to_numbers(&self) -> [u64; 8] {
        [
            self.step,
            self.optimizer.updates,
            u64::from(self.best.is_some()),
            self.best.map_or(0, |best| best.step),
            self.best.map_or(0, |best| best.eval_loss.to_bits()),
            self.evaluations_without_improvement,
            u64::from(self.stopped_early),
            self.loss_scale.to_number(),
        ]
    }

    pub(crate) fn set_numbers(&mut self, numbers: &[u64; 8]) {
        let &[
            step,
            updates,
            has_best,
            best_step,
            eval_loss,
            evaluations_without_improvement,
            stopped_early,
            loss_scale,
        ] = numbers;
        self.step = step;
        self.optimizer.updates = updates;
        self.best = (has_best == 1).then_some(Best { step: best_step, eval_loss: f64::from_bits(eval_loss) });
        self.evaluations_without_improvement = evaluations_without_improvement;
        self.stopped_early = stopped_early == 1;
        self.loss_scale = LossScale::from_number(loss_scale);
    }

    /// Commits the state as `checkpoints/step-NNNNNN`. It appears whole or not at all.
    pub(crate) fn save(
        &self,
        disk: &dyn Disk,
        run: &Path,
        model: &Model,
        base: &BaseName,
        identity: &Identity,
    ) -> Result<PathBuf, TrainError> {
        let state = StateFile {
            format: 1,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            step: self.step,
            updates: self.optimizer.updates,
            best: self.best,
            evaluations_without_improvement: self.evaluations_without_improvement,
            stopped_early: self.stopped_early,
            loss_scale: self.loss_scale,
            identity: identity.clone(),
        };
        let mut files = model.files(&self.parameters, base)?;
        files.push((OPTIMIZER_FILE.to_owned(), self.encode_optimizer(model)?));
        files.push((STATE_FILE.to_owned(), serde_json::to_vec_pretty(&state).expect("plain data")));
        let files: Vec<NewFile<'_>> =
            files.iter().map(|(name, bytes)| NewFile { name, bytes: bytes.as_slice().into() }).collect();
        let about = serde_json::json!({"kind": "checkpoint", "step": self.step});
        Ok(commit_directory(disk, &run.join(CHECKPOINTS), &name(self.step), &files, &about)?)
    }

    fn encode_optimizer(&self, model: &Model) -> Result<Vec<u8>, ModelError> {
        let mut values = self.optimizer.first_moment.clone();
        values.extend_from_slice(&self.optimizer.second_moment);
        adapter::encode(&model.layout().repeated(&MOMENTS), &values)
    }

    /// Reads a checkpoint whose manifest was verified, after checking that it belongs to this run.
    pub(crate) fn load(path: &Path, model: &Model, identity: &Identity) -> Result<TrainState, TrainError> {
        let state = StateFile::read(path)?;
        let differences = state.identity.differences(identity);
        if !differences.is_empty() {
            return Err(TrainError::Changed { path: path.to_owned(), differences });
        }
        let parameters = model.read_values(path)?;
        let mut first_moment = adapter::read_flat(&path.join(OPTIMIZER_FILE), &model.layout().repeated(&MOMENTS))?;
        let second_moment = first_moment.split_off(parameters.len());
        Ok(TrainState {
            step: state.step,
            parameters,
            optimizer: AdamW { first_moment, second_moment, updates: state.updates },
            best: state.best,
            evaluations_without_improvement: state.evaluations_without_improvement,
            stopped_early: state.stopped_early,
            loss_scale: state.loss_scale,
        })
    }
}

impl StateFile {
    fn read(path: &Path) -> Result<StateFile, TrainError> {
        let file = path.join(STATE_FILE);
        let failed = |what: String| TrainError::Checkpoint { path: file.clone(), what };
        let text = std::fs::read_to_string(&file).map_err(|error| failed(error.to_string()))?;
        let state: StateFile = serde_json::from_str(&text).map_err(|error| failed(error.to_string()))?;
        match state.format {
            1 => Ok(state),
            other => Err(failed(format!("format {other}; this version reads format 1"))),
        }
    }
}

/// Removes the oldest checkpoints beyond `keep_last`, but never the best one.
pub(crate) fn prune(disk: &dyn Disk, run: &Path, keep_last: usize, best: Option<u64>) -> Result<(), TrainError> {
    let all = numbered(disk, &run.join(CHECKPOINTS), "step-")?;
    let excess = all.len().saturating_sub(keep_last);
    for (step, path) in &all[..excess] {
        if Some(*step) != best {
            remove_directory(disk, path)?;
        }
    }
    Ok(())
}
