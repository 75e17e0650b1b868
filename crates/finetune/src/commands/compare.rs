//! `finetune compare`: what differs between runs, and what came of them.

mod differences;
mod scores;

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::ExitCode;

use finetune_launch::complaint::shown;
use finetune_recipe::Recipe;
use finetune_store::{Holding, RealDisk, recognize, replace_file};
use finetune_trainer::numbers::thousands;
use finetune_trainer::{Compared, LocalRun, RunRecord, compare_page};
use serde_json::{Map, Value, json};

use self::differences::differences;
use self::scores::scores;
use crate::cli::CompareArguments;
use crate::failure::Failure;
use crate::text_table::{columns, curve, shortened, terminal_width};
use crate::{output, source};

/// How the title of a page ends.
const PAGE: &str = " – finetune</title>";

/// Bytes of a page in which its title is looked for. It has the names of all runs.
const HEAD: u64 = 64 << 10;

/// Columns of a table without a terminal.
const WIDTH: usize = 100;

/// Losses that fall by more than this factor have curves of their logarithms.
const LOGARITHMIC: f64 = 20.0;

/// Runs and their names.
struct Runs {
    names: Vec<String>,
    runs: Vec<LocalRun>,
}

impl Runs {
    fn records(&self) -> Vec<&RunRecord> {
        self.runs.iter().map(|run| &run.record).collect()
    }
}

pub(crate) fn compare(arguments: &CompareArguments) -> Result<ExitCode, Failure> {
    if let Some(path) = &arguments.html {
        expect_no_other_file(path)?;
    }
    let runs = read(arguments)?;
    let records = runs.records();
    let recipes: Vec<Option<&Recipe>> = records.iter().map(|record| record.recipe.as_ref()).collect();
    let differ = differences(&recipes);
    if arguments.json {
        output::line(&object(&runs, &differ).to_string())?;
    } else {
        print(&runs, &differ)?;
    }
    if let Some(path) = &arguments.html {
        let names: Vec<String> = runs.names.clone();
        let settings = differ.iter().map(|(key, values)| ((*key).to_owned(), values.clone())).collect();
        let scores = scores(&records).into_iter().map(|(name, values)| (name.to_owned(), values)).collect();
        let tables = [("Scores", scores), ("Settings that differ", settings)];
        let page = compare_page(&Compared { names: &names, runs: &records, tables: &tables });
        replace_file(&RealDisk, path, page.as_bytes())?;
        if !arguments.json {
            output::line(&format!("\nall curves: {}", path.display()))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Refuses to write a page over anything but an earlier page.
fn expect_no_other_file(path: &Path) -> Result<(), Failure> {
    let refused = |what: &str| {
        let message = format!("--html {}: it is {what}, and stays as it is", path.display());
        Err(Failure::arguments(message, "name a new file, such as comparison.html"))
    };
    match std::fs::metadata(path) {
        Err(_) => return Ok(()),
        Ok(found) if found.is_dir() => return refused("a directory"),
        Ok(found) if !found.is_file() => return refused("no plain file"),
        Ok(_) => {}
    }
    let mut begin = Vec::new();
    match File::open(path).and_then(|file| file.take(HEAD).read_to_end(&mut begin)) {
        Ok(_) if String::from_utf8_lossy(&begin).contains(PAGE) => Ok(()),
        _ => refused("another file than a page of curves"),
    }
}

/// Reads all runs. Two of them at least must differ.
fn read(arguments: &CompareArguments) -> Result<Runs, Failure> {
    let (mut names, mut runs): (Vec<String>, Vec<LocalRun>) = (Vec::new(), Vec::new());
    for path in &arguments.runs {
        let directory = match recognize(path) {
            Holding::Run => path.clone(),
            Holding::Missing => {
                return Err(Failure::arguments(
                    format!("there is no {}", path.display()),
                    "name directories of runs, as runs/a",
                ));
            }
            holding => source::run_of(path).ok_or_else(|| {
                Failure::arguments(
                    format!("{} is {}: a run is meant", path.display(), holding.describe()),
                    "name the recipe's output_dir, which has metrics.jsonl in it",
                )
            })?,
        };
        let mut run = LocalRun::new(&directory);
        run.look().map_err(|error| {
            let message = format!("{}: its metrics cannot be read: {error}", directory.display());
            Failure::arguments(message, "compare needs the right to read metrics.jsonl there")
        })?;
        if run.record.recipe.is_none() {
            crate::stderr::complain!(
                "{}: this version cannot read its recipe.toml: its settings are not compared",
                directory.display()
            );
        }
        if let Some(damage) = run.record.damage() {
            crate::stderr::complain!("{}: {damage}", directory.display());
        }
        names.push(shown(&directory.to_string_lossy()));
        runs.push(run);
    }
    // The last name says enough if no two runs share it.
    let last = |run: &LocalRun| {
        let full = run.directory().canonicalize().unwrap_or_else(|_| run.directory().to_owned());
        full.file_name().map(|name| shown(&name.to_string_lossy())).unwrap_or_default()
    };
    let short: Vec<String> = runs.iter().map(last).collect();
    let is_only = |name: &String| short.iter().filter(|other| *other == name).count() == 1;
    let names = names.into_iter().zip(&short).map(|(full, short)| if is_only(short) { short.clone() } else { full });
    Ok(Runs { names: names.collect(), runs })
}

/// Tables and curves for a terminal.
fn print(runs: &Runs, differ: &[(&'static str, Vec<String>)]) -> Result<(), Failure> {
    let width = terminal_width().unwrap_or(WIDTH);
    let mut text = table("scores", &runs.names, scores(&runs.records()), width);
    text += "\n";
    if differ.is_empty() {
        text += "no setting differs\n";
    } else {
        let settings = differ.iter().map(|(key, values)| (*key, values.clone())).collect();
        text += &table("settings", &runs.names, settings, width);
    }
    for (title, values) in [
        ("training loss", losses(&runs.records())),
        ("held back", runs.records().iter().map(|run| run.evals().iter().map(|row| row.eval_loss).collect()).collect()),
    ] {
        text += &curves(title, &runs.names, &values, width);
    }
    output::print(&text)?;
    Ok(())
}

/// The training losses of each run.
fn losses(records: &[&RunRecord]) -> Vec<Vec<f64>> {
    records.iter().map(|run| run.steps().iter().map(|row| row.loss).collect()).collect()
}

/// A table with a column for each run. Columns share the width.
fn table(head: &str, names: &[String], rows: Vec<(&str, Vec<String>)>, width: usize) -> String {
    let first = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0).max(head.len());
    let each = (width.saturating_sub(first) / names.len().max(1)).saturating_sub(2).max(8);
    let cut = |values: &[String]| values.iter().map(|value| shortened(value, each)).collect::<Vec<_>>();
    let head = std::iter::once(head.to_owned()).chain(cut(names)).collect();
    let rows = rows.iter().map(|(name, values)| std::iter::once((*name).to_owned()).chain(cut(values)).collect());
    columns(&std::iter::once(head).chain(rows).collect::<Vec<Vec<String>>>())
}

/// A line for each run, all from the same lowest value to the same highest.
fn curves(title: &str, names: &[String], values: &[Vec<f64>], width: usize) -> String {
    let finite = || values.iter().flatten().copied().filter(|value| value.is_finite());
    let (low, high) = finite().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), value| (a.min(value), b.max(value)));
    // One point is no curve.
    if values.iter().all(|values| values.len() < 2) {
        return String::new();
    }
    let logarithmic = low > 0.0 && high > LOGARITHMIC * low;
    let scaled = |value: f64| if logarithmic { value.ln() } else { value };
    let name_width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0).min(width / 4);
    let room = width.saturating_sub(name_width + 24).clamp(8, 80);
    let longest = values.iter().map(Vec::len).max().unwrap_or(0);
    let mut text = format!("\n{title}{}\n", if logarithmic { ", logarithmic" } else { "" });
    for (name, values) in names.iter().zip(values) {
        let all: Vec<f64> = values.iter().map(|value| scaled(*value)).collect();
        // A shorter run has a shorter line.
        let own = (room * values.len()).div_ceil(longest.max(1));
        let bars = curve(&all, scaled(low), scaled(high), own);
        let ends = match (values.first(), values.last()) {
            (Some(first), Some(last)) => format!("{first:.4} → {last:.4}"),
            _ => "-".to_owned(),
        };
        text += &format!("{:<name_width$}  {bars:<room$}  {ends}\n", shortened(name, name_width));
    }
    text
}

/// Everything as one object.
fn object(runs: &Runs, differ: &[(&'static str, Vec<String>)]) -> Value {
    let entry = |n: usize, run: &LocalRun| {
        let settings: Map<String, Value> =
            differ.iter().map(|(key, values)| ((*key).to_owned(), json!(values[n]))).collect();
        let mut object = scores::object(&run.record);
        object.insert("run".to_owned(), json!(runs.names[n]));
        object.insert("path".to_owned(), json!(run.directory()));
        object.insert("settings".to_owned(), Value::Object(settings));
        Value::Object(object)
    };
    let entries: Vec<Value> = runs.runs.iter().enumerate().map(|(n, run)| entry(n, run)).collect();
    json!({ "runs": entries, "differ": differ.iter().map(|(key, _)| *key).collect::<Vec<_>>() })
}

/// A count with commas, or a dash.
fn count(number: Option<u64>) -> String {
    number.map_or("-".to_owned(), thousands)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_share_the_width() {
        let names = ["a".to_owned(), "b".to_owned()];
        let rows = vec![
            ("lora.rank", vec!["16".to_owned(), "32".to_owned()]),
            ("data.train", vec!["/a/long/path/of/rows.jsonl".to_owned(); 2]),
        ];
        let text = table("settings", &names, rows, 40);
        let want = "\
settings    a              b
lora.rank   16             32
data.train  /a/l…ws.jsonl  /a/l…ws.jsonl
";
        assert_eq!(text, want);
        assert!(text.lines().all(|line| line.chars().count() <= 40));
    }

    #[test]
    fn curves_have_the_same_scale() {
        let names = ["one".to_owned(), "two".to_owned()];
        let values = [vec![8.0, 4.0, 2.0, 1.0], vec![8.0, 8.0]];
        let want = "\ntraining loss\none  █▄▂▁      8.0000 → 1.0000\ntwo  ██        8.0000 → 8.0000\n";
        assert_eq!(curves("training loss", &names, &values, 32), want);
        let steep = [vec![8.0, 0.001], vec![1.0, 1.0]];
        assert!(curves("x", &names, &steep, 60).contains("x, logarithmic\n"));
        assert_eq!(curves("x", &names, &[vec![1.0], vec![]], 60), "");
    }
}
