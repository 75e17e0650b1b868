//! A LoRA branch of a layer, its magnitudes if it is a DoRA branch, and the places that may have
//! one.

use burn::tensor::{Device, Tensor, TensorData};
use finetune_kernels::{Weight, weight};
use finetune_random::Stream;

use crate::error::ModelError;
use crate::lora::LoraTarget;
use crate::parameters::file_name;
use crate::random_stream::RandomStream;
use crate::readback::data;
use crate::slice::{Along, Cut, VectorCut};
use crate::tree::{Decoder, Home, Linear, Matrix, Slot, Vector};

/// `scale · drop(x) Aᵀ Bᵀ`
#[derive(Clone, Debug)]
pub(crate) struct LoraBranch {
    /// [r, i]; of the embedding [r, v]
    pub(crate) a: Matrix,
    /// [o, r]; of the embedding [hidden, r]
    pub(crate) b: Matrix,
    /// alpha / r, or alpha / sqrt(r) with rsLoRA.
    pub(crate) scale: f32,
    /// `None`: plain LoRA.
    pub(crate) dora: Option<Dora>,
}

/// DoRA (Liu et al. 2024): each output of `W + scale · B A` is scaled to a trained magnitude.
#[derive(Clone, Debug)]
pub(crate) struct Dora {
    /// [o]
    pub(crate) magnitude: Vector,
    /// Norms of the rows of `W + scale · B A`, [o]. They follow the values of A and B, and are
    /// constants of the backward pass, as in PEFT.
    pub(crate) norms: Tensor<1>,
}

/// The branch that gate and up of an expert have together. In B their outputs take turns, as they do in
/// the parameter that PEFT gives this branch (gpt-oss).
#[derive(Clone, Debug)]
pub(crate) struct GateUp {
    /// Such as `model.layers.0.mlp.experts.3.gate_up_proj`.
    pub(crate) module: String,
    /// Keys the random numbers of the branch.
    pub(crate) index: u32,
    /// [2 f, hidden]: absent, as the matrices of gate and up are there.
    pub(crate) weight: Matrix,
    pub(crate) lora: Option<LoraBranch>,
}

/// A layer that may have a branch.
pub(crate) struct Place<'a> {
    /// Such as `model.layers.0.self_attn.q_proj`.
    pub(crate) module: &'a str,
    /// Keys the random numbers of the branch.
    pub(crate) index: u32,
    /// [o, i]; of the embedding [v, hidden]
    pub(crate) weight: &'a Matrix,
    /// Whether this is the embedding, whose branch maps tokens to the hidden size.
    pub(crate) is_embedding: bool,
    pub(crate) lora: &'a mut Option<LoraBranch>,
}

/// The name of the part of a branch that DoRA adds.
const MAGNITUDE: &str = "lora_magnitude_vector";
/// The name of the embedding's module.
pub(crate) const EMBEDDING: &str = "model.embed_tokens";
/// The name of the output layer's module.
pub(crate) const OUTPUT: &str = "lm_head";

impl<'a> Place<'a> {
    pub(crate) fn of(linear: &'a mut Linear) -> Place<'a> {
        let Linear { module, index, weight, lora, .. } = linear;
        Place { module, index: *index, weight, is_embedding: false, lora }
    }

    pub(crate) fn of_both(gate_up: &'a mut GateUp) -> Place<'a> {
        let GateUp { module, index, weight, lora } = gate_up;
        Place { module, index: *index, weight, is_embedding: false, lora }
    }

    /// The outputs and the inputs of a branch here.
    pub(crate) fn sizes(&self) -> (usize, usize) {
        let [rows, columns] = self.weight.shape;
        if self.is_embedding { (columns, rows) } else { (rows, columns) }
    }
}

impl LoraBranch {
    /// The branch of a layer that another process computes: names and shapes, without values.
    fn absent(place: &Place<'_>, target: &LoraTarget, device: &Device) -> LoraBranch {
        let (outputs, inputs) = place.sizes();
        let halves = if place.is_embedding { ["lora_embedding_A", "lora_embedding_B"] } else { ["lora_A", "lora_B"] };
        let [a, b] = halves.map(|half| file_name(place.module, half));
        let magnitude = || Vector::new(file_name(place.module, MAGNITUDE), outputs, 1.0);
        let mut branch = LoraBranch {
            a: Matrix::new(a, [target.rank, inputs]),
            b: Matrix::new(b, [outputs, target.rank]),
            scale: target.scale(),
            dora: target.use_dora.then(|| Dora { magnitude: magnitude(), norms: Tensor::zeros([1], device) }),
        };
        branch.cut_as(place.weight);
        branch
    }

    /// A fresh branch as PEFT initializes it. A is U(±1/sqrt inputs), B zero. On the embedding A is
    /// zero and B normal. It has no magnitudes yet.
    fn fresh(place: &Place<'_>, target: &LoraTarget, seed: u64, device: &Device) -> LoraBranch {
        let mut branch = LoraBranch { dora: None, ..LoraBranch::absent(place, target, device) };
        let stream = Stream::new(seed, RandomStream::Adapter as u32, 0, place.index);
        let (a, b) = (branch.a.shape, branch.b.shape);
        let drawn =
            |values: Vec<f32>, shape: [usize; 2]| Tensor::<2>::from_data(TensorData::new(values, shape), device);
        let (a_values, b_values) = if place.is_embedding {
            (Tensor::zeros(a, device), drawn(stream.normal(b[0] * b[1], 1.0), b))
        } else {
            let uniform = stream.uniform(a[0] * a[1], 1.0 / (a[1] as f32).sqrt());
            (drawn(uniform, a), Tensor::zeros(b, device))
        };
        branch.a.set(a_values);
        branch.b.set(b_values);
        branch
    }

    /// Notes which part of a whole branch this is, if the weight is a part: rows of B for some of the outputs,
    /// columns of A for some of the inputs.
    fn cut_as(&mut self, weight: &Matrix) {
        let Some(Cut { whole: [outputs, inputs], along }) = weight.cut.clone() else { return };
        let rank = self.a.shape[0];
        match along {
            Along::Rows(_) => self.b.keep(Cut { whole: [outputs, rank], along }),
            Along::Columns(_) => self.a.keep(Cut { whole: [rank, inputs], along }),
        }
    }

    /// The trained tensors: A, B, and the magnitudes of DoRA.
    pub(crate) fn slots(&mut self) -> Vec<Slot<'_>> {
        let magnitude = self.dora.as_mut().map(|dora| Slot::Vector(&mut dora.magnitude));
        [Slot::Matrix(&mut self.a), Slot::Matrix(&mut self.b)].into_iter().chain(magnitude).collect()
    }

    /// Norms of the rows of the weight with this branch, [o].
    fn norms(&self, matrix: &Matrix) -> Tensor<1> {
        let plain = |matrix: &Matrix| matrix.dense().clone().inner();
        let frozen = match matrix.weight() {
            Weight::Dense(tensor) => Weight::Dense(tensor.clone().inner()),
            Weight::Packed(packed) => Weight::Packed(packed.clone()),
        };
        weight::merged_norms(frozen, plain(&self.a), plain(&self.b), self.scale)
    }

    /// Brings the norms of DoRA, if the branch has it, up to date with the values of A and B.
    pub(crate) fn update_norms(&mut self, weight: &Matrix) {
        let norms = self.dora.is_some().then(|| self.norms(weight));
        if let (Some(dora), Some(norms)) = (&mut self.dora, norms) {
            dora.norms = norms;
        }
    }

    /// Gives the branch magnitudes, which begin at the norms: the layer computes what it did.
    fn add_magnitudes(&mut self, place: (&str, &Matrix)) -> Result<(), ModelError> {
        let (module, weight) = place;
        let norms = self.norms(weight);
        if let Some(row) = data(norms.clone())?.iter().position(|&norm| !(norm.is_finite() && norm > 0.0)) {
            let what = format!("row {row} of `{}` has no direction: its numbers are zero or too large", weight.name);
            return Err(ModelError::Lora { key: "use_dora", what });
        }
        let mut magnitude = Vector::new(file_name(module, MAGNITUDE), weight.shape[0], 1.0);
        if let Some(Cut { whole: [outputs, _], along: Along::Rows(ranges) }) = &weight.cut {
            magnitude.keep(VectorCut::Ranges { whole: *outputs, ranges: ranges.clone() });
        }
        magnitude.set(norms.clone());
        self.dora = Some(Dora { magnitude, norms });
        Ok(())
    }
}

impl Decoder {
    /// Every layer that may have a branch, in model order: the embedding, the linear layers, the
    /// output layer.
    pub(crate) fn places(&mut self) -> Vec<Place<'_>> {
        self.placed().into_iter().map(|(_, place)| place).collect()
    }

    /// The same, and where in the model each of them is.
    pub(crate) fn placed(&mut self) -> Vec<(Home, Place<'_>)> {
        let Decoder { embedding, embedding_lora, layers, per_layer, head, .. } = self;
        let of_inputs = per_layer.as_mut().map(|per_layer| &mut per_layer.projection);
        let embedding: &Matrix = embedding;
        let output: &Matrix = head.output.as_ref().unwrap_or(embedding);
        let index = head.index;
        let embedding =
            Place { module: EMBEDDING, index: index + 1, weight: embedding, is_embedding: true, lora: embedding_lora };
        let output = Place { module: OUTPUT, index, weight: output, is_embedding: false, lora: &mut head.lora };
        let mut all = vec![(Home::Beginning, embedding)];
        for (n, layer) in layers.iter_mut().enumerate() {
            all.extend(layer.places().into_iter().map(|place| (Home::Layer(n), place)));
        }
        all.extend(of_inputs.map(|linear| (Home::Beginning, Place::of(linear))));
        all.push((Home::End, output));
        all
    }

    /// Gives these modules fresh branches, on the model's device. Branches of parts that this process does not have
    /// are without values.
    ///
    /// # Errors
    /// If the device fails, or a row of a weight cannot have a magnitude.
    pub(crate) fn add_branches(
        &mut self,
        targets: &[LoraTarget],
        seed: u64,
        device: &Device,
        has: &dyn Fn(Home) -> bool,
    ) -> Result<(), ModelError> {
        for (home, place) in self.placed() {
            let Some(target) = targets.iter().find(|target| target.module == place.module) else { continue };
            if !has(home) {
                *place.lora = Some(LoraBranch::absent(&place, target, device));
                continue;
            }
            let mut branch = LoraBranch::fresh(&place, target, seed, device);
            if target.use_dora && !place.weight.is_absent() {
                branch.add_magnitudes((place.module, place.weight))?;
            }
            *place.lora = Some(branch);
        }
        let of_dora = |module: &str| targets.iter().any(|target| target.module == module && target.use_dora);
        if self.source.is_some() && targets.iter().any(|target| target.use_dora) {
            let own: Vec<usize> = (0..self.layers.len()).filter(|&n| has(Home::Layer(n))).collect();
            self.add_magnitudes_of_absent(&own, of_dora)?;
        }
        Ok(())
    }

    /// Gives the branches of these modules in these layers magnitudes, where their weights are not in memory.
    fn add_magnitudes_of_absent(&mut self, own: &[usize], of_dora: impl Fn(&str) -> bool) -> Result<(), ModelError> {
        for (place, &n) in own.iter().enumerate() {
            let mut read = self.layer(n, Some(own[(place + 1) % own.len()]))?.into_owned();
            for (linear, read) in self.layers[n].linears().into_iter().zip(read.linears()) {
                if let Some(branch) = &mut linear.lora
                    && linear.weight.is_absent()
                    && of_dora(&linear.module)
                {
                    branch.add_magnitudes((&linear.module, &read.weight))?;
                }
            }
        }
        Ok(())
    }

    /// Brings the norms of DoRA up to date with the values of A and B. Those of a weight that is not in memory
    /// are when it is read.
    pub(crate) fn update_norms(&mut self) {
        for place in self.places() {
            if let Some(branch) = place.lora
                && !place.weight.is_absent()
            {
                branch.update_norms(place.weight);
            }
        }
    }
}
