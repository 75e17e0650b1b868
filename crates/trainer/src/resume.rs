//! Which checkpoint a run goes on from: the newest that is whole and agrees with its name, or the
//! one that the user names.

use std::path::{Path, PathBuf};

use finetune_store::{Disk, Holding, Manifest, RealDisk, StoreError, numbered, recognize, verify_directory};

use crate::error::TrainError;
use crate::names::{CHECKPOINTS, RESULTS};
use crate::output_directory::kind_of;
use crate::state::{STATE_FILE, StateFile};

/// Where a run starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// From the beginning.
    No,
    /// From the newest checkpoint that verifies; from the beginning if there is none.
    Newest,
    /// From this checkpoint, or from the newest of this run.
    From(PathBuf),
}

/// The checkpoint to go on from; `None`: from the beginning.
pub(crate) fn find(
    disk: &dyn Disk,
    resume: &Resume,
    checkpoints: &Path,
    notices: &mut Vec<String>,
) -> Result<Option<PathBuf>, TrainError> {
    match resume {
        Resume::No => Ok(None),
        Resume::Newest => newest_of(disk, checkpoints, notices),
        Resume::From(path) => match meant(path, checkpoints)? {
            Meant::Checkpoint => {
                check(disk, path, None).map_err(|unfit| match unfit {
                    Unfit::Damaged(error) => TrainError::Store(error),
                    Unfit::Other(what) => TrainError::Checkpoint { path: path.clone(), what },
                })?;
                notices.push(format!("going on from {}", path.display()));
                Ok(Some(path.clone()))
            }
            Meant::Folder(folder) => {
                let found = newest_of(disk, &folder, notices)?;
                let none = || TrainError::NoCheckpoint {
                    path: folder.clone(),
                    what: "no checkpoint in it can be gone on from".to_owned(),
                    hints: vec!["without a value `--resume` starts from the beginning where there is none".to_owned()],
                };
                found.map(Some).ok_or_else(none)
            }
        },
    }
}

/// Refuses a path that is no checkpoint at once, before rows are read.
pub(crate) fn check_argument(resume: &Resume, checkpoints: &Path) -> Result<(), TrainError> {
    match resume {
        Resume::From(path) => meant(path, checkpoints).map(drop),
        Resume::No | Resume::Newest => Ok(()),
    }
}

/// The newest checkpoint of a run's folder of checkpoints that verifies and agrees with its name,
/// with its step. Adds to `passed_over` why newer ones were passed over, a line for each.
fn newest(
    disk: &dyn Disk,
    checkpoints: &Path,
    passed_over: &mut Vec<String>,
) -> Result<Option<(u64, PathBuf)>, TrainError> {
    for (step, path) in numbered(disk, checkpoints, "step-")?.into_iter().rev() {
        match check(disk, &path, Some(step)) {
            Ok(_) => return Ok(Some((step, path))),
            Err(why) => passed_over.push(format!("{} is passed over: {why}", path.display())),
        }
    }
    Ok(None)
}

/// The newest checkpoint, with a notice of what the run goes on from.
fn newest_of(disk: &dyn Disk, checkpoints: &Path, notices: &mut Vec<String>) -> Result<Option<PathBuf>, TrainError> {
    let found = newest(disk, checkpoints, notices)?;
    let Some((step, path)) = found else {
        refuse_finished(checkpoints, notices)?;
        notices.push(format!("no checkpoint in {}: starting from the beginning", checkpoints.display()));
        return Ok(None);
    };
    notices.push(format!("going on from {} (step {step})", path.display()));
    Ok(Some(path))
}

/// Refuses to start again if a result without a checkpoint is all that is left of a run. The new
/// run would put another result in its place.
fn refuse_finished(checkpoints: &Path, passed_over: &[String]) -> Result<(), TrainError> {
    let directory = checkpoints.parent().unwrap_or(Path::new("."));
    let result = RESULTS.iter().map(|name| directory.join(name)).find(|path| path.is_dir());
    let passed_over: Vec<String> =
        passed_over.iter().filter(|line| line.contains(" is passed over: ")).cloned().collect();
    match result {
        Some(result) => Err(TrainError::NothingLeft { result, passed_over }),
        None => Ok(()),
    }
}

/// Why a run cannot go on from a checkpoint.
#[derive(Debug)]
pub(crate) enum Unfit {
    Damaged(StoreError),
    Other(String),
}

impl std::fmt::Display for Unfit {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Unfit::Damaged(error) => error.fmt(formatter),
            Unfit::Other(what) => formatter.write_str(what),
        }
    }
}

/// Reads every byte of a checkpoint, and compares its manifest, its state and its name (`number`).
/// Another program, or a person, may have put something else in its place.
pub(crate) fn check(disk: &dyn Disk, path: &Path, number: Option<u64>) -> Result<Manifest, Unfit> {
    let other = |what: String| Err(Unfit::Other(what));
    let manifest = verify_directory(disk, path).map_err(Unfit::Damaged)?;
    if manifest.kind != "checkpoint" {
        return other(format!("its manifest calls it `{}`, not `checkpoint`", manifest.kind));
    }
    let step = manifest.field("step").and_then(serde_json::Value::as_u64);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let named = number.or_else(|| name.strip_prefix("step-")?.parse().ok());
    if named.is_some_and(|named| step != Some(named)) {
        let step = step.map_or("no step".to_owned(), |step| format!("step {step}"));
        return other(format!("its manifest is of {step}"));
    }
    let state = StateFile::read(path).map_err(|error| Unfit::Other(error.to_string()))?;
    if Some(state.step) != step {
        return other(format!("{STATE_FILE} is of step {}, its manifest is not", state.step));
    }
    Ok(manifest)
}

/// What `--resume PATH` means.
#[derive(Debug, PartialEq, Eq)]
enum Meant {
    Checkpoint,
    /// The newest checkpoint of this folder.
    Folder(PathBuf),
}

/// What a path given to `--resume` means; an error if it is no checkpoint.
fn meant(path: &Path, checkpoints: &Path) -> Result<Meant, TrainError> {
    if path.join(CHECKPOINTS).is_dir() {
        return Ok(Meant::Folder(path.join(CHECKPOINTS)));
    }
    let has_numbered = |folder: &Path| numbered(&RealDisk, folder, "step-").is_ok_and(|found| !found.is_empty());
    if path.is_dir() && has_numbered(path) {
        return Ok(Meant::Folder(path.to_owned()));
    }
    let kind = kind_of(path);
    let is_written_by_us = match &kind {
        Some(kind) => kind == "checkpoint",
        // The manifest is lost or damaged. Verifying it will say so.
        None => path.join(STATE_FILE).is_file() && path.join(crate::state::OPTIMIZER_FILE).is_file(),
    };
    if is_written_by_us {
        return Ok(Meant::Checkpoint);
    }
    let (what, hints) = described(path, checkpoints);
    Err(TrainError::NoCheckpoint { path: path.to_owned(), what, hints })
}

/// What a path holds that is no checkpoint, and hints what it may be good for.
fn described(path: &Path, checkpoints: &Path) -> (String, Vec<String>) {
    let shown = path.display();
    let is_transformers =
        ["optimizer.pt", "scheduler.pt", "training_args.bin"].iter().any(|name| path.join(name).is_file());
    let holding = recognize(path);
    let (what, hint) = match holding {
        Holding::Missing => ("there is no such checkpoint".to_owned(), None),
        _ if is_transformers => (
            "a checkpoint of transformers' Trainer, whose optimizer state is not read".to_owned(),
            Some(format!("its adapter can start a new run: lora.init_from = {shown:?}")),
        ),
        Holding::Adapter => (
            format!("{}, and no checkpoint: it has no optimizer state to go on from", holding.describe()),
            Some(format!("it can start a new run: lora.init_from = \"{shown}\", with another output_dir")),
        ),
        Holding::ModelDirectory => (
            format!("{}, and no checkpoint: it has no optimizer state to go on from", holding.describe()),
            Some(format!("it can start a new run: model.path = \"{shown}\", with another output_dir")),
        ),
        Holding::Recipe => (
            format!("{}, and no checkpoint", holding.describe()),
            Some(format!("the recipe comes first: finetune run {shown} --resume")),
        ),
        _ => {
            let around = path.parent().filter(|parent| kind_of(parent).as_deref() == Some("checkpoint"));
            let hint = around.map(|around| format!("the directory is meant: {}", around.display()));
            (format!("{}, and no checkpoint", holding.describe()), hint)
        }
    };
    (what, hint.into_iter().chain([present(checkpoints)]).collect())
}

/// A hint that lists the newest checkpoints, for a user who named another path.
fn present(checkpoints: &Path) -> String {
    let found = numbered(&RealDisk, checkpoints, "step-").unwrap_or_default();
    let names: Vec<String> = found
        .iter()
        .rev()
        .take(5)
        .map(|(_, path)| path.file_name().unwrap_or_default().to_string_lossy().into_owned())
        .collect();
    match names.is_empty() {
        true => format!("`--resume` alone takes the newest of {}, which has none yet", checkpoints.display()),
        false => format!("{} has {}; `--resume` alone takes the newest", checkpoints.display(), names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use finetune_advice::Advice as _;
    use finetune_store::{Staging, replace_file};

    use super::*;

    /// A directory with a manifest of `kind` and `step`, and a state of `state`.
    fn commit(parent: &Path, name: &str, kind: &str, step: u64, state: u64) -> PathBuf {
        let identity =
            serde_json::json!({"recipe": [], "train_data": "", "eval_data": null, "model": "", "layout": ""});
        let text = serde_json::json!({
            "format": 1, "version": "0", "step": state, "updates": state, "best": null,
            "evaluations_without_improvement": 0, "stopped_early": false, "identity": identity,
        });
        let mut staging = Staging::begin(&RealDisk, parent, name).expect("a new directory");
        staging.write(STATE_FILE, text.to_string().as_bytes()).expect("written");
        staging.write(crate::state::OPTIMIZER_FILE, b"x").expect("written");
        staging.publish(&serde_json::json!({"kind": kind, "step": step})).expect("published")
    }

    #[test]
    fn what_does_not_agree_with_its_name_is_passed_over() {
        let folder = tempfile::tempdir().expect("a directory");
        let checkpoints = folder.path().join("checkpoints");
        let good = commit(&checkpoints, "step-000002", "checkpoint", 2, 2);
        for (name, kind, step, state, why) in [
            ("step-000003", "adapter", 3, 3, "its manifest calls it `adapter`"),
            ("step-000004", "checkpoint", 2, 2, "its manifest is of step 2"),
            ("step-000005", "checkpoint", 5, 4, "trainer_state.json is of step 4"),
        ] {
            let path = commit(&checkpoints, name, kind, step, state);
            let mut passed_over = Vec::new();
            let found = newest(&RealDisk, &checkpoints, &mut passed_over).expect("readable");
            assert_eq!(found, Some((2, good.clone())), "{name}");
            assert!(passed_over.iter().any(|line| line.contains(name) && line.contains(why)), "{passed_over:?}");
            // If the user names it, it is refused for the same reason.
            let resume = Resume::From(path);
            let error = find(&RealDisk, &resume, &checkpoints, &mut Vec::new()).expect_err(name);
            assert!(error.to_string().contains(why) || kind == "adapter", "{error}");
        }
        // A copy under a name of the user's own is accepted.
        let copy = commit(folder.path(), "kept", "checkpoint", 7, 7);
        let found = find(&RealDisk, &Resume::From(copy.clone()), &checkpoints, &mut Vec::new()).expect("whole");
        assert_eq!(found, Some(copy));
    }

    #[test]
    fn a_run_means_its_newest_checkpoint() {
        let folder = tempfile::tempdir().expect("a directory");
        let checkpoints = folder.path().join("run/checkpoints");
        let newest = commit(&checkpoints, "step-000004", "checkpoint", 4, 4);
        commit(&checkpoints, "step-000002", "checkpoint", 2, 2);
        for named in [folder.path().join("run"), checkpoints.clone()] {
            let found = find(&RealDisk, &Resume::From(named), Path::new("other/checkpoints"), &mut Vec::new());
            assert_eq!(found.expect("a run"), Some(newest.clone()));
        }
    }

    #[test]
    fn a_result_without_a_checkpoint_is_kept() {
        let folder = tempfile::tempdir().expect("a directory");
        let checkpoints = folder.path().join("run/checkpoints");
        let begin = |notices: &mut Vec<String>| find(&RealDisk, &Resume::Newest, &checkpoints, notices);
        assert!(begin(&mut Vec::new()).is_ok_and(|found| found.is_none()), "nothing there: from the beginning");
        let torn = commit(&checkpoints, "step-000002", "checkpoint", 2, 2);
        replace_file(&RealDisk, &torn.join(STATE_FILE), b"{").expect("damaged");
        assert!(begin(&mut Vec::new()).is_ok_and(|found| found.is_none()), "no result yet");
        commit(&folder.path().join("run"), "adapter", "adapter", 9, 9);
        let error = begin(&mut Vec::new()).expect_err("a result");
        assert!(error.to_string().contains("adapter"), "{error}");
        let hints = error.hints().join("\n");
        assert!(hints.contains("step-000002 is passed over") && hints.contains("--output-dir"), "{hints}");
    }
}
