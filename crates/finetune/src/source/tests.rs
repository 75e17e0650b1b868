use std::path::Path;

use super::*;

fn write(path: &Path, text: &str) {
    finetune_store::replace_file(&RealDisk, path, text.as_bytes()).expect("a file in a temporary directory");
}

/// A model, an adapter on it, a run with either kind of result, and things that are none of them.
fn made_up() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a directory");
    for (name, text) in [
        ("model/config.json", "{}"),
        ("model/model.safetensors", "x"),
        ("adapter/adapter_config.json", r#"{"base_model_name_or_path": "../model"}"#),
        ("adapter/adapter_model.safetensors", "x"),
        ("mlx/adapter_config.json", r#"{"model": "../model", "lora_parameters": {"rank": 8}}"#),
        ("mlx/adapters.safetensors", "x"),
        ("old/adapter_config.json", "{}"),
        ("old/adapter_model.bin", "x"),
        ("named/chat/adapter_config.json", "{}"),
        ("named/chat/adapter_model.safetensors", "x"),
        ("run/recipe.toml", "[model]\npath = \"../model\"\n[data]\ntrain = \"rows.jsonl\"\n"),
        ("run/metrics.jsonl", ""),
        ("run/adapter/adapter_config.json", r#"{"base_model_name_or_path": "gone"}"#),
        ("run/adapter/adapter_model.safetensors", "x"),
        ("full/recipe.toml", ""),
        ("full/metrics.jsonl", ""),
        ("full/model/config.json", "{}"),
        ("full/model/model.safetensors", "x"),
        ("begun/recipe.toml", ""),
        ("begun/metrics.jsonl", ""),
        ("rows.jsonl", "{\"text\": \"a\"}\n{\"text\": \"b\"}\n"),
        ("axolotl.yml", "base_model: acme/tiny\nsequence_len: 2048\n"),
        ("mine.toml", "seed = 1\n"),
        ("tiny.gguf", "GGUF\u{3}"),
        ("one/tiny-q4_0.gguf", "GGUF\u{3}"),
        ("two/a.gguf", "GGUF\u{3}"),
        ("two/b.gguf", "GGUF\u{3}"),
    ] {
        write(&folder.path().join(name), text);
    }
    folder
}

/// (argument, the model or adapter, or part of what is said)
#[test]
fn what_an_argument_names() {
    let folder = made_up();
    let at = |name: &str| folder.path().join(name);
    for (argument, want) in [
        ("model", Named::Model(at("model"))),
        ("adapter", Named::Adapter(at("adapter"))),
        ("mlx", Named::Adapter(at("mlx"))),
        ("run", Named::Adapter(at("run/adapter"))),
        ("full", Named::Model(at("full/model"))),
        ("tiny.gguf", Named::Model(at("tiny.gguf"))),
        ("one", Named::Model(at("one/tiny-q4_0.gguf"))),
    ] {
        assert_eq!(named(&at(argument), &mut Vec::new()).expect(argument), want, "{argument}");
    }
    for (argument, says) in [
        ("begun", "has no result and no checkpoint"),
        ("old", "adapter_model.bin, a pickle"),
        ("model/model.safetensors", "the directory is meant"),
        ("two", "several GGUF models: a.gguf, b.gguf"),
        ("rows.jsonl", "rows are named with --data"),
        ("mine.toml", "finetune run"),
        ("none", "there is no"),
    ] {
        let failure = named(&at(argument), &mut Vec::new()).expect_err(argument);
        assert!(failure.lines().contains(says), "{argument}: {}", failure.lines());
    }
    for (argument, says) in [
        ("acme/no-such-model", "finetune download acme/no-such-model` fetches it"),
        ("acme/no-such-model@v2", "finetune download acme/no-such-model@v2` fetches it"),
        ("https://huggingface.co/acme/tiny/tree/main", "called acme/tiny here"),
        ("https://example.org/model.zip", "nothing is downloaded"),
    ] {
        let failure = named(Path::new(argument), &mut Vec::new()).expect_err(argument);
        assert!(failure.lines().contains(says), "{argument}: {}", failure.lines());
    }
}

#[test]
fn what_an_adapter_argument_names() {
    let folder = made_up();
    let at = |name: &str| folder.path().join(name);
    for (argument, want) in [("adapter", "adapter"), ("run", "run/adapter"), ("run/adapter", "run/adapter")] {
        assert_eq!(adapter_directory(&at(argument), &mut Vec::new()).expect(argument), at(want));
    }
    for (argument, says) in [
        ("model", "not an adapter"),
        ("full", "all weights were trained"),
        ("named", "named/chat"),
        ("adapter/adapter_model.safetensors", "the directory is meant"),
        ("rows.jsonl", "not an adapter"),
    ] {
        let failure = adapter_directory(&at(argument), &mut Vec::new()).expect_err(argument);
        assert!(failure.lines().contains(says), "{argument}: {}", failure.lines());
    }
}

#[test]
fn the_base_of_an_adapter() {
    let folder = made_up();
    let at = |name: &str| folder.path().join(name).canonicalize().expect("a path");
    for adapter in ["adapter", "mlx", "run/adapter"] {
        let found = base_of(&at(adapter), None).expect(adapter);
        assert_eq!(found.canonicalize().expect("a path"), at("model"), "{adapter}");
    }
    write(&folder.path().join("adapter/adapter_config.json"), r#"{"base_model_name_or_path": "acme/no-such-model"}"#);
    let failure = base_of(&at("adapter"), None).expect_err("a base that is gone");
    assert!(failure.lines().contains("finetune download acme/no-such-model"), "{}", failure.lines());
    assert!(failure.lines().contains("--base"), "{}", failure.lines());
    assert_eq!(base_of(&at("adapter"), Some(&at("model"))).expect("as given"), at("model"));
}

/// (argument, the recipe, or part of what is said)
#[test]
fn what_a_recipe_argument_means() {
    let folder = made_up();
    let at = |name: &str| folder.path().join(name);
    assert_eq!(recipe_path(&at("mine.toml")).expect("a recipe"), at("mine.toml"));
    assert_eq!(recipe_path(&at("run")).expect("a run"), at("run/recipe.toml"));
    let latin1 = at("latin1.toml");
    finetune_store::replace_file(&RealDisk, &latin1, b"seed = 1\n# f\xFCnf\n").expect("a written file");
    assert_eq!(recipe_path(&latin1).expect("its reader says where"), latin1);
    let told = Recipe::load(&latin1, &[], None).expect_err("an older encoding").to_string();
    assert!(told.ends_with("latin1.toml:2:4: this is no UTF-8 text"), "{told}");
    for (argument, says) in [
        ("axolotl.yml", "as axolotl has them"),
        ("rows.jsonl", "`train` in [data]"),
        ("model", "`path` in [model]"),
        ("adapter", "`init_from` in [lora]"),
        ("named", "is a directory"),
        ("mien.toml", "mine.toml"),
    ] {
        let failure = recipe_path(&at(argument)).expect_err(argument);
        assert!(failure.lines().contains(says), "{argument}: {}", failure.lines());
    }
}
