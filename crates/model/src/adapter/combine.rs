//! Several adapters as one: the weighted sum of what they add to each layer.
//!
//! `Σ wₙ sₙ BₙAₙ` is one branch `BA` whose A has the rows of all Aₙ and whose B has the columns of
//! all Bₙ. Its rank is the sum of the ranks, and nothing is approximated. It is PEFT's
//! `add_weighted_adapter(combination_type="cat")`, which multiplies Aₙ by weight and scale in this
//! order, each time rounded to f32.
//!
//! DoRA's magnitudes and modules that were trained in full do not add up: those adapters stay alone.

use crate::adapter::{Adapter, RecordedBase};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::lora::LoraTarget;
use crate::merge::{BranchValues, branches};

impl Adapter {
    /// An adapter without branches, to write a model as it is.
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

    /// What the adapter has beside plain branches, in words.
    pub(crate) fn beside_branches(&self) -> Option<&'static str> {
        if self.targets.iter().any(|target| target.use_dora) {
            Some("DoRA's magnitudes")
        } else if !self.saved.is_empty() {
            Some("modules that were trained in full (modules_to_save)")
        } else if !self.vocabulary.is_empty() {
            Some("an embedding or output layer of its own")
        } else {
            None
        }
    }

    /// Refuses an adapter that is more than plain branches. `what`: what cannot be done with it.
    /// `hint`: what can.
    pub(crate) fn expect_branches_only(&self, what: &str, hint: &str) -> Result<(), ModelError> {
        match self.beside_branches() {
            None => Ok(()),
            Some(more) => {
                Err(ModelError::NotExpressible { what: format!("{what}: it has {more}"), hint: hint.to_owned() })
            }
        }
    }

    /// The adapter with every branch's scale multiplied by `factor`. The tensors stay as they are.
    ///
    /// # Errors
    /// [`ModelError::NotExpressible`] for an adapter that is more than plain branches.
    pub fn scaled(mut self, factor: f64) -> Result<Adapter, ModelError> {
        if factor == 1.0 {
            return Ok(self);
        }
        self.expect_branches_only(
            "an adapter cannot be multiplied",
            "leave --scale and weights out: 1 is what was trained",
        )?;
        for target in &mut self.targets {
            target.alpha *= factor;
        }
        Ok(self)
    }

    /// The sum of adapters of one model, each times its weight. One adapter keeps its tensors.
    ///
    /// # Errors
    /// [`ModelError::NotExpressible`] if one of several is more than plain branches.
    ///
    /// # Panics
    /// If there is none.
    pub fn sum(mut adapters: Vec<(Adapter, f64)>) -> Result<Adapter, ModelError> {
        if adapters.len() == 1 {
            let (adapter, weight) = adapters.remove(0);
            return adapter.scaled(weight);
        }
        for (adapter, _) in &adapters {
            adapter.expect_branches_only(
                "an adapter cannot be added to another one",
                "export it alone, or leave it out of the sum",
            )?;
        }
        let (first, _) = adapters.first().expect("at least one adapter");
        let (modules, base, rows) = (first.modules.clone(), first.base.clone(), first.rows);
        let mut notices: Vec<String> = adapters.iter().flat_map(|(adapter, _)| adapter.notices.clone()).collect();
        let others = adapters.iter().filter(|(adapter, _)| adapter.base.quantization != base.quantization);
        notices.extend(others.filter_map(|(adapter, _)| adapter.quantization_notice(base.quantization)));
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
                for (branch, _) in &parts {
                    values.extend(&branch.b[output * branch.rank..(output + 1) * branch.rank]);
                }
            }
            // alpha / rank is 1: weights and scales are in A.
            let alpha = rank as f64;
            targets.push(LoraTarget { module: module.clone(), rank, alpha, use_rslora: false, use_dora: false });
            shapes.push((outputs, inputs));
        }
        // The sum is no result of a training, so no digest vouches for its base.
        let base = RecordedBase { digest: None, ..base };
        let (saved, vocabulary) = (Vec::new(), Vec::new());
        Ok(Adapter { targets, shapes, saved, values, vocabulary, rows, base, notices, modules })
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
            rows: 7,
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
        let sum = Adapter::sum(vec![(one.clone(), 0.5), (two, -1.0), (other, 1.0)]).expect("plain branches");
        let found: Vec<_> = sum.targets.iter().map(|t| (t.module.as_str(), t.rank, t.scale())).collect();
        assert_eq!(found, [("a", 3, 1.0), ("b", 1, 1.0)]);
        let a = [1.0, 2.0, -1.0, 0.0, 0.0, -1.0, 3.0, 5.0, 7.0];
        assert_eq!(sum.values, [a.as_slice(), &[4.0, 4.0, 4.0]].concat());
        let alone = Adapter::sum(vec![(one.clone(), 0.5)]).expect("plain branches");
        assert_eq!((alone.values, alone.targets[0].alpha), (one.values, 1.0));
    }

    /// DoRA and modules trained in full stay as they are, or are refused.
    #[test]
    fn what_does_not_add_up() {
        let mut dora = adapter("a", 1, 2.0, &[1.0, 2.0, 3.0, 4.0]);
        dora.targets[0].use_dora = true;
        let mut saved = adapter("a", 1, 2.0, &[1.0, 2.0, 3.0, 4.0]);
        saved.saved.push("b".to_owned());
        for (one, part) in [(dora, "DoRA's magnitudes"), (saved, "modules_to_save")] {
            assert_eq!(Adapter::sum(vec![(one.clone(), 1.0)]).expect("as it is"), one);
            for wrong in [Adapter::sum(vec![(one.clone(), 0.5)]), Adapter::sum(vec![(one.clone(), 1.0), (one, 1.0)])] {
                assert!(wrong.expect_err(part).to_string().contains(part));
            }
        }
    }
}
