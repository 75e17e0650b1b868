//! What a run keeps on disk. Only rank 0 writes it.

use std::path::{Path, PathBuf};

use finetune_model::{FlatFile, Model};
use finetune_recipe::{Method, Recipe, ResultChoice};
use finetune_store::{
    Disk, RealDisk, RunLock, Staging, StoreError, bytes_of_tensors, numbered, replace_file, set_aside, sweep,
};

use crate::card::{model_card, model_card_of};
use crate::error::TrainError;
use crate::gathering::Gathered;
use crate::metrics::{Metrics, Row};
use crate::names::{CHECKPOINTS, RECIPE_FILE, RESULTS, free_name};
use crate::output_directory::{self, Contents};
use crate::ranks::Ranks;
use crate::report;
use crate::resume;
use crate::resume::Resume;
use crate::run_facts::{self, End, RunFacts};
use crate::samples::Answers;
use crate::snapshot::Snapshot;
use crate::state::{self, OPTIMIZER_FILE, STATE_FILE, TrainState, prune};
use crate::tensorboard::EventFile;

/// The model card of a result and of a checkpoint.
const CARD_FILE: &str = "README.md";

/// The run directory, as rank 0 holds it.
pub(crate) struct RunDirectory {
    /// The directory itself.
    pub(crate) directory: PathBuf,
    /// `metrics.jsonl`, open for appending.
    pub(crate) metrics: Metrics,
    /// TensorBoard's event file, if the recipe asks for one.
    events: Option<EventFile>,
    /// When the run began, in seconds since 1970.
    started: u64,
    /// The peaks of earlier processes of the run: of memory, and of the GPU's.
    earlier_peaks: (Option<u64>, Option<u64>),
    /// What it is written through.
    pub(crate) disk: Box<dyn Disk>,
    /// The newest checkpoint.
    pub(crate) saved: Option<PathBuf>,
    _lock: RunLock,
}

impl RunDirectory {
    /// Appends a row to the metrics, and to the event file.
    pub(crate) fn append(&mut self, row: Row) -> Result<(), TrainError> {
        if let Some(events) = &mut self.events {
            events.append(&row)?;
        }
        Ok(self.metrics.append(row)?)
    }

    /// Writes what the run says of itself, `run.json` and the report, as things stand.
    pub(crate) fn describe(&self, run: &Snapshot<'_>, end: &End) -> Result<(), TrainError> {
        let mut facts = RunFacts::new(run, self.started, end);
        facts.peak_memory = facts.peak_memory.max(self.earlier_peaks.0);
        facts.device_peak_memory = facts.device_peak_memory.max(self.earlier_peaks.1);
        facts.write(&self.directory)?;
        report::write(run, &self.directory, &self.metrics.rows, &facts)
    }

    /// Commits the state as `checkpoints/step-NNNNNN`, with the files of the trained model. It
    /// appears whole or not at all. Returns its path. The other ranks send what they have of the state meanwhile.
    pub(crate) fn save(&self, run: &Snapshot<'_>, ranks: &Ranks) -> Result<PathBuf, TrainError> {
        self.metrics.sync()?;
        if let Some(events) = &self.events {
            events.sync()?;
        }
        let mut files = self.files(run)?;
        let date = run.tokenizer.filter(|tokenizer| tokenizer.uses_date()).map(|_| run.date);
        files.push(Content::Flat(run.state.optimizer_file(run.model), run.state.optimizer_vectors()));
        files.push(Content::Bytes(STATE_FILE.to_owned(), run.state.encode_numbers(run.identity, date)));
        let step = run.state.step;
        let about = about("checkpoint", step, run);
        let (checkpoints, name) = (self.directory.join(CHECKPOINTS), state::name(step));
        let path = checkpoints.join(&name);
        // A checkpoint of this step exists only if its evaluation was interrupted, and has been
        // made since.
        if self.disk.exists(&path).unwrap_or(false) {
            let staging = Staging::begin_replacing(&*self.disk, &path, "checkpoint")?;
            return Ok(written(staging, &files, run.model, ranks)?.publish_replacing(&about)?);
        }
        let staging = Staging::begin(&*self.disk, &checkpoints, &name)?;
        Ok(written(staging, &files, run.model, ranks)?.publish(&about)?)
    }

    /// After a save: removes checkpoints that are not kept, and brings the report up to date.
    pub(crate) fn tidy(&self, run: &Snapshot<'_>) -> Result<(), TrainError> {
        self.prune(run)?;
        self.describe(run, &End::default())
    }

    /// Removes the checkpoints that are not kept.
    pub(crate) fn prune(&self, run: &Snapshot<'_>) -> Result<(), TrainError> {
        let best = run.state.best.filter(|_| keeps_best(run.recipe)).map(|best| best.step);
        prune(&*self.disk, &self.directory, run.recipe.checkpoint.keep_last, best)
    }

    /// The files of the trained model as it is now: parameters and the card. With them go the files
    /// by which other programs write and end text as this run did.
    fn files<'a>(&self, run: &Snapshot<'a>) -> Result<Vec<Content<'a>>, TrainError> {
        let card = (CARD_FILE.to_owned(), model_card(run, &self.metrics.rows).into_bytes());
        // Companions of the base with the same names are left out.
        let ours: Vec<(String, Vec<u8>)> = run.text.iter().cloned().chain([card]).collect();
        let mut beside = run.model.files_beside(run.base)?;
        beside.retain(|(name, _)| !ours.iter().any(|(known, _)| known == name));
        let bytes = |(name, bytes)| Content::Bytes(name, bytes);
        let values = run.model.values_file()?.map(|file| Content::Flat(file, vec![run.state.parameters.as_slice()]));
        Ok(beside.into_iter().map(bytes).chain(values).chain(ours.into_iter().map(bytes)).collect())
    }

    /// The step whose parameters are the result, as things stand: the best evaluation's if the
    /// recipe says so.
    pub(crate) fn result_step(&self, recipe: &Recipe, state: &TrainState) -> u64 {
        self.best_checkpoint(recipe, state).map_or(state.step, |(step, _)| step)
    }

    /// The checkpoint that is the result instead of the last state.
    fn best_checkpoint(&self, recipe: &Recipe, state: &TrainState) -> Option<(u64, PathBuf)> {
        let best = state.best.filter(|best| publishes_best(recipe) && best.step != state.step)?;
        let path = self.directory.join(CHECKPOINTS).join(state::name(best.step));
        // If the recipe does not ask for it, it may be missing: versions that did not publish the
        // best did not always keep it.
        (path.is_dir() || recipe.checkpoint.result.is_some()).then_some((best.step, path))
    }

    /// Whether the result is made of the state as it is, and not of an earlier checkpoint.
    pub(crate) fn publishes_state(&self, recipe: &Recipe, state: &TrainState) -> bool {
        self.best_checkpoint(recipe, state).is_none()
    }

    /// Writes the result under a name of its own: `adapter/`, or `model/` if all weights were
    /// trained. If [`RunDirectory::publishes_state`], the other ranks send what they have of it meanwhile.
    pub(crate) fn publish(&self, run: &Snapshot<'_>, ranks: &Ranks) -> Result<(), TrainError> {
        let name = match run.recipe.train.method {
            Method::Lora => RESULTS[0],
            Method::Full => RESULTS[1],
        };
        let step = self.result_step(run.recipe, run.state);
        let files = match self.best_checkpoint(run.recipe, run.state) {
            Some((step, path)) => self.files_of_best(run, step, &path)?,
            None => self.files(run)?,
        };
        let about = about(name, step, run);
        let staging = Staging::begin_replacing(&*self.disk, &self.directory.join(name), name)?;
        written(staging, &files, run.model, ranks)?.publish_replacing(&about)?;
        Ok(())
    }

    /// The files of the trained model from the best checkpoint, without those that only a resume
    /// needs.
    fn files_of_best<'a>(&self, run: &Snapshot<'_>, step: u64, path: &Path) -> Result<Vec<Content<'a>>, TrainError> {
        let unfit = |what: String| TrainError::BestCheckpoint { path: path.to_owned(), what };
        let manifest = resume::check(&*self.disk, path, Some(step)).map_err(|error| unfit(error.to_string()))?;
        let mut files = Vec::new();
        for record in manifest.files {
            if [OPTIMIZER_FILE, STATE_FILE, CARD_FILE].contains(&record.name.as_str()) {
                continue;
            }
            let bytes = self.disk.read(&path.join(&record.name)).map_err(|error| unfit(error.to_string()))?;
            files.push(Content::Bytes(record.name, bytes));
        }
        let card = model_card_of(run, &self.metrics.rows, step).into_bytes();
        files.push(Content::Bytes(CARD_FILE.to_owned(), card));
        Ok(files)
    }
}

/// A file of a checkpoint or result.
enum Content<'a> {
    /// Its name and bytes.
    Bytes(String, Vec<u8>),
    /// Made tensor by tensor of vectors of which this rank has a part.
    Flat(FlatFile, Vec<&'a [f32]>),
}

impl Content<'_> {
    /// Bytes on disk.
    fn size(&self) -> Result<u64, StoreError> {
        match self {
            Content::Bytes(_, bytes) => Ok(bytes.len() as u64),
            Content::Flat(file, _) => bytes_of_tensors(&file.specs(), &FlatFile::metadata()),
        }
    }
}

/// The directory with these files written. What other ranks have of a vector comes from them, piece by piece.
fn written<'disk>(
    mut staging: Staging<'disk>,
    files: &[Content<'_>],
    model: &Model,
    ranks: &Ranks,
) -> Result<Staging<'disk>, TrainError> {
    staging.expect_bytes(files.iter().map(Content::size).sum::<Result<u64, StoreError>>()?);
    for file in files {
        let (file, vectors) = match file {
            Content::Bytes(name, bytes) => {
                staging.write(name, bytes)?;
                continue;
            }
            Content::Flat(file, vectors) => (file, vectors),
        };
        let mut gathered = Gathered::new(ranks, model.spread(), file, vectors.clone());
        let tensor = |n: usize| -> Result<Vec<u8>, TrainError> {
            let parts = match file.frozen(n) {
                Some(module) => vec![model.vocabulary_values(module)?],
                None => file.lengths(n).into_iter().map(|length| gathered.next(length)).collect::<Result<_, _>>()?,
            };
            Ok(file.bytes(n, &parts))
        };
        staging.write_tensors(&file.name, &file.specs(), &FlatFile::metadata(), tensor)?;
    }
    Ok(staging)
}

/// What the manifest of a checkpoint or a result says besides its files. An adapter fits its base as
/// it was packed while it was loaded.
fn about(kind: &str, step: u64, run: &Snapshot<'_>) -> serde_json::Value {
    let mut about = serde_json::json!({"kind": kind, "step": step, "base_digest": run.base_digest});
    if let Some(quantization) = run.recipe.model.quantization {
        about["quantization"] = quantization.as_str().into();
    }
    about
}

/// Whether the result is the best evaluation's checkpoint rather than the last state.
pub(crate) fn publishes_best(recipe: &Recipe) -> bool {
    match recipe.checkpoint.result {
        Some(ResultChoice::Best) => true,
        Some(ResultChoice::Last) => false,
        None => recipe.eval.early_stopping_patience.is_some(),
    }
}

/// Whether the best evaluation's checkpoint is kept, and written as soon as it is found.
pub(crate) fn keeps_best(recipe: &Recipe) -> bool {
    recipe.checkpoint.keep_best || publishes_best(recipe)
}

/// A run directory that nobody else may write to, and in which nothing has changed yet.
pub(crate) struct LockedDirectory {
    directory: PathBuf,
    lock: RunLock,
}

impl LockedDirectory {
    /// Takes the lock, and refuses what could not be done at the end. `file`: the recipe that is
    /// read. `model`: the directory of the base model.
    pub(crate) fn lock(
        recipe: &Recipe,
        resume: &Resume,
        file: Option<&Path>,
        model: Option<&Path>,
    ) -> Result<LockedDirectory, TrainError> {
        let directory = &recipe.output_dir;
        resume::check_argument(resume, &directory.join(CHECKPOINTS))?;
        let contents = output_directory::check(&RealDisk, recipe, file, model)?;
        if *resume == Resume::No && contents == Contents::Run {
            return Err(TrainError::Occupied { directory: directory.clone() });
        }
        let lock = RunLock::acquire(directory)?;
        check_results(&RealDisk, directory)?;
        Ok(LockedDirectory { directory: directory.clone(), lock })
    }

    /// Removes what a crash left, and finds the checkpoint to go on from.
    pub(crate) fn find(&self, resume: &Resume, notices: &mut Vec<String>) -> Result<Option<PathBuf>, TrainError> {
        if *resume == Resume::No && output_directory::is_occupied(&RealDisk, &self.directory)? {
            // Checked again, because another process may have finished a run here while this one
            // read its rows.
            return Err(TrainError::Occupied { directory: self.directory.clone() });
        }
        let checkpoints = self.directory.join(CHECKPOINTS);
        finetune_store::ensure_directory(&RealDisk, &checkpoints)?;
        sweep(&RealDisk, &checkpoints)?;
        sweep(&RealDisk, &self.directory)?;
        resume::find(&RealDisk, resume, &checkpoints, notices)
    }

    /// Opens the directory of a run that goes on from `state`, which is saved as `saved`.
    pub(crate) fn open(
        self,
        recipe: &Recipe,
        state: &TrainState,
        saved: Option<PathBuf>,
        notices: &mut Vec<String>,
    ) -> Result<RunDirectory, TrainError> {
        let (LockedDirectory { directory, lock }, step) = (self, state.step);
        set_later_aside(&RealDisk, &directory.join(CHECKPOINTS), step, notices)?;
        let metrics = Metrics::open(&directory, step, notices)?;
        keep_own_words(&directory, notices)?;
        replace_file(&RealDisk, &directory.join(RECIPE_FILE), recipe.to_toml().as_bytes())?;
        if step == 0 {
            Answers::forget(&directory)?;
        }
        let earlier = RunFacts::read(&directory).filter(|facts| step > 0 && facts.started > 0);
        let started = earlier.as_ref().map_or_else(run_facts::now, |facts| facts.started);
        let earlier_peaks = earlier.map_or((None, None), |facts| (facts.peak_memory, facts.device_peak_memory));
        let open =
            |folder: PathBuf| EventFile::open(&folder, &recipe.to_toml(), &metrics.rows, step, state.evaluation_due);
        let events = recipe.event_folder().map(open).transpose()?;
        let disk = Box::new(RealDisk);
        Ok(RunDirectory { directory, metrics, events, started, earlier_peaks, disk, saved, _lock: lock })
    }
}

/// Keeps a recipe with words of a person aside, because the recipe is about to be written anew.
fn keep_own_words(directory: &Path, notices: &mut Vec<String>) -> Result<(), TrainError> {
    let path = directory.join(RECIPE_FILE);
    let Some(text) = output_directory::read(&path).filter(|text| output_directory::has_own_words(text)) else {
        return Ok(());
    };
    let aside = free_name(directory, "aside-recipe", "toml");
    replace_file(&RealDisk, &aside, text.as_bytes())?;
    notices.push(format!("{} is written anew; as it was it is kept as {}", path.display(), aside.display()));
    Ok(())
}

/// Refuses results that the run's own result may not replace, before training rather than after it.
pub(crate) fn check_results(disk: &dyn Disk, directory: &Path) -> Result<(), TrainError> {
    for name in RESULTS {
        finetune_store::check_replaceable(disk, &directory.join(name))?;
    }
    Ok(())
}

/// Sets aside checkpoints beyond the one that the run goes on from: damaged ones, and those of
/// another course. Their names are about to be used again, and they must not count as the newest.
fn set_later_aside(
    disk: &dyn Disk,
    checkpoints: &Path,
    step: u64,
    notices: &mut Vec<String>,
) -> Result<(), TrainError> {
    for (later, path) in numbered(disk, checkpoints, "step-")? {
        if later > step {
            let aside = set_aside(disk, &path)?;
            notices.push(format!("{} is kept aside as {}", path.display(), aside.display()));
        }
    }
    Ok(())
}
