//! Puts a run together: everything that can be refused is refused here, before the first step and before anything in the run
//! directory changes. To what [`examine`] finds it adds the lock of the run directory, what the ranks agree on, the loaded
//! model, and the checkpoint to go on from.

use std::sync::Arc;

use finetune_recipe::Recipe;
use finetune_store::RealDisk;

use crate::base_model::{base_name, model_directory, open_model};
use crate::copies::bring_newest;
use crate::date;
use crate::device_plan::ThisHost;
use crate::disk_need::DiskNeed;
use crate::error::TrainError;
use crate::examine::{Examined, Extent, Ready, examine};
use crate::identity::Identity;
use crate::loss_scale::LossScale;
use crate::memory::Subject;
use crate::names::CHECKPOINTS;
use crate::objective::Objective;
use crate::ranks::Ranks;
use crate::resume::Resume;
use crate::run::Run;
use crate::run_directory::{LockedDirectory, publishes_best};
use crate::schedule::Schedule;
use crate::state::{self, TrainState};

/// A run and what the user should know about how it came together.
pub struct Prepared {
    pub run: Run,
    pub notices: Vec<String>,
}

/// Opens everything, takes the lock of the run directory, and finds where to start. A run that will not fit into the memory
/// there is, by the estimate, is refused. All ranks call it, and all must have the same; only rank 0 uses the
/// run directory.
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

fn put_together(
    mut recipe: Recipe,
    resume: &Resume,
    ranks: &Arc<Ranks>,
    host: &ThisHost,
    progress: &dyn Fn(u64),
) -> Result<Prepared, TrainError> {
    let model_path = model_directory(&recipe);
    // Before the long work, so that a second process is refused at once.
    let locked = match ranks.is_first() {
        true => {
            let (file, model) = (host.recipe_file.as_deref(), model_path.as_deref().ok());
            Some(LockedDirectory::lock(&recipe, resume, file, model)?)
        }
        false => None,
    };
    let date = date::agree(&recipe, resume, ranks)?;
    recipe.data.date = Some(date.clone());
    let found = examine(Examined::default(), &recipe, model_path, host, Extent::Run, ranks.is_first(), progress);
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
        sizing,
        estimate,
        mut notices,
    } = found.ready()?;
    let opened = open_model(&recipe, &directory, start, &device_plan.placement);
    let (mut model, model_digest) = opened.map_err(|error| {
        error.with_cheaper_settings(|| {
            Subject { recipe: &recipe, train: &train, eval: eval.as_ref(), sizing: &sizing }.cheaper_settings()
        })
    })?;
    let identity = Identity {
        recipe: Identity::recipe_values(&recipe),
        train_data: train.digest.clone(),
        eval_data: eval.as_ref().map(|eval| eval.digest.clone()),
        model: model_digest.clone(),
        layout: model.layout().digest(),
        compute: Some(device_plan.compute()),
    };
    ranks.expect_same(&identity.digests())?;
    let mut state = TrainState::new(model.parameters()?, LossScale::new(device_plan.placement.compute()));
    ranks.expect_same(&[("set of starting weights", state.digest())])?;
    let mut run_directory = None;
    bring_newest(&recipe.output_dir, resume, ranks, &identity, &mut notices)?;
    if let Some(locked) = locked {
        let from = locked.find(resume, &mut notices)?;
        if let Some(path) = &from {
            let patience = recipe.eval.early_stopping_patience;
            state = TrainState::load(path, &model, &identity, patience, &mut notices)?;
            if state.step > steps {
                return Err(TrainError::PastTheEnd { path: path.clone(), step: state.step, last: steps });
            }
            notices.extend(best_is_missing(&recipe, &state)?);
        }
        if state.step < steps && !state.stopped_early {
            let trained = state.parameters.len() as u64;
            DiskNeed::new(&recipe, trained, steps, eval.is_some(), sizing.text_bytes, host.disk).check(&recipe)?;
        }
        run_directory = Some(locked.open(&recipe, state.step, from, &mut notices)?);
    }
    ranks.share_state(&mut state)?;
    model.set_parameters(&state.parameters);
    let run = Run {
        objective: Objective::CrossEntropy,
        schedule: Schedule::new(&recipe.schedule, recipe.optimizer.learning_rate, steps),
        base: base_name(&recipe, &directory),
        base_digest: model_digest,
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
    };
    Ok(Prepared { run, notices })
}

/// What to say where the best checkpoint, which is to be the result, is not there any more. An error where it was asked for.
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
