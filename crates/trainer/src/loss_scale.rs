//! The loss scale of training in f16 (Micikevicius et al. 2018, "Mixed precision training").
//! Gradients too small for f16 are scaled up in the backward pass, by as much as its range allows.
//! The scale is part of the state, so a resumed run goes on with the same.

use finetune_model::FloatType;
use serde::{Deserialize, Serialize};

/// A power of two, and the steps since it last changed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct LossScale {
    pub(crate) scale: f32,
    steps: u32,
}

/// torch's GradScaler starts with 65,536 for a mean over the tokens. The backward pass here starts
/// from their sum, and divides at the end. 1024 is about as much for a few dozen tokens. Growth
/// finds the rest.
const FIRST: f32 = 1024.0;
/// The largest power of two in f16. A token's own gradient starts from the scale.
const LARGEST: f32 = 32_768.0;
/// Steps without an overflow after which the scale is doubled.
const PATIENCE: u32 = 2000;

impl LossScale {
    /// No scaling, for number types with the range of f32.
    pub(crate) const ONE: LossScale = LossScale { scale: 1.0, steps: 0 };

    /// The scale that a run in this number type starts with.
    pub(crate) fn new(compute: FloatType) -> LossScale {
        if compute == FloatType::F16 { LossScale { scale: FIRST, steps: 0 } } else { LossScale::ONE }
    }

    /// Halves it after an overflow. Returns false if there is nothing to halve.
    pub(crate) fn halve(&mut self) -> bool {
        if self.scale <= 1.0 {
            return false;
        }
        *self = LossScale { scale: self.scale / 2.0, steps: 0 };
        true
    }

    /// Counts a step, and doubles the scale after [`PATIENCE`] of them.
    pub(crate) fn passed(&mut self, overflow: bool) {
        if self.scale <= 1.0 || overflow {
            return;
        }
        self.steps += 1;
        if self.steps >= PATIENCE {
            *self = LossScale { scale: (self.scale * 2.0).min(LARGEST), steps: 0 };
        }
    }

    /// As one number, for other ranks.
    pub(crate) fn to_number(self) -> u64 {
        u64::from(self.scale.to_bits()) << 32 | u64::from(self.steps)
    }

    /// The inverse of [`Self::to_number`].
    pub(crate) fn from_number(number: u64) -> LossScale {
        LossScale { scale: f32::from_bits((number >> 32) as u32), steps: number as u32 }
    }
}

/// Checkpoints of versions that trained in f32 only have no scale.
impl Default for LossScale {
    fn default() -> LossScale {
        LossScale::ONE
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::atomic::AtomicI32;

    use finetune_recipe::Recipe;

    use super::*;
    use crate::{Event, Ranks, Resume, ThisHost, prepare, train};

    /// A scale that overflows costs time but no step: the losses are those of a scale that does
    /// not.
    #[test]
    fn gpu_steps_that_overflow_in_f16_are_computed_again() {
        if std::env::var("FINETUNE_TEST_DEVICE").as_deref() != Ok("gpu") {
            println!("SKIPPED: FINETUNE_TEST_DEVICE is not gpu");
            return;
        }
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models/llama");
        let losses = |scale: f32| {
            let output = tempfile::tempdir().expect("a directory");
            let rows = model.join("rows.jsonl");
            let text = format!(
                "model = {{ path = {model:?}, device = \"gpu\", dtype = \"f16\" }}\n[data]\ntrain = {rows:?}\nformat = \"tokens\"\n\
                 [train]\nmax_steps = 3\nglobal_batch_size = 4\n[optimizer]\nlearning_rate = 1e-3\n"
            );
            let recipe = Recipe::parse(&text, Path::new("f16.toml"), &[], Some(output.path()));
            let recipe = recipe.unwrap_or_else(|error| panic!("{error}"));
            let ranks = Arc::new(Ranks::alone(None).expect("one rank"));
            let mut run = prepare(recipe, &Resume::No, &ranks, &ThisHost::default(), &|_| {}).expect("a run").run;
            run.state.loss_scale = LossScale { scale, steps: 0 };
            let (mut losses, mut halvings) = (Vec::new(), 0);
            train(&mut run, &AtomicI32::new(0), &mut |event| match event {
                Event::Step { row, .. } => losses.push(row.loss),
                Event::LossScale { .. } => halvings += 1,
                _ => {}
            })
            .expect("a run that ends");
            (losses, halvings, run.state.loss_scale.scale)
        };
        let (want, none, scale) = losses(256.0);
        assert_eq!((want.len(), none, scale), (3, 0, 256.0));
        let (got, halvings, scale) = losses(8_388_608.0);
        assert!(halvings >= 7 && scale <= 65_536.0, "{halvings} {scale}");
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() < 1e-4 * want, "{got} {want}");
        }
    }

    #[test]
    fn halves_at_once_and_grows_slowly() {
        let mut scale = LossScale::new(FloatType::F16);
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
        let mut none = LossScale::new(FloatType::BF16);
        none.passed(false);
        assert!(none == LossScale::ONE && !none.halve());
    }
}
