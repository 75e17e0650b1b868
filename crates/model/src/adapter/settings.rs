//! adapter_config.json: which settings fix the arithmetic, what they say about the tensors, and
//! which are unknown.
//!
//! The rules are those of PEFT 0.21 (`check_target_module_exists` and `get_pattern_key`). If PEFT
//! warns and goes on, a notice is kept. If PEFT would compute something else than the tensors say,
//! the adapter is refused.

use std::path::{Path, PathBuf};

use fancy_regex::Regex;
use finetune_store::json_fault;
use serde_json::{Map, Value};

use crate::adapter::files::{AdapterFiles, Format};
use crate::adapter::targets::{Layers, Named, Targets};
use crate::branch::{EMBEDDING, OUTPUT};
use crate::error::{ModelError, list};
use crate::files::text::read_text;
use crate::files::wrapper::module_in_text;
use crate::lora::{LoraTarget, ending, is_inside, is_match, is_named};

/// Largest adapter_config.json that is read, in bytes.
const LIMIT: u64 = 1 << 20;
/// PEFT's values if a file leaves them out.
const DEFAULT_RANK: usize = 8;
const DEFAULT_ALPHA: f64 = 8.0;

/// Settings that make the tensors mean something else than LoRA and DoRA branches.
const OTHER_ARITHMETIC: [&str; 14] = [
    "bias",
    "lora_bias",
    "layer_replication",
    "megatron_config",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "alora_invocation_tokens",
    "arrow_config",
    "trainable_token_indices",
    // A setting of the first versions: parts of a fused layer.
    "enable_lora",
    "lora_magnitude_vector",
];

/// Settings that are read here, or that matter in training only.
const KNOWN: [&str; 32] = [
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "use_rslora",
    "use_dora",
    "modules_to_save",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "merge_weights",
    "unsloth_fixed",
];

/// How large a branch is in the sum.
enum Scale {
    Alpha {
        alpha: f64,
        use_rslora: bool,
        pattern: Patterns<f64>,
    },
    /// mlx-lm's setting: the factor itself.
    Factor(f64),
}

/// Keys in the file's order. The first that matches counts.
struct Patterns<T>(Vec<(String, Regex, T)>);

impl<T: Copy> Patterns<T> {
    fn get(&self, module: &str) -> Option<T> {
        self.0.iter().find(|(_, regex, _)| is_match(regex, module)).map(|(.., value)| *value)
    }
}

pub(super) struct Settings {
    path: PathBuf,
    scale: Scale,
    /// `None`: the rank of the tensors.
    rank: Option<usize>,
    rank_pattern: Patterns<usize>,
    pub(super) targets: Targets,
    /// Ends of names of parameters that have a branch: those of stacked experts, and routers' weights.
    parameters: Vec<String>,
    /// Whether branches are those of DoRA.
    pub(super) use_dora: bool,
    /// Ends of names of modules that are trained in full.
    pub(super) saved: Vec<String>,
    /// Whether a tied output layer follows the embedding.
    pub(super) ties: bool,
    /// Unknown settings, and names that match nothing.
    pub(super) notices: Vec<String>,
    pub(super) config: Value,
}

impl Settings {
    /// Reads the settings of an adapter for a model that may have branches on these modules. `tied`:
    /// whether its output layer is its embedding.
    pub(super) fn read(files: &AdapterFiles, modules: &[String], tied: bool) -> Result<Settings, ModelError> {
        let path = files.config();
        let malformed = |what: String| ModelError::Malformed { path: path.clone(), what };
        let text = read_text(&path, LIMIT)?;
        let config: Value =
            serde_json::from_str(&text).map_err(|error| malformed(json_fault(text.as_bytes(), &error)))?;
        let object = config.as_object().ok_or_else(|| malformed("it should be an object".to_owned()))?;
        let mut settings = match files.format {
            Format::Peft => Reader { object, path: &path }.peft(modules)?,
            Format::Mlx => Reader { object, path: &path }.mlx(modules)?,
        };
        settings.ties &= tied;
        settings.config = config;
        Ok(settings)
    }

    /// Whether the settings name a branch on this module; `None` if they do not say.
    pub(super) fn expects(&self, module: &str) -> Option<bool> {
        if self.saved.iter().any(|saved| is_inside(module, saved)) {
            return Some(false);
        }
        if self.names_weight(module) {
            return Some(true);
        }
        // A tied output layer has the branch of the embedding.
        let follows = self.ties && module == OUTPUT;
        self.targets.contain(if follows { EMBEDDING } else { module })
    }

    /// Whether the settings name the weight of a module as a parameter.
    fn names_weight(&self, module: &str) -> bool {
        self.parameters.iter().any(|parameter| is_weight_of(module, parameter))
    }

    /// The branch of a module whose tensors have this rank.
    pub(super) fn target(&self, module: &str, rank: usize) -> Result<LoraTarget, ModelError> {
        // PEFT looks in the patterns for the name that it chose the branch by.
        let chosen_by = if self.names_weight(module) { &format!("{module}.weight") } else { module };
        let stated = self.rank_pattern.get(chosen_by).or(self.rank);
        if let Some(stated) = stated.filter(|&stated| stated != rank) {
            let what = format!("the rank of `{module}` is {stated} by the settings and {rank} by its tensors");
            return Err(ModelError::AdapterParts { path: self.path.clone(), what });
        }
        let (alpha, use_rslora) = match &self.scale {
            Scale::Alpha { alpha, use_rslora, pattern } => (pattern.get(chosen_by).unwrap_or(*alpha), *use_rslora),
            Scale::Factor(factor) => (factor * rank as f64, false),
        };
        Ok(LoraTarget { module: module.to_owned(), rank, alpha, use_rslora, use_dora: self.use_dora })
    }
}

struct Reader<'a> {
    object: &'a Map<String, Value>,
    path: &'a Path,
}

impl Reader<'_> {
    fn peft(&self, modules: &[String]) -> Result<Settings, ModelError> {
        let refused = |key, value: String| Err(ModelError::Setting { path: self.path.to_owned(), key, value });
        if let Some(kind) = self.object.get("peft_type").and_then(Value::as_str)
            && kind != "LORA"
        {
            return refused("peft_type", kind.to_owned());
        }
        for key in OTHER_ARITHMETIC {
            if self.is_set(key) {
                return refused(key, self.object[key].to_string());
            }
        }
        // With these the adapter was trained on a base that was changed along with it.
        if let Some(init) = self.object.get("init_lora_weights").and_then(Value::as_str)
            && !["gaussian", "eva", "orthogonal"].contains(&init)
        {
            return refused("init_lora_weights", init.to_owned());
        }
        let mut notices = Vec::new();
        if self.is_set("fan_in_fan_out") {
            notices.push(self.notice("fan_in_fan_out means nothing for these layers; it is passed over, as in PEFT"));
        }
        let unknown: Vec<String> =
            self.object.keys().filter(|key| !is_known(key.as_str()) && self.is_set(key.as_str())).cloned().collect();
        if !unknown.is_empty() {
            let names = list(&unknown);
            notices.push(
                self.notice(&format!("passed over, as nothing here knows it: {names} (of a newer PEFT, perhaps)")),
            );
        }
        let targets = self.targets(modules, &mut notices)?;
        let parameters = self.names("target_parameters")?;
        let is_there = |parameter: &String| {
            modules.iter().any(|module| is_named(module, parameter) || is_weight_of(module, parameter))
        };
        if let Some(other) = parameters.iter().find(|parameter| !is_there(parameter)) {
            return refused("target_parameters", format!("with `{other}`, which this model has not"));
        }
        let rank_pattern = self.patterns("rank_pattern", modules, &mut notices, |value| {
            value.as_u64().and_then(|rank| usize::try_from(rank).ok()).filter(|&rank| rank > 0)
        })?;
        let pattern = self.patterns("alpha_pattern", modules, &mut notices, finite)?;
        let rank = match self.object.get("r") {
            None => DEFAULT_RANK,
            Some(value) => value
                .as_u64()
                .filter(|rank| (1..=1 << 24).contains(rank))
                .map(|rank| rank as usize)
                .ok_or_else(|| self.malformed(format!("`r` should be a whole number above 0, not {value}")))?,
        };
        let alpha = match self.object.get("lora_alpha") {
            None => DEFAULT_ALPHA,
            Some(value) => {
                finite(value).ok_or_else(|| self.malformed(format!("`lora_alpha` should be a number, not {value}")))?
            }
        };
        Ok(Settings {
            path: self.path.to_owned(),
            scale: Scale::Alpha { alpha, use_rslora: self.is_set("use_rslora"), pattern },
            rank: Some(rank),
            rank_pattern,
            targets,
            parameters,
            use_dora: self.is_set("use_dora"),
            saved: self.names("modules_to_save")?,
            ties: self.is_set("ensure_weight_tying"),
            notices,
            config: Value::Null,
        })
    }

    /// The settings of an adapter of `mlx_lm.lora`: its own arguments, of which a few matter.
    fn mlx(&self, modules: &[String]) -> Result<Settings, ModelError> {
        let kind = self.object.get("fine_tune_type").and_then(Value::as_str).unwrap_or("lora");
        let parameters = self.object.get("lora_parameters").and_then(Value::as_object);
        if !["lora", "dora"].contains(&kind) {
            return Err(ModelError::Setting {
                path: self.path.to_owned(),
                key: "fine_tune_type",
                value: kind.to_owned(),
            });
        }
        // Older versions have the setting in the parameters.
        let use_dora = kind == "dora"
            || parameters.is_some_and(|parameters| parameters.get("use_dora") == Some(&Value::Bool(true)));
        let parameters = parameters.ok_or_else(|| self.malformed("`lora_parameters` is missing".to_owned()))?;
        let scale = parameters.get("scale").and_then(finite);
        let scale = scale.ok_or_else(|| self.malformed("`lora_parameters` should have a number `scale`".to_owned()))?;
        let rank = parameters.get("rank").and_then(Value::as_u64).map(|rank| rank as usize);
        // `lora_layers` is the older name. -1 means all layers. So does 0, as Python's slices
        // count.
        let last = self.object.get("num_layers").or(self.object.get("lora_layers")).and_then(Value::as_i64);
        let last = last.filter(|&last| last > 0).map(|last| last as usize);
        let keys = parameters.get("keys").and_then(Value::as_array);
        let keys: Option<Vec<String>> = keys
            .map(|keys| keys.iter().filter_map(Value::as_str).map(|key| module_in_text(key).into_owned()).collect());
        Ok(Settings {
            path: self.path.to_owned(),
            scale: Scale::Factor(scale),
            rank,
            rank_pattern: Patterns(Vec::new()),
            targets: Targets::last_layers(modules, last, keys),
            parameters: Vec::new(),
            use_dora,
            saved: Vec::new(),
            ties: false,
            notices: Vec::new(),
            config: Value::Null,
        })
    }

    /// The modules that the settings choose, with notices of names that no linear layer has.
    fn targets(&self, modules: &[String], notices: &mut Vec<String>) -> Result<Targets, ModelError> {
        let named = |key: &str| -> Result<Option<Named>, ModelError> {
            match self.object.get(key) {
                None | Some(Value::Null) => Ok(None),
                Some(Value::String(text)) => Named::text(text)
                    .map(Some)
                    .map_err(|_| self.malformed(format!("`{key}` = {text:?} is no regular expression"))),
                Some(Value::Array(list)) => Ok(Some(Named::List(
                    list.iter()
                        .map(|name| name.as_str().map(str::to_owned))
                        .collect::<Option<Vec<_>>>()
                        .ok_or_else(|| self.malformed(format!("`{key}` should be a list of names, or a pattern")))?,
                ))),
                Some(_) => Err(self.malformed(format!("`{key}` should be a list of names, or a pattern"))),
            }
        };
        let excluded = named("exclude_modules")?.filter(|excluded| !excluded.is_empty());
        let Some(chosen) = named("target_modules")? else { return Ok(Targets::Unsaid) };
        for (key, named) in [("target_modules", Some(&chosen)), ("exclude_modules", excluded.as_ref())] {
            let idle = named.map(|named| named.idle(modules)).unwrap_or_default();
            if !idle.is_empty() {
                notices.push(self.notice(&format!("{key} has {}, which no linear layer is called", list(&idle))));
            }
        }
        let layers = self.layers(&chosen, modules, notices)?;
        Ok(Targets::Chosen { chosen, excluded, layers })
    }

    /// The layers of `layers_to_transform`: the patterns that find a module's layer number, and the
    /// numbers.
    fn layers(
        &self,
        chosen: &Named,
        modules: &[String],
        notices: &mut Vec<String>,
    ) -> Result<Option<Layers>, ModelError> {
        let wrong = || self.malformed("`layers_to_transform` should be a number or a list of numbers".to_owned());
        let numbers: Vec<u64> = match self.object.get("layers_to_transform") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(list)) => list.iter().map(Value::as_u64).collect::<Option<Vec<_>>>().ok_or_else(wrong)?,
            Some(value) => vec![value.as_u64().ok_or_else(wrong)?],
        };
        let patterns: Vec<&str> = match self.object.get("layers_pattern") {
            Some(Value::String(text)) if !text.is_empty() => vec![text.as_str()],
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        if numbers.is_empty() {
            // Without numbers PEFT refuses a pattern for them.
            return match patterns.first() {
                None => Ok(None),
                Some(_) => Err(self.malformed("`layers_pattern` needs `layers_to_transform`".to_owned())),
            };
        }
        if !matches!(chosen, Named::List(_)) {
            let what = "`layers_to_transform` goes with a list of names in `target_modules`, not with a pattern";
            return Err(self.malformed(what.to_owned()));
        }
        let number_of = if patterns.is_empty() {
            vec![r"^.*?\.[^.]*\.(\d+)\.".to_owned()]
        } else {
            patterns.iter().map(|pattern| format!(r"^(?:|.*?\.){pattern}\.(\d+)\.")).collect()
        };
        let number_of = number_of
            .iter()
            .map(|pattern| Regex::new(pattern))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| self.malformed(format!("layers_pattern: {error}")))?;
        let there: Vec<u64> =
            modules.iter().filter_map(|module| super::targets::layer_number(&number_of, module)).collect();
        let idle: Vec<String> =
            numbers.iter().filter(|number| !there.contains(number)).map(|number| number.to_string()).collect();
        if !idle.is_empty() {
            notices.push(self.notice(&format!("layers_to_transform has {}, which the model has not", list(&idle))));
        }
        Ok(Some((number_of, numbers)))
    }

    /// A table of patterns such as `rank_pattern`, with a notice of those that match nothing.
    fn patterns<T>(
        &self,
        key: &str,
        modules: &[String],
        notices: &mut Vec<String>,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Patterns<T>, ModelError> {
        let empty = Map::new();
        let table = match self.object.get(key) {
            None | Some(Value::Null) => &empty,
            Some(value) => value.as_object().ok_or_else(|| self.malformed(format!("`{key}` should be an object")))?,
        };
        let mut patterns = Vec::new();
        for (pattern, value) in table {
            match (ending(pattern), read(value)) {
                (Ok(regex), Some(value)) => patterns.push((pattern.clone(), regex, value)),
                _ => return Err(self.malformed(format!("{key}: `{pattern}` cannot be used"))),
            }
        }
        let idle: Vec<String> = patterns
            .iter()
            .filter(|(_, regex, _)| {
                !modules.iter().any(|module| is_match(regex, module) || is_match(regex, &format!("{module}.weight")))
            })
            .map(|(pattern, ..)| pattern.clone())
            .collect();
        if !idle.is_empty() {
            notices.push(self.notice(&format!("{key} has {}, which matches no linear layer", list(&idle))));
        }
        Ok(Patterns(patterns))
    }

    /// A setting that is a list of names, or nothing.
    fn names(&self, key: &str) -> Result<Vec<String>, ModelError> {
        let wrong = || self.malformed(format!("`{key}` should be a list of names"));
        match self.object.get(key) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(list)) => {
                list.iter().map(|name| name.as_str().map(str::to_owned)).collect::<Option<_>>().ok_or_else(wrong)
            }
            Some(_) => Err(wrong()),
        }
    }

    /// Whether a setting says anything. Null, false, empty and "none" say nothing.
    fn is_set(&self, key: &str) -> bool {
        match self.object.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::Object(table)) => !table.is_empty(),
            Some(Value::String(text)) => !text.is_empty() && text != "none",
            Some(_) => true,
        }
    }

    fn notice(&self, what: &str) -> String {
        format!("{}: {what}", self.path.display())
    }

    fn malformed(&self, what: String) -> ModelError {
        ModelError::Malformed { path: self.path.to_owned(), what }
    }
}

/// Whether a name in `target_parameters` means the weight of this module.
fn is_weight_of(module: &str, parameter: &str) -> bool {
    parameter.strip_suffix(".weight").is_some_and(|name| is_named(module, name))
}

fn is_known(key: &str) -> bool {
    KNOWN.contains(&key) || OTHER_ARITHMETIC.contains(&key)
}

fn finite(value: &Value) -> Option<f64> {
    value.as_f64().filter(|number| number.is_finite())
}
