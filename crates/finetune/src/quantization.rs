//! How a base was packed while it was loaded (`model.quantization`): what the result of a run says of
//! it. An adapter answers as it was trained only over a base that is packed in the same way.

use std::io::Read;
use std::path::Path;

use finetune_model::{Scheme, scheme_named};
use finetune_recipe::Quantization;
use finetune_store::{RealDisk, manifest_of};
use serde_json::Value;

use crate::source::{recipe_of, run_of};

/// The key of the manifest of an exported adapter.
pub(crate) const KEY: &str = "quantization";

/// Longest trainer_state.json that is read, in bytes.
const LONGEST_STATE: u64 = 1 << 20;

/// How the base of an adapter or checkpoint was packed. `None`: it was not, or nothing says it.
pub(crate) fn recorded(adapter: &Path) -> Option<Quantization> {
    of_manifest(adapter)
        .or_else(|| of_state(adapter))
        .or_else(|| run_of(adapter).and_then(|run| recipe_of(&run))?.model.quantization)
}

/// The form of a recipe's word.
pub(crate) fn scheme(quantization: Quantization) -> Scheme {
    scheme_named(quantization.as_str()).expect("recipes have no other words")
}

fn of_manifest(adapter: &Path) -> Option<Quantization> {
    let manifest = manifest_of(&RealDisk, adapter)?;
    Quantization::from_text(manifest.field(KEY)?.as_str()?)
}

/// What a checkpoint says that lies outside of its run.
fn of_state(checkpoint: &Path) -> Option<Quantization> {
    let mut text = String::new();
    let file = std::fs::File::open(checkpoint.join("trainer_state.json"));
    file.and_then(|file| file.take(LONGEST_STATE).read_to_string(&mut text)).ok()?;
    let state: Value = serde_json::from_str(&text).ok()?;
    let values = state["identity"]["recipe"].as_array()?;
    let value = values.iter().find(|pair| pair[0] == "model.quantization")?;
    Quantization::from_text(value[1].as_str()?.trim_matches('"'))
}

#[cfg(test)]
mod tests {
    use finetune_store::{NewFile, replace_directory};
    use serde_json::json;

    use super::*;

    #[test]
    fn every_word_of_a_recipe_is_a_form() {
        for word in Quantization::ALL {
            let quantization = Quantization::from_text(word).expect("a word");
            assert_eq!(finetune_model::scheme_word(scheme(quantization)), *word);
        }
    }

    #[test]
    fn manifests_and_states_are_asked() {
        let folder = tempfile::tempdir().expect("a directory");
        let state = json!({"identity": {"recipe": [["lora.rank", "8"], ["model.quantization", "\"nf4\""]]}});
        let state = NewFile { name: "trainer_state.json", bytes: state.to_string().into_bytes().into() };
        for (name, files, about) in [
            ("exported", vec![], json!({"kind": "adapter", "quantization": "mlx4"})),
            ("checkpoint", vec![state], json!({"kind": "checkpoint"})),
            ("plain", vec![], json!({"kind": "adapter"})),
        ] {
            replace_directory(&RealDisk, &folder.path().join(name), &files, &about).expect("written");
        }
        for (name, want) in [
            ("exported", Some(Quantization::Mlx4)),
            ("checkpoint", Some(Quantization::Nf4)),
            ("plain", None),
            ("none", None),
        ] {
            assert_eq!(recorded(&folder.path().join(name)), want, "{name}");
        }
    }
}
