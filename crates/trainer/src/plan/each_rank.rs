//! What each rank takes: memory, and bytes on its disk.

use std::collections::BTreeMap;

use finetune_model::{Model, PackedSizes, Placement, Stage, assumed_of_packing, stated_packing};
use finetune_recipe::{Method, Recipe};
use serde::Serialize;

use super::Planner;
use crate::base_model::has_weights;
use crate::copies::holders;
use crate::memory::{Sizing, Subject};
use crate::residency::{choose_counted, read_in_step};

/// What a rank takes.
#[derive(Clone, Debug, Serialize)]
pub struct RankNeed {
    /// Its number.
    pub rank: usize,
    /// Its machine, as the hostfile calls it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Layers that it holds.
    pub layers: usize,
    /// Trained parameters of these layers.
    pub trained: u64,
    /// Bytes of memory at the largest step.
    pub memory: u64,
    /// Bytes of memory that it may take, if that can be told.
    pub available: Option<u64>,
    /// Whether that is enough; `None` if it is not known.
    pub fits: Option<bool>,
    /// Bytes of layers that it reads in a step.
    pub read: u64,
    /// Bytes of the base's files of weights that have to be on its disk.
    pub base: u64,
    /// Bytes that it writes: the run directory of rank 0, copies of its checkpoints on others.
    pub run: u64,
    /// Bytes on its disk: both together.
    pub disk: u64,
}

/// Where a rank is among those that hold a model together, and bytes of its memory.
type Place = (usize, Option<u64>);

/// What all ranks of a way take.
pub(super) struct Needs {
    pub(super) ranks: Vec<RankNeed>,
    /// Micro-batches that go through each layer together; the fewest, where ranks differ.
    pub(super) at_once: usize,
    /// Whether a rank reads experts one by one.
    pub(super) by_experts: bool,
}

impl Planner<'_> {
    /// What each rank takes of a run, with the layers spread over `stage` if there is one. `micro_batches`: those of a
    /// step of one model, of about so many tokens each.
    pub(super) fn needs(
        &self,
        subject: &Subject<'_>,
        stage: Option<&Stage>,
        micro_batches: usize,
        tokens: usize,
    ) -> Needs {
        let stages = stage.map_or(1, Stage::count);
        let places: Vec<Place> = (0..self.machines.hosts).map(|rank| (rank % stages, self.memory_of(rank))).collect();
        let mut sizings: BTreeMap<Place, Sizing> = BTreeMap::new();
        for place in &places {
            sizings.entry(*place).or_insert_with(|| self.sizing(subject, stage, *place, micro_batches));
        }
        let at_once = sizings.values().map(|sizing| sizing.at_once).min().unwrap_or(1);
        if stage.is_some() {
            // Ranks that hold a model together go through it with the same micro-batches.
            sizings.values_mut().for_each(|sizing| sizing.at_once = at_once);
        }
        let taken = |sizing: &Sizing| {
            let memory = Subject { sizing, ..*subject }.estimate_counted(&self.counted).total;
            (memory, read_in_step(sizing, micro_batches, tokens))
        };
        let taken: BTreeMap<Place, (u64, u64)> =
            sizings.iter().map(|(place, sizing)| (*place, taken(sizing))).collect();
        let layers = stage.map_or_else(|| vec![subject.sizing.config.layers.len()], Stage::counts);
        let of_place = |mine| stage.map(|stage| Stage { mine, ..stage.clone() });
        let trained: Vec<u64> = (0..stages).map(|mine| self.counted.trained_on(of_place(mine).as_ref())).collect();
        let base = self.base_bytes(subject.recipe, &subject.sizing.placement, stage);
        let need = |(rank, place): (usize, &Place)| {
            let (memory, read) = taken[place];
            let (mine, available) = *place;
            let (base, run) = (base[mine], self.written[rank]);
            RankNeed {
                rank,
                host: self.machines.names.get(rank).cloned(),
                layers: layers[mine],
                trained: trained[mine],
                memory,
                available,
                fits: available.map(|available| memory <= available),
                read,
                base,
                run,
                disk: base.saturating_add(run),
            }
        };
        let by_experts = sizings.values().any(|sizing| sizing.placement.reads_experts());
        Needs { ranks: places.iter().enumerate().map(need).collect(), at_once, by_experts }
    }

    fn memory_of(&self, rank: usize) -> Option<u64> {
        self.machines.memory_of_each.get(rank).copied().or(self.machines.memory)
    }

    fn sizing(&self, subject: &Subject<'_>, stage: Option<&Stage>, place: Place, micro_batches: usize) -> Sizing {
        let (mine, memory) = place;
        let stage = stage.map(|stage| Stage { mine, ..stage.clone() });
        let placement = subject.sizing.placement.clone().with_stage(stage);
        let sizing = Sizing { placement, ..subject.sizing.clone() };
        let (chosen, _) = choose_counted(&Subject { sizing: &sizing, ..*subject }, &self.counted, memory);
        Sizing { at_once: chosen.at_once.min(micro_batches), ..chosen }
    }

    /// Bytes of the base's files on each of the machines that hold a model together. Of a directory all are
    /// everywhere; of a hub id each fetches the files of its layers, if nothing else is read there.
    fn base_bytes(&self, recipe: &Recipe, placement: &Placement, stage: Option<&Stage>) -> Vec<u64> {
        let (stages, reads_all) = (stage.map_or(1, Stage::count), recipe.lora.init_from.is_some());
        if let Some(stage) = stage.filter(|_| self.is_from_hub && !reads_all) {
            let placement = placement.clone().with_stage(Some(stage.clone()));
            if let Ok(bytes) = Model::file_bytes_of_stages(&self.directory, &placement) {
                return bytes;
            }
        }
        vec![self.base; stages]
    }

    /// Bytes of all files of weights of the base, or what they will be: none where fresh weights are made.
    pub(super) fn whole_base(subject: &Subject<'_>, directory: &std::path::Path, parameters: u64) -> u64 {
        if !has_weights(directory) && subject.recipe.train.method == Method::Full {
            return 0;
        }
        let stored = subject.sizing.stored;
        // What is packed while it is loaded is not in its files.
        let is_told = assumed_of_packing(&stated_packing(directory), stored).is_some();
        let packed = if is_told { subject.sizing.packed } else { PackedSizes::default() };
        let of_config = parameters.saturating_sub(packed.elements) * stored.bytes() as u64 + packed.bytes;
        Model::file_bytes(directory).unwrap_or(of_config)
    }
}

/// Bytes that each rank writes. `run`: those of the run directory, which rank 0 has; `copies`: those of a copy of its
/// checkpoints.
pub(super) fn written(recipe: &Recipe, names: &[String], hosts: usize, run: u64, copies: u64) -> Vec<u64> {
    let numbers: Vec<String> = (0..hosts).map(|rank| rank.to_string()).collect();
    let names = if names.len() == hosts { names } else { &numbers };
    let keepers = holders(names.iter().map(String::as_str), recipe.checkpoint.copies.unwrap_or(1));
    let of = |rank: usize| if keepers.contains(&rank) { copies } else { 0 };
    (0..hosts).map(|rank| if rank == 0 { run } else { of(rank) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_recipe::test_recipe;

    /// (copies that are asked for, names of the hosts, bytes that each of them writes)
    #[test]
    fn copies_are_on_other_hosts() {
        for (copies, names, want) in [
            ("", &["a"][..], &[100][..]),
            ("", &["a", "b", "c"], &[100, 60, 0]),
            ("[checkpoint]\ncopies = 2\n", &["a", "b", "c"], &[100, 60, 60]),
            ("[checkpoint]\ncopies = 0\n", &["a", "b"], &[100, 0]),
            ("", &["a", "a", "b"], &[100, 0, 60]),
        ] {
            let recipe = test_recipe(copies);
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            assert_eq!(written(&recipe, &names, names.len(), 100, 60), want, "{names:?}");
        }
        // Without names each rank is on a machine of its own.
        assert_eq!(written(&test_recipe(""), &[], 3, 100, 60), [100, 60, 0]);
    }
}
