//! The auxiliary loss of routers: whether a run has it, and which models have none.

use finetune_model::ModelConfig;
use finetune_recipe::Recipe;

use crate::error::TrainError;

/// The coefficient of the loss: the recipe's, otherwise that of config.json. 0: there is none.
pub(crate) fn coefficient(recipe: &Recipe, config: &ModelConfig) -> f64 {
    let of_config = || config.experts.as_ref().map_or(0.0, |experts| experts.router_loss);
    recipe.train.router_aux_loss_coef.unwrap_or_else(of_config)
}

/// A notice if config.json alone asks for the loss.
///
/// # Errors
/// If the recipe asks for it, and the model has none.
pub(crate) fn check(recipe: &Recipe, config: &ModelConfig) -> Result<Option<String>, TrainError> {
    let coefficient = coefficient(recipe, config);
    if coefficient == 0.0 {
        return Ok(None);
    }
    if let Some(what) = config.no_router_loss() {
        return Err(TrainError::RouterLoss { coefficient, what });
    }
    Ok(recipe.train.router_aux_loss_coef.is_none().then(|| {
        format!(
            "config.json has output_router_logits: the auxiliary loss of the routers is added, {coefficient:?} times; \
             train.router_aux_loss_coef = 0 leaves it out"
        )
    }))
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;

    fn golden(family: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models").join(family).join("config.json")
    }

    fn recipe(set: Option<&str>) -> Recipe {
        let text = "[model]\npath = \"m\"\n[data]\ntrain = \"rows.jsonl\"\n";
        let sets: Vec<String> = set.map(|value| format!("train.router_aux_loss_coef={value}")).into_iter().collect();
        Recipe::parse(text, Path::new("r.toml"), &sets, None).unwrap_or_else(|error| panic!("{error}"))
    }

    /// A golden model's config, with the keys of the loss, if given.
    fn config(family: &str, keys: Option<(bool, Option<f64>)>) -> ModelConfig {
        let text = std::fs::read_to_string(golden(family)).expect("a config");
        let mut json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        if let Some((asked, coefficient)) = keys {
            json["output_router_logits"] = asked.into();
            json["router_aux_loss_coef"] = coefficient.into();
        }
        ModelConfig::parse(&json.to_string(), Path::new("config.json")).unwrap_or_else(|error| panic!("{error}"))
    }

    /// (family, keys of config.json, the recipe's value, the coefficient)
    #[test]
    fn the_recipe_comes_before_config_json() {
        for (family, keys, set, want) in [
            ("qwen3_moe", None, None, 0.0),
            ("qwen3_moe", Some((true, Some(0.25))), None, 0.25),
            ("qwen3_moe", Some((true, None)), None, 0.001),
            ("gpt_oss", Some((true, None)), None, 0.001),
            ("qwen3_moe", Some((false, Some(0.25))), None, 0.0),
            ("qwen3_moe", Some((true, Some(0.25))), Some("0"), 0.0),
            ("qwen3_moe", Some((true, Some(0.25))), Some("0.5"), 0.5),
            ("qwen3_moe", None, Some("0.5"), 0.5),
            // transformers has no such loss of these, and reads the keys without a word.
            ("deepseek_v3", Some((true, Some(0.25))), None, 0.0),
            ("qwen3", Some((true, Some(0.25))), None, 0.0),
        ] {
            let (recipe, config) = (recipe(set), config(family, keys));
            let found = coefficient(&recipe, &config);
            assert!((found - want).abs() < 1e-12, "{family} {keys:?} {set:?}: {found}");
            let notice = check(&recipe, &config).unwrap_or_else(|error| panic!("{family} {keys:?} {set:?}: {error}"));
            assert_eq!(notice.is_some(), set.is_none() && want > 0.0, "{family} {keys:?} {set:?}: {notice:?}");
        }
    }

    /// (family, a part of the message)
    #[test]
    fn models_without_the_loss_are_refused() {
        for (family, part) in [
            ("qwen3", "no layer of this Qwen3ForCausalLM has experts"),
            ("gemma4", "no layer of this Gemma4ForCausalLM has experts"),
            ("gemma4_moe", "Gemma4ForCausalLM has no such loss in transformers"),
            ("deepseek_v3", "is the correction of their scores"),
            ("glm4_moe", "is the correction of their scores"),
            ("lfm2_moe", "is the correction of their scores"),
        ] {
            let config = config(family, None);
            let error = check(&recipe(Some("0.5")), &config).expect_err(family).to_string();
            assert!(error.starts_with("train.router_aux_loss_coef = 0.5: ") && error.contains(part), "{error}");
            assert!(matches!(check(&recipe(Some("0")), &config), Ok(None)), "{family}: 0 is off");
        }
        for family in ["qwen3_moe", "qwen3_5_moe", "qwen3_next", "gpt_oss"] {
            assert!(matches!(check(&recipe(Some("0.5")), &config(family, None)), Ok(None)), "{family}");
        }
    }
}
