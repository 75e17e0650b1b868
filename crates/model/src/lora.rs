//! Which layers get a LoRA branch, of which rank and scale: PEFT's rules.

use std::collections::{BTreeMap, HashSet};

use fancy_regex::Regex;
use finetune_recipe::{Lora, TargetModules};

use crate::adaptation::{is_expert, is_of_experts, is_of_vocabulary};
use crate::branch::{EMBEDDING, OUTPUT};
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
    /// Whether the outputs' magnitudes are trained apart (Liu et al. 2024, "DoRA").
    pub use_dora: bool,
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

/// Chooses among `modules` (all linear layers inside the decoder, in model order), the embedding and
/// the output layer as PEFT does. A list matches whole names or endings after a dot. A string is a
/// regular expression over the full name. `all-linear` is every linear layer but the output layer.
/// Modules that are trained in full get no branch.
///
/// # Errors
/// If a name, a pattern or a layer matches nothing, if two patterns contradict each other, or if a
/// rank is too large.
pub(crate) fn choose_targets(lora: &Lora, modules: &[String]) -> Result<LoraTargets, ModelError> {
    let mut chosen = matching(&lora.target_modules, modules)?;
    if lora.experts {
        chosen = with_experts(chosen, modules)?;
    }
    chosen.retain(|module| !lora.modules_to_save.iter().any(|saved| is_inside(module, saved)));
    if chosen.is_empty() {
        let what = "every module of target_modules is trained in full, so that no branch is left".to_owned();
        return Err(ModelError::Lora { key: "modules_to_save", what });
    }
    if let Some(layers) = &lora.layers_to_transform {
        let count = modules.iter().filter_map(|name| layer_of(name)).max().map_or(0, |last| last + 1);
        if let Some(layer) = layers.iter().find(|&&layer| layer >= count) {
            let what = format!("there is no layer {layer}; the model has layers 0 to {}", count.saturating_sub(1));
            return Err(ModelError::Lora { key: "layers_to_transform", what });
        }
        chosen.retain(|name| match layer_of(name) {
            Some(layer) => layers.contains(&layer),
            // A module outside of the layers is chosen by its full name only.
            None => matches!(&lora.target_modules, TargetModules::Names(names) if names.contains(name)),
        });
    }
    if chosen.is_empty() {
        let what = "none of the modules of target_modules is in these layers".to_owned();
        return Err(ModelError::Lora { key: "layers_to_transform", what });
    }
    if lora.use_dora
        && let Some(module) = chosen.iter().find(|module| is_of_vocabulary(module))
    {
        let what = format!("DoRA on `{module}` is not supported");
        return Err(ModelError::Lora { key: "use_dora", what });
    }
    if let Some(module) = chosen.iter().find(|module| is_expert(module)) {
        for (key, is_set) in [("use_dora", lora.use_dora), ("dropout", lora.dropout > 0.0)] {
            if is_set {
                let what = format!("`{module}` is an expert, and experts have neither DoRA nor dropout, as in PEFT");
                return Err(ModelError::Lora { key, what });
            }
        }
    }
    let others = chosen.iter().filter(|module| is_of_vocabulary(module)).cloned();
    let modules: &[String] = &modules.iter().cloned().chain(others).collect::<Vec<_>>();
    let rank_of = Pattern::new("rank_pattern", &lora.rank_pattern, modules)?;
    let alpha_of = Pattern::new("alpha_pattern", &lora.alpha_pattern, modules)?;
    let targets: LoraTargets = chosen
        .into_iter()
        .map(|module| LoraTarget {
            use_rslora: lora.use_rslora,
            use_dora: lora.use_dora,
            rank: rank_of.get(&module).unwrap_or(lora.rank),
            alpha: alpha_of.get(&module).unwrap_or(lora.alpha),
            module,
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

/// The word in `target_modules` for all experts.
pub(crate) const EXPERTS: &str = "experts";

/// Far above any use: a rank as large as the layer can already express every change of it.
const LARGEST_RANK: usize = 1 << 16;

/// The modules that `target_modules` chooses, in model order.
fn matching(targets: &TargetModules, modules: &[String]) -> Result<LoraModules, ModelError> {
    let all: LoraModules =
        std::iter::once(EMBEDDING.to_owned()).chain(modules.iter().cloned()).chain([OUTPUT.to_owned()]).collect();
    // Experts and routers are trained by explicit choice: they are most of a model.
    let all_linear = || modules.iter().filter(|module| !is_of_experts(module)).cloned().collect();
    match targets {
        TargetModules::AllLinear => Ok(all_linear()),
        // PEFT takes the word in any case. In a list it can mean nothing else.
        TargetModules::Regex(text) if is_all_linear(text) => Ok(all_linear()),
        TargetModules::Names(names) if names.len() == 1 && is_all_linear(&names[0]) => Ok(all_linear()),
        TargetModules::Names(names) => {
            if let Some(name) = names.iter().find(|name| !all.iter().any(|module| is_named(module, name))) {
                return Err(ModelError::NoTarget { target: name.clone(), examples: last_parts(modules) });
            }
            Ok(all.into_iter().filter(|module| names.iter().any(|name| is_named(module, name))).collect())
        }
        TargetModules::Regex(pattern) => {
            let regex = full_match(pattern)?;
            // PEFT refuses a pattern that matches norms too, such as `.*`. Here it means the linear
            // layers inside the decoder.
            let is_wide = is_match(&regex, "model.norm");
            let candidates = if is_wide { modules } else { all.as_slice() };
            let chosen: LoraModules = candidates.iter().filter(|module| is_match(&regex, module)).cloned().collect();
            if chosen.is_empty() {
                let example = modules.first().cloned().unwrap_or_default();
                return Err(ModelError::NoMatch { pattern: pattern.clone(), example });
            }
            Ok(chosen)
        }
    }
}

/// The chosen modules and all experts, in model order.
fn with_experts(chosen: LoraModules, modules: &[String]) -> Result<LoraModules, ModelError> {
    if !modules.iter().any(|module| is_expert(module)) {
        return Err(ModelError::Lora { key: "experts", what: "the model has no experts".to_owned() });
    }
    let chosen: HashSet<String> = chosen.into_iter().collect();
    let ends = [EMBEDDING, OUTPUT].map(str::to_owned);
    let all = ends[..1].iter().chain(modules).chain(&ends[1..]);
    Ok(all.filter(|module| chosen.contains(*module) || is_expert(module)).cloned().collect())
}

/// Names of modules, in model order.
type LoraModules = Vec<String>;

/// Whether a module is the named one, or lies inside of it.
pub(crate) fn is_inside(module: &str, name: &str) -> bool {
    format!(".{module}.").contains(&format!(".{name}."))
}

/// Whether a text is the word for every linear layer.
pub(crate) fn is_all_linear(text: &str) -> bool {
    text.eq_ignore_ascii_case("all-linear")
}

/// Whether a name of a list means this module: its whole name, or the end of it after a dot. `experts`
/// means all parts of all experts.
pub(crate) fn is_named(module: &str, name: &str) -> bool {
    if name == EXPERTS || name.ends_with(".experts") {
        return is_inside(module, name) && module != name;
    }
    module == name || module.strip_suffix(name).is_some_and(|before| before.ends_with('.'))
}

/// Python's `re.fullmatch`.
pub(crate) fn full_match(pattern: &str) -> Result<Regex, ModelError> {
    compiled(pattern, &format!("^(?:{pattern})$")).map_err(|why| ModelError::Regex { target: pattern.to_owned(), why })
}

/// A pattern with what is put around it. The pattern is read alone first: an error counts from its
/// beginning then, and `a)|(b` is none.
fn compiled(pattern: &str, whole: &str) -> Result<Regex, String> {
    Regex::new(pattern).and_then(|_| Regex::new(whole)).map_err(|error| error.to_string())
}

/// PEFT's matching of the keys of `rank_pattern` and `alpha_pattern`: the whole name, or its end
/// after a dot.
pub(crate) fn ending(pattern: &str) -> Result<Regex, String> {
    compiled(pattern, &format!(r"^(?:(.*\.)?({pattern}))$"))
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
            let regex = ending(pattern).map_err(|why| ModelError::Lora {
                key,
                what: format!("`{pattern}` is no regular expression: {why}"),
            })?;
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
            experts: false,
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
            (names(&["lm_head"]), Ok(1)),
            (names(&["q_proj", "embed_tokens", "lm_head"]), Ok(14)),
            (regex(".*"), Ok(36)),
            (regex(".*(_proj|_head)"), Ok(37)),
            (regex(r".*\.(1|11)\..*q_proj"), Ok(2)),
            (regex(r"q_proj"), Err("matches no linear layer")),
            (regex(r".*(?<!v)_proj"), Ok(24)),
            (regex("ALL-LINEAR"), Ok(36)),
            (names(&["all-linear"]), Ok(36)),
            (names(&["all-linear", "q_proj"]), Err("`all-linear` matches no linear layer")),
            (regex(r"("), Err("no regular expression")),
        ];
        for (targets, want) in cases {
            let got = choose_targets(&lora(targets.clone()), &modules());
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
            let error = choose_targets(&lora(TargetModules::Regex(text.to_owned())), &modules()).expect_err(text);
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
        let chosen = choose_targets(&recipe, &modules()).expect("all patterns match");
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
        // Outside of the layers, full names only. What is trained in full gets no branch.
        recipe.target_modules =
            TargetModules::Names(["lm_head", "embed_tokens", "q_proj", "up_proj"].map(String::from).to_vec());
        recipe.modules_to_save = vec!["mlp".to_owned()];
        let chosen = choose_targets(&recipe, &modules()).expect("all patterns match");
        let found: Vec<_> = chosen.iter().map(|t| (t.module.as_str(), t.rank)).collect();
        let want = [("model.layers.1.self_attn.q_proj", 4), ("model.layers.11.self_attn.q_proj", 4), ("lm_head", 8)];
        assert_eq!(found, want);
        recipe.alpha_pattern = BTreeMap::from([("(q_proj".to_owned(), 64.0)]);
        let told = choose_targets(&recipe, &modules()).expect_err("an open group").to_string();
        assert!(told.starts_with("alpha_pattern: `(q_proj` is no regular expression: "), "{told}");
        recipe.alpha_pattern.clear();
        recipe.use_dora = true;
        assert!(choose_targets(&recipe, &modules()).expect_err("DoRA").to_string().contains("DoRA on `lm_head`"));
        recipe.layers_to_transform = Some(vec![12]);
        assert!(choose_targets(&recipe, &modules()).expect_err("no layer 12").to_string().contains("layers 0 to 11"));
    }
}
