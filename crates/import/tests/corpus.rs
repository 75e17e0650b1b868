//! Published configurations of the four tools (`tests/configs`, see PROVENANCE.md there).
//!
//! The table of values is compared by `scripts/check_import.py` with what each tool itself makes of
//! the file. `UPDATE_EXPECT=1` rewrites the table; run the script after that.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use expect_test::expect_file;
use finetune_import::{ImportError, Imported, Tool, import};
use finetune_recipe::Recipe;

/// The keys that the table shows, as the resolved recipe has them.
const KEYS: [&str; 32] = [
    "seed",
    "train.method",
    "model.quantization",
    "model.dtype",
    "lora.rank",
    "lora.alpha",
    "lora.dropout",
    "lora.target_modules",
    "lora.use_rslora",
    "lora.use_dora",
    "lora.modules_to_save",
    "lora.layers_to_transform",
    "data.format",
    "data.max_seq_len",
    "data.overlong",
    "data.packing",
    "data.train_on",
    "data.shuffle",
    "train.epochs",
    "train.max_steps",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.max_grad_norm",
    "train.gradient_checkpointing",
    "optimizer.learning_rate",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.weight_decay",
    "schedule.name",
    "schedule.warmup_steps",
    "schedule.warmup_ratio",
    "schedule.min_lr_ratio",
];

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/configs")
}

/// Every published configuration: its tool, its path below `tests/configs`, its text.
fn published() -> Vec<(Tool, String, String)> {
    let mut all = Vec::new();
    for tool in Tool::ALL {
        let folder = configs().join(tool.flag());
        let mut names: Vec<String> = std::fs::read_dir(&folder)
            .expect("a folder of configurations")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .filter(|name| name.ends_with(".yml") || name.ends_with(".yaml"))
            .collect();
        names.sort();
        for name in names {
            let text = std::fs::read_to_string(folder.join(&name)).expect("a configuration");
            all.push((tool, format!("{}/{name}", tool.flag()), text));
        }
    }
    all
}

fn imported(name: &str, text: &str) -> Imported {
    import(text, &configs().join(name), None).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn recipe(name: &str, imported: &Imported) -> Recipe {
    let parsed = Recipe::parse(&imported.recipe, Path::new("recipe.toml"), &[], None);
    parsed.unwrap_or_else(|error| panic!("{name}: {error}\n{}", imported.recipe))
}

/// The values of the resolved recipe by key.
fn values(recipe: &Recipe) -> BTreeMap<String, String> {
    let mut values = BTreeMap::new();
    let (mut table, text) = (String::new(), recipe.to_toml());
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            table = format!("{name}.");
        } else if let Some((key, value)) = line.split_once(" = ") {
            values.insert(format!("{table}{key}"), value.to_owned());
        }
    }
    values
}

#[test]
fn at_least_forty_of_each_kind_come_out_as_recipes_that_we_read() {
    let mut counts = BTreeMap::new();
    for (tool, name, text) in published() {
        let imported = imported(&name, &text);
        assert_eq!(imported.tool, tool, "{name}");
        recipe(&name, &imported);
        *counts.entry(tool.name()).or_insert(0) += 1;
    }
    assert!(counts.len() == 4 && counts.values().all(|count| *count >= 40), "{counts:?}");
}

#[test]
fn the_values_of_published_configurations() {
    let mut table = String::new();
    for (_, name, text) in published() {
        let values = values(&recipe(&name, &imported(&name, &text)));
        table += &format!("{name}\n");
        for key in KEYS {
            if let Some(value) = values.get(key) {
                table += &format!("    {key} = {value}\n");
            }
        }
    }
    expect_file!["./expected.txt"].assert_eq(&table);
}

/// Every key at the top of a file is named in its recipe, with its line if it could not be carried
/// over.
#[test]
fn no_key_is_dropped_without_a_word() {
    for (_, name, text) in published() {
        let imported = imported(&name, &text);
        for line in text.lines() {
            let Some((key, _)) = line.split_once(':') else { continue };
            let plain = key.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_');
            if plain && key.starts_with(|letter: char| letter.is_ascii_lowercase()) {
                assert!(imported.recipe.contains(key), "{name}: {key}\n{}", imported.recipe);
            }
        }
    }
}

/// What a user sees, for one file of each tool.
#[test]
fn recipes_as_they_come_out() {
    for (name, snapshot) in [
        ("axolotl/llama-3-qlora-1b.yml", expect_file!["./snapshots/axolotl.toml"]),
        ("llama-factory/train_lora-qwen3_lora_sft.yaml", expect_file!["./snapshots/llama-factory.toml"]),
        ("torchtune/qwen2_5-0.5B_lora.yaml", expect_file!["./snapshots/torchtune.toml"]),
        ("mlx-lm/mlx-lm-mlx_lm-examples-lora_config.yaml", expect_file!["./snapshots/mlx-lm.toml"]),
    ] {
        let text = std::fs::read_to_string(configs().join(name)).expect(name);
        snapshot.assert_eq(&imported(name, &text).recipe);
    }
}

/// Cut off and changed anywhere, a file ends in an error or in a recipe that we read.
#[test]
fn damaged_files_never_end_the_program() {
    let mut state = 1_u64;
    let mut random = |below: usize| {
        // The generator of Knuth's MMIX.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below.max(1)
    };
    let signs = [":", "[", "{", "&a", "*a", "\n", "  ", "- ", "null", "1e999", "-1", "\u{0}", "\"", "${a}", "~/x", "é"];
    for (tool, name, text) in published().into_iter().step_by(4) {
        let letters: Vec<char> = text.chars().collect();
        for _ in 0..20 {
            let mut damaged: String = letters[..random(letters.len())].iter().collect();
            for _ in 0..random(4) {
                let at = damaged.char_indices().nth(random(letters.len())).map_or(0, |(at, _)| at);
                damaged.insert_str(at, signs[random(signs.len())]);
            }
            match import(&damaged, &configs().join(&name), Some(tool)) {
                Ok(imported) => drop(recipe(&name, &imported)),
                Err(error @ ImportError::Refused { .. }) => panic!("{name}: {error}\n{damaged}"),
                Err(_) => {}
            }
        }
    }
}

/// (configuration, `data.columns` of the recipe)
#[test]
fn columns_and_words_of_rows_are_carried_over() {
    let axolotl = |set: &str| {
        format!(
            "base_model: a/b\nadapter: lora\nlora_r: 8\nlora_alpha: 16\nlearning_rate: 1e-4\ndatasets:\n  - {set}\n"
        )
    };
    let torchtune = |set: &str| {
        format!(
            "model: {{_component_: torchtune.models.llama3_2.lora_llama3_2_1b}}\ndataset: {{source: csv, data_files: \
             a.csv, {set}}}\noptimizer: {{_component_: torch.optim.AdamW, lr: 1e-4}}\n"
        )
    };
    for (text, columns) in [
        (
            axolotl(
                "{path: a.jsonl, type: chat_template, field_messages: d, roles: {user: [Customer], assistant: [gpt]}}",
            ),
            "assistant_tag=gpt messages=d user_tag=Customer",
        ),
        (
            axolotl("{path: a.jsonl, type: sharegpt, roles: {user: [human], assistant: [gpt, Agent]}}"),
            "assistant_tag=Agent",
        ),
        (axolotl("{path: a.jsonl, type: chat_template, roles: {user: [a, b]}}"), "user_tag=a"),
        (
            torchtune("_component_: torchtune.datasets.instruct_dataset, column_map: {input: question}"),
            "instruction=question",
        ),
        (
            torchtune(
                "_component_: torchtune.datasets.chat_dataset, conversation_style: sharegpt, conversation_column: d",
            ),
            "conversations=d",
        ),
    ] {
        let columns_of = recipe("a.yaml", &imported("a.yaml", &text)).data.columns;
        let found: Vec<String> = columns_of.iter().map(|(ours, theirs)| format!("{ours}={theirs}")).collect();
        assert_eq!(found.join(" "), columns, "{text}");
    }
}

/// (configuration, the line of `data.chat_template_kwargs`, or why there is none)
#[test]
fn variables_of_the_template_are_carried_over() {
    let axolotl = |variables: &str| {
        format!("base_model: a/b\nsequence_len: 512\nchat_template_kwargs: {variables}\nlearning_rate: 1e-4\n")
    };
    let factory = |thinking: &str| {
        format!("model_name_or_path: a/b\nstage: sft\ntemplate: qwen3\n{thinking}\nlearning_rate: 1e-4\n")
    };
    for (text, says) in [
        (axolotl("\n  enable_thinking: No"), "chat_template_kwargs = { enable_thinking = false }  # carried over"),
        (
            axolotl(
                "{date_string: 26 Jul 2024, day: 2026-11-30, n: 3, x: 0.5, \"a b\": [on, \"7\"], in: {n: 1, n: 2}}",
            ),
            "{ date_string = \"26 Jul 2024\", day = \"2026-11-30\", n = 3, x = 0.5, \"a b\" = [true, \"7\"], in = { n = 2 } }",
        ),
        (axolotl("{n: 010}"), "# could not be carried over: chat_template_kwargs = {n: 010} (line 3): not understood"),
        (
            axolotl("{n: 0x1f}"),
            "# could not be carried over: chat_template_kwargs = {n: 0x1f} (line 3): not understood",
        ),
        (axolotl("{n: 99999999999999999999}"), "# could not be carried over: chat_template_kwargs = {n: 9"),
        (axolotl("{thinking: null}"), "# could not be carried over: chat_template_kwargs = {thinking: null} (line 3)"),
        (axolotl("false"), "# could not be carried over: chat_template_kwargs = false (line 3): not understood"),
        (axolotl("{messages: x}"), "has the key `messages`, which is not a template's own"),
        (axolotl("{enable_thinking: \"False\"}"), "has the text \"False\""),
        (axolotl("{}"), "# empty or off there: chat_template_kwargs (line 3)"),
        (factory("enable_thinking: true"), "chat_template_kwargs = { enable_thinking = true }"),
        (factory("enable_thinking: false"), "chat_template_kwargs = { enable_thinking = false }"),
        (factory("enable_thinking: null"), "# could not be carried over: enable_thinking = null (line 4)"),
        (factory("enable_thinking: 2"), "# could not be carried over: enable_thinking = 2 (line 4): not understood"),
    ] {
        let recipe = imported("a.yaml", &text).recipe;
        // Comments are wrapped.
        let lines = recipe.replace("\n# ", " ");
        assert!(recipe.contains(says) || lines.contains(says.trim_start_matches("# ")), "{says}:\n{recipe}");
    }
}
