//! Puts a run together. Everything that can be refused is refused here, before the first step and
//! before anything in the run directory changes. To what [`examine`] finds it adds the lock of the
//! run directory, what the ranks agree on, the loaded model, and the checkpoint.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use finetune_dataset::Dataset;
use finetune_model::Model;
use finetune_recipe::Recipe;
use finetune_store::RealDisk;

use crate::base_model::{base_name, model_directory, open_model};
use crate::copies::bring_newest;
use crate::date;
use crate::device_plan::{DevicePlan, ThisHost};
use crate::disk_need::DiskNeed;
use crate::error::TrainError;
use crate::examine::{Examined, Extent, Ready, examine};
use crate::identity::Identity;
use crate::initial_adapter::InitialAdapter;
use crate::loss_scale::LossScale;
use crate::memory::{Sizing, Subject};
use crate::names::CHECKPOINTS;
use crate::objective::Objective;
use crate::ranks::Ranks;
use crate::resume::Resume;
use crate::router_loss;
use crate::run::Run;
use crate::run_directory::{LockedDirectory, RunDirectory, publishes_best};
use crate::schedule::Schedule;
use crate::stages;
use crate::state::{self, TrainState};

/// A run, and what the user should know about how it was put together.
pub struct Prepared {
    /// The run, ready for its first step.
    pub run: Run,
    /// What the user should know.
    pub notices: Vec<String>,
}

/// Opens everything, takes the lock of the run directory, and finds where to start. All ranks call
/// it, and all must have the same input. Only rank 0 uses the run directory.
///
/// # Errors
/// If anything that the run needs is missing, wrong or different among the ranks. Also if the run
/// would not fit into memory or on the disk, by the estimates.
pub fn prepare(
    recipe: Recipe,
    resume: &Resume,
    ranks: &Arc<Ranks>,
    host: &ThisHost,
    progress: &dyn Fn(u64),
) -> Result<Prepared, TrainError> {
    // The others must not wait for a rank that cannot start.
    put_together(recipe, resume, ranks, host, progress).inspect_err(|error| ranks.abort(error))
}

/// As [`prepare`], without telling the other ranks of an error.
fn put_together(
    mut recipe: Recipe,
    resume: &Resume,
    ranks: &Arc<Ranks>,
    host: &ThisHost,
    progress: &dyn Fn(u64),
) -> Result<Prepared, TrainError> {
    let model_path = model_directory(&recipe);
    // Before the long work, so that a second process is refused at once.
    let lock = || LockedDirectory::lock(&recipe, resume, host.recipe_file.as_deref(), model_path.as_deref().ok());
    let locked = ranks.is_first().then(lock).transpose()?;
    stages::settle_early(&recipe, ranks)?;
    let date = date::agree(&recipe, resume, ranks)?;
    recipe.data.date = Some(date.clone());
    let found = examine(Examined::default(), &recipe, model_path, host, Extent::Run, Some(ranks), progress);
    let Ready {
        directory,
        device_plan,
        tokenizer,
        train,
        eval,
        start,
        plan,
        steps,
        text,
        mut sizing,
        estimate,
        mut notices,
    } = found.ready()?;
    let has_stages = stages::agree_on_groups(&mut sizing, ranks)?;
    let subject = Subject { recipe: &recipe, train: &train, eval: eval.as_ref(), sizing: &sizing };
    let estimate = if has_stages { subject.estimate() } else { estimate };
    let (mut model, base_digest) = open_connected(&subject, &directory, start, host, ranks, &mut notices)?;
    let identity = identity(&recipe, &train, eval.as_ref(), &model, &base_digest, &device_plan);
    ranks.expect_same(&identity.digests())?;
    let mut state = first_state(&mut model, &device_plan, ranks)?;
    bring_newest(&recipe.output_dir, resume, ranks, &identity, &mut notices)?;
    let start = Start { recipe: &recipe, resume, model: &model, identity: &identity, steps };
    let disk = |trained| DiskNeed::new(&recipe, trained, steps, eval.is_some(), sizing.text_bytes, host.disk);
    let run_directory = start.go_on(locked, &mut state, &disk, ranks, &mut notices)?;
    model.set_parameters(&state.parameters);
    let run = Run {
        objective: Objective::new(&recipe, &model.config),
        schedule: Schedule::new(&recipe.schedule, recipe.optimizer.learning_rate, steps),
        base: base_name(&recipe, &directory),
        base_digest,
        date,
        text,
        train,
        eval,
        tokenizer,
        ranks: Arc::clone(ranks),
        recipe,
        model,
        plan,
        steps,
        state,
        device: device_plan.describe(),
        estimate,
        sizing,
        directory: run_directory,
        identity,
        peak_memory: host.peak_memory,
        commit: host.commit,
    };
    Ok(Prepared { run, notices })
}

/// The base model with what is trained, connected with the other ranks that hold it, and its digest. What is missing
/// of its files is fetched first.
fn open_connected(
    subject: &Subject<'_>,
    directory: &Path,
    start: Option<InitialAdapter>,
    host: &ThisHost,
    ranks: &Ranks,
    notices: &mut Vec<String>,
) -> Result<(Model, String), TrainError> {
    let Sizing { config, placement, .. } = subject.sizing;
    stages::fetch_missing(subject.recipe, directory, placement, host, ranks)?;
    let opened =
        open_model(subject.recipe, directory, start, config.vocabulary, placement, host.machine.as_deref(), ranks);
    let (mut model, digest) = opened.map_err(|error| error.with_cheaper_settings(|| subject.cheaper_settings()))?;
    notices.extend(stages::connect(&mut model, ranks, subject.sizing.at_once)?);
    model.add_router_loss(router_loss::coefficient(subject.recipe, config));
    Ok((model, digest))
}

/// The state before the first step. Ranks with the same layers must have the same one.
fn first_state(model: &mut Model, device_plan: &DevicePlan, ranks: &Ranks) -> Result<TrainState, TrainError> {
    let state = TrainState::new(model.parameters()?, LossScale::new(device_plan.placement.compute()));
    ranks.expect_same_layers(&[("set of starting weights", state.digest())])?;
    Ok(state)
}

/// What a run is made of.
fn identity(
    recipe: &Recipe,
    train: &Dataset,
    eval: Option<&Dataset>,
    model: &Model,
    base_digest: &str,
    device_plan: &DevicePlan,
) -> Identity {
    Identity {
        recipe: Identity::recipe_values(recipe),
        train_data: train.digest.clone(),
        eval_data: eval.map(|eval| eval.digest.clone()),
        model: base_digest.to_owned(),
        layout: model.spread().whole().digest(),
        compute: Some(device_plan.compute()),
        new_tokens: recipe.data.add_tokens.clone(),
    }
}

/// What decides where a run starts.
struct Start<'a> {
    recipe: &'a Recipe,
    resume: &'a Resume,
    model: &'a Model,
    identity: &'a Identity,
    /// Steps of the whole run.
    steps: u64,
}

impl Start<'_> {
    /// Puts all ranks where the run goes on. Returns rank 0's run directory. `disk`: as for [`Start::find`].
    fn go_on(
        &self,
        locked: Option<LockedDirectory>,
        state: &mut TrainState,
        disk: &dyn Fn(u64) -> DiskNeed,
        ranks: &Ranks,
        notices: &mut Vec<String>,
    ) -> Result<Option<RunDirectory>, TrainError> {
        let find = |locked: &LockedDirectory| self.find(locked, state, disk, notices);
        let from = locked.as_ref().map(find).transpose()?.flatten();
        if ranks.share_state(state, from.is_some())? {
            state.load_vectors(from.as_deref(), self.model, ranks)?;
        }
        locked.map(|locked| locked.open(self.recipe, state, from, notices)).transpose()
    }

    /// Rank 0's part: finds the checkpoint to go on from, if there is one, and takes over what `state` has beside
    /// its vectors. `disk`: what the run needs on disk, for this many trained parameters.
    fn find(
        &self,
        locked: &LockedDirectory,
        state: &mut TrainState,
        disk: &dyn Fn(u64) -> DiskNeed,
        notices: &mut Vec<String>,
    ) -> Result<Option<PathBuf>, TrainError> {
        let recipe = self.recipe;
        let from = locked.find(self.resume, notices)?;
        if let Some(path) = &from {
            state.load_numbers(path, self.identity, recipe.eval.early_stopping_patience, notices)?;
            if state.step > self.steps {
                return Err(TrainError::PastTheEnd { path: path.clone(), step: state.step, last: self.steps });
            }
            notices.extend(best_is_missing(recipe, state)?);
        }
        if state.step < self.steps && !state.stopped_early {
            disk(self.model.spread().whole().len() as u64).check(recipe)?;
        }
        Ok(from)
    }
}

/// A notice if the best checkpoint, which is to be the result, is missing or damaged. It is an
/// error if the recipe asks for that result.
fn best_is_missing(recipe: &Recipe, state: &TrainState) -> Result<Option<String>, TrainError> {
    let Some(best) = state.best.filter(|best| publishes_best(recipe) && best.step != state.step) else {
        return Ok(None);
    };
    let path = recipe.output_dir.join(CHECKPOINTS).join(state::name(best.step));
    let checked = crate::resume::check(&RealDisk, &path, Some(best.step));
    match checked {
        Ok(_) => Ok(None),
        Err(why) if recipe.checkpoint.result.is_none() => Ok(Some(format!(
            "the checkpoint of the best evaluation, step {}, cannot become the result unless a better one comes: {why}",
            best.step
        ))),
        Err(why) => Err(TrainError::BestCheckpoint { path, what: why.to_string() }),
    }
}
