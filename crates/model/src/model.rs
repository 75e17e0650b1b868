//! A model ready to train or to run: weights, the parameters that are trained, and the two passes over a micro-batch.

use std::path::{Path, PathBuf};

use burn::tensor::{DType, Tensor, TensorData};
use finetune_kernels::devices::{dropped_work, is_cpu, reserved_bytes};
use finetune_kernels::{RopeTable, Segments, Targets, operations};
use finetune_random::Stream;
use finetune_store::TensorSet;

use crate::config::ModelConfig;
use crate::decoder::{self, BatchDropout, Context};
use crate::layout::Layout;
use crate::load::{self, Source};
use crate::lora::LoraTargets;
use crate::placement::Placement;
use crate::weights::{LoraBranch, Slot, Weights};
use crate::{ModelError, adapter, finite};

/// What random numbers are drawn for; each purpose has streams of its own.
#[derive(Clone, Copy)]
pub(crate) enum Purpose {
    Weights = 1,
    Adapter = 2,
    Dropout = 3,
    Sampling = 4,
}

/// What is trained.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Trained {
    Nothing,
    Lora { targets: LoraTargets, dropout: f64 },
    All,
}

/// One row of a micro-batch. `trained[i]` says whether token i is a target; `id` is the row's number in its
/// dataset, which keys its dropout.
#[derive(Clone, Copy, Debug)]
pub struct BatchRow<'a> {
    pub id: u32,
    pub tokens: &'a [u32],
    pub trained: &'a [bool],
}

/// Rows that go through the model together, whatever their lengths: nothing is padded.
#[derive(Clone, Debug)]
pub struct Batch<'a> {
    pub rows: Vec<BatchRow<'a>>,
}

impl Batch<'_> {
    /// Targets of all rows.
    pub fn trained_tokens(&self) -> u64 {
        self.rows.iter().map(|row| row.trained.iter().skip(1).filter(|&&t| t).count() as u64).sum()
    }

    pub fn tokens(&self) -> u64 {
        self.rows.iter().map(|row| row.tokens.len() as u64).sum()
    }
}

/// Sums over trained tokens: means are formed once, after all micro-batches and ranks are in.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LossSum {
    /// Σ -ln p(target), in f64.
    pub loss: f64,
    pub trained_tokens: u64,
    /// The part of each row, in the batch's order.
    pub row_losses: Vec<f64>,
}

impl LossSum {
    /// Indices of rows whose loss is not a finite number.
    pub fn bad_rows(&self) -> Vec<usize> {
        self.row_losses.iter().enumerate().filter(|(_, loss)| !loss.is_finite()).map(|(row, _)| row).collect()
    }
}

/// What dropout depends on besides the row: nothing else random happens in a step.
#[derive(Clone, Copy, Debug)]
pub struct Randomness {
    pub seed: u64,
    pub step: u64,
}

/// A decoder-only language model. See the crate's documentation for where to start.
#[derive(Clone, Debug)]
pub struct Model {
    pub config: ModelConfig,
    pub(crate) directory: PathBuf,
    pub(crate) weights: Weights,
    pub(crate) frequencies: Vec<f32>,
    pub(crate) trained: Trained,
    pub(crate) placement: Placement,
    pub(crate) layout: Layout,
    device_peak: u64,
}

impl Model {
    /// Loads a Hugging Face model directory. Every tensor's shape is checked before the first is read; a number that is not
    /// finite is an error that names its tensor.
    pub fn load(directory: &Path, placement: &Placement) -> Result<Model, ModelError> {
        let mut config = ModelConfig::load(directory)?;
        let files = TensorSet::open_model(directory)?;
        let notices = load::check(&files, &config, directory)?;
        config.notices.extend(notices);
        Model::build(config, directory, &Source::Files { files: &files }, placement)
    }

    /// Checks everything that [`Model::load`] checks, and keeps nothing. All weights are read once.
    pub fn check(directory: &Path) -> Result<ModelConfig, ModelError> {
        let mut config = ModelConfig::load(directory)?;
        let files = TensorSet::open_model(directory)?;
        let notices = load::check(&files, &config, directory)?;
        config.notices.extend(notices);
        finite::expect_all_finite(&files, &config)?;
        Ok(config)
    }

    /// What a user should know about how the directory was read.
    pub fn notices(&self) -> &[String] {
        &self.config.notices
    }

    /// A model with fresh weights from a bare `config.json`: transformers' initialization, from `seed`.
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
        // Weights stay: on a GPU each gets memory of just its size, outside of the pools that activations come and go in.
        let weights =
            if placement.is_cpu() { load(()) } else { placement.device.memory_persistent_allocations((), load) }?;
        Ok(Model {
            frequencies: config.rope_frequencies(),
            config,
            directory: directory.to_owned(),
            weights,
            trained: Trained::Nothing,
            placement: placement.clone(),
            layout: Layout::default(),
            device_peak: 0,
        })
    }

    /// Where it is, and in which number types.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Most bytes of the device's memory that were seen taken, `None` on the CPU.
    pub fn device_peak(&self) -> Option<u64> {
        (!self.placement.is_cpu()).then_some(self.device_peak)
    }

    /// Looks how much of the device's memory is taken. Pools give pages back, so it is asked where most is kept.
    pub(crate) fn look_at_memory(&mut self) {
        self.device_peak = self.device_peak.max(reserved_bytes(&self.placement.device).unwrap_or(0));
    }

    /// Names of all linear layers inside the decoder, in model order: what LoRA can target.
    pub fn linear_modules(&self) -> Vec<String> {
        adapter::linear_modules(&self.config)
    }

    /// Gives these modules LoRA branches and makes them what is trained: A from PEFT's initialization
    /// (kaiming uniform with a = sqrt 5, that is U(±1/sqrt inputs)) and `seed`, B zero.
    pub fn add_lora(&mut self, targets: LoraTargets, dropout: f64, seed: u64) {
        let mut module = 0;
        for layer in &mut self.weights.layers {
            for linear in layer.linears_mut() {
                if let Some(target) = targets.iter().find(|target| target.module == linear.name) {
                    let [outputs, inputs] = linear.weight.dims();
                    let bound = 1.0 / (inputs as f32).sqrt();
                    let a = Stream::new(seed, Purpose::Adapter as u32, 0, module).uniform(target.rank * inputs, bound);
                    let device = &self.placement.device;
                    linear.lora = Some(LoraBranch {
                        a: Tensor::from_data(TensorData::new(a, [target.rank, inputs]), device),
                        b: Tensor::zeros([outputs, target.rank], device),
                        scale: target.scale(),
                        module,
                    });
                }
                module += 1;
            }
        }
        self.train(Trained::Lora { targets, dropout });
    }

    /// Makes all weights what is trained, and so f32.
    pub fn train_all(&mut self) {
        self.weights.visit_mut(&mut |_, slot| {
            if let Slot::Matrix(tensor) = slot {
                *tensor = tensor.clone().cast(DType::F32);
            }
        });
        self.train(Trained::All);
    }

    fn train(&mut self, trained: Trained) {
        self.trained = trained;
        let mut layout = Layout::default();
        self.visit_trained(&mut |name, slot| match slot {
            Slot::Vector(tensor) => layout.push(name.to_owned(), tensor.dims().to_vec()),
            Slot::Matrix(tensor) => layout.push(name.to_owned(), tensor.dims().to_vec()),
        });
        self.layout = layout;
    }

    /// The LoRA branches, `None` where all weights (or none) are trained.
    pub fn lora_targets(&self) -> Option<&LoraTargets> {
        match &self.trained {
            Trained::Lora { targets, .. } => Some(targets),
            _ => None,
        }
    }

    /// The trained parameters in their order.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Calls the visitor with every trained tensor, in the order of the layout.
    pub(crate) fn visit_trained(&mut self, visitor: &mut dyn FnMut(&str, Slot<'_>)) {
        match &self.trained {
            Trained::Nothing => {}
            Trained::All => self.weights.visit_mut(visitor),
            Trained::Lora { .. } => {
                for linear in self.weights.layers.iter_mut().flat_map(|layer| layer.linears_mut()) {
                    if let Some(branch) = &mut linear.lora {
                        visitor(&adapter::file_name(&linear.name, "lora_A"), Slot::Matrix(&mut branch.a));
                        visitor(&adapter::file_name(&linear.name, "lora_B"), Slot::Matrix(&mut branch.b));
                    }
                }
            }
        }
    }

    /// The values of the trained parameters, [`Layout::len`] of them.
    pub fn parameters(&mut self) -> Result<Vec<f32>, ModelError> {
        let mut values = Vec::with_capacity(self.layout.len());
        let mut failed = None;
        self.visit_trained(&mut |_, slot| match slot.values() {
            Ok(more) => values.extend(more),
            Err(error) => failed = Some(error),
        });
        failed.map_or(Ok(values), Err)
    }

    /// Puts new values into the trained parameters.
    pub fn set_parameters(&mut self, values: &[f32]) {
        assert_eq!(values.len(), self.layout.len(), "values of another layout");
        let device = self.placement.device.clone();
        // A GPU gets all of them at once; each parameter is then a part of that.
        let all = (!is_cpu(&device)).then(|| Tensor::<1>::from_data(TensorData::from(values), &device));
        let mut start = 0;
        self.visit_trained(&mut |_, slot| {
            let len = slot.len();
            let part = match &all {
                Some(all) => all.clone().narrow(0, start, len),
                None => Tensor::from_data(TensorData::from(&values[start..start + len]), &device),
            };
            start += len;
            match slot {
                Slot::Vector(tensor) => *tensor = part.autodiff().require_grad(),
                Slot::Matrix(tensor) => *tensor = part.reshape(tensor.dims()).autodiff().require_grad(),
            }
        });
    }

    /// Σ loss of a micro-batch, without gradients or dropout.
    pub fn loss(&self, batch: &Batch<'_>) -> Result<LossSum, ModelError> {
        if batch.trained_tokens() == 0 {
            return Ok(LossSum { row_losses: vec![0.0; batch.rows.len()], ..LossSum::default() });
        }
        let context = self.context(batch, None);
        let h = decoder::hidden(&self.weights, &self.config, &flat_tokens(batch), &context);
        let h = operations::rms_norm(h, untracked(&self.weights.norm), self.config.rms_norm_eps);
        let losses = operations::linear_cross_entropy(h, untracked(self.weights.output()), targets(batch));
        sums(batch, losses)
    }

    pub(crate) fn context(&self, batch: &Batch<'_>, training: Option<Randomness>) -> Context {
        let lengths: Vec<usize> = batch.rows.iter().map(|row| row.tokens.len()).collect();
        let positions: Vec<u32> = lengths.iter().flat_map(|&length| 0..length as u32).collect();
        let dropout = match (&self.trained, training) {
            (Trained::Lora { dropout, .. }, Some(randomness)) if *dropout > 0.0 => {
                let ids = batch.rows.iter().flat_map(|row| std::iter::repeat_n(row.id, row.tokens.len()));
                Some(BatchDropout {
                    probability: *dropout as f32,
                    randomness,
                    tokens: ids.zip(positions.iter().copied()).collect(),
                })
            }
            _ => None,
        };
        Context {
            rope: RopeTable::new(&positions, &self.frequencies, 1.0),
            segments: Segments::rows(&lengths),
            compute: self.placement.compute(),
            training: training.is_some(),
            dropout,
        }
    }

    /// Logits [t, v] of one row, row-major: for tests, probes and comparisons.
    pub fn logits(&self, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
        self.check_tokens(tokens)?;
        let trained = vec![false; tokens.len()];
        let batch = Batch { rows: vec![BatchRow { id: 0, tokens, trained: &trained }] };
        let h = decoder::hidden(&self.weights, &self.config, tokens, &self.context(&batch, None));
        let h = operations::rms_norm(h, untracked(&self.weights.norm), self.config.rms_norm_eps);
        data(operations::linear(h, untracked(self.weights.output())))
    }

    pub(crate) fn check_tokens(&self, tokens: &[u32]) -> Result<(), ModelError> {
        let vocabulary = self.config.vocabulary;
        match tokens.iter().find(|&&token| token as usize >= vocabulary) {
            Some(&token) => Err(ModelError::Token { token, vocabulary }),
            None => Ok(()),
        }
    }
}

impl Slot<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Slot::Vector(tensor) => tensor.dims().iter().product(),
            Slot::Matrix(tensor) => tensor.dims().iter().product(),
        }
    }

    fn values(self) -> Result<Vec<f32>, ModelError> {
        match self {
            Slot::Vector(tensor) => data(tensor.clone().inner()),
            Slot::Matrix(tensor) => data(tensor.clone().inner()),
        }
    }
}

/// The tensor outside of any graph.
pub(crate) fn untracked<const D: usize>(tensor: &Tensor<D>) -> Tensor<D> {
    tensor.clone().inner()
}

/// The elements in row-major order, as f32. On a GPU this waits for all that the tensor depends on, and is where its errors
/// come out.
pub(crate) fn data<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>, ModelError> {
    let device = tensor.device();
    // A read may be put off until the values are looked at, so each of these can fail for the device.
    let failed = |error: &dyn std::fmt::Display| ModelError::device(error.to_string());
    let data = tensor.try_into_data().map_err(|error| failed(&error))?;
    let data = data.try_cast_as::<f32>().map_err(|error| failed(&error))?;
    let values = data.try_into_vec::<f32>().map_err(|error| failed(&error))?;
    match dropped_work(&device) {
        Some(what) => Err(ModelError::Device { what }),
        None => Ok(values),
    }
}

pub(crate) fn flat_tokens(batch: &Batch<'_>) -> Vec<u32> {
    batch.rows.iter().flat_map(|row| row.tokens).copied().collect()
}

/// Token i of a row is predicted from position i - 1.
pub(crate) fn targets(batch: &Batch<'_>) -> Targets {
    let (mut positions, mut tokens) = (Vec::new(), Vec::new());
    let mut start = 0;
    for row in &batch.rows {
        for i in (1..row.tokens.len()).filter(|&i| row.trained[i]) {
            positions.push(start + i as u32 - 1);
            tokens.push(row.tokens[i]);
        }
        start += row.tokens.len() as u32;
    }
    Targets::new(positions, tokens)
}

pub(crate) fn sums(batch: &Batch<'_>, losses: Tensor<1>) -> Result<LossSum, ModelError> {
    let losses = data(losses.inner())?;
    let mut rest = losses.as_slice();
    let row_losses: Vec<f64> = batch
        .rows
        .iter()
        .map(|row| {
            let (now, later) = rest.split_at(row.trained.iter().skip(1).filter(|&&t| t).count());
            rest = later;
            now.iter().map(|&loss| f64::from(loss)).sum()
        })
        .collect();
    Ok(LossSum { loss: row_losses.iter().sum(), trained_tokens: losses.len() as u64, row_losses })
}
