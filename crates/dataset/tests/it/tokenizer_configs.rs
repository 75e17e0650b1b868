//! What other files change of a tokenizer.json, against transformers (`scripts/make_tokenizer_goldens.py`).

use std::path::Path;

use finetune_dataset::ChatTokenizer;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::made_up::Model;

fn golden() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/tokenizers/configs.json");
    serde_json::from_slice(&std::fs::read(path).expect("a file")).expect("JSON")
}

/// The files of a case.
fn model(golden: &Value, case: &Value) -> Model {
    let model = Model { directory: TempDir::new().expect("a directory") };
    let mut tokenizer = golden["tokenizer"].clone();
    for (key, value) in case["changes"].as_object().expect("changes") {
        tokenizer["pre_tokenizer"][key] = value.clone();
    }
    model.write("tokenizer.json", tokenizer.to_string());
    for (name, content) in case["files"].as_object().expect("files") {
        model.write(name, content.to_string());
    }
    model
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("ids")
}

/// Each case of a group with its tokenizer, which gives the ids of transformers.
fn cases<'g>(golden: &'g Value, group: &str) -> Vec<(&'g Value, ChatTokenizer)> {
    let cases = golden[group].as_array().expect("cases");
    cases
        .iter()
        .map(|case| {
            let tokenizer = model(golden, case).tokenizer();
            for (text, want) in case["ids"].as_object().expect("ids") {
                let found = tokenizer.encode(text, false).expect("ids");
                assert_eq!(found, ids(want), "{text} with {}, {}", case["files"], case["changes"]);
            }
            (case, tokenizer)
        })
        .collect()
}

/// tokenizer.json's `add_prefix_space` is the other way round than tokenizer_config.json's. The class decides, and the
/// model's type which class that is.
#[test]
fn a_text_begins_with_a_space_if_the_class_says_so() {
    let golden = golden();
    for (case, tokenizer) in cases(&golden, "prefix") {
        let has_own = case["class"] != "TokenizersBackend";
        let is_told = tokenizer.notices().iter().any(|notice| notice.contains("add_prefix_space"));
        assert_eq!(is_told, has_own, "{}: {:?}", case["files"], tokenizer.notices());
    }
}

#[test]
fn special_tokens_are_split_if_the_config_says_so() {
    let golden = golden();
    let messages = [json!({"role": "user", "content": "the a<note>b"})];
    for (case, tokenizer) in cases(&golden, "split") {
        let chat = tokenizer.render(&messages, None, false).expect("a text").text;
        assert_eq!(tokenizer.encode_chat(&chat).expect("ids"), ids(&case["chat"]), "{}", case["files"]);
        let splits = case["files"]["tokenizer_config.json"]["split_special_tokens"] == true;
        let is_told = tokenizer.notices().iter().any(|notice| notice.contains("split_special_tokens"));
        assert_eq!(is_told, splits, "{}", case["files"]);
    }
}

#[test]
fn the_file_that_counts_names_the_special_tokens() {
    const NAMES: [&str; 4] = ["bos_token", "eos_token", "pad_token", "unk_token"];
    let golden = golden();
    for (case, _) in cases(&golden, "maps") {
        let model = model(&golden, case);
        model.write("chat_template.jinja", NAMES.map(|name| format!("{{{{ {name} }}}}")).join("|"));
        let text = |name: &str| case["special"][name].as_str().unwrap_or_default().to_owned();
        let tokenizer = model.tokenizer();
        let found = tokenizer.render(&[], None, false).expect("a text").text;
        assert_eq!(found, NAMES.map(text).join("|"), "{}", case["files"]);
        let name = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id)).unwrap_or_default();
        let ends = [tokenizer.bos_id(), tokenizer.eos_ids().first().copied()].map(name);
        assert_eq!(ends, [text("bos_token"), text("eos_token")], "{}", case["files"]);
    }
}
