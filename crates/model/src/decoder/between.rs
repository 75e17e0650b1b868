//! What layers hand to each other beside the residual stream: keys and values that later layers use too, and
//! the inputs that each layer has of its own.

use std::collections::BTreeMap;

use burn::tensor::Tensor;

use crate::decoder::pass::{Context, linear, norm};
use crate::tree::{Decoder, Mixer, PerLayer, Projections};

/// Keys and values [s, k, d].
pub(crate) type KeysAndValues = [Tensor<3>; 2];

/// What layers hand to each other in a pass.
#[derive(Default)]
pub(crate) struct Between {
    /// The layers whose keys and values are used by later ones, and what they made.
    made: BTreeMap<usize, Option<KeysAndValues>>,
    /// [t, width] of each layer, in their order.
    pub(crate) inputs: Vec<Tensor<2>>,
}

impl Between {
    /// For a pass over whole tokens. `embedded`: their embeddings, which are scaled; `rows`: the tokens' rows of
    /// the table, [t, layers · width].
    pub(crate) fn new(weights: &Decoder, embedded: &Tensor<2>, rows: Option<Tensor<2>>, context: &Context) -> Between {
        let sources = sources(weights).map(|source| (source, None)).collect();
        let inputs = match (&weights.per_layer, rows) {
            (Some(per_layer), Some(rows)) => inputs(per_layer, embedded.clone(), rows, context),
            _ => Vec::new(),
        };
        Between { made: sources, inputs }
    }

    /// What an earlier layer has made.
    pub(crate) fn keys_and_values(&self, source: usize) -> KeysAndValues {
        self.made.get(&source).cloned().flatten().expect("the earlier layer has run")
    }

    /// Leaves what layer `n` made, if later ones use it.
    pub(crate) fn leave(&mut self, n: usize, made: &KeysAndValues) {
        if let Some(place) = self.made.get_mut(&n) {
            *place = Some(made.clone());
        }
    }

    /// What the layers have left, by their numbers.
    pub(crate) fn left(&self) -> BTreeMap<usize, KeysAndValues> {
        self.made.iter().filter_map(|(n, made)| Some((*n, made.clone()?))).collect()
    }

    /// The input of layer `n`.
    pub(crate) fn input_of(&self, n: usize) -> Tensor<2> {
        // Of a pass over one layer alone there is only that one's.
        let place = if self.inputs.len() == 1 { 0 } else { n };
        self.inputs[place].clone()
    }

    /// For one layer alone, with what it takes from earlier ones and its own input.
    pub(crate) fn of_layer(
        n: usize,
        is_source: bool,
        taken: Option<(usize, KeysAndValues)>,
        inputs: Vec<Tensor<2>>,
    ) -> Between {
        let own = is_source.then_some((n, None));
        let made = own.into_iter().chain(taken.map(|(source, made)| (source, Some(made)))).collect();
        Between { made, inputs }
    }
}

/// The layers whose keys and values later ones use.
pub(crate) fn sources(weights: &Decoder) -> impl Iterator<Item = usize> + '_ {
    weights.layers.iter().filter_map(|layer| source_of(&layer.mixer))
}

/// The layer whose keys and values a mixer uses in the place of its own.
pub(crate) fn source_of(mixer: &Mixer) -> Option<usize> {
    match mixer {
        Mixer::Attention(attention) => match attention.projections {
            Projections::Queries { source, .. } => Some(source),
            _ => None,
        },
        _ => None,
    }
}

/// The inputs [t, width] of each layer: what the embeddings x [t, hidden] and the tokens' rows of the table say
/// of it, each with half of its square.
fn inputs(per_layer: &PerLayer, x: Tensor<2>, rows: Tensor<2>, context: &Context) -> Vec<Tensor<2>> {
    let [tokens, hidden] = x.dims();
    let width = per_layer.norm.gamma.length;
    let layers = rows.dims()[1] / width;
    let projected = linear(&per_layer.projection, x, context) * (1.0 / (hidden as f32).sqrt());
    let projected = norm(&per_layer.norm, projected.reshape([tokens, layers, width]), context);
    let rows = rows.reshape([tokens, layers, width]) * (width as f32).sqrt();
    let all = (projected + rows) * std::f32::consts::FRAC_1_SQRT_2;
    (0..layers).map(|layer| all.clone().narrow(1, layer, 1).reshape([tokens, width])).collect()
}
