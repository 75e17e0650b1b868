//! What is read from a model directory.

use std::path::PathBuf;

use finetune_dataset::{ChatTokenizer, DatasetError, resolve_files};
use serde_json::json;

use crate::made_up::{CHATML, Model, VOCABULARY};

#[test]
fn encoding_adds_what_the_tokenizer_adds() {
    let tokenizer = Model::new(None).tokenizer();
    // Truncation in the file, at 3 tokens, is switched off: what is cut is counted.
    assert_eq!(
        tokenizer.encode("Hi, you", false).expect("ids"),
        [256, 44, 32, 121, 111, 117].map(|id| match id {
            256 => 256,
            byte => byte_id(byte),
        })
    );
    assert_eq!(tokenizer.encode("a", true).expect("ids"), [258, byte_id(97)]);
    assert_eq!(tokenizer.encode_chat("<s>a").expect("ids"), [258, byte_id(97)]);
    let ids = tokenizer.encode("Hi é🦀</s>", true).expect("ids");
    assert_eq!(tokenizer.decode(&ids, false).expect("text"), "<s>Hi é🦀</s>");
    assert_eq!(tokenizer.decode(&ids, true).expect("text"), "Hi é🦀");
    assert_eq!((tokenizer.vocab_size(), tokenizer.bos_id(), tokenizer.eos_ids()), (VOCABULARY, Some(258), &[259][..]));
    assert_eq!(tokenizer.id_to_token(256).as_deref(), Some("Hi"));
    assert_eq!(tokenizer.id_to_token(9999), None);
}

/// Token ids are byte values: see `tokenizer_json`.
fn byte_id(byte: u32) -> u32 {
    byte
}

#[test]
fn every_end_of_sequence_is_known() {
    let model = Model::new(None);
    model.write("config.json", json!({"eos_token_id": 7, "text_config": {"eos_token_id": 8}}).to_string());
    assert_eq!(model.tokenizer().eos_ids(), [7, 259]);
    model.write("config.json", json!({"text_config": {"eos_token_id": [8, 9]}}).to_string());
    assert_eq!(model.tokenizer().eos_ids(), [8, 9, 259]);
    model.write("generation_config.json", json!({"eos_token_id": [263, 259, 263]}).to_string());
    assert_eq!(model.tokenizer().eos_ids(), [263, 259]);
    model.write("tokenizer_config.json", "{}");
    model.write(
        "special_tokens_map.json",
        json!({"eos_token": {"content": "<|im_end|>"}, "bos_token": null}).to_string(),
    );
    let tokenizer = model.tokenizer();
    assert_eq!((tokenizer.eos_ids(), tokenizer.bos_id()), (&[263, 259][..], None));
}

#[test]
fn the_template_says_how_an_answer_ends() {
    let bare = "{% for message in messages %}{{ message.content }}. {% endfor %}";
    let strict = "{{ raise_exception('no') }}";
    for (template, want) in [(Some(CHATML), Some(263)), (Some(bare), None), (Some(strict), None), (None, None)] {
        assert_eq!(Model::new(template).tokenizer().template_end(), want, "{template:?}");
    }
}

#[test]
fn the_template_comes_from_the_first_of_four_places() {
    let text = |tokenizer: &ChatTokenizer| tokenizer.render(&[], None, false).expect("text").text;
    let model = Model::with_tokens(None, json!({"chat_template": "string"}));
    assert_eq!(text(&model.tokenizer()), "string");
    model.write(
        "tokenizer_config.json",
        json!({"chat_template": [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "list"}]})
            .to_string(),
    );
    assert_eq!(text(&model.tokenizer()), "list");
    model.write("chat_template.jinja", "file");
    assert_eq!(text(&model.tokenizer()), "file");
    let chosen = model.write("chosen.jinja", "chosen");
    assert_eq!(text(&ChatTokenizer::load(model.path(), Some(&chosen)).expect("a tokenizer")), "chosen");
    let bare = Model::new(None).tokenizer();
    assert!(!bare.has_template() && model.tokenizer().has_template());
    assert!(matches!(bare.render(&[], None, false), Err(DatasetError::NoTemplate { .. })));
}

#[test]
fn broken_files_are_named() {
    let model = Model::new(Some(CHATML));
    let told = |name: &str| match ChatTokenizer::load(model.path(), None) {
        Ok(_) => panic!("{name} was taken"),
        Err(error) => {
            assert!(error.to_string().contains(name), "{error}");
            error.to_string()
        }
    };
    model.write("config.json", "{");
    told("config.json");
    model.write("config.json", "[]");
    assert!(told("config.json").contains("it holds a list, and an object is expected"));
    model.write("config.json", b"\xEF\xBB\xBF{}");
    assert!(told("config.json").contains("byte order mark"));
    model.write("config.json", "{}");
    model.write("chat_template.jinja", b"\xFF");
    assert!(told("chat_template.jinja").contains("UTF-8"));
    model.write("chat_template.jinja", "x".repeat(2 << 20));
    assert!(told("chat_template.jinja").contains("at most"));
    model.write("chat_template.jinja", CHATML);
    for content in ["", "{}", "[1]", "{\"model\": 1}"] {
        model.write("tokenizer.json", content);
        told("tokenizer.json");
    }
    model.write("tokenizer.json", b"\xEF\xBB\xBF{}");
    assert!(told("tokenizer.json").contains("byte order mark"));
    let missing = ChatTokenizer::load(&model.path().join("none"), None);
    assert!(matches!(missing, Err(DatasetError::Unreadable { .. })));
}

#[test]
fn a_template_of_another_type_is_not_taken_for_none() {
    for (template, why) in [
        (json!(3), "has a number where a text, or a list"),
        (json!([{"name": "default"}]), "has an object where {\"name\", \"template\"}"),
        (json!({"default": ["a"]}), "has a list where the text of a template is expected"),
    ] {
        let model = Model::with_tokens(None, json!({"chat_template": template}));
        let Err(error) = ChatTokenizer::load(model.path(), None) else { panic!("{template} was taken") };
        let told = error.to_string();
        assert!(told.contains("tokenizer_config.json") && told.contains(why), "{told}");
    }
    for none in [json!(null), json!([])] {
        assert!(!Model::with_tokens(None, json!({"chat_template": none})).tokenizer().has_template(), "{none}");
    }
}

#[test]
fn a_directory_stands_for_the_files_in_it() {
    let model = Model::new(None);
    let directory = model.path().to_owned();
    assert!(matches!(resolve_files(std::slice::from_ref(&directory), &[]), Err(DatasetError::NoTrainFile { .. })));
    let train = model.write("train.jsonl", "");
    let none: Vec<PathBuf> = Vec::new();
    assert_eq!(resolve_files(std::slice::from_ref(&directory), &[]).expect("files"), (vec![train.clone()], none));
    let valid = model.write("valid.jsonl", "");
    let other = model.write("other.jsonl", "");
    let resolve = |train: &PathBuf, eval: &[PathBuf]| resolve_files(std::slice::from_ref(train), eval).expect("files");
    assert_eq!(resolve(&directory, &[]), (vec![train.clone()], vec![valid.clone()]));
    assert_eq!(resolve(&directory, std::slice::from_ref(&other)), (vec![train.clone()], vec![other.clone()]));
    assert_eq!(resolve(&other, std::slice::from_ref(&directory)), (vec![other], vec![valid]));
    assert!(matches!(resolve_files(&[directory.join("no.jsonl")], &[]), Err(DatasetError::Unreadable { .. })));
}
