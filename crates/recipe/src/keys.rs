//! All keys of the recipe as one list. Each is declared in `tables`, in the file of its table.

use crate::Recipe;

/// A key of the recipe, as its declaration says.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// "lora.rank"; without a dot for a key at the top.
    pub path: &'static str,
    /// One line.
    pub about: &'static str,
    pub absent: Absent,
    /// Whether it fixes the numbers of a run, and so belongs to the digest.
    pub in_digest: bool,
    /// Whether ranks that train together must have the same value.
    pub shared: bool,
    /// What other tools, or habit, call it: the name, and how to convert the value or "".
    /// "table.name" counts in that table of ours only.
    pub rivals: &'static [(&'static str, &'static str)],
    /// The path of the key with a default that this one replaces; only one of them may be given.
    pub instead_of: Option<&'static str>,
    /// What a value may be, in the words of `recipes/README.md`.
    pub(crate) words: fn() -> String,
    /// What a value may be, as the members of a JSON schema.
    pub(crate) schema: fn() -> String,
    /// The value as canonical TOML; `None` if it is unset.
    pub(crate) written: fn(&Recipe) -> Option<String>,
    /// Whether the value is a table, of which `--set` may name one entry.
    pub(crate) is_table: fn() -> bool,
    /// The value as it counts in the digest; `None` if it is unset.
    pub(crate) meaning: fn(&Recipe) -> Option<String>,
}

impl Key {
    /// "" for a key at the top.
    pub fn table(&self) -> &'static str {
        self.path.split_once('.').map_or("", |(table, _)| table)
    }

    /// The path of the key in whose place this one stands; only one of them may be given.
    pub fn replaces(&self) -> Option<&'static str> {
        let beside = APART.iter().find(|(_, path)| *path == self.path).map(|(other, _)| *other);
        self.instead_of.or(beside)
    }

    /// The path without the table.
    pub fn name(&self) -> &'static str {
        self.path.split_once('.').map_or(self.path, |(_, name)| name)
    }
}

/// What holds if a key is not given.
#[derive(Clone, Copy, Debug)]
pub enum Absent {
    /// A default, as TOML text that is JSON too.
    Is(fn() -> String),
    /// The key must be given. The line of an example.
    Required(&'static str),
    /// The key may be left out. What then happens, in words.
    Unset(&'static str),
}

/// For whom the value of a key counts.
pub(crate) enum Scope {
    /// It fixes the numbers of a run: it belongs to the digest, and all ranks share it.
    Digest,
    /// Ranks that train together must have the same value.
    Shared,
    /// Each rank may have its own value.
    Local,
}

/// Pairs of keys that fill fields of their own, and of which only one may be given.
const APART: [(&str, &str); 1] = [("data.eval", "data.eval_share")];

/// The tables, in the order of the documentation.
pub const TABLES: &[&str] = Recipe::TABLES;

/// All keys, in the order of the documentation.
pub const KEYS: &[Key] = &ALL;

const COUNT: usize = count(Recipe::ALL_KEYS);
const ALL: [Key; COUNT] = joined(Recipe::ALL_KEYS);

/// How many keys there are in tables of fields of keys.
const fn count(tables: &[&[&[Key]]]) -> usize {
    let (mut total, mut table) = (0, 0);
    while table < tables.len() {
        let mut field = 0;
        while field < tables[table].len() {
            total += tables[table][field].len();
            field += 1;
        }
        table += 1;
    }
    total
}

/// The keys of all fields of all tables as one array. `N` is their [`count`].
const fn joined<const N: usize>(tables: &[&[&[Key]]]) -> [Key; N] {
    let mut keys = [tables[0][0][0]; N];
    let (mut next, mut table) = (0, 0);
    while table < tables.len() {
        let mut field = 0;
        while field < tables[table].len() {
            let mut key = 0;
            while key < tables[table][field].len() {
                keys[next] = tables[table][field][key];
                next += 1;
                key += 1;
            }
            field += 1;
        }
        table += 1;
    }
    keys
}

/// The key of this name in a table; "" is the top.
pub fn find(table: &str, name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.table() == table && key.name() == name)
}

/// What there is in place of the ways in which other tools split a model.
const LARGE_MODELS: &str = "leave it out: ranks share out rows and add up gradients; a model without room on one of them: `stages` in \
    [parallel], or `residency` in [model]";
const SLICES: &str = "training spreads whole layers over ranks: `stages` in [parallel]; slices of layers are for answers: finetune \
    launch -n N --parallel tensor -- serve MODEL";
const REPLICAS: &str = "how many hold the model beside each other is no key: finetune launch -n N -- RECIPE.toml makes N / `stages` of \
    them";
const WHOLE_ROWS: &str = "leave it out: ranks share out rows and layers, and no row is cut";
const WHOLE_EXPERTS: &str = "leave it out: experts are spread over ranks with their layers, by `stages` in [parallel]";

/// Keys of other tools that have no counterpart here, and what there is instead. "table.name" counts in that table of
/// ours only.
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
    ("parallel.stage", "ours is `stages`: how many ranks hold the layers of one model together"),
    ("stage", "leave it out: finetune does supervised fine-tuning"),
    ("do_train", "leave it out: finetune run trains"),
    ("do_eval", "leave it out: evaluation runs where `eval` in [data] names a file, or `eval_share` a part of the rows"),
    ("deepspeed", LARGE_MODELS),
    ("fsdp", LARGE_MODELS),
    ("fsdp_config", LARGE_MODELS),
    ("parallel.tensor", SLICES),
    ("parallel.tp", SLICES),
    ("parallel.tensor_parallel", SLICES),
    ("tensor_parallel_size", SLICES),
    ("tensor_parallel_degree", SLICES),
    ("tensor_model_parallel_size", SLICES),
    ("tp_size", SLICES),
    ("tp", SLICES),
    ("parallel.replicas", REPLICAS),
    ("parallel.copies", REPLICAS),
    ("parallel.data", REPLICAS),
    ("parallel.dp", REPLICAS),
    ("parallel.data_parallel", REPLICAS),
    ("data_parallel_size", REPLICAS),
    ("data_parallel_degree", REPLICAS),
    ("data_parallel_replicate_degree", REPLICAS),
    ("dp_size", REPLICAS),
    ("dp", REPLICAS),
    ("parallel.context", WHOLE_ROWS),
    ("parallel.sequence", WHOLE_ROWS),
    ("context_parallel_size", WHOLE_ROWS),
    ("context_parallel_degree", WHOLE_ROWS),
    ("sequence_parallel_degree", WHOLE_ROWS),
    ("parallel.expert", WHOLE_EXPERTS),
    ("parallel.experts", WHOLE_EXPERTS),
    ("expert_parallel_size", WHOLE_EXPERTS),
    ("expert_parallel_degree", WHOLE_EXPERTS),
    ("expert_model_parallel_size", WHOLE_EXPERTS),
    ("flash_attention", "leave it out: there is nothing to choose"),
    ("flash_attn", "leave it out: there is nothing to choose"),
    ("attn_implementation", "leave it out: there is nothing to choose"),
    ("report_to", "leave it out: metrics.jsonl and report.html are always written; `tensorboard` and `prometheus` in [log] give the numbers to others"),
    ("wandb_project", "leave it out: metrics.jsonl and report.html are always written; W&B reads the files of `tensorboard` in [log]"),
    ("wandb_name", "leave it out: metrics.jsonl and report.html are always written; W&B reads the files of `tensorboard` in [log]"),
    ("val_batches", "leave it out: evaluation reads every held-back row"),
    ("test_batches", "leave it out: evaluation reads every held-back row"),
    ("export", "exporting is a command: finetune export RUN --format merged --output DIR"),
    ("push_to_hub", "uploading is a command: finetune upload RUN OWNER/NAME"),
    ("trust_remote_code", "leave it out: no code of a model is ever run"),
    ("compile", "leave it out"),
    ("version", "leave it out"),
];

/// What other tools call our tables: their name, ours.
#[rustfmt::skip]
pub const TABLE_RIVALS: &[(&str, &str)] = &[
    ("training", "train"), ("trainer", "train"), ("training_args", "train"), ("training_arguments", "train"),
    ("dataset", "data"), ("datasets", "data"), ("tokenizer", "data"),
    ("adapter", "lora"), ("peft", "lora"), ("lora_parameters", "lora"), ("lora_config", "lora"), ("qlora", "lora"),
    ("lr_schedule", "schedule"), ("lr_scheduler", "schedule"), ("scheduler", "schedule"),
    ("evaluation", "eval"), ("validation", "eval"), ("checkpoints", "checkpoint"), ("checkpointing", "checkpoint"),
    ("checkpointer", "checkpoint"), ("save", "checkpoint"), ("logging", "log"), ("logger", "log"), ("logs", "log"),
    ("optim", "optimizer"), ("base_model", "model"), ("cluster", "distributed"), ("network", "distributed"),
    ("ddp", "distributed"), ("pipeline", "parallel"), ("pipeline_parallel", "parallel"), ("pp", "parallel"),
    ("parallelism", "parallel"), ("model_parallel", "parallel"), ("sharding", "parallel"),
];
