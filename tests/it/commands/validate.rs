//! `finetune validate` counts what a run would use, and foretells what a run says.

use serde_json::{Value, json};

use super::{CHAT_RECIPE, json_of};
use crate::folder::{CRASH_RECIPE, Folder};

#[test]
fn validate_counts_what_the_files_hold() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let text = std::fs::read_to_string(folder.path("train.jsonl")).expect("rows");
    let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("a row")).collect();
    let numbers = |key: &str| -> Vec<Vec<i64>> {
        rows.iter().map(|row| serde_json::from_value(row[key].clone()).expect("numbers")).collect()
    };
    let mut lengths: Vec<usize> = numbers("input_ids").iter().map(Vec::len).collect();
    lengths.sort_unstable();
    // The first token is never trained: nothing before it predicts it.
    let trained: usize = numbers("labels").iter().map(|row| row.iter().skip(1).filter(|id| **id != -100).count()).sum();

    let found = json_of(&folder, &["validate", "recipe.toml", "--json"]);
    let train = &found["train"];
    assert_eq!(train["rows"], rows.len());
    assert_eq!(train["tokens"], lengths.iter().sum::<usize>());
    assert_eq!(train["trained_tokens"], trained);
    assert_eq!(train["longest"], *lengths.last().expect("a row"));
    assert_eq!(train["truncated"], 0);
    assert_eq!(train["dropped"], 0);
    assert_eq!(found["eval"]["rows"], 12);
    assert_eq!(found["architecture"], "Qwen3ForCausalLM");
    assert_eq!((&found["steps"], &found["steps_per_epoch"]), (&json!(10), &json!(3)));
    assert!(!folder.path("run").exists(), "validate writes nothing");

    // Rows longer than 20 tokens, left out or cut.
    let longer = lengths.iter().filter(|length| **length > 20).count();
    assert!(longer > 0);
    let short = ["validate", "recipe.toml", "--json", "--set", "data.max_seq_len=20", "--set"];
    let dropped = json_of(&folder, &[&short[..], &["data.overlong=drop", "--set", "data.eval=train.jsonl"]].concat());
    assert_eq!(dropped["train"]["dropped"], longer);
    assert_eq!(dropped["train"]["rows"], rows.len() - longer);
    let cut = json_of(&folder, &[&short[..], &["data.overlong=truncate", "--set", "data.eval=train.jsonl"]].concat());
    assert_eq!(cut["train"]["truncated"], longer);
    assert_eq!(cut["train"]["tokens"], lengths.iter().map(|length| (*length).min(20)).sum::<usize>());

    let text = folder.finetune(&["validate", "recipe.toml", "--quiet"]).expect(0);
    assert_eq!(text.stderr, "");
    let line = format!("train       {} rows, {} tokens, {trained} trained", rows.len(), train["tokens"]);
    assert!(text.stdout.contains(&line), "{}", text.stdout);
}

/// `validate` and `run` say the same counts of parameters, rows and steps.
#[test]
fn validate_and_run_agree() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let found = json_of(&folder, &["validate", "recipe.toml", "--json"]);
    let ended = folder.run("run", &[]).expect(0);
    let trained = found["trained_parameters"].as_u64().expect("a number");
    let thousands = format!("training steps 1 to 10, {},{:03} parameters", trained / 1000, trained % 1000);
    ended.says(&thousands).says(&format!("{} rows, {} tokens", found["train"]["rows"], found["train"]["tokens"]));
}

/// A run over several ranks is started by a launcher, and `validate` and `run` say how.
#[test]
fn a_run_over_several_ranks_is_told_how_to_start() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let whole = folder.finetune(&["validate", "recipe.toml"]).expect(0);
    assert!(whole.stdout.ends_with("nothing stands in the way of `finetune run`\n"), "{}", whole.stdout);
    let stages = ["--set", "parallel.stages=2"];
    let spread = folder.finetune(&[&["validate", "recipe.toml"], &stages[..]].concat()).expect(0);
    let want = "nothing stands in the way of `finetune launch -n 2 -- recipe.toml` with the same --set\n";
    assert!(spread.stdout.ends_with(want), "{}", spread.stdout);
    let ended = folder.run("run", &stages).expect(2);
    ended.says("1 rank is no multiple of it").says("`finetune launch -n 2 -- RECIPE.toml`");
    // A placement of layers that are not spread.
    let idle = ["validate", "recipe.toml", "--set", "parallel.placement=wave"];
    let found = folder.finetune(&idle).expect(0);
    assert!(found.stdout.contains("parallel.placement = \"wave\" changes nothing here"), "{}", found.stdout);
    let found = folder.finetune(&[&idle[..], &stages].concat()).expect(0);
    assert!(!found.stdout.contains("changes nothing here"), "{}", found.stdout);
}

/// A user's first try has few rows, with the recipe of the README.
#[test]
fn a_run_that_will_hardly_learn_is_told_so() {
    let folder = Folder::with_chat_model(&CHAT_RECIPE.replace("max_steps = 3\n", "").replace("1e-3", "2e-4"));
    let row = |n: usize| format!("{{\"prompt\": \"Say {n}\", \"completion\": \"It is {n}.\"}}\n");
    let rows: String = (0..32).map(row).collect();
    folder.write("train.jsonl", rows.as_bytes());
    folder.write("again.jsonl", (rows + &row(3)).as_bytes());
    let cases: [(&[&str], &str); 4] = [
        (
            &[],
            "only 2 steps: the model will hardly change; with 32 rows try train.epochs = 5 and train.global_batch_size = 4",
        ),
        (&["data.eval=train.jsonl"], "32 of 32 held-back rows are training rows too"),
        (&["data.train=again.jsonl"], "1 of 33 training rows are repeated ("),
        (&["schedule.warmup_steps=500"], "the warm-up of 500 steps does not end within the 2 steps of the run"),
    ];
    for (sets, want) in cases {
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", *set]).collect();
        let found = folder.finetune(&[&["validate", "recipe.toml"], &sets[..]].concat()).expect(0);
        assert!(found.stdout.contains(want), "{}", found.stdout);
        folder.run("run", &sets).expect(0).says(want);
        std::fs::remove_dir_all(folder.path("run")).expect("it is there");
    }
}

/// `run` says every notice of `validate`. The one about an occupied run directory is left out: it
/// depends on what lies there.
#[test]
fn validate_and_run_say_the_same_notices() {
    let folder = Folder::with_chat_model(CHAT_RECIPE);
    let row = |n: usize| format!("{{\"prompt\": \"Say {n}\", \"completion\": \"It is {n}.\"}}\n");
    folder.write("train.jsonl", (0..4).map(row).collect::<String>().as_bytes());
    let all_tokens = ["--set", "data.train_on=all"];
    let found = json_of(&folder, &[&["validate", "recipe.toml", "--json"], &all_tokens[..]].concat());
    let notices: Vec<&str> =
        found["notices"].as_array().expect("a list").iter().map(|notice| notice.as_str().expect("text")).collect();
    assert!(notices.contains(&"every token of every row is trained on, prompts included"), "{notices:?}");
    let ended = folder.run("run", &all_tokens).expect(0);
    for notice in notices.into_iter().filter(|notice| !notice.contains("holds a run already")) {
        assert!(ended.stderr.contains(notice), "`run` does not say {notice:?}:\n{}", ended.stderr);
    }
}

/// The text that `inspect` shows, and the token that ends an answer. A long row is shortened.
#[test]
fn validate_shows_the_first_row_as_the_model_will_see_it() {
    let folder = Folder::with_chat_model(CHAT_RECIPE);
    let row = |question: &str| {
        format!(
            "{}\n",
            json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "Hello there."}]})
        )
    };
    folder.write("train.jsonl", row("Hi").as_bytes());
    let found = folder.finetune(&["validate", "recipe.toml"]).expect(0).stdout;
    let text = "            <|user|>\n            Hi<|end|><|assistant|>\n            ⟦Hello there.<|end|>⟧\n";
    assert!(found.contains("train.jsonl:1: ") && found.contains(text), "{found}");
    assert!(found.contains("ends at     <|end|> (taught by the rows)"), "{found}");
    let shown = folder.finetune(&["inspect", "recipe.toml"]).expect(0).stdout;
    assert!(shown.contains("an answer ends at <|end|> (taught by the rows)"), "{shown}");

    let question = "So many words. ".repeat(40);
    folder.write("train.jsonl", row(question.trim()).as_bytes());
    let short = folder.finetune(&["validate", "recipe.toml"]).expect(0).stdout;
    assert!(
        short.contains("[…]") && !short.contains(question.trim()) && short.contains("⟦Hello there.<|end|>⟧"),
        "{short}"
    );
    let whole = folder.finetune(&["validate", "recipe.toml", "--verbose"]).expect(0).stdout;
    assert!(whole.contains(question.trim()), "{whole}");
}
