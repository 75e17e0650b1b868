//! Tokenizers in tiktoken's form, against tiktoken (`scripts/make_tiktoken_goldens.py`).

use std::path::{Path, PathBuf};

use finetune_advice::Advice;
use finetune_dataset::ChatTokenizer;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::made_up::{Model, VOCABULARY, tokenizer_json};

/// Ranks of a golden.
const RANKS: u32 = 600;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/tiktoken").join(name)
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("a file")).expect("JSON")
}

fn rows(name: &str) -> Vec<(String, Vec<u32>)> {
    let rows = json_of(&golden(name).join("ids.json"));
    let ids =
        |row: &Value| row["ids"].as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect();
    let rows = rows.as_array().expect("rows");
    rows.iter().map(|row| (row["text"].as_str().expect("a text").to_owned(), ids(row))).collect()
}

/// A copy of a golden's files, to be changed.
fn copy(name: &str) -> Model {
    let model = Model { directory: TempDir::new().expect("a directory") };
    for entry in std::fs::read_dir(golden(name)).expect("a directory").flatten() {
        model.write(entry.file_name().to_str().expect("a name"), std::fs::read(entry.path()).expect("a file"));
    }
    model
}

fn remove(model: &Model, name: &str) {
    std::fs::remove_file(model.path().join(name)).expect("a file");
}

fn expect_ids(what: &str, tokenizer: &ChatTokenizer, name: &str) {
    for (text, want) in rows(name) {
        assert_eq!(tokenizer.encode(&text, false).expect("ids"), want, "{what}: {text:?}");
    }
}

fn refusal(model: &Model) -> (String, Vec<String>) {
    match ChatTokenizer::load(model.path(), None) {
        Ok(_) => panic!("it was read"),
        Err(error) => (error.to_string(), error.hints()),
    }
}

#[test]
fn ids_are_those_of_tiktoken_and_give_the_text_back() {
    for name in ["kimi", "qwen"] {
        let tokenizer = ChatTokenizer::load(&golden(name), None).expect(name);
        expect_ids(name, &tokenizer, name);
        for (text, ids) in rows(name) {
            let back = tokenizer.decode(&ids, false).expect("a text");
            // Qwen's composes a text.
            let is_composed = name == "qwen" && tokenizer.encode(&back, false).expect("ids") == ids;
            assert!(back == text || is_composed, "{name}: {text:?} became {back:?}");
        }
    }
}

#[test]
fn tokens_behind_the_ranks_have_their_ids() {
    let kimi = ChatTokenizer::load(&golden("kimi"), None).expect("kimi");
    assert_eq!(kimi.vocab_size(), RANKS as usize + 256);
    assert_eq!((kimi.bos_id(), kimi.eos_ids()), (Some(RANKS), &[RANKS + 1][..]));
    for (id, text, special) in [
        (2, "<|im_end|>", true),
        (5, "<|reserved_token_605|>", true),
        (15, "<|tool_call_end|>", false),
        (253, "<|reserved_token_853|>", true),
        (255, "[PAD]", true),
    ] {
        assert_eq!(kimi.id_to_token(RANKS + id).as_deref(), Some(text));
        assert_eq!((kimi.is_special(RANKS + id), kimi.encode(text, true).expect("ids")), (special, vec![RANKS + id]));
    }
    assert!(kimi.notices().is_empty(), "{:?}", kimi.notices());
    let qwen = ChatTokenizer::load(&golden("qwen"), None).expect("qwen");
    assert_eq!(qwen.vocab_size(), RANKS as usize + 208);
    assert_eq!(qwen.encode("<|im_end|><|extra_204|>", true).expect("ids"), [RANKS + 2, RANKS + 207]);
    // A token that the config alone has follows them.
    let model = copy("kimi");
    let mut config = json_of(&model.path().join("tokenizer_config.json"));
    config["added_tokens_decoder"]["856"] = json!({"content": "<|more|>", "normalized": false, "special": true});
    model.write("tokenizer_config.json", config.to_string());
    assert_eq!(model.tokenizer().encode("<|more|>", false).expect("ids"), [856]);
}

/// The tokenizer.json among the files of an export is read without the ranks.
#[test]
fn an_export_has_a_tokenizer_json_with_the_same_ids() {
    for name in ["kimi", "qwen"] {
        let tokenizer = ChatTokenizer::load(&golden(name), None).expect(name);
        let files = tokenizer.files(&[]).expect("files");
        assert!(files.iter().any(|(name, _)| name == "tokenizer.json"));
        let model = Model { directory: TempDir::new().expect("a directory") };
        for (name, bytes) in &files {
            model.write(name, bytes);
        }
        let again = model.tokenizer();
        expect_ids(name, &again, name);
        assert_eq!((again.vocab_size(), again.eos_ids()), (tokenizer.vocab_size(), tokenizer.eos_ids()));
        assert_eq!(again.files(&[]).expect("files"), files);
    }
}

#[test]
fn a_tokenizer_json_comes_first_then_the_usual_name() {
    let model = copy("kimi");
    model.write("a.tiktoken", "damaged");
    expect_ids("tiktoken.model", &model.tokenizer(), "kimi");
    model.write("tokenizer_config.json", "{}");
    model.write("tokenizer.json", tokenizer_json().to_string());
    assert_eq!(model.tokenizer().vocab_size(), VOCABULARY);
    // Of several other names none is meant.
    let model = copy("qwen");
    model.write("other.tiktoken", "damaged");
    assert!(ChatTokenizer::load_if_present(model.path(), None).expect("no tokenizer").is_none());
    assert!(refusal(&model).0.ends_with("has no tokenizer.json; it has other.tiktoken and qwen.tiktoken instead"));
}

#[test]
fn the_pattern_comes_from_the_module_or_the_class() {
    let model = copy("kimi");
    remove(&model, "tokenization_kimi.py");
    expect_ids("by its class", &model.tokenizer(), "kimi");
    model.write("tokenization_own.py", "class Own:\n    pat_str = r'''[0-9]+|[^0-9]+'''\n");
    let ids = |text: &str| model.tokenizer().encode(text, false).expect("ids");
    // " Unmergeable" is a token, and no merge makes it: it is found as a whole piece only.
    assert_ne!(ids("a Unmergeable"), [ids("a"), ids(" Unmergeable")].concat());
    assert_eq!(ids("1 Unmergeable"), [ids("1"), ids(" Unmergeable")].concat());
    let mut config = json_of(&model.path().join("tokenizer_config.json"));
    config["tokenizer_class"] = json!("OwnTokenizer");
    let listed = config["added_tokens_decoder"].as_object_mut().expect("a list");
    listed.retain(|id, _| ["600", "601", "602"].contains(&id.as_str()));
    for key in ["pad_token", "unk_token", "additional_special_tokens"] {
        config.as_object_mut().expect("a config").remove(key);
    }
    model.write("tokenizer_config.json", config.to_string());
    assert_eq!(model.tokenizer().vocab_size(), RANKS as usize + 3);
    remove(&model, "tokenization_own.py");
    let (error, hints) = refusal(&model);
    assert!(error.contains("tiktoken.model: no tokenization_*.py beside it has a `pat_str`"), "{error}");
    assert!(hints[0].contains("tokenizer.json") && hints[1].contains("convert_tiktoken_to_fast"), "{hints:?}");
}

/// (the line from 1, what is there instead, part of the refusal)
#[test]
fn damaged_ranks_are_refused_with_their_line() {
    let long = format!("{} 300", "QUFB".repeat(342));
    let table: [(usize, &str, &str); 14] = [
        (301, "YWJj", ":301: 1 fields"),
        (301, "YWJj 300 1", ":301: 3 fields"),
        (2, "\u{fffd} 1", ":2: \"\u{fffd}\" is no base64"),
        (301, "YW=j 300", ":301: \"YW=j\" is no base64"),
        (301, "YWJ 300", ":301: \"YWJ\" is no base64"),
        (301, "==== 300", ":301: \"====\" is no base64"),
        (301, "YWJjZGVm 3OO", ":301: \"3OO\" is no rank"),
        (301, "YWJjZGVm -1", ":301: \"-1\" is no rank"),
        (301, &long, ":301: the token has 1026 bytes; at most 1024"),
        (301, "YWJjZGVm 5", ":301: rank 5 is that of line 6"),
        (301, "YWJjZGVm 600", ":301: rank 600 is too high: 600 tokens"),
        (301, "IQ== 300", ":301: the token is that of line 1"),
        // A line that is missing is a rank that is missing.
        (301, "", ":600: rank 599 is too high: 599 tokens"),
        (1, "YWJjZGVm 0", ": no token is the byte 0x21 alone"),
    ];
    let whole = std::fs::read_to_string(golden("kimi").join("tiktoken.model")).expect("ranks");
    for (line, instead, part) in table {
        let model = copy("kimi");
        let mut lines: Vec<&str> = whole.lines().collect();
        lines[line - 1] = instead;
        model.write("tiktoken.model", lines.join("\n"));
        let (error, hints) = refusal(&model);
        assert!(error.contains(&format!("tiktoken.model{part}")), "{error}, expected {part}");
        assert!(hints[0].contains("download"), "{hints:?}");
    }
    let model = copy("kimi");
    model.write("tiktoken.model", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n");
    assert!(refusal(&model).0.contains("git-lfs pointer"));
    // Empty lines and other line ends are no damage.
    model.write("tiktoken.model", format!("\n{}\r\n\r\n", whole.replace('\n', "\r\n")));
    expect_ids("other line ends", &model.tokenizer(), "kimi");
}

/// (the key of `added_tokens_decoder`, its new value, part of the refusal)
#[test]
fn added_tokens_that_get_no_id_of_theirs_are_refused() {
    let text = |text: &str| json!({"content": text, "normalized": false, "special": true});
    for (id, token, part) in [
        ("x", text("<x>"), "token x of `added_tokens_decoder`"),
        ("605", json!({"content": 5}), "token 605 of `added_tokens_decoder`"),
        ("5", text("<x>"), "\"<x>\" is token 5, which is one of the 600 ranks"),
        ("900", text("<x>"), "there is no token 856"),
        ("605", text("[BOS]"), "\"[BOS]\" is token 605, and token 600 has the same text"),
        ("605", text("a"), "\"a\" is token 605, and token 64 has the same text"),
    ] {
        let model = copy("kimi");
        let mut config = json_of(&model.path().join("tokenizer_config.json"));
        config["added_tokens_decoder"][id] = token;
        model.write("tokenizer_config.json", config.to_string());
        let (error, _) = refusal(&model);
        assert!(error.contains("tokenizer_config.json: ") && error.contains(part), "{error}, expected {part}");
    }
    let model = copy("kimi");
    model.write("tokenizer_config.json", json!({"tokenizer_class": "TikTokenTokenizer"}).to_string());
    assert!(refusal(&model).0.contains("it has no `added_tokens_decoder`"));
}

/// (a module, part of the refusal)
#[test]
fn modules_with_more_than_a_pattern_of_literals_are_refused() {
    for (source, part) in [
        ("\npat_str = build()\n", ".py:2: `pat_str` is made of more than string literals"),
        ("pat_str = PATTERN\n", ".py:1: `pat_str` is no string literal"),
        ("pat_str = r'\\w+|\\s+'\n", ".py: the pattern has `\\w+|\\s+`"),
        ("pat_str = r'\\p{N}{1,3}+'\n", ".py: the pattern has `}+`"),
        ("pat_str = r'(a'\n", ".py: the pattern of `pat_str` is none: "),
        ("pat_str = r'a|b'\n", ".py: its pattern is not that of tokenization_kimi.py"),
    ] {
        let model = copy("kimi");
        model.write("tokenization_other.py", source);
        let (error, hints) = refusal(&model);
        assert!(error.contains(&format!("tokenization_other{part}")), "{error}, expected {part}");
        assert!(hints[0].contains("put a tokenizer.json"), "{hints:?}");
    }
}
