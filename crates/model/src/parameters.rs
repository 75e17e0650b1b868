//! Which parameters of a model are trained: an adapter's or all weights, their values and their
//! order.

use std::sync::OnceLock;

use burn::tensor::{Device, Tensor, TensorData};
use finetune_kernels::devices::is_cpu;

use crate::adaptation::{Adaptation, is_of_vocabulary};
use crate::error::ModelError;
use crate::files::wrapper::name_inside;
use crate::layout::Layout;
use crate::lora::LoraTargets;
use crate::model::{Model, Trained};
use crate::placement::Placement;
use crate::readback::data;
use crate::spread::Spread;
use crate::tree::{Home, Matrix, Slot, Vector, linear_modules};

impl Model {
    /// Names of all linear layers inside the decoder, in model order.
    pub fn linear_modules(&self) -> Vec<String> {
        linear_modules(&self.config)
    }

    /// Gives modules LoRA branches, and makes these and the modules that are trained in full what is
    /// trained. A has PEFT's initialization from `seed`: kaiming uniform with a = sqrt 5, which is
    /// U(±1/sqrt inputs). B is zero. On the embedding A is zero and B normal.
    ///
    /// # Errors
    /// If the device fails, a row of a weight cannot have a magnitude for DoRA, or what is trained in full cannot be read
    /// from its file.
    pub fn add_adapter(&mut self, adaptation: Adaptation, seed: u64) -> Result<(), ModelError> {
        if adaptation.saved.iter().any(|module| is_of_vocabulary(module)) {
            self.weights.untie();
        }
        let device = self.placement.device.clone();
        let has = has(&self.placement);
        self.weights.add_branches(&adaptation.targets, seed, &device, &has)?;
        self.weights.load_for_good(&has, |name| adaptation.saves(name))?;
        let (base, _) = self.weights.parameters();
        for (_, slot) in base.into_iter().filter(|(home, slot)| has(*home) && adaptation.saves(slot.name())) {
            widen(slot, &device)?;
        }
        self.train(Trained::Adapter(adaptation));
        Ok(())
    }

    /// Makes all weights what is trained, and so f32.
    ///
    /// # Panics
    /// If layers are read from the disk.
    pub fn train_all(&mut self) {
        assert!(!self.reads_layers(), "weights that are trained are in memory");
        let device = self.placement.device.clone();
        let widened = self.weights.slots().into_iter().try_for_each(|slot| widen(slot, &device));
        widened.expect("what is in memory is not read");
        self.train(Trained::All);
    }

    /// Sets what is trained, and its layout.
    fn train(&mut self, trained: Trained) {
        let is_adapter = matches!(trained, Trained::Adapter(_));
        let is_wrapped = self.config.is_named_inside();
        self.trained = trained;
        let stage = self.placement.stage().cloned();
        let mut spread = Spread::new(stage.as_ref().map_or(0, |stage| stage.mine));
        for (home, slot) in self.trained_anywhere() {
            let process = stage.as_ref().map_or(0, |stage| stage.process_of(home));
            spread.push(tensor_name(slot.name(), is_adapter, is_wrapped), slot.shape(), process);
            if process != spread.mine() {
                continue;
            }
            match slot {
                Slot::Vector(vector) => vector.set(vector.values().clone().inner().autodiff().require_grad()),
                Slot::Matrix(matrix) => matrix.set(matrix.dense().clone().inner().autodiff().require_grad()),
            }
        }
        (self.layout, self.spread) = (spread.own(), spread);
    }

    /// The LoRA branches; `None` if all weights are trained, or none.
    pub fn lora_targets(&self) -> Option<&LoraTargets> {
        match &self.trained {
            Trained::Adapter(adaptation) => Some(&adaptation.targets),
            _ => None,
        }
    }

    /// The trained parameters of this process in their order: all of them, unless several processes hold the layers
    /// of the model. Then each has those of its layers.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The trained parameters of all processes that hold the model together, and where each is.
    pub fn spread(&self) -> &Spread {
        &self.spread
    }

    /// Every trained tensor of this process, in the order of the layout.
    pub(crate) fn trained(&mut self) -> Vec<Slot<'_>> {
        let has = has(&self.placement);
        self.trained_anywhere().into_iter().filter(|(home, _)| has(*home)).map(|(_, slot)| slot).collect()
    }

    /// Every trained tensor. Those of other processes have no values here.
    fn trained_anywhere(&mut self) -> Vec<(Home, Slot<'_>)> {
        // They may get other values.
        self.branches = OnceLock::new();
        match &self.trained {
            Trained::Nothing => Vec::new(),
            Trained::All => self.weights.parameters().0,
            Trained::Adapter(adaptation) => {
                let (base, branches) = self.weights.parameters();
                branches.into_iter().chain(base.into_iter().filter(|(_, slot)| adaptation.saves(slot.name()))).collect()
            }
        }
    }

    /// The values of the trained parameters of this process, [`Layout::len`] of them, in f32.
    ///
    /// # Errors
    /// If the device fails.
    pub fn parameters(&mut self) -> Result<Vec<f32>, ModelError> {
        let mut values = Vec::with_capacity(self.layout.len());
        for slot in self.trained() {
            values.extend(match slot {
                Slot::Vector(vector) => data(vector.values().clone().inner()),
                Slot::Matrix(matrix) => data(matrix.dense().clone().inner()),
            }?);
        }
        Ok(values)
    }

    /// Puts new values into the trained parameters of this process.
    ///
    /// # Panics
    /// If `values` do not have the layout's length.
    pub fn set_parameters(&mut self, values: &[f32]) {
        assert_eq!(values.len(), self.layout.len(), "values of another layout");
        let device = self.placement.device.clone();
        // A GPU gets all values at once. Each parameter is then a part of that tensor.
        let all =
            (!is_cpu(&device) && !values.is_empty()).then(|| Tensor::<1>::from_data(TensorData::from(values), &device));
        let mut start = 0;
        for slot in self.trained() {
            let len = slot.len();
            let part = match &all {
                Some(all) => all.clone().narrow(0, start, len),
                None => Tensor::from_data(TensorData::from(&values[start..start + len]), &device),
            };
            start += len;
            match slot {
                Slot::Vector(vector) => vector.set(part.autodiff().require_grad()),
                Slot::Matrix(matrix) => matrix.set(part.reshape(matrix.shape).autodiff().require_grad()),
            }
        }
        self.weights.update_norms();
    }

    /// Of values of all parameters that are whole, in their order, those that this process has.
    ///
    /// # Panics
    /// If they are values of another layout.
    pub(crate) fn own_of(&mut self, values: &[f32]) -> Vec<f32> {
        let (mut kept, mut rest) = (Vec::with_capacity(self.layout.len()), values);
        let has = has(&self.placement);
        for (home, slot) in self.trained_anywhere() {
            let whole = match &slot {
                Slot::Vector(vector) => vector.whole_length(),
                Slot::Matrix(matrix) => matrix.whole_shape().iter().product(),
            };
            let (own, later) = rest.split_at(whole);
            rest = later;
            if !has(home) {
                continue;
            }
            match slot {
                Slot::Vector(Vector { cut: Some(cut), .. }) => kept.extend(cut.of(own)),
                Slot::Matrix(Matrix { cut: Some(cut), .. }) => kept.extend(cut.of(own)),
                _ => kept.extend_from_slice(own),
            }
        }
        assert!(rest.is_empty(), "values of another layout");
        kept
    }
}

/// Which parts of a model are trained by the process of this placement.
fn has(placement: &Placement) -> impl Fn(Home) -> bool + use<> {
    let stage = placement.stage().cloned();
    move |home| stage.as_ref().is_none_or(|stage| stage.process_of(home) == stage.mine)
}

/// Makes the values of a matrix f32, as trained parameters are. A packed one is decoded.
///
/// # Errors
/// If it stays in its file, and cannot be read.
fn widen(slot: Slot<'_>, device: &Device) -> Result<(), ModelError> {
    if let Slot::Matrix(matrix) = slot {
        matrix.set(matrix.in_f32(device)?);
    }
    Ok(())
}

/// The name in PEFT's file of a part of a module's branch. The parts of the embedding's branch, and
/// magnitudes, are parameters and no modules: their names do not end in `weight`.
pub(crate) fn file_name(module: &str, part: &str) -> String {
    let end = if ["lora_A", "lora_B"].contains(&part) { ".weight" } else { "" };
    format!("{PREFIX}{module}.{part}{end}")
}

/// What names begin with in PEFT's files.
pub(crate) const PREFIX: &str = "base_model.model.";

/// The name of a trained tensor in the files: in those of an adapter, as PEFT has it. `is_wrapped`:
/// whether the model is the text model of a multimodal one, whose name for it counts.
pub(crate) fn tensor_name(name: &str, is_adapter: bool, is_wrapped: bool) -> String {
    let module = name.strip_prefix(PREFIX).unwrap_or(name);
    match (is_adapter, is_wrapped) {
        (false, _) => name.to_owned(),
        (true, false) => format!("{PREFIX}{module}"),
        (true, true) => format!("{PREFIX}{}", name_inside(module)),
    }
}
