//! All that a run has to remember: one closed struct, saved as one directory.
//!
//! Nothing random is in it. The rows of a step and what dropout drops are functions of (seed,
//! step).

use std::path::Path;

use finetune_model::{FlatFile, Model};
use finetune_store::{Disk, numbered, remove_directory};
use serde::{Deserialize, Serialize};

use crate::adamw::AdamW;
use crate::error::TrainError;
use crate::gathering;
use crate::identity::Identity;
use crate::loss_scale::LossScale;
use crate::names::CHECKPOINTS;
use crate::ranks::Ranks;

/// The file with everything but the vectors.
pub(crate) const STATE_FILE: &str = "trainer_state.json";
/// The file with both moments.
pub(crate) const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// The prefixes of the moments' names, which are torch's names.
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];
/// The same, and what torch's SGD calls its velocity.
const MOMENTS_AND_VELOCITY: [&str; 3] = ["exp_avg", "exp_avg_sq", "momentum_buffer"];

/// The best evaluation so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The steps done at the evaluation.
    pub step: u64,
    /// The mean loss on held-back rows, in nats.
    pub eval_loss: f64,
}

/// Progress of a run after `step` steps. Where several ranks hold the layers of a model together, each has the values
/// and moments of its own layers.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainState {
    /// The number of steps done.
    pub step: u64,
    /// Values of the trained parameters, in the order of the layout.
    pub parameters: Vec<f32>,
    /// The optimizer's state.
    pub optimizer: AdamW,
    /// Of the averaged changes, with `distributed.sync_every`; `None` before the first average.
    pub(crate) velocity: Option<Vec<f32>>,
    /// The best evaluation so far, except the one before the first step.
    pub best: Option<Best>,
    /// Evaluations in a row since the best one.
    pub evaluations_without_improvement: u64,
    /// Whether early stopping has ended the run.
    pub stopped_early: bool,
    /// Whether the evaluation of this step is still to be made, because a signal interrupted it.
    pub(crate) evaluation_due: bool,
    /// The loss scale of training in f16.
    pub(crate) loss_scale: LossScale,
}

/// The content of trainer_state.json.
#[derive(Serialize, Deserialize)]
pub(crate) struct StateFile {
    format: u32,
    /// Version of the program that wrote it.
    version: String,
    pub(crate) step: u64,
    updates: u64,
    best: Option<Best>,
    evaluations_without_improvement: u64,
    stopped_early: bool,
    /// Left out if it is false. So a run that a signal stopped in an evaluation ends with the same
    /// files as one without a signal.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    evaluation_due: bool,
    /// Whether the optimizer's file has the velocity of averaged changes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    has_velocity: bool,
    #[serde(default)]
    loss_scale: LossScale,
    /// What the chat template's "today" is, if it asks for it. Versions that did not fix it left it
    /// out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) date: Option<String>,
    identity: Identity,
}

/// The name of a step's checkpoint.
pub(crate) fn name(step: u64) -> String {
    format!("step-{step:06}")
}

impl TrainState {
    /// The state before the first step.
    pub(crate) fn new(parameters: Vec<f32>, loss_scale: LossScale) -> TrainState {
        TrainState {
            step: 0,
            optimizer: AdamW::new(parameters.len()),
            parameters,
            velocity: None,
            best: None,
            evaluations_without_improvement: 0,
            stopped_early: false,
            evaluation_due: false,
            loss_scale,
        }
    }

    /// BLAKE3 of everything in it. Ranks that have done the same, with the same layers, have the same digest.
    pub(crate) fn digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(bytemuck::bytes_of(&self.to_numbers()));
        let vectors = [&self.parameters, &self.optimizer.first_moment, &self.optimizer.second_moment];
        for values in vectors.into_iter().chain(&self.velocity) {
            hasher.update(bytemuck::cast_slice(values));
        }
        hasher.finalize()
    }

    /// BLAKE3 of everything but the vectors, which is the same on all ranks.
    pub(crate) fn digest_of_numbers(&self) -> blake3::Hash {
        blake3::hash(bytemuck::bytes_of(&self.to_numbers()))
    }

    /// Everything but the vectors, for other ranks.
    pub(crate) fn to_numbers(&self) -> [u64; 8] {
        [
            self.step,
            self.optimizer.updates,
            u64::from(self.best.is_some()),
            self.best.map_or(0, |best| best.step),
            self.best.map_or(0, |best| best.eval_loss.to_bits()),
            self.evaluations_without_improvement,
            u64::from(self.stopped_early)
                | u64::from(self.evaluation_due) << 1
                | u64::from(self.velocity.is_some()) << 2,
            self.loss_scale.to_number(),
        ]
    }

    /// Takes over what [`Self::to_numbers`] gave on another rank.
    pub(crate) fn set_numbers(&mut self, numbers: &[u64; 8]) {
        let &[step, updates, has_best, best_step, eval_loss, evaluations_without_improvement, flags, loss_scale] =
            numbers;
        self.step = step;
        self.optimizer.updates = updates;
        self.best = (has_best == 1).then_some(Best { step: best_step, eval_loss: f64::from_bits(eval_loss) });
        self.evaluations_without_improvement = evaluations_without_improvement;
        (self.stopped_early, self.evaluation_due) = (flags & 1 == 1, flags & 2 == 2);
        let velocity = self.velocity.take().unwrap_or_else(|| vec![0.0; self.parameters.len()]);
        self.velocity = (flags & 4 == 4).then_some(velocity);
        self.loss_scale = LossScale::from_number(loss_scale);
    }

    /// The file of everything but the vectors.
    pub(crate) fn encode_numbers(&self, identity: &Identity, date: Option<&str>) -> Vec<u8> {
        let state = StateFile {
            format: 1,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            step: self.step,
            updates: self.optimizer.updates,
            best: self.best,
            evaluations_without_improvement: self.evaluations_without_improvement,
            stopped_early: self.stopped_early,
            evaluation_due: self.evaluation_due,
            has_velocity: self.velocity.is_some(),
            loss_scale: self.loss_scale,
            date: date.map(str::to_owned),
            identity: identity.clone(),
        };
        serde_json::to_vec_pretty(&state).expect("plain data")
    }

    /// The file of both moments, and of the velocity if there is one.
    pub(crate) fn optimizer_file(&self, model: &Model) -> FlatFile {
        let prefixes = if self.velocity.is_some() { &MOMENTS_AND_VELOCITY[..] } else { &MOMENTS };
        FlatFile::of(OPTIMIZER_FILE, &model.spread().whole().repeated(prefixes))
    }

    /// The vectors of that file, as far as this rank has them.
    pub(crate) fn optimizer_vectors(&self) -> Vec<&[f32]> {
        let AdamW { first_moment, second_moment, .. } = &self.optimizer;
        [first_moment, second_moment].into_iter().chain(&self.velocity).map(Vec::as_slice).collect()
    }

    /// Takes over everything but the vectors from a checkpoint whose manifest was verified, after checking that it
    /// belongs to this run. Changes that are allowed give notices. `patience`: the recipe's patience of early
    /// stopping.
    pub(crate) fn load_numbers(
        &mut self,
        path: &Path,
        identity: &Identity,
        patience: Option<u64>,
        notices: &mut Vec<String>,
    ) -> Result<(), TrainError> {
        let mut state = StateFile::read(path)?;
        let differences = state.identity.differences(identity);
        if !differences.is_empty() {
            return Err(TrainError::Changed { path: path.to_owned(), differences });
        }
        notices.extend(state.identity.changes(identity));
        let waited = state.evaluations_without_improvement;
        // The loop counts so too. So a run with the same patience stays stopped.
        state.stopped_early = state.stopped_early && patience.is_some_and(|patience| waited >= patience.max(1));
        if state.stopped_early {
            let best = state.best.map_or(String::new(), |best| format!("; the best was at step {}", best.step));
            notices.push(format!(
                "early stopping has ended this run after step {}{best}: nothing is left to do. A higher eval.early_stopping_patience goes on",
                state.step
            ));
        }
        self.step = state.step;
        self.optimizer.updates = state.updates;
        self.best = state.best;
        self.evaluations_without_improvement = state.evaluations_without_improvement;
        self.stopped_early = state.stopped_early;
        self.evaluation_due = state.evaluation_due;
        self.velocity = state.has_velocity.then(|| vec![0.0; self.parameters.len()]);
        self.loss_scale = state.loss_scale;
        Ok(())
    }

    /// Takes over the vectors from a checkpoint, which rank 0 reads for all: each has those of its layers. All ranks
    /// call it together. `path`: the checkpoint, on rank 0.
    pub(crate) fn load_vectors(&mut self, path: Option<&Path>, model: &Model, ranks: &Ranks) -> Result<(), TrainError> {
        if let Some(file) = model.values_file()? {
            gathering::read(ranks, model.spread(), &file, path, &mut [self.parameters.as_mut_slice()])?;
        }
        let file = self.optimizer_file(model);
        let AdamW { first_moment, second_moment, .. } = &mut self.optimizer;
        let vectors = [first_moment, second_moment].into_iter().chain(&mut self.velocity);
        let mut vectors: Vec<&mut [f32]> = vectors.map(Vec::as_mut_slice).collect();
        gathering::read(ranks, model.spread(), &file, path, &mut vectors)
    }

    /// Gives rank 0 what this rank has of a result, or of a checkpoint with its moments.
    pub(crate) fn send(&self, model: &Model, ranks: &Ranks, with_moments: bool) -> Result<(), TrainError> {
        if let Some(file) = model.values_file()? {
            gathering::send(ranks, model.spread(), &file, &[self.parameters.as_slice()])?;
        }
        if with_moments {
            gathering::send(ranks, model.spread(), &self.optimizer_file(model), &self.optimizer_vectors())?;
        }
        Ok(())
    }
}

impl StateFile {
    /// Reads the state of a checkpoint.
    pub(crate) fn read(path: &Path) -> Result<StateFile, TrainError> {
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

/// Whether a checkpoint belongs to the run that `identity` describes.
pub(crate) fn belongs(path: &Path, identity: &Identity) -> bool {
    StateFile::read(path).is_ok_and(|state| state.identity.differences(identity).is_empty())
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
