//! A tokenizer in llama.cpp's words.

use std::path::{Path, PathBuf};

use finetune_dataset::{ChatTokenizer, DatasetError, LlamaCppTokenizer};
use serde_json::{Value, json};

fn quickstart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/quickstart/base")
}

#[expect(clippy::disallowed_methods, reason = "files of a test need not survive a power cut")]
fn write(path: &Path, json: &Value) {
    std::fs::write(path, json.to_string()).expect("a file in a temporary directory");
}

/// The quickstart's files in a directory of its own, its tokenizer.json changed.
fn changed(change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"] {
        std::fs::copy(quickstart().join(name), directory.path().join(name)).expect("a file of the quickstart");
    }
    let path = directory.path().join("tokenizer.json");
    let mut json = serde_json::from_slice(&std::fs::read(&path).expect("a file")).expect("JSON");
    change(&mut json);
    write(&path, &json);
    directory
}

fn read(directory: &Path, vocabulary: usize) -> Result<LlamaCppTokenizer, DatasetError> {
    ChatTokenizer::load(directory, None).expect("a tokenizer").for_llama_cpp(vocabulary)
}

#[test]
fn tokens_of_bytes() {
    let found = read(&quickstart(), 1026).expect("GPT-2's way");
    assert_eq!((found.model, found.pre, found.scores, found.add_space_prefix), ("gpt2", "gpt-2", None, None));
    assert_eq!((found.tokens.len(), found.types.len()), (1026, 1026));
    assert_eq!((found.tokens[0].as_str(), found.types[0]), ("<|end|>", 3));
    assert_eq!((found.tokens[1025].as_str(), found.types[1025]), ("[PAD1025]", 5));
    assert!(found.types[4..1024].iter().all(|kind| *kind == 1));
    assert_eq!(&found.merges[..3], ["\" ,", "\", \"", "i t"]);
    assert_eq!(found.special.iter().find(|(name, _)| *name == "eos"), Some(&("eos", 0)));
    assert!(!found.add_bos && !found.add_eos);
    assert_eq!(found.ends, ["<|end|>"]);
    let [(name, template)] = found.templates.as_slice() else { panic!("{:?}", found.templates) };
    let file = std::fs::read_to_string(quickstart().join("chat_template.jinja")).expect("a template");
    assert_eq!((name.as_str(), template), ("default", &file));
}

/// A Llama 2 in small: pieces with a mark for spaces, bytes as tokens, `<s>` before a text.
#[test]
fn tokens_of_pieces() {
    let directory = changed(|json| {
        let special = |id: u32, text: &str| json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
        json["added_tokens"] = json!([special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")]);
        json["normalizer"] = json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
        json["pre_tokenizer"] = Value::Null;
        json["decoder"] = Value::Null;
        json["post_processor"] = json!({"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}});
        json["model"] = json!({"type": "BPE", "byte_fallback": true, "unk_token": "<unk>", "fuse_unk": true,
            "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "▁": 4, "a": 5, "b": 6, "▁a": 7, "ab": 8, "▁ab": 9},
            "merges": ["▁ a", "a b", "▁a b", "▁ ab"]});
    });
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"});
    write(&directory.path().join("tokenizer_config.json"), &config);
    let found = read(directory.path(), 10).expect("SentencePiece's way");
    assert_eq!((found.model, found.pre, found.add_space_prefix), ("llama", "default", Some(true)));
    assert_eq!(found.types, [2, 3, 3, 6, 1, 1, 1, 1, 1, 1]);
    assert!(found.merges.is_empty());
    assert_eq!(&found.scores.expect("scores")[6..], [-1e6, 0.0, -1.0, -2.0]);
    assert_eq!(&found.special[..2], [("bos", 1), ("eos", 2)]);
    assert!(found.add_bos && !found.add_eos);
}

/// (what is changed, rows of the embedding, part of the refusal)
#[test]
fn what_llama_cpp_does_not_have() {
    type Change = fn(&mut Value);
    let table: [(Change, usize, &str); 4] = [
        (|_| (), 1023, "it has 1024 tokens, and the model's embedding 1023 rows"),
        (|json| json["pre_tokenizer"] = json!({"type": "Whitespace"}), 1024, "(pre_tokenizer)"),
        (|json| json["normalizer"] = json!({"type": "Lowercase"}), 1024, "no normalizer \"Lowercase\""),
        (|json| json["model"]["end_of_word_suffix"] = json!("</w>"), 1024, "no `end_of_word_suffix`"),
    ];
    for (change, vocabulary, part) in table {
        let directory = changed(change);
        let error = read(directory.path(), vocabulary).expect_err(part).to_string();
        assert!(error.contains("tokenizer.json") && error.contains(part), "{error}, expected {part}");
    }
}
