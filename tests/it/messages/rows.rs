//! Rows that cannot be trained on.

use expect_test::expect;

use super::{RUN, check};
use crate::folder::Folder;

/// Full fine-tuning of the chat model, which needs no weights.
const CHAT_RECIPE: &str = r#"output_dir = "run"
[model]
path = "model"
[data]
train = "train.jsonl"
max_seq_len = 64
[train]
method = "full"
"#;

#[test]
fn rows_that_cannot_be_read() {
    let folder = Folder::with_chat_model(CHAT_RECIPE);
    folder.write(
        "train.jsonl",
        br#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
{"messages": [{"role": "user", "content": "Hi"}
{"messages": [{"role": "user"}, {"role": "assistant", "content": "Hello"}]}

{"messages": "Hi"}
{"conversation": []}
"#,
    );
    check(
        &folder,
        &RUN,
        expect![[r#"
        reading rows
        error: 4 rows cannot be used
          train.jsonl:2:47: not JSON: EOF while parsing a list; expected one JSON object on each line, not one over several
            {"messages": [{"role": "user", "content": "Hi"}
          train.jsonl:3: the key messages[0].content is missing; expected "messages": a list of {"role", "content"}
            {"messages": [{"role": "user"}, {"role": "assistant", "content": "Hello"}]}
          train.jsonl:5: messages is a string; expected a list
            {"messages": "Hi"}
          train.jsonl:6: no key that tells the format; its keys are conversation; expected one of the keys messages, prompt, text, instruction, conversations, input_ids
            {"conversation": []}

        hint: if other names mean the same, say so: data.columns = { prompt = "question", completion = "answer" }
        (exit code 2)
    "#]],
    );
}

#[test]
fn a_row_that_is_too_long() {
    let folder = Folder::with_chat_model(CHAT_RECIPE);
    let text = "word ".repeat(200);
    folder.write("train.jsonl", format!("{{\"text\": \"short\"}}\n{{\"text\": \"{text}\"}}\n").as_bytes());
    check(
        &folder,
        &RUN,
        expect![[r#"
        reading rows
        error: 1 row cannot be used
          train.jsonl:2: the row has 602 tokens, more than data.max_seq_len = 64
            {"text": "word word word word word word word word word word word word word word …

        hint: raise data.max_seq_len, or set data.overlong to "truncate" or "drop"
        (exit code 2)
    "#]],
    );
}

#[test]
fn a_row_without_a_token_to_train_on() {
    let folder = Folder::with_chat_model(CHAT_RECIPE);
    folder.write("train.jsonl", b"{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}\n");
    check(
        &folder,
        &RUN,
        expect![[r#"
        reading rows
        error: 1 row cannot be used
          train.jsonl:1: no assistant message to train on; the roles are user
            {"messages": [{"role": "user", "content": "Hi"}]}
        (exit code 2)
    "#]],
    );
}

#[test]
fn rows_of_two_formats() {
    let folder = Folder::with_chat_model(CHAT_RECIPE);
    folder.write("train.jsonl", b"{\"text\": \"Hi\"}\n{\"prompt\": \"Hi\", \"completion\": \"Hello\"}\n");
    check(
        &folder,
        &RUN,
        expect![[r#"
        reading rows
        error: 1 row cannot be used
          train.jsonl:2: this is a row of format prompt_completion, and the first row (train.jsonl:1) is text; expected format text in every row
            {"prompt": "Hi", "completion": "Hello"}

        hint: one dataset has one format: convert the rows, or name the format with data.format
        (exit code 2)
    "#]],
    );
}

#[test]
fn no_rows() {
    let folder = Folder::with_chat_model(CHAT_RECIPE);
    folder.write("train.jsonl", b"\n");
    check(
        &folder,
        &RUN,
        expect![[r#"
        reading rows
        error: no rows in train.jsonl

        hint: each line of a dataset is one JSON object, as {"messages": [...]}
        (exit code 2)
    "#]],
    );
}
