//! Puts a run together: model, data, plan, state. Everything that can be refused is refused here, before the
//! first step and before anything in the run directory changes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use finetune_dataset::{ChatTokenizer, Dataset, Plan, TextSource, resolve_files, unused_files};
use finetune_model::adapter::{Adapter, BaseCheck};
use finetune_model::merge::companion_files;
use finetune_model::{
    BaseName, FloatType, LoraTargets, Model, ModelConfig, Placement, base_digest, choose, float_type, linear_modules,
};
use finetune_recipe::{Length, Method, Recipe, ResultChoice};
use finetune_store::{Cache, Dtype, Holding, RealDisk, TensorSet, recognize};

use crate::copies::bring_newest;
use crate::date;
use crate::disk_need::DiskNeed;
use crate::error::TrainError;
use crate::identity::Identity;
use crate::journal::{Claim, Journal, publishes_best};
use crate::learning::learning_notices;
use crate::limits;
use crate::loss_scale::LossScale;
use crate::memory::{self, Estimate, Subject};
use crate::objective::Objective;
use crate::place::{Machine, Place};
use crate::ranks::Ranks;
use crate::run_directory::RESULTS;
use crate::schedule::Schedule;
use crate::state::{self, CHECKPOINTS, TrainState};

/// Where a run starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// The beginning.
    No,
    /// The newest checkpoint that verifies; the beginning where there is none.
    Newest,
    /// This checkpoint, or the newest of this run.
    From(PathBuf),
}

/// A run, ready to go on from `state`.
pub struct Run {
    pub recipe: Recipe,
    pub model: Model,
    pub train: Dataset,
    pub eval: Option<Dataset>,
    /// `None` only where every row is tokens already and the model directory has no tokenizer.
    pub tokenizer: Option<ChatTokenizer>,
    pub plan: Plan,
    /// Steps of the whole run.
    pub steps: u64,
    pub schedule: Schedule,
    pub(crate) objective: Objective,
    pub state: TrainState,
    pub ranks: Arc<Ranks>,
    /// Where it is computed, and in what.
    pub device: String,
    pub estimate: Estimate,
    /// The number type of the base model's file.
    pub(crate) stored: FloatType,
    /// Whether the device computes in bf16.
    pub(crate) has_bf16: bool,
    /// Rank 0's.
    pub(crate) journal: Option<Journal>,
    pub(crate) identity: Identity,
    /// What adapter_config.json calls the base model.
    pub(crate) base: BaseName,
    /// Weights and config.json of the base model, by which another one is known.
    pub(crate) base_digest: String,
    /// YYYY-MM-DD, what a chat template's "today" is.
    pub date: String,
    /// Rank 0's: the files by which another program writes and ends text as this run does, for results and checkpoints.
    pub(crate) text: Vec<(String, Vec<u8>)>,
}

impl Run {
    /// Bytes of the files of text in each checkpoint.
    pub(crate) fn text_bytes(&self) -> u64 {
        bytes_of(&self.text)
    }
}

fn bytes_of(files: &[(String, Vec<u8>)]) -> u64 {
    files.iter().map(|(_, bytes)| bytes.len() as u64).sum()
}

/// A run and what the user should know about how it came together.
pub struct Prepared {
    pub run: Run,
    pub notices: Vec<String>,
}

/// Training rows, evaluation rows, and the tokenizer that made them.
pub struct Data {
    pub train: Dataset,
    pub eval: Option<Dataset>,
    pub tokenizer: Option<ChatTokenizer>,
}

impl Data {
    /// What is odd about the rows and the tokenizer. What evaluation rows share with training rows is said once.
    pub fn notices(&self) -> Vec<String> {
        let mut notices: Vec<String> =
            self.tokenizer.iter().flat_map(|tokenizer| tokenizer.notices().iter().cloned()).collect();
        let eval = self.eval.as_ref().map(|eval| eval.notices.clone()).unwrap_or_default();
        notices.extend(rows_notices(self.train.notices.clone(), eval));
        notices
    }
}

/// What is odd about training rows, and about evaluation rows where that is something else.
pub(crate) fn rows_notices(train: Vec<String>, mut eval: Vec<String>) -> Vec<String> {
    eval.retain(|notice| !train.contains(notice));
    train.into_iter().chain(eval.into_iter().map(|notice| format!("evaluation rows: {notice}"))).collect()
}

/// The directory of the recipe's model: a path, a run whose weights were all trained, or a hub id that is in the Hugging
/// Face cache.
pub fn model_directory(recipe: &Recipe) -> Result<PathBuf, TrainError> {
    let path = Path::new(&recipe.model.path);
    let not_a_model = |what: String, hints: &[&str]| {
        let hints = hints.iter().map(|hint| (*hint).to_owned()).collect();
        Err(TrainError::NotAModel { path: recipe.model.path.clone(), what, hints })
    };
    if path.is_dir() {
        if path.join("config.json").is_file() {
            return Ok(path.to_owned());
        }
        let holding = recognize(path);
        return match holding {
            Holding::Run if path.join("model/config.json").is_file() => Ok(path.join("model")),
            Holding::Run | Holding::Checkpoint | Holding::Adapter => not_a_model(
                format!("is {}, and no model", holding.describe()),
                &[
                    "to train it further, name its base model here and the adapter in lora.init_from",
                    "or make a model of both first: finetune export --format merged",
                ],
            ),
            // Whoever reads it says what is missing.
            _ => Ok(path.to_owned()),
        };
    }
    let cached = recipe.model.hub_id().and_then(finetune_store::cached_snapshot);
    if let Some(snapshot) = cached {
        return Ok(snapshot);
    }
    match recognize(path) {
        Holding::Missing => Err(TrainError::NoModel { path: recipe.model.path.clone() }),
        holding => not_a_model(
            format!("is {}, and a model is a directory", holding.describe()),
            &["a model directory has config.json, tokenizer.json and model.safetensors, as on the Hugging Face hub"],
        ),
    }
}

/// What adapter_config.json calls the base model: as the recipe does, a hub id with the revision that was read.
fn base_name(recipe: &Recipe, directory: &Path) -> BaseName {
    match recipe.model.hub_id() {
        Some(id) if !Path::new(&recipe.model.path).is_dir() => {
            let revision = directory.file_name().map(|name| name.to_string_lossy().into_owned());
            BaseName { name: id.to_owned(), revision }
        }
        _ => {
            let absolute = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
            BaseName { name: absolute.to_string_lossy().into_owned(), revision: None }
        }
    }
}

/// Refuses what this build does not do yet, by name; returns what is accepted but means less than it says.
pub(crate) fn check_available(recipe: &Recipe) -> Result<Vec<String>, TrainError> {
    let unavailable = |key, value: String, instead| Err(TrainError::Unavailable { key, value, instead });
    if let Some(quantization) = recipe.model.quantization {
        return unavailable("model.quantization", quantization.as_str().into(), "yet; leave it out");
    }
    if recipe.lora.use_dora {
        return unavailable("lora.use_dora", "true".into(), "yet; plain LoRA and rsLoRA are");
    }
    if !recipe.lora.modules_to_save.is_empty() {
        return unavailable("lora.modules_to_save", format!("{:?}", recipe.lora.modules_to_save), "yet; leave it out");
    }
    limits::check(recipe)?;
    let mut notices = Vec::new();
    if recipe.data.packing {
        let what = "the rows of a micro-batch lie one after the other without padding, and never attend to each other";
        notices.push(format!("data.packing changes nothing here: {what}"));
    }
    Ok(notices)
}

/// Reads all rows of the recipe. `progress` is told rows read.
pub fn load_data(
    recipe: &Recipe,
    model: &Path,
    config: &ModelConfig,
    progress: &dyn Fn(u64),
) -> Result<Data, TrainError> {
    let (train_files, eval_files) = resolve_files(&recipe.data.train, &recipe.data.eval)?;
    let tokenizer = open_tokenizer(recipe, model)?;
    let cache = rows_cache();
    let load = |files: &[PathBuf], keep_text: usize| {
        let tokenizer = tokenizer.as_ref();
        Dataset::load_kept(cache.as_ref(), files, &recipe.data, tokenizer, config.vocabulary, keep_text, progress)
            .map_err(|error| error.in_model(model))
    };
    // One tells whether the rows have prompts; only evaluation rows are answered.
    let mut train = load(&train_files, 1)?;
    train.notices.extend(unused_files(&recipe.data.train, &recipe.data.eval));
    if train.rows.is_empty() {
        return Err(TrainError::NoRows { path: train_files.first().cloned().unwrap_or_default() });
    }
    let eval = if eval_files.is_empty() {
        None
    } else {
        Some(load(&eval_files, recipe.eval.samples.max(recipe.eval.exact_match))?)
    };
    Ok(Data { train, eval, tokenizer })
}

/// Where tokens of rows are kept from one command to the next.
pub(crate) fn rows_cache() -> Option<Cache> {
    Cache::of_user("rows")
}

/// The tokenizer of the recipe's model with the recipe's template and date.
pub(crate) fn open_tokenizer(recipe: &Recipe, model: &Path) -> Result<Option<ChatTokenizer>, TrainError> {
    let (chat_template, date) = (recipe.data.chat_template.as_deref(), recipe.data.date.as_deref());
    Ok(ChatTokenizer::open(&TextSource { model_dir: model, adapter: None, chat_template, date })?)
}

/// Refuses to promise the best evaluation's checkpoint where nothing is evaluated.
pub(crate) fn check_result(recipe: &Recipe, has_eval: bool) -> Result<(), TrainError> {
    match recipe.checkpoint.result {
        Some(ResultChoice::Best) if !has_eval => Err(TrainError::NoBest),
        _ => Ok(()),
    }
}

/// Whether a model directory has weights, or only a config.json to make fresh ones from.
pub(crate) fn has_weights(directory: &Path) -> bool {
    ["model.safetensors", "model.safetensors.index.json"].iter().any(|name| directory.join(name).is_file())
}

/// The number type that the matrices of a model directory are stored in; f32 where there are none yet.
pub fn stored_type(directory: &Path) -> FloatType {
    let dtype = TensorSet::open_model(directory).ok().and_then(|files| {
        let widest = files.names().filter_map(|name| files.get(name)).filter(|view| view.shape.len() == 2);
        widest.max_by_key(|view| view.size()).map(|view| view.dtype)
    });
    dtype.and_then(float_type).unwrap_or(FloatType::F32)
}

/// The LoRA branches of a recipe, and the values they start from where it names an adapter.
pub(crate) struct Start {
    pub(crate) targets: LoraTargets,
    values: Option<Vec<f32>>,
    /// What is odd about the adapter to start from.
    pub(crate) notices: Vec<String>,
}

impl Start {
    /// `None` where all weights are trained. `model`: the directory of the base model.
    pub(crate) fn read(recipe: &Recipe, config: &ModelConfig, model: &Path) -> Result<Option<Start>, TrainError> {
        if recipe.train.method == Method::Full {
            return Ok(None);
        }
        let targets = choose(&recipe.lora, &linear_modules(config))?;
        limits::check_targets(&targets)?;
        let Some(path) = &recipe.lora.init_from else {
            return Ok(Some(Start { targets, values: None, notices: Vec::new() }));
        };
        // A run stands for its result.
        let is_adapter = path.join("adapter_config.json").is_file();
        let inside = path.join(RESULTS[0]);
        let path = if !is_adapter && inside.is_dir() { &inside } else { path };
        let adapter = Adapter::read(path, config)?;
        adapter.expect_targets(&targets, path)?;
        let mut notices = adapter.notices.clone();
        match adapter.check_base(model)? {
            BaseCheck::Same | BaseCheck::Unknown => {}
            BaseCheck::OtherName(notice) => notices.push(notice),
            BaseCheck::Other(what) => return Err(TrainError::OtherBase { path: path.clone(), what }),
        }
        Ok(Some(Start { targets, values: Some(adapter.values), notices }))
    }
}

/// What to say about rows longer than the model was made for.
pub(crate) fn length_notice(train: &Dataset, config: &ModelConfig) -> Option<String> {
    let (longest, limit) = (train.counts.longest, config.max_position_embeddings);
    (longest > limit).then(|| format!("the longest row has {longest} tokens; the model was made for {limit} positions"))
}

/// The base model of a recipe with what is trained set up, and the digest of where its weights came from.
fn open_model(
    recipe: &Recipe,
    directory: &Path,
    start: Option<Start>,
    placement: &Placement,
) -> Result<(Model, String), TrainError> {
    if start.is_none() {
        // They go into every checkpoint: better refused now than at the first one.
        companion_files(directory, Dtype::F32, &[])?;
    }
    if start.is_none() && !has_weights(directory) {
        let config_hash = finetune_store::hex(&finetune_store::content_hash(&directory.join("config.json"))?);
        let mut model = Model::initialize(directory, recipe.seed, placement)?;
        model.train_all();
        return Ok((model, format!("fresh:{config_hash}")));
    }
    let mut model = Model::load(directory, placement).map_err(TrainError::of_base)?;
    let digest = base_digest(directory)?;
    let Some(Start { targets, values, .. }) = start else {
        model.train_all();
        return Ok((model, digest));
    };
    model.add_lora(targets, recipe.lora.dropout, recipe.seed);
    if let Some(values) = values {
        model.set_parameters(&values);
    }
    Ok((model, digest))
}

/// Opens everything, takes the lock of the run directory, and finds where to start. A run that will not fit into the memory
/// there is, by the estimate, is refused. All ranks call it, and all must have the same; only rank 0 uses the
/// run directory.
pub fn prepare(
    recipe: Recipe,
    resume: &Resume,
    ranks: &Arc<Ranks>,
    machine: &Machine,
    progress: &dyn Fn(u64),
) -> Result<Prepared, TrainError> {
    // The others must not wait for a rank that cannot start.
    put_together(recipe, resume, ranks, machine, progress).inspect_err(|error| ranks.abort(error))
}

fn put_together(
    mut recipe: Recipe,
    resume: &Resume,
    ranks: &Arc<Ranks>,
    machine: &Machine,
    progress: &dyn Fn(u64),
) -> Result<Prepared, TrainError> {
    let mut notices = check_available(&recipe)?;
    let model_path = model_directory(&recipe);
    // Before the long work, so that a second process is refused at once.
    let claim = match ranks.is_first() {
        true => Some(Claim::stake(&recipe, resume, machine.recipe_file.as_deref(), model_path.as_deref().ok())?),
        false => None,
    };
    let model_path = model_path?;
    let date = date::agree(&recipe, resume, ranks)?;
    recipe.data.date = Some(date.clone());
    let config = ModelConfig::load(&model_path)?;
    let stored = stored_type(&model_path);
    let place = Place::choose(&recipe.model, machine, stored)?;
    notices.extend(place.notices.iter().cloned());
    let data = load_data(&recipe, &model_path, &config, progress)?;
    check_result(&recipe, data.eval.is_some())?;
    notices.extend(data.notices());
    notices.extend(length_notice(&data.train, &config));
    let text = match (&data.tokenizer, ranks.is_first()) {
        (Some(tokenizer), true) => tokenizer.files(&data.train.ends.tokens)?,
        _ => Vec::new(),
    };
    let start = Start::read(&recipe, &config, &model_path)?;
    notices.extend(start.iter().flat_map(|start| start.notices.iter().cloned()));
    let targets = start.as_ref().map(|start| start.targets.clone());
    let has_bf16 = place.found.types.contains(&FloatType::BF16);
    let subject = Subject {
        recipe: &recipe,
        config: &config,
        targets: targets.as_ref(),
        train: &data.train,
        eval: data.eval.as_ref(),
        text: bytes_of(&text),
        placement: &place.placement,
        stored,
        has_bf16,
    };
    let estimate = subject.estimate();
    memory::check(&estimate, place.memory(machine), || subject.cheaper_settings())?;
    let opened = open_model(&recipe, &model_path, start, &place.placement);
    let (mut model, model_digest) =
        opened.map_err(|error| error.with_cheaper_settings(|| subject.cheaper_settings()))?;
    notices.extend(model.notices().iter().cloned());
    let plan = Plan::new(data.train.rows.len(), recipe.train.global_batch_size, recipe.seed, recipe.data.shuffle);
    let steps = total_steps(&recipe, &plan);
    notices.extend(learning_notices(&recipe, &data.train, data.eval.as_ref(), &plan, steps, &config));
    let identity = Identity {
        recipe: Identity::recipe_values(&recipe),
        train_data: data.train.digest.clone(),
        eval_data: data.eval.as_ref().map(|eval| eval.digest.clone()),
        model: model_digest.clone(),
        layout: model.layout().digest(),
        compute: Some(place.compute()),
    };
    ranks.expect_same(&identity.digests())?;
    let mut state = TrainState::new(model.parameters()?, LossScale::of(place.placement.compute()));
    ranks.expect_same(&[("set of starting weights", state.digest())])?;
    let mut journal = None;
    bring_newest(&recipe.output_dir, resume, ranks, &identity, &mut notices)?;
    if let Some(claim) = claim {
        let from = claim.find(resume, &mut notices)?;
        if let Some(path) = &from {
            let patience = recipe.eval.early_stopping_patience;
            state = TrainState::load(path, &model, &identity, patience, &mut notices)?;
            if state.step > steps {
                return Err(TrainError::PastTheEnd { path: path.clone(), step: state.step, last: steps });
            }
            notices.extend(best_is_missing(&recipe, &state)?);
        }
        if state.step < steps && !state.stopped_early {
            let trained = state.parameters.len() as u64;
            DiskNeed::of(&recipe, trained, steps, data.eval.is_some(), bytes_of(&text), machine.disk).check(&recipe)?;
        }
        journal = Some(claim.open(&recipe, state.step, from, &mut notices)?);
    }
    ranks.share_state(&mut state)?;
    model.set_parameters(&state.parameters);
    let run = Run {
        objective: Objective::CrossEntropy,
        schedule: Schedule::new(&recipe.schedule, recipe.optimizer.learning_rate, steps),
        base: base_name(&recipe, &model_path),
        base_digest: model_digest,
        date,
        text,
        train: data.train,
        eval: data.eval,
        tokenizer: data.tokenizer,
        ranks: Arc::clone(ranks),
        recipe,
        model,
        plan,
        steps,
        state,
        device: place.describe(),
        estimate,
        has_bf16,
        stored,
        journal,
        identity,
    };
    Ok(Prepared { run, notices })
}

/// What to say where the best checkpoint, which is to be the result, is not there any more. An error where it was asked for.
fn best_is_missing(recipe: &Recipe, state: &TrainState) -> Result<Option<String>, TrainError> {
    let Some(best) = state.best.filter(|best| publishes_best(recipe) && best.step != state.step) else {
        return Ok(None);
    };
    let path = recipe.output_dir.join(CHECKPOINTS).join(state::name(best.step));
    let checked = crate::resume::check(&RealDisk, &path, Some(best.step));
    match checked {
        Ok(_) => Ok(None),
        Err(why) if recipe.checkpoint.result.is_none() => Ok(Some(format!(
            "the checkpoint of the best evaluation, step {}, cannot become the result unless a better one comes: {why}",
            best.step
        ))),
        Err(why) => Err(TrainError::BestCheckpoint { path, what: why.to_string() }),
    }
}

/// Steps of the whole run.
pub(crate) fn total_steps(recipe: &Recipe, plan: &Plan) -> u64 {
    match recipe.train.length {
        Length::Epochs(epochs) => epochs.saturating_mul(plan.steps_per_epoch()),
        Length::Steps(steps) => steps,
    }
}
