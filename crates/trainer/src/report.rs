//! `report.html`: one self-contained page about a run, for people. And a page about several runs.

mod answers;
mod chart;
mod compared;
mod page;
mod ranks;
mod word_diff;

use std::fmt::Write;
use std::path::Path;

use chrono::DateTime;
use finetune_store::{RealDisk, replace_file};

pub use self::chart::thinned;
pub use self::compared::{Compared, compare_page};

use self::chart::{Chart, Line};
use self::page::escape;
use crate::error::TrainError;
use crate::metrics::{EvalRow, Row, StepRow, eval_rows, step_rows};
use crate::numbers::{bytes, counted, duration, thousands};
use crate::reading_share::ReadingShare;
use crate::run_facts::{RowFile, RunFacts, RunStatus};
use crate::samples::BeforeAfter;
use crate::snapshot::Snapshot;
use crate::summary::before_and_after;

/// The most files of rows that are named.
const SHOWN_FILES: usize = 6;

/// Writes the page of what the run has done so far.
pub(crate) fn write(run: &Snapshot<'_>, directory: &Path, rows: &[Row], facts: &RunFacts) -> Result<(), TrainError> {
    let name = directory.file_name().unwrap_or_default().to_string_lossy();
    let mut body = opening(facts);
    let (steps, evals) = (step_rows(rows), eval_rows(rows));
    page::facts(&mut body, numbers(facts, &steps, &evals, before_and_after(rows, run.state.step)));
    body.push_str("<div class=\"charts\">");
    charts(&mut body, &steps, &evals);
    ranks::seconds(&mut body, &steps);
    body.push_str("</div>");
    ranks::table(&mut body, &steps, &facts.hosts);
    answers::answers(&mut body, &BeforeAfter::read(directory));
    let _ = write!(body, "<h2>Recipe</h2><pre>{}</pre>", escape(&run.recipe.to_toml()));
    let page = page::page(&name, facts.status == RunStatus::Running, &body);
    Ok(replace_file(&RealDisk, &directory.join("report.html"), page.as_bytes())?)
}

/// What is trained on what, and how it ended.
fn opening(facts: &RunFacts) -> String {
    let method = if facts.method == "full" { "all weights" } else { "LoRA" };
    let mut text = format!("{}, {method}, on {}", facts.model, names(&facts.train));
    if !facts.eval.is_empty() {
        text += &format!(", held back {}", names(&facts.eval));
    }
    let mut html = format!("<p>{}.</p>", escape(&text));
    if let Some(error) = &facts.error {
        let _ = write!(html, "<p class=\"bad\">{}</p>", escape(error));
    }
    html
}

/// Names of files with the number of their rows.
fn names(files: &[RowFile]) -> String {
    let name = |file: &RowFile| format!("{} ({})", file.name, counted(file.rows, "row"));
    let shown = files.iter().take(SHOWN_FILES).map(name).collect::<Vec<_>>().join(", ");
    match files.len().saturating_sub(SHOWN_FILES) {
        0 => shown,
        more => format!("{shown} and {} more", counted(more as u64, "file")),
    }
}

/// Losses before and after: of training rows, of held-back rows.
type Losses = (Option<(f64, f64)>, Option<(f64, f64)>);

/// The numbers at the top of the page.
fn numbers(
    facts: &RunFacts,
    steps: &[&StepRow],
    evals: &[&EvalRow],
    (training, eval): Losses,
) -> Vec<(&'static str, String)> {
    let mut list = vec![("state", state(facts))];
    list.push(("steps", format!("{} of {}", thousands(facts.step), thousands(facts.steps))));
    if let Some((before, after)) = training {
        list.push(("training loss", format!("{before:.4} → {after:.4}")));
    }
    if let Some((before, after)) = eval {
        list.push(("loss on held-back rows", format!("{before:.4} → {after:.4}")));
    } else if let Some(last) = evals.last() {
        list.push(("loss on held-back rows", format!("{:.4}", last.eval_loss)));
    }
    if let Some(best) = facts.best {
        list.push(("best evaluation", format!("{:.4} at step {}", best.eval_loss, thousands(best.step))));
    }
    list.push(("trained parameters", thousands(facts.trained_parameters)));
    let seconds: f64 = steps.iter().map(|row| row.seconds).sum();
    let tokens: u64 = steps.iter().map(|row| row.tokens).sum();
    list.push(("training time", duration(seconds)));
    if seconds > 0.0 {
        list.push(("tokens per second", thousands((tokens as f64 / seconds).round() as u64)));
    }
    let mut reading = ReadingShare::default();
    steps.iter().for_each(|row| reading.add(row));
    if let Some(amount) = reading.words() {
        list.push(("waiting for the disk", amount));
    }
    list.push(("begun", moment(facts.started)));
    let when = if facts.status == RunStatus::Running { "as of" } else { "ended" };
    list.push((when, moment(facts.updated)));
    list.push(("computed on", facts.device.clone()));
    match &facts.hosts[..] {
        [host] => list.push(("host", host.clone())),
        hosts => list.push(("ranks", counted(hosts.len() as u64, "rank"))),
    }
    if let Some(peak) = facts.peak_memory {
        list.push(("peak memory", format!("{} (estimated {})", bytes(peak), bytes(facts.estimated_memory))));
    }
    if let Some(peak) = facts.device_peak_memory {
        list.push(("peak memory of the GPU", bytes(peak)));
    }
    let commit = facts.commit.as_ref().map_or(String::new(), |commit| format!(" ({commit})"));
    list.push(("program", format!("finetune {}{commit}", facts.version)));
    list
}

/// Whether it goes on.
fn state(facts: &RunFacts) -> String {
    match (facts.status, facts.exit_code) {
        (RunStatus::Running, _) => "running".to_owned(),
        (RunStatus::Done, _) => "done".to_owned(),
        (RunStatus::Stopped, _) => "stopped by a signal".to_owned(),
        (RunStatus::Failed, Some(code)) => format!("failed (exit code {code})"),
        (RunStatus::Failed, None) => "failed".to_owned(),
    }
}

/// The charts of one run.
fn charts(page: &mut String, steps: &[&StepRow], evals: &[&EvalRow]) {
    let series = |value: fn(&StepRow) -> f64| steps.iter().map(|row| (row.step as f64, value(row))).collect::<Vec<_>>();
    let eval_points = evals.iter().map(|row| (row.step as f64, row.eval_loss)).collect();
    let mut losses = vec![Line::new("training", "a", series(|row| row.loss))];
    if !evals.is_empty() {
        losses.push(Line { dots: true, ..Line::new("held-back rows", "b", eval_points) });
    }
    Chart { title: "Loss per trained token", may_be_logarithmic: true, most_points: 1500, lines: losses }.write(page);
    let single = |title, name, may_be_logarithmic, points| Chart {
        title,
        may_be_logarithmic,
        most_points: 400,
        lines: vec![Line::new(name, "a", points)],
    };
    single("Learning rate", "learning rate", false, series(|row| row.learning_rate)).write(page);
    let norms = series(|row| row.grad_norm);
    single("Gradient norm, before clipping", "gradient norm", true, norms).write(page);
    single("Tokens per second", "tokens per second", false, series(|row| row.tokens_per_second)).write(page);
}

/// A time as "2026-11-27 12:40 UTC". `seconds`: since 1970. Empty if there is none.
fn moment(seconds: u64) -> String {
    let time = DateTime::from_timestamp(i64::try_from(seconds).unwrap_or(0), 0).filter(|_| seconds > 0);
    time.map_or(String::new(), |time| time.format("%Y-%m-%d %H:%M UTC").to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_days_and_minutes() {
        for (seconds, want) in [
            (0, ""),
            (951_782_399, "2000-02-28 23:59 UTC"),
            (951_782_400, "2000-02-29 00:00 UTC"),
            (1_795_781_400, "2026-11-27 12:10 UTC"),
            (4_107_542_400, "2100-03-01 00:00 UTC"),
        ] {
            assert_eq!(moment(seconds), want);
        }
    }

    #[test]
    fn many_files_are_counted() {
        let file = |rows| RowFile { name: "</script>.jsonl".to_owned(), rows };
        assert_eq!(names(&[file(1), file(1200)]), "</script>.jsonl (1 row), </script>.jsonl (1,200 rows)");
        let many: Vec<RowFile> = (0..9).map(file).collect();
        assert!(names(&many).ends_with(" and 3 files more"), "{}", names(&many));
    }

    #[test]
    fn the_end_of_a_run_is_said_in_words() {
        let facts = RunFacts {
            status: RunStatus::Failed,
            exit_code: Some(4),
            error: Some("the loss of <b> is not finite".to_owned()),
            ..RunFacts::default()
        };
        assert_eq!(state(&facts), "failed (exit code 4)");
        assert!(opening(&facts).contains("<p class=\"bad\">the loss of &lt;b&gt; is not finite</p>"));
    }
}
