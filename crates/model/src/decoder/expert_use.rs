//! Which experts the tokens of a training step have gone through.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// How often each expert was chosen, by the numbers of the layers.
pub type ExpertCounts = BTreeMap<usize, Vec<u64>>;

/// How often each expert of each layer was chosen.
#[derive(Debug, Default)]
pub(crate) struct ExpertUse(Mutex<ExpertCounts>);

impl ExpertUse {
    /// Counts the choices of a layer's tokens among `experts`. `router`: the name of its router.
    pub(crate) fn count(&self, router: &str, experts: usize, chosen: &[u32]) {
        let Some(layer) = router.split('.').find_map(|part| part.parse().ok()) else { return };
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_layer = counts.entry(layer).or_insert_with(|| vec![0; experts]);
        chosen.iter().for_each(|&expert| of_layer[expert as usize] += 1);
    }

    /// What was counted. Counting begins anew.
    pub(crate) fn take(&self) -> ExpertCounts {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_counted_by_layer() {
        let counts = ExpertUse::default();
        counts.count("model.layers.3.mlp.gate", 4, &[0, 1, 1, 2]);
        counts.count("model.layers.3.mlp.gate", 4, &[1, 2, 1, 0]);
        counts.count("model.layers.1.mlp.gate", 2, &[0, 1]);
        assert_eq!(counts.take(), BTreeMap::from([(1, vec![1, 1]), (3, vec![2, 4, 2, 0])]));
        assert_eq!(counts.take(), BTreeMap::new());
    }
}
