//! Multimodal models: the text model inside of them, in config.json, in the files and in adapters.
//!
//! Such a model's config.json has that of the text model as `text_config`. Its modules are called
//! `model.language_model.layers`, where a text model has `model.layers`; hub files of older models say
//! `language_model.model.layers`. Everything else (a vision tower, a projector) is left as it is.

use std::borrow::Cow;

use serde_json::{Map, Value, json};

use crate::config::Wrapper;

/// Wrappers by their `model_type`, the text models that they have if `text_config` does not say, whether an
/// adapter names modules of the whole, as where transformers' `AutoModelForCausalLM` loads that or no class has
/// the text model alone, and whether mlx-lm has the text model alone.
const WRAPPERS: [(&str, &str, bool, bool); 8] = [
    ("gemma3", "gemma3_text", true, false),
    ("gemma4", "gemma4_text", true, false),
    ("gemma4_unified", "gemma4_unified_text", true, false),
    ("kimi_k25", "kimi_k2", false, false),
    ("mistral3", "mistral", true, false),
    ("muse_glimmer", "muse_glimmer_text", true, true),
    ("qwen3_5", "qwen3_5_text", false, false),
    ("qwen3_5_moe", "qwen3_5_moe_text", false, false),
];

/// Keys of the whole that are those of the text model if `text_config` leaves them out.
const SHARED: [&str; 5] = ["torch_dtype", "dtype", "eos_token_id", "quantization", "quantization_config"];

/// How a text model's modules begin, and the spellings of that inside a wrapper: in memory (and so in
/// PEFT's adapters), and in files of older models (and in mlx-lm).
const TEXT: &str = "model.";
const INSIDE: &str = "model.language_model.";
const OLDER: &str = "language_model.";

/// What modules of a text model begin with, and no others of a wrapper: mlx-lm writes Muse Glimmer so.
const OF_TEXT: [&str; 3] = ["model.embed_tokens.", "model.layers.", "model.norm."];

/// The wrapper that a config.json is of, and the config of the text model in it. `None`: it is none of
/// the known wrappers.
pub(crate) fn text_config(whole: &Map<String, Value>) -> Option<(Wrapper, Map<String, Value>)> {
    let text = whole.get("text_config")?.as_object()?;
    let model_type = whole.get("model_type")?.as_str()?;
    let &(_, text_type, is_loaded_whole, is_text_in_mlx) = WRAPPERS.iter().find(|(known, ..)| *known == model_type)?;
    let class = whole.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str).unwrap_or(model_type);
    let mut text = text.clone();
    text.remove("architectures");
    text.entry("model_type").or_insert_with(|| Value::from(text_type));
    for key in SHARED {
        if let (Some(value), false) = (whole.get(key), text.contains_key(key)) {
            text.insert(key.to_owned(), value.clone());
        }
    }
    // transformers ties, or does not, as the whole says.
    if let Some(tied) = whole.get("tie_word_embeddings") {
        text.insert("tie_word_embeddings".to_owned(), tied.clone());
    }
    Some((Wrapper { class: class.to_owned(), is_loaded_whole, is_text_in_mlx }, text))
}

/// config.json of the text model alone in a multimodal one of this config.json. `class`: the text model's.
/// `None`: it is of none of the known wrappers.
pub(crate) fn text_alone(whole: &Value, class: &str) -> Option<Value> {
    let whole = whole.as_object()?;
    let (_, text) = text_config(whole)?;
    let mut alone = Map::from_iter([("architectures".to_owned(), json!([class]))]);
    alone.extend(text);
    for key in ["torch_dtype", "dtype"] {
        alone.remove(key);
        alone.extend(whole.get(key).map(|value| (key.to_owned(), value.clone())));
    }
    for key in ["bos_token_id", "pad_token_id"] {
        if let (Some(value), false) = (whole.get(key), alone.contains_key(key)) {
            alone.insert(key.to_owned(), value.clone());
        }
    }
    // transformers has it under this name alone, unless the repository brings a class of its own.
    if alone.get("model_type").is_some_and(|name| name == "kimi_k2") && !alone.contains_key("auto_map") {
        alone.insert("model_type".to_owned(), json!("deepseek_v3"));
    }
    Some(Value::Object(alone))
}

/// The name in the text model of a tensor or module of a wrapper. `None`: it is of another part.
pub(crate) fn name_in_text(name: &str) -> Option<Cow<'_, str>> {
    if let Some(rest) = name.strip_prefix(INSIDE) {
        return Some(Cow::Owned(format!("{TEXT}{rest}")));
    }
    match name.strip_prefix(OLDER) {
        Some(rest) => {
            let is_text = rest.starts_with(TEXT) || rest == "lm_head" || rest.starts_with("lm_head.");
            is_text.then_some(Cow::Borrowed(rest))
        }
        None => {
            let is_text = name.starts_with("lm_head.") || OF_TEXT.iter().any(|start| name.starts_with(start));
            is_text.then_some(Cow::Borrowed(name))
        }
    }
}

/// The name in memory, and so in PEFT's adapters, of a module of the text model.
pub(crate) fn name_inside(module: &str) -> String {
    module.strip_prefix(TEXT).map_or_else(|| module.to_owned(), |rest| format!("{INSIDE}{rest}"))
}

/// The name in mlx-lm of a module of the text model.
pub(crate) fn name_in_mlx(module: &str) -> String {
    format!("{OLDER}{module}")
}

/// How an adapter calls the modules of a text model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// As the text model alone does.
    Text,
    /// As the whole in memory does.
    Inside,
    /// As the whole did before transformers 4.52.
    Older,
}

impl Spelling {
    /// The spelling of one of these names of modules. `None`: none of them shows it.
    pub(crate) fn of<'a>(mut names: impl Iterator<Item = &'a str>) -> Option<Spelling> {
        names.find_map(|name| {
            let is_text = name_in_text(name).is_some() && name != "lm_head" && !name.starts_with("lm_head.");
            is_text.then(|| match (name.starts_with(INSIDE), name.starts_with(OLDER)) {
                (true, _) => Spelling::Inside,
                (_, true) => Spelling::Older,
                _ => Spelling::Text,
            })
        })
    }

    /// The name of a module of the text model.
    pub(crate) fn name(self, module: &str) -> String {
        match self {
            Spelling::Text => module.to_owned(),
            Spelling::Inside => name_inside(module),
            Spelling::Older => name_in_mlx(module),
        }
    }
}

/// The name that a module of an adapter has in the text model, however it is spelt.
pub(crate) fn module_in_text(module: &str) -> Cow<'_, str> {
    name_in_text(module).unwrap_or(Cow::Borrowed(module))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_every_spelling() {
        let q = "model.layers.0.self_attn.q_proj.weight";
        for (name, want) in [
            ("model.language_model.layers.0.self_attn.q_proj.weight", Some(q)),
            ("language_model.model.layers.0.self_attn.q_proj.weight", Some(q)),
            ("language_model.lm_head.weight", Some("lm_head.weight")),
            ("lm_head.weight", Some("lm_head.weight")),
            ("model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", None),
            ("vision_tower.vision_model.embeddings.weight", None),
            ("multi_modal_projector.mm_soft_emb_norm.weight", None),
            (q, Some(q)),
            ("model.norm.weight", Some("model.norm.weight")),
            ("model.vision_tower.layers.0.norm1.weight", None),
            ("model.perception_emb_norm.weight", None),
            ("model.multi_modal_projector.norm.weight", None),
        ] {
            assert_eq!(name_in_text(name).as_deref(), want, "{name}");
        }
        assert_eq!(name_inside("model.norm"), "model.language_model.norm");
        assert_eq!(name_inside("lm_head"), "lm_head");
        assert_eq!(module_in_text(&name_inside("model.norm")), "model.norm");
        assert_eq!(module_in_text(&name_in_mlx("lm_head")), "lm_head");
        assert_eq!(name_in_mlx("model.norm"), "language_model.model.norm");
    }

    #[test]
    fn an_adapter_shows_its_spelling() {
        for (names, want) in [
            ("lm_head.lora_A.weight model.layers.0.mlp.up_proj.lora_A.weight", Some(Spelling::Text)),
            ("lm_head.lora_A.weight model.language_model.layers.0.mlp.up_proj.lora_A.weight", Some(Spelling::Inside)),
            ("vision_tower.norm.weight language_model.model.layers.0.mlp.up_proj.lora_A.weight", Some(Spelling::Older)),
            ("language_model.lm_head.lora_A.weight", Some(Spelling::Older)),
            ("lm_head.lora_A.weight vision_tower.norm.weight", None),
        ] {
            assert_eq!(Spelling::of(names.split(' ')), want, "{names}");
        }
        for (spelling, want) in [
            (Spelling::Text, "model.norm"),
            (Spelling::Inside, "model.language_model.norm"),
            (Spelling::Older, "language_model.model.norm"),
        ] {
            assert_eq!(spelling.name("model.norm"), want);
        }
    }
}
