//! `finetune validate`: everything that would end a run, and what the run would be: counts,
//! lengths, an estimate of memory, disk and time. To what [`examine`] finds it adds the run
//! directory, the disk, and every weight's value.

use std::fmt;
use std::path::Path;

use finetune_advice::Advice as _;
use finetune_dataset::{ChatTokenizer, Dataset, Row};
use finetune_recipe::Recipe;
use finetune_store::RealDisk;
use serde::Serialize;

use crate::base_model::{directory_of_config, model_directory};
use crate::date;
use crate::device_plan::{DevicePlan, ThisHost};
use crate::disk_need::DiskNeed;
use crate::error::{Fault, TrainError};
use crate::examine::{Examined, Extent, examine};
use crate::load::Load;
use crate::memory::{self, Estimate, Sizing};
use crate::output_directory::{self, Contents};
use crate::product_time::{Multiplied, Rates, operations, tokens_at_once};
use crate::residency::read_in_step;
use crate::resume::Resume;
use crate::run_directory::check_results;
use crate::stages::disk_rate;

/// What `finetune validate` has found. What a problem prevented is `None`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Validation {
    /// The model's class in transformers.
    pub architecture: Option<&'static str>,
    /// Parameters of the model.
    pub parameters: Option<u64>,
    /// Parameters that are trained.
    pub trained_parameters: Option<u64>,
    /// Rows to train on.
    pub train: Option<DataSummary>,
    /// Held-back rows.
    pub eval: Option<DataSummary>,
    /// Steps of the whole run.
    pub steps: Option<u64>,
    /// Steps of one pass over the rows.
    pub steps_per_epoch: Option<u64>,
    /// The device and number type, for people.
    pub device: Option<String>,
    /// Memory and time.
    pub estimate: Option<Estimate>,
    /// The part of the time for which other programs had the processor while the time was estimated, if that is much.
    #[serde(skip)]
    pub others: Option<f64>,
    /// Bytes on the disk.
    pub disk: Option<DiskNeed>,
    /// The first row to train on.
    #[serde(skip)]
    pub first_row: Option<FirstRow>,
    /// What a user should know.
    pub notices: Vec<String>,
    /// What `run` would refuse. If it is empty, nothing prevents the run.
    pub problems: Vec<Problem>,
}

/// A row, and what shows it to a person.
#[derive(Clone)]
pub struct FirstRow {
    /// Where the row came from: `file:line`.
    pub origin: String,
    /// Its tokens, and which of them are trained on.
    pub row: Row,
    /// `None`: the model has none.
    pub tokenizer: Option<ChatTokenizer>,
    /// The tokens that the answers of all rows end with.
    pub ends: Vec<u32>,
}

impl fmt::Debug for FirstRow {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("FirstRow").field("origin", &self.origin).finish_non_exhaustive()
    }
}

impl FirstRow {
    fn of(found: &Examined) -> Option<FirstRow> {
        let rows = found.train.as_ref()?;
        let tokenizer = found.tokenizer.clone().flatten();
        Some(FirstRow {
            origin: rows.origin(0),
            row: rows.rows.first()?.clone(),
            tokenizer,
            ends: rows.ends.tokens.clone(),
        })
    }
}

/// One thing that would end a run.
#[derive(Clone, Debug, Serialize)]
pub struct Problem {
    /// What is wrong, and where.
    pub message: String,
    /// What to do, the most useful first.
    pub hints: Vec<String>,
    /// What kind of problem it is.
    #[serde(skip)]
    pub fault: Fault,
}

impl From<TrainError> for Problem {
    fn from(error: TrainError) -> Problem {
        Problem { message: error.to_string(), hints: error.hints(), fault: error.fault() }
    }
}

/// Rows that stay, and what happened to the others. Lengths are in tokens.
#[derive(Clone, Debug, Serialize)]
pub struct DataSummary {
    /// Rows that stay.
    pub rows: usize,
    /// Tokens of these rows.
    pub tokens: u64,
    /// Tokens that the loss counts.
    pub trained_tokens: u64,
    /// The median length.
    pub median_length: usize,
    /// 95 % of rows are no longer than this.
    pub length_95: usize,
    /// The longest length.
    pub longest: usize,
    /// Rows longer than `data.max_seq_len` that were cut.
    pub truncated: usize,
    /// Rows longer than `data.max_seq_len` that were left out.
    pub dropped: usize,
    /// Lines with nothing to train on. Each is a problem too.
    pub zero_label: usize,
    /// Rows in which every token is trained on.
    pub unmasked: usize,
}

/// Checks all that [`crate::prepare`] checks, and changes nothing. One problem does not hide
/// another. `progress` is called with the number of rows read.
pub fn validate(recipe: &Recipe, host: &ThisHost, progress: &dyn Fn(u64)) -> Validation {
    let mut recipe = recipe.clone();
    recipe.data.date = Some(date::choose(&recipe, &Resume::Newest));
    let mut found = Examined::default();
    let model = match (model_directory(&recipe), directory_of_config(&recipe)) {
        (Err(problem), Some(directory)) => {
            found.problems.push(problem);
            Ok(directory)
        }
        (model, _) => model,
    };
    look_at_output(&mut found, &recipe, host, model.as_deref().ok());
    let mut found = examine(found, &recipe, model, host, Extent::Validate, None, progress);
    let sizes = |targets| found.config.as_ref().map(|config| memory::sizes(config, targets));
    let (all, trained) = (sizes(None), found.start.as_ref());
    let trained = trained.and_then(|start| sizes(start.as_ref().map(|start| &start.adaptation)));
    let (parameters, trained) = (all.map(|all| all.parameters), trained.map(|sizes| sizes.trained));
    let (mut estimate, before) = (found.estimate, Load::so_far());
    if let (Some(estimate), Some(directory), Some(config)) = (&mut estimate, &found.directory, &found.config)
        && let (Some(device_plan), Some(train)) =
            (&found.device_plan, found.train.as_ref().or(found.assumed_rows.as_ref()))
    {
        let multiplied = Multiplied::of(config, parameters.unwrap_or(0));
        let steps = found.steps.unwrap_or(0);
        let of_products = seconds(&recipe, directory, train, steps, multiplied, device_plan);
        let of_reading = || found.sizing.as_ref().and_then(|sizing| reading_seconds(&recipe, directory, train, sizing));
        // Each hides behind the other.
        estimate.seconds = of_products.map(|seconds| seconds.max(steps as f64 * of_reading().unwrap_or(0.0)));
    }
    let others = before.and_then(Load::others_since);
    let disk = match (found.steps, trained, found.sizing.as_ref()) {
        (Some(steps), Some(trained), Some(sizing)) => {
            let has_eval = found.eval.is_some();
            Some(DiskNeed::new(&recipe, trained, steps, has_eval, sizing.text_bytes, host.disk))
        }
        _ => None,
    };
    if let Some(disk) = &disk {
        found.keep(disk.check(&recipe));
    }
    Validation {
        architecture: found.config.as_ref().map(|config| config.family.architecture),
        parameters,
        trained_parameters: trained,
        train: found.train.as_ref().map(data_summary),
        eval: found.eval.as_ref().map(data_summary),
        steps: found.steps,
        steps_per_epoch: found.plan.as_ref().map(|plan| plan.steps_per_epoch()),
        device: found.device_plan.as_ref().map(DevicePlan::describe),
        estimate,
        others,
        disk,
        first_row: FirstRow::of(&found),
        notices: found.assumptions.into_iter().chain(found.notices).collect(),
        problems: found.problems.into_iter().map(Problem::from).collect(),
    }
}

/// The run directory: what is in it, and whether a run may write there.
fn look_at_output(found: &mut Examined, recipe: &Recipe, host: &ThisHost, model: Option<&Path>) {
    let contents = output_directory::check(&RealDisk, recipe, host.recipe_file.as_deref(), model);
    if found.keep(contents) == Some(Contents::Run) {
        let occupied = recipe.output_dir.display();
        found.notices.push(format!("{occupied} holds a run already: `run` wants --resume, or another --output-dir"));
        found.keep(check_results(&RealDisk, &recipe.output_dir));
    }
}

/// Counts and lengths of rows.
fn data_summary(data: &Dataset) -> DataSummary {
    let mut lengths: Vec<usize> = data.rows.iter().map(|row| row.tokens.len()).collect();
    lengths.sort_unstable();
    let at = |share: f64| lengths.get(((lengths.len() - 1) as f64 * share) as usize).copied().unwrap_or(0);
    DataSummary {
        rows: data.rows.len(),
        tokens: data.counts.tokens,
        trained_tokens: data.counts.trained_tokens,
        median_length: if lengths.is_empty() { 0 } else { at(0.5) },
        length_95: if lengths.is_empty() { 0 } else { at(0.95) },
        longest: data.counts.longest,
        truncated: data.counts.truncated,
        dropped: data.counts.dropped,
        zero_label: data.counts.zero_label,
        unmasked: data.counts.unmasked,
    }
}

/// Seconds of the whole run, at the rates of matrix products that are measured now. `None` on a GPU, whose kernels
/// would have to be compiled first.
fn seconds(
    recipe: &Recipe,
    directory: &Path,
    data: &Dataset,
    steps: u64,
    multiplied: Multiplied,
    device_plan: &DevicePlan,
) -> Option<f64> {
    let DevicePlan { placement, .. } = device_plan;
    if !placement.is_cpu() {
        return None;
    }
    let rows = recipe.train.global_batch_size.min(data.rows.len());
    let computes_again = recipe.train.gradient_checkpointing || placement.reads_layers() || placement.stage().is_some();
    let method = recipe.train.method;
    let rates = Rates::measured(method, directory, placement, tokens_at_once(recipe, data, rows));
    Some(steps as f64 * rates.seconds_of_step(&operations(method, data, rows, multiplied, computes_again)))
}

/// Seconds in which a step reads, where experts are read for each micro-batch. Whole layers hide behind the products,
/// on all but slow disks. `None`: no experts are read so, or the disk's rate is not known.
fn reading_seconds(recipe: &Recipe, directory: &Path, data: &Dataset, sizing: &Sizing) -> Option<f64> {
    if !sizing.placement.reads_experts() {
        return None;
    }
    let rows = recipe.train.global_batch_size.min(data.rows.len());
    let micro_batches = rows.div_ceil(recipe.train.micro_batch_size).max(1);
    let read = read_in_step(sizing, micro_batches, tokens_at_once(recipe, data, rows));
    Some(read as f64 / disk_rate(directory)?)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use finetune_model::{Scheme, quantize_model};
    use finetune_store::{Staging, replace_file};

    use super::*;

    fn golden() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models/qwen3")
    }

    fn recipe(folder: &Path, model: &Path, keys: &str) -> Recipe {
        let text = format!("output_dir = \"run\"\n[model]\npath = {model:?}\ndevice = \"cpu\"\n{keys}");
        Recipe::parse(&text, &folder.join("r.toml"), &[], None).unwrap_or_else(|error| panic!("{error}"))
    }

    fn messages(found: &Validation) -> Vec<String> {
        found.problems.iter().map(|problem| problem.message.clone()).collect()
    }

    fn copy(from: &str, to: &Path) {
        replace_file(&RealDisk, to, &std::fs::read(golden().join(from)).expect("a golden file")).expect("a file");
    }

    #[test]
    fn one_problem_does_not_hide_another() {
        let folder = tempfile::tempdir().expect("a directory");
        copy("rows.jsonl", &folder.path().join("good.jsonl"));
        let torn = b"{\"input_ids\": [1, 2], \"labels\": [1, 2]}\n{\"input_ids\": [1\n";
        replace_file(&RealDisk, &folder.path().join("torn.jsonl"), torn).expect("a file");
        let keys = "[lora]\ntarget_modules = [\"c_attn\"]\n[data]\ntrain = [\"missing.jsonl\", \"torn.jsonl\"]\n\
                    eval = \"nowhere.jsonl\"\n";
        // With a model: files, rows, targets.
        let found = validate(&recipe(folder.path(), &golden(), keys), &ThisHost::default(), &|_| {});
        let all = messages(&found).join("\n");
        for part in ["missing.jsonl", "torn.jsonl:2", "nowhere.jsonl", "c_attn"] {
            assert!(all.contains(part), "{part}:\n{all}");
        }
        assert_eq!(found.problems.len(), 4, "{all}");
        assert!(found.problems.iter().all(|problem| problem.fault == Fault::Input), "{all}");
        // Without a model, files are looked at all the same.
        let found = validate(&recipe(folder.path(), Path::new("none/at-all"), keys), &ThisHost::default(), &|_| {});
        let all = messages(&found).join("\n");
        for part in ["none/at-all", "missing.jsonl", "torn.jsonl:2", "nowhere.jsonl"] {
            assert!(all.contains(part), "{part}:\n{all}");
        }
        assert!(found.train.is_none() && found.architecture.is_none());
    }

    /// Packed in its files, or while it is loaded: the format is said, the weights are counted as they
    /// are held, and not all of them can be trained.
    #[test]
    fn a_packed_base_is_named_and_counted() {
        let folder = tempfile::tempdir().expect("a directory");
        copy("rows.jsonl", &folder.path().join("good.jsonl"));
        let mut staging = Staging::begin(&RealDisk, folder.path(), "packed").expect("a new directory");
        quantize_model(&RealDisk, &golden(), Scheme::Nf4, &mut staging, &|_, _| {}).expect("a packed model");
        let packed = staging.publish(&serde_json::json!({"kind": "packed model"})).expect("published");
        let data = "[data]\ntrain = \"good.jsonl\"\n";
        let on_load = format!("quantization = \"nf4\"\n{data}");
        let look =
            |model: &Path, keys: &str| validate(&recipe(folder.path(), model, keys), &ThisHost::default(), &|_| {});
        let weights = |found: &Validation| found.estimate.expect("an estimate").weights;
        let dense = look(&golden(), data);
        for (found, words) in [
            (look(&packed, data), "bitsandbytes NF4"),
            (look(&golden(), &on_load), "nf4 while it is loaded"),
            (look(&packed, &on_load), "the base is packed already"),
        ] {
            assert!(found.problems.is_empty(), "{:?}", messages(&found));
            assert!(found.notices.iter().any(|notice| notice.contains(words)), "{words}: {:?}", found.notices);
            assert!(weights(&found) < weights(&dense), "{words}");
        }
        assert_eq!(weights(&look(&packed, data)), weights(&look(&golden(), &on_load)));
        let full = look(&packed, &format!("{data}[train]\nmethod = \"full\"\n"));
        assert!(messages(&full).join("\n").contains("trains all weights, and"), "{:?}", messages(&full));
    }

    #[test]
    fn memory_and_disk_beside_each_other() {
        let folder = tempfile::tempdir().expect("a directory");
        copy("rows.jsonl", &folder.path().join("good.jsonl"));
        let keys = "[data]\ntrain = \"good.jsonl\"\n";
        let host = ThisHost { memory: Some(1 << 20), disk: Some(1 << 10), ..ThisHost::default() };
        let found = validate(&recipe(folder.path(), &golden(), keys), &host, &|_| {});
        let all = messages(&found).join("\n");
        assert!(all.contains("of memory") && all.contains("on disk at"), "{all}");
        assert!(found.problems.iter().all(|problem| problem.fault == Fault::DiskOrMemory), "{all}");
        assert!(found.train.is_some() && found.estimate.is_some() && found.disk.is_some());
        let found = validate(&recipe(folder.path(), &golden(), keys), &ThisHost::default(), &|_| {});
        assert!(found.problems.is_empty(), "{:?}", messages(&found));
    }
}
