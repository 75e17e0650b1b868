//! How runs stand, as a table or as JSON.

use std::process::ExitCode;

use finetune_launch::complaint::shown;
use finetune_trainer::numbers::{duration, rate, thousands};
use finetune_trainer::{RunRecord, RunState};
use serde_json::json;

use super::source::Watched;
use crate::failure::Failure;
use crate::output;
use crate::text_table::{columns, terminal_width, widths};

/// Prints how the runs stand.
pub(super) fn print(runs: &[Watched], as_json: bool) -> Result<ExitCode, Failure> {
    if as_json {
        for run in runs {
            output::line(&object(run).to_string())?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = table(runs);
    fit(&mut rows, terminal_width().unwrap_or(usize::MAX));
    output::print(&columns(&rows))?;
    for (run, error) in runs.iter().filter_map(|run| Some((run, error(run.record())?))) {
        output::line(&format!("{}: {error}", run.name))?;
    }
    for (run, damage) in runs.iter().filter_map(|run| Some((run, run.record().damage()?))) {
        output::line(&format!("{}: {damage}", run.name))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The error that has ended a run.
pub(super) fn error(record: &RunRecord) -> Option<String> {
    let error = record.facts.as_ref()?.error.as_ref().filter(|_| record.state() == RunState::Failed)?;
    Some(shown(error.lines().next().unwrap_or_default()))
}

/// A head and a row for each run; the columns that matter most come first.
pub(super) fn table(runs: &[Watched]) -> Vec<Vec<String>> {
    let head = ["run", "state", "step", "loss", "held back", "left", "tokens/s", "lr", "grad norm", "saved"];
    let rows = runs.iter().map(|run| row(&run.name, run.record()));
    std::iter::once(head.map(str::to_owned).to_vec()).chain(rows).collect()
}

fn row(name: &str, record: &RunRecord) -> Vec<String> {
    let last = record.steps().last();
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.4}"));
    let step = match record.total_steps() {
        Some(total) => format!("{}/{}", thousands(record.step()), thousands(total)),
        None => thousands(record.step()),
    };
    let left = record.seconds_left().filter(|_| record.state() == RunState::Running && last.is_some());
    let held_back = record.evals().last().map(|row| row.eval_loss);
    let dash = || "-".to_owned();
    vec![
        name.to_owned(),
        record.state().words().to_owned(),
        step,
        number(last.map(|row| row.loss)),
        number(held_back),
        left.map_or_else(dash, duration),
        last.map_or_else(dash, |row| thousands(row.tokens_per_second.round() as u64)),
        last.map_or_else(dash, |row| rate(row.learning_rate)),
        last.map_or_else(dash, |row| format!("{:.3}", row.grad_norm)),
        record.checkpoint.map_or_else(dash, |step| format!("step {}", thousands(step))),
    ]
}

/// Drops columns from the end until the table is no wider than this.
pub(super) fn fit(rows: &mut [Vec<String>], width: usize) {
    let all = widths(rows);
    let wide = |count: usize| all[..count].iter().sum::<usize>() + 2 * count.saturating_sub(1);
    let count = (1..=all.len()).rev().find(|&count| wide(count) <= width).unwrap_or(1);
    rows.iter_mut().for_each(|row| row.truncate(count));
}

fn object(run: &Watched) -> serde_json::Value {
    let record = run.record();
    let (last, best) = (record.steps().last(), record.best_evaluation());
    json!({
        "run": run.name,
        "path": run.argument(),
        "state": record.state().words(),
        "step": record.step(),
        "steps": record.total_steps(),
        "loss": last.map(|row| row.loss),
        "eval_loss": record.evals().last().map(|row| row.eval_loss),
        "best_eval_loss": best.map(|row| row.eval_loss),
        "best_eval_step": best.map(|row| row.step),
        "tokens_per_second": last.map(|row| row.tokens_per_second),
        "learning_rate": last.map(|row| row.learning_rate),
        "grad_norm": last.map(|row| row.grad_norm),
        "seconds": record.seconds(),
        "seconds_left": record.seconds_left().filter(|_| record.state() == RunState::Running),
        "checkpoint": record.checkpoint,
        "error": error(record),
    })
}

#[cfg(test)]
pub(super) mod tests {
    use finetune_trainer::StepRow;

    use super::*;

    /// The line of metrics.jsonl of a step.
    pub(in super::super) fn line(step: u64, loss: f64) -> String {
        let row = StepRow {
            step,
            loss,
            grad_norm: 0.25,
            learning_rate: 2e-4,
            tokens_per_second: 9123.4,
            seconds: 1.5,
            ..StepRow::default()
        };
        serde_json::to_string(&row).expect("JSON") + "\n"
    }

    /// A record with so many steps of a loss that halves every ten steps, and an evaluation before
    /// and after.
    pub(in super::super) fn record(steps: u64) -> RunRecord {
        let mut record = RunRecord::default();
        record.push(b"{\"step\":0,\"eval_loss\":8.5,\"eval_tokens\":9}\n");
        for step in 1..=steps {
            record.push(line(step, 8.0 * 0.5f64.powf(step as f64 / 10.0)).as_bytes());
        }
        record.push(format!("{{\"step\":{steps},\"eval_loss\":1.25,\"eval_tokens\":9}}\n").as_bytes());
        let facts = finetune_trainer::RunFacts { steps: 100, ..finetune_trainer::RunFacts::default() };
        (record.facts, record.is_held, record.checkpoint) = (Some(facts), true, Some(20));
        record
    }

    #[test]
    fn a_table_fits_its_terminal() {
        let runs = [Watched::of("support-bot", record(30)), Watched::of("b", RunRecord::default())];
        let mut rows = table(&runs);
        let text = columns(&rows);
        let want = "\
run          state    step    loss    held back  left   tokens/s  lr      grad norm  saved
support-bot  running  30/100  1.0000  1.2500     1m45s  9,123     2.0e-4  0.250      step 20
b            waiting  0       -       -          -      -         -       -          -
";
        assert_eq!(text, want);
        for (width, count) in [(92, 10), (91, 9), (80, 8), (50, 5), (40, 4), (3, 1)] {
            fit(&mut rows, width);
            assert_eq!(rows[0].len(), count, "{width}");
        }
    }

    #[test]
    fn json_has_no_number_where_there_is_none() {
        let object = object(&Watched::of("b", RunRecord::default()));
        assert_eq!(object["state"], "waiting");
        assert!(object["loss"].is_null() && object["steps"].is_null(), "{object}");
        let object = super::object(&Watched::of("a", record(30)));
        assert_eq!(
            (&object["step"], &object["steps"], &object["best_eval_step"]),
            (&json!(30), &json!(100), &json!(30))
        );
    }
}
