//! Experts that are written in transformers' stacks, `experts.gate_up_proj` [e, 2 f, hidden], the rows of the gate
//! first, and `experts.down_proj` [e, hidden, f]: where the files of the base have such, and where transformers
//! reads no others (Gemma 4), however the files of the base have them: mlx-lm has gate and up apart, packed or not.

use std::collections::BTreeMap;

use crate::config::ModelConfig;
use crate::files::base_files::{BaseFiles, Names};
use crate::merge::MergedTensor;

/// A stack that is written: its name, its shape, and the numbers of the tensors it is made of.
pub(super) struct Stack {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) tensors: Vec<usize>,
}

/// Numbers of the gates, ups and downs of a layer's experts.
type OfLayer = [BTreeMap<usize, usize>; 3];

/// The stacks that are made of single experts, by where their layer's experts are.
pub(super) struct Stacks {
    layers: BTreeMap<String, Option<[Stack; 2]>>,
}

impl Stacks {
    /// `tensors`: those of the model, in their numbers' order. `keeps`: whether the base's stacks stay stacks.
    pub(super) fn of(config: &ModelConfig, files: &BaseFiles, tensors: &[MergedTensor<'_>], keeps: bool) -> Stacks {
        let mut found: BTreeMap<String, OfLayer> = BTreeMap::new();
        let is_stacked = |name: &str| config.family.has_stacks_only() || (keeps && files.stack_of(name).is_some());
        for (number, tensor) in tensors.iter().enumerate() {
            if let Some((experts, expert, part)) = place(config, &tensor.name).filter(|_| is_stacked(&tensor.name)) {
                found.entry(experts.to_owned()).or_default()[part].insert(expert, number);
            }
        }
        // Stacks of some of the parts are written as single experts.
        let is_whole = |[gates, ups, downs]: &OfLayer| gates.len() == ups.len() && gates.len() == downs.len();
        let whole = found.into_iter().filter(|(_, of_layer)| is_whole(of_layer));
        let names = files.names(config);
        let stacks = whole.map(|(experts, of_layer)| {
            let made = stacks(files, &names, tensors, &of_layer);
            (experts, Some(made))
        });
        Stacks { layers: stacks.collect() }
    }

    /// The stacks of the layer that this tensor is an expert's of: with its first one all, later none.
    /// `None`: it is written otherwise.
    pub(super) fn take(&mut self, config: &ModelConfig, name: &str) -> Option<Vec<Stack>> {
        let (experts, ..) = place(config, name)?;
        let of_layer = self.layers.get_mut(experts)?;
        Some(of_layer.take().into_iter().flatten().collect())
    }
}

/// Where an expert's matrix is: its layer's experts, which of them, and whether it is gate, up or down (0, 1, 2).
fn place<'n>(config: &ModelConfig, name: &'n str) -> Option<(&'n str, usize, usize)> {
    let (experts, rest) = name.strip_suffix(".weight")?.split_once(".experts.")?;
    let (expert, part) = rest.split_once('.')?;
    let part = config.family.names.gated.iter().position(|gated| *gated == part)?;
    Some((experts, expert.parse().ok()?, part))
}

fn stacks(files: &BaseFiles, names: &Names<'_>, tensors: &[MergedTensor<'_>], of_layer: &OfLayer) -> [Stack; 2] {
    let [gates, ups, downs] = of_layer;
    let stack = |part: &str, numbers: Vec<usize>, per_expert: usize| {
        let first = &tensors[numbers[0]];
        // The base's own stack says what its layer's experts are called.
        let own = files.stack_of(&first.name).and_then(|stack| stack.rsplit_once('.'));
        let name = names.of(&first.name);
        let experts = own.map_or_else(
            || format!("{}.experts", name.split_once(".experts.").map_or(&*name, |(layer, _)| layer)),
            |(experts, _)| experts.to_owned(),
        );
        let mut shape = first.base.shape.clone();
        shape[0] *= per_expert;
        shape.insert(0, numbers.len() / per_expert);
        Stack { name: format!("{experts}.{part}"), shape, tensors: numbers }
    };
    let both = gates.values().zip(ups.values()).flat_map(|(&gate, &up)| [gate, up]).collect();
    [stack("gate_up_proj", both, 2), stack("down_proj", downs.values().copied().collect(), 1)]
}
