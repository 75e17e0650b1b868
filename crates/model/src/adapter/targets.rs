//! Which modules the settings of an adapter name.

use fancy_regex::Regex;

use crate::adaptation::is_of_vocabulary;
use crate::adapter::mlx::within;
use crate::error::ModelError;
use crate::lora::{full_match, is_all_linear, is_match, is_named, layer_of};

/// Modules by a list of names (whole, or the end after a dot), or by a pattern over the whole name.
pub(super) enum Named {
    All,
    Pattern(String, Box<Regex>),
    List(Vec<String>),
}

impl Named {
    /// A text is a pattern, except the one word that means every linear layer.
    pub(super) fn text(text: &str) -> Result<Named, ModelError> {
        if is_all_linear(text) {
            Ok(Named::All)
        } else {
            Ok(Named::Pattern(text.to_owned(), Box::new(full_match(text)?)))
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        match self {
            Named::All => false,
            Named::Pattern(text, _) => text.is_empty(),
            Named::List(names) => names.is_empty(),
        }
    }

    fn contains(&self, module: &str) -> bool {
        match self {
            Named::All => !is_of_vocabulary(module),
            // PEFT refuses a pattern that matches norms too. Here it means the linear layers inside
            // the decoder.
            Named::Pattern(_, regex) if is_of_vocabulary(module) && is_match(regex, "model.norm") => false,
            Named::Pattern(_, regex) => is_match(regex, module),
            Named::List(names) => names.iter().any(|name| is_named(module, name)),
        }
    }

    /// The names that no module has.
    pub(super) fn idle(&self, modules: &[String]) -> Vec<String> {
        match self {
            Named::All => Vec::new(),
            Named::Pattern(text, _) if modules.iter().any(|module| self.contains(module)) || text.is_empty() => {
                Vec::new()
            }
            Named::Pattern(text, _) => vec![text.clone()],
            Named::List(names) => {
                let is_idle = |name: &&String| !modules.iter().any(|module| is_named(module, name));
                names.iter().filter(is_idle).cloned().collect()
            }
        }
    }
}

/// The patterns that find a module's layer number, and the numbers that are chosen.
pub(super) type Layers = (Vec<Regex>, Vec<u64>);

/// The branches that the settings ask for.
pub(super) enum Targets {
    /// The settings do not say: those that the file has.
    Unsaid,
    /// PEFT's settings. `layers`: only these layers; `None`: all.
    Chosen { chosen: Named, excluded: Option<Named>, layers: Option<Layers> },
    /// mlx-lm's settings: the layers from `first` on, and in them the modules of these names.
    /// `None`: the settings have no names ([`Targets::take_names`]).
    Last { first: usize, keys: Option<Vec<String>> },
}

impl Targets {
    /// The last `count` layers of a model with these linear layers; all layers if there is no
    /// count.
    pub(super) fn last_layers(modules: &[String], count: Option<usize>, keys: Option<Vec<String>>) -> Targets {
        let layers = modules.iter().filter_map(|module| layer_of(module)).max().map_or(0, |last| last + 1);
        Targets::Last { first: count.map_or(0, |count| layers.saturating_sub(count)), keys }
    }

    /// Settings of mlx-lm without names choose modules of the same names in each of these layers.
    /// Which ones its version chose by itself is seen from the branches in the file.
    pub(super) fn take_names<'m>(&mut self, of_branches: impl Iterator<Item = &'m str>) {
        if let Targets::Last { keys: keys @ None, .. } = self {
            *keys = Some(
                of_branches
                    .filter(|module| layer_of(module).is_some())
                    .map(|module| within(module).to_owned())
                    .collect(),
            );
        }
    }

    /// Whether there should be a branch on the module; `None` if the settings do not say.
    pub(super) fn contain(&self, module: &str) -> Option<bool> {
        match self {
            Targets::Unsaid => None,
            Targets::Chosen { chosen, excluded, layers } => {
                if excluded.as_ref().is_some_and(|excluded| excluded.contains(module)) || !chosen.contains(module) {
                    return Some(false);
                }
                // A full name counts in any layer.
                let in_full = matches!(chosen, Named::List(names) if names.iter().any(|name| name == module));
                let Some((number_of, numbers)) = layers.as_ref().filter(|_| !in_full) else { return Some(true) };
                Some(layer_number(number_of, module).is_some_and(|number| numbers.contains(&number)))
            }
            Targets::Last { first, keys } => {
                let inside = layer_of(module).is_some_and(|layer| layer >= *first);
                let keys = keys.as_ref()?;
                Some(keys.iter().any(|key| key == module || (inside && key == within(module))))
            }
        }
    }
}

/// The number of a module's layer, by the first pattern that finds one.
pub(super) fn layer_number(number_of: &[Regex], module: &str) -> Option<u64> {
    let captured = number_of.iter().find_map(|regex| regex.captures(module).ok().flatten())?;
    captured.get(1)?.as_str().parse().ok()
}
