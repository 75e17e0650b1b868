//! What a recipe or a command names by its name on the hub becomes files here, before anything
//! reads them: models, adapters, and rows (`hf://OWNER/NAME/SPLIT`).
//!
//! Of several ranks of one host only the first fetches. Rank 0 says which commit is meant. Where ranks hold the
//! layers of a model together, each fetches the files of its layers, once it is known which these are.

use std::fmt;
use std::path::{Path, PathBuf};

use finetune_advice::Advice;
use finetune_hub::{DatasetName, Fault, Hub, HubError, Need};
use finetune_model::{Model, ModelError};
use finetune_recipe::{Method, Recipe, StagesChoice};
use finetune_rendezvous::Membership;
use finetune_store::{HubId, StoreError};
use finetune_trainer::{Fault as FaultOfRun, NotFetched, Ranks, model_directory};

use crate::exit::Exit;
use crate::failure::{Failure, Fatal};
use crate::stderr::complain;
use crate::transfer::Transfer;

impl Fatal for HubError {
    fn exit(&self) -> Exit {
        match self.fault() {
            Fault::Input => Exit::Input,
            Fault::Network => Exit::PeerLost,
            Fault::Disk => Exit::DiskOrMemory,
        }
    }
}

/// A path with nothing at it, which the hub does not give either.
#[derive(Debug)]
pub(crate) struct Nowhere {
    path: String,
    error: HubError,
    /// What the caller knows to do about it.
    hint: Option<&'static str>,
}

impl fmt::Display for Nowhere {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Nowhere { path, error, .. } = self;
        match error {
            HubError::Missing { .. } | HubError::Offline { .. } | HubError::Unreachable { .. } => {
                write!(formatter, "there is no directory {path}, and {error}")
            }
            error => error.fmt(formatter),
        }
    }
}

impl std::error::Error for Nowhere {}

impl Nowhere {
    /// The folder that the path would lie in, if it is here.
    fn parent(&self) -> Option<&Path> {
        Path::new(&self.path).parent().filter(|parent| parent.is_dir())
    }
}

impl Advice for Nowhere {
    fn hints(&self) -> Vec<String> {
        let wrong =
            self.parent().map(|parent| format!("if a directory is meant: {} has none of that name", parent.display()));
        let hint = self.hint.map(str::to_owned);
        wrong.into_iter().chain(self.error.hints()).chain(hint).collect()
    }
}

impl Fatal for Nowhere {
    fn exit(&self) -> Exit {
        match self.error {
            // More likely a path with a mistake in it, which no other try mends.
            HubError::Unreachable { .. } if self.parent().is_some() => Exit::Input,
            _ => self.error.exit(),
        }
    }
}

/// The hub of the environment. Unit tests ask nobody.
fn hub() -> Result<Hub, HubError> {
    let hub = Hub::from_environment()?;
    Ok(if cfg!(test) { hub.offline() } else { hub })
}

/// The directory of a model or adapter of the hub, from the cache if it has all that is needed.
/// `hint`: what else to do if it cannot be had.
pub(crate) fn directory(id: &HubId, hint: Option<&'static str>) -> Result<PathBuf, Failure> {
    let shown = Transfer::default();
    let snapshot = hub()
        .and_then(|hub| hub.resolve(id, &Need::Model, None, &|news| shown.hear(news)))
        .map_err(|error| Nowhere { path: text(id), error, hint })?;
    Ok(snapshot.directory)
}

fn text(id: &HubId) -> String {
    let revision = id.revision.as_ref().map_or(String::new(), |revision| format!("@{revision}"));
    format!("{}{revision}", id.name)
}

/// The files that an option or a key names: itself, or those of rows on the hub.
pub(crate) fn rows(path: &Path) -> Result<Vec<PathBuf>, Failure> {
    if !is_rows(path) {
        return Ok(vec![path.to_owned()]);
    }
    let text = path.to_string_lossy();
    let shown = Transfer::default();
    let name = DatasetName::parse(&text)?;
    Ok(hub()?.dataset_files(&name, &|news| shown.hear(news))?.paths)
}

/// The model of a recipe, if it is one of the hub with its owner's name.
fn model(recipe: &Recipe) -> Option<HubId> {
    let id = recipe.model.hub_id().and_then(HubId::parse)?;
    // A GGUF file is a model too.
    (id.name.contains('/') && !Path::new(&recipe.model.path).exists()).then_some(id)
}

/// Whether a recipe names a model that may have to be fetched.
pub(crate) fn names_model(recipe: &Recipe) -> bool {
    model(recipe).is_some()
}

/// Whether a path means rows of the hub.
pub(crate) fn is_rows(path: &Path) -> bool {
    DatasetName::is_meant(&path.to_string_lossy())
}

fn names_any(recipe: &Recipe) -> bool {
    let mut rows = recipe.data.train.iter().chain(&recipe.data.eval);
    model(recipe).is_some() || rows.any(|path| is_rows(path))
}

/// Makes everything that a recipe names on the hub local. `model.path` becomes
/// `OWNER/NAME@COMMIT`, so that the recipe means the same bytes later.
pub(crate) fn localize(recipe: &mut Recipe, need: &Need) -> Result<(), Failure> {
    localize_at(recipe, need, None)
}

/// The same with the headers of the weights alone, if nothing else is asked of them.
pub(crate) fn localize_headers(recipe: &mut Recipe) -> Result<(), Failure> {
    if recipe.lora.init_from.is_some() {
        return localize(recipe, &Need::Model);
    }
    localize(recipe, &Need::Headers)?;
    if headers_suffice(recipe) { Ok(()) } else { localize(recipe, &Need::Model) }
}

fn localize_at(recipe: &mut Recipe, need: &Need, commit: Option<&str>) -> Result<(), Failure> {
    if let Some(id) = model(recipe) {
        let shown = Transfer::default();
        let snapshot = hub()
            .and_then(|hub| hub.resolve(&id, need, commit, &|news| shown.hear(news)))
            .map_err(|error| Nowhere { path: recipe.model.path.clone(), error, hint: None })?;
        recipe.model.path = format!("{}@{}", id.name, snapshot.commit);
    }
    let data = &mut recipe.data;
    let train: Vec<Vec<PathBuf>> = data.train.iter().map(|path| rows(path)).collect::<Result<_, _>>()?;
    // What is said of an entry holds for each of its files.
    let weights = data.weights.iter().zip(&train).flat_map(|(weight, files)| files.iter().map(|_| *weight));
    data.weights = weights.collect();
    data.train = train.concat();
    let eval: Vec<Vec<PathBuf>> = data.eval.iter().map(|path| rows(path)).collect::<Result<_, _>>()?;
    data.eval = eval.concat();
    Ok(())
}

/// The same for a run: all ranks take the commit that rank 0 takes, and the first rank of each host
/// fetches while the others wait. A run that is resumed takes the commit that it began with.
pub(crate) fn settle(
    recipe: &mut Recipe,
    resumes: bool,
    membership: &Membership,
    ranks: &Ranks,
) -> Result<(), Failure> {
    if !names_any(recipe) {
        return Ok(());
    }
    let group = ranks.group();
    let outcome = settle_together(recipe, resumes, membership, ranks);
    if let (Err(failure), true) = (&outcome, group.world() > 1)
        && failure.blamed().is_empty()
    {
        group.abort(&failure.fact(), failure.exit().number().into());
    }
    outcome
}

/// Bytes in which rank 0 tells the others a commit: its length, then its text.
const TOLD: usize = 128;

fn settle_together(recipe: &mut Recipe, resumes: bool, membership: &Membership, ranks: &Ranks) -> Result<(), Failure> {
    let group = ranks.group();
    let need = need_of_run(recipe, ranks);
    let mut commit = None;
    if let Some(id) = model(recipe) {
        let mut told = [0u8; TOLD];
        if ranks.is_first() {
            let pinned = pinned(recipe, &id, &need, resumes)?;
            // The name of a directory in the cache is never as long as this.
            let length = pinned.len().min(TOLD - 1);
            told[0] = length as u8;
            told[1..=length].copy_from_slice(&pinned.as_bytes()[..length]);
        }
        if group.world() > 1 {
            group.broadcast(&mut told, 0)?;
        }
        commit = Some(String::from_utf8_lossy(&told[1..=usize::from(told[0]).min(TOLD - 1)]).into_owned());
    }
    let fetches = membership.local_rank == 0;
    if fetches {
        localize_at(recipe, &need, commit.as_deref())?;
        if need == Need::Headers && !headers_suffice(recipe) {
            let why = "some of their formats and sizes are in the tensors themselves";
            complain!("{}: this host fetches all files of weights: {why}", recipe.model.path);
            localize_at(recipe, &Need::Model, commit.as_deref())?;
        }
    }
    if group.world() > 1 {
        // Whoever fetches gives up after a while without bytes, and then tells the others.
        group.barrier()?;
    }
    if !fetches {
        localize_at(recipe, &need, commit.as_deref())?;
    }
    Ok(())
}

/// What a run needs of its model before the ranks know which layers each has: where they hold them together, the
/// headers of the weights, by which the layers are dealt out.
fn need_of_run(recipe: &Recipe, ranks: &Ranks) -> Need {
    let is_spread = ranks.group().world() > 1 && recipe.parallel.stages != StagesChoice::Count(1);
    if !is_spread || model(recipe).is_none() {
        return Need::Model;
    }
    match reads_all(recipe) {
        None => Need::Headers,
        Some(why) => {
            if ranks.is_first() {
                complain!("{}: every host fetches all files of weights: {why}", recipe.model.path);
            }
            Need::Model
        }
    }
}

/// Why each rank reads weights of all layers, if it does.
fn reads_all(recipe: &Recipe) -> Option<&'static str> {
    let lora = &recipe.lora;
    match recipe.train.method {
        Method::Full => Some("train.method = \"full\" trains all of them on each rank"),
        Method::Lora if lora.init_from.is_some() => Some("lora.init_from is compared with the whole base"),
        Method::Lora => None,
    }
}

/// Whether the headers of weights say all that is to be known before the weights are loaded. Those of bitsandbytes do
/// not, for one.
fn headers_suffice(recipe: &Recipe) -> bool {
    let checked = model_directory(recipe).ok().map(|directory| Model::check_shapes(&directory));
    !matches!(checked, Some(Err(ModelError::Store(StoreError::NoShard { .. }))))
}

/// Fetches files of the weights of a recipe's model. [`settle`] has given it its commit.
pub(crate) fn fetch_shards(recipe: &Recipe, names: &[String]) -> Result<(), NotFetched> {
    let Some(id) = recipe.model.hub_id().and_then(HubId::parse) else { return Ok(()) };
    let (shown, need) = (Transfer::default(), Need::Shards(names.to_vec()));
    let found = hub().and_then(|hub| hub.resolve(&id, &need, id.revision.as_deref(), &|news| shown.hear(news)));
    found.map(drop).map_err(|error| NotFetched {
        what: error.to_string(),
        hints: error.hints(),
        fault: match error.fault() {
            Fault::Input => FaultOfRun::Input,
            Fault::Network => FaultOfRun::Peers,
            Fault::Disk => FaultOfRun::DiskOrMemory,
        },
    })
}

/// The commit that a run takes of its model.
fn pinned(recipe: &Recipe, id: &HubId, need: &Need, resumes: bool) -> Result<String, Failure> {
    let hub = hub()?;
    let began_with = recorded(recipe, id).filter(|_| resumes && id.revision.is_none());
    if let Some(commit) = began_with {
        let now = id.snapshot_in(hub.cache());
        let now = now.and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
        if let Some(now) = now.filter(|now| *now != commit) {
            complain!("{} has moved to commit {now}; the run goes on with {commit}, as it began", id.name);
        }
        return Ok(commit);
    }
    let shown = Transfer::default();
    let commit = hub.pin(id, need, &|news| shown.hear(news));
    Ok(commit.map_err(|error| Nowhere { path: recipe.model.path.clone(), error, hint: None })?)
}

/// The commit of the same model in the recipe that a run directory holds.
fn recorded(recipe: &Recipe, id: &HubId) -> Option<String> {
    let of_run = Recipe::load(&recipe.output_dir.join("recipe.toml"), &[], None).ok()?;
    let of_run = of_run.model.hub_id().and_then(HubId::parse)?;
    of_run.revision.filter(|_| of_run.name == id.name)
}
