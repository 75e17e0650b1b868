//! Names and patterns of modules in config.json.

use fancy_regex::Regex;

/// A module, or several.
#[derive(Debug)]
pub(super) enum Pattern {
    /// This very name.
    Name(String),
    /// What begins with it as a whole part, or ends with it.
    Part(String),
    Regex(Regex),
    /// It is no pattern, and fits nothing.
    Nothing,
}

impl Pattern {
    /// Of compressed-tensors: `re:` begins what Python's `re.match` finds, and anything else is a name.
    pub(super) fn of_compressed(text: &str) -> Pattern {
        match text.strip_prefix("re:") {
            Some(regex) => Pattern::regex(&format!("^(?:{regex})")),
            None => Pattern::Name(text.to_owned()),
        }
    }

    /// Of transformers (`should_convert_module` in `quantizers/quantizers_utils.py`): the beginning of a name up to a
    /// dot, as a regular expression, or the end of a name.
    pub(super) fn of_transformers(text: &str) -> Pattern {
        // A dot stands for any letter in it, which changes no real name.
        let is_plain = text.chars().all(|char| char.is_ascii_alphanumeric() || "._-".contains(char));
        match is_plain {
            true => Pattern::Part(text.to_owned()),
            false => Pattern::regex(&format!(r"^(?:{text})(?:(?<=\.)|(?=\.|$))")),
        }
    }

    fn regex(text: &str) -> Pattern {
        Regex::new(text).map_or(Pattern::Nothing, Pattern::Regex)
    }

    /// Whether it is this very name.
    pub(super) fn is(&self, name: &str) -> bool {
        matches!(self, Pattern::Name(own) if own == name)
    }

    /// Whether a module of this name is meant. A pattern that backtracks beyond the engine's limit fits nothing.
    pub(super) fn fits(&self, name: &str) -> bool {
        match self {
            Pattern::Name(own) => own == name,
            Pattern::Part(part) => {
                let begins = |rest: &str| rest.is_empty() || rest.starts_with('.') || part.ends_with('.');
                !part.is_empty() && (name.strip_prefix(part.as_str()).is_some_and(begins) || name.ends_with(part))
            }
            Pattern::Regex(regex) => regex.is_match(name).unwrap_or(false),
            Pattern::Nothing => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What transformers 5.23 and Python's `re.match` say of the same names.
    #[test]
    fn patterns_fit_what_they_name() {
        let (transformers, compressed) = (Pattern::of_transformers, Pattern::of_compressed);
        for (pattern, name, want) in [
            (transformers("lm_head"), "lm_head", true),
            (transformers("model.layers.1"), "model.layers.1.mlp.up_proj", true),
            (transformers("model.layers.1"), "model.layers.11.mlp.up_proj", false),
            (transformers("model.layers.*.self_attn"), "model.layers.3.self_attn.q_proj", true),
            (transformers("model.layers.*.self_attn"), "model.layers.3.mlp.experts.0.up_proj", false),
            (transformers("mlp.gate"), "model.layers.0.mlp.gate", true),
            (transformers("mlp.gate"), "model.layers.0.mlp.gate_proj", false),
            (transformers("(broken"), "model.layers.0.mlp.gate", false),
            (compressed("lm_head"), "lm_head", true),
            (compressed("model.layers.0"), "model.layers.0.mlp.gate", false),
            (compressed("re:.*self_attn.*"), "model.layers.0.self_attn.q_proj", true),
            (compressed(r"re:.*mlp\.(gate|up)_proj.*"), "model.layers.0.mlp.up_proj", true),
            (compressed(r"re:.*mlp\.(gate|up)_proj.*"), "model.layers.1.mlp.experts.0.up_proj", false),
            (compressed("re:mlp"), "model.layers.1.mlp.up_proj", false),
        ] {
            assert_eq!(pattern.fits(name), want, "{pattern:?} {name}");
        }
    }
}
