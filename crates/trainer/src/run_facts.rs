//! `run.json`: what a run says of itself to those who look at it from outside, and whether it has
//! ended.
//!
//! It holds times, names of hosts and sizes of memory. So it differs between runs of one recipe,
//! and nothing is ever computed from it.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use finetune_dataset::Dataset;
use finetune_recipe::Method;
use finetune_store::{RealDisk, StoreError, replace_file};
use serde::{Deserialize, Serialize};

use crate::card::{base_name, file_name};
use crate::error::TrainError;
use crate::snapshot::Snapshot;
use crate::state::Best;
use crate::train::Outcome;

/// The file's name in the run directory.
pub(crate) const FILE: &str = "run.json";

/// Digits of a commit that are enough to find it.
const COMMIT_DIGITS: usize = 12;

/// Whether a run goes on, as its process said last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunStatus {
    /// It goes on, unless its process was killed.
    #[default]
    Running,
    /// All steps are done, or early stopping has ended it.
    Done,
    /// A signal has stopped it.
    Stopped,
    /// An error has ended it.
    Failed,
}

/// A file of rows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RowFile {
    /// Its name without its folder.
    pub name: String,
    /// The number of rows that are used.
    pub rows: u64,
}

/// What a run says of itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunFacts {
    /// The version of the program.
    pub version: String,
    /// The commit that the program was built from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// Whether it goes on.
    pub status: RunStatus,
    /// The exit code, once it has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// The error that has ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run.
    pub steps: u64,
    /// When it began, before any resume, in seconds since 1970.
    pub started: u64,
    /// When this was written, in seconds since 1970.
    pub updated: u64,
    /// The base model.
    pub model: String,
    /// "lora" or "full".
    pub method: String,
    /// Files of training rows.
    pub train: Vec<RowFile>,
    /// Files of held-back rows.
    pub eval: Vec<RowFile>,
    /// The number of trained parameters.
    pub trained_parameters: u64,
    /// The device and number type.
    pub device: String,
    /// The host of each rank.
    pub hosts: Vec<String>,
    /// The rank of each layer, counted from the first of those that hold a model together. Empty if each rank
    /// has all layers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rank_of_layer: Vec<usize>,
    /// Bytes of memory that the process of rank 0, and those before it that the run goes on from, had at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_memory: Option<u64>,
    /// The same of the GPU's memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_peak_memory: Option<u64>,
    /// Bytes by the estimate.
    pub estimated_memory: u64,
    /// The best evaluation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best: Option<Best>,
}

/// How a run has ended, if it has.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct End {
    status: RunStatus,
    exit_code: Option<i32>,
    error: Option<String>,
}

impl End {
    /// The run is done.
    pub(crate) fn done() -> End {
        End { status: RunStatus::Done, exit_code: Some(0), error: None }
    }

    /// What [`crate::train()`] has come to.
    pub(crate) fn of(outcome: &Result<Outcome, TrainError>) -> End {
        match outcome {
            Ok(Outcome::Finished { .. }) => End::done(),
            // As shells report a program that a signal has ended.
            Ok(Outcome::Stopped { signal, .. }) => {
                End { status: RunStatus::Stopped, exit_code: Some(128 + signal), error: None }
            }
            Err(error) => End {
                status: RunStatus::Failed,
                exit_code: Some(error.fault().number()),
                error: Some(error.to_string()),
            },
        }
    }
}

impl RunFacts {
    /// The facts as they are now. `started`: seconds since 1970.
    pub(crate) fn new(run: &Snapshot<'_>, started: u64, end: &End) -> RunFacts {
        RunFacts {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            commit: run.commit.map(|commit| commit.chars().take(COMMIT_DIGITS).collect()),
            status: end.status,
            exit_code: end.exit_code,
            error: end.error.clone(),
            step: run.state.step,
            steps: run.steps,
            started,
            updated: now(),
            model: base_name(run.recipe),
            method: match run.recipe.train.method {
                Method::Lora => "lora".to_owned(),
                Method::Full => "full".to_owned(),
            },
            train: row_files(run.train),
            eval: run.eval.map(row_files).unwrap_or_default(),
            trained_parameters: run.model.spread().whole().len() as u64,
            device: run.device.to_owned(),
            hosts: run.who.iter().map(|who| who.host.clone()).collect(),
            rank_of_layer: run.model.placement().stage().map_or(Vec::new(), |stage| stage.of_layer.to_vec()),
            peak_memory: run.peak_memory.map(|peak| peak()),
            device_peak_memory: run.model.device_peak(),
            estimated_memory: run.estimate.total,
            best: run.state.best,
        }
    }

    /// The facts of a run directory; `None` if there are none, or if they cannot be read.
    pub(crate) fn read(run: &Path) -> Option<RunFacts> {
        RunFacts::parse(&std::fs::read(run.join(FILE)).ok()?)
    }

    /// The facts in the bytes of a `run.json`.
    pub fn parse(bytes: &[u8]) -> Option<RunFacts> {
        // serde takes a list for a struct as well.
        let is_object = bytes.trim_ascii_start().starts_with(b"{");
        is_object.then(|| serde_json::from_slice(bytes).ok()).flatten()
    }

    pub(crate) fn write(&self, run: &Path) -> Result<(), StoreError> {
        let mut text = serde_json::to_vec_pretty(self).expect("plain data");
        text.push(b'\n');
        replace_file(&RealDisk, &run.join(FILE), &text)
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// The files of a dataset with the rows of each.
fn row_files(data: &Dataset) -> Vec<RowFile> {
    let mut files: Vec<RowFile> = data.files.iter().map(|file| RowFile { name: file_name(file), rows: 0 }).collect();
    for row in &data.rows {
        if let Some(file) = files.get_mut(row.origin.file as usize) {
            file.rows += 1;
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_of_other_versions_are_read_as_far_as_they_go() {
        let facts = RunFacts::parse(br#"{"status": "stopped", "step": 3, "colour": "blue"}"#).expect("facts");
        assert_eq!((facts.status, facts.step, facts.steps), (RunStatus::Stopped, 3, 0));
        for bytes in [&b""[..], b"[]", b"{\"status\": \"tired\"}", b"{\"step\": 3"] {
            assert_eq!(RunFacts::parse(bytes), None, "{}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        let folder = tempfile::tempdir().expect("a directory");
        assert_eq!(RunFacts::read(folder.path()), None);
        let facts = RunFacts { status: RunStatus::Failed, exit_code: Some(4), steps: 9, ..RunFacts::default() };
        facts.write(folder.path()).expect("written");
        assert_eq!(RunFacts::read(folder.path()), Some(facts));
    }

    #[test]
    fn ends_have_the_exit_codes_of_the_program() {
        let stopped = End::of(&Ok(Outcome::Stopped { step: 3, signal: 15 }));
        assert_eq!((stopped.status, stopped.exit_code), (RunStatus::Stopped, Some(143)));
        let failed = End::of(&Err(TrainError::NoBest));
        assert_eq!((failed.status, failed.exit_code), (RunStatus::Failed, Some(2)));
        assert!(failed.error.is_some_and(|error| error.contains("checkpoint.result")));
    }
}
