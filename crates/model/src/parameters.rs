//! Which parameters of a model are trained: LoRA branches or all weights, their values and their
//! order.

use burn::tensor::{DType, Tensor, TensorData};
use finetune_kernels::devices::is_cpu;
use finetune_random::Stream;

use crate::error::ModelError;
use crate::layout::Layout;
use crate::lora::LoraTargets;
use crate::model::{Model, Trained};
use crate::random_stream::RandomStream;
use crate::readback::data;
use crate::tree::{LoraBranch, Matrix, Slot, linear_modules};

impl Model {
    /// Names of all linear layers inside the decoder, in model order: what LoRA can target.
    pub fn linear_modules(&self) -> Vec<String> {
        linear_modules(&self.config)
    }

    /// Gives these modules LoRA branches, and makes the branches what is trained. A has PEFT's
    /// initialization from `seed`: kaiming uniform with a = sqrt 5, which is U(±1/sqrt inputs). B
    /// is zero. `dropout` is the probability that an element of a branch's input is dropped in
    /// training.
    pub fn add_lora(&mut self, targets: LoraTargets, dropout: f64, seed: u64) {
        let device = self.placement.device.clone();
        for linear in self.weights.linears() {
            let Some(target) = targets.iter().find(|target| target.module == linear.module) else { continue };
            let [outputs, inputs] = linear.weight.shape;
            let bound = 1.0 / (inputs as f32).sqrt();
            let stream = Stream::new(seed, RandomStream::Adapter as u32, 0, linear.index);
            let matrix = |half: &str, shape: [usize; 2], values: Tensor<2>| {
                let mut matrix = Matrix::new(file_name(&linear.module, half), shape);
                matrix.set(values);
                matrix
            };
            let (a, b) = ([target.rank, inputs], [outputs, target.rank]);
            let uniform = TensorData::new(stream.uniform(target.rank * inputs, bound), a);
            linear.lora = Some(LoraBranch {
                a: matrix("lora_A", a, Tensor::from_data(uniform, &device)),
                b: matrix("lora_B", b, Tensor::zeros(b, &device)),
                scale: target.scale(),
            });
        }
        self.train(Trained::Lora { targets, dropout });
    }

    /// Makes all weights what is trained, and so f32.
    pub fn train_all(&mut self) {
        for slot in self.weights.slots() {
            if let Slot::Matrix(matrix) = slot {
                matrix.set(matrix.dense().clone().cast(DType::F32));
            }
        }
        self.train(Trained::All);
    }

    /// Sets what is trained, and its layout.
    fn train(&mut self, trained: Trained) {
        self.trained = trained;
        let mut layout = Layout::default();
        for slot in self.trained() {
            layout.push(slot.name().to_owned(), slot.shape());
            match slot {
                Slot::Vector(vector) => vector.set(vector.values().clone().inner().autodiff().require_grad()),
                Slot::Matrix(matrix) => matrix.set(matrix.dense().clone().inner().autodiff().require_grad()),
            }
        }
        self.layout = layout;
    }

    /// The LoRA branches; `None` if all weights are trained, or none.
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

    /// Every trained tensor, in the order of the layout.
    pub(crate) fn trained(&mut self) -> Vec<Slot<'_>> {
        match &self.trained {
            Trained::Nothing => Vec::new(),
            Trained::All => self.weights.parameters(),
            Trained::Lora { .. } => {
                let branches = self.weights.linears().filter_map(|linear| linear.lora.as_mut());
                branches.flat_map(|branch| [&mut branch.a, &mut branch.b]).map(Slot::Matrix).collect()
            }
        }
    }

    /// The values of the trained parameters, [`Layout::len`] of them, in f32.
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

    /// Puts new values into the trained parameters.
    ///
    /// # Panics
    /// If `values` do not have the layout's length.
    pub fn set_parameters(&mut self, values: &[f32]) {
        assert_eq!(values.len(), self.layout.len(), "values of another layout");
        let device = self.placement.device.clone();
        // A GPU gets all values at once. Each parameter is then a part of that tensor.
        let all = (!is_cpu(&device)).then(|| Tensor::<1>::from_data(TensorData::from(values), &device));
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
    }
}

/// The name in PEFT's file of a module's `lora_A` or `lora_B`.
pub(crate) fn file_name(module: &str, half: &str) -> String {
    format!("base_model.model.{module}.{half}.weight")
}
