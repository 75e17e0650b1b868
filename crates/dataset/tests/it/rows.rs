//! Row formats and everything that a row can have wrong with it.

use std::cell::Cell;
use std::path::PathBuf;

use finetune_advice::Advice as _;
use finetune_dataset::{Counts, Dataset, DatasetError};
use finetune_recipe::{Data, Format, Overlong, TrainOn};

use crate::made_up::{CHATML, Model, VOCABULARY, data};

fn load_with(model: &Model, content: &[u8], data: &Data) -> Result<Dataset, DatasetError> {
    let file = model.write("rows.jsonl", content);
    Dataset::load(&[file], data, &model.tokenizer(), VOCABULARY, usize::MAX, &|_| {})
}

fn load(content: &[u8], data: &Data) -> Result<Dataset, DatasetError> {
    load_with(&Model::new(Some(CHATML)), content, data)
}

/// The message of the first bad row, with its place within the file in front.
fn told(content: &[u8], data: &Data) -> String {
    match load(content, data) {
        Ok(dataset) => format!("{} rows", dataset.rows.len()),
        Err(DatasetError::BadRows(rows)) => {
            let row = &rows.first[0];
            assert!(row.beginning.chars().count() <= 81, "{}", row.beginning);
            let column = row.problem.column().map(|column| format!(":{column}")).unwrap_or_default();
            let expected = row.problem.expected().map(|expected| format!("; expected {expected}")).unwrap_or_default();
            format!("{}{column}: {}{expected}", row.line, row.problem)
        }
        Err(error) => error.to_string(),
    }
}

/// A row without any fault.
const GOOD: &str = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#;

fn bytes(text: &str) -> Vec<u8> {
    text.as_bytes().to_vec()
}

/// (content of the file, the beginning of the message). "1 rows": it is taken.
fn check_messages(zoo: Vec<(Vec<u8>, &str)>) {
    for (content, expected) in zoo {
        let told = told(&content, &data(Format::Auto));
        let shown: String = String::from_utf8_lossy(&content).chars().take(200).collect();
        assert!(told.starts_with(expected), "{shown}\n  told     {told}\n  expected {expected}");
    }
}

#[test]
fn lines_that_are_no_rows() {
    let good = GOOD;
    let long = format!(r#"{{"text":"{}"}}"#, "x".repeat(17 << 20));
    let deep = format!(r#"{{"text":{}1{}}}"#, "[".repeat(200), "]".repeat(200));
    check_messages(vec![
        (bytes(good), "1 rows"),
        (bytes(&format!("{good}\n{good}\n")), "2 rows"),
        (bytes(&format!("\u{FEFF}{good}\r\n\r\n \t \n{good}\r\n")), "2 rows"),
        (bytes(&good.replace("\"a\"", r#""a","content":"c""#)), "1 rows"),
        (bytes(&good.replacen('{', r#"{"id": 7, "source": [null], "#, 1)), "1 rows"),
        (bytes(&good.replace("\"a\"", r#""\u0000 \ud83e\udd80""#)), "1 rows"),
        (bytes(""), "no rows in "),
        (bytes("\n\n  \n"), "no rows in "),
        (bytes("{\"text\": \"a\x00\"}"), "1:12: a NUL character at byte 11 of the line"),
        (b"{\"text\": \"a\xFFb\"}".to_vec(), "1:12: invalid UTF-8 at byte 11 of the line; expected UTF-8 text"),
        (b"{\"text\": \"a\xE2\x82".to_vec(), "1:12: invalid UTF-8 at byte 11"),
        (bytes(r#"{"text": "\ud83e"}"#), "1:17: not JSON: unexpected end of hex escape; expected whole characters"),
        (bytes(&long), "1: the row is longer than 16 MiB"),
        (bytes(&deep), "1:135: not JSON: recursion limit exceeded"),
        (bytes("{"), "1:1: not JSON: EOF while parsing an object"),
        (bytes("{\"text\": \"a\""), "1:12: not JSON: EOF while parsing an object"),
        (bytes("{\"text\": \"a\",}"), "1:14: not JSON: trailing comma"),
        (bytes("{'text': 'a'}"), "1:2: not JSON: key must be a string; expected JSON, as json.dumps writes it: texts"),
        (bytes("{\"text\": NaN}"), "1:10: not JSON: expected value; expected JSON, as json.dumps writes it: true"),
        (bytes("{\"text\": \"a\", \"good\": True}"), "1:23: not JSON: expected value; expected JSON, as"),
        (
            bytes(r#"{"role": "user", "content": "a"}"#),
            "1: no key that tells the format; its keys are role, content; expected all messages",
        ),
        (bytes(r#"{"data": []}"#), "1: no key that tells the format; its keys are data; expected the rows themselves"),
        (
            bytes("{\"text\": \"a\"} {\"text\": \"b\"}"),
            "1:15: not JSON: trailing characters; expected one JSON object on each",
        ),
        (
            bytes("{\"text\": \"a\"}\r{\"text\": \"b\"}"),
            "1:15: not JSON: trailing characters; expected one JSON object on each line, and lines",
        ),
        (bytes("hello"), "1:1: not JSON: expected value"),
        (
            bytes(&format!("{good}\n[\n")),
            "2:1: not JSON: EOF while parsing a list; expected one JSON object on each line, not one array",
        ),
        (bytes(&format!("{good}\n[1]\n")), "2: the line is a list; expected one JSON object on each line"),
        (
            bytes("{\n\"text\": 1}"),
            "1:1: not JSON: EOF while parsing an object; expected one JSON object on each line, not one",
        ),
        (bytes(&format!("{good}\n\u{FEFF}{good}\n\u{FEFF}\u{FEFF}{good}")), "3 rows"),
        (bytes(r#"{"messages": null, "text": "a"}"#), "1 rows"),
        (bytes("null"), "1: the line is null; expected one JSON object"),
        (bytes("\"text\""), "1: the line is a string"),
        (
            bytes("{}"),
            "1: no key that tells the format; the object is empty; expected one of the keys messages, prompt",
        ),
    ]);
}

#[test]
fn texts_and_chats_with_faults() {
    let good = GOOD;
    let role_missing = good.replacen("\"role\":\"user\",", "", 1);
    check_messages(vec![
        (bytes(r#"{"Text": "a", "b": 1}"#), "1: no key that tells the format; its keys are Text, b; expected"),
        (bytes(r#"{"text": 1}"#), "1: text is a number; expected a string"),
        (bytes(r#"{"text": null}"#), "1: text is null; expected a string"),
        (
            bytes(r#"{"prompt": "a"}"#),
            "1: the key completion is missing; expected \"prompt\" and \"completion\": strings",
        ),
        (bytes(r#"{"completion": "a"}"#), "1: the key prompt is missing"),
        (bytes(r#"{"prompt": "a", "completion": 1}"#), "1: completion is a number; expected a string"),
        (
            bytes(r#"{"prompt": "a", "completion": 99999999999999999999}"#),
            "1: completion is a number; expected a string",
        ),
        (bytes(r#"{"text": -99999999999999999999}"#), "1: text is a number; expected a string"),
        (bytes(r#"{"prompt": "a", "completion": []}"#), "1: of prompt and completion one is a string and one a list"),
        (bytes(r#"{"prompt": [], "completion": []}"#), "1: prompt is empty"),
        (bytes(r#"{"messages": "a"}"#), "1: messages is a string; expected a list"),
        (bytes(r#"{"messages": []}"#), "1: messages is empty; expected \"messages\": a list of"),
        (bytes(r#"{"messages": ["a"]}"#), "1: messages[0] is a string; expected an object with \"role\""),
        (bytes(&role_missing), "1: the key messages[0].role is missing"),
        (bytes(&good.replacen("\"user\"", "7", 1)), "1: messages[0].role is a number; expected a string"),
        (bytes(&good.replacen("user", "", 1)), "1: messages[0].role is empty"),
        (bytes(&good.replace(r#","content":"b""#, "")), "1: the key messages[1].content is missing"),
        (bytes(&good.replace("\"b\"", "null")), "1: messages[1].content is null; expected a string, or a list"),
        (bytes(&good.replace("\"b\"", "7")), "1: messages[1].content is a number"),
        (bytes(&good.replace("\"b\"", "18446744073709551616")), "1: messages[1].content is a number"),
        (bytes(&good.replace("\"b\"", "[7]")), "1: messages[1].content[0] is a number; expected {\"type\": \"text\""),
        (bytes(&good.replace("\"b\"", r#"[{"text":"b"}]"#)), "1: messages[1].content[0] has no type"),
        (
            bytes(&good.replace("\"b\"", r#"[{"type":"image"}]"#)),
            "1: messages[1].content[0] has the type \"image\": only text",
        ),
        (bytes(&good.replace("\"b\"", r#"[{"type":"text"}]"#)), "1: the key messages[1].content[0].text is missing"),
        (
            bytes(&good.replace("\"b\"", r#""b","tool_calls":[{"type":"function"}]"#)),
            "1: the key messages[1].tool_calls[0].function is missing",
        ),
        (
            bytes(&good.replace("\"b\"", r#""b","tool_calls":[{"function":{"arguments":{}}}]"#)),
            "1: the key messages[1].tool_calls[0].function.name is missing",
        ),
        (
            bytes(&good.replace("\"b\"", r#""b","tool_calls":[{"function":"look"}]"#)),
            "1: messages[1].tool_calls[0].function is a string; expected an object with \"function\"",
        ),
        (bytes(&good.replacen('{', r#"{"tools": {"a": 1}, "#, 1)), "1: tools is an object; expected a list of objects"),
        (bytes(&good.replacen('{', r#"{"tools": "[", "#, 1)), "1: tools is a string that is not JSON"),
        (bytes(&good.replace("assistant", "bot")), "1: no assistant message to train on; the roles are user, bot"),
        (bytes(&good.replace("\"b\"", "\"\u{FDD0}\"")), "1: the text holds U+FDD0"),
    ]);
}

#[test]
fn rows_of_other_formats_with_faults() {
    let good = GOOD;
    check_messages(vec![
        (bytes(r#"{"instruction": "a"}"#), "1: the key output is missing; expected \"instruction\" and \"output\""),
        (
            bytes(r#"{"instruction": "a", "output": "b", "input": 1}"#),
            "1: input is a number; expected a string, or nothing",
        ),
        (
            bytes(r#"{"instruction": "a", "output": "b", "input": 18446744073709551616}"#),
            "1: input is a number; expected a string, or nothing",
        ),
        (
            bytes(r#"{"instruction": "a", "output": "b", "history": [["c"]]}"#),
            "1: history[0] is a list; expected [question",
        ),
        (bytes(r#"{"conversations": [{"from": "human"}]}"#), "1: the key conversations[0].value is missing"),
        (bytes(r#"{"conversations": [{"from": 1, "value": ""}]}"#), "1: conversations[0].from is a number"),
        (
            bytes(r#"{"conversations": [{"from": "me", "value": "a"}]}"#),
            "1: conversations[0].from is \"me\"; expected human",
        ),
        (
            bytes(r#"{"conversations": [{"from": "function_call", "value": "a"}]}"#),
            "1: conversations[0].value is no call of a function; expected {\"name\", \"arguments\"} as JSON text",
        ),
        (bytes(r#"{"input_ids": []}"#), "1: input_ids is empty"),
        (bytes(r#"{"labels": [1]}"#), "1: the key input_ids is missing"),
        (bytes(r#"{"input_ids": [1, -1]}"#), "1: input_ids[1] is -1; expected a token id"),
        (bytes(r#"{"input_ids": [1, 2.5]}"#), "1: input_ids[1] is 2.5"),
        (bytes(r#"{"input_ids": [1, "2"]}"#), "1: input_ids[1] is a string"),
        (bytes(r#"{"input_ids": [1, 266]}"#), "1: token 1 is 266, not below the vocabulary of 266"),
        (bytes(r#"{"input_ids": [1, 2], "labels": [1]}"#), "1: 2 input_ids but 1 labels"),
        (
            bytes(r#"{"input_ids": [1, 2], "labels": [-100, 3]}"#),
            "1: labels[1] is 3 where input_ids[1] is 2: labels of one's own",
        ),
        (bytes(r#"{"input_ids": [1, 2], "labels": [1, -100]}"#), "1: nothing to train on: none of its 2 tokens"),
        (bytes(r#"{"input_ids": [1]}"#), "1: nothing to train on: none of its 1 tokens"),
        (bytes(r#"{"text": ""}"#), "1 rows"),
        (bytes(&format!("{good}\n{{\"text\": \"a\"}}\n")), "2: this is a row of format text, and the first row ("),
    ]);
}

#[test]
fn a_named_format_is_held_to() {
    let text = br#"{"text": "a", "prompt": "b"}"#;
    assert_eq!(told(text, &data(Format::Text)), "1 rows");
    assert_eq!(
        told(text, &data(Format::Auto)),
        "1: the key completion is missing; expected \"prompt\" and \"completion\": strings"
    );
    assert!(
        told(text, &data(Format::Messages))
            .starts_with("1: the key messages is missing; expected \"messages\": a list")
    );
}

#[test]
fn formats_become_messages() {
    let model = Model::new(Some(CHATML));
    let text = |row: &str| {
        let dataset = load_with(&model, row.as_bytes(), &data(Format::Auto)).unwrap_or_else(|error| panic!("{error}"));
        let text = model.tokenizer().decode(&dataset.rows[0].tokens, false).expect("text");
        text.replace("<|im_start|>", "<").replace("<|im_end|>", ">")
    };
    let alpaca = r#"{"instruction": "1", "input": "2", "output": "3", "system": "S", "history": [["4", "5"]]}"#;
    assert_eq!(text(alpaca), "<system\nS>\n<user\n4>\n<assistant\n5>\n<user\n1\n2>\n<assistant\n3>\n");
    assert_eq!(text(r#"{"instruction": "1", "input": "", "output": "3"}"#), "<user\n1>\n<assistant\n3>\n");
    let sharegpt = r#"{"system": "S", "tools": "[]", "conversations": [{"from": "human", "value": "1"},
        {"from": "gpt", "value": "2"}, {"from": "observation", "value": "3"}, {"from": "assistant", "value": "4"}]}"#;
    assert_eq!(
        text(&sharegpt.replace('\n', " ")),
        "<system\nS>\n<user\n1>\n<assistant\n2>\n<tool\n3>\n<assistant\n4>\n"
    );
}

#[test]
fn lengths() {
    // With <s> and </s>: 5 tokens, and 12 of which the prompt takes 7.
    let content = b"{\"prompt\":\"a\",\"completion\":\"bc\"}\n{\"prompt\":\"123456\",\"completion\":\"78.9\"}\n";
    let with = |max_seq_len, overlong| load(content, &Data { max_seq_len, overlong, ..data(Format::Auto) });
    let lengths = |dataset: &Dataset| dataset.rows.iter().map(|row| row.tokens.len()).collect::<Vec<_>>();
    let all = with(12, Overlong::Error).expect("two rows");
    assert_eq!(lengths(&all), [5, 12]);
    let counts = Counts { rows: 2, tokens: 17, trained_tokens: 8, longest: 12, ..Counts::default() };
    assert_eq!(all.counts, counts);
    let error = with(11, Overlong::Error).expect_err("an overlong row");
    assert!(error.to_string().contains(":2: the row has 12 tokens, more than data.max_seq_len = 11"), "{error}");
    assert!(error.hints()[0].contains("data.overlong"));
    let dropped = with(11, Overlong::Drop).expect("a row");
    assert_eq!((lengths(&dropped), dropped.counts.dropped, dropped.counts.rows), (vec![5], 1, 2));
    let cut = with(8, Overlong::Truncate).expect("two rows");
    assert_eq!((lengths(&cut), cut.counts.truncated, cut.counts.trained_tokens), (vec![5, 8], 1, 4));
    match with(7, Overlong::Truncate).expect_err("a row without an answer") {
        DatasetError::BadRows(rows) => {
            assert_eq!((rows.total, rows.counts.zero_label), (1, 1));
            assert!(
                rows.first[0].problem.to_string().contains("of its 12 tokens the first trained one is number 8"),
                "{}",
                rows.first[0]
            );
        }
        error => panic!("{error}"),
    }
    assert!(matches!(with(2, Overlong::Drop), Err(DatasetError::AllDropped { rows: 2, max_seq_len: 2 })));
}

#[test]
fn bad_rows_are_shown_ten_at_a_time() {
    let content = "{\"text\": 1}\n".repeat(25) + "{\"text\": \"a\"}\n";
    let error = load(content.as_bytes(), &data(Format::Auto)).expect_err("bad rows").to_string();
    assert!(error.starts_with("25 rows cannot be used\n"), "{error}");
    assert!(error.contains("rows.jsonl:10: text is a number; expected a string\n    {\"text\": 1}"), "{error}");
    assert!(error.ends_with("\n  and 15 more"), "{error}");
}

#[test]
fn rows_of_many_files_keep_their_order_and_origin() {
    let model = Model::new(None);
    let line = |number: usize| format!("{{\"text\": \"{number}\"}}\n");
    let files: Vec<PathBuf> = vec![
        model.write("a.jsonl", (0..5000).map(line).collect::<String>()),
        model.write("b.jsonl", format!("\n{}", line(5000))),
    ];
    let progress = Cell::new(0);
    let load = |files: &[PathBuf]| {
        Dataset::load(files, &data(Format::Auto), &model.tokenizer(), VOCABULARY, usize::MAX, &|rows| {
            progress.set(rows)
        })
        .expect("rows")
    };
    let dataset = load(&files);
    assert_eq!((dataset.rows.len(), progress.get()), (5001, 5001));
    assert!(dataset.rows.iter().enumerate().all(|(index, row)| row.answer_text == index.to_string()));
    assert!(dataset.origin(4999).ends_with("a.jsonl:5000") && dataset.origin(5000).ends_with("b.jsonl:2"));
    assert_eq!(dataset.origin(5001), "row 5001");
    assert_eq!(dataset.counts.unmasked, 5001);
    // The digest is of what is trained on, not of where it lies.
    assert_eq!(load(&files).digest, dataset.digest);
    model.write("b.jsonl", line(5000));
    assert_eq!(load(&files).digest, dataset.digest);
    model.write("b.jsonl", line(5001));
    assert_ne!(load(&files).digest, dataset.digest);
    let gone = [model.path().join("gone.jsonl")];
    let error = Dataset::load(&gone, &data(Format::Auto), &model.tokenizer(), VOCABULARY, usize::MAX, &|_| {});
    assert!(matches!(error, Err(DatasetError::Unreadable { .. })));
}

#[test]
fn the_mask_is_part_of_the_digest() {
    let row = br#"{"prompt": "a", "completion": "b"}"#;
    let digest = |train_on| load(row, &Data { train_on, ..data(Format::Auto) }).expect("a row").digest;
    assert_ne!(digest(TrainOn::Assistant), digest(TrainOn::All));
}

#[test]
fn messages_without_a_template_are_one_error() {
    let row = br#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#;
    let error = load_with(&Model::new(None), row, &data(Format::Auto)).expect_err("no template");
    assert!(matches!(error, DatasetError::NoTemplate { .. }) && error.hints().len() == 2, "{error}");
}

#[test]
fn tokens_of_a_tokenizer_that_the_model_lacks() {
    let model = Model::new(Some(CHATML));
    let file = model.write("rows.jsonl", r#"{"text": "a"}"#);
    let error = Dataset::load(&[file], &data(Format::Auto), &model.tokenizer(), 259, usize::MAX, &|_| {})
        .expect_err("a missing row");
    assert!(error.to_string().contains("token 2 is 259 (\"</s>\"), not below the vocabulary of 259"), "{error}");
    assert!(error.hints()[0].contains("tokenizer"));
}

#[test]
fn rows_of_tokens_need_no_tokenizer() {
    let model = Model::new(None);
    let load = |content: &str| {
        let file = model.write("rows.jsonl", content);
        Dataset::load(&[file], &data(Format::Auto), None, VOCABULARY, usize::MAX, &|_| {})
    };
    let dataset = load(r#"{"input_ids": [97, 98]}"#).expect("a row");
    assert_eq!((&dataset.rows[0].trained[..], dataset.rows[0].answer_text.as_str()), (&[false, true][..], ""));
    let error = load(r#"{"text": "a"}"#).expect_err("no tokenizer");
    assert!(matches!(error, DatasetError::NoTokenizer) && error.hints().len() == 1, "{error}");
}

#[test]
fn files_of_another_kind_are_told_in_one_line() {
    let mut tar = vec![0; 512];
    tar[257..262].copy_from_slice(b"ustar");
    let utf16: Vec<u8> = "\u{FEFF}{\"text\":\"a\"}\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    for (name, content, what, remedy) in [
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00\x00".to_vec(), "gzip file is torn", "fetch"),
        ("a.parquet", b"PAR1\x15\x04".to_vec(), "Parquet file is torn", "fetch"),
        ("a.tar", tar, "tar archive", "tar xf"),
        ("a.zip", b"PK\x03\x04\x14\0rows.jsonl".to_vec(), "zip", "unzip"),
        ("a.xlsx", b"PK\x03\x04\x14\0[Content_Types].xml".to_vec(), "spreadsheet", "CSV"),
        ("a.arrow", b"ARROW1\0\0".to_vec(), "Arrow", "from_file"),
        ("a.jsonl.xz", b"\xfd7zXZ\0\0".to_vec(), "xz", "unxz"),
        ("a.jsonl", utf16, "UTF-16", "iconv"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n".to_vec(), "git-lfs", "git lfs pull"),
    ] {
        let model = Model::new(None);
        let file = model.write(name, content);
        let error = Dataset::load(
            std::slice::from_ref(&file),
            &data(Format::Auto),
            &model.tokenizer(),
            VOCABULARY,
            usize::MAX,
            &|_| {},
        )
        .expect_err("no rows");
        let told = error.to_string();
        assert!(told.contains(name) && told.contains(what) && !told.contains('\n'), "{told}");
        assert!(error.hints()[0].contains(remedy), "{name}: {:?}", error.hints());
        assert!(finetune_dataset::resolve_files(&[file], &[]).is_err());
    }
}

#[test]
fn held_back_rows_of_another_name_are_found_or_said() {
    let model = Model::new(None);
    model.write("train.jsonl", "{\"text\": \"a\"}\n");
    let held_back = model.write("validation.jsonl", "{\"text\": \"b\"}\n");
    let directory = [model.path().to_owned()];
    let (train, eval) = finetune_dataset::resolve_files(&directory, &[]).expect("files");
    assert_eq!((train.len(), eval.len()), (1, 0), "an evaluation is not begun without being asked for");
    let said = finetune_dataset::unused_files(&directory, &[]);
    assert!(said.len() == 1 && said[0].contains("validation.jsonl is not used"), "{said:?}");
    assert_eq!(finetune_dataset::resolve_files(&directory, &directory).expect("files").1, [held_back]);
    assert!(finetune_dataset::unused_files(&directory, &directory).is_empty());
    model.write("valid.jsonl", "{\"text\": \"c\"}\n");
    assert!(finetune_dataset::unused_files(&directory, &[]).is_empty());
    assert!(finetune_dataset::resolve_files(&directory, &[]).expect("files").1[0].ends_with("valid.jsonl"));
}

#[test]
fn a_few_bad_rows_are_named_with_a_way_around_them() {
    let content = "{\"text\": \"a\"}\n".repeat(20) + "{\"text\": 1}\n";
    let error = load(content.as_bytes(), &data(Format::Auto)).expect_err("a bad row");
    assert!(error.hints().iter().any(|hint| hint.contains("sed '21d'")), "{:?}", error.hints());
    let error = load(b"{\"text\": 1}\n", &data(Format::Auto)).expect_err("a bad row");
    assert!(error.hints().iter().all(|hint| !hint.contains("sed")), "{:?}", error.hints());
}

#[test]
fn keys_without_use_are_counted_and_named_once() {
    let content = "{\"text\": \"a\", \"id\": 1, \"meta\": null}\n{\"text\": \"b\", \"id\": 2}\n{\"text\": \"c\"}\n";
    let dataset = load(content.as_bytes(), &data(Format::Auto)).expect("rows");
    assert_eq!(dataset.notices, ["keys that rows of format text have no use for: id (2 rows)"]);
    let row =
        r#"{"messages":[{"role":"user","content":"a","mood":"good"},{"role":"assistant","content":"b"}],"source":"x"}"#;
    let dataset = load(row.as_bytes(), &data(Format::Auto)).expect("a row");
    let named =
        dataset.notices.iter().any(|it| it.contains("source (1 row)") && it.contains("messages[].mood (1 row)"));
    assert!(named, "{:?}", dataset.notices);
}

#[test]
fn texts_are_kept_for_the_first_rows_only() {
    let model = Model::new(None);
    let file = model.write("rows.jsonl", "{\"text\": \"a\"}\n{\"text\": \"b\"}\n");
    for keep in [0, 1, 2] {
        let dataset = Dataset::load(
            std::slice::from_ref(&file),
            &data(Format::Auto),
            &model.tokenizer(),
            VOCABULARY,
            keep,
            &|_| {},
        )
        .expect("rows");
        assert_eq!(dataset.rows.iter().filter(|row| !row.answer_text.is_empty()).count(), keep);
    }
}

#[test]
fn masks_of_token_rows_are_honoured() {
    let load = |row: &str| match load(row.as_bytes(), &data(Format::Auto)) {
        Ok(dataset) => {
            let trained = |row: &finetune_dataset::Row| {
                row.tokens.iter().zip(&row.trained).filter(|(_, it)| **it).map(|(id, _)| *id).collect::<Vec<_>>()
            };
            let rows: Vec<String> =
                dataset.rows.iter().map(|row| format!("{:?} {:?}", row.tokens, trained(row))).collect();
            rows.join(" | ")
        }
        Err(DatasetError::BadRows(rows)) => rows.first[0].problem.to_string(),
        Err(error) => panic!("{error}"),
    };
    for (keys, expected) in [
        (r#""completion_mask": [0, 0, 1, 1]"#, "[5, 6, 7, 8] [7, 8]"),
        (r#""assistant_masks": [0, 1, 0, 1]"#, "[5, 6, 7, 8] [6, 8]"),
        (r#""loss_mask": [false, false, false, true]"#, "[5, 6, 7, 8] [8]"),
        (r#""completion_mask": [0, 1, 1, 1], "assistant_masks": [0, 0, 1, 1]"#, "[5, 6, 7, 8] [7, 8]"),
        (r#""completion_mask": [0, 1, 1, 1], "labels": [-100, -100, -100, 8]"#, "[5, 6, 7, 8] [8]"),
        (r#""attention_mask": [1, 1, 1, 0]"#, "[5, 6, 7] [6, 7]"),
        (r#""attention_mask": [0, 0, 1, 1], "labels": [-100, -100, 7, 8]"#, "[7, 8] [8]"),
        (r#""attention_mask": [0, 1, 1, 0], "labels": [1, 6, 7, 1]"#, "[6, 7] [7]"),
        (r#""attention_mask": [1, 1, 1, 1], "position_ids": [0, 1, 2, 3]"#, "[5, 6, 7, 8] [6, 7, 8]"),
        (r#""position_ids": [0, 1, 0, 1]"#, "[5, 6] [6] | [7, 8] [8]"),
        (r#""attention_mask": [0, 1, 1, 1], "position_ids": [1, 0, 1, 2]"#, "[6, 7, 8] [7, 8]"),
        (r#""seq_lengths": [3, 1]"#, "[5, 6, 7] [6, 7]"),
        (r#""completion_mask": null, "position_ids": null, "seq_lengths": null"#, "[5, 6, 7, 8] [6, 7, 8]"),
        (r#""completion_mask": [0, 1]"#, "4 input_ids but 2 of completion_mask"),
        (r#""completion_mask": [0, 1, 2, 1]"#, "completion_mask[2] is 2"),
        (r#""attention_mask": [1, 0, 1, 1]"#, "attention_mask[1] is 0 between tokens that are attended to"),
        (r#""attention_mask": [0, 0, 0, 0]"#, "attention_mask marks every token as padding"),
        (r#""position_ids": [0, 1, 3, 4]"#, "position_ids[2] is 3"),
        (r#""seq_lengths": [3, 3]"#, "seq_lengths add up to 6, and there are 4 input_ids"),
        (r#""assistant_masks": [0, 0, 0, 0]"#, "nothing to train on: none of its 4 tokens is an answer's"),
    ] {
        assert_eq!(load(&format!("{{\"input_ids\": [5, 6, 7, 8], {keys}}}")), expected, "{keys}");
    }
}

#[test]
fn a_template_without_bounds_stops_the_whole_reading() {
    let row = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#;
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let content = format!("{row}\n").repeat(64);
    let error = load_with(&Model::new(Some(endless)), content.as_bytes(), &data(Format::Auto)).expect_err("no end");
    assert!(matches!(error, DatasetError::TemplateBounds { .. }), "{error}");
}
