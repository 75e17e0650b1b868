//! What can be known about a run before it starts: counts, lengths, an estimate of memory, disk and time; and everything
//! that would end it, each thing looked at on its own.

use std::io::BufRead;
use std::path::{Path, PathBuf};

use finetune_dataset::{ChatTokenizer, Dataset, Plan, resolve_files, unused_files};
use finetune_model::{FloatType, Model, ModelConfig, matmul_rate};
use finetune_recipe::{Method, Recipe};
use finetune_store::{Holding, RealDisk, recognize};
use serde::Serialize;

use crate::date;
use crate::disk_need::DiskNeed;
use crate::error::{Fault, TrainError};
use crate::journal::check_results;
use crate::learning::learning_notices;
use crate::memory::{self, Estimate, Sizes, Subject};
use crate::place::{Machine, Place};
use crate::prepare::{
    Resume, Start, check_available, check_result, has_weights, length_notice, model_directory, open_tokenizer,
    rows_cache, rows_notices, stored_type, total_steps,
};
use crate::run_directory::{self, Contents};

/// The findings of `finetune validate`. What could not be found out for a problem is `None`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Findings {
    pub architecture: Option<&'static str>,
    pub parameters: Option<u64>,
    pub trained_parameters: Option<u64>,
    pub train: Option<DataFindings>,
    pub eval: Option<DataFindings>,
    pub steps: Option<u64>,
    pub steps_per_epoch: Option<u64>,
    /// Where it would be computed, and in what.
    pub device: Option<String>,
    pub estimate: Option<Estimate>,
    pub disk: Option<DiskNeed>,
    pub notices: Vec<String>,
    /// What `run` would refuse. Empty: nothing stands in its way.
    pub problems: Vec<Problem>,
}

/// One thing that would end a run.
#[derive(Clone, Debug, Serialize)]
pub struct Problem {
    pub message: String,
    /// What to do, most useful first.
    pub hints: Vec<String>,
    #[serde(skip)]
    pub fault: Fault,
}

impl From<TrainError> for Problem {
    fn from(error: TrainError) -> Problem {
        Problem { message: error.to_string(), hints: error.hints(), fault: error.fault() }
    }
}

/// Rows that stay, and what happened to the others.
#[derive(Clone, Debug, Serialize)]
pub struct DataFindings {
    pub rows: usize,
    pub tokens: u64,
    pub trained_tokens: u64,
    pub median_length: usize,
    /// 95 % of rows are no longer than this.
    pub length_95: usize,
    pub longest: usize,
    pub truncated: usize,
    pub dropped: usize,
    pub zero_label: usize,
    /// Rows in which every token is trained on.
    pub unmasked: usize,
}

/// Checks all that [`crate::prepare`] checks, and touches nothing. One problem does not hide another.
pub fn findings(recipe: &Recipe, machine: &Machine, progress: &dyn Fn(u64)) -> Findings {
    let mut found = Findings::default();
    let mut recipe = recipe.clone();
    recipe.data.date = Some(date::choose(&recipe, &Resume::Newest));
    if let Some(notices) = found.keep(check_available(&recipe)) {
        found.notices.extend(notices);
    }
    let directory = found.keep(model_directory(&recipe));
    found.look_at_output(&recipe, machine, directory.as_deref());
    let config = directory.as_deref().and_then(|directory| found.look_at_model(&recipe, directory));
    let tokenizer = directory.as_deref().and_then(|directory| found.keep(open_tokenizer(&recipe, directory)));
    // A tokenizer that is not there is no problem yet: rows may be tokens.
    let reader = config.as_ref().zip(tokenizer.as_ref());
    let (train, eval) = found.look_at_rows(&recipe, directory.as_deref(), reader, progress);
    if let (Some(directory), Some(config)) = (directory, config) {
        let tokenizer = tokenizer.flatten();
        found.look_at_size(&recipe, machine, &Parts { directory, config, tokenizer, train, eval });
    }
    found
}

/// What a run would be put together from, as far as it could be read.
struct Parts {
    directory: PathBuf,
    config: ModelConfig,
    tokenizer: Option<ChatTokenizer>,
    train: Option<Dataset>,
    eval: Option<Dataset>,
}

impl Findings {
    /// A problem is noted, once, and what hangs on it left out.
    fn keep<T>(&mut self, result: Result<T, TrainError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                let problem = Problem::from(error);
                if self.problems.iter().all(|known| known.message != problem.message) {
                    self.problems.push(problem);
                }
                None
            }
        }
    }

    fn look_at_output(&mut self, recipe: &Recipe, machine: &Machine, model: Option<&Path>) {
        let place = run_directory::check(&RealDisk, recipe, machine.recipe_file.as_deref(), model);
        if self.keep(place) == Some(Contents::Run) {
            let occupied = recipe.output_dir.display();
            self.notices.push(format!("{occupied} holds a run already: `run` wants --resume, or another --output-dir"));
            self.keep(check_results(&RealDisk, &recipe.output_dir));
        }
    }

    fn look_at_model(&mut self, recipe: &Recipe, directory: &Path) -> Option<ModelConfig> {
        if recipe.train.method == Method::Full && !has_weights(directory) {
            return self.keep(ModelConfig::load(directory).map_err(TrainError::from));
        }
        let config = self.keep(Model::check(directory).map_err(TrainError::of_base))?;
        Some(config)
    }

    /// Rows to train on and to evaluate. `reader`: the model and the tokenizer, where both could be read.
    fn look_at_rows(
        &mut self,
        recipe: &Recipe,
        model: Option<&Path>,
        reader: Option<(&ModelConfig, &Option<ChatTokenizer>)>,
        progress: &dyn Fn(u64),
    ) -> (Option<Dataset>, Option<Dataset>) {
        let (train_files, eval_files) = self.files(recipe);
        let Some((config, tokenizer)) = reader else {
            // Without them there are no tokens; that a line is no JSON can be said all the same.
            train_files.iter().chain(&eval_files).for_each(|file| self.look_at_lines(file));
            return (None, None);
        };
        let cache = rows_cache();
        let load = |files: &[PathBuf]| -> Result<Dataset, TrainError> {
            let tokenizer = tokenizer.as_ref();
            let read =
                Dataset::load_kept(cache.as_ref(), files, &recipe.data, tokenizer, config.vocabulary, 1, progress);
            Ok(read.map_err(|error| match model {
                Some(model) => error.in_model(model),
                None => error,
            })?)
        };
        let [train, eval] = [train_files, eval_files].map(|files| {
            if files.is_empty() {
                return None;
            }
            match load(&files) {
                Ok(data) => Some(data),
                Err(error) => {
                    // The first file that cannot be read must not hide what is wrong with the next.
                    let alone = || files.iter().filter_map(|file| load(std::slice::from_ref(file)).err());
                    let apart: Vec<TrainError> = if files.len() > 1 { alone().collect() } else { Vec::new() };
                    let errors = if apart.is_empty() { vec![error] } else { apart };
                    self.problems.extend(errors.into_iter().map(Problem::from));
                    None
                }
            }
        });
        let of = |data: &Option<Dataset>| data.as_ref().map(|data| data.notices.clone()).unwrap_or_default();
        self.notices.extend(rows_notices(of(&train), of(&eval)));
        self.notices.extend(unused_files(&recipe.data.train, &recipe.data.eval));
        (train, eval)
    }

    /// The files of the recipe's data that can be opened; the others are problems, each of its own.
    fn files(&mut self, recipe: &Recipe) -> (Vec<PathBuf>, Vec<PathBuf>) {
        let (train, eval) = (&recipe.data.train, &recipe.data.eval);
        if let Ok(files) = resolve_files(train, eval) {
            return files;
        }
        let (mut train_files, mut eval_files) = (Vec::new(), Vec::new());
        for path in train {
            if let Some((found, beside)) = self.keep(resolve_files(std::slice::from_ref(path), &[]).map_err(Into::into))
            {
                train_files.extend(found);
                eval_files.extend(beside.into_iter().filter(|_| eval.is_empty()));
            }
        }
        for path in eval {
            let found = self.keep(resolve_files(&[], std::slice::from_ref(path)).map_err(Into::into));
            eval_files.extend(found.into_iter().flat_map(|(_, files)| files));
        }
        (train_files, eval_files)
    }

    /// Lines that are no JSON, the first few.
    fn look_at_lines(&mut self, file: &Path) {
        const SHOWN: usize = 3;
        if !matches!(recognize(file), Holding::JsonLines | Holding::JsonObject) {
            return;
        }
        let Ok(opened) = std::fs::File::open(file) else { return };
        let lines = std::io::BufReader::new(opened).split(b'\n').map_while(Result::ok).zip(1..);
        let broken = lines.filter(|(line, _)| !line.trim_ascii().is_empty()).filter_map(|(line, number)| {
            let error = serde_json::from_slice::<serde::de::IgnoredAny>(&line).err()?;
            Some(format!("{}:{number}:{}: not JSON: {error}", file.display(), error.column()))
        });
        let broken: Vec<String> = broken.take(SHOWN).collect();
        if !broken.is_empty() {
            let hints = vec!["each line of a dataset is one JSON object".to_owned()];
            self.problems.push(Problem { message: broken.join("\n"), hints, fault: Fault::Input });
        }
    }

    /// Targets, device, memory, disk and time.
    fn look_at_size(&mut self, recipe: &Recipe, machine: &Machine, parts: &Parts) {
        let Parts { directory, config, tokenizer, train, eval } = parts;
        self.architecture = Some(config.family.architecture);
        self.notices.extend(tokenizer.iter().flat_map(|tokenizer| tokenizer.notices().iter().cloned()));
        let stored = stored_type(directory);
        let place = self.keep(Place::choose(&recipe.model, machine, stored));
        self.notices.extend(place.iter().flat_map(|place| place.notices.iter().cloned()));
        self.device = place.as_ref().map(Place::describe);
        let start = self.keep(Start::read(recipe, config, directory));
        let targets = start.as_ref().map(|start| start.as_ref().map(|start| &start.targets));
        self.notices.extend(start.iter().flatten().flat_map(|start| start.notices.iter().cloned()));
        let sizes = targets.map(|targets| memory::sizes(config, targets));
        self.parameters = Some(memory::sizes(config, None).parameters);
        self.trained_parameters = sizes.as_ref().map(|sizes| sizes.trained);
        self.eval = eval.as_ref().map(data_findings);
        let Some(train) = train else { return };
        self.train = Some(data_findings(train));
        self.keep(check_result(recipe, eval.is_some()));
        self.notices.extend(length_notice(train, config));
        if train.counts.unmasked == train.rows.len() && train.rows.iter().any(|row| !row.prompt_text.is_empty()) {
            self.notices.push("every token of every row is trained on, prompts included".to_owned());
        }
        let plan = Plan::new(train.rows.len(), recipe.train.global_batch_size, recipe.seed, recipe.data.shuffle);
        let steps = total_steps(recipe, &plan);
        (self.steps, self.steps_per_epoch) = (Some(steps), Some(plan.steps_per_epoch()));
        self.notices.extend(learning_notices(recipe, train, eval.as_ref(), &plan, steps, config));
        let (Some(place), Some(targets), Some(Sizes { parameters, trained })) = (place, targets, sizes) else { return };
        let text = match tokenizer {
            Some(tokenizer) => self.keep(tokenizer.files(&train.ends.tokens).map_err(TrainError::from)),
            None => None,
        };
        let text: u64 = text.map_or(0, |files| files.iter().map(|(_, bytes)| bytes.len() as u64).sum());
        let subject = Subject {
            recipe,
            config,
            targets,
            train,
            eval: eval.as_ref(),
            text,
            placement: &place.placement,
            stored,
            has_bf16: place.found.types.contains(&FloatType::BF16),
        };
        let estimate = subject.estimate();
        self.keep(memory::check(&estimate, place.memory(machine), || subject.cheaper_settings()));
        self.estimate = Some(Estimate { seconds: seconds(recipe, train, steps, parameters, &place), ..estimate });
        let disk = DiskNeed::of(recipe, trained, steps, eval.is_some(), text, machine.disk);
        self.keep(disk.check(recipe));
        self.disk = Some(disk);
    }
}

fn data_findings(data: &Dataset) -> DataFindings {
    let mut lengths: Vec<usize> = data.rows.iter().map(|row| row.tokens.len()).collect();
    lengths.sort_unstable();
    let at = |share: f64| lengths.get(((lengths.len() - 1) as f64 * share) as usize).copied().unwrap_or(0);
    DataFindings {
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

/// Seconds of the whole run at the rate of matrix products measured now; `None` on a GPU, whose kernels would have to be
/// compiled to know.
fn seconds(recipe: &Recipe, data: &Dataset, steps: u64, parameters: u64, place: &Place) -> Option<f64> {
    if !place.placement.is_cpu() {
        return None;
    }
    // Operations per token and parameter: 2 forward, 2 backward through activations, 2 more for weights if all are trained.
    let passes = if recipe.train.method == Method::Full { 6.0 } else { 4.0 };
    let rows_per_step = recipe.train.global_batch_size.min(data.rows.len()) as f64;
    let tokens_per_step = data.counts.tokens as f64 / data.rows.len() as f64 * rows_per_step;
    Some(steps as f64 * tokens_per_step * parameters as f64 * passes / matmul_rate())
}

#[cfg(test)]
mod tests {
    use finetune_store::replace_file;

    use super::*;

    fn golden() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models/qwen3")
    }

    fn recipe(folder: &Path, model: &Path, keys: &str) -> Recipe {
        let text = format!("output_dir = \"run\"\n[model]\npath = {model:?}\ndevice = \"cpu\"\n{keys}");
        Recipe::parse(&text, &folder.join("r.toml"), &[], None).unwrap_or_else(|error| panic!("{error}"))
    }

    fn messages(found: &Findings) -> Vec<String> {
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
        let found = findings(&recipe(folder.path(), &golden(), keys), &Machine::default(), &|_| {});
        let all = messages(&found).join("\n");
        for part in ["missing.jsonl", "torn.jsonl:2", "nowhere.jsonl", "c_attn"] {
            assert!(all.contains(part), "{part}:\n{all}");
        }
        assert_eq!(found.problems.len(), 4, "{all}");
        assert!(found.problems.iter().all(|problem| problem.fault == Fault::Input), "{all}");
        // Without one the files are looked at all the same.
        let found = findings(&recipe(folder.path(), Path::new("none/at-all"), keys), &Machine::default(), &|_| {});
        let all = messages(&found).join("\n");
        for part in ["none/at-all", "missing.jsonl", "torn.jsonl:2", "nowhere.jsonl"] {
            assert!(all.contains(part), "{part}:\n{all}");
        }
        assert!(found.train.is_none() && found.architecture.is_none());
    }

    #[test]
    fn memory_and_disk_beside_each_other() {
        let folder = tempfile::tempdir().expect("a directory");
        copy("rows.jsonl", &folder.path().join("good.jsonl"));
        let keys = "[data]\ntrain = \"good.jsonl\"\n";
        let machine = Machine { memory: Some(1 << 20), disk: Some(1 << 10), ..Machine::default() };
        let found = findings(&recipe(folder.path(), &golden(), keys), &machine, &|_| {});
        let all = messages(&found).join("\n");
        assert!(all.contains("of memory") && all.contains("on disk at"), "{all}");
        assert!(found.problems.iter().all(|problem| problem.fault == Fault::DiskOrMemory), "{all}");
        assert!(found.train.is_some() && found.estimate.is_some() && found.disk.is_some());
        let found = findings(&recipe(folder.path(), &golden(), keys), &Machine::default(), &|_| {});
        assert!(found.problems.is_empty(), "{:?}", messages(&found));
    }
}
