//! Adapters of others: settings that do not fit their tensors, other spellings, other formats,
//! other bases.

use finetune_advice::Advice as _;
use finetune_model::adapter::Adapter;
use finetune_model::{
    Adaptation, BaseCheck, BaseName, LoraTarget, Model, ModelConfig, ModelError, Placement, base_digest,
};
use finetune_store::{Dtype, RealDisk, Staging};
use serde_json::{Value, json};

use crate::made::{Tensor, adapter, f32s, floats, golden, model, put, read_json, write, write_tensors};

mod checkpoint;
mod made;

fn config(family: &str) -> ModelConfig {
    ModelConfig::load(&golden(family)).expect("a config")
}

fn read(directory: &std::path::Path) -> Result<Adapter, ModelError> {
    Adapter::read(directory, &config("llama"))
}

/// The result of reading: notices, or the error.
fn outcome(directory: &std::path::Path) -> Result<String, String> {
    read(directory).map(|adapter| adapter.notices.join("\n")).map_err(|error| error.to_string())
}

/// (a setting of adapter_config.json and its value, part of the notice if it is read ("" for none),
/// part of the error). The adapter has rank 4 on all linear layers of three layers.
#[test]
fn settings_are_held_against_the_tensors() {
    let all = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    let with = |more: &str| json!(all.iter().copied().chain([more]).collect::<Vec<_>>());
    let table: Vec<(&str, Value, Result<&str, &str>)> = vec![
        ("r", json!(4), Ok("")),
        ("r", json!(8), Err("is 8 by the settings and 4 by its tensors")),
        ("r", json!("4"), Err("`r` should be")),
        ("target_modules", json!(["q_proj", "v_proj"]), Err("do not name")),
        ("target_modules", json!(".*_proj"), Ok("")),
        ("target_modules", json!("q_proj"), Err("do not name")),
        ("target_modules", json!(r".*\.[01]\..*_proj"), Err("`model.layers.2.self_attn.q_proj`")),
        ("target_modules", json!("all-linear"), Ok("")),
        ("target_modules", json!("("), Err("no regular expression")),
        ("target_modules", json!(7), Err("target_modules")),
        ("target_modules", Value::Null, Ok("")),
        ("target_modules", with("w1"), Ok("target_modules has `w1`")),
        ("exclude_modules", json!(["v_proj"]), Err("do not name")),
        ("exclude_modules", json!(".*v_proj"), Err("do not name")),
        ("exclude_modules", json!(["lm_head"]), Ok("")),
        ("exclude_modules", json!(["c_attn"]), Ok("exclude_modules has `c_attn`")),
        ("exclude_modules", json!([]), Ok("")),
        ("layers_to_transform", json!([0, 1, 2]), Ok("")),
        ("layers_to_transform", json!([0, 1]), Err("do not name")),
        ("layers_to_transform", json!(1), Err("do not name")),
        ("layers_to_transform", json!([0, 1, 2, 9]), Ok("layers_to_transform has `9`")),
        ("layers_pattern", json!("layers"), Err("`layers_pattern` needs")),
        ("rank_pattern", json!({"q_proj": 2}), Err("is 2 by the settings")),
        ("rank_pattern", json!({"layers.7.self_attn.q_proj": 2}), Ok("rank_pattern has")),
        ("rank_pattern", json!({"q_proj": "2"}), Err("rank_pattern")),
        ("alpha_pattern", json!({"c_attn": 2}), Ok("alpha_pattern has `c_attn`")),
        ("alpha_pattern", json!({"q_proj": 2}), Ok("")),
        ("lora_alpha", json!("8"), Err("`lora_alpha` should be a number, not \"8\"")),
        ("spectral_gate", Value::Null, Ok("")),
        ("spectral_gate", json!(false), Ok("")),
        ("spectral_gate", json!({}), Ok("")),
        ("spectral_gate", json!({"temperature": 0.5}), Ok("nothing here knows it: `spectral_gate`")),
        ("use_dora", json!(true), Err("magnitudes of DoRA are missing")),
        ("modules_to_save", json!(["lm_head"]), Err("a tensor of modules_to_save is missing: `lm_head.weight`")),
        ("modules_to_save", json!(["classifier"]), Ok("no module's name ends in `classifier`")),
        ("modules_to_save", json!("lm_head"), Err("`modules_to_save` should be a list")),
        ("enable_lora", json!([true, false]), Err("enable_lora")),
        ("enable_lora", Value::Null, Ok("")),
        ("merge_weights", json!(false), Ok("")),
        ("target_parameters", json!(["experts"]), Err("target_parameters")),
        ("fan_in_fan_out", json!(true), Ok("fan_in_fan_out")),
        ("init_lora_weights", json!("pissa"), Err("init_lora_weights")),
    ];
    for (key, value, want) in table {
        let made = adapter("llama", |config, _| config[key] = value.clone());
        match (outcome(made.path()), want) {
            (Ok(notices), Ok("")) => assert_eq!(notices, "", "{key} = {value}"),
            (Ok(notices), Ok(part)) => assert!(notices.contains(part), "{key} = {value}: {notices}"),
            (Err(error), Err(part)) => assert!(error.contains(part), "{key} = {value}: {error}"),
            (found, want) => panic!("{key} = {value}: {found:?}, expected {want:?}"),
        }
    }
}

/// What only several settings together say.
#[test]
fn layers_have_a_pattern_and_full_names_have_none() {
    let both = |layers: Value, pattern: Value, names: Value| {
        let made = adapter("llama", |config, _| {
            config["layers_to_transform"] = layers;
            config["layers_pattern"] = pattern;
            config["target_modules"] = names;
        });
        outcome(made.path())
    };
    let short = json!(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]);
    assert_eq!(both(json!([0, 1, 2]), json!("layers"), short.clone()), Ok(String::new()));
    assert_eq!(both(json!([0, 1, 2]), json!(["blocks", "layers"]), short.clone()), Ok(String::new()));
    assert!(both(json!([0, 1, 2]), json!("blocks"), short).is_err_and(|error| error.contains("do not name")));
    let refused = both(json!([0]), Value::Null, json!(".*_proj"));
    assert!(refused.is_err_and(|error| error.contains("list of names")));
    // A full name counts, whatever the layers are.
    let modules = finetune_model::linear_modules(&config("llama"));
    assert!(both(json!([0]), Value::Null, json!(modules)).is_ok());
}

/// The first versions wrote fewer settings. Those that are left out have PEFT's defaults.
#[test]
fn an_old_config_is_read() {
    let made = adapter("llama", |config, _| {
        *config = json!({
            "base_model_name_or_path": "someone/base-7b", "bias": "none", "enable_lora": null, "fan_in_fan_out": false,
            "inference_mode": true, "lora_alpha": 16, "lora_dropout": 0.05, "merge_weights": false, "modules_to_save": null,
            "peft_type": "LORA", "r": 4, "task_type": "CAUSAL_LM",
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        });
    });
    let adapter = read(made.path()).expect("an adapter");
    assert_eq!((adapter.targets[0].alpha, adapter.targets[0].use_rslora), (16.0, false));
    assert_eq!(adapter.base.name.as_deref(), Some("someone/base-7b"));
    assert!(adapter.notices.is_empty(), "{:?}", adapter.notices);
}

#[test]
fn every_tensor_is_accounted_for() {
    let whole = read(&golden("llama").join("adapter")).expect("the golden adapter");
    let after = |change: &dyn Fn(&mut Vec<Tensor>)| {
        let made = adapter("llama", |_, tensors| change(tensors));
        read(made.path())
    };
    // Other spellings of the same names.
    for (from, to) in [(".weight", ".default.weight"), ("base_model.model.", ""), (".weight", ".my-adapter.weight")] {
        let renamed = after(&|tensors| tensors.iter_mut().for_each(|tensor| tensor.0 = tensor.0.replace(from, to)));
        let renamed = renamed.expect("the same adapter");
        assert_eq!((&renamed.targets, &renamed.values), (&whole.targets, &whole.values), "{from} as {to}");
    }
    let q = "base_model.model.model.layers.1.self_attn.q_proj";
    // PEFT warns of branches that are missing, and leaves their layers as they are.
    let fewer = after(&|tensors| tensors.retain(|tensor| !tensor.0.contains("layers.2."))).expect("fewer branches");
    assert_eq!(fewer.targets.len(), 14);
    assert!(fewer.notices[0].contains("`model.layers.2.self_attn.q_proj`"), "{:?}", fewer.notices);
    type Change<'a> = &'a dyn Fn(&mut Vec<Tensor>);
    let table: [(Change<'_>, &str); 8] = [
        (&|tensors| tensors.retain(|tensor| tensor.0 != format!("{q}.lora_B.weight")), "the other half of a branch"),
        (&|tensors| tensors.clear(), "no LoRA branch at all"),
        (&|tensors| put(tensors, &format!("{q}.lora_B.weight"), 3, f32::NAN), "layers.1.self_attn.q_proj.lora_B"),
        (&|tensors| put(tensors, &format!("{q}.lora_A.weight"), 0, f32::INFINITY), "not finite (element 0)"),
        (
            &|tensors| {
                tensors.push(("base_model.model.vision.lora_A.weight".into(), Dtype::F32, vec![1], f32s(&[1.0])))
            },
            "belong to no LoRA branch of this model: `base_model.model.vision",
        ),
        (
            &|tensors| {
                let again = tensors[0].clone();
                tensors.push((again.0.replace(".weight", ".default.weight"), again.1, again.2, again.3));
            },
            "two tensors for one place",
        ),
        (&|tensors| tensors[0].2.reverse(), "has the shape [80, 4], expected"),
        (
            &|tensors| {
                let tensor = &mut tensors[0];
                tensor.1 = Dtype::F64;
                tensor.3 =
                    floats(&tensor.3).iter().flat_map(|&v| f64::from(v).to_le_bytes()).collect::<Vec<_>>().into();
            },
            "is stored as F64",
        ),
    ];
    for (change, part) in table {
        let error = after(change).expect_err(part);
        assert!(error.to_string().contains(part), "{error}");
        assert_eq!(error.is_about_numbers(), part.contains("finite") || part.contains("lora_B"), "{error}");
        assert!(!error.hints().is_empty(), "{error}");
    }
}

/// PEFT saves an embedding with new rows three times if it is trained in full.
#[test]
fn copies_of_a_module_trained_in_full_are_passed_over() {
    let source = golden("llama").join("../../adapters/saved_embedding_tied/adapter");
    let whole = Adapter::read(&source, &config("llama")).expect("the golden adapter");
    let with = |names: &[&str], keeps_own: bool| {
        let made = tempfile::tempdir().expect("a directory");
        std::fs::copy(source.join("adapter_config.json"), made.path().join("adapter_config.json")).expect("a copy");
        let mut tensors = made::read_tensors(&source.join("adapter_model.safetensors"));
        let module = "base_model.model.model.embed_tokens";
        let own = tensors.iter().find(|tensor| tensor.0 == format!("{module}.weight")).expect("the embedding").clone();
        for name in names {
            tensors.push((format!("{module}.{name}"), own.1, own.2.clone(), own.3.clone()));
        }
        tensors.retain(|tensor| keeps_own || tensor.0 != format!("{module}.weight"));
        write_tensors(&made.path().join("adapter_model.safetensors"), &tensors);
        Adapter::read(made.path(), &config("llama"))
    };
    let copies = with(&["modules_to_save.weight", "original_module.weight"], true).expect("the same adapter");
    assert_eq!((&copies.saved, &copies.values), (&whole.saved, &whole.values));
    let twice = with(&["modules_to_save.weight", "modules_to_save.default.weight"], false);
    assert!(twice.is_err_and(|error| error.to_string().contains("two tensors for one place")));
}

fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns;
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

/// The golden adapter as mlx-lm would have written it.
fn mlx(settings: Value) -> tempfile::TempDir {
    let made = tempfile::tempdir().expect("a directory");
    let tensors: Vec<Tensor> = made::read_tensors(&golden("llama").join("adapter/adapter_model.safetensors"))
        .into_iter()
        .map(|(name, dtype, shape, bytes)| {
            let name = name.trim_start_matches("base_model.model.").trim_end_matches(".weight");
            let name = name.replace("lora_A", "lora_a").replace("lora_B", "lora_b");
            let shape = vec![shape[1], shape[0]];
            let values = f32s(&transposed(&floats(&bytes), shape[0]));
            (name, dtype, shape, values)
        })
        .collect();
    write_tensors(&made.path().join("adapters.safetensors"), &tensors);
    write(&made.path().join("adapter_config.json"), settings.to_string());
    made
}

#[test]
fn an_adapter_of_mlx_is_the_same_adapter() {
    let whole = read(&golden("llama").join("adapter")).expect("the golden adapter");
    let scale = whole.targets[0].scale();
    let parameters = json!({"rank": 4, "scale": scale, "dropout": 0.0});
    for settings in [
        json!({"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters, "model": "someone/base"}),
        json!({"num_layers": 16, "lora_parameters": parameters}),
        json!({"lora_layers": 3, "lora_parameters": parameters, "use_dora": false}),
    ] {
        let adapter = read(mlx(settings.clone()).path()).expect("an adapter");
        assert_eq!(adapter.values, whole.values, "{settings}");
        assert!(adapter.targets.iter().all(|target| target.scale() == scale), "{settings}");
        assert!(adapter.notices.is_empty(), "{settings}: {:?}", adapter.notices);
        assert_eq!(adapter.base.name.as_deref(), settings["model"].as_str());
    }
    let with = |key: &str, value: Value| {
        let mut parameters = parameters.clone();
        parameters[key] = value;
        parameters
    };
    let all = json!([
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj"
    ]);
    let table = [
        (
            json!({"num_layers": 2, "lora_parameters": parameters}),
            "do not name, so that others leave them out: `model.layers.0.",
        ),
        (json!({"num_layers": 3, "lora_parameters": with("keys", json!(["self_attn.q_proj"]))}), "do not name"),
        (json!({"num_layers": 3, "lora_parameters": with("rank", json!(8))}), "is 8 by the settings"),
        (json!({"num_layers": 3, "lora_parameters": with("scale", Value::Null)}), "`scale`"),
        (json!({"num_layers": 3}), "`lora_parameters` is missing"),
        (json!({"fine_tune_type": "dora", "lora_parameters": parameters}), "magnitudes of DoRA are missing"),
        (json!({"fine_tune_type": "full", "lora_parameters": null}), "`fine_tune_type` = full"),
    ];
    for (settings, part) in table {
        let error = read(mlx(settings.clone()).path()).expect_err(part);
        assert!(error.to_string().contains(part), "{settings}: {error}");
    }
    read(mlx(json!({"num_layers": 3, "lora_parameters": with("keys", all)})).path()).expect("the keys of all layers");

    // Without `keys` the branches of the other layers tell that one is missing.
    let cut = mlx(json!({"num_layers": -1, "lora_parameters": parameters}));
    let file = cut.path().join("adapters.safetensors");
    let mut tensors = made::read_tensors(&file);
    tensors.retain(|(name, ..)| !name.starts_with("model.layers.1.self_attn.q_proj."));
    write_tensors(&file, &tensors);
    let notices = read(cut.path()).expect("an adapter").notices;
    let [notice] = &notices[..] else { panic!("{notices:?}") };
    assert!(notice.ends_with("so these layers stay as they are: `model.layers.1.self_attn.q_proj`"), "{notice}");
}

/// (what is made in the directory, the part of the path that is named, parts of message and hint)
#[test]
fn a_path_that_is_no_adapter_is_recognized() {
    let table: [(&[&str], &str, &str, &str); 9] = [
        (&[], "absent", "there is nothing of this name", "adapter_model.safetensors"),
        (
            &["here/adapter_config.json", "here/adapter_model.safetensors"],
            "here/adapter_model.safetensors",
            "it is a file",
            "here",
        ),
        (
            &["run/checkpoints/step-000002/adapter_config.json"],
            "run",
            "not come to its end",
            "run/checkpoints/step-000002",
        ),
        (&["named/chat/adapter_config.json"], "named", "it holds `chat`", "named/chat"),
        (&["model/config.json"], "model", "a model directory", "adapter_config.json"),
        (&["half/adapter_model.safetensors"], "half", "adapter_config.json is missing", "copy it"),
        (&["other/readme"], "other", "it has no adapter_config.json", "adapter_model.safetensors"),
        (&["bare/adapter_config.json"], "bare", "it has no adapter_model.safetensors", "not complete"),
        (&["old/adapter_config.json", "old/adapter_model.bin"], "old", "is a pickle", "torch.load("),
    ];
    for (files, named, message, hint) in table {
        let top = tempfile::tempdir().expect("a directory");
        for file in files {
            let path = top.path().join(file);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            write(&path, "{}");
        }
        let error = read(&top.path().join(named)).expect_err(named);
        assert!(error.to_string().contains(message), "{named}: {error}");
        assert!(error.hints()[0].contains(hint), "{named}: {:?}", error.hints());
    }
}

#[test]
fn a_run_stands_for_its_adapter() {
    let top = tempfile::tempdir().expect("a directory");
    let inside = top.path().join("adapter");
    std::fs::create_dir(&inside).expect("a folder");
    for name in made::ADAPTER {
        std::fs::copy(golden("llama").join("adapter").join(name), inside.join(name)).expect("a copy");
    }
    assert_eq!(read(top.path()).expect("an adapter"), read(&inside).expect("an adapter"));
}

/// A git-lfs pointer, a web page: not «malformed».
#[test]
fn what_lies_in_the_place_of_a_file_is_named() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n";
    for (name, text, what) in [
        ("adapter_model.safetensors", pointer, "a git-lfs pointer"),
        ("adapter_config.json", pointer, "a git-lfs pointer"),
        ("adapter_config.json", "<!DOCTYPE html>\n<html>", "a web page"),
    ] {
        let made = adapter("llama", |_, _| {});
        write(&made.path().join(name), text);
        let error = read(made.path()).expect_err(what);
        assert!(error.to_string().contains(what) && error.to_string().contains(name), "{error}");
    }
}

#[test]
fn an_adapter_of_another_shape_is_of_another_base() {
    let error = Adapter::read(&golden("qwen3").join("adapter"), &config("llama")).expect_err("other shapes");
    assert!(error.hints()[0].contains("another base"), "{error}: {:?}", error.hints());
}

/// (the recipe's branches, part of the message, lines of the hint)
#[test]
fn what_fits_an_adapter_is_ready_to_paste() {
    let read = |change: &dyn Fn(&mut Value)| {
        let made = adapter("llama", |config, _| change(config));
        Adapter::read(made.path(), &config("llama")).expect("an adapter")
    };
    let whole = read(&|_| {});
    let special = read(&|config| config["alpha_pattern"] = json!({"layers.1.mlp.up_proj": 2}));
    let with = |of: &dyn Fn(&LoraTarget) -> LoraTarget| whole.targets.iter().map(of).collect::<Vec<_>>();
    let without: Vec<LoraTarget> =
        whole.targets.iter().filter(|target| !target.module.contains("k_proj")).cloned().collect();
    let plain = with(&|target| LoraTarget { use_rslora: false, ..target.clone() });
    let wider = with(&|target| LoraTarget { rank: 8, ..target.clone() });
    let magnitudes = with(&|target| LoraTarget { use_dora: true, ..target.clone() });
    let same = whole.targets.clone();
    let of = |targets: &[LoraTarget]| Adaptation { targets: targets.to_vec(), ..Adaptation::default() };
    let table: [(&Adapter, &[LoraTarget], &str, &[&str]); 5] = [
        (
            &whole,
            &without,
            "a branch on `model.layers.0.self_attn.k_proj`, the recipe has none",
            &["target_modules = \"all-linear\""],
        ),
        (
            &whole,
            &plain,
            "alpha 8 with use_rslora on `model.layers.0.self_attn.q_proj`",
            &["alpha = 8", "use_rslora = true"],
        ),
        (&whole, &magnitudes, "plain LoRA on `model.layers.0.self_attn.q_proj` in the adapter, DoRA", &["rank = 4"]),
        (&whole, &wider, "rank 4 on `model.layers.0.self_attn.q_proj` in the adapter, 8", &["rank = 4"]),
        (
            &special,
            &same,
            "alpha 2 with use_rslora on `model.layers.1.mlp.up_proj`",
            &["alpha = 8", "alpha_pattern = { \"model.layers.1.mlp.up_proj\" = 2 }"],
        ),
    ];
    for (adapter, recipe, message, lines) in table {
        let error = adapter.expect_adaptation(&of(recipe), std::path::Path::new("adapter")).expect_err(message);
        assert!(error.to_string().contains(message), "{error}");
        let hint = &error.hints()[0];
        assert!(lines.iter().all(|line| hint.lines().any(|own| own == *line)), "{hint}");
    }
    whole.expect_adaptation(&of(&same), std::path::Path::new("adapter")).expect("the same branches");
    let saved = Adaptation { saved: vec!["lm_head".to_owned()], ..of(&same) };
    let error = whole.expect_adaptation(&saved, std::path::Path::new("adapter")).expect_err("lm_head");
    assert!(error.to_string().contains("the recipe trains `lm_head` in full, the adapter has not"), "{error}");
    // Branches in one layer of three, by short names and the layer.
    let made = adapter("mistral", |_, _| {});
    let one = Adapter::read(made.path(), &config("mistral")).expect("an adapter");
    let error = one.expect_adaptation(&Adaptation::default(), made.path()).expect_err("no branches");
    let hint = &error.hints()[0];
    assert!(
        hint.contains("target_modules = [\"gate_proj\", \"up_proj\", \"down_proj\"]\nlayers_to_transform = [1]"),
        "{hint}"
    );
}

#[test]
fn an_adapter_knows_its_base() {
    let parent = tempfile::tempdir().expect("a directory");
    let digest = base_digest(&golden("llama")).expect("a digest");
    let write_adapter = |name: &str, about: Value, state: Option<Value>| {
        let mut staging = Staging::begin(&RealDisk, parent.path(), name).expect("a new directory");
        for name in made::ADAPTER {
            let bytes = std::fs::read(golden("llama").join("adapter").join(name)).expect("a file");
            staging.write(name, &bytes).expect("written");
        }
        if let Some(state) = state {
            staging.write("trainer_state.json", state.to_string().as_bytes()).expect("written");
        }
        read(&staging.publish(&about).expect("published")).expect("an adapter")
    };
    let manifest = write_adapter("one", json!({"kind": "adapter", "base_digest": digest}), None);
    let state = write_adapter("two", json!({"kind": "checkpoint"}), Some(json!({"identity": {"model": digest}})));
    let fresh = write_adapter("three", json!({"kind": "adapter", "base_digest": "fresh:12"}), None);
    assert_eq!(fresh.base.digest, None);
    for adapter in [manifest, state] {
        assert_eq!(adapter.base.digest.as_deref(), Some(digest.as_str()));
        assert_eq!(adapter.check_base(&golden("llama")).expect("checked"), BaseCheck::Same);
        let other = model("llama", |_, tensors| put(tensors, "model.norm.weight", 0, 1.5));
        assert!(matches!(adapter.check_base(other.path()).expect("checked"), BaseCheck::Other(_)));
        // The same weights under another config.json give a notice.
        let copied = tempfile::tempdir().expect("a directory");
        std::fs::copy(golden("llama").join("model.safetensors"), copied.path().join("model.safetensors"))
            .expect("a copy");
        let mut config = read_json(&golden("llama").join("config.json"));
        config["rms_norm_eps"] = json!(1e-5);
        write(&copied.path().join("config.json"), config.to_string());
        assert!(matches!(adapter.check_base(copied.path()).expect("checked"), BaseCheck::OtherName(_)));
    }
    let named = |name: Value| {
        let made = adapter("llama", |config, _| config["base_model_name_or_path"] = name);
        read(made.path()).expect("an adapter").check_base(&golden("llama")).expect("checked")
    };
    assert_eq!(named(Value::Null), BaseCheck::Unknown);
    assert_eq!(named(json!("someone/llama")), BaseCheck::Unknown);
    assert_eq!(named(json!(golden("llama"))), BaseCheck::Same);
    assert!(
        matches!(named(json!("someone/another-8b")), BaseCheck::OtherName(text) if text.contains("someone/another-8b"))
    );
}

/// adapter_config.json names the base as the recipe did.
#[test]
fn what_is_written_names_its_base() {
    let mut model = Model::load(&golden("llama"), &Placement::cpu(None)).expect("the model");
    model.attach(&read(&golden("llama").join("adapter")).expect("an adapter")).expect("attached");
    let values = model.parameters().expect("values");
    let base = BaseName { name: "someone/base-7b".to_owned(), revision: Some("v2".to_owned()) };
    let made = tempfile::tempdir().expect("a directory");
    for (name, bytes) in checkpoint::files(&model, &values, &base) {
        write(&made.path().join(name), bytes);
    }
    let again = read(made.path()).expect("what was written is read");
    assert_eq!((again.base.name.as_deref(), again.base.revision.as_deref()), (Some("someone/base-7b"), Some("v2")));
    assert_eq!(again.values, values);
    assert!(again.notices.is_empty(), "{:?}", again.notices);
}
