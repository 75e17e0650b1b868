//! What came of runs, in numbers.

use finetune_trainer::numbers::{bytes, duration, thousands};
use finetune_trainer::{RunFacts, RunRecord};
use serde_json::{Map, Value, json};

use super::count;

/// The numbers of one run.
struct Score<'a> {
    record: &'a RunRecord,
    facts: Option<&'a RunFacts>,
    loss: Option<f64>,
    lowest_loss: Option<(u64, f64)>,
    eval_before: Option<f64>,
    eval: Option<f64>,
    best: Option<(u64, f64)>,
    tokens_per_second: Option<f64>,
    exact: [Option<(usize, usize)>; 2],
}

impl<'a> Score<'a> {
    fn new(record: &'a RunRecord) -> Score<'a> {
        let (steps, evals) = (record.steps(), record.evals());
        let lowest = steps.iter().min_by(|one, other| one.loss.total_cmp(&other.loss));
        let (seconds, tokens) = (record.seconds(), steps.iter().map(|row| row.tokens).sum::<u64>());
        let (before, after) = record.answers();
        let exact = [before, after].map(|answers| answers.and_then(|answers| answers.exact));
        Score {
            record,
            facts: record.facts.as_ref(),
            loss: steps.last().map(|row| row.loss),
            lowest_loss: lowest.map(|row| (row.step, row.loss)),
            eval_before: evals.iter().find(|row| row.step == 0).map(|row| row.eval_loss),
            eval: evals.iter().rfind(|row| row.step > 0).map(|row| row.eval_loss),
            best: record.best_evaluation().map(|row| (row.step, row.eval_loss)),
            tokens_per_second: (seconds > 0.0).then(|| tokens as f64 / seconds),
            exact,
        }
    }

    /// The most memory: the GPU's if there was one, otherwise that of the process.
    fn peak_memory(&self) -> Option<u64> {
        self.facts.and_then(|facts| facts.device_peak_memory.or(facts.peak_memory))
    }
}

/// The rows of the table of scores: a name, and the value of each run. Rows without any value are
/// left out.
pub(super) fn scores(records: &[&RunRecord]) -> Vec<(&'static str, Vec<String>)> {
    let all: Vec<Score<'_>> = records.iter().map(|record| Score::new(record)).collect();
    let dash = || "-".to_owned();
    let loss = |value: Option<f64>| value.map_or_else(dash, |value| format!("{value:.4}"));
    let at = |value: Option<(u64, f64)>| {
        value.map_or_else(dash, |(step, value)| format!("{value:.4} at step {}", thousands(step)))
    };
    let exact = |value: Option<(usize, usize)>| value.map_or_else(dash, |(right, of)| format!("{right} of {of}"));
    type Cell<'a> = &'a dyn Fn(&Score<'_>) -> String;
    let rows: [(&str, Cell<'_>); 14] = [
        ("state", &|score| score.record.state().words().to_owned()),
        ("steps", &|score| match score.record.total_steps() {
            Some(total) => format!("{} of {}", thousands(score.record.step()), thousands(total)),
            None => thousands(score.record.step()),
        }),
        ("last training loss", &|score| loss(score.loss)),
        ("lowest training loss", &|score| at(score.lowest_loss)),
        ("held back before", &|score| loss(score.eval_before)),
        ("held back, last", &|score| loss(score.eval)),
        ("held back, best", &|score| at(score.best)),
        ("word for word before", &|score| exact(score.exact[0])),
        ("word for word after", &|score| exact(score.exact[1])),
        ("training time", &|score| duration(score.record.seconds())),
        ("tokens per second", &|score| count(score.tokens_per_second.map(|speed| speed.round() as u64))),
        ("peak memory", &|score| score.peak_memory().map_or_else(dash, bytes)),
        ("trained parameters", &|score| count(score.facts.map(|facts| facts.trained_parameters))),
        ("computed on", &|score| score.facts.map_or_else(dash, |facts| facts.device.clone())),
    ];
    let rows = rows.into_iter().map(|(name, cell)| (name, all.iter().map(cell).collect::<Vec<_>>()));
    rows.filter(|(_, values)| values.iter().any(|value| value != "-")).collect()
}

/// The same for programs.
pub(super) fn object(record: &RunRecord) -> Map<String, Value> {
    let score = Score::new(record);
    let value = json!({
        "state": record.state().words(),
        "step": record.step(),
        "steps": record.total_steps(),
        "loss": score.loss,
        "lowest_loss": score.lowest_loss.map(|(_, loss)| loss),
        "lowest_loss_step": score.lowest_loss.map(|(step, _)| step),
        "eval_loss_before": score.eval_before,
        "eval_loss": score.eval,
        "best_eval_loss": score.best.map(|(_, loss)| loss),
        "best_eval_step": score.best.map(|(step, _)| step),
        "exact_match_before": score.exact[0].map(|(right, of)| json!({"right": right, "of": of})),
        "exact_match_after": score.exact[1].map(|(right, of)| json!({"right": right, "of": of})),
        "seconds": record.seconds(),
        "tokens_per_second": score.tokens_per_second,
        "peak_memory_bytes": score.peak_memory(),
        "trained_parameters": score.facts.map(|facts| facts.trained_parameters),
        "device": score.facts.map(|facts| facts.device.clone()),
        "version": score.facts.map(|facts| facts.version.clone()),
    });
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(rows: &str) -> RunRecord {
        let mut record = RunRecord::default();
        record.push(rows.as_bytes());
        record
    }

    const ROWS: &str = "{\"step\":0,\"eval_loss\":3.5,\"eval_tokens\":1}\n\
        {\"step\":1,\"epoch\":1,\"loss\":3.0,\"trained_tokens\":1,\"tokens\":100,\"grad_norm\":1,\"learning_rate\":1,\"tokens_per_second\":1,\"seconds\":1}\n\
        {\"step\":2,\"epoch\":1,\"loss\":1.0,\"trained_tokens\":1,\"tokens\":100,\"grad_norm\":1,\"learning_rate\":1,\"tokens_per_second\":1,\"seconds\":1}\n\
        {\"step\":2,\"eval_loss\":1.5,\"eval_tokens\":1}\n\
        {\"step\":3,\"epoch\":1,\"loss\":2.0,\"trained_tokens\":1,\"tokens\":100,\"grad_norm\":1,\"learning_rate\":1,\"tokens_per_second\":1,\"seconds\":2}\n\
        {\"step\":3,\"eval_loss\":1.75,\"eval_tokens\":1}\n";

    #[test]
    fn scores_are_of_the_rows_and_facts() {
        let mut whole = record(ROWS);
        let facts = RunFacts { trained_parameters: 149_504, peak_memory: Some(2 << 30), ..RunFacts::default() };
        (whole.facts, whole.is_held) = (Some(facts), true);
        let empty = record("");
        let rows = scores(&[&whole, &empty]);
        let pair = |name: &str| rows.iter().find(|(known, _)| *known == name).map(|(_, values)| values.join(" | "));
        for (name, want) in [
            ("state", "running | waiting"),
            ("last training loss", "2.0000 | -"),
            ("lowest training loss", "1.0000 at step 2 | -"),
            ("held back before", "3.5000 | -"),
            ("held back, last", "1.7500 | -"),
            ("held back, best", "1.5000 at step 2 | -"),
            ("training time", "4s | 0s"),
            ("tokens per second", "75 | -"),
            ("peak memory", "2.0 GiB | -"),
            ("trained parameters", "149,504 | -"),
        ] {
            assert_eq!(pair(name).as_deref(), Some(want), "{name}");
        }
        assert_eq!(pair("word for word after"), None, "nobody asked for it");
        let object = object(&whole);
        assert_eq!((&object["best_eval_step"], &object["tokens_per_second"]), (&json!(2), &json!(75.0)));
    }
}
