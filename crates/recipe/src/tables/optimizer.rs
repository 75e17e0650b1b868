//! `[optimizer]`.

use crate::OptimizerName;
use crate::kind::{BelowOne, NotNegative, Number, NumberPair, Positive, word};

table! {
    [optimizer]
    /// The optimizer's settings.
    pub struct Optimizer {
        /// the optimizer
        name: OptimizerName = word::<OptimizerName>(), default(OptimizerName::AdamW), Digest, [
            "optim", "optimizer_name", "optimizer.type", "optimizer.kind", "optimizer._component_",
        ];
        /// the highest learning rate
        learning_rate: f64 = Number(Positive), default(2e-4), Digest, [
            "lr", "base_lr", "max_lr", "peak_lr", "learningrate",
        ];
        /// decay of the first and second moment
        betas: [f64; 2] = NumberPair(BelowOne), default([0.9, 0.999]), Digest, [
            "adam_beta1" => "betas = [beta1, beta2]", "adam_beta2" => "betas = [beta1, beta2]",
            "beta1" => "betas = [beta1, beta2]", "beta2" => "betas = [beta1, beta2]", "adam_betas",
        ];
        /// added to the root of the second moment
        eps: f64 = Number(Positive), default(1e-8), Digest, ["adam_epsilon", "epsilon", "adam_eps"];
        /// decoupled weight decay
        weight_decay: f64 = Number(NotNegative), default(0.01), Digest, ["wd", "decay", "l2"];
    }
}
