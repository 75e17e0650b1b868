//! The page about several runs, `compare --html`.

use std::fmt::Write;

use super::chart::{Chart, Line};
use super::page::{escape, page};
use super::ranks::CLASSES;
use crate::metrics::StepRow;
use crate::read_run::RunRecord;

/// A table of the page: its heading, and rows of a name and the value of each run.
pub(crate) type Values = (&'static str, Vec<(String, Vec<String>)>);

/// What is compared.
#[derive(Clone, Copy, Debug)]
pub struct Compared<'a> {
    /// The name of each run.
    pub names: &'a [String],
    /// The runs, in the same order.
    pub runs: &'a [&'a RunRecord],
    /// Tables of their values, in the same order.
    pub tables: &'a [Values],
}

/// A self-contained page with the curves of all runs in the same charts.
pub fn compare_page(compared: &Compared<'_>) -> String {
    let mut body = String::new();
    body.push_str("<div class=\"charts\">");
    let by_step = |value: fn(&StepRow) -> f64| {
        lines(compared, &|run| run.steps().iter().map(|row| (row.step as f64, value(row))).collect())
    };
    let evaluations = lines(compared, &|run| run.evals().iter().map(|row| (row.step as f64, row.eval_loss)).collect());
    let evaluations = evaluations.into_iter().map(|line| Line { dots: true, ..line }).collect();
    for (title, may_be_logarithmic, most_points, lines) in [
        ("Training loss per trained token", true, 1500, by_step(|row| row.loss)),
        ("Loss on held-back rows", true, 400, evaluations),
        ("Learning rate", false, 400, by_step(|row| row.learning_rate)),
        ("Gradient norm, before clipping", true, 400, by_step(|row| row.grad_norm)),
        ("Tokens per second", false, 400, by_step(|row| row.tokens_per_second)),
    ] {
        Chart { title, may_be_logarithmic, most_points, lines }.write(&mut body);
    }
    body.push_str("</div>");
    for (heading, rows) in compared.tables {
        table(&mut body, heading, compared.names, rows);
    }
    page(&compared.names.join(", "), false, &body)
}

/// A line for each run. The colors begin again after the last, with dashes.
fn lines<'a>(compared: &Compared<'a>, points: &dyn Fn(&RunRecord) -> Vec<(f64, f64)>) -> Vec<Line<'a>> {
    let runs = compared.names.iter().zip(compared.runs).enumerate();
    let line = |(n, (name, run)): (usize, (&'a String, &&RunRecord))| {
        let class = CLASSES[n % CLASSES.len()];
        Line { dashed: n / CLASSES.len() % 2 == 1, ..Line::new(name, class, points(run)) }
    };
    runs.map(line).collect()
}

fn table(page: &mut String, heading: &str, names: &[String], rows: &[(String, Vec<String>)]) {
    if rows.is_empty() {
        return;
    }
    let _ = write!(page, "<h2>{heading}</h2><div class=\"wide\"><table class=\"values\"><tr><th></th>");
    for (n, name) in names.iter().enumerate() {
        let _ = write!(page, "<th><span class=\"{}\">{}</span></th>", CLASSES[n % CLASSES.len()], escape(name));
    }
    page.push_str("</tr>");
    for (name, values) in rows {
        let _ = write!(page, "<tr><td>{}</td>", escape(name));
        for value in values {
            let _ = write!(page, "<td>{}</td>", escape(value));
        }
        page.push_str("</tr>");
    }
    page.push_str("</table></div>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_runs_are_in_each_chart_and_names_are_no_markup() {
        let record = |loss: f64| {
            let mut record = RunRecord::default();
            let row = StepRow {
                step: 1,
                loss,
                grad_norm: 1.0,
                learning_rate: 1.0,
                tokens_per_second: 1.0,
                ..StepRow::default()
            };
            record.push((serde_json::to_string(&row).expect("JSON") + "\n").as_bytes());
            record
        };
        let names: Vec<String> = (0..10).map(|n| format!("</script><b>{n}")).collect();
        let records: Vec<RunRecord> = (0..10).map(|n| record(f64::from(n) + 1.0)).collect();
        let runs: Vec<&RunRecord> = records.iter().collect();
        let rows = vec![("lora.rank".to_owned(), vec!["</td><script>".to_owned(); 10])];
        let html = compare_page(&Compared { names: &names, runs: &runs, tables: &[("Settings", rows)] });
        assert_eq!(html.matches("class=\"line r0\"").count(), 4, "no evaluations, no chart of them");
        assert_eq!(html.matches("class=\"line r1 dashed\"").count(), 4);
        assert_eq!(html.matches("</script>").count(), 1, "its own");
        assert!(!html.contains("<b>") && !html.contains("http-equiv"));
    }
}
