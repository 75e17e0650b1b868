//! Which linear layers get a LoRA branch, of which rank and scale: PEFT's rules.

use std::collections::BTreeMap;

use fancy_regex::Regex;
use finetune_recipe::{Lora, TargetModules};

use crate::error::ModelError;

/// The branch that one module gets.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraTarget {
    /// Module name, such as `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// The rank r of the branch.
    pub rank: usize,
    /// The numerator of the branch's scale.
    pub alpha: f64,
    /// Whether the scale divides by sqrt(r) instead of r.
    pub use_rslora: bool,
}

impl LoraTarget {
    /// alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023).
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f64;
        (self.alpha / if self.use_rslora { rank.sqrt() } else { rank }) as f32
    }
}

/// All branches, in model order.
pub type LoraTargets = Vec<LoraTarget>;

/// Chooses among `modules` (all linear layers inside the decoder, in model order) as PEFT does. A
/// list matches whole names or endings after a dot. A string is a regular expression over the full
/// name. `all-linear` is every linear layer but the output layer.
///
/// # Errors
/// If a name, a pattern or a layer matches nothing, if two patterns contradict each other, or if a
/// rank is too large.
pub fn choose(lora: &Lora, modules: &[String]) -> Result<LoraTargets, ModelError> {
    let chosen = matching(&lora.target_modules, modules)?;
    let chosen: Vec<&String> = match &lora.layers_to_transform {
        None => chosen,
        Some(layers) => {
            let count = modules.iter().filter_map(|name| layer_of(name)).max().map_or(0, |last| last + 1);
            if let Some(layer) = layers.iter().find(|&&layer| layer >= count) {
                let what = format!("there is no layer {layer}; the model has layers 0 to {}", count.saturating_sub(1));
                return Err(ModelError::Lora { key: "layers_to_transform", what });
            }
            chosen.into_iter().filter(|name| layer_of(name).is_some_and(|layer| layers.contains(&layer))).collect()
        }
    };
    if chosen.is_empty() {
        let what = "none of the modules of target_modules is in these layers".to_owned();
        return Err(ModelError::Lora { key: "layers_to_transform", what });
    }
    let rank_of = Pattern::new("rank_pattern", &lora.rank_pattern, modules)?;
    let alpha_of = Pattern::new("alpha_pattern", &lora.alpha_pattern, modules)?;
    let targets: LoraTargets = chosen
        .into_iter()
        .map(|module| LoraTarget {
            rank: rank_of.get(module).unwrap_or(lora.rank),
            alpha: alpha_of.get(module).unwrap_or(lora.alpha),
            use_rslora: lora.use_rslora,
            module: module.clone(),
        })
        .collect();
    match targets.iter().find(|target| target.rank > LARGEST_RANK) {
        Some(target) => {
            let what = format!("{} for `{}` is beyond {LARGEST_RANK}", target.rank, target.module);
            Err(ModelError::Lora { key: "rank", what })
        }
        None => Ok(targets),
    }
}

/// Far above any use: a rank as large as the layer can already express every change of it.
const LARGEST_RANK: usize = 1 << 16;

/// The modules that `target_modules` chooses.
fn matching<'a>(targets: &TargetModules, modules: &'a [String]) -> Result<Vec<&'a String>, ModelError> {
    let none = |target: &str| ModelError::NoTarget { target: target.to_owned(), examples: last_parts(modules) };
    match targets {
        TargetModules::AllLinear => Ok(modules.iter().collect()),
        // PEFT takes the word in any case. In a list it can mean nothing else.
        TargetModules::Regex(text) if is_all_linear(text) => Ok(modules.iter().collect()),
        TargetModules::Names(names) if names.len() == 1 && is_all_linear(&names[0]) => Ok(modules.iter().collect()),
        TargetModules::Names(names) => {
            for name in names {
                if ["lm_head", "embed_tokens"].contains(&name.as_str()) {
                    let what = format!("a LoRA branch on `{name}` is not supported");
                    return Err(ModelError::Lora { key: "target_modules", what });
                }
                if !modules.iter().any(|module| is_named(module, name)) {
                    return Err(none(name));
                }
            }
            Ok(modules.iter().filter(|module| names.iter().any(|name| is_named(module, name))).collect())
        }
        TargetModules::Regex(pattern) => {
            let regex = full_match(pattern)?;
            let chosen: Vec<_> = modules.iter().filter(|module| is_match(&regex, module)).collect();
            if chosen.is_empty() {
                let example = modules.first().cloned().unwrap_or_default();
                return Err(ModelError::NoMatch { pattern: pattern.clone(), example });
            }
            Ok(chosen)
        }
    }
}

/// Whether a text is the word for every linear layer.
pub(crate) fn is_all_linear(text: &str) -> bool {
    text.eq_ignore_ascii_case("all-linear")
}

/// Whether a name of a list means this module: its whole name, or the end of it after a dot.
pub(crate) fn is_named(module: &str, name: &str) -> bool {
    module == name || module.strip_suffix(name).is_some_and(|before| before.ends_with('.'))
}

/// Python's `re.fullmatch`.
pub(crate) fn full_match(pattern: &str) -> Result<Regex, ModelError> {
    let regex = |why: String| ModelError::Regex { target: pattern.to_owned(), why };
    Regex::new(&format!("^(?:{pattern})$")).map_err(|error| regex(error.to_string()))
}

/// PEFT's matching of the keys of `rank_pattern` and `alpha_pattern`: the whole name, or its end
/// after a dot.
pub(crate) fn ending(pattern: &str) -> Result<Regex, ModelError> {
    full_match(&format!(r"(.*\.)?({pattern})"))
}

/// Whether a text matches. A pattern that backtracks beyond the engine's limit matches nothing.
pub(crate) fn is_match(regex: &Regex, text: &str) -> bool {
    regex.is_match(text).unwrap_or(false)
}

/// The number of a module's layer.
pub(crate) fn layer_of(module: &str) -> Option<usize> {
    module.split('.').find_map(|part| part.parse().ok())
}

/// The last parts of these names, each once: what a list of `target_modules` would hold.
pub(crate) fn last_parts(modules: &[String]) -> Vec<String> {
    let mut parts: Vec<String> = Vec::new();
    for part in modules.iter().filter_map(|module| module.rsplit('.').next()) {
        if !parts.iter().any(|known| known == part) {
            parts.push(part.to_owned());
        }
    }
    parts
}

/// `rank_pattern` or `alpha_pattern`. Keys match the whole name, or its end after a dot, as a
/// regular expression.
struct Pattern<T>(Vec<(Regex, T)>);

impl<T: Copy + PartialEq> Pattern<T> {
    fn new(key: &'static str, table: &BTreeMap<String, T>, modules: &[String]) -> Result<Pattern<T>, ModelError> {
        let mut patterns = Vec::new();
        for (pattern, value) in table {
            let regex = ending(pattern)?;
            if !modules.iter().any(|module| is_match(&regex, module)) {
                return Err(ModelError::Lora {
                    key,
                    what: format!("`{pattern}` matches no linear layer of the model"),
                });
            }
            patterns.push((regex, *value));
        }
        // PEFT takes the first match in the order of its file. A TOML table has no order, so
        // matches have to agree.
        for module in modules {
            let mut values = patterns.iter().filter(|(regex, _)| is_match(regex, module)).map(|(_, value)| value);
            let first = values.next();
            if values.any(|value| Some(value) != first) {
                return Err(ModelError::Lora { key, what: format!("two patterns give `{module}` different values") });
            }
        }
        Ok(Pattern(patterns))
    }

    fn get(&self, module: &str) -> Option<T> {
        self.0.iter().find(|(regex, _)| is_match(regex, module)).map(|(_, value)| *value)
    }
}

#[cfg(test)]
mod tests {
    use finetune_advice::Advice as _;

    use super::*;

    fn modules() -> Vec<String> {
        let mut names = Vec::new();
        for layer in 0..12 {
            for part in ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"] {
                names.push(format!("model.layers.{layer}.{part}"));
            }
        }
        names
    }

    fn lora(targets: TargetModules) -> Lora {
        Lora {
            rank: 8,
            alpha: 16.0,
            dropout: 0.0,
            target_modules: targets,
            use_rslora: false,
            use_dora: false,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            layers_to_transform: None,
            modules_to_save: vec![],
            init_from: None,
        }
    }

    /// (targets, how many modules, or the part of the message)
    #[test]
    fn targets_as_in_peft() {
        let names = |list: &[&str]| TargetModules::Names(list.iter().map(|n| (*n).to_owned()).collect());
        let regex = |text: &str| TargetModules::Regex(text.to_owned());
        let cases = [
            (TargetModules::AllLinear, Ok(36)),
            (names(&["q_proj", "v_proj"]), Ok(24)),
            (names(&["self_attn.q_proj"]), Ok(12)),
            (names(&["model.layers.3.mlp.up_proj"]), Ok(1)),
            (names(&["proj"]), Err("`proj` matches no linear layer")),
            (names(&["q_proj", "w_proj"]), Err("`w_proj` matches no linear layer")),
            (names(&["lm_head"]), Err("not supported")),
            (regex(r".*\.(1|11)\..*q_proj"), Ok(2)),
            (regex(r"q_proj"), Err("matches no linear layer")),
            (regex(r".*(?<!v)_proj"), Ok(24)),
            (regex("ALL-LINEAR"), Ok(36)),
            (names(&["all-linear"]), Ok(36)),
            (names(&["all-linear", "q_proj"]), Err("`all-linear` matches no linear layer")),
            (regex(r"("), Err("no regular expression")),
        ];
        for (targets, want) in cases {
            let got = choose(&lora(targets.clone()), &modules());
            match (got, want) {
                (Ok(chosen), Ok(count)) => assert_eq!(chosen.len(), count, "{targets:?}"),
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{targets:?}: {error}"),
                (got, want) => panic!("{targets:?}: {got:?}, expected {want:?}"),
            }
        }
    }

    /// (a text that matches nothing, part of its first hint)
    #[test]
    fn a_text_that_should_be_a_list() {
        for (text, hint) in [
            ("q_proj", r#"target_modules = ["q_proj"]"#),
            ("q_proj, v_proj", r#"target_modules = ["q_proj", "v_proj"]"#),
            ("self_attn.q_proj,up_proj", r#"target_modules = ["self_attn.q_proj", "up_proj"]"#),
            (r"layers\.0\..*", "'.*q_proj' does `model.layers.0.self_attn.q_proj`"),
        ] {
            let error = choose(&lora(TargetModules::Regex(text.to_owned())), &modules()).expect_err(text);
            assert!(error.hints()[0].contains(hint), "{text}: {:?}", error.hints());
        }
    }

    #[test]
    fn patterns_and_layers() {
        let mut recipe = lora(TargetModules::AllLinear);
        recipe.layers_to_transform = Some(vec![1, 11]);
        recipe.rank_pattern.insert("q_proj".into(), 4);
        recipe.rank_pattern.insert(r"model.layers.1.mlp.up_proj".into(), 2);
        recipe.alpha_pattern.insert(r"layers\.11\.self_attn\.v_proj".into(), 64.0);
        let chosen = choose(&recipe, &modules()).expect("all patterns match");
        let found: Vec<_> = chosen.iter().map(|t| (t.module.as_str(), t.rank, t.alpha)).collect();
        assert_eq!(
            found,
            [
                ("model.layers.1.self_attn.q_proj", 4, 16.0),
                ("model.layers.1.self_attn.v_proj", 8, 16.0),
                ("model.layers.1.mlp.up_proj", 2, 16.0),
                ("model.layers.11.self_attn.q_proj", 4, 16.0),
                ("model.layers.11.self_attn.v_proj", 8, 64.0),
                ("model.layers.11.mlp.up_proj", 8, 16.0),
            ]
        );
        recipe.layers_to_transform = Some(vec![12]);
        assert!(choose(&recipe, &modules()).expect_err("no layer 12").to_string().contains("layers 0 to 11"));
    }
}
