//! Puts a run together: model, data, plan, state. Everything that can be refused is refused here, before the
//! first step and before anything in the run directory changes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use finetune_dataset::{ChatTokenizer, Dataset, Plan, resolve_files};
use finetune_model::adapter::{Adapter, linear_modules};
use finetune_model::merge::companion_files;
use finetune_model::{
    BaseName, FloatType, LoraTargets, Model, ModelConfig, Placement, base_digest, choose, float_type,
};
use finetune_recipe::{Length, Method, Recipe};
use finetune_store::{Dtype, TensorSet};

use crate::error::TrainError;
use crate::identity::Identity;
use crate::journal::{Claim, Journal};
use crate::loss_scale::LossScale;
use crate::memory::{self, Estimate};
use crate::place::{Machine, Place};
use crate::ranks::Ranks;
use crate::schedule::Schedule;
use crate::state::TrainState;

/// Where a run starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// The beginning.
    No,
    /// The newest checkpoint that verifies; the beginning where there is none.
    Newest,
    /// This checkpoint.
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

/// The directory of the recipe's model: a path, or a hub id that is in the Hugging Face cache.
pub fn model_directory(recipe: &Recipe) -> Result<PathBuf, TrainError> {
    let path = Path::new(&recipe.model.path);
    if path.is_dir() {
        return Ok(path.to_owned());
    }
    let cached = recipe.model.hub_id().and_then(finetune_store::cached_snapshot);
    cached.ok_or_else(|| TrainError::NoModel { path: recipe.model.path.clone() })
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
    let tokenizer = ChatTokenizer::load_if_present(model, recipe.data.chat_template.as_deref())?;
    let load = |files: &[PathBuf]| Dataset::load(files, &recipe.data, tokenizer.as_ref(), config.vocabulary, progress);
    let train = load(&train_files)?;
    if train.rows.is_empty() {
        return Err(TrainError::NoRows { path: train_files.first().cloned().unwrap_or_default() });
    }
    let eval = if eval_files.is_empty() { None } else { Some(load(&eval_files)?) };
    Ok(Data { train, eval, tokenizer })
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
    /// What to say of the adapter that it starts from.
    pub(crate) notices: Vec<String>,
}

impl Start {
    /// `None` where all weights are trained.
    pub(crate) fn read(recipe: &Recipe, config: &ModelConfig) -> Result<Option<Start>, TrainError> {
        if recipe.train.method == Method::Full {
            return Ok(None);
        }
        let targets = choose(&recipe.lora, &linear_modules(config))?;
        let Some(path) = &recipe.lora.init_from else {
            return Ok(Some(Start { targets, values: None, notices: vec![] }));
        };
        let adapter = Adapter::read(path, config)?;
        adapter.expect_targets(&targets, path)?;
        Ok(Some(Start { targets, values: Some(adapter.values), notices: adapter.notices }))
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
    let mut model = Model::load(directory, placement)?;
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
    recipe: Recipe,
    resume: &Resume,
    ranks: &Arc<Ranks>,
    machine: &Machine,
    progress: &dyn Fn(u64),
) -> Result<Prepared, TrainError> {
    let mut notices = check_available(&recipe)?;
    // Before the long work, so that a second process is refused at once.
    let claim = if ranks.is_first() { Some(Claim::stake(&recipe.output_dir, resume)?) } else { None };
    let model_path = model_directory(&recipe)?;
    let config = ModelConfig::load(&model_path)?;
    let stored = stored_type(&model_path);
    let place = Place::choose(&recipe.model, machine, stored)?;
    notices.extend(place.notices.iter().cloned());
    let mut data = load_data(&recipe, &model_path, &config, progress)?;
    for row in &mut data.train.rows {
        // Only rows that are answered need them.
        (row.prompt_text, row.answer_text) = (String::new(), String::new());
    }
    notices.extend(length_notice(&data.train, &config));
    let start = Start::read(&recipe, &config)?;
    notices.extend(start.iter().flat_map(|start| start.notices.iter().cloned()));
    let estimate = memory::of_recipe(&recipe, &config, start.as_ref(), &data.train, &place.placement, stored);
    let targets = start.as_ref().map(|start| start.targets.clone());
    let has_bf16 = place.found.types.contains(&FloatType::BF16);
    let knobs = || memory::knobs(&recipe, &config, targets.as_ref(), &data.train, &place.placement, stored, has_bf16);
    memory::check(&estimate, place.memory(machine), knobs)?;
    let opened = open_model(&recipe, &model_path, start, &place.placement).map_err(|error| error.with_knobs(knobs));
    let (mut model, model_digest) = opened?;
    notices.extend(model.notices().iter().cloned());
    let plan = Plan::new(data.train.rows.len(), recipe.train.global_batch_size, recipe.seed, recipe.data.shuffle);
    let steps = total_steps(&recipe, &plan);
    let identity = Identity {
        recipe: Identity::recipe_values(&recipe),
        train_data: data.train.digest.clone(),
        eval_data: data.eval.as_ref().map(|eval| eval.digest.clone()),
        model: model_digest,
        layout: model.layout().digest(),
        compute: Some(place.compute()),
    };
    ranks.expect_same(&identity.digests())?;
    let mut state = TrainState::new(model.parameters()?, LossScale::of(place.placement.compute()));
    ranks.expect_same(&[("set of starting weights", state.digest())])?;
    let mut journal = None;
    if let Some(claim) = claim {
        let from = claim.find(resume, &mut notices)?;
        if let Some(path) = &from {
            state = TrainState::load(path, &model, &identity)?;
            if state.step > steps {
                return Err(TrainError::PastTheEnd { path: path.clone(), step: state.step, last: steps });
            }
        }
        journal = Some(claim.open(&recipe, state.step, from, &mut notices)?);
    }
    ranks.share_state(&mut state)?;
    model.set_parameters(&state.parameters);
    let run = Run {
        schedule: Schedule::new(&recipe.schedule, recipe.optimizer.learning_rate, steps),
        base: BaseName {
            name: std::path::absolute(&model_path).unwrap_or(model_path).to_string_lossy().into_owned(),
            revision: None,
        },
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

/// Steps of the whole run.
pub(crate) fn total_steps(recipe: &Recipe, plan: &Plan) -> u64 {
    match recipe.train.length {
        Length::Epochs(epochs) => epochs.saturating_mul(plan.steps_per_epoch()),
        Length::Steps(steps) => steps,
    }
}
