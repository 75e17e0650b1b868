//! `report.html`: one self-contained page about a run, for people.

mod answers;
mod chart;
mod ranks;

use std::fmt::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use finetune_recipe::Method;
use finetune_store::{RealDisk, replace_file};

use self::chart::{Line, chart};
use crate::card::{base_name, file_name};
use crate::error::TrainError;
use crate::metrics::{EvalRow, Row, StepRow, eval_rows, step_rows};
use crate::numbers::{bytes, counted, duration, thousands};
use crate::samples::BeforeAfter;
use crate::snapshot::Snapshot;
use crate::summary::before_and_after;

/// The style sheet.
const STYLE: &str = include_str!("report.css");

/// Seconds after which a page of a run that goes on loads a newer one.
const REFRESH: u32 = 30;

/// Writes the page of what the run has done so far.
pub(crate) fn write(run: &Snapshot<'_>, directory: &Path, rows: &[Row]) -> Result<(), TrainError> {
    write_page(run, directory, rows, &format!("<meta http-equiv=\"refresh\" content=\"{REFRESH}\">"))
}

/// Writes the page of a run that is done.
pub(crate) fn write_last(run: &Snapshot<'_>, directory: &Path, rows: &[Row]) -> Result<(), TrainError> {
    write_page(run, directory, rows, "")
}

fn write_page(run: &Snapshot<'_>, directory: &Path, rows: &[Row], refresh: &str) -> Result<(), TrainError> {
    let page = page(run, directory, rows, refresh);
    Ok(replace_file(&RealDisk, &directory.join("report.html"), page.as_bytes())?)
}

/// The text of the page. `refresh`: a tag of the page's head.
fn page(run: &Snapshot<'_>, directory: &Path, rows: &[Row], refresh: &str) -> String {
    let (steps, evals) = (step_rows(rows), eval_rows(rows));
    let name = directory.file_name().unwrap_or_default().to_string_lossy();
    let mut page = String::new();
    let _ = write!(
        page,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         {refresh}<title>{name} – finetune</title><style>{STYLE}</style></head><body><main><h1>{name}</h1>",
        name = escape(&name)
    );
    let _ = write!(page, "<p>{}</p>", escape(&about(run)));
    let training_and_eval = before_and_after(rows, run.state.step);
    facts(&mut page, run, &steps, &evals, training_and_eval);
    page.push_str("<div class=\"charts\">");
    let series = |value: fn(&StepRow) -> f64| steps.iter().map(|row| (row.step as f64, value(row))).collect::<Vec<_>>();
    let eval_points = evals.iter().map(|row| (row.step as f64, row.eval_loss)).collect();
    let mut losses = vec![Line { name: "training", class: "a", points: series(|row| row.loss), dots: false }];
    if !evals.is_empty() {
        losses.push(Line { name: "held-back rows", class: "b", points: eval_points, dots: true });
    }
    chart(&mut page, "Loss per trained token", &losses, true);
    let single = |name, points| [Line { name, class: "a", points, dots: false }];
    chart(&mut page, "Learning rate", &single("learning rate", series(|row| row.learning_rate)), false);
    chart(&mut page, "Gradient norm, before clipping", &single("gradient norm", series(|row| row.grad_norm)), true);
    chart(&mut page, "Tokens per second", &single("tokens per second", series(|row| row.tokens_per_second)), false);
    ranks::seconds(&mut page, &steps);
    page.push_str("</div>");
    ranks::table(&mut page, &steps, run.who);
    answers::answers(&mut page, &BeforeAfter::read(directory));
    let _ = writeln!(page, "<h2>Recipe</h2><pre>{}</pre></main></body></html>", escape(&run.recipe.to_toml()));
    page
}

/// What is trained, on what, by which program.
fn about(run: &Snapshot<'_>) -> String {
    let method = match run.recipe.train.method {
        Method::Lora => "LoRA",
        Method::Full => "all weights",
    };
    let names = |files: &[std::path::PathBuf]| files.iter().map(|file| file_name(file)).collect::<Vec<_>>().join(", ");
    let mut text = format!("{}, {method}, on {}", base_name(run.recipe), names(&run.train.files));
    if let Some(eval) = run.eval {
        text += &format!(", held back {}", names(&eval.files));
    }
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let version = env!("CARGO_PKG_VERSION");
    text + &format!(". Written by finetune {version} at {}.", moment(seconds))
}

/// A time as "2026-11-27 12:40 UTC". `seconds`: since 1970.
fn moment(seconds: u64) -> String {
    // Howard Hinnant's civil_from_days, for days since 0000-03-01:
    // https://howardhinnant.github.io/date_algorithms.html
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute) = (seconds / 3_600 % 24, seconds / 60 % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02} UTC")
}

/// Losses before and after: of training rows, of held-back rows.
type Losses = (Option<(f64, f64)>, Option<(f64, f64)>);

/// The numbers at the top of the page.
fn facts(page: &mut String, run: &Snapshot<'_>, steps: &[&StepRow], evals: &[&EvalRow], (training, eval): Losses) {
    let done = format!("{} of {}", thousands(run.state.step), thousands(run.steps));
    let mut facts: Vec<(&str, String)> = vec![("steps", done), ("computed on", run.device.to_owned())];
    if let Some((before, after)) = training {
        facts.push(("training loss", format!("{before:.4} → {after:.4}")));
    }
    if let Some((before, after)) = eval {
        facts.push(("loss on held-back rows", format!("{before:.4} → {after:.4}")));
    } else if let Some(last) = evals.last() {
        facts.push(("loss on held-back rows", format!("{:.4}", last.eval_loss)));
    }
    if let Some(best) = run.state.best {
        facts.push(("best evaluation", format!("{:.4} at step {}", best.eval_loss, thousands(best.step))));
    }
    facts.push(("training rows", thousands(run.train.rows.len() as u64)));
    facts.push(("trained parameters", thousands(run.state.parameters.len() as u64)));
    let seconds: f64 = steps.iter().map(|row| row.seconds).sum();
    let tokens: u64 = steps.iter().map(|row| row.tokens).sum();
    facts.push(("training time", duration(seconds)));
    if seconds > 0.0 {
        facts.push(("tokens per second", thousands((tokens as f64 / seconds).round() as u64)));
    }
    if let Some(peak) = peak_memory() {
        facts.push(("peak memory", format!("{} (estimated {})", bytes(peak), bytes(run.estimate.total))));
    }
    if let Some(peak) = run.model.device_peak() {
        facts.push(("peak memory of the GPU", bytes(peak)));
    }
    if let [who] = run.who {
        facts.push(("host", who.host.clone()));
    } else {
        facts.push(("ranks", counted(run.who.len() as u64, "rank")));
    }
    page.push_str("<dl>");
    for (name, value) in facts.into_iter().filter(|(_, value)| !value.is_empty()) {
        let _ = write!(page, "<div><dt>{name}</dt><dd>{}</dd></div>", escape(&value));
    }
    page.push_str("</dl>");
}

/// The most bytes of memory that this process has had, if the system says it in a file (Linux).
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? << 10)
}

/// Text as HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_users_cannot_become_markup() {
        assert_eq!(escape("<script>\"&"), "&lt;script&gt;&quot;&amp;");
    }

    #[test]
    fn moments_are_days_and_minutes() {
        for (seconds, want) in [
            (0, "1970-01-01 00:00 UTC"),
            (951_782_399, "2000-02-28 23:59 UTC"),
            (951_782_400, "2000-02-29 00:00 UTC"),
            (1_795_781_400, "2026-11-27 12:10 UTC"),
            (4_107_542_400, "2100-03-01 00:00 UTC"),
        ] {
            assert_eq!(moment(seconds), want);
        }
    }
}
