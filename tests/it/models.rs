//! Models and adapters that are wrong: what a command says, and its exit code.

use std::path::Path;

use serde_json::json;

use crate::folder::{CRASH_RECIPE, Folder, golden};
use crate::program::Ended;

/// Puts four bytes into a tensor of a safetensors file, at its first element.
fn put(path: &Path, name: &str, value: f32) {
    let mut bytes = std::fs::read(path).expect("a file");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).expect("JSON");
    let start = 8 + length + header[name]["data_offsets"][0].as_u64().expect("an offset") as usize;
    bytes[start..start + 4].copy_from_slice(&value.to_le_bytes());
    std::fs::write(path, bytes).expect("written");
}

/// A model and an adapter of its family, in `model` and `adapter`.
fn with_adapter() -> Folder {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    std::fs::create_dir(folder.path("adapter")).expect("a new directory");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        folder.write(
            &format!("adapter/{name}"),
            &std::fs::read(golden("qwen3").join("adapter").join(name)).expect("a file"),
        );
    }
    folder
}

const EXPORT: [&str; 7] = ["export", "model", "--adapter", "adapter", "--format", "merged", "--output"];

fn export(folder: &Folder) -> Ended {
    folder.finetune(&[&EXPORT[..], &["out"]].concat())
}

/// With NaN in the adapter or in the base, the exit code is 4, the message has the tensor's name,
/// and nothing is written.
#[test]
fn a_merge_of_numbers_that_are_none() {
    let lora = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight";
    for (file, name, value) in [
        ("adapter/adapter_model.safetensors", lora, f32::NAN),
        ("adapter/adapter_model.safetensors", lora, f32::INFINITY),
        ("model/model.safetensors", "model.norm.weight", f32::NAN),
    ] {
        let folder = with_adapter();
        export(&folder).expect(0);
        std::fs::remove_dir_all(folder.path("out")).expect("removed");
        put(&folder.path(file), name, value);
        let module = name.trim_start_matches("base_model.model.").trim_end_matches(".lora_B.weight");
        export(&folder).expect(4).says(module).says("not finite");
        if file.starts_with("adapter") {
            let alone = ["export", "adapter", "--format", "peft", "--output", "out"];
            folder.finetune(&alone).expect(4).says(name).says("not finite");
        }
        assert!(!folder.path("out").exists(), "{name} = {value}");
        let left: Vec<_> = std::fs::read_dir(folder.path("")).expect("a folder").collect();
        assert_eq!(left.len(), 5, "nothing beside it: {left:?}");
    }
}

/// `validate` finds what `run` would stop at, and both name the tensor.
#[test]
fn a_base_with_a_number_that_is_none() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    put(&folder.path("model/model.safetensors"), "model.norm.weight", f32::NAN);
    // Before a run begins, every problem is bad input.
    for command in ["validate", "run"] {
        folder.finetune(&[command, "recipe.toml"]).expect(2).says("the tensor `model.norm.weight`");
    }
}

/// (a key of config.json, a value out of its range)
#[test]
fn a_config_of_nonsense_is_refused_by_both() {
    for (key, value) in [
        ("rms_norm_eps", json!(-1.0)),
        ("rope_theta", json!(0.0)),
        ("rope_scaling", json!({"rope_type": "linear", "factor": 0.0})),
        ("eos_token_id", json!(1e12)),
    ] {
        let folder = Folder::with_recipe(CRASH_RECIPE);
        let text = std::fs::read_to_string(folder.path("model/config.json")).expect("config.json");
        let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        config.as_object_mut().expect("an object").remove("rope_parameters");
        config[key] = value;
        folder.write("model/config.json", config.to_string().as_bytes());
        for command in ["validate", "run"] {
            folder.finetune(&[command, "recipe.toml"]).expect(2).says("config.json");
        }
    }
}

/// A weight file that was cut short is an error that names it, whenever it is noticed.
#[test]
fn a_model_file_that_is_cut() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let path = folder.path("model/model.safetensors");
    let length = std::fs::metadata(&path).expect("a file").len();
    std::fs::OpenOptions::new().write(true).open(&path).expect("a file").set_len(length - 100).expect("cut");
    folder.finetune(&["validate", "recipe.toml"]).expect(2).says("model.safetensors is malformed");
}

/// The settings name a branch that the tensors lack. PEFT warns of that, and so does every command
/// here.
#[test]
fn notices_of_an_adapter_are_said() {
    let folder = with_adapter();
    let text = std::fs::read_to_string(folder.path("adapter/adapter_config.json")).expect("a file");
    let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    config["spectral_gate"] = json!({"temperature": 0.5});
    folder.write("adapter/adapter_config.json", config.to_string().as_bytes());
    export(&folder).expect(0).says("`spectral_gate`");
    folder
        .finetune(&["eval", "model", "--adapter", "adapter", "--data", "train.jsonl"])
        .expect(0)
        .says("`spectral_gate`");
}
