//! The loss scale of training in f16 (Micikevicius et al. 2018, "Mixed precision training"): gradients too small for f16 are
//! scaled up on their way back, by as much as its range allows. It is part of the state, so a resumed run goes on with the
//! same.

use finetune_model::FloatType;
use serde::{Deserialize, Serialize};

/// A power of two, and the steps since it last changed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct LossScale {
    pub(crate) scale: f32,
    steps: u32,
}

/// torch's GradScaler starts with 65,536 for a mean over the tokens; the backward pass here starts from their sum, and
/// divides at the end: about as much for a few dozen tokens, the rest is for growth to find.
const FIRST: f32 = 1024.0;
/// A token's own gradient starts from this: the largest power of two in f16.
const LARGEST: f32 = 32_768.0;
/// Steps without an overflow after which it is worth trying twice as much.
const PATIENCE: u32 = 2000;

impl LossScale {
    /// No scaling, for number types with the range of f32.
    pub(crate) const ONE: LossScale = LossScale { scale: 1.0, steps: 0 };

    pub(crate) fn of(compute: FloatType) -> LossScale {
        if compute == FloatType::F16 { LossScale { scale: FIRST, steps: 0 } } else { LossScale::ONE }
    }

    /// Halves it after an overflow; false where there is nothing to halve.
    pub(crate) fn halve(&mut self) -> bool {
        if self.scale <= 1.0 {
            return false;
        }
        *self = LossScale { scale: self.scale / 2.0, steps: 0 };
        true
    }

    /// Counts a step, and grows after many.
    pub(crate) fn passed(&mut self, overflow: bool) {
        if self.scale <= 1.0 || overflow {
            return;
        }
        self.steps += 1;
        if self.steps >= PATIENCE {
            *self = LossScale { scale: (self.scale * 2.0).min(LARGEST), steps: 0 };
        }
    }

    /// For other ranks.
    pub(crate) fn to_number(self) -> u64 {
        u64::from(self.scale.to_bits()) << 32 | u64::from(self.steps)
    }

    pub(crate) fn from_number(number: u64) -> LossScale {
        LossScale { scale: f32::from_bits((number >> 32) as u32), steps: number as u32 }
    }
}

/// Checkpoints of versions that trained in f32 only have none.
impl Default for LossScale {
    fn default() -> LossScale {
        LossScale::ONE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_at_once_and_grows_slowly() {
        let mut scale = LossScale::of(FloatType::F16);
        assert!(scale.halve() && scale.scale == 512.0);
        for _ in 0..PATIENCE - 1 {
            scale.passed(false);
        }
        assert_eq!(scale.scale, 512.0);
        assert_eq!(LossScale::from_number(scale.to_number()), scale);
        scale.passed(false);
        assert_eq!(scale.scale, 1024.0);
        let mut floor = LossScale { scale: 2.0, steps: 7 };
        assert!(floor.halve() && !floor.halve() && floor == LossScale::ONE);
        let mut none = LossScale::of(FloatType::BF16);
        none.passed(false);
        assert!(none == LossScale::ONE && !none.halve());
    }
}
