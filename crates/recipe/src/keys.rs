//! The one table of all keys. Parsing, defaults, bounds, hints, `recipes/README.md` and the digest read it.

use crate::choices::{
    BackendChoice, DeviceChoice, DtypeChoice, Format, Method, OptimizerName, Overlong, Quantization, ResultChoice,
    ScheduleName, SharesChoice, TopologyChoice, TrainOn,
};

use self::Absent::{Is, Required, Unset};

/// A key of the recipe.
#[derive(Debug)]
pub struct Key {
    /// "lora.rank"; without a dot for a key at the top.
    pub path: &'static str,
    pub kind: Kind,
    pub default: Absent,
    /// Whether it fixes the numbers of a run, and so belongs to the digest.
    pub in_digest: bool,
    /// One line.
    pub about: &'static str,
    /// Names that other tools, or habit, have for it: "table.name" counts in that table of ours only. With how to convert, where the
    /// meaning differs, else "".
    pub rivals: &'static [(&'static str, &'static str)],
}

impl Key {
    /// "" for a key at the top.
    pub fn table(&self) -> &'static str {
        self.path.split_once('.').map_or("", |(table, _)| table)
    }

    pub fn name(&self) -> &'static str {
        self.path.split_once('.').map_or(self.path, |(_, name)| name)
    }
}

/// What holds if a key is not given.
#[derive(Clone, Copy, Debug)]
pub enum Absent {
    /// TOML text.
    Is(&'static str),
    /// The key must be given.
    Required,
    /// The key may be left out; in words, what then happens.
    Unset(&'static str),
}

/// What a value may be.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Text,
    /// host:port
    Address,
    /// YYYY-MM-DD
    Date,
    /// One TCP port, or the first and the last of a range: "29500", "29500-29599"
    Ports,
    Path,
    /// A path or a list of paths.
    Paths,
    Integer {
        min: i64,
    },
    Float(Bounds),
    FloatPair(Bounds),
    Boolean,
    OneOf(&'static [&'static str]),
    Duration,
    /// "all-linear", a list of names, or a regular expression.
    Targets,
    Names,
    /// Counted from 0.
    Indices,
    IntegerByName {
        min: i64,
    },
    FloatByName(Bounds),
}

/// The range of a number; every number is finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bounds {
    /// Above 0.
    Positive,
    /// 0 or more.
    NotNegative,
    /// 0 to 1.
    Share,
    /// 0 or more and below 1.
    BelowOne,
}

/// The tables, in the order of the documentation.
pub const TABLES: &[&str] =
    &["model", "lora", "data", "train", "optimizer", "schedule", "eval", "checkpoint", "log", "distributed"];

/// Pairs of which only one may be given; the first has the default.
pub const EXCLUSIVE: &[[&str; 2]] =
    &[["train.epochs", "train.max_steps"], ["schedule.warmup_steps", "schedule.warmup_ratio"]];

pub fn find(table: &str, name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.table() == table && key.name() == name)
}

/// The key of a path as in [`Key::path`].
pub fn at(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.path == path)
}

const IN_DIGEST: bool = true;
const NOT_IN_DIGEST: bool = false;

type Rivals = &'static [(&'static str, &'static str)];

const fn key(
    path: &'static str,
    kind: Kind,
    default: Absent,
    in_digest: bool,
    about: &'static str,
    rivals: Rivals,
) -> Key {
    Key { path, kind, default, in_digest, about, rivals }
}

#[rustfmt::skip]
pub const KEYS: &[Key] = &[
    key("output_dir", Kind::Path, Unset("`runs/` and the recipe's file name without `.toml`"), NOT_IN_DIGEST,
        "the run directory: metrics, checkpoints, the final adapter",
        &[("out_dir", ""), ("output", ""), ("output_path", ""), ("run_dir", ""), ("save_dir", ""), ("adapter_path", "the final adapter is its folder `adapter`"), ("logging_dir", ""), ("adapter_file", "the final adapter is its folder `adapter`")]),
    key("seed", Kind::Integer { min: 0 }, Is("42"), IN_DIGEST,
        "fixes the order of rows, the initial adapter and dropout",
        &[("random_seed", ""), ("data_seed", "one seed fixes everything"), ("train.data_seed", "")]),

    key("model.path", Kind::Text, Required, NOT_IN_DIGEST,
        "a Hugging Face model directory, or a hub id such as `Qwen/Qwen3-0.6B`",
        &[("base_model", ""), ("model_name_or_path", ""), ("model_id", ""), ("model_name", ""), ("pretrained_model_name_or_path", ""), ("checkpoint_dir", ""), ("model_path", ""), ("model.name", ""), ("model.id", ""), ("model.model", ""), ("model.repo", ""), ("tokenizer_name_or_path", "the tokenizer lies beside the model")]),
    key("model.device", Kind::OneOf(DeviceChoice::ALL), Is(r#""auto""#), IN_DIGEST,
        "where to compute; `auto`: a GPU if there is one",
        &[("use_cpu", "write device = \"cpu\""), ("no_cuda", "write device = \"cpu\""), ("accelerator", ""), ("device_type", "")]),
    key("model.dtype", Kind::OneOf(DtypeChoice::ALL), Is(r#""auto""#), IN_DIGEST,
        "number type of the frozen base and, on a GPU, of the compute; `auto`: that of the model's file; adapter and optimizer state stay f32",
        &[("bf16", "write dtype = \"bf16\""), ("fp16", "write dtype = \"f16\""), ("float16", "write dtype = \"f16\""), ("bfloat16", "write dtype = \"bf16\""), ("fp32", "write dtype = \"f32\""), ("tf32", ""), ("torch_dtype", ""), ("precision", ""), ("mixed_precision", ""), ("pure_bf16", "write dtype = \"bf16\"")]),
    key("model.quantization", Kind::OneOf(Quantization::ALL), Unset("not quantized"), IN_DIGEST,
        "quantizes the frozen base: 4-bit NormalFloat or 8-bit integers",
        &[("load_in_4bit", "write quantization = \"nf4\""), ("load_in_8bit", "write quantization = \"int8\""), ("quantization_bit", "4 is \"nf4\", 8 is \"int8\""), ("quantize", ""), ("quantize_base", "write quantization = \"nf4\""), ("bnb_4bit_quant_type", ""), ("bnb_4bit_compute_dtype", "the compute type is `dtype` in [model]"), ("quantization_config", ""), ("quantization_method", "")]),

    key("lora.rank", Kind::Integer { min: 1 }, Is("16"), IN_DIGEST,
        "rank of the adapter's matrices",
        &[("r", ""), ("lora_r", ""), ("lora_rank", ""), ("lora_dim", ""), ("adapter_rank", "")]),
    key("lora.alpha", Kind::Float(Bounds::Positive), Is("32"), IN_DIGEST,
        "the adapter is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank))",
        &[("lora_alpha", ""), ("scale", "alpha = scale × rank"), ("lora_scale", "alpha = scale × rank"), ("scaling", "alpha = scaling × rank"), ("lora_scaling", "alpha = scaling × rank")]),
    key("lora.dropout", Kind::Float(Bounds::BelowOne), Is("0.0"), IN_DIGEST,
        "probability of dropping an input of the adapter",
        &[("lora_dropout", ""), ("adapter_dropout", "")]),
    key("lora.target_modules", Kind::Targets, Is(r#""all-linear""#), IN_DIGEST,
        "`\"all-linear\"`, a list of names (PEFT's matching), or a regex on the full module name; no match is an error",
        &[("targets", ""), ("lora_target", "`all` is \"all-linear\"; several names are a list"), ("lora_targets", ""), ("lora_target_modules", ""), ("lora_target_linear", "write target_modules = \"all-linear\""), ("lora_attn_modules", "names as in the model's files, such as \"q_proj\""), ("apply_lora_to_mlp", "list the names, such as \"gate_proj\""), ("keys", "module names as in the model's files, such as \"q_proj\""), ("lora_keys", ""), ("target_linear", ""), ("lora.target", ""), ("lora.modules", "")]),
    key("lora.use_rslora", Kind::Boolean, Is("false"), IN_DIGEST,
        "rank-stabilized scale: alpha / sqrt(rank)",
        &[("peft_use_rslora", ""), ("rslora", ""), ("use_rs_lora", "")]),
    key("lora.use_dora", Kind::Boolean, Is("false"), IN_DIGEST,
        "DoRA: trains the magnitude of each output apart from its direction",
        &[("peft_use_dora", ""), ("dora", ""), ("fine_tune_type", "\"dora\" is use_dora = true; \"lora\" and \"full\" are `method` in [train]")]),
    key("lora.rank_pattern", Kind::IntegerByName { min: 1 }, Is("{}"), IN_DIGEST,
        "ranks of modules that differ, by name or regex, as in PEFT: `{ \"q_proj\" = 8 }`",
        &[("peft_rank_pattern", ""), ("lora_rank_pattern", ""), ("ranks", "")]),
    key("lora.alpha_pattern", Kind::FloatByName(Bounds::Positive), Is("{}"), IN_DIGEST,
        "alphas of modules that differ, by name or regex, as in PEFT",
        &[("peft_alpha_pattern", ""), ("lora_alpha_pattern", ""), ("alphas", "")]),
    key("lora.layers_to_transform", Kind::Indices, Unset("all layers"), IN_DIGEST,
        "the layers that get an adapter, counted from 0",
        &[("num_layers", "it counts the last layers; ours lists them, counted from 0"), ("lora_layers", "it counts the last layers; ours lists them, counted from 0"), ("peft_layers_to_transform", ""), ("lora.layers", "")]),
    key("lora.modules_to_save", Kind::Names, Is("[]"), IN_DIGEST,
        "modules trained in full beside the adapter and saved with it, such as `lm_head`",
        &[("lora_modules_to_save", ""), ("additional_target", ""), ("trainable_modules", "")]),
    key("lora.init_from", Kind::Path, Unset("a fresh adapter"), IN_DIGEST,
        "a PEFT adapter directory to start from",
        &[("lora_model_dir", ""), ("adapter_name_or_path", ""), ("resume_adapter_file", "it starts a new run from an adapter; to go on with a run: finetune run --resume"), ("pretrained_adapter", "")]),

    key("data.train", Kind::Paths, Required, NOT_IN_DIGEST,
        "a JSONL file, a list of files, or a directory with `train.jsonl` (and `valid.jsonl`, `test.jsonl`)",
        &[("train_file", ""), ("train_data", ""), ("train_dataset", ""), ("dataset", "a path, not a name from a registry"), ("datasets", "a path, or a list of paths"), ("data_files", ""), ("data_path", ""), ("dataset_path", ""), ("dataset_dir", ""), ("data.path", ""), ("data.file", ""), ("data.files", ""), ("data.training", ""), ("data.source", "")]),
    key("data.eval", Kind::Paths, Unset("no evaluation, unless `train` is a directory with `valid.jsonl`"), NOT_IN_DIGEST,
        "held-back rows, as `train`",
        &[("eval_file", ""), ("eval_dataset", ""), ("eval_data", ""), ("validation_file", ""), ("valid_data", ""), ("test_datasets", ""), ("val_set_size", "write the held-back rows to a file of their own"), ("val_size", "write the held-back rows to a file of their own"), ("data.valid", ""), ("data.validation", ""), ("data.test", ""), ("data.val", ""), ("data.evaluation", "")]),
    key("data.format", Kind::OneOf(Format::ALL), Is(r#""auto""#), IN_DIGEST,
        "how rows are written; `auto`: told from the rows, which must all agree",
        &[("dataset_type", ""), ("chat_dataset", ""), ("formatting", ""), ("data_format", ""), ("conversation_format", ""), ("data.type", ""), ("data.style", "")]),
    key("data.max_seq_len", Kind::Integer { min: 2 }, Is("2048"), IN_DIGEST,
        "longest row, in tokens",
        &[("sequence_len", ""), ("sequence_length", ""), ("seq_len", ""), ("seq_length", ""), ("cutoff_len", ""), ("max_length", ""), ("max_seq_length", ""), ("model_max_length", ""), ("max_len", ""), ("block_size", ""), ("context_length", ""), ("max_tokens", ""), ("max_sequence_length", "")]),
    key("data.overlong", Kind::OneOf(Overlong::ALL), Is(r#""error""#), IN_DIGEST,
        "what happens to longer rows; they are counted and printed",
        &[("truncate", "write overlong = \"truncate\""), ("truncation", "write overlong = \"truncate\""), ("excess_length_strategy", ""), ("drop_long", "write overlong = \"drop\""), ("excess_len", "")]),
    key("data.packing", Kind::Boolean, Is("false"), IN_DIGEST,
        "several rows in a sequence, never attending to each other",
        &[("sample_packing", ""), ("neat_packing", "rows never attend to each other"), ("packed", ""), ("pack", ""), ("multipack", ""), ("pad_to_sequence_len", "leave it out")]),
    key("data.train_on", Kind::OneOf(TrainOn::ALL), Is(r#""assistant""#), IN_DIGEST,
        "the tokens in the loss: those of every assistant turn, of the last one only, or all",
        &[("train_on_inputs", "false is train_on = \"assistant\", true is \"all\""), ("train_on_input", "false is train_on = \"assistant\", true is \"all\""), ("train_on_prompt", "false is train_on = \"assistant\", true is \"all\""), ("mask_prompt", "true is train_on = \"assistant\", false is \"all\""), ("mask_history", "true is train_on = \"last\""), ("completion_only_loss", "true is train_on = \"assistant\", false is \"all\""), ("assistant_only_loss", "true is train_on = \"assistant\", false is \"all\""), ("roles_to_train", "[\"assistant\"] is train_on = \"assistant\""), ("masking_strategy", "")]),
    key("data.shuffle", Kind::Boolean, Is("true"), IN_DIGEST,
        "a new order each epoch, fixed by the seed; false: file order",
        &[("shuffle_data", ""), ("shuffle_merged_datasets", ""), ("disable_shuffling", "true is shuffle = false"), ("dataset_shuffle", "")]),
    key("data.chat_template", Kind::Path, Unset("the model's own"), IN_DIGEST,
        "a Jinja file that renders messages",
        &[("template", "a file; leave it out for the model's own"), ("chat_template_jinja", "a file"), ("chat_template_path", ""), ("prompt_template", "a file"), ("default_chat_template", "")]),
    key("data.date", Kind::Date, Unset("the day the run started, the same after every resume"), NOT_IN_DIGEST,
        "what a template that writes today's date writes: `2026-11-27`",
        &[("date_string", ""), ("data.today", "")]),

    key("train.method", Kind::OneOf(Method::ALL), Is(r#""lora""#), IN_DIGEST,
        "an adapter, or all weights",
        &[("finetuning_type", ""), ("train_type", ""), ("tuner_type", ""), ("adapter", "\"qlora\" is method = \"lora\" and quantization = \"nf4\" in [model]"), ("peft_type", ""), ("training_type", "")]),
    key("train.epochs", Kind::Integer { min: 1 }, Is("1"), NOT_IN_DIGEST,
        "passes over the training rows; or `max_steps`",
        &[("num_epochs", ""), ("num_train_epochs", ""), ("n_epochs", ""), ("max_epochs", ""), ("epoch", "")]),
    key("train.max_steps", Kind::Integer { min: 1 }, Unset("`epochs` counts"), NOT_IN_DIGEST,
        "optimizer steps; instead of `epochs`",
        &[("iters", "mlx-lm counts micro-batches, ours are optimizer steps: divide by its grad_accumulation_steps"), ("iterations", "ours are optimizer steps"), ("max_iters", "ours are optimizer steps"), ("num_steps", ""), ("train_steps", ""), ("total_steps", ""), ("max_steps_per_epoch", "ours counts the whole run"), ("max_train_steps", ""), ("train.steps", "")]),
    key("train.global_batch_size", Kind::Integer { min: 1 }, Is("16"), IN_DIGEST,
        "rows per optimizer step over all ranks, whatever the number of ranks",
        &[("gradient_accumulation_steps", "global_batch_size = micro_batch_size × accumulation × ranks"), ("grad_accumulation_steps", "global_batch_size = micro_batch_size × accumulation × ranks"), ("accumulate_grad_batches", "global_batch_size = micro_batch_size × accumulation × ranks"), ("gradient_accumulation", "global_batch_size = micro_batch_size × accumulation × ranks"), ("train_batch_size", ""), ("effective_batch_size", ""), ("total_batch_size", "")]),
    key("train.micro_batch_size", Kind::Integer { min: 1 }, Is("4"), IN_DIGEST,
        "rows per forward on one rank, at most",
        &[("batch_size", "rows per forward on one rank; rows per optimizer step over all ranks are `global_batch_size`, which is what mlx-lm's batch_size counts without accumulation"), ("per_device_train_batch_size", ""), ("per_device_batch_size", ""), ("device_batch_size", ""), ("per_device_eval_batch_size", "evaluation uses the same"), ("eval_batch_size", "evaluation uses the same")]),
    key("train.max_grad_norm", Kind::Float(Bounds::NotNegative), Is("1.0"), IN_DIGEST,
        "the gradient is scaled down to this norm, after the sum over all ranks; 0: off",
        &[("clip_grad_norm", ""), ("gradient_clipping", ""), ("grad_clip", ""), ("gradient_clip_val", ""), ("clip_grad", ""), ("max_norm", "")]),
    key("train.gradient_checkpointing", Kind::Boolean, Is("false"), NOT_IN_DIGEST,
        "recomputes activations in the backward pass: less memory, more time",
        &[("grad_checkpoint", ""), ("grad_checkpointing", ""), ("enable_activation_checkpointing", ""), ("activation_checkpointing", ""), ("disable_gradient_checkpointing", "true is gradient_checkpointing = false"), ("use_gradient_checkpointing", ""), ("gradient_checkpoint", ""), ("gradient_checkpointing_kwargs", "leave it out"), ("activation_checkpoint", "")]),

    key("optimizer.name", Kind::OneOf(OptimizerName::ALL), Is(r#""adamw""#), IN_DIGEST,
        "the optimizer",
        &[("optim", ""), ("optimizer_name", ""), ("optimizer.type", ""), ("optimizer.kind", ""), ("optimizer._component_", "")]),
    key("optimizer.learning_rate", Kind::Float(Bounds::Positive), Is("2e-4"), IN_DIGEST,
        "the highest learning rate",
        &[("lr", ""), ("base_lr", ""), ("max_lr", ""), ("peak_lr", ""), ("learningrate", "")]),
    key("optimizer.betas", Kind::FloatPair(Bounds::BelowOne), Is("[0.9, 0.999]"), IN_DIGEST,
        "decay of the first and second moment",
        &[("adam_beta1", "betas = [beta1, beta2]"), ("adam_beta2", "betas = [beta1, beta2]"), ("beta1", "betas = [beta1, beta2]"), ("beta2", "betas = [beta1, beta2]"), ("adam_betas", "")]),
    key("optimizer.eps", Kind::Float(Bounds::Positive), Is("1e-8"), IN_DIGEST,
        "added to the root of the second moment",
        &[("adam_epsilon", ""), ("epsilon", ""), ("adam_eps", "")]),
    key("optimizer.weight_decay", Kind::Float(Bounds::NotNegative), Is("0.01"), IN_DIGEST,
        "decoupled weight decay",
        &[("wd", ""), ("decay", ""), ("l2", "")]),

    key("schedule.name", Kind::OneOf(ScheduleName::ALL), Is(r#""cosine""#), IN_DIGEST,
        "the learning rate after warm-up",
        &[("lr_scheduler", ""), ("lr_scheduler_type", ""), ("lr_schedule", ""), ("scheduler", ""), ("lr_decay", ""), ("schedule.kind", ""), ("schedule.type", ""), ("schedule._component_", "")]),
    key("schedule.warmup_steps", Kind::Integer { min: 0 }, Is("0"), IN_DIGEST,
        "optimizer steps in which the learning rate climbs from 0; or `warmup_ratio`",
        &[("warmup", "optimizer steps; a share of the run is `warmup_ratio`"), ("num_warmup_steps", ""), ("lr_warmup_steps", ""), ("warmup_iters", "")]),
    key("schedule.warmup_ratio", Kind::Float(Bounds::Share), Unset("`warmup_steps` counts"), IN_DIGEST,
        "the same as a share of all steps; instead of `warmup_steps`",
        &[("warmup_fraction", ""), ("warmup_percent", "divide by 100"), ("warmup_proportion", "")]),
    key("schedule.min_lr_ratio", Kind::Float(Bounds::Share), Is("0.0"), IN_DIGEST,
        "the last learning rate as a share of the highest",
        &[("cosine_min_lr_ratio", ""), ("min_lr", "min_lr_ratio = min_lr / learning_rate"), ("min_learning_rate", "min_lr_ratio = min_learning_rate / learning_rate"), ("lr_end", "min_lr_ratio = lr_end / learning_rate"), ("min_lr_rate", "")]),

    key("eval.every", Kind::Integer { min: 0 }, Is("100"), NOT_IN_DIGEST,
        "optimizer steps between evaluations; 0: at the end only",
        &[("eval_steps", ""), ("eval_every", ""), ("steps_per_eval", ""), ("evals_per_epoch", "ours counts optimizer steps"), ("eval_strategy", "ours counts optimizer steps"), ("evaluation_strategy", "ours counts optimizer steps"), ("eval_interval", ""), ("run_val_every_n_steps", ""), ("eval.steps", ""), ("eval.interval", "")]),
    key("eval.early_stopping_patience", Kind::Integer { min: 1 }, Unset("never stops early"), IN_DIGEST,
        "stops after this many evaluations in a row without a new best",
        &[("early_stopping", ""), ("patience", ""), ("early_stopping_steps", "ours counts evaluations")]),
    key("eval.samples", Kind::Integer { min: 0 }, Is("0"), NOT_IN_DIGEST,
        "held-back rows whose answers are generated before and after training and shown",
        &[("num_samples", ""), ("num_generations", ""), ("eval_samples", "")]),
    key("eval.exact_match", Kind::Integer { min: 0 }, Is("0"), NOT_IN_DIGEST,
        "held-back rows answered greedily and scored by exact match before and after; 0: off",
        &[("eval.accuracy", ""), ("predict_with_generate", "ours is a number of rows"), ("eval_table_size", "ours is a number of rows")]),
    key("eval.max_new_tokens", Kind::Integer { min: 1 }, Is("64"), NOT_IN_DIGEST,
        "longest generated answer, in tokens",
        &[("generation_max_length", ""), ("eval_max_new_tokens", ""), ("max_completion_length", ""), ("eval.max_tokens", "")]),

    key("checkpoint.every", Kind::Integer { min: 0 }, Is("100"), NOT_IN_DIGEST,
        "optimizer steps between checkpoints; 0: at the end only",
        &[("save_steps", ""), ("save_every", ""), ("saves_per_epoch", "ours counts optimizer steps"), ("save_strategy", "ours counts optimizer steps"), ("save_interval", ""), ("checkpointing_steps", ""), ("save_every_n_steps", ""), ("checkpoint.steps", ""), ("checkpoint.interval", "")]),
    key("checkpoint.keep_last", Kind::Integer { min: 1 }, Is("3"), NOT_IN_DIGEST,
        "how many of the newest checkpoints stay",
        &[("save_total_limit", ""), ("keep_last_n", ""), ("keep_last_n_checkpoints", ""), ("max_checkpoints", ""), ("checkpoint.keep", "")]),
    key("checkpoint.keep_best", Kind::Boolean, Is("true"), NOT_IN_DIGEST,
        "also keeps the checkpoint with the lowest evaluation loss",
        &[("save_best", ""), ("save_best_checkpoint", ""), ("metric_for_best_model", "it is the evaluation loss")]),
    key("checkpoint.result", Kind::OneOf(ResultChoice::ALL), Unset("`best` with early stopping, else `last`"), NOT_IN_DIGEST,
        "which checkpoint becomes the result (`adapter/`): that with the lowest evaluation loss, or the last",
        &[("load_best_model_at_end", "true is result = \"best\""), ("checkpoint.adapter", "")]),
    key("checkpoint.copies", Kind::Integer { min: 0 }, Unset("1 where there are several hosts, else 0"), NOT_IN_DIGEST,
        "hosts besides the first that keep the newest checkpoint, so that a restart can go on without the first",
        &[("checkpoint.replicas", "")]),

    key("log.every", Kind::Integer { min: 1 }, Is("1"), NOT_IN_DIGEST,
        "optimizer steps between printed progress lines; `metrics.jsonl` has every step",
        &[("logging_steps", ""), ("log_every_n_steps", ""), ("log_every", ""), ("steps_per_report", ""), ("log_interval", ""), ("logging_strategy", "ours counts optimizer steps"), ("log.steps", ""), ("log.interval", "")]),
    key("log.prometheus", Kind::Address, Unset("off"), NOT_IN_DIGEST,
        "serves metrics to Prometheus at this host and port, such as `127.0.0.1:9400`",
        &[("use_prometheus", "an address such as \"127.0.0.1:9400\""), ("prometheus_port", "an address such as \"127.0.0.1:9400\""), ("metrics_port", "an address such as \"127.0.0.1:9400\""), ("log.address", "")]),

    key("distributed.backend", Kind::OneOf(BackendChoice::ALL), Is(r#""auto""#), NOT_IN_DIGEST,
        "how ranks talk; `auto`: RDMA over Thunderbolt where every rank has it, else TCP",
        &[("ddp_backend", ""), ("transport", ""), ("comm_backend", ""), ("distributed_backend", "")]),
    key("distributed.topology", Kind::OneOf(TopologyChoice::ALL), Is(r#""auto""#), NOT_IN_DIGEST,
        "who talks to whom",
        &[("network_topology", ""), ("distributed.network", ""), ("distributed.algorithm", "")]),
    key("distributed.timeout", Kind::Duration, Is(r#""5s""#), NOT_IN_DIGEST,
        "a silent peer is lost after this: a number with `ms`, `s`, `m` or `h`, up to 1h",
        &[("ddp_timeout", "with a unit: \"5s\""), ("nccl_timeout", "with a unit: \"5s\""), ("timeout_seconds", "with a unit: \"5s\""), ("peer_timeout", "with a unit: \"5s\"")]),
    key("distributed.virtual_ranks", Kind::Integer { min: 1 }, Unset("as many as there are processes"), IN_DIGEST,
        "the arithmetic of this many ranks, bit for bit, on any number of processes that divides it",
        &[("logical_ranks", ""), ("virtual_workers", ""), ("distributed.ranks", "how many processes run is for finetune launch -n; this is whose arithmetic they follow")]),
    key("distributed.min_ranks", Kind::Integer { min: 1 }, Unset("as many as at the start"), NOT_IN_DIGEST,
        "a restart may go on with this many",
        &[("min_nodes", ""), ("min_workers", ""), ("min_world_size", ""), ("nnodes", "how many run is for finetune launch -n; the least that may go on is `min_ranks`")]),
    key("distributed.join_timeout", Kind::Duration, Unset("1m under `finetune launch`, 5m under other launchers"), NOT_IN_DIGEST,
        "how long ranks wait for each other at the start: a number with `ms`, `s`, `m` or `h`, up to 1h",
        &[("rendezvous_timeout", "with a unit: \"5m\""), ("rdzv_timeout", "with a unit: \"5m\""), ("init_timeout", "with a unit: \"5m\""), ("start_timeout", "with a unit: \"5m\"")]),
    key("distributed.ports", Kind::Ports, Unset("any free ones"), NOT_IN_DIGEST,
        "TCP ports at which ranks listen, where a firewall lets only some through: `\"29500-29599\"`; each takes the first free one",
        &[("port_range", ""), ("distributed.port", "a port or a range, such as \"29500-29599\""), ("main_process_port", "the port of rank 0: finetune launch --port"), ("master_port", "the port of rank 0: finetune launch --port")]),
    key("distributed.shares", Kind::OneOf(SharesChoice::ALL), Is(r#""even""#), NOT_IN_DIGEST,
        "how the rows of a step are shared out: `even`; `measured`: by the ranks' speed, with `virtual_ranks`, without changing a bit",
        &[("load_balancing", "write shares = \"measured\"")]),
];

/// Other tools' keys that ours have no place for, and what there is instead.
#[rustfmt::skip]
pub const ELSEWHERE: &[(&str, &str)] = &[
    ("resume_from_checkpoint", "resuming is no key: finetune run RECIPE.toml --resume [CHECKPOINT]"),
    ("auto_resume_from_checkpoints", "resuming is no key: finetune run RECIPE.toml --resume"),
    ("resume", "resuming is no key: finetune run RECIPE.toml --resume [CHECKPOINT]"),
    ("hostfile", "hosts are no key: finetune launch --hostfile FILE -- RECIPE.toml"),
    ("hosts", "hosts are no key: finetune launch --hostfile FILE -- RECIPE.toml"),
    ("world_size", "the number of ranks is no key: finetune launch -n N -- RECIPE.toml"),
    ("num_gpus", "the number of ranks is no key: finetune launch -n N -- RECIPE.toml"),
    ("nproc_per_node", "the number of ranks is no key: finetune launch -n N -- RECIPE.toml"),
    ("num_processes", "the number of ranks is no key: finetune launch -n N -- RECIPE.toml"),
    ("stage", "leave it out: finetune does supervised fine-tuning"),
    ("do_train", "leave it out: finetune run trains"),
    ("do_eval", "leave it out: evaluation runs where `eval` in [data] names a file"),
    ("deepspeed", "leave it out: ranks average gradients, each holds the whole model"),
    ("fsdp", "leave it out: ranks average gradients, each holds the whole model"),
    ("fsdp_config", "leave it out: ranks average gradients, each holds the whole model"),
    ("flash_attention", "leave it out: there is nothing to choose"),
    ("flash_attn", "leave it out: there is nothing to choose"),
    ("attn_implementation", "leave it out: there is nothing to choose"),
    ("report_to", "leave it out: metrics.jsonl and report.html are always written; `prometheus` in [log] serves metrics"),
    ("wandb_project", "leave it out: metrics.jsonl and report.html are always written"),
    ("wandb_name", "leave it out: metrics.jsonl and report.html are always written"),
    ("val_batches", "leave it out: evaluation reads every held-back row"),
    ("test_batches", "leave it out: evaluation reads every held-back row"),
    ("export", "exporting is a command: finetune export RUN --format merged --output DIR"),
    ("push_to_hub", "finetune uploads nothing"),
    ("trust_remote_code", "leave it out: no code of a model is ever run"),
    ("compile", "leave it out"),
    ("version", "leave it out"),
];

/// Other tools' words for our tables.
#[rustfmt::skip]
pub const TABLE_RIVALS: &[(&str, &str)] = &[
    ("training", "train"), ("trainer", "train"), ("training_args", "train"), ("training_arguments", "train"),
    ("dataset", "data"), ("datasets", "data"), ("tokenizer", "data"),
    ("adapter", "lora"), ("peft", "lora"), ("lora_parameters", "lora"), ("lora_config", "lora"), ("qlora", "lora"),
    ("lr_schedule", "schedule"), ("lr_scheduler", "schedule"), ("scheduler", "schedule"),
    ("evaluation", "eval"), ("validation", "eval"), ("checkpoints", "checkpoint"), ("checkpointing", "checkpoint"),
    ("checkpointer", "checkpoint"), ("save", "checkpoint"), ("logging", "log"), ("logger", "log"), ("logs", "log"),
    ("optim", "optimizer"), ("base_model", "model"), ("cluster", "distributed"), ("network", "distributed"),
    ("ddp", "distributed"), ("parallel", "distributed"),
];

/// Other tools' words for a value: key, their word in lower case, ours.
#[rustfmt::skip]
pub const VALUE_RIVALS: &[(&str, &str, &str)] = &[
    ("model.device", "cuda", "gpu"), ("model.device", "mps", "gpu"), ("model.device", "metal", "gpu"),
    ("model.dtype", "bfloat16", "bf16"), ("model.dtype", "float16", "f16"), ("model.dtype", "fp16", "f16"),
    ("model.dtype", "half", "f16"), ("model.dtype", "float32", "f32"), ("model.dtype", "fp32", "f32"),
    ("model.quantization", "4bit", "nf4"), ("model.quantization", "int4", "nf4"), ("model.quantization", "fp4", "nf4"),
    ("model.quantization", "8bit", "int8"),
    ("data.format", "chat", "messages"), ("data.format", "chatml", "messages"), ("data.format", "openai", "messages"),
    ("data.format", "chat_template", "messages"), ("data.format", "conversation", "messages"),
    ("data.format", "completions", "prompt_completion"), ("data.format", "completion", "text"),
    ("data.train_on", "completion", "assistant"), ("data.train_on", "inputs", "all"), ("data.train_on", "answers", "assistant"),
    ("train.method", "qlora", "lora"), ("train.method", "dora", "lora"), ("train.method", "fft", "full"),
    ("optimizer.name", "adam", "adamw"), ("optimizer.name", "adamw_torch", "adamw"),
    ("optimizer.name", "adamw_torch_fused", "adamw"), ("optimizer.name", "adamw_8bit", "adamw"),
    ("schedule.name", "cosine_decay", "cosine"), ("schedule.name", "linear_schedule", "linear"), ("schedule.name", "none", "constant"),
    ("schedule.name", "constant_with_warmup", "constant"),
    ("distributed.backend", "jaccl", "rdma"), ("distributed.backend", "ring", "tcp"), ("distributed.backend", "gloo", "tcp"),
];
