//! What config.json says of packed weights.
//!
//! A weight's format is told by its tensors. The configuration says what they leave open: how zero
//! points are stored, which columns a group has. What it says twice is compared.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::foreign::{self, Foreign};
use crate::PackedError;

/// `quantization` and `quantization_config` of a model's config.json, or their absence.
#[derive(Clone, Debug, Default)]
pub struct PackedConfig {
    pub(super) mlx: Option<Mlx>,
    method: Option<Method>,
    /// Names and patterns of modules that stay as they are. `None`: no list is there.
    pub(super) plain: Option<Vec<String>>,
}

/// `quantization` of mlx-lm.
#[derive(Clone, Debug)]
pub(super) struct Mlx {
    pub(super) all: MlxForm,
    /// By the name of the module; `None` for those that stay as they are.
    pub(super) modules: BTreeMap<String, Option<MlxForm>>,
}

/// The form of a module in MLX.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MlxForm {
    pub(super) bits: usize,
    pub(super) group: usize,
    pub(super) mode: String,
}

/// `quantization_config` of transformers, by its `quant_method`.
#[derive(Clone, Debug)]
pub(super) enum Method {
    Bitsandbytes {
        words: String,
        form: Bitsandbytes,
    },
    Gptq(Gptq),
    Awq {
        group: Option<usize>,
    },
    Compressed {
        words: String,
        schemes: Vec<Scheme>,
    },
    Fp8 {
        block: Option<[usize; 2]>,
    },
    /// gpt-oss's.
    Mxfp4,
    /// Formats whose tensors say all.
    Other {
        words: &'static str,
    },
    Foreign(Foreign),
}

/// What bitsandbytes packs in.
#[derive(Clone, Copy, Debug)]
pub(super) enum Bitsandbytes {
    Int8,
    Four { nf4: bool, double: bool },
}

/// GPTQ's keys.
#[derive(Clone, Debug, Default)]
pub(super) struct Gptq {
    pub(super) bits: Option<usize>,
    /// `None`: not said. 0: all columns.
    pub(super) group: Option<usize>,
    /// Whether zero points are stored as they are: `checkpoint_format` is `gptq_v2`.
    pub(super) exact_zeros: bool,
    /// Whether modules may have other bits and groups than the above.
    pub(super) dynamic: bool,
    pub(super) act_order: bool,
    /// Whether the output layer is packed too.
    pub(super) has_output: bool,
    /// How the names of those modules end that are packed. `None`: all linear layers of the decoder.
    pub(super) modules: Option<Vec<String>>,
}

/// The weights of one of compressed-tensors' `config_groups`.
#[derive(Clone, Debug)]
pub(super) struct Scheme {
    pub(super) bits: Option<usize>,
    pub(super) group: Option<usize>,
    pub(super) block: Option<[usize; 2]>,
    pub(super) strategy: String,
    /// The format of the group, or that of all of them.
    pub(super) format: String,
    pub(super) is_float: bool,
    pub(super) is_symmetric: bool,
    pub(super) act_order: bool,
    /// Names, patterns and classes of modules.
    pub(super) targets: Vec<String>,
}

/// What the list of modules is called that stay as they are: transformers, MiniMax, bitsandbytes, compressed-tensors.
const PLAIN: [&str; 4] = ["modules_to_not_convert", "ignored_layers", "llm_int8_skip_modules", "ignore"];

impl PackedConfig {
    /// Reads the two keys out of a model's config.json, which lies at `path`.
    ///
    /// # Errors
    /// [`PackedError::Malformed`] for values of another type than their key has. A method that is
    /// not read is no error before a weight is packed by it.
    pub fn parse(config: &Map<String, Value>, path: &Path) -> Result<PackedConfig, PackedError> {
        let object = |key: &'static str| match config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(keys)) => Ok(Some(Keys { path, name: key, keys })),
            Some(_) => Err(malformed(path, key, "it is no object")),
        };
        let (mlx, hub) = (object("quantization")?, object("quantization_config")?);
        let hub_is_mlx = hub
            .as_ref()
            .is_some_and(|keys| !keys.keys.contains_key("quant_method") && keys.keys.contains_key("group_size"));
        let (mlx, hub) = match (mlx, hub) {
            (None, Some(keys)) if hub_is_mlx => (Some(keys), None),
            (mlx, hub) => (mlx, hub.filter(|_| !hub_is_mlx)),
        };
        let mlx = mlx.map(|keys| Mlx::parse(&keys)).transpose()?;
        let plain = hub.as_ref().and_then(|keys| PLAIN.iter().find_map(|key| keys.texts(key)));
        let method = hub.map(|keys| Method::parse(&keys)).transpose()?;
        Ok(PackedConfig { mlx, method, plain })
    }

    /// Whether it names a packed format.
    pub fn is_packed(&self) -> bool {
        self.mlx.is_some() || self.method.is_some()
    }

    /// Whether it is mlx-lm's or mlx-vlm's.
    pub fn is_mlx(&self) -> bool {
        self.mlx.is_some()
    }

    /// The format that it names, in words: "MLX 4-bit, groups of 64".
    pub fn describe(&self) -> Option<String> {
        if let Some(mlx) = &self.mlx {
            return Some(match mlx.all.mode.as_str() {
                "affine" => format!("MLX {}-bit, groups of {}", mlx.all.bits, mlx.all.group),
                mode => format!("MLX {mode}"),
            });
        }
        Some(match self.method.as_ref()? {
            Method::Bitsandbytes { words, .. } | Method::Compressed { words, .. } => words.clone(),
            Method::Gptq(gptq) => gptq.describe(),
            Method::Awq { group } => {
                let group = group.map_or_else(String::new, |group| format!(", groups of {group}"));
                format!("AWQ 4-bit{group}")
            }
            Method::Fp8 { block: Some([rows, columns]) } => format!("FP8 E4M3, blocks of {rows} x {columns}"),
            Method::Fp8 { block: None } => "FP8 E4M3".to_owned(),
            Method::Mxfp4 => "MXFP4, groups of 32".to_owned(),
            Method::Other { words } => (*words).to_owned(),
            Method::Foreign(foreign) => foreign.format.clone(),
        })
    }

    /// What MLX's part says of this very module. What it says of all modules may be wrong for one
    /// of them (`infer_quant_config` of mlx-lm), so the tensors count there.
    pub(super) fn mlx_of(&self, module: &str) -> Option<&MlxForm> {
        let modules = &self.mlx.as_ref()?.modules;
        // What it calls the experts of a layer together, `mlp.switch_mlp.gate_proj`.
        let stack = || {
            let (layer, expert) = module.split_once(".experts.")?;
            let (_, part) = expert.split_once('.')?;
            modules.get(&format!("{layer}.switch_mlp.{part}"))
        };
        modules.get(module).or_else(stack)?.as_ref()
    }

    /// Whether compressed-tensors' part has weights of so many bits, in groups of this size if one
    /// is given. True as well if that part is not there.
    pub(super) fn has_scheme(&self, bits: usize, group: Option<usize>) -> bool {
        let fits = |said: Option<usize>, found: usize| said.is_none_or(|said| said == found);
        self.schemes().is_empty()
            || self
                .schemes()
                .iter()
                .any(|scheme| fits(scheme.bits, bits) && group.is_none_or(|group| fits(scheme.group, group)))
    }

    /// compressed-tensors' schemes, as the end of a message.
    pub(super) fn schemes_in_words(&self) -> String {
        let words = |scheme: &Scheme| {
            let bits = scheme.bits.map_or_else(|| "weights".to_owned(), |bits| format!("{bits} bits"));
            let group = scheme.group.map_or_else(String::new, |group| format!(" in groups of {group}"));
            format!("{bits}{group}")
        };
        match self.schemes() {
            [] => String::new(),
            schemes => {
                let words: Vec<String> = schemes.iter().take(8).map(words).collect();
                format!(", and config.json says {}", words.join(", "))
            }
        }
    }

    fn schemes(&self) -> &[Scheme] {
        match &self.method {
            Some(Method::Compressed { schemes, .. }) => schemes,
            _ => &[],
        }
    }

    pub(super) fn method(&self) -> Option<&Method> {
        self.method.as_ref()
    }

    /// The format of a method that is not read.
    pub(super) fn foreign(&self) -> Option<&Foreign> {
        match &self.method {
            Some(Method::Foreign(foreign)) => Some(foreign),
            _ => None,
        }
    }
}

impl MlxForm {
    /// What is left open is as mlx.nn.quantize has it, for modules too.
    fn parse(keys: &Keys<'_>) -> Result<Self, PackedError> {
        let mode = keys.text("mode")?.unwrap_or("affine").to_owned();
        let (bits, group) = match mode.as_str() {
            "mxfp4" => (4, 32),
            "mxfp8" => (8, 32),
            "nvfp4" => (4, 16),
            _ => (4, 64),
        };
        let (bits, group) = (keys.count("bits")?.unwrap_or(bits), keys.count("group_size")?.unwrap_or(group));
        Ok(MlxForm { bits, group, mode })
    }
}

impl Mlx {
    fn parse(keys: &Keys<'_>) -> Result<Self, PackedError> {
        let all = MlxForm::parse(keys)?;
        let mut modules = BTreeMap::new();
        for (name, value) in keys.keys {
            // Of a multimodal model the modules of the text model count, by their names in that.
            let name = name.strip_prefix("language_model.").unwrap_or(name).to_owned();
            match value {
                Value::Object(own) => {
                    let own = Keys { path: keys.path, name: keys.name, keys: own };
                    modules.insert(name, Some(MlxForm::parse(&own)?));
                }
                Value::Bool(false) => {
                    modules.insert(name, None);
                }
                _ => {}
            }
        }
        Ok(Self { all, modules })
    }
}

impl Method {
    fn parse(keys: &Keys<'_>) -> Result<Self, PackedError> {
        let method = keys.text("quant_method")?.unwrap_or_default();
        Ok(match method {
            "bitsandbytes" | "" if keys.flag("load_in_8bit")? => {
                Method::Bitsandbytes { words: "bitsandbytes int8".to_owned(), form: Bitsandbytes::Int8 }
            }
            "bitsandbytes" | "" if keys.flag("load_in_4bit")? || method == "bitsandbytes" => {
                let kind = keys.text("bnb_4bit_quant_type")?.unwrap_or("fp4").to_uppercase();
                let is_double = keys.flag("bnb_4bit_use_double_quant")?;
                let double = if is_double { ", double quantization" } else { "" };
                let form = Bitsandbytes::Four { nf4: kind == "NF4", double: is_double };
                Method::Bitsandbytes { words: format!("bitsandbytes {}{double}", foreign::short(&kind)), form }
            }
            "gptq" => Gptq::parse(keys)?,
            "awq" => awq(keys)?,
            "auto-round" => match keys.text("packing_format")?.unwrap_or_default() {
                packing if packing.contains("awq") => awq(keys)?,
                packing if packing.contains("auto_gptq") => Gptq::parse(keys)?,
                packing => {
                    Method::Foreign(foreign::named(&format!("auto-round in the packing {}", foreign::short(packing))))
                }
            },
            "compressed-tensors" => compressed(keys)?,
            "fp8" => Method::Fp8 { block: keys.pair("weight_block_size")? },
            "mxfp4" => Method::Mxfp4,
            "metal" => Method::Other { words: "MLX affine by transformers' metal" },
            "modelopt" | "modelopt_fp4" => Method::Other { words: "TensorRT Model Optimizer" },
            other => Method::Foreign(foreign::of_method(other)),
        })
    }
}

impl Gptq {
    fn parse(keys: &Keys<'_>) -> Result<Method, PackedError> {
        let format = keys.text("checkpoint_format")?.or(keys.text("format")?).unwrap_or("gptq");
        let exact_zeros = match format {
            "gptq" => false,
            "gptq_v2" => true,
            other => {
                return Ok(Method::Foreign(foreign::named(&format!("GPTQ in the form {}", foreign::short(other)))));
            }
        };
        if keys.flag("is_marlin_format")? {
            return Ok(Method::Foreign(foreign::named("GPTQ in the form marlin")));
        }
        let dynamic = keys.keys.get("dynamic").or(keys.keys.get("extra_config")).is_some_and(|value| !value.is_null());
        let (bits, group, act_order) = (keys.count("bits")?, keys.group()?, keys.flag("desc_act")?);
        let (has_output, modules) = (keys.is_true("lm_head"), keys.texts("modules_in_block_to_quantize"));
        Ok(Method::Gptq(Gptq { bits, group, exact_zeros, dynamic, act_order, has_output, modules }))
    }

    fn describe(&self) -> String {
        let bits = self.bits.map_or_else(String::new, |bits| format!(" {bits}-bit"));
        let group = match self.group {
            None => String::new(),
            Some(0) => ", a scale a row".to_owned(),
            Some(group) => format!(", groups of {group}"),
        };
        format!("GPTQ{bits}{group}{}", if self.act_order { ", act-order" } else { "" })
    }
}

fn awq(keys: &Keys<'_>) -> Result<Method, PackedError> {
    let version = keys.text("version")?.or(keys.text("format")?).unwrap_or("gemm");
    match version.to_lowercase().as_str() {
        "gemm" => Ok(Method::Awq { group: keys.group()?.filter(|group| *group > 0) }),
        other => Ok(Method::Foreign(Foreign {
            format: format!("AWQ in the version {}", foreign::short(other)),
            instead: "use an upload in the version `gemm`, or the 16-bit model with `model.quantization`",
        })),
    }
}

fn compressed(keys: &Keys<'_>) -> Result<Method, PackedError> {
    let sparse = keys.object("sparsity_config")?;
    if let Some(format) = sparse.as_ref().map(|keys| keys.text("format")).transpose()?.flatten()
        && format != "dense"
    {
        return Ok(Method::Foreign(foreign::named(&format!(
            "compressed-tensors in the sparse form {}",
            foreign::short(format)
        ))));
    }
    let format = keys.text("format")?.unwrap_or("dense");
    let mut schemes = Vec::new();
    let groups = keys.object("config_groups")?;
    for name in groups.iter().flat_map(|groups| groups.keys.keys()) {
        let Some(group) = groups.as_ref().map(|groups| groups.object(name)).transpose()?.flatten() else { continue };
        let Some(weights) = group.object("weights")? else { continue };
        let word = |keys: &Keys<'_>, key: &str| keys.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        schemes.push(Scheme {
            bits: weights.count("num_bits")?,
            group: weights.group()?.filter(|group| *group > 0),
            block: weights.pair("block_structure").unwrap_or_default(),
            strategy: word(&weights, "strategy"),
            format: Some(word(&group, "format")).filter(|own| !own.is_empty()).unwrap_or_else(|| format.to_owned()),
            is_float: word(&weights, "type") == "float",
            is_symmetric: weights.get("symmetric").is_none_or(|value| value.as_bool() != Some(false)),
            act_order: word(&weights, "actorder") == "group",
            targets: group.texts("targets").unwrap_or_default(),
        });
    }
    let sizes = match schemes.first() {
        Some(Scheme { bits: Some(bits), group: Some(group), .. }) => format!(", {bits}-bit, groups of {group}"),
        Some(Scheme { bits: Some(bits), group: None, .. }) => format!(", {bits}-bit"),
        _ => String::new(),
    };
    Ok(Method::Compressed { words: format!("compressed-tensors {}{sizes}", foreign::short(format)), schemes })
}

/// An object of config.json.
struct Keys<'a> {
    path: &'a Path,
    /// The key that it is in.
    name: &'a str,
    keys: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    fn wrong(&self, key: &str, needed: &str) -> PackedError {
        malformed(self.path, &format!("{}.{key}", self.name), &format!("it is no {needed}"))
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.keys.get(key).filter(|value| !value.is_null())
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, PackedError> {
        self.get(key).map(|value| value.as_str().ok_or_else(|| self.wrong(key, "text"))).transpose()
    }

    fn flag(&self, key: &str) -> Result<bool, PackedError> {
        self.get(key).map_or(Ok(false), |value| value.as_bool().ok_or_else(|| self.wrong(key, "`true` or `false`")))
    }

    /// The same of a key that only sizes are told from: whatever else it is counts as `false`.
    fn is_true(&self, key: &str) -> bool {
        self.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    /// The texts of a list, or of the lists in it. `None`: it is no list.
    fn texts(&self, key: &str) -> Option<Vec<String>> {
        let list = self.get(key)?.as_array()?;
        let inner = |value: &'a Value| value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        Some(list.iter().flat_map(inner).filter_map(Value::as_str).map(str::to_owned).collect())
    }

    /// A whole number from 1 on.
    fn count(&self, key: &str) -> Result<Option<usize>, PackedError> {
        let count = |value: &Value| value.as_u64().filter(|count| (1..=u64::from(u32::MAX)).contains(count));
        let read = |value| count(value).ok_or_else(|| self.wrong(key, "whole number from 1 on"));
        Ok(self.get(key).map(read).transpose()?.map(|count| count as usize))
    }

    /// `group_size`, where -1 says all columns: here 0.
    fn group(&self) -> Result<Option<usize>, PackedError> {
        if self.get("group_size").and_then(Value::as_i64) == Some(-1) {
            return Ok(Some(0));
        }
        self.count("group_size")
    }

    fn pair(&self, key: &str) -> Result<Option<[usize; 2]>, PackedError> {
        let length =
            |value: &Value| value.as_u64().and_then(|length| usize::try_from(length).ok()).filter(|length| *length > 0);
        let read = |value: &Value| match value.as_array().map(Vec::as_slice) {
            Some([rows, columns]) => Some([length(rows)?, length(columns)?]),
            _ => None,
        };
        self.get(key)
            .map(|value| read(value).ok_or_else(|| self.wrong(key, "pair of whole numbers from 1 on")))
            .transpose()
    }

    fn object(&self, key: &'a str) -> Result<Option<Keys<'a>>, PackedError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(keys)) => Ok(Some(Keys { path: self.path, name: key, keys })),
            Some(_) => Err(self.wrong(key, "object")),
        }
    }
}

fn malformed(path: &Path, key: &str, what: &str) -> PackedError {
    PackedError::Malformed { path: Some(PathBuf::from(path)), name: format!("`{key}`"), what: what.to_owned() }
}
