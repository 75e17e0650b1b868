//! The tokenizer of a GGUF file, against llama.cpp (`scripts/make_gguf_tokenizer_golden.py`).

use std::path::{Path, PathBuf};

use finetune_advice::Advice;
use finetune_dataset::ChatTokenizer;
use finetune_gguf::{Metadata, Value as Field, header};
use serde_json::Value;

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn quickstart() -> PathBuf {
    repository().join("datasets/quickstart/base")
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("a file")).expect("JSON")
}

fn golden() -> (Value, Vec<String>) {
    let golden = json(&repository().join("tests/goldens/gguf/tokenizers.json"));
    let texts = golden["texts"].as_array().expect("texts").iter().map(|text| text.as_str().expect("a text").to_owned());
    let texts = texts.collect();
    (golden, texts)
}

#[expect(clippy::disallowed_methods, reason = "files of a test need not survive a power cut")]
fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).expect("a file in a temporary directory");
}

/// A file without tensors in a directory of its own.
fn file(metadata: &Metadata) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("tiny.gguf");
    write(&path, &header(metadata, &[]).expect("a header"));
    (directory, path)
}

fn field(key: &str, value: Field) -> (String, Field) {
    (format!("tokenizer.{key}"), value)
}

fn text(text: &str) -> Field {
    Field::String(text.to_owned())
}

fn numbers(numbers: impl IntoIterator<Item = i32>) -> Field {
    Field::Array(numbers.into_iter().map(Field::I32).collect())
}

/// The quickstart's tokenizer as a GGUF file has it.
fn of_bytes(pre: &str) -> Metadata {
    let tokenizer = ChatTokenizer::load(&quickstart(), None).expect("the quickstart's");
    let found = tokenizer.for_llama_cpp(1024).expect("a tokenizer for llama.cpp");
    let mut metadata = vec![
        field("ggml.model", text("gpt2")),
        field("ggml.pre", text(pre)),
        field("ggml.tokens", Field::strings(found.tokens)),
        field("ggml.token_type", numbers(found.types)),
        field("ggml.merges", Field::strings(found.merges)),
    ];
    metadata.extend(found.special.iter().map(|(name, id)| field(&format!("ggml.{name}_token_id"), Field::U32(*id))));
    metadata.extend(found.templates.iter().map(|(_, source)| field("chat_template", text(source))));
    metadata
}

/// SentencePiece's kind of vocabulary.
fn of_pieces(tokens: &Value, space: bool) -> Metadata {
    let tokens = tokens.as_array().expect("tokens");
    let scores = tokens.iter().map(|token| Field::F32(token[1].as_f64().expect("a score") as f32));
    vec![
        field("ggml.model", text("llama")),
        field("ggml.tokens", Field::strings(tokens.iter().map(|token| token[0].as_str().expect("a text")))),
        field("ggml.scores", Field::Array(scores.collect())),
        field("ggml.token_type", numbers(tokens.iter().map(|token| token[2].as_i64().expect("a type") as i32))),
        field("ggml.add_space_prefix", Field::Bool(space)),
    ]
}

fn expect_ids(what: &str, metadata: &Metadata, texts: &[String], golden: &Value) {
    let (_directory, path) = file(metadata);
    let tokenizer = ChatTokenizer::load(&path, None).expect(what);
    let composes = what == "qwen2";
    let pairs = texts.iter().zip(golden.as_array().expect("ids"));
    for (text, want) in pairs.filter(|(text, _)| !(composes && text.contains('\u{301}'))) {
        let want: Vec<u64> = want.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id")).collect();
        let found: Vec<u64> = tokenizer.encode(text, false).expect("ids").into_iter().map(u64::from).collect();
        assert_eq!(found, want, "{what}: {text:?}");
    }
}

#[test]
fn bytes_have_the_ids_of_llama_cpp() {
    let (golden, texts) = golden();
    let ways = golden["bytes"].as_object().expect("ways to split text");
    assert_eq!(ways.len(), 7);
    for (pre, ids) in ways {
        expect_ids(pre, &of_bytes(pre), &texts, ids);
    }
    // The tokenizers that Qwen's models were made with compose characters. llama.cpp does not.
    let (_directory, path) = file(&of_bytes("qwen2"));
    let tokenizer = ChatTokenizer::load(&path, None).expect("qwen2");
    let ids = |text: &str| tokenizer.encode(text, false).expect("ids");
    assert_eq!(ids("e\u{301}"), ids("\u{e9}"));
}

#[test]
fn pieces_have_the_ids_of_llama_cpp() {
    let (golden, texts) = golden();
    let pieces = &golden["pieces"];
    for (space, ids) in [(true, "with_space"), (false, "without_space")] {
        expect_ids(ids, &of_pieces(&pieces["tokens"], space), &texts, &pieces[ids]);
    }
    let (_directory, path) = file(&of_pieces(&pieces["tokens"], true));
    let tokenizer = ChatTokenizer::load(&path, None).expect("pieces");
    for text in texts.iter().filter(|text| !text.contains(['<', '▁']) && !text.contains("[INST]")) {
        let ids = tokenizer.encode(text, false).expect("ids");
        assert_eq!(&tokenizer.decode(&ids, false).expect("the text"), text, "there and back");
    }
    // Without a word of the file, such texts begin with `<s>` and do not end with `</s>`.
    assert_eq!(tokenizer.encode("a", true).expect("ids")[0], 1);
}

/// Tokenizer, template and ends, by the file or its directory, with the files of an export.
#[test]
fn a_gguf_file_is_read_as_the_directory_that_it_was_made_of() {
    let (directory, path) = file(&of_bytes("gpt-2"));
    let original = ChatTokenizer::load(&quickstart(), None).expect("the quickstart's");
    let messages = [serde_json::json!({"role": "user", "content": "Hi"})];
    let rendered = original.render(&messages, None, true).expect("a text").text;
    for named in [path.as_path(), directory.path()] {
        let tokenizer = ChatTokenizer::load(named, None).expect("a tokenizer");
        assert_eq!(tokenizer.render(&messages, None, true).expect("a text").text, rendered);
        assert_eq!(tokenizer.encode_chat(&rendered).expect("ids"), original.encode_chat(&rendered).expect("ids"));
        assert_eq!((tokenizer.eos_ids(), tokenizer.bos_id()), (original.eos_ids(), original.bos_id()));
        assert_eq!(tokenizer.for_llama_cpp(1024).expect("the way back"), original.for_llama_cpp(1024).expect("fields"));
        let names: Vec<String> = tokenizer.files(&[]).expect("files").into_iter().map(|(name, _)| name).collect();
        let want = ["chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"];
        assert_eq!(names, want);
    }
}

/// A way to split text that is not known: the tokenizer.json beside the file is taken, if its tokens
/// are the file's.
#[test]
fn a_tokenizer_beside_the_file_comes_first() {
    let (directory, path) = file(&of_bytes("someones-own"));
    for named in [path.as_path(), directory.path()] {
        let error = ChatTokenizer::load(named, None).map(|_| ()).expect_err("an unknown way");
        assert!(error.to_string().contains("tokenizer.ggml.pre is `someones-own`"), "{error}");
        assert!(error.hints()[0].contains("beside the GGUF file"), "{:?}", error.hints());
    }
    let own = directory.path().join("tokenizer.json");
    let original = std::fs::read(quickstart().join("tokenizer.json")).expect("a file");
    write(&own, &original);
    let expected = ChatTokenizer::load(&quickstart(), None).expect("the quickstart's");
    let load = |named: &Path| ChatTokenizer::load(named, None);
    for named in [path.as_path(), directory.path()] {
        let tokenizer = load(named).expect("its own tokenizer");
        let ids = |tokenizer: &ChatTokenizer| tokenizer.encode("12  numbers", false).expect("ids");
        assert_eq!((ids(&tokenizer), tokenizer.eos_ids()), (ids(&expected), expected.eos_ids()));
        assert!(tokenizer.has_template(), "that of the GGUF file");
    }
    let mut other: Value = serde_json::from_slice(&original).expect("JSON");
    let ids = other["model"]["vocab"].as_object_mut().expect("a vocabulary");
    let last = ids.keys().next_back().cloned().expect("a token");
    let first = ids.keys().nth(9).cloned().expect("a token");
    let (of_first, of_last) = (ids[&first].clone(), ids[&last].clone());
    (ids[&first], ids[&last]) = (of_last, of_first);
    write(&own, other.to_string().as_bytes());
    let error = load(&path).map(|_| ()).expect_err("other tokens").to_string();
    assert!(error.contains(&format!("is {first:?}, and")) || error.contains(&format!("is {last:?}, and")), "{error}");
    // Beside several models it belongs to none.
    write(&directory.path().join("other.gguf"), &header(&Metadata::new(), &[]).expect("a header"));
    let error = load(&path).map(|_| ()).expect_err("an unknown way again").to_string();
    assert!(error.contains("someones-own"), "{error}");
}

/// (what is changed, part of the refusal)
#[test]
fn damaged_tokenizers_are_refused() {
    type Change = fn(&mut Metadata);
    fn set(metadata: &mut Metadata, key: &str, value: Field) {
        metadata.retain(|(known, _)| known != &format!("tokenizer.{key}"));
        metadata.push(field(key, value));
    }
    let table: [(Change, &str); 7] = [
        (|data| set(data, "ggml.model", text("t5")), "tokenizer.ggml.model is `t5`"),
        (|data| set(data, "ggml.tokens", numbers([1, 2])), "tokenizer.ggml.tokens is no list of texts"),
        (|data| set(data, "ggml.token_type", numbers([NORMAL, CONTROL])), "token_type has 2 entries for 1024 tokens"),
        (|data| set(data, "ggml.merges", Field::strings(["ab"])), "has \"ab\", which is no pair"),
        (|data| set(data, "ggml.merges", Field::strings(["zzz q"])), "\"zzz\" is no token"),
        (|data| data.retain(|(key, _)| key != "tokenizer.ggml.merges"), "it has no tokenizer.ggml.merges"),
        (|data| set(data, "ggml.model", text("llama")), "tokenizer.ggml.scores has 0 entries"),
    ];
    for (change, part) in table {
        let mut metadata = of_bytes("gpt-2");
        change(&mut metadata);
        let (_directory, path) = file(&metadata);
        let error = ChatTokenizer::load(&path, None).map(|_| ()).expect_err(part).to_string();
        assert!(error.contains("tiny.gguf") && error.contains(part), "{error}, expected {part}");
    }
    let (_directory, path) = file(&Metadata::new());
    assert!(ChatTokenizer::load_if_present(&path, None).expect("no tokenizer").is_none());
    assert!(ChatTokenizer::load(&path, None).is_err());
}
