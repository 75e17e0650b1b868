//! What a run keeps on disk, and who may write it: rank 0, for all.

use std::path::{Path, PathBuf};

use finetune_recipe::{Method, Recipe};
use finetune_store::{
    Disk, NewFile, RealDisk, RunLock, newest_verified, numbered, replace_directory, replace_file, set_aside, sweep,
    verify_directory,
};

use crate::copies::COPIES;
use crate::error::TrainError;
use crate::evaluate::Answers;
use crate::metrics::Metrics;
use crate::prepare::{Resume, Run};
use crate::report;
use crate::state::{CHECKPOINTS, prune};

/// The run directory, as rank 0 holds it.
pub(crate) struct Journal {
    pub(crate) directory: PathBuf,
    pub(crate) metrics: Metrics,
    pub(crate) disk: Box<dyn Disk>,
    /// The newest checkpoint.
    pub(crate) saved: Option<PathBuf>,
    _lock: RunLock,
}

impl Journal {
    /// Commits the run's state as a checkpoint, and brings the report up to it.
    pub(crate) fn save(&mut self, run: &Run) -> Result<PathBuf, TrainError> {
        self.metrics.sync()?;
        let path = run.state.save(&*self.disk, &self.directory, &run.model, &run.base, &run.identity)?;
        self.saved = Some(path.clone());
        self.prune(run)?;
        report::write(run, self)?;
        Ok(path)
    }

    pub(crate) fn prune(&self, run: &Run) -> Result<(), TrainError> {
        let best = run.state.best.filter(|_| run.recipe.checkpoint.keep_best).map(|best| best.step);
        prune(&*self.disk, &self.directory, run.recipe.checkpoint.keep_last, best)
    }

    /// The result under a name of its own: `adapter/`, or `model/` where all weights were trained.
    pub(crate) fn publish(&self, run: &Run) -> Result<(), TrainError> {
        let (name, kind) = match run.recipe.train.method {
            Method::Lora => ("adapter", "adapter"),
            Method::Full => ("model", "model"),
        };
        let files = run.model.files(&run.state.parameters, &run.base)?;
        let files: Vec<NewFile<'_>> =
            files.iter().map(|(name, bytes)| NewFile { name, bytes: bytes.as_slice().into() }).collect();
        let about = serde_json::json!({"kind": kind, "step": run.state.step});
        replace_directory(&*self.disk, &self.directory.join(name), &files, &about)?;
        Ok(())
    }
}

/// A run directory that nobody else may write to, and in which nothing has changed yet.
pub(crate) struct Claim {
    directory: PathBuf,
    lock: RunLock,
}

impl Claim {
    /// Takes the lock, and refuses what could not be done at the end.
    pub(crate) fn stake(directory: &Path, resume: &Resume) -> Result<Claim, TrainError> {
        if *resume == Resume::No {
            refuse_occupied(&RealDisk, directory)?;
        }
        let lock = RunLock::acquire(directory)?;
        check_results(&RealDisk, directory)?;
        Ok(Claim { directory: directory.to_owned(), lock })
    }

    /// Clears away what a crash left, and finds the checkpoint to go on from.
    pub(crate) fn find(&self, resume: &Resume, notices: &mut Vec<String>) -> Result<Option<PathBuf>, TrainError> {
        if *resume == Resume::No {
            // Asked again: another process may have finished a run here while this one read its rows.
            refuse_occupied(&RealDisk, &self.directory)?;
        }
        let checkpoints = self.directory.join(CHECKPOINTS);
        finetune_store::ensure_directory(&RealDisk, &checkpoints)?;
        sweep(&RealDisk, &checkpoints)?;
        sweep(&RealDisk, &self.directory)?;
        find(&RealDisk, resume, &checkpoints, notices)
    }

    /// The journal of a run that has done `step` steps, the last of them saved as `saved`.
    pub(crate) fn open(
        self,
        recipe: &Recipe,
        step: u64,
        saved: Option<PathBuf>,
        notices: &mut Vec<String>,
    ) -> Result<Journal, TrainError> {
        let Claim { directory, lock } = self;
        set_later_aside(&RealDisk, &directory.join(CHECKPOINTS), step, notices)?;
        let metrics = Metrics::open(&directory, step)?;
        replace_file(&RealDisk, &directory.join("recipe.toml"), recipe.to_toml().as_bytes())?;
        if step == 0 {
            Answers::forget(&directory)?;
        }
        Ok(Journal { directory, metrics, disk: Box::new(RealDisk), saved, _lock: lock })
    }
}

/// The result will replace `adapter/` or `model/`: refused now rather than after training if it may not.
pub(crate) fn check_results(disk: &dyn Disk, directory: &Path) -> Result<(), TrainError> {
    for name in ["adapter", "model"] {
        finetune_store::check_replaceable(disk, &directory.join(name))?;
    }
    Ok(())
}

/// A directory with checkpoints or a result is not written over without being asked.
fn refuse_occupied(disk: &dyn Disk, directory: &Path) -> Result<(), TrainError> {
    if is_occupied(disk, directory)? { Err(TrainError::Occupied { directory: directory.to_owned() }) } else { Ok(()) }
}

/// Whether a run has left checkpoints or a result here.
pub(crate) fn is_occupied(disk: &dyn Disk, directory: &Path) -> Result<bool, TrainError> {
    let mut has_checkpoints = false;
    // Copies may be all that is left of a run whose host was lost.
    for folder in [CHECKPOINTS, COPIES] {
        let checkpoints = directory.join(folder);
        has_checkpoints |= checkpoints.is_dir() && !numbered(disk, &checkpoints, "step-")?.is_empty();
    }
    Ok(has_checkpoints || directory.join("adapter").is_dir() || directory.join("model").is_dir())
}

/// Checkpoints beyond the one that the run goes on from, torn or of a course not taken, make way: their names are
/// about to be used again, and they must not count as the newest ones.
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

fn find(
    disk: &dyn Disk,
    resume: &Resume,
    checkpoints: &Path,
    notices: &mut Vec<String>,
) -> Result<Option<PathBuf>, TrainError> {
    match resume {
        Resume::No => Ok(None),
        Resume::From(path) if !path.is_dir() => {
            Err(TrainError::Checkpoint { path: path.clone(), what: "there is no such checkpoint".to_owned() })
        }
        Resume::From(path) => {
            verify_directory(disk, path)?;
            notices.push(format!("going on from {}", path.display()));
            Ok(Some(path.clone()))
        }
        Resume::Newest => {
            let (newest, rejected) = newest_verified(disk, checkpoints, "step-")?;
            for bad in rejected {
                notices.push(format!("{} is passed over: {}", bad.path.display(), bad.why));
            }
            match newest {
                Some((step, path, _)) => {
                    notices.push(format!("going on from {} (step {step})", path.display()));
                    Ok(Some(path))
                }
                None => {
                    notices.push(format!("no checkpoint in {}: starting from the beginning", checkpoints.display()));
                    Ok(None)
                }
            }
        }
    }
}
