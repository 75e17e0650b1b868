//! Runs without a terminal: a line for each new row, until all runs have ended.

use std::io::{ErrorKind, Write};
use std::process::ExitCode;
use std::time::Duration;

use finetune_trainer::numbers::{duration, rate, thousands};
use finetune_trainer::{EvalRow, RunRecord, StepRow};

use super::once::error;
use super::source::Watched;
use crate::failure::Failure;

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(500);

/// Rows of a run that were there already, of which lines are printed.
const EARLIER: usize = 10;

/// What has been said of a run.
#[derive(Default)]
struct Said {
    /// Up to this step.
    step: u64,
    /// Up to the evaluation after this step.
    evaluation: Option<u64>,
    trouble: Option<String>,
    is_over: bool,
}

/// Prints lines until all runs have ended, or nobody reads them any more.
pub(super) fn follow(runs: &mut [Watched]) -> Result<ExitCode, Failure> {
    let mut said: Vec<Said> = runs.iter().map(|run| earlier(run.record())).collect();
    let many = runs.len() > 1;
    loop {
        for (run, said) in runs.iter().zip(&mut said) {
            let mut lines = lines(run.record(), said);
            if let Some(trouble) = run.trouble().filter(|trouble| said.trouble.as_deref() != Some(trouble)) {
                crate::stderr::complain!("{trouble}");
            }
            said.trouble = run.trouble().map(str::to_owned);
            let state = run.record().state();
            if state.is_over() && !said.is_over {
                let error = error(run.record()).map_or(String::new(), |error| format!(": {error}"));
                lines.push(format!("{} after step {}{error}", state.words(), thousands(run.record().step())));
            }
            said.is_over = state.is_over();
            for line in lines {
                let line = if many { format!("{}  {line}\n", run.name) } else { format!("{line}\n") };
                match write(&line) {
                    Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
                    written => written?,
                }
            }
        }
        if said.iter().all(|said| said.is_over) {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(LOOK);
        for run in &mut *runs {
            run.look()?;
        }
    }
}

fn write(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// All rows but the last few count as said.
fn earlier(record: &RunRecord) -> Said {
    let skipped = record.steps().len().saturating_sub(EARLIER);
    let step = record.steps().get(skipped).map_or(0, |row| row.step - 1);
    let evaluation = record.evals().iter().rev().map(|row| row.step).find(|&eval| eval <= step && step > 0);
    Said { step, evaluation, ..Said::default() }
}

/// The lines of rows that are new.
fn lines(record: &RunRecord, said: &mut Said) -> Vec<String> {
    let mut lines = Vec::new();
    if record.step() < said.step {
        let from = record.step();
        lines.push(format!("goes on from step {}", thousands(from)));
        (said.step, said.evaluation) = (from, said.evaluation.map(|step| step.min(from)));
    }
    let steps = record.steps().iter().filter(|row| row.step > said.step);
    let evals = record.evals().iter().filter(|row| said.evaluation.is_none_or(|step| row.step > step));
    let mut rows: Vec<(u64, bool, String)> = steps.map(|row| (row.step, false, step_line(record, row))).collect();
    rows.extend(evals.map(|row| (row.step, true, eval_line(record, row))));
    rows.sort_by_key(|(step, is_eval, _)| (*step, *is_eval));
    lines.extend(rows.into_iter().map(|(_, _, line)| line));
    said.step = record.step();
    said.evaluation = record.evals().last().map(|row| row.step).or(said.evaluation);
    lines
}

fn step_line(record: &RunRecord, row: &StepRow) -> String {
    let of = record.total_steps().map_or(String::new(), |total| format!("/{total}"));
    let is_last = row.step == record.step();
    let left = record.seconds_left().filter(|_| is_last && !record.state().is_over());
    let left = left.map_or(String::new(), |left| format!("  {} left", duration(left)));
    let speed = thousands(row.tokens_per_second.round() as u64);
    format!(
        "step {}{of}  loss {:.4}  {speed} tokens/s  lr {}  grad norm {:.3}{left}",
        row.step,
        row.loss,
        rate(row.learning_rate),
        row.grad_norm
    )
}

fn eval_line(record: &RunRecord, row: &EvalRow) -> String {
    let best = if record.best_evaluation() == Some(row) { "  (best so far)" } else { "" };
    match row.step {
        0 => format!("before training  evaluation loss {:.4}", row.eval_loss),
        step => format!("step {step}  evaluation loss {:.4}{best}", row.eval_loss),
    }
}

#[cfg(test)]
mod tests {
    use super::super::once::tests::record;
    use super::*;

    #[test]
    fn each_row_has_its_line_once() {
        let mut said = earlier(&record(0));
        let all = lines(&record(2), &mut said);
        assert_eq!(
            all,
            [
                "before training  evaluation loss 8.5000",
                "step 1/100  loss 7.4643  9,123 tokens/s  lr 2.0e-4  grad norm 0.250",
                "step 2/100  loss 6.9644  9,123 tokens/s  lr 2.0e-4  grad norm 0.250  2m27s left",
                "step 2  evaluation loss 1.2500  (best so far)",
            ]
        );
        assert_eq!(lines(&record(2), &mut said), [""; 0]);
        assert_eq!(lines(&record(3), &mut said).len(), 2, "a step and its evaluation");
        // A resume from an earlier step.
        let mut resumed = lines(&record(1), &mut said);
        assert_eq!(resumed.remove(0), "goes on from step 1");
        assert_eq!(lines(&record(2), &mut said).len(), 2);
        // Of a long run that is joined late, only the last rows.
        let mut said = earlier(&record(50));
        assert_eq!(lines(&record(50), &mut said).len(), EARLIER + 1);
    }
}
