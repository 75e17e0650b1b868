//! Gradients of what layers hand to each other, in a backward pass that goes layer by layer.

use std::collections::BTreeMap;

use burn::tensor::{Gradients, Tensor};
use finetune_kernels::operations;

use crate::decoder::between::{Between, KeysAndValues, source_of};
use crate::tree::Decoder;

/// What the layers have handed to each other, and the gradients of that so far.
pub(crate) struct Handed {
    /// The layer whose keys and values each layer uses.
    source_of: Vec<Option<usize>>,
    /// Keys and values that later layers use, and their gradients once one of those has been differentiated.
    made: BTreeMap<usize, (KeysAndValues, Option<KeysAndValues>)>,
    /// The layers' own inputs, and their gradients.
    inputs: Vec<Tensor<2>>,
    of_inputs: Vec<Option<Tensor<2>>>,
}

/// What one layer takes, as leaves of a graph of its own.
pub(crate) struct Leaves {
    pub(crate) between: Between,
    taken: Option<KeysAndValues>,
    input: Option<Tensor<2>>,
}

fn leaf<const D: usize>(tensor: &Tensor<D>) -> Tensor<D> {
    tensor.clone().autodiff().require_grad()
}

impl Handed {
    /// `between`: of a pass without gradients.
    pub(crate) fn new(weights: &Decoder, between: &Between) -> Handed {
        let made = between.left().into_iter().map(|(n, made)| (n, (made, None))).collect();
        let inputs = between.inputs.clone();
        Handed {
            source_of: weights.layers.iter().map(|layer| source_of(&layer.mixer)).collect(),
            made,
            of_inputs: vec![None; inputs.len()],
            inputs,
        }
    }

    /// What layer `n` takes.
    pub(crate) fn leaves(&self, n: usize) -> Leaves {
        let source = self.source_of[n].and_then(|source| Some((source, &self.made.get(&source)?.0)));
        let taken = source.map(|(source, made)| (source, made.each_ref().map(leaf)));
        let input = self.inputs.get(n).map(leaf);
        let is_source = self.made.contains_key(&n);
        let between = Between::of_layer(n, is_source, taken.clone(), input.clone().into_iter().collect());
        Leaves { between, taken: taken.map(|(_, made)| made), input }
    }

    /// Adds to the seed of layer `n` those of the keys and values that it has made for later ones.
    pub(crate) fn seeded(&self, n: usize, seed: Tensor<1>, between: &Between) -> Tensor<1> {
        let Some((_, Some(gradients))) = self.made.get(&n) else { return seed };
        let made = between.left().remove(&n).expect("the layer has left them");
        made.into_iter().zip(gradients).fold(seed, |seed, (made, gradient)| {
            let [tokens, heads, width] = made.dims();
            let flat = |tensor: Tensor<3>| tensor.reshape([tokens, heads * width]);
            seed + operations::gradient_seed(flat(made), flat(gradient.clone()))
        })
    }

    /// Takes the gradients of what layer `n` took.
    pub(crate) fn take(&mut self, n: usize, leaves: &Leaves, found: &mut Gradients) {
        if let (Some(taken), Some(source)) = (&leaves.taken, self.source_of[n]) {
            let [k, v] = taken.each_ref().map(|leaf| leaf.grad_remove(found).expect("attention uses them"));
            let (_, sum) = self.made.get_mut(&source).expect("the source of the layer");
            *sum = Some(match sum.take() {
                None => [k, v],
                Some([sum_k, sum_v]) => [sum_k + k, sum_v + v],
            });
        }
        if let Some(input) = &leaves.input {
            self.of_inputs[n] = input.grad_remove(found);
        }
    }

    /// The seed of what makes the inputs that layers have of their own, beside that of the embeddings.
    pub(crate) fn seeded_inputs(&self, seed: Option<Tensor<1>>, between: &Between) -> Tensor<1> {
        let of_inputs = between.inputs.iter().zip(&self.of_inputs);
        let seeds =
            of_inputs.filter_map(|(input, gradient)| Some(operations::gradient_seed(input.clone(), gradient.clone()?)));
        seed.into_iter().chain(seeds).reduce(|sum, seed| sum + seed).expect("something is differentiated")
    }
}
