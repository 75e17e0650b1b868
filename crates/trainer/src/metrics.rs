//! `metrics.jsonl`: one object per optimizer step, one per evaluation.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};

use finetune_store::{Operation, RealDisk, StoreError, failpoint, replace_file};
use serde::{Deserialize, Serialize};

use crate::names::free_name;

/// The file's name in the run directory.
pub(crate) const FILE: &str = "metrics.jsonl";

/// A row of an optimizer step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepRow {
    /// The step, from 1.
    pub step: u64,
    /// Passes over the training data, this step included.
    pub epoch: f64,
    /// Σ token losses / trained tokens, in nats, before the update.
    pub loss: f64,
    /// Tokens that the loss counts.
    pub trained_tokens: u64,
    /// Tokens of all rows of the step.
    pub tokens: u64,
    /// Norm of the mean gradient, before clipping.
    pub grad_norm: f64,
    /// The learning rate of the update.
    pub learning_rate: f64,
    /// All tokens of the step divided by its seconds.
    pub tokens_per_second: f64,
    /// Wall time of the step in seconds.
    pub seconds: f64,
    /// The objective's own numbers by name; empty if the loss is all it has.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub objective: BTreeMap<String, f64>,
    /// Seconds of them that rank 0 has waited for layers from the disk; `None` if all are in memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reading_seconds: Option<f64>,
    /// How evenly experts were used by the rows of rank 0; empty if the model has none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<ExpertRow>,
    /// Each rank's part in it, in rank order; empty if there is only one rank.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranks: Vec<RankRow>,
}

/// How evenly a layer's experts were used in a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExpertRow {
    /// The number of the layer.
    pub layer: usize,
    /// The part of all choices that went to the expert that was chosen most: 1 / experts if all are used
    /// alike.
    pub busiest: f64,
    /// Experts that no token has chosen.
    pub unused: usize,
}

impl ExpertRow {
    /// `counts`: how often each expert was chosen.
    pub(crate) fn new(layer: usize, counts: &[u64]) -> ExpertRow {
        let (all, most) = (counts.iter().sum::<u64>(), counts.iter().copied().max().unwrap_or(0));
        let unused = counts.iter().filter(|&&count| count == 0).count();
        ExpertRow { layer, busiest: most as f64 / all.max(1) as f64, unused }
    }
}

/// One rank's part in a step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RankRow {
    /// The rank.
    pub rank: usize,
    /// Seconds that it took to compute the losses and gradients of its rows.
    pub seconds: f64,
    /// Tokens of these rows.
    #[serde(default)]
    pub tokens: u64,
    /// Seconds of them that it has waited for layers from the disk; `None` if all are in memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reading_seconds: Option<f64>,
    /// Payload bytes that it has sent since the run began, up to the losses of this step.
    pub sent: u64,
    /// The same for bytes received.
    pub received: u64,
    /// Seconds that it has waited for each rank since the run began, up to the losses of this step.
    pub waited_for: Vec<f64>,
}

/// A row of an evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalRow {
    /// The steps done; 0: before the first step.
    pub step: u64,
    /// Σ token losses / trained tokens of the evaluation data, in nats.
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
    /// The step of the row.
    pub(crate) fn step(&self) -> u64 {
        match self {
            Row::Step(row) => row.step,
            Row::Eval(row) => row.step,
        }
    }
}

/// The rows of steps.
pub(crate) fn step_rows(rows: &[Row]) -> Vec<&StepRow> {
    rows.iter().filter_map(|row| if let Row::Step(row) = row { Some(row) } else { None }).collect()
}

/// The rows of evaluations.
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
    /// Opens the file of a run that has done `step` steps. Rows beyond them and a torn last line
    /// are taken out. Other lines that cannot be read give a notice, and the old file is kept
    /// aside.
    pub(crate) fn open(directory: &Path, step: u64, notices: &mut Vec<String>) -> Result<Metrics, StoreError> {
        let path = directory.join(FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(StoreError::io(&path, Operation::Read, 0, source)),
        };
        let (rows, damaged) = parse(&bytes, step);
        let rows = if step == 0 { Vec::new() } else { rows };
        if !damaged.is_empty() {
            let aside = free_name(directory, "aside-metrics", "jsonl");
            replace_file(&RealDisk, &aside, &bytes)?;
            let lines = damaged.iter().map(|line| format!("{}:{line}", path.display())).collect::<Vec<_>>();
            let aside = aside.display();
            notices.push(format!("{} cannot be read and is left out; the file as it was is {aside}", lines.join(", ")));
        }
        notices.extend(gaps(&rows, step).map(|gaps| format!("{} has no rows of {gaps}", path.display())));
        let file = rewritten(&path, &rows)?;
        Ok(Metrics { path, file, rows })
    }

    /// Takes out the row of this step's evaluation, which is about to be made again. Such a row is
    /// left if a run was killed after the evaluation and before the next checkpoint.
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

    /// Syncs the rows so far, so that they survive a power cut as the checkpoint of the same step
    /// does.
    pub(crate) fn sync(&self) -> Result<(), StoreError> {
        self.file.sync_all().map_err(|source| StoreError::io(&self.path, Operation::Sync, 0, source))
    }
}

/// Rows up to `step`, and the numbers, from 1, of the lines that are no rows. A last line without
/// its end was being written when the process was killed.
fn parse(bytes: &[u8], step: u64) -> (Vec<Row>, Vec<usize>) {
    let (mut rows, mut damaged) = (Vec::new(), Vec::new());
    for (number, line) in (1..).zip(bytes.split_inclusive(|&byte| byte == b'\n')) {
        match serde_json::from_slice::<Row>(line) {
            Ok(row) if row.step() <= step => rows.push(row),
            Ok(_) => {}
            Err(_) if line.trim_ascii().is_empty() || !line.ends_with(b"\n") => {}
            Err(_) => damaged.push(number),
        }
    }
    (rows, damaged)
}

/// The steps up to `step` without a row: "step 3", "steps 1 to 4, 6 and more".
fn gaps(rows: &[Row], step: u64) -> Option<String> {
    let there: BTreeSet<u64> =
        rows.iter().filter_map(|row| if let Row::Step(row) = row { Some(row.step) } else { None }).collect();
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    let mut next = 1;
    for known in there.into_iter().chain([step.saturating_add(1)]) {
        if known > next {
            ranges.push((next, known - 1));
        }
        next = known.saturating_add(1);
    }
    let shown = |&(first, last): &(u64, u64)| {
        if first == last { first.to_string() } else { format!("{first} to {last}") }
    };
    let text = ranges.iter().take(3).map(shown).collect::<Vec<_>>().join(", ");
    let more = if ranges.len() > 3 { " and more" } else { "" };
    let word = if matches!(ranges[..], [(first, last)] if first == last) { "step" } else { "steps" };
    (!ranges.is_empty()).then(|| format!("{word} {text}{more}"))
}

/// Writes the file anew, and opens it for appending.
fn rewritten(path: &Path, rows: &[Row]) -> Result<std::fs::File, StoreError> {
    let text: String = rows.iter().map(line).collect();
    replace_file(&RealDisk, path, text.as_bytes())?;
    let file = std::fs::OpenOptions::new().append(true).open(path);
    file.map_err(|source| StoreError::io(path, Operation::Write, 0, source))
}

/// A row as a line of JSON.
fn line(row: &Row) -> String {
    let mut text = serde_json::to_string(row).expect("finite numbers");
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text_of(step: u64) -> String {
        line(&Row::Eval(EvalRow { step, eval_loss: 1.0, eval_tokens: 2 }))
    }

    #[test]
    fn damaged_lines_are_counted_from_one() {
        let [one, two, three] = [1, 2, 3].map(text_of);
        for (bytes, rows, damaged) in [
            (format!("{one}{two}{three}"), 3, vec![]),
            (format!("{one}{{\"step\": 2, \"l\0ss\"}}\n{three}"), 2, vec![2]),
            // Torn at the end by a kill; blank; beyond the step.
            (format!("{one}{two}{{\"step\": 3"), 2, vec![]),
            (format!("{one}\n{}", text_of(9)), 1, vec![]),
            (format!("x\n{one}y\n"), 1, vec![1, 3]),
        ] {
            let (found, bad) = parse(bytes.as_bytes(), 3);
            assert_eq!((found.len(), bad), (rows, damaged), "{bytes}");
        }
    }

    #[test]
    fn steps_without_a_row() {
        let step = |step| Row::Step(StepRow { step, ..StepRow::default() });
        for (steps, last, gaps_are) in [
            (&[1, 2, 3][..], 3, None),
            (&[], 0, None),
            (&[], 4, Some("steps 1 to 4")),
            (&[1, 3], 3, Some("step 2")),
            (&[2, 5], 9, Some("steps 1, 3 to 4, 6 to 9")),
            (&[2, 4, 6], 9, Some("steps 1, 3, 5 and more")),
        ] {
            let rows: Vec<Row> = steps.iter().copied().map(step).collect();
            assert_eq!(gaps(&rows, last).as_deref(), gaps_are, "{steps:?}");
        }
    }

    #[test]
    fn a_damaged_file_is_kept_beside_the_new_one() {
        let folder = tempfile::tempdir().expect("a directory");
        let path = folder.path().join(FILE);
        for (n, name) in ["aside-metrics.jsonl", "aside-metrics-2.jsonl"].into_iter().enumerate() {
            let bytes = format!("{}broken\n", text_of(1));
            replace_file(&RealDisk, &path, bytes.as_bytes()).expect("a file");
            let mut notices = Vec::new();
            let metrics = Metrics::open(folder.path(), 1, &mut notices).expect("opened");
            assert_eq!(metrics.rows.len(), 1, "{n}");
            assert!(notices[0].contains("metrics.jsonl:2 cannot be read") && notices[0].contains(name), "{notices:?}");
            assert!(notices[1].contains("has no rows of step 1"), "{notices:?}");
            assert_eq!(std::fs::read(folder.path().join(name)).expect("kept"), bytes.as_bytes());
            assert_eq!(std::fs::read_to_string(&path).expect("anew"), text_of(1));
        }
    }

    /// A run was stopped in the evaluation of step 2, resumed, and killed after that evaluation.
    /// The row is there, and the checkpoint says that the evaluation is due.
    #[test]
    fn an_evaluation_made_again_is_there_once() {
        let folder = tempfile::tempdir().expect("a directory");
        let eval = |step: u64, eval_loss: f64| Row::Eval(EvalRow { step, eval_loss, eval_tokens: 1 });
        let mut metrics = Metrics::open(folder.path(), 0, &mut Vec::new()).expect("a file");
        for row in [eval(0, 3.0), eval(2, 2.0)] {
            metrics.append(row).expect("written");
        }
        let mut metrics = Metrics::open(folder.path(), 2, &mut Vec::new()).expect("a file");
        for step in [2, 2, 7] {
            metrics.forget_evaluation(step).expect("written");
        }
        metrics.append(eval(2, 2.0)).expect("written");
        assert_eq!(metrics.rows, [eval(0, 3.0), eval(2, 2.0)]);
        let text = std::fs::read_to_string(folder.path().join(FILE)).expect("a file");
        assert_eq!(text.lines().count(), 2, "{text}");
    }
}
