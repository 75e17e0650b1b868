//! `metrics.jsonl`: one object per optimizer step, one per evaluation.

use std::io::Write;
use std::path::{Path, PathBuf};

use finetune_store::{Operation, RealDisk, StoreError, failpoint, replace_file};
use serde::{Deserialize, Serialize};

pub(crate) const FILE: &str = "metrics.jsonl";

/// A row of an optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRow {
    /// Counts from 1.
    pub step: u64,
    /// Passes over the training data, this step included.
    pub epoch: f64,
    /// Σ token losses / trained tokens, before the update.
    pub loss: f64,
    pub trained_tokens: u64,
    pub tokens: u64,
    /// Norm of the mean gradient, before clipping.
    pub grad_norm: f64,
    pub learning_rate: f64,
    pub tokens_per_second: f64,
    /// Wall time of the step.
    pub seconds: f64,
    /// Each rank's part in it, in rank order; empty where there is only one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranks: Vec<RankRow>,
}

/// What one rank says of itself in a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankRow {
    pub rank: usize,
    /// Time it took to compute the losses and gradients of its rows in this step.
    pub seconds: f64,
    /// Tokens of these rows.
    #[serde(default)]
    pub tokens: u64,
    /// Payload bytes that it has sent since the run began, up to the losses of this step.
    pub sent: u64,
    /// The same received.
    pub received: u64,
    /// Seconds that it has waited for each rank since the run began, up to the losses of this step.
    pub waited_for: Vec<f64>,
}

/// A row of an evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalRow {
    /// 0: before the first step.
    pub step: u64,
    pub eval_loss: f64,
    /// Trained tokens of the evaluation data.
    pub eval_tokens: u64,
}

/// Either kind of row, as read back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Row {
    Step(StepRow),
    Eval(EvalRow),
}

impl Row {
    fn step(&self) -> u64 {
        match self {
            Row::Step(row) => row.step,
            Row::Eval(row) => row.step,
        }
    }
}

/// The rows of steps among these.
pub(crate) fn step_rows(rows: &[Row]) -> Vec<&StepRow> {
    rows.iter().filter_map(|row| if let Row::Step(row) = row { Some(row) } else { None }).collect()
}

/// The rows of evaluations among these.
pub(crate) fn eval_rows(rows: &[Row]) -> Vec<&EvalRow> {
    rows.iter().filter_map(|row| if let Row::Eval(row) = row { Some(row) } else { None }).collect()
}

/// The file, open for appending, and its rows so far.
#[derive(Debug)]
pub(crate) struct Metrics {
    path: PathBuf,
    file: std::fs::File,
    pub(crate) rows: Vec<Row>,
}

impl Metrics {
    /// Opens the file of a run that has done `step` steps: rows beyond them, and a torn last line, are taken out.
    pub(crate) fn open(directory: &Path, step: u64) -> Result<Metrics, StoreError> {
        let path = directory.join(FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(StoreError::io(&path, Operation::Read, 0, source)),
        };
        let rows: Vec<Row> = bytes
            .split(|&byte| byte == b'\n')
            .filter_map(|line| serde_json::from_slice(line).ok())
            .filter(|row: &Row| row.step() <= step)
            .collect();
        let rows = if step == 0 { Vec::new() } else { rows };
        let file = rewritten(&path, &rows)?;
        Ok(Metrics { path, file, rows })
    }

    /// Takes out the rows of this step's evaluation, which is made again: a run can be killed after it was made again and
    /// before the next checkpoint.
    pub(crate) fn forget_evaluation(&mut self, step: u64) -> Result<(), StoreError> {
        let made = |row: &Row| matches!(row, Row::Eval(row) if row.step == step);
        if !self.rows.iter().any(made) {
            return Ok(());
        }
        self.rows.retain(|row| !made(row));
        self.file = rewritten(&self.path, &self.rows)?;
        Ok(())
    }

    /// Appends a row in one write, so that a killed process leaves whole lines.
    pub(crate) fn append(&mut self, row: Row) -> Result<(), StoreError> {
        let text = line(&row);
        let written = self.file.write_all(text.as_bytes());
        written.map_err(|source| StoreError::io(&self.path, Operation::Write, text.len() as u64, source))?;
        self.rows.push(row);
        failpoint::hit("metrics.append");
        Ok(())
    }

    /// Makes the rows so far survive a power cut, which a checkpoint of the same step will.
    pub(crate) fn sync(&self) -> Result<(), StoreError> {
        self.file.sync_all().map_err(|source| StoreError::io(&self.path, Operation::Sync, 0, source))
    }
}

/// Writes the file anew, and opens it for appending.
fn rewritten(path: &Path, rows: &[Row]) -> Result<std::fs::File, StoreError> {
    let text: String = rows.iter().map(line).collect();
    replace_file(&RealDisk, path, text.as_bytes())?;
    let file = std::fs::OpenOptions::new().append(true).open(path);
    file.map_err(|source| StoreError::io(path, Operation::Write, 0, source))
}

fn line(row: &Row) -> String {
    let mut text = serde_json::to_string(row).expect("finite numbers");
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run was stopped in the evaluation of step 2, resumed, and killed after it had made it: the row is there, and the
    /// checkpoint says that it is due.
    #[test]
    fn an_evaluation_made_again_is_there_once() {
        let folder = tempfile::tempdir().expect("a directory");
        let eval = |step: u64, eval_loss: f64| Row::Eval(EvalRow { step, eval_loss, eval_tokens: 1 });
        let mut metrics = Metrics::open(folder.path(), 0).expect("a file");
        for row in [eval(0, 3.0), eval(2, 2.0)] {
            metrics.append(row).expect("written");
        }
        let mut metrics = Metrics::open(folder.path(), 2).expect("a file");
        for step in [2, 2, 7] {
            metrics.forget_evaluation(step).expect("written");
        }
        metrics.append(eval(2, 2.0)).expect("written");
        assert_eq!(metrics.rows, [eval(0, 3.0), eval(2, 2.0)]);
        let text = std::fs::read_to_string(folder.path().join(FILE)).expect("a file");
        assert_eq!(text.lines().count(), 2, "{text}");
    }
}
