//! `[train]`: how to train.

use crate::Method;
use crate::kind::{Count, Epochs, Integer, NotNegative, Number, Switch, word};

table! {
    [train]
    /// How to train.
    ///
    /// `micro_batch_size` may exceed a rank's share of the global batch.
    pub struct Train {
        /// an adapter, or all weights
        method: Method = word::<Method>(), default(Method::Lora), Digest, [
            "finetuning_type", "train_type", "tuner_type",
            "adapter" => r#""qlora" is method = "lora" and quantization = "nf4" in [model]"#,
            "peft_type", "training_type",
        ];
        /// How long to train: the one or the other key.
        length: Length {
            /// passes over the training rows; or `max_steps`
            epochs as Length::Epochs = Epochs, default(1), Shared, [
                "num_epochs", "num_train_epochs", "n_epochs", "max_epochs", "epoch",
            ];
            /// optimizer steps; instead of `epochs`
            max_steps as Length::Steps = Integer(1), unset("`epochs` counts"), Shared, [
                "iters" => "mlx-lm counts micro-batches, ours are optimizer steps: divide by its grad_accumulation_steps",
                "iterations" => "ours are optimizer steps",
                "max_iters" => "ours are optimizer steps", "num_steps", "train_steps",
                "total_steps", "max_steps_per_epoch" => "ours counts the whole run",
                "max_train_steps", "train.steps",
            ];
        };
        /// rows per optimizer step over all ranks, whatever the number of ranks
        global_batch_size: usize = Count(1), default(16), Digest, [
            "gradient_accumulation_steps" => "global_batch_size = micro_batch_size × accumulation × ranks",
            "grad_accumulation_steps" => "global_batch_size = micro_batch_size × accumulation × ranks",
            "accumulate_grad_batches" => "global_batch_size = micro_batch_size × accumulation × ranks",
            "gradient_accumulation" => "global_batch_size = micro_batch_size × accumulation × ranks",
            "train_batch_size", "effective_batch_size", "total_batch_size",
        ];
        /// rows per forward on one rank, at most
        micro_batch_size: usize = Count(1), default(4), Digest, [
            "batch_size" => "rows per forward on one rank; rows per optimizer step over all ranks are `global_batch_size`, which is what mlx-lm's batch_size counts without accumulation",
            "per_device_train_batch_size", "per_device_batch_size", "device_batch_size",
            "per_device_eval_batch_size" => "evaluation uses the same",
            "eval_batch_size" => "evaluation uses the same",
        ];
        /// the gradient is scaled down to this norm, after the sum over all ranks; 0: off
        max_grad_norm: f64 = Number(NotNegative), default(1.0), Digest, [
            "clip_grad_norm", "gradient_clipping", "grad_clip", "gradient_clip_val", "clip_grad",
            "max_norm",
        ];
        /// how much the auxiliary loss of a mixture's routers counts, which asks them to use experts evenly
        /// (`docs/training.md`); 0: off
        router_aux_loss_coef: Option<f64> = Number(NotNegative),
            unset("that of config.json if it has `output_router_logits`, otherwise off"), Digest, [
            "moe_aux_loss_coef", "moe_aux_loss_coeff", "aux_loss_coef",
            "output_router_logits" => "router_aux_loss_coef = 0.001 is what transformers adds then",
        ];
        /// recomputes activations in the backward pass: less memory, more time
        gradient_checkpointing: bool = Switch, default(false), Shared, [
            "grad_checkpoint", "grad_checkpointing", "enable_activation_checkpointing",
            "activation_checkpointing",
            "disable_gradient_checkpointing" => "true is gradient_checkpointing = false",
            "use_gradient_checkpointing", "gradient_checkpoint",
            "gradient_checkpointing_kwargs" => "leave it out", "activation_checkpoint",
        ];
    }
}

/// How long to train.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// Passes over the training rows.
    Epochs(u64),
    /// Optimizer steps.
    Steps(u64),
}
