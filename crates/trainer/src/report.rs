//! `report.html`: one self-contained page about a run, for people.

mod ranks;

use std::fmt::Write;

use finetune_store::{RealDisk, replace_file};

use crate::error::TrainError;
use crate::evaluate::{Answers, BeforeAfter, Sample};
use crate::journal::Journal;
use crate::metrics::{EvalRow, Row, StepRow};
use crate::prepare::Run;

const STYLE: &str = include_str!("report.css");

/// A line of a chart.
struct Line<'a> {
    name: &'a str,
    class: &'a str,
    points: Vec<(f64, f64)>,
    /// Single points are marked: there are few of them.
    dots: bool,
}

/// Writes the page of what the run has done so far.
pub(crate) fn write(run: &Run, journal: &Journal) -> Result<(), TrainError> {
    let page = page(run, journal);
    Ok(replace_file(&RealDisk, &journal.directory.join("report.html"), page.as_bytes())?)
}

fn page(run: &Run, journal: &Journal) -> String {
    let (rows, directory) = (&journal.metrics.rows, &journal.directory);
    let steps: Vec<&StepRow> =
        rows.iter().filter_map(|row| if let Row::Step(row) = row { Some(row) } else { None }).collect();
    let evals: Vec<&EvalRow> =
        rows.iter().filter_map(|row| if let Row::Eval(row) = row { Some(row) } else { None }).collect();
    let name = directory.file_name().unwrap_or_default().to_string_lossy();
    let mut page = String::new();
    let _ = write!(
        page,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{name} – finetune</title><style>{STYLE}</style></head><body><main><h1>{name}</h1>",
        name = escape(&name)
    );
    facts(&mut page, run, &steps, &evals);
    let series = |value: fn(&StepRow) -> f64| steps.iter().map(|row| (row.step as f64, value(row))).collect::<Vec<_>>();
    let eval_points = evals.iter().map(|row| (row.step as f64, row.eval_loss)).collect();
    let mut losses = vec![Line { name: "training", class: "a", points: series(|row| row.loss), dots: false }];
    if !evals.is_empty() {
        losses.push(Line { name: "evaluation", class: "b", points: eval_points, dots: true });
    }
    chart(&mut page, "Loss per trained token", &losses);
    let single = |name, points| [Line { name, class: "a", points, dots: false }];
    chart(&mut page, "Learning rate", &single("learning rate", series(|row| row.learning_rate)));
    chart(&mut page, "Gradient norm, before clipping", &single("gradient norm", series(|row| row.grad_norm)));
    chart(&mut page, "Tokens per second", &single("tokens per second", series(|row| row.tokens_per_second)));
    ranks::ranks(&mut page, &steps, run.ranks.group().who());
    answers(&mut page, &BeforeAfter::read(directory));
    let _ = writeln!(page, "<h2>Recipe</h2><pre>{}</pre></main></body></html>", escape(&run.recipe.to_toml()));
    page
}

/// The numbers at the top of the page.
fn facts(page: &mut String, run: &Run, steps: &[&StepRow], evals: &[&EvalRow]) {
    let mut facts: Vec<(&str, String)> =
        vec![("steps", format!("{} of {}", run.state.step, run.steps)), ("computed on", run.device.clone())];
    if let (Some(first), Some(last)) = (steps.first(), steps.last()) {
        facts.push(("training loss", format!("{:.4} → {:.4}", first.loss, last.loss)));
    }
    if let Some(best) = run.state.best {
        facts.push(("best evaluation", format!("{:.4} at step {}", best.eval_loss, best.step)));
    } else if let Some(last) = evals.last() {
        facts.push(("evaluation loss", format!("{:.4}", last.eval_loss)));
    }
    facts.push(("rows", run.train.rows.len().to_string()));
    facts.push(("trained parameters", run.state.parameters.len().to_string()));
    let seconds: f64 = steps.iter().map(|row| row.seconds).sum();
    let tokens: u64 = steps.iter().map(|row| row.tokens).sum();
    facts.push(("training time", format!("{seconds:.0} s")));
    if seconds > 0.0 {
        facts.push(("tokens per second", format!("{:.0}", tokens as f64 / seconds)));
    }
    page.push_str("<dl>");
    for (name, value) in facts {
        let _ = write!(page, "<div><dt>{name}</dt><dd>{}</dd></div>", escape(&value));
    }
    page.push_str("</dl>");
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 220.0;
const LEFT: f64 = 64.0;
const BOTTOM: f64 = 28.0;

/// A chart of lines over steps, with round numbers on both axes.
fn chart(page: &mut String, title: &str, lines: &[Line<'_>]) {
    let points = || lines.iter().flat_map(|line| &line.points).filter(|point| point.1.is_finite());
    if points().count() == 0 {
        return;
    }
    let range = |pick: fn(&(f64, f64)) -> f64| {
        let values = points().map(pick);
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)))
    };
    let (first, last) = range(|point| point.0);
    let (low, high) = range(|point| point.1);
    // From zero where that wastes less than half of the height.
    let low = if low > 0.0 && low < high / 2.0 { 0.0 } else { low };
    let (high, last) = (if high > low { high } else { low + 1.0 }, if last > first { last } else { first + 1.0 });
    let x = |step: f64| LEFT + (step - first) / (last - first) * (WIDTH - LEFT - 12.0);
    let y = |value: f64| HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - 12.0);
    let _ = write!(page, "<figure><figcaption>{title}");
    if lines.len() > 1 {
        for line in lines {
            let _ = write!(page, " <span class=\"{}\">{}</span>", line.class, line.name);
        }
    }
    let _ = write!(page, "</figcaption><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\">");
    for tick in ticks(low, high) {
        let (at, label) = (y(tick), label(tick));
        let right = WIDTH - 12.0;
        let _ = write!(
            page,
            "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{right}\"/><text x=\"{}\" y=\"{:.1}\" class=\"y\">{label}</text>",
            LEFT - 8.0,
            at + 4.0
        );
    }
    for tick in ticks(first, last).into_iter().filter(|tick| tick.fract() == 0.0) {
        let _ = write!(page, "<text x=\"{:.1}\" y=\"{}\" class=\"x\">{tick}</text>", x(tick), HEIGHT - 8.0);
    }
    for line in lines {
        let path: String = thin(&line.points)
            .iter()
            .enumerate()
            .map(|(n, (step, value))| format!("{}{:.1} {:.1}", if n == 0 { 'M' } else { 'L' }, x(*step), y(*value)))
            .collect();
        let _ = write!(page, "<path class=\"line {}\" d=\"{path}\"/>", line.class);
        if line.dots || line.points.len() == 1 {
            for (step, value) in &line.points {
                let _ = write!(
                    page,
                    "<circle class=\"{}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"><title>step {step}: {value:.4}</title></circle>",
                    line.class,
                    x(*step),
                    y(*value)
                );
            }
        }
    }
    page.push_str("</svg></figure>");
}

/// At most 700 points, as many as the chart has columns: of each stretch its lowest and highest, so that spikes stay.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let points: Vec<_> = points.iter().copied().filter(|point| point.1.is_finite()).collect();
    if points.len() <= 700 {
        return points;
    }
    let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
    let mut kept = Vec::new();
    for stretch in points.chunks(points.len().div_ceil(350)) {
        let (low, high) = (stretch.iter().min_by(by_value), stretch.iter().max_by(by_value));
        let mut pair: Vec<(f64, f64)> = low.into_iter().chain(high).copied().collect();
        pair.sort_by(|a, b| a.0.total_cmp(&b.0));
        kept.extend(pair);
    }
    kept
}

/// Four to eight round numbers in the range.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|n| n * power).find(|&step| step >= rough).unwrap_or(power);
    let first = (low / step).ceil() as i64;
    (first..).map(|n| n as f64 * step).take_while(|&tick| tick <= high + step * 1e-9).take(20).collect()
}

fn label(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 {
        "0".to_owned()
    } else if size < 1e-3 {
        format!("{value:.0e}")
    } else if size >= 100.0 {
        format!("{value:.0}")
    } else {
        let text = format!("{value:.4}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    }
}

fn answers(page: &mut String, kept: &BeforeAfter) {
    let (Some(before), after) = (&kept.before, &kept.after) else { return };
    page.push_str("<h2>Answers to held-back rows</h2>");
    let score = |answers: &Answers| answers.exact.map(|(right, of)| format!("{right} of {of} word for word"));
    let scores = [("before", Some(before)), ("after", after.as_ref())];
    for (when, score) in scores.iter().filter_map(|(when, answers)| answers.and_then(score).map(|score| (when, score)))
    {
        let _ = write!(page, "<p>{when} training: <b>{score}</b></p>");
    }
    if before.samples.is_empty() {
        return;
    }
    page.push_str("<table><tr><th>prompt</th><th>expected</th><th>before</th><th>after</th></tr>");
    let empty = Vec::new();
    let later: &Vec<Sample> = after.as_ref().map_or(&empty, |after| &after.samples);
    for (n, sample) in before.samples.iter().enumerate() {
        let after = later.get(n).map_or("", |sample| sample.answer.as_str());
        let _ = write!(
            page,
            "<tr title=\"{}\"><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&sample.row),
            escape(&sample.prompt),
            escape(&sample.expected),
            escape(&sample.answer),
            escape(after)
        );
    }
    page.push_str("</table>");
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let cases = [
            (0.0, 1.0, vec![0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]),
            (3.0, 47.0, vec![10.0, 20.0, 30.0, 40.0]),
            (-1.0, 1.0, vec![-1.0, -0.5, 0.0, 0.5, 1.0]),
        ];
        for (low, high, want) in cases {
            assert_eq!(ticks(low, high), want, "{low} to {high}");
        }
    }

    #[test]
    fn thinning_keeps_spikes() {
        let mut points: Vec<(f64, f64)> = (0..10_000).map(|n| (f64::from(n), 1.0)).collect();
        points[5_003].1 = 50.0;
        let kept = thin(&points);
        assert!(kept.len() <= 700 && kept.contains(&(5_003.0, 50.0)));
    }

    #[test]
    fn text_of_users_cannot_become_markup() {
        assert_eq!(escape("<script>\"&"), "&lt;script&gt;&quot;&amp;");
    }
}
