//! What a run is made of: the checkpoint carries it, and a resumed run must be made of the same.

use finetune_recipe::Recipe;
use serde::{Deserialize, Serialize};

/// Keys with the recipe's values, and digests of everything that is not in the recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// Every recipe key that fixes the numbers of a run, in order.
    pub(crate) recipe: Vec<(String, String)>,
    /// Rows of the training data as tokens and masks.
    pub(crate) train_data: String,
    pub(crate) eval_data: Option<String>,
    /// Weights and config of the base model.
    pub(crate) model: String,
    /// Names, shapes and order of the trained parameters.
    pub(crate) layout: String,
    /// What `auto` became: the kind of device and the number type that is computed in. Checkpoints of versions that
    /// computed on the CPU only do not say.
    #[serde(default)]
    pub(crate) compute: Option<String>,
}

impl Identity {
    pub(crate) fn recipe_values(recipe: &Recipe) -> Vec<(String, String)> {
        recipe.meaning().into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }

    /// A name and a digest for each part that ranks must share.
    pub(crate) fn digests(&self) -> Vec<(&'static str, blake3::Hash)> {
        let recipe: String = self.recipe.iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
        let eval_data = self.eval_data.as_deref().unwrap_or_default();
        let contents = [
            ("recipe", recipe.as_str()),
            ("set of training rows (data.train)", &self.train_data),
            ("set of evaluation rows (data.eval)", eval_data),
            ("base model (model.path)", &self.model),
            ("layout of trained parameters", &self.layout),
            ("device or number type to compute with", self.compute.as_deref().unwrap_or_default()),
        ];
        contents.map(|(name, content)| (name, blake3::hash(content.as_bytes()))).to_vec()
    }

    /// What differs, a line each, naming the field.
    pub(crate) fn differences(&self, now: &Identity) -> Vec<String> {
        let mut lines = Vec::new();
        let value_in = |list: &[(String, String)], key: &str| {
            list.iter().find(|(known, _)| known == key).map_or("(not set)".to_owned(), |(_, value)| value.clone())
        };
        let added = now.recipe.iter().filter(|(key, _)| !self.recipe.iter().any(|(known, _)| known == key));
        for (key, _) in self.recipe.iter().chain(added) {
            let (before, after) = (value_in(&self.recipe, key), value_in(&now.recipe, key));
            if before != after {
                lines.push(format!("  {key}: the checkpoint has {before}, the recipe {after}"));
            }
        }
        let mut compare = |what: &str, before: &str, after: &str| {
            if before != after {
                lines.push(format!("  {what}"));
            }
        };
        compare("data.train: the rows have changed (text, order, tokens or mask)", &self.train_data, &now.train_data);
        let (before, after) = (self.eval_data.as_deref(), now.eval_data.as_deref());
        compare("data.eval: the rows have changed", before.unwrap_or(""), after.unwrap_or(""));
        compare("model.path: the weights or config.json have changed", &self.model, &now.model);
        compare("the trained parameters have other names or shapes", &self.layout, &now.layout);
        if let (Some(before), Some(after)) = (&self.compute, &now.compute) {
            let line =
                format!("model.device, model.dtype: the checkpoint was computed on {before}, this would be on {after}");
            compare(&line, before, after);
        }
        lines
    }
}
