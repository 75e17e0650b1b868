//! What a run is made of, examined before it begins: model, device, rows, targets, memory.
//! `validate` and `run` both use this one function, and each adds its own part.

mod base;

use std::path::{Path, PathBuf};

use finetune_dataset::{ChatTokenizer, Dataset, DatasetError, Plan, resolve_files};
use finetune_model::{Adaptation, BaseForm, FloatType, ModelConfig};
use finetune_recipe::{Length, PlacementChoice, Recipe, ResultChoice, StagesChoice};
use finetune_store::{Holding, recognize};

use crate::assumed;
use crate::device_plan::{DevicePlan, ThisHost};
use crate::error::TrainError;
use crate::initial_adapter::InitialAdapter;
use crate::learning::learning_notices;
use crate::limits;
use crate::memory::{self, Estimate, Sizing, Subject};
use crate::ranks::Ranks;
use crate::residency;
use crate::rows::{RowReader, rows_notices};
use crate::stages;
use crate::whole_lines::{TooLong, WholeLines};

/// How far an examination goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// To the first problem. All that is found is used right after, so weights are read when the
    /// model is loaded.
    Run,
    /// To the end. One problem does not hide another, and all weights are read.
    Validate,
    /// As for a run, where only sizes are asked for: weights and tokenizer need not be here.
    Plan,
}

/// What was found. A part is `None` if a problem prevented it.
#[derive(Default)]
pub(crate) struct Examined {
    /// The directory of the base model.
    pub(crate) directory: Option<PathBuf>,
    pub(crate) config: Option<ModelConfig>,
    pub(crate) device_plan: Option<DevicePlan>,
    /// How the base's matrices are packed.
    pub(crate) form: Option<BaseForm>,
    /// `Some(None)`: the model has no tokenizer. That is no problem as long as rows are tokens.
    pub(crate) tokenizer: Option<Option<ChatTokenizer>>,
    pub(crate) train: Option<Dataset>,
    pub(crate) eval: Option<Dataset>,
    /// What stands for `train` where the rows cannot be read, because neither weights nor tokenizer are here.
    pub(crate) assumed_rows: Option<Dataset>,
    /// `Some(None)`: all weights are trained.
    pub(crate) start: Option<Option<InitialAdapter>>,
    pub(crate) plan: Option<Plan>,
    /// Steps of the whole run.
    pub(crate) steps: Option<u64>,
    /// The tokenizer's files that go into every checkpoint.
    pub(crate) text: Vec<(String, Vec<u8>)>,
    pub(crate) sizing: Option<Sizing>,
    pub(crate) estimate: Option<Estimate>,
    /// What a user should know, in the order in which it was found.
    pub(crate) notices: Vec<String>,
    /// What is not here, and what was assumed in its place.
    pub(crate) assumptions: Vec<String>,
    /// What `run` refuses, in the order in which it was found.
    pub(crate) problems: Vec<TrainError>,
}

/// Everything that a run is put together from.
pub(crate) struct Ready {
    pub(crate) directory: PathBuf,
    pub(crate) device_plan: DevicePlan,
    pub(crate) tokenizer: Option<ChatTokenizer>,
    pub(crate) train: Dataset,
    pub(crate) eval: Option<Dataset>,
    pub(crate) start: Option<InitialAdapter>,
    pub(crate) plan: Plan,
    pub(crate) steps: u64,
    pub(crate) text: Vec<(String, Vec<u8>)>,
    pub(crate) sizing: Sizing,
    pub(crate) estimate: Estimate,
    pub(crate) notices: Vec<String>,
}

impl Examined {
    /// All parts, or the first problem.
    pub(crate) fn ready(mut self) -> Result<Ready, TrainError> {
        if !self.problems.is_empty() {
            return Err(self.problems.remove(0));
        }
        let whole = "a part is missing only with a problem";
        Ok(Ready {
            directory: self.directory.expect(whole),
            device_plan: self.device_plan.expect(whole),
            tokenizer: self.tokenizer.expect(whole),
            train: self.train.or(self.assumed_rows).expect(whole),
            eval: self.eval,
            start: self.start.expect(whole),
            plan: self.plan.expect(whole),
            steps: self.steps.expect(whole),
            text: self.text,
            sizing: self.sizing.expect(whole),
            estimate: self.estimate.expect(whole),
            notices: self.notices,
        })
    }

    /// The value of a result. A problem is noted once, and `None` returned.
    pub(crate) fn keep<T>(&mut self, result: Result<T, TrainError>) -> Option<T> {
        kept(&mut self.problems, result)
    }
}

/// The value, or `None` after its problem has been added to the others.
fn kept<T>(problems: &mut Vec<TrainError>, result: Result<T, TrainError>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(problem) => {
            let message = problem.to_string();
            if problems.iter().all(|known| known.to_string() != message) {
                problems.push(problem);
            }
            None
        }
    }
}

/// Examines everything that a run needs and can be refused for, except the run directory. `found`:
/// what was found before. `model`: the directory of the recipe's model. `ranks`: all ranks, of
/// which the first writes checkpoints, and so needs the tokenizer's files; `None`: there is only this process.
/// `progress` is called with the number of rows read.
pub(crate) fn examine(
    found: Examined,
    recipe: &Recipe,
    model: Result<PathBuf, TrainError>,
    host: &ThisHost,
    extent: Extent,
    ranks: Option<&Ranks>,
    progress: &dyn Fn(u64),
) -> Examined {
    let mut examiner = Examiner {
        recipe,
        host,
        extent,
        ranks,
        progress,
        has_no_weights: false,
        stored: FloatType::F32,
        has_new_rows: false,
        found,
    };
    let stages: [fn(&mut Examiner<'_>); 6] = [
        |examiner| examiner.look_at_settings(),
        |examiner| examiner.look_at_model(),
        |examiner| examiner.look_at_rows(),
        |examiner| examiner.look_at_start(),
        |examiner| examiner.look_at_plan(),
        |examiner| examiner.look_at_memory(),
    ];
    examiner.found.directory = examiner.found.keep(model);
    for stage in stages {
        if extent != Extent::Validate && !examiner.found.problems.is_empty() {
            break;
        }
        stage(&mut examiner);
    }
    examiner.found
}

/// What an examination is given, and what it has found so far.
struct Examiner<'a> {
    recipe: &'a Recipe,
    host: &'a ThisHost,
    extent: Extent,
    ranks: Option<&'a Ranks>,
    progress: &'a dyn Fn(u64),
    /// Whether the base has a config and no weights, and is none to make fresh ones for.
    has_no_weights: bool,
    /// The number type of the base model's file, once there is a config.
    stored: FloatType,
    /// Whether embedding and output layer get rows for new tokens.
    has_new_rows: bool,
    found: Examined,
}

impl Examiner<'_> {
    /// Refuses values that no run can have, and notes what means less than it says.
    fn look_at_settings(&mut self) {
        if let Some(notices) = self.found.keep(check_available(self.recipe)) {
            self.found.notices.extend(notices);
        }
        // `plan` looks at several numbers of stages.
        if self.extent != Extent::Plan {
            self.found.notices.extend(placement_notice(self.recipe));
        }
    }

    /// The rows, tokenized.
    fn look_at_rows(&mut self) {
        let (train_files, eval_files) = self.files();
        let found = &mut self.found;
        let (Some(directory), Some(config), Some(tokenizer)) = (&found.directory, &found.config, &found.tokenizer)
        else {
            // Without model and tokenizer there are no tokens. Lines that are no JSON can be found
            // all the same.
            train_files.iter().chain(&eval_files).for_each(|file| self.look_at_lines(file));
            return;
        };
        let reader = RowReader::new(self.recipe, directory, config, tokenizer.as_ref(), self.progress);
        let read = |files: &[PathBuf], read: &dyn Fn(&[PathBuf]) -> Result<Dataset, TrainError>| {
            if files.is_empty() {
                return Ok(None);
            }
            read(files).map(Some).map_err(|error| {
                // The first file that cannot be read must not hide what is wrong with the next.
                let alone = || files.iter().filter_map(|file| read(std::slice::from_ref(file)).err()).filter(of_file);
                let apart: Vec<TrainError> =
                    if files.len() > 1 && self.extent == Extent::Validate { alone().collect() } else { Vec::new() };
                if apart.is_empty() { vec![error] } else { apart }
            })
        };
        let mut train = read(&train_files, &|files| reader.train(files));
        let eval_files = reader.files_to_evaluate(&train_files, eval_files);
        let eval = if train.is_ok() || self.extent == Extent::Validate {
            read(&eval_files, &|files| reader.eval(files))
        } else {
            Ok(None)
        };
        if self.has_no_weights && train.as_ref().is_err_and(|problems| problems.iter().any(lacks_tokenizer)) {
            found.assumed_rows = found.keep(assumed::longest_rows(self.recipe, &train_files)).flatten();
        }
        if found.assumed_rows.is_some() {
            found.assumptions.push(assumed::no_tokenizer(self.recipe));
            train = if self.extent == Extent::Plan { Ok(None) } else { train };
        }
        for (rows, kept) in [(train, &mut found.train), (eval, &mut found.eval)] {
            match rows {
                Ok(rows) => *kept = rows,
                Err(problems) => found.problems.extend(problems),
            }
        }
        let of = |data: &Option<Dataset>| data.as_ref().map(|data| data.notices.clone()).unwrap_or_default();
        let notices = rows_notices(of(&found.train), of(&found.eval));
        found.notices.extend(notices);
    }

    /// The files of the recipe's data that can be opened. Each of the others is a problem of its
    /// own.
    fn files(&mut self) -> (Vec<PathBuf>, Vec<PathBuf>) {
        let (train, eval) = (&self.recipe.data.train, &self.recipe.data.eval);
        if let Ok(files) = resolve_files(train, eval) {
            return files;
        }
        let found = &mut self.found;
        let (mut train_files, mut eval_files) = (Vec::new(), Vec::new());
        for path in train {
            let files = found.keep(resolve_files(std::slice::from_ref(path), &[]).map_err(Into::into));
            if let Some((files, beside)) = files {
                train_files.extend(files);
                eval_files.extend(beside.into_iter().filter(|_| eval.is_empty()));
            }
        }
        for path in eval {
            let files = found.keep(resolve_files(&[], std::slice::from_ref(path)).map_err(Into::into));
            eval_files.extend(files.into_iter().flat_map(|(_, files)| files));
        }
        (train_files, eval_files)
    }

    /// The first few lines that are no JSON.
    fn look_at_lines(&mut self, file: &Path) {
        const SHOWN: usize = 3;
        if !matches!(recognize(file), Holding::JsonLines | Holding::JsonObject) {
            return;
        }
        let broken = WholeLines::open(file).into_iter().flatten().filter_map(|line| match line {
            Ok((number, line)) => {
                let error = serde_json::from_slice::<serde::de::IgnoredAny>(&line).err()?;
                Some(format!("{}:{number}:{}: not JSON: {error}", file.display(), error.column()))
            }
            Err(TooLong(line)) => Some(line),
        });
        let broken: Vec<String> = broken.take(SHOWN).collect();
        if !broken.is_empty() {
            self.found.problems.push(TrainError::NotJson { lines: broken });
        }
    }

    /// What the adapter trains, and the adapter that it starts from.
    fn look_at_start(&mut self) {
        let found = &mut self.found;
        let (Some(directory), Some(config)) = (&found.directory, &found.config) else { return };
        let start = InitialAdapter::read(self.recipe, config, directory);
        found.start = found.keep(start);
        let notices = found.start.iter().flatten().flat_map(|start| start.notices.iter().cloned());
        found.notices.extend(notices);
        if let (Some(start), Some(Some(tokenizer))) = (&found.start, &found.tokenizer) {
            let adaptation = start.as_ref().map(|start| &start.adaptation);
            found.notices.extend(new_tokens_notice(tokenizer.new_tokens(), adaptation));
        }
    }

    /// Steps, and what is odd about rows and settings together.
    fn look_at_plan(&mut self) {
        let (recipe, found) = (self.recipe, &mut self.found);
        let train = found.train.as_ref().or(found.assumed_rows.as_ref());
        let (Some(config), Some(train)) = (&found.config, train) else { return };
        let eval = found.eval.as_ref();
        let mut notices: Vec<String> = length_notice(train, config).into_iter().collect();
        if train.counts.unmasked == train.rows.len() && train.rows.iter().any(|row| !row.prompt_text.is_empty()) {
            notices.push("every token of every row is trained on, prompts included".to_owned());
        }
        let plan = train.plan(recipe.train.global_batch_size, recipe.seed, recipe.data.shuffle);
        let steps = total_steps(recipe, &plan);
        if found.train.is_some() {
            notices.extend(learning_notices(recipe, train, eval, &plan, steps, config));
        }
        let result = check_result(recipe, eval.is_some());
        (found.plan, found.steps) = (Some(plan), Some(steps));
        found.notices.extend(notices);
        found.keep(result);
    }

    /// The estimate of memory, and whether it fits.
    fn look_at_memory(&mut self) {
        let packed = self.packed_sizes();
        let (recipe, found) = (self.recipe, &mut self.found);
        let (Some(config), Some(device_plan)) = (&found.config, &found.device_plan) else {
            return;
        };
        let train = found.train.as_ref().or(found.assumed_rows.as_ref());
        let (Some(train), Some(start), Some(tokenizer)) = (train, &found.start, &found.tokenizer) else {
            return;
        };
        let text = match tokenizer {
            Some(tokenizer) if self.ranks.is_none_or(Ranks::is_first) => {
                tokenizer.files(&train.ends.tokens).map_err(TrainError::from)
            }
            _ => Ok(Vec::new()),
        };
        let frozen = start.as_ref().filter(|_| self.has_new_rows);
        let frozen = frozen.map_or(0, |start| start.adaptation.frozen_vocabulary_bytes(config));
        // What is trained, changed or read by all layers has to be everywhere.
        let ends_where_used = config.per_layer.is_none()
            && !self.has_new_rows
            && start.as_ref().is_some_and(|start| start.adapter.is_none() && !start.adaptation.trains_vocabulary());
        let keeps_embedding = !self.has_new_rows && start.as_ref().is_some_and(InitialAdapter::keeps_embedding);
        let sizing = |text: &[(String, Vec<u8>)]| Sizing {
            config: config.clone(),
            adaptation: start.as_ref().map(|start| start.adaptation.clone()),
            longest: usize::MAX,
            text_bytes: frozen + text.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>(),
            placement: device_plan.placement.clone().with_ends_where_used(ends_where_used),
            stored: self.stored,
            packed,
            loading: found.form.as_ref().map_or(0, |form| form.loading),
            by_row: found.form.as_ref().map_or(0, |form| form.by_row),
            embedding_by_row: keeps_embedding && found.form.as_ref().is_some_and(|form| form.embedding_by_row),
            layers: found.form.as_ref().map_or(Vec::new(), |form| form.layers.clone()),
            ends: found.form.as_ref().map_or_else(Default::default, |form| form.ends),
            at_once: 1,
            // As on one process.
            shares: recipe.distributed.virtual_ranks.unwrap_or(1),
            has_bf16: device_plan.found.types.contains(&FloatType::BF16),
        };
        let sizing = sizing(text.as_deref().unwrap_or_default());
        let available = device_plan.memory(self.host);
        let subject = Subject { recipe, train, eval: found.eval.as_ref(), sizing: &sizing };
        let disk = || stages::disk_rate(found.directory.as_deref()?);
        let chosen = stages::choose(&subject, available, &disk, self.host.cables.as_ref(), self.ranks);
        let Some(chosen) = kept(&mut found.problems, chosen) else { return };
        let replicas = self.ranks.map_or(1, Ranks::replicas);
        let of_stage = chosen.as_ref().map(|chosen| stages::notice(chosen, replicas));
        let stage = chosen.map(|chosen| chosen.stage);
        let shares = self.ranks.map_or(sizing.shares, |ranks| ranks.even().count_of(ranks.group().rank()));
        let sizing = Sizing { placement: sizing.placement.clone().with_stage(stage), shares, ..sizing.clone() };
        let subject = Subject { sizing: &sizing, ..subject };
        let (sizing, notices) = residency::choose(&subject, available);
        let subject = Subject { sizing: &sizing, ..subject };
        let estimate = subject.estimate();
        let cheaper = || available.map_or_else(Vec::new, |available| subject.settings_that_fit(available));
        let fits = memory::check(&estimate, available, cheaper);
        if let Some(device_plan) = &mut found.device_plan {
            device_plan.placement = sizing.placement.clone();
        }
        found.notices.extend(of_stage.into_iter().chain(notices));
        found.text = found.keep(text).unwrap_or_default();
        found.keep(fits);
        (found.sizing, found.estimate) = (Some(sizing), Some(estimate));
    }
}

/// Whether an error of a file alone is one of all files together: a file may have no row to hold
/// back where others have.
fn of_file(error: &TrainError) -> bool {
    !matches!(error, TrainError::Dataset(DatasetError::EmptyShare { .. }))
}

/// Whether rows could not be read for want of a tokenizer alone.
fn lacks_tokenizer(error: &TrainError) -> bool {
    matches!(error, TrainError::Dataset(DatasetError::NoTokenizer | DatasetError::NoTokenizerFile { .. }))
}

/// Steps of the whole run.
pub(crate) fn total_steps(recipe: &Recipe, plan: &Plan) -> u64 {
    match recipe.train.length {
        Length::Epochs(epochs) => epochs.saturating_mul(plan.steps_per_epoch()),
        Length::Steps(steps) => steps,
    }
}

/// Refuses values that no run can have. Returns notices of what is accepted but means less than it
/// says.
fn check_available(recipe: &Recipe) -> Result<Vec<String>, TrainError> {
    limits::check(recipe)?;
    let mut notices = Vec::new();
    if recipe.data.packing {
        let what = "the rows of a micro-batch lie one after the other without padding, and never attend to each other";
        notices.push(format!("data.packing changes nothing here: {what}"));
    }
    Ok(notices)
}

/// A notice of a placement of layers that are not spread.
fn placement_notice(recipe: &Recipe) -> Option<String> {
    let (stages, placement) = (recipe.parallel.stages, recipe.parallel.placement);
    let is_idle = stages == StagesChoice::Count(1) && placement != PlacementChoice::Auto;
    is_idle.then(|| {
        let placement = placement.as_str();
        format!(
            "parallel.placement = \"{placement}\" changes nothing here: it says how layers lie over several ranks, and \
             parallel.stages is 1"
        )
    })
}

/// Refuses the best evaluation's checkpoint as the result if nothing is evaluated.
fn check_result(recipe: &Recipe, has_eval: bool) -> Result<(), TrainError> {
    match recipe.checkpoint.result {
        Some(ResultChoice::Best) if !has_eval => Err(TrainError::NoBest),
        _ => Ok(()),
    }
}

/// A notice of new tokens whose rows in embedding and output layer stay as they are.
fn new_tokens_notice(new_tokens: &[(String, u32)], adaptation: Option<&Adaptation>) -> Option<String> {
    let (first, _) = new_tokens.first()?;
    let trained = adaptation?.trains_vocabulary();
    (!trained).then(|| {
        format!(
            "data.add_tokens: neither embed_tokens nor lm_head is trained, so {first:?} and any other new token keep one and the \
             same row: name them in lora.modules_to_save or lora.target_modules"
        )
    })
}

/// A notice of rows longer than the model was made for.
fn length_notice(train: &Dataset, config: &ModelConfig) -> Option<String> {
    let (longest, limit) = (train.counts.longest, config.max_position_embeddings);
    (longest > limit).then(|| format!("the longest row has {longest} tokens; the model was made for {limit} positions"))
}
