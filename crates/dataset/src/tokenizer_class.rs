//! What tokenizer_config.json changes of a tokenizer.json, as transformers 5.23 has it (`AutoTokenizer` in
//! models/auto/tokenization_auto.py, and the classes that it chooses).
//!
//! Some classes make a splitter of their own, which goes by the config's `add_prefix_space`. Of that splitter this is
//! all that is followed here: how else a text is split is what tokenizer.json says, with which the model was trained.

use serde_json::Value;
use tokenizers::{PreTokenizerWrapper, Tokenizer};

use crate::text_source::TOKENIZER_CONFIG;

/// Classes whose splitter is byte-level.
const BYTE_LEVEL: [&str; 4] = ["GPT2Tokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer", "Qwen3_5Tokenizer"];

/// Model types whose tokenizer.json is taken as it is, whatever class the files name.
const AS_IT_IS: [&str; 11] = [
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "granite",
    "granitemoehybrid",
    "kimi_k25",
    "ministral3",
    "mistral",
    "mistral3",
    "olmo3",
    "phi3",
];

/// (model type, its class, whether that counts whatever class the files name)
const OF_TYPES: [(&str, &str, bool); 8] = [
    ("qwen2", "Qwen2Tokenizer", true),
    ("qwen3", "Qwen2Tokenizer", false),
    ("qwen3_moe", "Qwen2Tokenizer", false),
    ("qwen3_next", "Qwen2Tokenizer", false),
    ("qwen3_5", "Qwen3_5Tokenizer", true),
    ("qwen3_5_text", "Qwen3_5Tokenizer", false),
    ("qwen3_5_moe", "Qwen3_5Tokenizer", true),
    ("qwen3_5_moe_text", "Qwen3_5Tokenizer", true),
];

/// What the configs of a tokenizer say about texts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct TextSettings {
    /// Whether a text begins with a space. `None`: as tokenizer.json says.
    prefix_space: Option<bool>,
    /// Whether special tokens in a text are split like other text.
    splits_special: bool,
}

impl TextSettings {
    /// `config`: tokenizer_config.json. `model`: config.json.
    pub(crate) fn of(config: &Value, model: &Value) -> Self {
        let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
        let flag = |key: &str| config.get(key).and_then(Value::as_bool);
        let named = text(config, "tokenizer_class").or_else(|| text(model, "tokenizer_class"));
        let kind = text(model, "model_type").unwrap_or_default();
        let is_byte_level = class(&kind, named.as_deref()).is_some_and(|class| BYTE_LEVEL.contains(&class));
        Self {
            prefix_space: is_byte_level.then(|| flag("add_prefix_space").unwrap_or(false)),
            splits_special: flag("split_special_tokens").unwrap_or(false),
        }
    }

    /// Makes a tokenizer do so.
    ///
    /// # Errors
    /// The splitter cannot be made, which is a fault of this program.
    pub(crate) fn apply(self, tokenizer: &mut Tokenizer, notices: &mut Vec<String>) -> tokenizers::Result<()> {
        if let Some(wanted) = self.prefix_space
            && set_prefix_space(tokenizer, wanted)?
        {
            notices.push(format!(
                "tokenizer.json has another `add_prefix_space` than the class in {TOKENIZER_CONFIG}, whose {wanted} is \
                 used, as in transformers"
            ));
        }
        if self.splits_special {
            tokenizer.set_encode_special_tokens(true);
            notices.push(format!(
                "{TOKENIZER_CONFIG} has `split_special_tokens`: special tokens in a text, those of a chat template too, \
                 are split like other text"
            ));
        }
        Ok(())
    }
}

/// The class that transformers takes for a model type, if the files name this one.
fn class<'n>(kind: &str, named: Option<&'n str>) -> Option<&'n str> {
    if AS_IT_IS.contains(&kind) {
        return None;
    }
    let named = named.map(|name| name.strip_suffix("Fast").unwrap_or(name));
    match OF_TYPES.iter().find(|(known, ..)| *known == kind) {
        Some((_, own, true)) => Some(*own),
        Some((_, own, false)) => named.or(Some(*own)),
        None => named,
    }
}

/// Whether that changes anything.
fn set_prefix_space(tokenizer: &mut Tokenizer, wanted: bool) -> tokenizers::Result<bool> {
    let Some(splitter) = tokenizer.get_pre_tokenizer() else { return Ok(false) };
    let mut splitter = serde_json::to_value(splitter)?;
    let mut changed = false;
    let mut set = |part: &mut Value| {
        if part["type"] == "ByteLevel" && part["add_prefix_space"] != wanted {
            part["add_prefix_space"] = wanted.into();
            changed = true;
        }
    };
    if splitter["type"] == "Sequence" {
        splitter["pretokenizers"].as_array_mut().into_iter().flatten().for_each(&mut set);
    } else {
        set(&mut splitter);
    }
    if changed {
        tokenizer.with_pre_tokenizer(Some(serde_json::from_value::<PreTokenizerWrapper>(splitter)?));
    }
    Ok(changed)
}
