//! Rows of other kinds of files, through the whole program.

use serde_json::{Value, json};

use super::serve::{ask, serve_in};
use super::{CHAT_RECIPE, chat_model, json_of};
use crate::folder::Folder;

#[test]
fn a_table_is_mapped_divided_and_trained_on() {
    let folder = Folder::with_chat_model(CHAT_RECIPE);
    let rows: String = (0..60).map(|n| format!("question {n},\"answer\n{n}\"\n")).collect();
    folder.write("rows.csv", format!("question,answer\n{rows}").as_bytes());
    let sets = [
        "--set",
        "data.train=*.csv",
        "--set",
        "data.columns.prompt=question",
        "--set",
        "data.columns.completion=answer",
        "--set",
        "data.eval_share=0.2",
        "--set",
        "data.weights=[2.0]",
    ];
    let found = json_of(&folder, &[&["validate", "recipe.toml", "--json"], &sets[..]].concat());
    let count = |of: &str| found[of]["rows"].as_u64().expect("a number");
    assert_eq!(count("train") + count("eval"), 60, "{found}");
    let said = format!("data.eval_share = 0.2 holds back {} of 60 rows", count("eval"));
    assert!(found["notices"].as_array().expect("notices").iter().any(|notice| notice == &said), "{found}");
    // Batches of 16: each row twice.
    assert_eq!(found["steps_per_epoch"], (2 * count("train")).div_ceil(16));
    let row = json_of(&folder, &[&["inspect", "recipe.toml", "--json", "--row", "2"], &sets[..]].concat());
    assert!(row["origin"].as_str().expect("text").contains("rows.csv:"), "{row}");
    folder.finetune(&[&["run", "recipe.toml"], &sets[..]].concat()).expect(0);
    // Other weights take other rows: the run cannot go on with them.
    let other = ["run", "recipe.toml", "--resume", "--set", "train.max_steps=5"];
    let weights = ["--set", "data.weights=[1.0]"];
    let ended = folder.finetune(&[&other[..], &sets[..8], &weights].concat()).expect(2);
    ended.says("data.train: the rows have changed");
}

#[test]
fn every_command_that_reads_rows_reads_all_kinds() {
    let folder = chat_model();
    folder.write(
        "rows.json",
        br#"[{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]},
 {"messages": [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you."}]}]"#,
    );
    let of = |data: &str| folder.finetune(&["eval", "run", "--data", data, "--json"]).expect(0).json()["loss"].clone();
    assert_eq!(of("rows.json"), of("train.jsonl"));
    let ended = folder.finetune(&["generate", "run", "--data", "rows.json", "--max-new-tokens", "4"]).expect(0);
    assert!(ended.stdout.contains("rows.json:2 (row 2)"), "{}", ended.stdout);
    folder.write("torn.parquet", b"PAR1\x15\x04\x15");
    folder.finetune(&["eval", "run", "--data", "torn.parquet"]).expect(2).says("the Parquet file is torn or damaged");
}

#[test]
fn rows_are_measured_with_the_columns_of_the_run() {
    let folder = Folder::with_chat_model(CHAT_RECIPE);
    folder.write("rows.csv", b"question,answer,text\nwho?,me,junk\nwhere?,here,more junk\n");
    folder.write("ours.csv", b"prompt,completion\nwho?,me\nwhere?,here\n");
    let sets = [
        "--set",
        "data.train=rows.csv",
        "--set",
        "data.columns={prompt=\"question\",completion=\"answer\"}",
        "--set",
        "train.max_steps=1",
    ];
    folder.finetune(&[&["run", "recipe.toml"], &sets[..]].concat()).expect(0);
    let of = |data: &str| folder.finetune(&["eval", "run", "--data", data, "--json"]).expect(0).json()["loss"].clone();
    assert_eq!(of("rows.csv"), of("ours.csv"));
    folder.finetune(&["eval", "run", "--data", "ours.csv"]).expect(0).says("the usual names are taken");
    let ended = folder.finetune(&["generate", "run", "--data", "rows.csv", "--max-new-tokens", "2"]).expect(0);
    assert!(ended.stdout.contains("who?"), "{}", ended.stdout);
}

/// `data.chat_template_kwargs` counts in training, in what the run and its exports answer, and at a resume.
#[test]
fn variables_of_the_template_stay_with_the_run() {
    let folder = Folder::with_chat_model(CHAT_RECIPE);
    let template = "{{ mood | default('') }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>{% endfor %}\
                    {% if add_generation_prompt %}<|assistant|>\n{% endif %}";
    folder.write("model/chat_template.jinja", template.as_bytes());
    let messages = r#""messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]"#;
    let rows = format!("{{{messages}}}\n{{{messages}, \"chat_template_kwargs\": {{\"mood\": \"loud\"}}}}\n");
    folder.write("train.jsonl", rows.as_bytes());
    let mood = ["--set", "data.chat_template_kwargs.mood=soft"];
    for (row, text) in [("1", "soft<|user|>\nHi"), ("2", "loud<|user|>\nHi")] {
        let shown = json_of(&folder, &[&["inspect", "recipe.toml", "--row", row, "--json"], &mood[..]].concat());
        assert!(shown["text"].as_str().expect("text").starts_with(text), "{shown}");
    }
    folder.finetune(&[&["run", "recipe.toml"], &mood[..]].concat()).expect(0);
    let answer = json_of(&folder, &["generate", "run", "--prompt", "Hi", "--max-new-tokens", "2", "--json"]);
    let ids: Vec<u32> = serde_json::from_value(answer["prompt_token_ids"].clone()).expect("ids");
    let tokenizer = finetune_dataset::ChatTokenizer::load(&folder.path("model"), None).expect("a tokenizer");
    let prompt = tokenizer.decode(&ids, false).expect("text");
    assert!(prompt.starts_with("soft<|user|>\nHi"), "{prompt}");
    // Requests to a server come first too.
    {
        let (_running, address) = serve_in(&folder.path(""), "run");
        let tokens = |variables: Value| {
            let asked = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0,
                "chat_template_kwargs": variables});
            let (status, body) = ask(&address, "POST", "/v1/chat/completions", "", &asked.to_string());
            assert_eq!(status, 200, "{body}");
            let answer: Value = serde_json::from_str(&body).expect("JSON");
            answer["usage"]["prompt_tokens"].as_u64().expect("a count") as usize
        };
        assert_eq!(tokens(json!({})), ids.len());
        assert!(tokens(json!({"mood": ""})) < ids.len() && tokens(json!({"mood": "soft soft"})) > ids.len());
    }
    // Exports know nothing of the run: their template has the variables as its defaults.
    folder.finetune(&["export", "run", "--format", "merged", "--output", "merged"]).expect(0);
    let answer = json_of(&folder, &["generate", "merged", "--prompt", "Hi", "--max-new-tokens", "2", "--json"]);
    let merged: Vec<u32> = serde_json::from_value(answer["prompt_token_ids"].clone()).expect("ids");
    assert_eq!(merged, ids);
    let ended = folder.finetune(&["run", "recipe.toml", "--resume", "--set", "train.max_steps=5"]).expect(2);
    ended.says("data.chat_template_kwargs: the checkpoint has { \"mood\" = \"soft\" }, the recipe none");
}
