//! What a run is made of. The checkpoint carries it, and a resumed run must be made of the same.

use finetune_recipe::Recipe;
use serde::{Deserialize, Serialize};

/// Keys with the recipe's values, and digests of everything else.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// Every recipe key that fixes the numbers of a run, in order.
    pub(crate) recipe: Vec<(String, String)>,
    /// The digest of the training rows as tokens and masks.
    pub(crate) train_data: String,
    /// The digest of the evaluation rows; `None` without any.
    pub(crate) eval_data: Option<String>,
    /// The digests of weights and config of the base model.
    pub(crate) model: String,
    /// The digest of names, shapes and order of the trained parameters.
    pub(crate) layout: String,
    /// What `auto` became: the kind of device and the number type that is computed in. Checkpoints
    /// of versions that computed on the CPU only lack it.
    #[serde(default)]
    pub(crate) compute: Option<String>,
    /// `data.add_tokens`. Rows that have none of the tokens do not tell which they are. Without any
    /// the checkpoint is that of versions that could not add tokens.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) new_tokens: Vec<String>,
}

/// Keys that a resume may change: how large the steps are from here on, how they are computed, and
/// when the run ends. Each change is named, and the next checkpoint carries it.
const MAY_CHANGE: [&str; 4] =
    ["optimizer.learning_rate", "train.max_grad_norm", "train.micro_batch_size", "eval.early_stopping_patience"];

/// The value of a key in a list of them.
fn value_in(list: &[(String, String)], key: &str) -> String {
    list.iter().find(|(known, _)| known == key).map_or(NOT_SET.to_owned(), |(_, value)| value.clone())
}

/// The value of a key that a list does not have.
const NOT_SET: &str = "(not set)";

impl Identity {
    /// Every key of a recipe that fixes the numbers of a run, with its value.
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

    /// Keys whose values differ, with the value before and now.
    fn changed_keys<'a>(&'a self, now: &'a Identity) -> impl Iterator<Item = (&'a str, String, String)> {
        let added = now.recipe.iter().filter(move |(key, _)| !self.recipe.iter().any(|(known, _)| known == key));
        let values = move |(key, _): &'a (String, String)| {
            (key.as_str(), value_in(&self.recipe, key), value_in(&now.recipe, key))
        };
        // A checkpoint of a version that did not have a key yet is that of a run without it.
        let is_same = |before: &str, after: &str| before == after || (before == NOT_SET && after == "none");
        self.recipe.iter().chain(added).map(values).filter(move |(_, before, after)| !is_same(before, after))
    }

    /// Differences that a resume may have, a line for each.
    pub(crate) fn changes(&self, now: &Identity) -> Vec<String> {
        let mut lines: Vec<String> = self
            .changed_keys(now)
            .filter(|(key, ..)| MAY_CHANGE.contains(key))
            .map(|(key, before, after)| format!("{key} is {after} from here on; it was {before}"))
            .collect();
        if self.eval_data.is_none() && now.eval_data.is_some() {
            lines.push("rows are evaluated from here on; there were none before".to_owned());
        }
        lines
    }

    /// Differences that a resume may not have, a line for each, with the key.
    pub(crate) fn differences(&self, now: &Identity) -> Vec<String> {
        let mut lines: Vec<String> = self
            .changed_keys(now)
            .filter(|(key, ..)| !MAY_CHANGE.contains(key))
            .map(|(key, before, after)| format!("  {key}: the checkpoint has {before}, the recipe {after}"))
            .collect();
        if self.new_tokens != now.new_tokens {
            let (before, after) = (&self.new_tokens, &now.new_tokens);
            lines.push(format!("  data.add_tokens: the checkpoint has {before:?}, the recipe {after:?}"));
        }
        let mut compare = |what: &str, before: &str, after: &str| {
            if before != after {
                lines.push(format!("  {what}"));
            }
        };
        compare(
            "data.train: the rows have changed (text, order, weights, tokens or mask)",
            &self.train_data,
            &now.train_data,
        );
        // Where nothing was evaluated before, nothing can be compared wrongly.
        if let Some(before) = &self.eval_data {
            compare("data.eval: the rows have changed", before, now.eval_data.as_deref().unwrap_or(""));
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(values: &[(&str, &str)]) -> Identity {
        Identity {
            recipe: values.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            train_data: "rows".to_owned(),
            eval_data: None,
            model: "weights:config".to_owned(),
            layout: "layout".to_owned(),
            compute: None,
            new_tokens: Vec::new(),
        }
    }

    /// Size and arithmetic of the steps may change, with a notice. Nothing else may.
    #[test]
    fn what_may_change_is_said_and_the_rest_refused() {
        let before = identity(&[("seed", "1"), ("optimizer.learning_rate", "1e30"), ("train.max_grad_norm", "0.0")]);
        #[expect(clippy::type_complexity, reason = "a table of cases")]
        let cases: [(&[(&str, &str)], &[&str], &[&str]); 5] = [
            (
                &[
                    ("seed", "1"),
                    ("optimizer.learning_rate", "1e30"),
                    ("train.max_grad_norm", "0.0"),
                    ("train.router_aux_loss_coef", "none"),
                ],
                &[],
                &[],
            ),
            (&[("seed", "1"), ("optimizer.learning_rate", "1e30"), ("train.max_grad_norm", "0.0")], &[], &[]),
            (
                &[("seed", "1"), ("optimizer.learning_rate", "0.0001"), ("train.max_grad_norm", "1.0")],
                &[
                    "optimizer.learning_rate is 0.0001 from here on; it was 1e30",
                    "train.max_grad_norm is 1.0 from here on; it was 0.0",
                ],
                &[],
            ),
            (
                &[("seed", "2"), ("optimizer.learning_rate", "1e30"), ("train.max_grad_norm", "0.0")],
                &[],
                &["  seed: the checkpoint has 1, the recipe 2"],
            ),
            (
                &[
                    ("seed", "1"),
                    ("optimizer.learning_rate", "1e30"),
                    ("train.max_grad_norm", "0.0"),
                    ("optimizer.eps", "1e-8"),
                ],
                &[],
                &["  optimizer.eps: the checkpoint has (not set), the recipe 1e-8"],
            ),
        ];
        for (values, changes, differences) in cases {
            let now = identity(values);
            assert_eq!(before.changes(&now), changes, "{values:?}");
            assert_eq!(before.differences(&now), differences, "{values:?}");
        }
        let with_tokens = Identity { new_tokens: vec!["<tool>".to_owned()], ..before.clone() };
        let line = "  data.add_tokens: the checkpoint has [], the recipe [\"<tool>\"]";
        assert_eq!(before.differences(&with_tokens), [line]);
        assert!(!serde_json::to_string(&before).expect("JSON").contains("new_tokens"), "checkpoints keep their bytes");
        let evaluated = Identity { eval_data: Some("held back".to_owned()), ..before.clone() };
        assert_eq!(before.changes(&evaluated), ["rows are evaluated from here on; there were none before"]);
        assert!(before.differences(&evaluated).is_empty());
        assert_eq!(evaluated.differences(&before), ["  data.eval: the rows have changed"]);
        let other_rows = Identity { train_data: "others".to_owned(), ..before.clone() };
        assert!(before.differences(&other_rows)[0].contains("data.train: the rows have changed"));
    }
}
