//! AdamW (Loshchilov and Hutter 2019) with the arithmetic of `torch.optim.AdamW`, on flat vectors.

use finetune_recipe::Optimizer;
use rayon::prelude::*;

/// AdamW's state: both moments of every parameter, in the order of the layout.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamW {
    /// Running mean of the gradients.
    pub first_moment: Vec<f32>,
    /// Running mean of the squared gradients.
    pub second_moment: Vec<f32>,
    /// The number of updates made.
    pub updates: u64,
}

impl AdamW {
    /// The state before the first update, for this many parameters.
    pub fn new(parameters: usize) -> AdamW {
        AdamW { first_moment: vec![0.0; parameters], second_moment: vec![0.0; parameters], updates: 0 }
    }

    /// Makes one update. Scalars are formed in f64 and rounded to f32 where torch does it.
    /// Element-wise operations come in torch's order: decay, first moment by `lerp`, second moment,
    /// `addcdiv`.
    ///
    /// # Panics
    /// If parameters, gradients and moments differ in length.
    pub fn update(&mut self, parameters: &mut [f32], gradients: &[f32], learning_rate: f64, settings: &Optimizer) {
        assert!(parameters.len() == gradients.len() && parameters.len() == self.first_moment.len(), "one layout");
        self.updates += 1;
        let [beta1, beta2] = settings.betas;
        let correction1 = 1.0 - beta1.powf(self.updates as f64);
        let correction2 = (1.0 - beta2.powf(self.updates as f64)).sqrt() as f32;
        let decay = (1.0 - learning_rate * settings.weight_decay) as f32;
        let step_size = (learning_rate / correction1) as f32;
        let (weight1, beta2, weight2, eps) =
            ((1.0 - beta1) as f32, beta2 as f32, (1.0 - beta2) as f32, settings.eps as f32);
        let moments = self.first_moment.par_chunks_mut(JOB).zip(self.second_moment.par_chunks_mut(JOB));
        parameters.par_chunks_mut(JOB).zip(gradients.par_chunks(JOB)).zip(moments).for_each(
            |((parameters, gradients), (first, second))| {
                let moments = first.iter_mut().zip(second);
                for ((parameter, gradient), (first, second)) in parameters.iter_mut().zip(gradients).zip(moments) {
                    *parameter *= decay;
                    *first += weight1 * (gradient - *first);
                    *second = *second * beta2 + weight2 * gradient * gradient;
                    *parameter -= step_size * (*first / (second.sqrt() / correction2 + eps));
                }
            },
        );
    }
}

/// Parameters that one task of the thread pool takes.
const JOB: usize = 1 << 16;
