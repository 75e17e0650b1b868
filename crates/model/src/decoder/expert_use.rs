//! Which experts the tokens of a training step have gone through.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// How evenly a layer's experts were used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerUse {
    /// The number of the layer.
    pub layer: usize,
    /// The part of all choices that went to the expert that was chosen most: 1 / experts if all are used
    /// alike.
    pub busiest: f64,
    /// Experts that no token has chosen.
    pub unused: usize,
}

/// How often each expert of each layer was chosen.
#[derive(Debug, Default)]
pub(crate) struct ExpertUse(Mutex<BTreeMap<usize, Vec<u64>>>);

impl ExpertUse {
    /// Counts the choices of a layer's tokens among `experts`. `router`: the name of its router.
    pub(crate) fn count(&self, router: &str, experts: usize, chosen: &[u32]) {
        let Some(layer) = router.split('.').find_map(|part| part.parse().ok()) else { return };
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_layer = counts.entry(layer).or_insert_with(|| vec![0; experts]);
        chosen.iter().for_each(|&expert| of_layer[expert as usize] += 1);
    }

    /// What was counted, in the order of the layers. Counting begins anew.
    pub(crate) fn take(&self) -> Vec<LayerUse> {
        let counts = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let of_layer = |(layer, counts): (usize, Vec<u64>)| {
            let all: u64 = counts.iter().sum();
            let most = counts.iter().copied().max().unwrap_or(0);
            let unused = counts.iter().filter(|&&count| count == 0).count();
            LayerUse { layer, busiest: most as f64 / all.max(1) as f64, unused }
        };
        counts.into_iter().map(of_layer).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_the_busiest_and_unused_experts() {
        let counts = ExpertUse::default();
        counts.count("model.layers.3.mlp.gate", 4, &[0, 1, 1, 2]);
        counts.count("model.layers.3.mlp.gate", 4, &[1, 2, 1, 0]);
        counts.count("model.layers.1.mlp.gate", 2, &[0, 1]);
        let want = [LayerUse { layer: 1, busiest: 0.5, unused: 0 }, LayerUse { layer: 3, busiest: 0.5, unused: 1 }];
        assert_eq!(counts.take(), want);
        assert_eq!(counts.take(), []);
    }
}
