//! `[lora]`: the adapter.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::kind::{BelowOne, ByName, Count, Layers, Names, Number, OnePath, Positive, Switch, Targets};

table! {
    [lora]
    /// The adapter.
    ///
    /// It is scaled by alpha / rank, with rsLoRA by alpha / sqrt(rank)
    /// (<https://arxiv.org/abs/2312.03732>). Without `layers_to_transform` all layers get one.
    pub struct Lora {
        /// rank of the adapter's matrices
        rank: usize = Count(1), default(16), Digest, [
            "r", "lora_r", "lora_rank", "lora_dim", "adapter_rank",
        ];
        /// the adapter is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank))
        alpha: f64 = Number(Positive), default(32_f64), Digest, [
            "lora_alpha", "scale" => "alpha = scale × rank", "lora_scale" => "alpha = scale × rank",
            "scaling" => "alpha = scaling × rank", "lora_scaling" => "alpha = scaling × rank",
        ];
        /// probability of dropping an input of the adapter
        dropout: f64 = Number(BelowOne), default(0.0), Digest, ["lora_dropout", "adapter_dropout"];
        /// `"all-linear"`, a list of names (PEFT's matching), or a regex on the full module name;
        /// no match is an error
        target_modules: TargetModules = Targets, default(TargetModules::AllLinear), Digest, [
            "targets", "lora_target" => r#"`all` is "all-linear"; several names are a list"#,
            "lora_targets", "lora_target_modules",
            "lora_target_linear" => r#"write target_modules = "all-linear""#,
            "lora_attn_modules" => r#"names as in the model's files, such as "q_proj""#,
            "apply_lora_to_mlp" => r#"list the names, such as "gate_proj""#,
            "keys" => r#"module names as in the model's files, such as "q_proj""#, "lora_keys",
            "target_linear", "lora.target", "lora.modules",
        ];
        /// the experts of a mixture get an adapter too, whatever `target_modules` names
        experts: bool = Switch, default(false), Digest, [
            "target_parameters" => "true trains all experts", "lora_target_parameters" => "true trains all experts",
        ];
        /// rank-stabilized scale: alpha / sqrt(rank)
        use_rslora: bool = Switch, default(false), Digest, [
            "peft_use_rslora", "rslora", "use_rs_lora",
        ];
        /// DoRA: trains the magnitude of each output apart from its direction
        use_dora: bool = Switch, default(false), Digest, [
            "peft_use_dora", "dora",
            "fine_tune_type" => r#""dora" is use_dora = true; "lora" and "full" are `method` in [train]"#,
        ];
        /// ranks of modules that differ, by name or regex, as in PEFT: `{ "q_proj" = 8 }`
        rank_pattern: BTreeMap<String, usize> = ByName(Count(1)),
            default(BTreeMap::new()), Digest, [
            "peft_rank_pattern", "lora_rank_pattern",
        ];
        /// alphas of modules that differ, by name or regex, as in PEFT
        alpha_pattern: BTreeMap<String, f64> = ByName(Number(Positive)),
            default(BTreeMap::new()), Digest, [
            "peft_alpha_pattern", "lora_alpha_pattern",
        ];
        /// the layers that get an adapter, counted from 0
        layers_to_transform: Option<Vec<usize>> = Layers, unset("all layers"), Digest, [
            "num_layers" => "it counts the last layers; ours lists them, counted from 0",
            "lora_layers" => "it counts the last layers; ours lists them, counted from 0",
            "peft_layers_to_transform", "lora.layers",
        ];
        /// modules trained in full beside the adapter and saved with it, such as `lm_head`
        modules_to_save: Vec<String> = Names, default(Vec::new()), Digest, [
            "lora_modules_to_save", "additional_target", "trainable_modules",
        ];
        /// a PEFT adapter directory to start from
        init_from: Option<PathBuf> = OnePath, unset("a fresh adapter"), Digest, [
            "lora_model_dir", "adapter_name_or_path",
            "resume_adapter_file" => "it starts a new run from an adapter; to go on with a run: finetune run --resume",
            "pretrained_adapter",
        ];
    }
}

/// Which linear layers get an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetModules {
    AllLinear,
    /// PEFT's matching: a module is hit if its name is an entry, or ends with `.` and an entry.
    Names(Vec<String>),
    /// Must match the full module name.
    Regex(String),
}
