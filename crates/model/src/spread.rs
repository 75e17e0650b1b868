//! Which process has which of the trained parameters, where several hold the layers of a model together: each has
//! those of its layers.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use crate::adaptation::Adaptation;
use crate::config::ModelConfig;
use crate::layout::{Layout, Parameter};
use crate::lora::LoraTarget;
use crate::stage::Stage;
use crate::tree::{Decoder, Home};

impl Stage {
    /// The process that has what is trained of a part of the model: the one that differentiates it.
    pub(crate) fn process_of(&self, home: Home) -> usize {
        match home {
            Home::Beginning => self.of_layer.first().copied().unwrap_or(0),
            Home::Layer(n) => self.of_layer[n],
            Home::End => self.last(),
        }
    }
}

/// Where the values of a trained parameter are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The process that has them.
    pub process: usize,
    /// Its elements in the flat vector of that process.
    pub range: Range<usize>,
}

/// All trained parameters of a model, and the process that has each of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spread {
    whole: Layout,
    /// Of each parameter.
    held: Vec<Held>,
    /// The numbers of elements of each process.
    lengths: BTreeMap<usize, usize>,
    /// This process.
    mine: usize,
}

impl Spread {
    /// For this process.
    pub(crate) fn new(mine: usize) -> Spread {
        Spread { mine, ..Spread::default() }
    }

    /// Adds a parameter behind the others.
    pub(crate) fn push(&mut self, name: String, shape: Vec<usize>, process: usize) {
        let end = self.lengths.entry(process).or_default();
        let start = *end;
        *end += shape.iter().product::<usize>();
        self.held.push(Held { process, range: start..*end });
        self.whole.push(name, shape);
    }

    /// All parameters of the model, in their order. [`Model::layout`](crate::Model::layout) has those of this process.
    pub fn whole(&self) -> &Layout {
        &self.whole
    }

    /// This process.
    pub fn mine(&self) -> usize {
        self.mine
    }

    /// Where each parameter is, in their order.
    pub fn held(&self) -> &[Held] {
        &self.held
    }

    /// Where the parameter is that begins with this element of all.
    ///
    /// # Panics
    /// If there is none.
    pub fn beginning_at(&self, start: usize) -> &Held {
        let place = self.whole.parameters().binary_search_by_key(&start, |parameter| parameter.range.start);
        &self.held[place.expect("a parameter begins there")]
    }

    /// The parameters of this process.
    pub(crate) fn own(&self) -> Layout {
        let mut own = Layout::default();
        let mine = self.whole.iter().zip(&self.held).filter(|(_, held)| held.process == self.mine);
        mine.for_each(|(Parameter { name, shape, .. }, _)| own.push(name.clone(), shape.clone()));
        own
    }
}

/// The numbers of trained elements of each part of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrainedElements {
    /// Before the first layer: of the embedding.
    pub beginning: u64,
    /// Of each layer.
    pub layers: Vec<u64>,
    /// Behind the last layer.
    pub end: u64,
}

impl TrainedElements {
    /// What an adapter trains of a model of this config.
    pub fn of(config: &ModelConfig, adaptation: &Adaptation) -> TrainedElements {
        let untied = ModelConfig {
            tied_embeddings: config.tied_embeddings && !adaptation.trains_vocabulary(),
            ..config.clone()
        };
        let mut decoder = Decoder::new(&untied);
        let mut counted = TrainedElements { layers: vec![0; config.layers.len()], ..TrainedElements::default() };
        let targets: HashMap<&str, &LoraTarget> =
            adaptation.targets.iter().map(|target| (target.module.as_str(), target)).collect();
        for (home, place) in decoder.placed() {
            let Some(target) = targets.get(place.module) else { continue };
            let (outputs, inputs) = place.sizes();
            let magnitudes = usize::from(target.use_dora) * outputs;
            *counted.at(home) += (target.rank * (outputs + inputs) + magnitudes) as u64;
        }
        let (base, _) = decoder.parameters();
        for (home, slot) in base.iter().filter(|(_, slot)| adaptation.saves(slot.name())) {
            *counted.at(*home) += slot.len() as u64;
        }
        counted
    }

    fn at(&mut self, home: Home) -> &mut u64 {
        match home {
            Home::Beginning => &mut self.beginning,
            Home::Layer(n) => &mut self.layers[n],
            Home::End => &mut self.end,
        }
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.beginning + self.layers.iter().sum::<u64>() + self.end
    }

    /// Those of one of the processes that hold the model together.
    pub fn on(&self, stage: &Stage) -> u64 {
        let has = |home| stage.process_of(home) == stage.mine;
        let layers = self.layers.iter().enumerate().filter(|(n, _)| has(Home::Layer(*n)));
        let ends =
            [(Home::Beginning, self.beginning), (Home::End, self.end)].into_iter().filter(|(home, _)| has(*home));
        layers.map(|(_, elements)| elements).sum::<u64>() + ends.map(|(_, elements)| elements).sum::<u64>()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn spread(mine: usize) -> Spread {
        let mut spread = Spread::new(mine);
        for (name, shape, process) in
            [("a", vec![2, 3], 0), ("b", vec![4], 1), ("c", vec![1, 5], 0), ("d", vec![2], 1), ("e", vec![3], 1)]
        {
            spread.push(name.to_owned(), shape, process);
        }
        spread
    }

    #[test]
    fn each_process_has_its_parameters_one_behind_the_other() {
        for (mine, names, length) in [(0, vec!["a", "c"], 11), (1, vec!["b", "d", "e"], 9), (2, vec![], 0)] {
            let own = spread(mine).own();
            assert_eq!(own.iter().map(|parameter| parameter.name.as_str()).collect::<Vec<_>>(), names);
            assert_eq!(own.len(), length);
        }
        let spread = spread(1);
        let own = spread.own();
        let mine = spread.held().iter().filter(|held| held.process == 1).map(|held| held.range.clone());
        assert!(mine.eq(own.iter().map(|parameter| parameter.range.clone())), "the ranges of its own layout");
        assert_eq!(*spread.beginning_at(10), Held { process: 0, range: 6..11 });
        assert_eq!(spread.whole().len(), 20);
    }

    /// What is counted for the estimate is what a model has.
    #[test]
    fn elements_of_all_processes_are_all() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models/llama");
        let config = ModelConfig::load(&directory).expect("a config");
        let target = |module: &str| LoraTarget {
            module: module.to_owned(),
            rank: 3,
            alpha: 8.0,
            use_rslora: false,
            use_dora: module.ends_with("q_proj"),
        };
        let last = format!("model.layers.{}.mlp.down_proj", config.layers.len() - 1);
        let modules = ["model.embed_tokens", "model.layers.0.self_attn.q_proj", &last];
        let saved = vec!["model.norm".to_owned(), "lm_head".to_owned()];
        let adaptation = Adaptation { targets: modules.map(target).to_vec(), saved, dropout: 0.0 };
        let counted = TrainedElements::of(&config, &adaptation);
        let (branches, whole) = adaptation.elements(&config);
        assert_eq!(counted.total(), branches + whole);
        assert_eq!(counted.end, (config.hidden_size * (1 + config.vocabulary)) as u64);
        for stages in 1..=config.layers.len() {
            let on = |mine| counted.on(&Stage::in_turn(config.layers.len(), stages, mine));
            assert_eq!((0..stages).map(on).sum::<u64>(), counted.total(), "{stages} stages");
        }
    }
}
