//! `data.add_tokens`: from the recipe to the merged model.

use serde_json::{Value, json};

use crate::folder::{CRASH_RECIPE, Folder};

/// A model of 96 words with a tokenizer, and rows that hold two new ones.
fn folder(more: &str) -> Folder {
    let recipe =
        CRASH_RECIPE.replace("[data]\n", &format!("{more}[data]\nadd_tokens = [\"<tool>\", \"<end tool>\"]\n"));
    let folder = Folder::with_recipe(&recipe);
    let words: serde_json::Map<String, Value> = (0..96).map(|n| (format!("w{n}"), json!(n))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    });
    folder.write("model/tokenizer.json", tokenizer.to_string().as_bytes());
    let rows: String = (0..12)
        .map(|n| json!({"prompt": format!("w{n} <tool>"), "completion": format!("w{}<end tool>w{n} w1", 2 * n)}))
        .map(|row| format!("{row}\n"))
        .collect();
    folder.write("train.jsonl", rows.as_bytes());
    folder.write("eval.jsonl", rows.as_bytes());
    folder
}

fn json_file(folder: &Folder, name: &str) -> Value {
    let text = std::fs::read_to_string(folder.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    serde_json::from_str(&text).expect("JSON")
}

/// The loss of `finetune eval`.
fn loss(folder: &Folder, model: &[&str]) -> f64 {
    let arguments = [&["eval"], model, &["--data", "eval.jsonl", "--json"]].concat();
    let ended = folder.finetune(&arguments).expect(0);
    let answer: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|_| panic!("{ended:?}"));
    answer["loss"].as_f64().expect("a loss")
}

/// The adapter and the merged model know the tokens by tokenizer, embedding and output layer. They
/// compute the same. A killed run resumes to the same bits.
#[test]
fn new_tokens_reach_the_adapter_and_the_merged_model() {
    for more in
        ["modules_to_save = [\"embed_tokens\", \"lm_head\"]\n", "target_modules = [\"embed_tokens\", \"lm_head\"]\n"]
    {
        let folder = folder(more);
        folder.run("undisturbed", &["--resume"]).expect(0);
        let want = folder.result("undisturbed");
        assert!(folder.run_killed_at("run", &["--resume"], "train.step:6"), "{more}");
        folder.run("run", &["--resume"]).expect(0);
        folder.result("run").expect_same(&want, more);
        let added = json_file(&folder, "run/adapter/tokenizer.json")["added_tokens"].clone();
        assert_eq!([&added[0]["id"], &added[1]["id"]], [&json!(96), &json!(97)], "{more}");
        folder.finetune(&["export", "run", "--format", "merged", "--output", "merged"]).expect(0);
        assert_eq!(json_file(&folder, "merged/config.json")["vocab_size"], json!(98), "{more}");
        let (adapter, merged) = (loss(&folder, &["model", "--adapter", "run/adapter"]), loss(&folder, &["merged"]));
        assert!((adapter - merged).abs() < 1e-5 * adapter, "{more}: {adapter} and {merged}");
        // A resume adds the same tokens. One that takes other names for them would rename them.
        for tokens in ["[\"<tool>\"]", "[\"<tool>\", \"<end>\"]"] {
            let changed = ["--resume", "--set", &format!("data.add_tokens={tokens}")];
            folder.run("run", &changed).expect(2).says("data.add_tokens: the checkpoint has");
        }
        // Another run can start from the adapter, if it adds the same tokens.
        let from = ["--set", "lora.init_from=run/adapter", "--set", "train.max_steps=1"];
        folder.run("next", &from).expect(0);
        let ended = folder.run("other", &[&from[..], &["--set", "data.add_tokens=[\"<tool>\"]"]].concat()).expect(2);
        assert!(ended.stderr.contains("data.add_tokens has to add the same tokens"), "{}", ended.stderr);
    }
}

/// Without embedding and output layer among what is trained, a new token can only be read.
#[test]
fn untrained_new_tokens_are_named() {
    let folder = folder("");
    let ended = folder.run("run", &["--set", "train.max_steps=1"]).expect(0);
    assert!(ended.stderr.contains("neither embed_tokens nor lm_head is trained"), "{}", ended.stderr);
    assert!(loss(&folder, &["model", "--adapter", "run/adapter"]).is_finite());
}
