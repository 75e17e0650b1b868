//! The result of a run in a few numbers.

use crate::metrics::{Row, eval_rows, step_rows};
use crate::state::Best;

/// Losses before and after training, and the step of the result. Only rank 0, which keeps the
/// metrics, knows the losses.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Training loss of the first step, before its update, and of the result's step.
    pub loss: Option<(f64, f64)>,
    /// Loss on held-back rows before the first step, and of the result.
    pub eval: Option<(f64, f64)>,
    /// The best evaluation.
    pub best: Option<Best>,
    /// The step that `adapter/` (`model/`) holds, on rank 0; the last step on other ranks.
    pub result_step: u64,
}

/// A number before training and after a step.
type Pair = Option<(f64, f64)>;

/// Two pairs of losses: of training at the first step and at step `step`; on held-back rows before
/// the first step and at the last evaluation up to `step`. `None` if the rows do not go back to the
/// beginning.
pub(crate) fn before_and_after(rows: &[Row], step: u64) -> (Pair, Pair) {
    let (steps, evals) = (step_rows(rows), eval_rows(rows));
    let first = steps.iter().find(|row| row.step == 1).map(|row| row.loss);
    let last = steps.iter().rev().find(|row| row.step == step).map(|row| row.loss);
    let before = evals.iter().find(|row| row.step == 0).map(|row| row.eval_loss);
    let after = evals.iter().rev().find(|row| row.step > 0 && row.step <= step).map(|row| row.eval_loss);
    (first.zip(last), before.zip(after))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{EvalRow, StepRow};

    #[test]
    fn from_the_first_row_to_the_result() {
        let step = |step, loss| Row::Step(StepRow { step, loss, ..StepRow::default() });
        let eval = |step, eval_loss| Row::Eval(EvalRow { step, eval_loss, eval_tokens: 1 });
        let whole = [eval(0, 3.5), step(1, 3.0), step(2, 2.0), eval(2, 2.5), step(3, 1.0), eval(3, 2.75)];
        let cases: [(&[Row], u64, (Pair, Pair)); 5] = [
            (&whole, 3, (Some((3.0, 1.0)), Some((3.5, 2.75)))),
            (&whole, 2, (Some((3.0, 2.0)), Some((3.5, 2.5)))),
            // A version that did not evaluate before the first step.
            (&[step(1, 3.0), step(2, 2.0), eval(2, 2.5)], 2, (Some((3.0, 2.0)), None)),
            (&[step(2, 2.0)], 2, (None, None)),
            (&[], 0, (None, None)),
        ];
        for (rows, result, want) in cases {
            assert_eq!(before_and_after(rows, result), want, "{rows:?}");
        }
    }
}
