//! Several adapters as one: the weighted sum of what they add to each layer.
//!
//! `Σ wₙ sₙ BₙAₙ` is one branch `BA` whose A has the rows of all Aₙ and whose B has the columns of
//! all Bₙ. Its rank is the sum of the ranks, and nothing is approximated. It is PEFT's
//! `add_weighted_adapter(combination_type="cat")`, which multiplies Aₙ by weight and scale in this
//! order, each time rounded to f32.

use crate::adaptation::is_of_vocabulary;
use crate::adapter::{Adapter, RecordedBase};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::lora::LoraTarget;
use crate::merging::{BranchValues, branches};

impl Adapter {
    /// The adapter with every branch's scale multiplied by `factor`. The tensors stay as they are.
    #[must_use]
    pub fn scaled(mut self, factor: f64) -> Adapter {
        for target in &mut self.targets {
            target.alpha *= factor;
        }
        self
    }

    /// An adapter without branches, to write a model of this config as it is.
    pub fn none(config: &ModelConfig) -> Adapter {
        Adapter {
            targets: Vec::new(),
            shapes: Vec::new(),
            saved: Vec::new(),
            values: Vec::new(),
            vocabulary: Vec::new(),
            rows: config.vocabulary,
            base: RecordedBase::default(),
            notices: Vec::new(),
            modules: Vec::new(),
        }
    }

    /// What the adapter has besides LoRA branches: magnitudes, modules trained in full, an embedding
    /// of its own.
    pub(crate) fn beyond_lora(&self) -> Option<String> {
        if self.targets.iter().any(|target| target.use_dora) {
            return Some("the magnitudes of DoRA".to_owned());
        }
        if let Some(module) = self.saved.first() {
            return Some(format!("`{module}`, which was trained in full"));
        }
        (!self.vocabulary.is_empty()).then(|| "an embedding of its own".to_owned())
    }

    /// Refuses an adapter that is more than LoRA branches on the layers' matrices, for something that
    /// has no place for the rest.
    ///
    /// # Errors
    /// [`ModelError::NoPlace`] with the first thing that has no place in `form`.
    pub fn expect_plain(&self, form: &str) -> Result<(), ModelError> {
        let ends = || self.targets.iter().find(|target| is_of_vocabulary(&target.module));
        let what = self.beyond_lora().or_else(|| ends().map(|target| format!("the branch on `{}`", target.module)));
        match what {
            None => Ok(()),
            Some(what) => Err(ModelError::NoPlace {
                what: format!("{form} has no place for {what}"),
                hint: "--format merged, or gguf without --adapter-only, writes the whole model".to_owned(),
            }),
        }
    }

    /// The sum of adapters of one model, each times its weight. One adapter keeps its tensors.
    ///
    /// # Panics
    /// If there is none. Adapters that are more than branches are refused before
    /// ([`Adapter::expect_plain`]).
    pub fn sum(mut adapters: Vec<(Adapter, f64)>) -> Adapter {
        if adapters.len() == 1 {
            let (adapter, weight) = adapters.remove(0);
            return adapter.scaled(weight);
        }
        let (first, _) = adapters.first().expect("at least one adapter");
        let (modules, base, rows) = (first.modules.clone(), first.base.clone(), first.rows);
        let notices = adapters.iter().flat_map(|(adapter, _)| adapter.notices.clone()).collect();
        let weighted: Vec<(Vec<BranchValues<'_>>, f64)> =
            adapters.iter().map(|(adapter, weight)| (branches(adapter), *weight)).collect();
        let (mut targets, mut shapes, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for module in &modules {
            let parts: Vec<(&BranchValues<'_>, f64)> = weighted
                .iter()
                .filter_map(|(branches, weight)| {
                    Some((branches.iter().find(|branch| branch.module == module)?, *weight))
                })
                .collect();
            let rank: usize = parts.iter().map(|(branch, _)| branch.rank).sum();
            let Some((part, _)) = parts.first() else { continue };
            let (outputs, inputs) = (part.b.len() / part.rank, part.a.len() / part.rank);
            for (branch, weight) in &parts {
                let (weight, scale) = (*weight as f32, branch.scale);
                values.extend(branch.a.iter().map(|value| value * weight * scale));
            }
            for output in 0..outputs {
                let row = |branch: &BranchValues<'_>| output * branch.rank..(output + 1) * branch.rank;
                parts.iter().for_each(|(branch, _)| values.extend(&branch.b[row(branch)]));
            }
            // alpha / rank is 1: weights and scales are in A.
            targets.push(LoraTarget {
                module: module.clone(),
                rank,
                alpha: rank as f64,
                use_rslora: false,
                use_dora: false,
            });
            shapes.push((outputs, inputs));
        }
        // The sum is no result of a training, so no digest vouches for its base.
        let base = RecordedBase { digest: None, ..base };
        let (saved, vocabulary) = (Vec::new(), Vec::new());
        Adapter { targets, shapes, saved, values, vocabulary, rows, base, notices, modules }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(module: &str, rank: usize, alpha: f64, values: &[f32]) -> Adapter {
        let target = LoraTarget { module: module.to_owned(), rank, alpha, use_rslora: false, use_dora: false };
        Adapter {
            targets: vec![target],
            shapes: vec![(1, 2)],
            saved: vec![],
            values: values.to_vec(),
            vocabulary: vec![],
            rows: 8,
            base: RecordedBase::default(),
            notices: vec![],
            modules: vec!["a".to_owned(), "b".to_owned()],
        }
    }

    /// Layers of one output and two inputs. Ranks 1 and 2 on the same layer become rank 3, and a
    /// layer of one adapter alone keeps its rank.
    #[test]
    fn ranks_are_joined() {
        let one = adapter("a", 1, 2.0, &[1.0, 2.0, 3.0]); // A 1 × 2, B 1 × 1; scale 2
        let two = adapter("a", 2, 2.0, &[1.0, 0.0, 0.0, 1.0, 5.0, 7.0]); // A 2 × 2, B 1 × 2; scale 1
        let other = adapter("b", 1, 1.0, &[4.0, 4.0, 4.0]);
        let sum = Adapter::sum(vec![(one.clone(), 0.5), (two, -1.0), (other, 1.0)]);
        let found: Vec<_> = sum.targets.iter().map(|t| (t.module.as_str(), t.rank, t.scale())).collect();
        assert_eq!(found, [("a", 3, 1.0), ("b", 1, 1.0)]);
        let a = [1.0, 2.0, -1.0, 0.0, 0.0, -1.0, 3.0, 5.0, 7.0];
        assert_eq!(sum.values, [a.as_slice(), &[4.0, 4.0, 4.0]].concat());
        let alone = Adapter::sum(vec![(one.clone(), 0.5)]);
        assert_eq!((alone.values, alone.targets[0].alpha), (one.values, 1.0));
    }
}
