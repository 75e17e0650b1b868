//! `compare`, and the pages of runs.

use crate::folder::{CRASH_RECIPE, Folder, metrics};

#[test]
fn settings_that_differ_and_what_came_of_them() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("one", &[]).expect(0);
    folder.run("two", &["--set", "lora.rank=8", "--set", "train.max_steps=12"]).expect(0);
    let compared = folder.finetune(&["compare", "one", "two", "--json"]).expect(0).json();
    assert_eq!(compared["differ"], serde_json::json!(["lora.rank", "train.max_steps"]));
    let loss = |name: &str, step: u64| {
        let rows = metrics(&folder.path(name));
        rows.iter().find(|row| row["step"] == step && row["loss"].is_f64()).expect("a row")["loss"].clone()
    };
    for (n, name, rank, steps) in [(0, "one", "4", 10), (1, "two", "8", 12)] {
        let run = &compared["runs"][n];
        assert_eq!((&run["run"], &run["state"], &run["step"]), (&name.into(), &"done".into(), &steps.into()), "{run}");
        assert_eq!((&run["settings"]["lora.rank"], &run["loss"]), (&rank.into(), &loss(name, steps)), "{run}");
        assert!(run["trained_parameters"].as_u64() > Some(1000) && run["peak_memory_bytes"].is_u64(), "{run}");
    }
    let text = folder.finetune(&["compare", "one", "two", "--html", "both.html"]).expect(0).stdout;
    for part in [
        "settings         one  two\n",
        "lora.rank        4    8\n",
        "train.max_steps  10   12\n",
        "\ntraining loss",
        "held back, best",
        "all curves: both.html",
    ] {
        assert!(text.contains(part), "lacks {part:?}:\n{text}");
    }
    let page = std::fs::read_to_string(folder.path("both.html")).expect("a page");
    for part in [
        "<span class=\"r1\">two</span>",
        "class=\"line r0\"",
        "Loss on held-back rows",
        "<td>lora.rank</td><td>4</td><td>8</td>",
    ] {
        assert!(page.contains(part), "lacks {part:?}");
    }
    assert!(!page.contains("http-equiv") && page.len() < 40 << 10, "{} bytes", page.len());
    folder.finetune(&["compare", "one", "two", "--html", "both.html"]).expect(0);
    // Only a page is written over.
    for (path, what) in [("one/recipe.toml", "another file than a page of curves"), ("one", "a directory")] {
        folder.finetune(&["compare", "one", "two", "--html", path]).expect(2).says(what);
    }
    assert!(folder.path("one/recipe.toml").is_file() && folder.path("one").is_dir());
    // A line that a disk has damaged is said.
    let rows = std::fs::read_to_string(folder.path("one/metrics.jsonl")).expect("metrics");
    folder.write("one/metrics.jsonl", format!("{{\n{rows}").as_bytes());
    folder.finetune(&["compare", "one", "two"]).expect(0).says("one: 1 line of metrics.jsonl cannot be read");
    let seen = folder.finetune(&["watch", "one", "--once"]).expect(0).stdout;
    assert!(seen.contains("10/10") && seen.contains("one: 1 line of metrics.jsonl cannot be read"), "{seen}");
    folder.finetune(&["compare", "one", "model"]).expect(2).says("a run is meant");
    folder.finetune(&["compare", "one"]).expect(2);
}

/// Texts of rows are hostile input, and so is the name of a directory.
#[test]
fn texts_of_rows_are_no_markup_in_the_report() {
    let recipe = r#"output_dir = "run"
[model]
path = "model"
[data]
train = "<b>rows.jsonl"
eval = "eval.jsonl"
[train]
method = "full"
max_steps = 3
[eval]
samples = 1
max_new_tokens = 2
"#;
    let folder = Folder::with_chat_model(recipe);
    let row = r#"{"messages": [{"role": "user", "content": "</script><script>alert(1)</script>"}, {"role": "assistant", "content": "<img src=x>"}]}"#;
    folder.write("<b>rows.jsonl", format!("{row}\n").repeat(3).as_bytes());
    folder.write("eval.jsonl", format!("{row}\n").as_bytes());
    let output = "run <i>&\"";
    folder.run(output, &[]).expect(0);
    let page = std::fs::read_to_string(folder.path(output).join("report.html")).expect("a report");
    assert_eq!((page.matches("<script>").count(), page.matches("</script>").count()), (1, 1), "our own");
    for part in ["<b>", "<i>", "<img"] {
        assert!(!page.contains(part), "has {part}");
    }
    for part in [
        "<h1>run &lt;i&gt;&amp;&quot;</h1>",
        "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;",
        "model, all weights, on _b_rows.jsonl (3 rows), held back eval.jsonl (1 row).",
        "<dt>state</dt><dd>done</dd>",
        "<dt>steps</dt><dd>3 of 3</dd>",
        "<dt>peak memory</dt>",
        "UTC</dd>",
    ] {
        assert!(page.contains(part), "lacks {part:?}:\n{page}");
    }
    assert!(page.len() < 40 << 10, "{} bytes", page.len());
}
