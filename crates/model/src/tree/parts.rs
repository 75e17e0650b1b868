//! The walk over the tree: the parts of a layer and their tensors, in model order.

use super::{
    Attention, Beside, Decoder, DeltaInputs, DeltaNet, Experts, FeedForward, FusedGated, Gated, LatentAttention,
    LatentQueries, Layer, Linear, Matrix, Mixer, Norm, OwnInput, Projections, ShortConvolution, Vector,
};
use crate::branch::{GateUp, LoraBranch, Place};

/// A tensor of the tree that can be described or filled.
pub(crate) enum Slot<'a> {
    Vector(&'a mut Vector),
    Matrix(&'a mut Matrix),
}

impl Slot<'_> {
    pub(crate) fn name(&self) -> &str {
        match self {
            Slot::Vector(vector) => &vector.name,
            Slot::Matrix(matrix) => &matrix.name,
        }
    }

    pub(crate) fn shape(&self) -> Vec<usize> {
        match self {
            Slot::Vector(vector) => vec![vector.length],
            Slot::Matrix(matrix) => matrix.shape.to_vec(),
        }
    }

    /// The number of elements.
    pub(crate) fn len(&self) -> usize {
        self.shape().iter().product()
    }
}

/// Where in a model a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Home {
    /// Before the first layer.
    Beginning,
    /// In this layer.
    Layer(usize),
    /// Behind the last layer.
    End,
}

/// A norm, a linear layer or another vector of a layer.
enum Part<'a> {
    Norm(&'a mut Norm),
    Vector(&'a mut Vector),
    Linear(&'a mut Linear),
    /// A linear layer whose branch is another's too.
    Half(&'a mut Linear),
    Both(&'a mut GateUp),
}

/// The base tensors of a part, and those of its branch.
type Slots<'a> = (Vec<Slot<'a>>, Vec<Slot<'a>>);
/// The same of a model, with the places of the tensors.
type HomedSlots<'a> = (Vec<(Home, Slot<'a>)>, Vec<(Home, Slot<'a>)>);

/// Adds the tensors of a part of a model.
fn add<'a>(all: &mut HomedSlots<'a>, home: Home, (base, branches): Slots<'a>) {
    all.0.extend(base.into_iter().map(|slot| (home, slot)));
    all.1.extend(branches.into_iter().map(|slot| (home, slot)));
}

impl<'a> Part<'a> {
    fn slots(self) -> Slots<'a> {
        match self {
            Part::Norm(norm) => (vec![Slot::Vector(&mut norm.gamma)], Vec::new()),
            Part::Vector(vector) => (vec![Slot::Vector(vector)], Vec::new()),
            Part::Both(GateUp { lora, .. }) => (Vec::new(), branch_slots(lora)),
            Part::Linear(Linear { weight, bias, lora, .. }) | Part::Half(Linear { weight, bias, lora, .. }) => {
                let bias = bias.as_mut().map(Slot::Vector);
                (std::iter::once(Slot::Matrix(weight)).chain(bias).collect(), branch_slots(lora))
            }
        }
    }
}

fn branch_slots(branch: &mut Option<LoraBranch>) -> Vec<Slot<'_>> {
    branch.as_mut().map(LoraBranch::slots).unwrap_or_default()
}

impl Attention {
    fn parts(&mut self) -> Vec<Part<'_>> {
        let mut parts: Vec<Part<'_>> = match &mut self.projections {
            Projections::Apart { q, k, v } => [q, k].into_iter().chain(v).map(Part::Linear).collect(),
            Projections::Queries { q, .. } => vec![Part::Linear(q)],
            Projections::Fused(qkv) => vec![Part::Linear(qkv)],
        };
        parts.push(Part::Linear(&mut self.o));
        parts.extend(self.gate.as_mut().map(Part::Linear));
        parts.extend(self.sinks.as_mut().map(Part::Vector));
        parts.extend([self.q_norm.as_mut(), self.k_norm.as_mut()].into_iter().flatten().map(Part::Norm));
        parts
    }
}

impl LatentAttention {
    fn parts(&mut self) -> Vec<Part<'_>> {
        let mut parts = match &mut self.queries {
            LatentQueries::Direct(q) => vec![Part::Linear(q)],
            LatentQueries::Compressed { down, norm, up } => {
                vec![Part::Linear(down), Part::Norm(norm), Part::Linear(up)]
            }
        };
        parts.push(Part::Linear(&mut self.down));
        parts.push(Part::Norm(&mut self.norm));
        parts.extend([&mut self.up, &mut self.o].map(Part::Linear));
        parts
    }
}

impl ShortConvolution {
    fn parts(&mut self) -> Vec<Part<'_>> {
        let linears = [&mut self.input, &mut self.out].map(Part::Linear);
        let vectors = std::iter::once(&mut self.kernel).chain(&mut self.bias).map(Part::Vector);
        linears.into_iter().chain(vectors).collect()
    }
}

impl DeltaNet {
    fn parts(&mut self) -> Vec<Part<'_>> {
        let mut linears: Vec<Part<'_>> = match &mut self.inputs {
            DeltaInputs::Apart { qkv, z, b, a } => [qkv, z, b, a].map(Part::Linear).into(),
            DeltaInputs::Grouped { qkvz, ba } => [qkvz, ba].map(Part::Linear).into(),
        };
        linears.push(Part::Linear(&mut self.out));
        let vectors = [&mut self.convolution, &mut self.decay, &mut self.bias].map(Part::Vector);
        linears.into_iter().chain(vectors).chain([Part::Norm(&mut self.norm)]).collect()
    }
}

impl Gated {
    fn parts(&mut self) -> Vec<Part<'_>> {
        let Gated { gate, up, gate_up, down, .. } = self;
        match gate_up {
            None => [gate, up, down].map(Part::Linear).into(),
            Some(both) => vec![Part::Half(gate), Part::Half(up), Part::Both(both), Part::Linear(down)],
        }
    }
}

impl FusedGated {
    fn parts(&mut self) -> Vec<Part<'_>> {
        [&mut self.gate_up, &mut self.down].map(Part::Linear).into()
    }
}

impl Experts {
    fn parts(&mut self) -> Vec<Part<'_>> {
        let experts = self.experts.iter_mut().flat_map(Gated::parts);
        let shared = self.shared.as_mut().map(|(expert, gate)| {
            let mut parts = expert.parts();
            parts.extend(gate.as_mut().map(Part::Linear));
            parts
        });
        let router = std::iter::once(Part::Linear(&mut self.router));
        let correction = self.correction.as_mut().map(Part::Vector);
        let scales = self.scales.as_mut().map(Part::Vector);
        router.chain(correction).chain(scales).chain(experts).chain(shared.into_iter().flatten()).collect()
    }
}

impl Beside {
    fn parts(&mut self) -> Vec<Part<'_>> {
        let mut parts = self.dense.parts();
        parts.push(Part::Norm(&mut self.dense_norm));
        parts.push(Part::Norm(&mut self.router_norm));
        parts.extend(self.experts.parts());
        parts.extend(self.experts_norms.each_mut().map(Part::Norm));
        parts
    }
}

impl OwnInput {
    fn parts(&mut self) -> Vec<Part<'_>> {
        vec![Part::Linear(&mut self.gate), Part::Linear(&mut self.projection), Part::Norm(&mut self.norm)]
    }
}

impl Layer {
    /// The norms and linear layers, in the order of [`Decoder::slots`].
    fn parts(&mut self) -> Vec<Part<'_>> {
        let mixer = match &mut self.mixer {
            Mixer::Attention(attention) => attention.parts(),
            Mixer::Latent(attention) => attention.parts(),
            Mixer::Delta(net) => net.parts(),
            Mixer::Convolution(convolution) => convolution.parts(),
        };
        let feed_forward = match &mut self.feed_forward {
            FeedForward::Gated(gated) => gated.parts(),
            FeedForward::Fused(fused) => fused.parts(),
            FeedForward::Experts(experts) => experts.parts(),
            FeedForward::Beside(beside) => beside.parts(),
        };
        let mut parts: Vec<Part<'_>> = self.input_norm.as_mut().map(Part::Norm).into_iter().collect();
        parts.extend(mixer);
        parts.extend(self.mixer_norm.as_mut().map(Part::Norm));
        parts.extend(self.post_norm.as_mut().map(Part::Norm));
        parts.extend(feed_forward);
        parts.extend(self.feed_forward_norm.as_mut().map(Part::Norm));
        parts.extend(self.own_input.as_mut().map(OwnInput::parts).into_iter().flatten());
        parts.extend(self.scale.as_mut().map(Part::Vector));
        parts
    }

    /// The base tensors, in the order of [`Decoder::slots`].
    pub(crate) fn slots(&mut self) -> Vec<Slot<'_>> {
        self.parts().into_iter().flat_map(|part| part.slots().0).collect()
    }

    /// The linear layers, in the order of [`Decoder::linears`].
    pub(crate) fn linears(&mut self) -> Vec<&mut Linear> {
        let linear = |part| match part {
            Part::Linear(linear) | Part::Half(linear) => Some(linear),
            Part::Norm(_) | Part::Vector(_) | Part::Both(_) => None,
        };
        self.parts().into_iter().filter_map(linear).collect()
    }

    /// What may have a branch, in the order of [`Decoder::parameters`].
    pub(crate) fn places(&mut self) -> Vec<Place<'_>> {
        let place = |part| match part {
            Part::Linear(linear) => Some(Place::of(linear)),
            Part::Both(gate_up) => Some(Place::of_both(gate_up)),
            Part::Norm(_) | Part::Vector(_) | Part::Half(_) => None,
        };
        self.parts().into_iter().filter_map(place).collect()
    }
}

impl Decoder {
    /// Every base tensor in model order, which numbers the random streams of fresh weights.
    pub(crate) fn slots(&mut self) -> Vec<Slot<'_>> {
        self.slots_by(|_| 0).0.into_iter().map(|(_, slot)| slot).collect()
    }

    /// Every base tensor in the order of the parameters of full training, and every tensor of a
    /// branch in model order. As [`Decoder::slots`], but the norms of a layer come before its
    /// linear layers.
    pub(crate) fn parameters(&mut self) -> HomedSlots<'_> {
        self.slots_by(|part| match part {
            Part::Norm(_) | Part::Vector(_) => 0,
            Part::Linear(_) | Part::Half(_) | Part::Both(_) => 1,
        })
    }

    /// Every base tensor, and those of the branches. The parts of a layer are sorted by `rank`,
    /// stably.
    fn slots_by(&mut self, rank: fn(&Part<'_>) -> u8) -> HomedSlots<'_> {
        let mut all = (Vec::new(), Vec::new());
        let embedding = vec![Slot::Matrix(&mut self.embedding)];
        add(&mut all, Home::Beginning, (embedding, branch_slots(&mut self.embedding_lora)));
        for (n, layer) in self.layers.iter_mut().enumerate() {
            let mut parts = layer.parts();
            parts.sort_by_key(rank);
            parts.into_iter().for_each(|part| add(&mut all, Home::Layer(n), part.slots()));
        }
        if let Some(per_layer) = &mut self.per_layer {
            add(&mut all, Home::Beginning, (vec![Slot::Matrix(&mut per_layer.table)], Vec::new()));
            for part in [Part::Linear(&mut per_layer.projection), Part::Norm(&mut per_layer.norm)] {
                add(&mut all, Home::Beginning, part.slots());
            }
        }
        let output = self.head.output.as_mut().map(Slot::Matrix);
        let base = std::iter::once(Slot::Vector(&mut self.head.norm.gamma)).chain(output).collect();
        add(&mut all, Home::End, (base, branch_slots(&mut self.head.lora)));
        all
    }

    /// Every linear layer inside the decoder, in model order.
    pub(crate) fn linears(&mut self) -> impl Iterator<Item = &mut Linear> {
        let of_inputs = self.per_layer.as_mut().map(|per_layer| &mut per_layer.projection);
        self.layers.iter_mut().flat_map(Layer::linears).chain(of_inputs)
    }

    /// The output layer's matrix.
    pub(crate) fn output(&self) -> &Matrix {
        self.head.output.as_ref().unwrap_or(&self.embedding)
    }
}
