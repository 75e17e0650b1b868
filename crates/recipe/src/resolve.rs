//! The recipe written back as TOML with every default, and the digest of what fixes the numbers of a run.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use crate::keys::{KEYS, Kind};
use crate::path::absolute;
use crate::{Length, Method, Recipe, TargetModules, Warmup, duration};

/// Changes when the same recipe would mean another run.
const DIGEST_VERSION: &str = "finetune recipe 1";

impl Recipe {
    /// The recipe as resolved: every default written out, paths absolute so that they hold in any folder. Parses back to
    /// an equal recipe if this one's paths are absolute.
    pub fn to_toml(&self) -> String {
        let mut text = String::from("# The recipe as resolved, every default written out.\n");
        let mut table = "";
        for key in KEYS {
            // With full fine-tuning the keys of the adapter are refused.
            if key.table() == "lora" && self.train.method == Method::Full {
                continue;
            }
            let Some(value) = self.value(key.path) else {
                continue;
            };
            if key.table() != table {
                table = key.table();
                let _ = writeln!(text, "\n[{table}]");
            }
            let _ = writeln!(text, "{} = {value}", key.name());
        }
        text
    }

    /// Every key that fixes the numbers of a run with its value as TOML text ("none" if unset), in the order of the
    /// documentation. Where the run writes, how long it trains and how often it looks do not count; the model and the
    /// rows are compared by content elsewhere, so of the paths that do count only the last name is taken.
    pub fn meaning(&self) -> Vec<(&'static str, String)> {
        let entry = |path: &'static str| {
            let value = match path {
                "lora.init_from" => self.lora.init_from.as_deref().map(last_name),
                "data.chat_template" => self.data.chat_template.as_deref().map(last_name),
                _ => self.value(path),
            };
            (path, value.unwrap_or_else(|| "none".to_owned()))
        };
        KEYS.iter().filter(|key| key.in_digest).map(|key| entry(key.path)).collect()
    }

    /// What ranks that train together must share: [`Recipe::meaning`], and how often they stop to look, save and compare.
    pub fn shared(&self) -> Vec<(&'static str, String)> {
        let more = KEYS.iter().filter(|key| {
            let local = matches!(key.kind, Kind::Path | Kind::Paths | Kind::Address);
            // How long a rank waits, and at which ports, is its own affair.
            let own =
                ["model.path", "log.every", "distributed.min_ranks", "distributed.join_timeout", "distributed.ports"];
            !key.in_digest && !local && !own.contains(&key.path)
        });
        let more = more.map(|key| (key.path, self.value(key.path).unwrap_or_else(|| "none".to_owned())));
        self.meaning().into_iter().chain(more).collect()
    }

    /// BLAKE3 of [`Recipe::meaning`], 64 hexadecimal digits.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(DIGEST_VERSION.as_bytes());
        for (path, value) in self.meaning() {
            hasher.update(format!("\n{path} = {value}").as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The value of a key as TOML text; `None` if it is unset.
    fn value(&self, path: &str) -> Option<String> {
        let Recipe { model, lora, data, train, optimizer, schedule, eval, checkpoint, log, distributed, .. } = self;
        Some(match path {
            "output_dir" => path_text(&self.output_dir),
            "seed" => self.seed.to_string(),

            "model.path" => match model.hub_id() {
                Some(id) => quoted(id),
                None => path_text(Path::new(&model.path)),
            },
            "model.device" => quoted(model.device.as_str()),
            "model.dtype" => quoted(model.dtype.as_str()),
            "model.quantization" => quoted(model.quantization?.as_str()),

            "lora.rank" => lora.rank.to_string(),
            "lora.alpha" => float(lora.alpha),
            "lora.dropout" => float(lora.dropout),
            "lora.target_modules" => match &lora.target_modules {
                TargetModules::AllLinear => quoted("all-linear"),
                TargetModules::Names(names) => list(names, |name| quoted(name)),
                TargetModules::Regex(regex) => quoted(regex),
            },
            "lora.use_rslora" => lora.use_rslora.to_string(),
            "lora.use_dora" => lora.use_dora.to_string(),
            "lora.rank_pattern" => by_name(&lora.rank_pattern, usize::to_string),
            "lora.alpha_pattern" => by_name(&lora.alpha_pattern, |alpha| float(*alpha)),
            "lora.layers_to_transform" => list(lora.layers_to_transform.as_ref()?, usize::to_string),
            "lora.modules_to_save" => list(&lora.modules_to_save, |name| quoted(name)),
            "lora.init_from" => path_text(lora.init_from.as_ref()?),

            "data.train" => list(&data.train, |path| path_text(path)),
            "data.eval" if data.eval.is_empty() => return None,
            "data.eval" => list(&data.eval, |path| path_text(path)),
            "data.format" => quoted(data.format.as_str()),
            "data.max_seq_len" => data.max_seq_len.to_string(),
            "data.overlong" => quoted(data.overlong.as_str()),
            "data.packing" => data.packing.to_string(),
            "data.train_on" => quoted(data.train_on.as_str()),
            "data.shuffle" => data.shuffle.to_string(),
            "data.chat_template" => path_text(data.chat_template.as_ref()?),
            "data.date" => quoted(data.date.as_ref()?),

            "train.method" => quoted(train.method.as_str()),
            "train.epochs" => match train.length {
                Length::Epochs(epochs) => epochs.to_string(),
                Length::Steps(_) => return None,
            },
            "train.max_steps" => match train.length {
                Length::Steps(steps) => steps.to_string(),
                Length::Epochs(_) => return None,
            },
            "train.global_batch_size" => train.global_batch_size.to_string(),
            "train.micro_batch_size" => train.micro_batch_size.to_string(),
            "train.max_grad_norm" => float(train.max_grad_norm),
            "train.gradient_checkpointing" => train.gradient_checkpointing.to_string(),

            "optimizer.name" => quoted(optimizer.name.as_str()),
            "optimizer.learning_rate" => float(optimizer.learning_rate),
            "optimizer.betas" => list(&optimizer.betas, |beta| float(*beta)),
            "optimizer.eps" => float(optimizer.eps),
            "optimizer.weight_decay" => float(optimizer.weight_decay),

            "schedule.name" => quoted(schedule.name.as_str()),
            "schedule.warmup_steps" => match schedule.warmup {
                Warmup::Steps(steps) => steps.to_string(),
                Warmup::Ratio(_) => return None,
            },
            "schedule.warmup_ratio" => match schedule.warmup {
                Warmup::Ratio(ratio) => float(ratio),
                Warmup::Steps(_) => return None,
            },
            "schedule.min_lr_ratio" => float(schedule.min_lr_ratio),

            "eval.every" => eval.every.to_string(),
            "eval.early_stopping_patience" => eval.early_stopping_patience?.to_string(),
            "eval.samples" => eval.samples.to_string(),
            "eval.exact_match" => eval.exact_match.to_string(),
            "eval.max_new_tokens" => eval.max_new_tokens.to_string(),

            "checkpoint.every" => checkpoint.every.to_string(),
            "checkpoint.keep_last" => checkpoint.keep_last.to_string(),
            "checkpoint.keep_best" => checkpoint.keep_best.to_string(),
            "checkpoint.result" => quoted(checkpoint.result?.as_str()),
            "checkpoint.copies" => checkpoint.copies?.to_string(),

            "log.every" => log.every.to_string(),
            "log.prometheus" => quoted(log.prometheus.as_ref()?),

            "distributed.backend" => quoted(distributed.backend.as_str()),
            "distributed.topology" => quoted(distributed.topology.as_str()),
            "distributed.timeout" => quoted(&duration::text(distributed.timeout)),
            "distributed.virtual_ranks" => distributed.virtual_ranks?.to_string(),
            "distributed.min_ranks" => distributed.min_ranks?.to_string(),
            "distributed.join_timeout" => quoted(&duration::text(distributed.join_timeout?)),
            "distributed.ports" => match distributed.ports? {
                (first, last) if first == last => quoted(&first.to_string()),
                (first, last) => quoted(&format!("{first}-{last}")),
            },
            "distributed.shares" => quoted(distributed.shares.as_str()),

            other => unreachable!("{other} is in KEYS and not here"),
        })
    }
}

/// Rust's shortest form that reads back to the same bits; it always has a point or an exponent, so TOML reads a float.
fn float(number: f64) -> String {
    format!("{number:?}")
}

fn list<T>(items: &[T], text: impl Fn(&T) -> String) -> String {
    format!("[{}]", items.iter().map(text).collect::<Vec<_>>().join(", "))
}

fn by_name<T>(items: &BTreeMap<String, T>, text: impl Fn(&T) -> String) -> String {
    if items.is_empty() {
        return "{}".to_owned();
    }
    let entries: Vec<String> = items.iter().map(|(name, item)| format!("{} = {}", quoted(name), text(item))).collect();
    format!("{{ {} }}", entries.join(", "))
}

fn path_text(path: &Path) -> String {
    quoted(&absolute(path).to_string_lossy())
}

fn last_name(path: &Path) -> String {
    quoted(&path.file_name().unwrap_or(path.as_os_str()).to_string_lossy())
}

/// A TOML basic string on one line.
fn quoted(text: &str) -> String {
    let mut result = String::from("\"");
    for letter in text.chars() {
        match letter {
            '"' | '\\' => {
                result.push('\\');
                result.push(letter);
            }
            letter if letter.is_control() => {
                let _ = write!(result, "\\u{:04X}", letter as u32);
            }
            letter => result.push(letter),
        }
    }
    result + "\""
}
