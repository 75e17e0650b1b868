//! Why a run cannot start or go on.

use std::path::{Path, PathBuf};

use finetune_advice::Advice;
use finetune_allreduce::{Cause, GroupError, JoinError, Met, Verdict};
use finetune_dataset::DatasetError;
use finetune_model::ModelError;
use finetune_store::{StoreError, human_bytes};

use crate::numbers::counted;

/// Why a run cannot start or go on. The fields are the words of each variant's message.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message above a variant says what its fields are")]
pub enum TrainError {
    /// The model or the adapter is wrong, or the device failed.
    #[error(transparent)]
    Model(ModelError),
    /// The file of a base model holds numbers that are not finite: bad input, and no fault of
    /// training.
    #[error("{0}")]
    BadBase(ModelError),
    /// The rows or the tokenizer are wrong.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// Reading or writing files failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{what} is not finite in step {step}; no weight was changed by it")]
    /// A loss, gradient or parameter is not finite. `ways`: what can be done now, ready to paste.
    NotFinite { what: &'static str, step: u64, rows: Vec<String>, more: usize, ways: Vec<String> },
    /// The loss on held-back rows is not finite before any training.
    #[error("the loss of {} is not finite", rows.join(", "))]
    NotFiniteEvaluation { rows: Vec<String> },
    /// The run directory has a run, and this one was not told to resume it.
    #[error("{directory} holds a run already", directory = directory.display())]
    Occupied { directory: PathBuf },
    /// A resume with another recipe, other rows or another model.
    #[error("{path} cannot be resumed with this recipe:\n{}", differences.join("\n"), path = path.display())]
    Changed { path: PathBuf, differences: Vec<String> },
    /// A checkpoint is damaged, or of another version.
    #[error("{path}: {what}", path = path.display())]
    Checkpoint { path: PathBuf, what: String },
    /// The path to go on from holds something else than a checkpoint.
    #[error("{path}: {what}", path = path.display())]
    NoCheckpoint { path: PathBuf, what: String, hints: Vec<String> },
    /// A resume of a run that has a result but no checkpoint.
    #[error("{result} is the result of a run whose checkpoints are gone: there is nothing to go on from, and starting again would replace it", result = result.display())]
    NothingLeft { result: PathBuf, passed_over: Vec<String> },
    /// The checkpoint that is to become the result is missing or damaged.
    #[error("the best checkpoint, {path}, cannot become the result: {what}", path = path.display())]
    BestCheckpoint { path: PathBuf, what: String },
    /// The best evaluation was asked for, without rows to evaluate.
    #[error("checkpoint.result = \"best\" needs evaluation rows, and there are none")]
    NoBest,
    /// A run there would lie between the user's own files, or be written over them.
    #[error("output_dir = {directory}: {what}", directory = directory.display())]
    WrongFolder { directory: PathBuf, what: String },
    /// A value that no run can have.
    #[error("{key} = {value}: {what}")]
    Beyond { key: &'static str, value: String, what: String },
    /// The auxiliary loss of routers is asked for, and cannot be had here.
    #[error("train.router_aux_loss_coef = {coefficient:?}: {what}")]
    RouterLoss { coefficient: f64, what: String },
    /// The checkpoint has done more steps than the recipe has.
    #[error("{path}: step {step} is past the last step of the recipe, {last}", path = path.display())]
    PastTheEnd { path: PathBuf, step: u64, last: u64 },
    /// Files of the base that this rank needs cannot be fetched.
    #[error("{}", .0.what)]
    NotFetched(NotFetched),
    /// The model is neither here nor in the Hugging Face cache.
    #[error("model.path: `{path}` is neither a directory nor a model in the Hugging Face cache")]
    NoModel { path: String },
    /// All weights are to be trained, and the base has them in few bits. `form`: how they are packed.
    #[error("train.method = \"full\" trains all weights, and {path} has them packed: {form}", path = path.display())]
    PackedBase { path: PathBuf, form: String },
    /// All weights are to be trained, and the model has parts that are not.
    #[error("train.method = \"full\" trains all weights, and {what} by LoRA alone")]
    OnlyLora { what: String },
    /// `path` is there, but holds something else than a model.
    #[error("model.path: `{path}` {what}")]
    NotAModel { path: String, what: String, hints: Vec<String> },
    /// The initial adapter was trained on another base.
    #[error("lora.init_from: {path}: {what}", path = path.display())]
    OtherBase { path: PathBuf, what: String },
    /// The disk is too small for the run. Sizes are in bytes.
    #[error("the run needs {} on disk at {}, and {} are free", human_bytes(*needed), directory.display(), human_bytes(*free))]
    Disk { directory: PathBuf, needed: u64, free: u64, hints: Vec<String> },
    /// The memory is too small for the run, by the estimate. Sizes are in bytes.
    #[error("the run needs about {} of memory; {} are available", human_bytes(*needed), human_bytes(*available))]
    Memory { needed: u64, available: u64, weights: u64, cheaper: Vec<String> },
    /// The device is out of memory. `bytes`: what could not be allocated at once, if the driver
    /// says it. `cheaper`: settings that take less. `saved`: the newest checkpoint.
    #[error("{}", ModelError::DeviceMemory { bytes: *bytes })]
    DeviceMemory { bytes: Option<u64>, cheaper: Vec<String>, saved: Option<PathBuf> },
    /// A GPU was asked for, and there is none.
    #[error("model.device = \"gpu\": {}", if *built_in { "no GPU was found" } else { "this program was built without a GPU backend" })]
    NoGpu { built_in: bool },
    /// f16 was asked for, and the family's activations exceed its range.
    #[error("model.dtype = \"f16\": the activations of {architecture} exceed the largest number of f16")]
    ExceedsF16 { architecture: &'static str },
    /// No row of the training data is left.
    #[error("{path}: no row is left to train on", path = path.display())]
    NoRows { path: PathBuf },
    /// Lines of the data are no JSON.
    #[error("{}", lines.join("\n"))]
    NotJson { lines: Vec<String> },
    /// The virtual ranks are no multiple of the ranks.
    #[error("distributed.virtual_ranks = {virtual_ranks} cannot be shared out evenly among {replicas} ranks")]
    VirtualRanks { virtual_ranks: usize, replicas: usize },
    /// The ranks are no multiple of the stages.
    #[error("parallel.stages = {stages} ranks hold a model together, and {} {} no multiple of it", counted(*world as u64, "rank"), if *world == 1 { "is" } else { "are" })]
    UnevenStages { stages: usize, world: usize },
    /// The layers of the model cannot be spread over ranks.
    #[error("parallel.stages: {what}")]
    NotInStages { what: String },
    /// The layers of the model cannot be split over so many ranks.
    #[error("--parallel tensor: {what}")]
    NotSplit { what: String },
    /// Ranks that use a model cannot hold whole layers of it.
    #[error("{what}")]
    NotTogether { what: String },
    /// Ranks that answer with one model have too little memory for its layers.
    #[error("--parallel stages: {what}")]
    NoRoomInStages { what: String },
    /// The recipe gives the ranks another number of layers than there are.
    #[error("parallel.layers = {counts:?} are {sum} layers, and the model has {layers}")]
    LayersOfRanks { counts: Vec<usize>, sum: usize, layers: usize },
    /// The ranks that hold a model together cannot connect.
    #[error("the ranks that hold the layers together cannot connect: {0}")]
    Stages(JoinError),
    /// The system gives no more threads.
    #[error("the system gives no more threads: {error}")]
    NoThread { error: std::io::Error },
    /// The ranks have different input.
    #[error("the ranks cannot work together: {}", differences.join("; "))]
    Differ { differences: Vec<String> },
    /// The ranks had the same numbers, and have them no longer.
    #[error("after step {step} the ranks no longer have the same numbers: {}", differences.join("; "))]
    Drifted { step: u64, differences: Vec<String> },
    /// The group of ranks has failed. `saved`: the newest checkpoint, if this rank knows it.
    #[error("{error}")]
    Group { error: GroupError, saved: Option<PathBuf> },
}

/// Why files cannot be fetched, in the words of what fetches them.
#[derive(Clone, Debug)]
pub struct NotFetched {
    /// What has gone wrong.
    pub what: String,
    /// What to do.
    pub hints: Vec<String>,
    /// Whose fault it is.
    pub fault: Fault,
}

/// What kind of thing went wrong. The numbers are the program's exit codes, and ranks tell them
/// each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The recipe, the model or the rows are wrong: another try ends the same way.
    Input,
    /// Another rank was lost, or the network failed: another try may succeed.
    Peers,
    /// Numbers are not finite.
    Numbers,
    /// The disk is full, a write failed, or there is too little memory.
    DiskOrMemory,
}

impl Fault {
    const ALL: [Fault; 4] = [Fault::Input, Fault::Peers, Fault::Numbers, Fault::DiskOrMemory];

    /// The exit code.
    pub fn number(self) -> i32 {
        match self {
            Fault::Input => 2,
            Fault::Peers => 3,
            Fault::Numbers => 4,
            Fault::DiskOrMemory => 5,
        }
    }

    /// The fault of an error of the model or its device.
    pub fn from_model(error: &ModelError) -> Fault {
        match error {
            error if error.is_about_numbers() => Fault::Numbers,
            ModelError::DeviceMemory { .. } | ModelError::DiskHangs { .. } => Fault::DiskOrMemory,
            ModelError::Store(error) => Fault::from_store(error),
            _ => Fault::Input,
        }
    }

    /// The fault of an error of the rows or the tokenizer.
    pub fn from_dataset(error: &DatasetError) -> Fault {
        match error {
            DatasetError::NoThreads { .. } => Fault::DiskOrMemory,
            _ => Fault::Input,
        }
    }

    /// The fault of an error of files.
    pub fn from_store(error: &StoreError) -> Fault {
        if error.is_disk() { Fault::DiskOrMemory } else { Fault::Input }
    }

    /// The fault of ranks that cannot connect. A rank that failed before it could has said with which code it ends.
    pub fn from_join(error: &JoinError) -> Fault {
        match error {
            JoinError::Group(error) => Fault::from_group(error),
            // Another try meets the same token and the same program.
            JoinError::Unreachable { met: Met::OtherToken | Met::OtherVersion, .. } => Fault::Input,
            JoinError::Unreachable { .. }
            | JoinError::Unresolved { .. }
            | JoinError::Missing { .. }
            | JoinError::Failed { .. }
            | JoinError::Pair { .. }
            | JoinError::Peer { .. } => Fault::Peers,
            _ => Fault::Input,
        }
    }

    /// The fault of a failed group. If a rank stopped by itself, its fault is the fault of all.
    pub fn from_group(error: &GroupError) -> Fault {
        match &error.verdict {
            // Ranks that do different things were started with different input.
            Verdict::Reported { cause: Cause::Diverged { .. }, .. } => Fault::Input,
            Verdict::Reported { cause: Cause::Failed { code, .. }, .. } => {
                Fault::ALL.into_iter().find(|fault| fault.number() == *code).unwrap_or(Fault::Peers)
            }
            _ => Fault::Peers,
        }
    }
}

impl From<ModelError> for TrainError {
    fn from(error: ModelError) -> TrainError {
        match error {
            ModelError::Hop(error) => match error.downcast::<GroupError>() {
                Ok(error) => TrainError::from(*error),
                Err(error) => TrainError::Model(ModelError::Hop(error)),
            },
            ModelError::Sum(error) => match error.downcast::<GroupError>() {
                Ok(error) => TrainError::from(*error),
                Err(error) => TrainError::Model(ModelError::Sum(error)),
            },
            error => TrainError::Model(error),
        }
    }
}

impl From<JoinError> for TrainError {
    fn from(error: JoinError) -> TrainError {
        match error {
            JoinError::Group(error) => TrainError::from(error),
            error => TrainError::Stages(error),
        }
    }
}

impl From<GroupError> for TrainError {
    fn from(error: GroupError) -> TrainError {
        TrainError::Group { error, saved: None }
    }
}

impl TrainError {
    /// Adds to the failure of a group or a device which checkpoint is safe.
    pub(crate) fn with_saved(self, saved: Option<PathBuf>) -> TrainError {
        match self {
            TrainError::Group { error, .. } => TrainError::Group { error, saved },
            TrainError::DeviceMemory { bytes, cheaper, .. } => TrainError::DeviceMemory { bytes, cheaper, saved },
            error => error,
        }
    }

    /// Adds to numbers that are not finite what can be done now.
    pub(crate) fn with_ways(self, found: impl FnOnce() -> Vec<String>) -> TrainError {
        match self {
            TrainError::NotFinite { what, step, rows, more, .. } => {
                TrainError::NotFinite { what, step, rows, more, ways: found() }
            }
            error => error,
        }
    }

    /// Adds to a device that is out of memory which settings take less.
    pub(crate) fn with_cheaper_settings(self, cheaper: impl FnOnce() -> Vec<String>) -> TrainError {
        match self {
            TrainError::Model(ModelError::DeviceMemory { bytes }) => {
                TrainError::DeviceMemory { bytes, cheaper: cheaper(), saved: None }
            }
            error => error,
        }
    }

    /// The error for the base model that a run is to begin with.
    pub(crate) fn from_base(error: ModelError) -> TrainError {
        match error {
            ModelError::NotFinite { .. } => TrainError::BadBase(error),
            error => TrainError::Model(error),
        }
    }

    /// Hints that do not depend on what was found.
    fn fixed_hints(&self) -> &'static [&'static str] {
        match self {
            TrainError::NotFiniteEvaluation { .. } => {
                &["the weights or the adapter hold numbers that are not finite, or overflow on these rows"]
            }
            TrainError::PackedBase { .. } => &[
                "train.method = \"lora\" trains an adapter over them",
                "or name the 16-bit model that they were made from in model.path",
            ],
            TrainError::OnlyLora { .. } => {
                &["train.method = \"lora\" trains an adapter; lora.experts = true trains experts too"]
            }
            TrainError::RouterLoss { .. } => {
                &["leave train.router_aux_loss_coef out: it is for models with experts whose routers have such a loss"]
            }
            TrainError::Occupied { .. } => &["`--resume` goes on with it; `--output-dir` starts another"],
            TrainError::Changed { .. } => &[
                "output_dir, [log], [checkpoint], [eval], the number of steps, optimizer.learning_rate, train.max_grad_norm and train.micro_batch_size may change; for anything else start a new run with `--output-dir`",
            ],
            TrainError::BestCheckpoint { .. } => {
                &["`--resume --set checkpoint.result=last` makes the last state the result"]
            }
            TrainError::NoBest => &["name held-back rows with `eval` in [data], or leave checkpoint.result out"],
            TrainError::WrongFolder { .. } => {
                &["give the run a directory of its own, such as output_dir = \"runs/NAME\""]
            }
            TrainError::OtherBase { .. } => &["an adapter fits the base model that it was trained on and no other"],
            TrainError::PastTheEnd { .. } => &["raise train.max_steps or train.epochs, or start a new run"],
            TrainError::NoModel { .. } => &[
                "a directory needs config.json, tokenizer.json and model.safetensors; paths are relative to the recipe",
                "a model of the hub is called OWNER/NAME, and is fetched by that name",
            ],
            TrainError::NoGpu { built_in: true } => &[
                "`finetune devices` lists what is found; on Linux the Vulkan loader (libvulkan1) and the card's driver have to be installed",
                "model.device = \"cpu\" trains without one, \"auto\" takes a GPU where there is one",
            ],
            TrainError::NoGpu { built_in: false } => &[
                "build it with `cargo build --release --features gpu` (Vulkan); on macOS the GPU is always in",
                "model.device = \"cpu\" or \"auto\" trains with this one",
            ],
            TrainError::ExceedsF16 { .. } => &["take \"bf16\" or \"f32\"; \"auto\" does, whatever the file has"],
            TrainError::NotTogether { .. } => {
                &["take fewer ranks (-n, or hosts of the hostfile); `--parallel tensor` splits every layer instead"]
            }
            TrainError::NotJson { .. } => &["each line of a dataset is one JSON object"],
            TrainError::Differ { .. } => &[
                "all ranks need the same program, recipe, model and data; `finetune launch --copy` brings those of a recipe to every host",
            ],
            TrainError::Drifted { .. } => &[
                "every rank makes the same update from the same sums: other processors or builds, or bad memory, make others",
                "`--resume` goes on from the last checkpoint, which all ranks agreed on",
            ],
            _ => &[],
        }
    }

    /// What kind of thing went wrong.
    pub fn fault(&self) -> Fault {
        match self {
            TrainError::NotFinite { .. } | TrainError::NotFiniteEvaluation { .. } => Fault::Numbers,
            TrainError::Memory { .. }
            | TrainError::DeviceMemory { .. }
            | TrainError::Disk { .. }
            | TrainError::NoThread { .. } => Fault::DiskOrMemory,
            TrainError::Model(error) => Fault::from_model(error),
            TrainError::Dataset(error) => Fault::from_dataset(error),
            TrainError::Store(error) => Fault::from_store(error),
            TrainError::Group { error, .. } => Fault::from_group(error),
            TrainError::Stages(error) => Fault::from_join(error),
            TrainError::Drifted { .. } => Fault::Peers,
            TrainError::NotFetched(error) => error.fault,
            _ => Fault::Input,
        }
    }
}

impl Advice for TrainError {
    fn hints(&self) -> Vec<String> {
        match self {
            TrainError::Model(error) | TrainError::BadBase(error) => error.hints(),
            TrainError::Stages(error) => error.hints(),
            TrainError::Dataset(error) => error.hints(),
            TrainError::Store(error) => error.hints(),
            TrainError::NotFinite { rows, more, ways, .. } => {
                let rows = rows.join(", ");
                let more = if *more > 0 { format!(" and {more} more") } else { String::new() };
                std::iter::once(format!("rows of the step: {rows}{more}")).chain(ways.iter().cloned()).collect()
            }
            TrainError::NoCheckpoint { hints, .. } | TrainError::NotAModel { hints, .. } => hints.clone(),
            TrainError::NothingLeft { result, passed_over } => {
                let shown = result.display();
                let start = "`--output-dir` with another name starts a new run beside it".to_owned();
                let remove = format!("to start again here, move or remove {shown} first");
                passed_over.iter().cloned().chain([start, remove]).collect()
            }
            TrainError::Disk { hints, .. } | TrainError::NotFetched(NotFetched { hints, .. }) => hints.clone(),
            TrainError::Memory { weights, cheaper, available, .. } => {
                if weights <= available {
                    return cheaper.clone();
                }
                let of_weights = |setting: &&String| setting.starts_with("model.");
                let mut hints: Vec<String> = cheaper.iter().filter(of_weights).cloned().collect();
                let weights = human_bytes(*weights);
                hints.push(format!("{weights} of it are the model's weights: take a smaller model"));
                hints
            }
            TrainError::DeviceMemory { cheaper, saved, .. } => {
                let safe = saved.as_ref().map(|path| {
                    let path = path.display();
                    format!("{path} is safe: `--resume` goes on from it to the same bits with train.gradient_checkpointing = true; other settings make it another run")
                });
                cheaper.iter().cloned().chain(safe).collect()
            }
            TrainError::VirtualRanks { virtual_ranks, .. } => {
                vec![format!(
                    "start as many ranks (or, with parallel.stages, so many times as many) as divide {virtual_ranks}, or leave \
                     distributed.virtual_ranks out"
                )]
            }
            TrainError::UnevenStages { stages, .. } => {
                let start = format!("finetune launch -n {stages} -- RECIPE.toml");
                vec![format!(
                    "start {stages} ranks, or twice or three times as many (`{start}`), or change parallel.stages"
                )]
            }
            TrainError::NoRoomInStages { .. } => vec![
                "start more ranks, or on hosts with more memory".to_owned(),
                "--quantization packs the weights in fewer bits, such as mlx4 or int8".to_owned(),
            ],
            TrainError::NotSplit { .. } => {
                vec!["--parallel stages, the default, gives each rank whole layers".to_owned()]
            }
            TrainError::NotInStages { .. } => {
                vec!["leave parallel.stages out: each rank then holds all layers, in memory or on its disk".to_owned()]
            }
            TrainError::LayersOfRanks { layers, .. } => {
                vec![format!("write numbers that are {layers} together, or leave parallel.layers out")]
            }
            TrainError::Group { error, .. } if Fault::from_group(error) != Fault::Peers => error.hints(),
            TrainError::Group { error, saved } => resumed(saved.as_deref()).chain(error.hints()).collect(),
            error => error.fixed_hints().iter().map(|hint| (*hint).to_owned()).collect(),
        }
    }
}

/// How a run goes on whose group of ranks has failed.
fn resumed(saved: Option<&Path>) -> std::iter::Once<String> {
    std::iter::once(match saved {
        Some(path) => format!("{} is safe; run the same command with --resume to go on from it", path.display()),
        None => "run the same command with --resume: it goes on from the newest checkpoint".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ranks that could not connect may be started again: nothing is wrong with the input.
    #[test]
    fn a_rank_that_is_lost_while_ranks_connect_is_no_fault_of_the_input() {
        let lost = JoinError::Peer { rank: 0, peer: 1, why: "it ended".to_owned() };
        assert!(matches!(TrainError::from(lost).fault(), Fault::Peers));
        assert!(matches!(TrainError::from(JoinError::Rdma("no device".to_owned())).fault(), Fault::Input));
    }
}
