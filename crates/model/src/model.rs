//! A model ready to train or to run: its weights, their device, and which of them are trained.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use finetune_kernels::FloatType;
use finetune_kernels::devices::reserved_bytes;
use finetune_packed::Scheme;
use finetune_store::OpenedFile;

use crate::adaptation::Adaptation;
use crate::config::ModelConfig;
use crate::decoder::expert_use::{ExpertCounts, ExpertUse};
use crate::decoder::row_branches::BranchTable;
use crate::error::ModelError;
use crate::files::base_files::BaseFiles;
use crate::files::finite;
use crate::files::load::{self, Source};
use crate::files::packing::BaseForm;
use crate::layer_source::LayerSource;
use crate::layout::Layout;
use crate::placement::Placement;
use crate::slice::{Sliced, Sums};
use crate::spread::Spread;
use crate::stage::{Connected, Hops};
use crate::tree::Decoder;

/// Which parameters are trained.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Trained {
    Nothing,
    Adapter(Adaptation),
    All,
}

/// A decoder-only language model. See the crate's documentation for where to start.
#[derive(Clone, Debug)]
pub struct Model {
    /// The architecture.
    pub config: ModelConfig,
    pub(crate) directory: PathBuf,
    /// The files of its weights. None of a model with fresh ones.
    opened: Vec<OpenedFile>,
    pub(crate) weights: Decoder,
    /// Frequencies [width / 2] of each rotary embedding, of short rows and of long ones.
    pub(crate) frequencies: Vec<[Vec<f32>; 2]>,
    pub(crate) trained: Trained,
    pub(crate) placement: Placement,
    /// What is trained and of this process.
    pub(crate) layout: Layout,
    /// What is trained, and the process that has it.
    pub(crate) spread: Spread,
    /// Whether embedding or output layer are not those of the directory: rows were added, or an
    /// adapter brought others along.
    pub(crate) has_own_vocabulary: bool,
    device_peak: u64,
    /// Counted in training.
    pub(crate) expert_use: Arc<ExpertUse>,
    /// The same in all clones of a base, whatever adapter each has.
    pub(crate) base: Arc<()>,
    /// Whether all processes that hold the model compute on CPUs.
    all_on_cpu: bool,
    /// The branches as passes with rows of other adapters need them, made when the first such pass does.
    pub(crate) branches: OnceLock<Arc<BranchTable>>,
    /// See [`Model::shares_above`].
    pub(crate) shares_above: OnceLock<usize>,
    /// The coefficient of the routers' auxiliary loss in what is minimised; 0: it counts nothing.
    pub(crate) router_loss: f64,
}

/// The opened files of a base, whose headers were read and checked. No weight was.
pub struct OpenedBase {
    config: ModelConfig,
    files: BaseFiles,
}

impl OpenedBase {
    /// Opens a base: a Hugging Face model directory or a GGUF file. `quantization`: how its matrices are packed while it is
    /// loaded.
    ///
    /// # Errors
    /// As [`Model::check_shapes`].
    pub fn open(directory: &Path, quantization: Option<Scheme>) -> Result<OpenedBase, ModelError> {
        let (config, files) = BaseFiles::open(directory, quantization)?;
        Ok(OpenedBase { config, files })
    }

    /// The architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The number type of its files, as [`stored_type`](crate::stored_type) says it.
    pub fn stored_type(&self) -> FloatType {
        self.files.number_type()
    }

    /// How its matrices are packed, in its files or while it is loaded, and how large they are.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn form(&self) -> Result<BaseForm, ModelError> {
        Ok(BaseForm::of(&self.files.tensors(&self.config)?))
    }
}

impl Model {
    /// Loads a base: a Hugging Face model directory. Every tensor's shape is checked before the first
    /// is read. Packed matrices stay packed.
    ///
    /// # Errors
    /// If a file is missing or malformed, if config and weights do not fit each other, or if the
    /// device fails. A number that is not finite is an error that names its tensor. If the placement asks for
    /// a slice of layers that are not split over processes.
    pub fn load(directory: &Path, placement: &Placement) -> Result<Model, ModelError> {
        Model::load_opened(OpenedBase::open(directory, placement.quantization())?, placement)
    }

    /// The same of a base that was opened with the quantization of this placement.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_opened(base: OpenedBase, placement: &Placement) -> Result<Model, ModelError> {
        let OpenedBase { config, files } = base;
        let directory = files.path().to_owned();
        let mut model = Model::build(config, &directory, &Source::Files { files: &files }, placement)?;
        model.opened = files.opened();
        if placement.reads_layers() || placement.stage().is_some() {
            let source = LayerSource::start(files, model.config.clone(), placement.clone())?;
            if placement.reads_experts() {
                model.weights.leave_experts(&source, |n| placement.stage().is_none_or(|stage| stage.holds(n)));
            }
            model.weights.source = Some(Arc::new(source));
        }
        Ok(model)
    }

    /// Checks that the files of the weights are still those that the model was loaded from. So a digest that was
    /// made meanwhile, of files of the same names, is that of this model.
    ///
    /// # Errors
    /// [`ModelError::Store`] if a file was written to, or another one has its name.
    pub fn expect_files_in_place(&self) -> Result<(), ModelError> {
        Ok(self.opened.iter().try_for_each(OpenedFile::expect_in_place)?)
    }

    /// Whether the frozen matrices of the layers are read from the disk whenever a pass comes to them.
    pub fn reads_layers(&self) -> bool {
        self.placement.reads_layers()
    }

    /// Connects this process with the others that hold layers of the model: [`Placement::with_stage`] has said
    /// which. Each pass is made by all of them together, with the same rows.
    pub fn connect(&mut self, hops: Arc<dyn Hops>) {
        self.weights.stage = self.placement.stage().map(|stage| Connected::new(stage.clone(), hops));
    }

    /// Connects this process with the others that hold slices of the same layers: [`Placement::with_slice`] has
    /// said which is whose. Each pass is made by all of them together, with the same rows. Before this a pass of
    /// such a model is an error.
    pub fn connect_slices(&mut self, sums: Arc<dyn Sums>) {
        self.weights.sliced = self.placement.slice().map(|slice| Sliced { slice, sums: Some(sums) });
    }

    /// Whether this process computes losses. Where several hold the layers of a model, only one of them does;
    /// the others get 0 from every pass.
    pub fn has_losses(&self) -> bool {
        self.placement.stage().is_none_or(|stage| stage.last() == stage.mine)
    }

    /// Whether passes without gradients take several batches through one layer after the other: layers are read
    /// from the disk, or other processes hold some.
    pub fn goes_layer_by_layer(&self) -> bool {
        self.reads_layers() || self.placement.stage().is_some()
    }

    /// How many passes of answers may be under way at once: one on the layers of each process that this one is
    /// connected with.
    pub(crate) fn passes_at_once(&self) -> usize {
        self.weights.stage.as_ref().map_or(1, |connected| connected.stage.passes_at_once())
    }

    /// What the process that has the losses says. All that hold layers of the model ask together.
    ///
    /// # Errors
    /// If another process cannot be reached.
    pub fn as_last_says(&self, mine: bool) -> Result<bool, ModelError> {
        let mine = self.has_losses().then(|| vec![f32::from(u8::from(mine))]);
        Ok(self.weights.said_by_last(mine, 1)?[0] > 0.0)
    }

    /// How long passes have waited for layers and experts from the disk since the last call, and how many layers
    /// were read.
    pub fn take_waited(&self) -> (Duration, u64) {
        self.weights.source.as_ref().map(|source| source.take_waited()).unwrap_or_default()
    }

    /// Checks everything that [`Model::load`] checks, and keeps nothing. All weights are read once.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn check(directory: &Path) -> Result<ModelConfig, ModelError> {
        let (config, files) = BaseFiles::open(directory, None)?;
        finite::expect_all_finite(&files, &config)?;
        Ok(config)
    }

    /// Checks the config, and the names and shapes of the weights. The weights are not read.
    ///
    /// # Errors
    /// If a file is missing or malformed, or if a tensor is missing, has another shape or belongs
    /// to no part of the model.
    pub fn check_shapes(directory: &Path) -> Result<ModelConfig, ModelError> {
        Ok(BaseFiles::open(directory, None)?.0)
    }

    /// How the matrices of a base are packed, in its files or while it is loaded with `quantization`,
    /// from the headers of the files.
    ///
    /// # Errors
    /// As [`Model::check_shapes`].
    pub fn form(directory: &Path, quantization: Option<Scheme>) -> Result<BaseForm, ModelError> {
        OpenedBase::open(directory, quantization)?.form()
    }

    /// What a user should know about how the directory was read.
    pub fn notices(&self) -> &[String] {
        &self.config.notices
    }

    /// A model with fresh weights from a bare `config.json`, by transformers' initialization, from
    /// `seed`.
    ///
    /// # Errors
    /// If config.json is missing or malformed, or describes a model that is not supported.
    pub fn initialize(directory: &Path, seed: u64, placement: &Placement) -> Result<Model, ModelError> {
        let config = ModelConfig::load(directory)?;
        Model::build(config, directory, &Source::Fresh { seed }, placement)
    }

    fn build(
        config: ModelConfig,
        directory: &Path,
        source: &Source<'_>,
        placement: &Placement,
    ) -> Result<Model, ModelError> {
        let load = |_: ()| load::weights(&config, source, placement);
        // Weights stay for the whole run. On a GPU each gets memory of exactly its size, outside of
        // the pools that activations use.
        let weights =
            if placement.is_cpu() { load(()) } else { placement.device.memory_persistent_allocations((), load) }?;
        Ok(Model {
            frequencies: config
                .ropes
                .iter()
                .map(|rope| [false, true].map(|is_long| rope.frequencies_of(is_long)))
                .collect(),
            config,
            directory: directory.to_owned(),
            opened: Vec::new(),
            weights,
            trained: Trained::Nothing,
            placement: placement.clone(),
            layout: Layout::default(),
            spread: Spread::default(),
            has_own_vocabulary: false,
            device_peak: 0,
            expert_use: Arc::default(),
            base: Arc::default(),
            all_on_cpu: placement.is_cpu(),
            branches: OnceLock::new(),
            shares_above: OnceLock::new(),
            router_loss: 0.0,
        })
    }

    /// The device, and the number types that are held and computed in.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Whether all processes that hold this model compute on CPUs. What is read together, and what is kept of prompts,
    /// has to be the same on all of them.
    pub fn set_all_on_cpu(&mut self, all: bool) {
        self.all_on_cpu = all;
    }

    pub(crate) fn all_on_cpu(&self) -> bool {
        self.all_on_cpu
    }

    /// Most bytes of the device's memory that were seen in use; `None` on the CPU.
    pub fn device_peak(&self) -> Option<u64> {
        (!self.placement.is_cpu()).then_some(self.device_peak)
    }

    /// How often each expert was chosen since the last call, by the rows that gradients were computed of. Empty if
    /// the model has none.
    pub fn take_expert_counts(&self) -> ExpertCounts {
        self.expert_use.take()
    }

    /// Records how much of the device's memory is in use. Pools give pages back, so this is called
    /// when most is kept.
    pub(crate) fn look_at_memory(&mut self) {
        self.device_peak = self.device_peak.max(reserved_bytes(&self.placement.device).unwrap_or(0));
    }
}
