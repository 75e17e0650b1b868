//! Which files a tokenizer and templates come from, and which files they are exported to.

use std::path::Path;

use finetune_advice::Advice as _;
use finetune_dataset::{ChatTokenizer, DatasetError, TextSource};
use serde_json::{Value, json};

use crate::made_up::{CHATML, Model, SPECIAL, VOCABULARY, tokenizer_json};

fn opened(model: &Model, adapter: Option<&Path>, date: Option<&str>) -> Result<ChatTokenizer, DatasetError> {
    let source = TextSource { adapter, date, ..TextSource::of(model.path(), None) };
    ChatTokenizer::open(&source).map(|tokenizer| tokenizer.expect("a tokenizer"))
}

fn text(tokenizer: &ChatTokenizer, tools: Option<&Value>) -> String {
    tokenizer.render(&[json!({"role": "user", "content": "Hi"})], tools, false).expect("text").text
}

fn file(files: &[(String, Vec<u8>)], name: &str) -> Option<Value> {
    let (_, bytes) = files.iter().find(|(known, _)| known == name)?;
    Some(serde_json::from_slice(bytes).unwrap_or_else(|_| json!(String::from_utf8_lossy(bytes))))
}

/// As transformers: the one for tools where a row has some; .jinja files before the list of
/// tokenizer_config.json, that before a processor's file.
#[test]
fn named_templates_are_chosen_as_transformers_does() {
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let both = |tokenizer: &ChatTokenizer| (text(tokenizer, None), text(tokenizer, Some(&tools)));
    let pair = |one: &str, other: &str| (one.to_owned(), other.to_owned());
    let model = Model::new(None);
    model.write("chat_template.json", json!({"chat_template": "processor"}).to_string());
    assert_eq!(both(&model.tokenizer()), pair("processor", "processor"));
    let list = json!([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}, {"name": "rag", "template": "{%"}]);
    model.write("tokenizer_config.json", json!({"chat_template": list}).to_string());
    assert_eq!(both(&model.tokenizer()), pair("d", "t"));
    let files = model.tokenizer().files(&[]).expect("files");
    assert_eq!(file(&files, "tokenizer_config.json").expect("a config")["chat_template"], list);
    assert_eq!(file(&files, "chat_template.jinja"), None);
    std::fs::create_dir(model.path().join("additional_chat_templates")).expect("a directory");
    model.write("additional_chat_templates/tool_use.jinja", "more");
    model.write("chat_template.jinja", "file");
    assert_eq!(both(&model.tokenizer()), pair("file", "more"));
    model.write("tokenizer_config.json", json!({"chat_template": [{"name": "rag", "template": "r"}]}).to_string());
    std::fs::remove_file(model.path().join("chat_template.jinja")).expect("a file");
    let tokenizer = model.tokenizer();
    assert!(tokenizer.has_template());
    let error = tokenizer.render(&[], None, false).expect_err("no default");
    assert!(error.to_string().contains("tool_use"), "{error}");
}

/// New tokens get the next free ids, are never split, and are in the files: read from there they are
/// the same tokens. One that is there already keeps its id.
#[test]
fn new_tokens_are_in_every_file_of_the_tokenizer() {
    let model = Model::new(Some("chat"));
    let known = SPECIAL[0].to_owned();
    let source = TextSource::of(model.path(), None);
    let new = ["<tool>".to_owned(), known.clone(), "<tool>".to_owned(), "<end tool>".to_owned()];
    let tokenizer = ChatTokenizer::open_with(&source, &new).expect("readable").expect("a tokenizer");
    let (first, second) = (VOCABULARY as u32, VOCABULARY as u32 + 1);
    assert_eq!(tokenizer.new_tokens(), [("<tool>".to_owned(), first), ("<end tool>".to_owned(), second)]);
    assert_eq!(tokenizer.vocab_size(), VOCABULARY + 2);
    assert!(tokenizer.notices().iter().any(|notice| notice.contains(&known)), "{:?}", tokenizer.notices());
    let ids = tokenizer.encode("a<tool>b<end tool>", false).expect("ids");
    assert_eq!(ids.iter().filter(|&&id| id >= first).collect::<Vec<_>>(), [&first, &second]);
    assert!(tokenizer.is_special(first) && tokenizer.decode(&ids, true).expect("text") == "ab");
    let copy = Model::new(Some("chat"));
    for (name, bytes) in tokenizer.files(&[]).expect("files") {
        copy.write(&name, bytes);
    }
    let again = copy.tokenizer();
    assert_eq!(again.encode("a<tool>b<end tool>", false).expect("ids"), ids);
    assert_eq!((again.vocab_size(), again.new_tokens().len()), (VOCABULARY + 2, 0));
    // The list that tokenizer_config.json may have names them too.
    let listed = json!({"added_tokens_decoder": {"258": {"content": known, "special": true}}});
    model.write("tokenizer_config.json", listed.to_string());
    let tokenizer = ChatTokenizer::open_with(&source, &new).expect("readable").expect("a tokenizer");
    let files = tokenizer.files(&[]).expect("files");
    let decoder = file(&files, "tokenizer_config.json").expect("a config")["added_tokens_decoder"].clone();
    assert_eq!(decoder[first.to_string()]["content"], "<tool>");
}

#[test]
fn an_adapter_s_files_come_first() {
    let (model, adapter) = (Model::new(Some("model")), Model::new(Some("adapter")));
    model.write("generation_config.json", json!({"eos_token_id": 259, "temperature": 0.5}).to_string());
    assert_eq!((text(&model.tokenizer(), None).as_str(), model.tokenizer().eos_ids()), ("model", &[259][..]));
    adapter.write("generation_config.json", json!({"eos_token_id": [263, 259]}).to_string());
    let tokenizer = opened(&model, Some(adapter.path()), None).expect("a tokenizer");
    assert_eq!((text(&tokenizer, None).as_str(), tokenizer.eos_ids()), ("adapter", &[263, 259][..]));
    // An adapter without such files: all of them are the model's.
    let bare = tempfile::TempDir::new().expect("a directory");
    let tokenizer = opened(&model, Some(bare.path()), None).expect("a tokenizer");
    assert_eq!((text(&tokenizer, None).as_str(), tokenizer.eos_ids()), ("model", &[259][..]));
    let chosen = model.write("chosen.jinja", "chosen");
    let source = TextSource { adapter: Some(adapter.path()), ..TextSource::of(model.path(), Some(&chosen)) };
    assert_eq!(text(&ChatTokenizer::open(&source).expect("files").expect("a tokenizer"), None), "chosen");
}

/// The exported files alone give the same tokens and text.
#[test]
fn files_carry_template_and_ends() {
    let model = Model::with_tokens(None, json!({"eos_token": "</s>", "chat_template": "base", "keep": [1]}));
    model.write("generation_config.json", json!({"eos_token_id": 259, "temperature": 0.5}).to_string());
    let chosen = model.write("mine.jinja", CHATML);
    let tokenizer = ChatTokenizer::load(model.path(), Some(&chosen)).expect("a tokenizer");
    let files = tokenizer.files(&[263]).expect("files");
    let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]);
    assert_eq!(file(&files, "chat_template.jinja"), Some(json!(CHATML)));
    assert_eq!(file(&files, "tokenizer_config.json"), Some(json!({"eos_token": "</s>", "keep": [1]})));
    assert_eq!(file(&files, "generation_config.json"), Some(json!({"eos_token_id": [259, 263], "temperature": 0.5})));
    assert_eq!(file(&files, "tokenizer.json"), Some(tokenizer_json()));
    let other = tempfile::TempDir::new().expect("a directory");
    #[allow(clippy::disallowed_methods, reason = "a test's own files, which need not survive a crash")]
    files.iter().for_each(|(name, bytes)| std::fs::write(other.path().join(name), bytes).expect("a written file"));
    let again = ChatTokenizer::load(other.path(), None).expect("a tokenizer");
    assert_eq!(text(&again, None), text(&tokenizer, None));
    assert_eq!(again.eos_ids(), [259, 263]);
    assert_eq!(again.files(&[263]).expect("files"), files);
    // One end is a number, as published models have it; none at all is no file.
    let bare = Model::with_tokens(None, json!({}));
    assert_eq!(file(&bare.tokenizer().files(&[]).expect("files"), "generation_config.json"), None);
    let config = file(&bare.tokenizer().files(&[263]).expect("files"), "generation_config.json");
    assert_eq!(config, Some(json!({"eos_token_id": 263})));
}

/// Left: what tokenizer_config.json says beside the usual. Right: the ids of "a<call>b", as
/// transformers 5.24 has them.
#[test]
fn tokens_that_only_configs_add_are_one_token() {
    let split: Vec<u32> = "a<call>b".bytes().map(u32::from).collect();
    let whole = vec![97, VOCABULARY as u32, 98];
    let token = json!({"content": "<call>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": false});
    let id = VOCABULARY.to_string();
    for (more, files, ids) in [
        (json!({}), vec![], &split),
        (json!({"added_tokens_decoder": {id.as_str(): token}}), vec![], &whole),
        (json!({"additional_special_tokens": ["<call>"]}), vec![], &whole),
        (json!({"extra_special_tokens": ["<call>"]}), vec![], &whole),
        (json!({"extra_special_tokens": {"call_token": "<call>"}}), vec![], &whole),
        (json!({"call_token": "<call>"}), vec![], &whole),
        (json!({"sep_token": "<call>"}), vec![], &whole),
        (json!({"sep_token": token}), vec![], &whole),
        (json!({}), vec![("added_tokens.json", json!({"<call>": VOCABULARY}))], &whole),
        (json!({}), vec![("special_tokens_map.json", json!({"call_token": "<call>"}))], &whole),
        // The older files count only without the newer list.
        (json!({"added_tokens_decoder": {}}), vec![("added_tokens.json", json!({"<call>": VOCABULARY}))], &split),
        (
            json!({"added_tokens_decoder": {}}),
            vec![("special_tokens_map.json", json!({"sep_token": "<call>"}))],
            &split,
        ),
        (json!({}), vec![("special_tokens_map.json", json!({"additional_special_tokens": ["<call>"]}))], &whole),
    ] {
        let model = Model::with_tokens(None, more.clone());
        for (name, content) in &files {
            model.write(name, content.to_string());
        }
        let found = model.tokenizer().encode("a<call>b", false).expect("ids");
        assert_eq!(found, *ids, "{more} {files:?}");
    }
}

#[test]
fn files_that_disagree_about_a_token_are_refused_or_told() {
    let token = |content: &str| json!({"content": content, "normalized": false, "special": false});
    let model = Model::with_tokens(None, json!({"added_tokens_decoder": {"900": token("<call>")}}));
    let error = ChatTokenizer::load(model.path(), None).map(|_| ()).expect_err("another id");
    let told = error.to_string();
    assert!(told.contains("tokenizer_config.json") && told.contains("900") && told.contains("266"), "{told}");
    let model = Model::with_tokens(None, json!({"added_tokens_decoder": {"900": token(SPECIAL[4])}}));
    let tokenizer = model.tokenizer();
    assert_eq!(tokenizer.encode(SPECIAL[4], false).expect("ids"), [262]);
    assert!(tokenizer.notices()[0].contains("900"), "{:?}", tokenizer.notices());
}

/// Numbers in configs may be anything.
#[test]
fn odd_ids_in_configs_do_no_harm() {
    for odd in [
        json!(-1),
        json!(4_000_000_000u64),
        json!(1e300),
        json!("x"),
        json!({"a": 1}),
        json!([[263], null, -5]),
        json!(true),
    ] {
        let model = Model::with_tokens(None, json!({"eos_token": 7, "pad_token": {"content": 3}, "bos_token": [1]}));
        model.write("generation_config.json", json!({"eos_token_id": odd, "pad_token_id": odd}).to_string());
        model.write("config.json", json!({"eos_token_id": 263, "pad_token_id": odd}).to_string());
        let tokenizer = model.tokenizer();
        assert_eq!((tokenizer.eos_ids(), tokenizer.bos_id()), (&[263][..], None), "{odd}");
        assert!(tokenizer.notices()[0].contains("eos_token_id"), "{odd}: {:?}", tokenizer.notices());
        assert_eq!(tokenizer.id_to_token(u32::MAX), None);
        assert!(!tokenizer.is_special(u32::MAX) && tokenizer.is_special(263) && !tokenizer.is_special(97));
        assert_eq!(tokenizer.decode(&[97, u32::MAX], true).expect("text"), "a");
    }
    // A null is no id, and gives no notice.
    let model = Model::new(None);
    model.write("generation_config.json", json!({"eos_token_id": null}).to_string());
    assert_eq!((model.tokenizer().eos_ids(), model.tokenizer().notices()), (&[259][..], &[][..]));
}

#[test]
fn the_date_of_a_template_is_the_one_given() {
    let model = Model::new(Some("{{ strftime_now('%d %b %Y, %H:%M%Z') }}"));
    let tokenizer = opened(&model, None, Some("2024-02-29")).expect("a tokenizer");
    assert!(tokenizer.uses_date() && !Model::new(Some(CHATML)).tokenizer().uses_date());
    assert_eq!(text(&tokenizer, None), "29 Feb 2024, 00:00");
    // Without a date all rows see the same moment.
    let now = Model::new(Some("{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}")).tokenizer();
    assert_eq!(text(&now, None), text(&now, None));
    for bad in ["2024-02-30", "today", "", "29.02.2024"] {
        let error = opened(&model, None, Some(bad)).map(|_| ()).expect_err(bad);
        assert!(matches!(error, DatasetError::BadDate { .. }), "{error}");
    }
}

/// Left: files in place of tokenizer.json, and what they begin with. Right: what is said of them.
#[test]
fn other_files_in_the_place_of_a_tokenizer_are_recognized() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n";
    for (name, content, told, hint) in [
        ("tokenizer.json", pointer, "git-lfs pointer", "git lfs pull"),
        ("tokenizer_config.json", pointer, "git-lfs pointer", "git lfs pull"),
        ("chat_template.jinja", pointer, "git-lfs pointer", "git lfs pull"),
        ("tokenizer.json", "<!DOCTYPE html><html></html>", "web page", "download the file again"),
    ] {
        let model = Model::new(None);
        model.write(name, content);
        let error = ChatTokenizer::load(model.path(), None).map(|_| ()).expect_err(name);
        assert!(error.to_string().contains(told) && error.to_string().contains(name), "{error}");
        assert!(error.hints()[0].contains(hint), "{:?}", error.hints());
    }
    let two = ["a.tiktoken", "b.tiktoken"];
    for names in [&["tokenizer.model"][..], &two, &["tekken.json"], &["vocab.json", "merges.txt"], &[]] {
        let model = Model::new(None);
        std::fs::remove_file(model.path().join("tokenizer.json")).expect("a file");
        for name in names {
            model.write(name, "x");
        }
        assert!(ChatTokenizer::load_if_present(model.path(), None).expect("no tokenizer").is_none());
        let error = DatasetError::NoTokenizer.in_model(model.path());
        let hints = error.hints().join("\n");
        assert!(names.iter().all(|name| error.to_string().contains(name)), "{error}");
        assert_eq!(hints.contains("save_pretrained"), !names.is_empty(), "{hints}");
    }
}
