//! What to do after numbers that are not finite: go on from a checkpoint of before, with a lower
//! rate.

use std::path::Path;

use finetune_recipe::Recipe;
use finetune_store::{RealDisk, numbered};

use crate::metrics::Row;
use crate::names::CHECKPOINTS;
use crate::names::RECIPE_FILE;

/// A rate at which LoRA seldom diverges: the recipe's default.
const USUAL_RATE: f64 = 2e-4;
/// A tenth of a rate above this is still high.
const BOLD_RATE: f64 = 1e-2;

/// Losses by step, each of the parameters that the checkpoint of that step holds. The loss of step
/// n + 1 is computed before its update, so it is the loss of the parameters after step n.
struct Losses(Vec<(u64, f64)>);

impl Losses {
    /// Losses of the rows of steps.
    fn from_rows(rows: &[Row]) -> Losses {
        let steps = rows.iter().filter_map(|row| match row {
            Row::Step(row) => Some((row.step.saturating_sub(1), row.loss)),
            Row::Eval(_) => None,
        });
        Losses(steps.collect())
    }

    /// Whether the parameters after `step` steps were sound: their loss is known, and not far above
    /// the lowest so far. The margin is a fifth and 0.3 nats. Once a run has settled, its batches
    /// differ by less. A run that diverges exceeds it within a few steps.
    fn are_sound_after(&self, step: u64) -> bool {
        let Some((_, loss)) = self.0.iter().find(|(known, _)| *known == step) else { return false };
        *loss <= self.lowest_until(step) * 1.2 + 0.3
    }

    /// Whether the loss has risen beyond doubt: to more than twice the lowest and 1.
    fn have_risen_by(&self, step: u64) -> bool {
        let known = self.0.iter().rev().find(|(known, _)| *known <= step);
        known.is_some_and(|(_, loss)| !loss.is_finite() || *loss > self.lowest_until(step) * 2.0 + 1.0)
    }

    /// The lowest loss of the parameters after at most `step` steps.
    fn lowest_until(&self, step: u64) -> f64 {
        self.0.iter().filter(|(known, _)| *known <= step).map(|(_, loss)| *loss).fold(f64::INFINITY, f64::min)
    }
}

/// Whether a checkpoint may be called safe: the run was not diverging when it was saved.
pub(crate) fn is_safe(rows: &[Row], checkpoint: &Path) -> bool {
    let name = checkpoint.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let step = name.strip_prefix("step-").and_then(|digits| digits.parse().ok());
    step.is_none_or(|step| !Losses::from_rows(rows).have_risen_by(step))
}

/// What can be done now with the run in `directory`, as commands to paste.
pub(crate) fn ways_on(recipe: &Recipe, directory: &Path, rows: &[Row]) -> Vec<String> {
    let losses = Losses::from_rows(rows);
    let mut settings = format!(" --set optimizer.learning_rate={}", lower(recipe.optimizer.learning_rate));
    if recipe.train.max_grad_norm == 0.0 {
        settings += " --set train.max_grad_norm=1.0";
    }
    let file = word(&directory.join(RECIPE_FILE));
    let checkpoints = numbered(&RealDisk, &directory.join(CHECKPOINTS), "step-").unwrap_or_default();
    let sound = checkpoints.iter().rev().find(|(step, _)| losses.are_sound_after(*step));
    let again = |why: &str| {
        let parent = directory.parent().unwrap_or(Path::new(""));
        let name = directory.file_name().unwrap_or_default().to_string_lossy();
        let other = word(&free_name_of_directory(parent, &name));
        format!("{why} with a lower rate: finetune run {file} --output-dir {other}{settings}")
    };
    match sound {
        Some((step, path)) => vec![
            format!(
                "step {step} is from before that; to go on from it with a lower rate: finetune run {file} --resume {}{settings}",
                word(path)
            ),
            again("or from the beginning"),
        ],
        None => vec![again("no checkpoint is known to be from before that; from the beginning")],
    }
}

/// `NAME-2`, or the first number whose name is free.
fn free_name_of_directory(parent: &Path, name: &str) -> std::path::PathBuf {
    let mut names = (2..).map(|number| parent.join(format!("{name}-{number}")));
    names.find(|path| path.symlink_metadata().is_err()).expect("an endless list")
}

/// A tenth of the rate, or a usual rate if that is still high.
fn lower(rate: f64) -> String {
    let lower = if rate > BOLD_RATE { USUAL_RATE } else { rate / 10.0 };
    // Four digits are enough. 2.0000000000000002e-5 would be unpleasant to paste.
    let text = format!("{lower:.3e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let digits = if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits };
    format!("{digits}e{exponent}")
}

/// A path as one word of a shell.
fn word(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |letter: char| letter.is_alphanumeric() || "/._-+=:,@%".contains(letter);
    if !text.is_empty() && text.chars().all(is_plain) { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn losses(of_steps: &[f64]) -> Losses {
        Losses((0..).zip(of_steps.iter().copied()).collect())
    }

    /// Losses of steps 1, 2, … and the checkpoints (by steps done) that are sound.
    #[test]
    fn checkpoints_of_a_diverging_run_are_not_sound() {
        let cases: [(&[f64], &[u64]); 5] = [
            // The loss of step 3 is that of the parameters after step 2. Those after step 3 have
            // none yet.
            (&[3.0, 2.5, 2.4], &[0, 1, 2]),
            (&[3.0, 2.5, 2.4, 2.9, 3.5, 9.0, 40.0], &[0, 1, 2, 3]),
            (&[7.0], &[0]),
            (&[0.05, 0.3, 0.4], &[0, 1]),
            (&[7.0, 1e20], &[0]),
        ];
        for (of_steps, sound) in cases {
            let losses = losses(of_steps);
            let found: Vec<u64> = (0..10).filter(|&step| losses.are_sound_after(step)).collect();
            assert_eq!(found, sound, "{of_steps:?}");
        }
    }

    /// A noisy loss is no divergence. A loss that has doubled and risen by 1 is one.
    #[test]
    fn a_risen_loss() {
        for (of_steps, risen) in
            [(&[3.0, 2.5, 2.4][..], false), (&[3.0, 1.0, 2.9], false), (&[3.0, 1.0, 3.1], true), (&[], false)]
        {
            assert_eq!(losses(of_steps).have_risen_by(5), risen, "{of_steps:?}");
        }
    }

    #[test]
    fn rates_that_are_lower() {
        for (rate, want) in [(1e30, "2e-4"), (5e-2, "2e-4"), (1e-2, "1e-3"), (2e-4, "2e-5"), (1.25e-5, "1.25e-6")] {
            assert_eq!(lower(rate), want, "{rate}");
        }
    }

    #[test]
    fn paths_as_words_of_a_shell() {
        for (path, want) in [("runs/a-1", "runs/a-1"), ("my runs/a", "'my runs/a'"), ("it's", "'it'\\''s'")] {
            assert_eq!(word(Path::new(path)), want);
        }
    }
}
