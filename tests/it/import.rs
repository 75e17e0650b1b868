//! `finetune import`: configurations of other tools. What their keys become is tested in
//! crates/import; here is what a user types and reads.

use crate::folder::Folder;

const AXOLOTL: &str = "\
base_model: Qwen/Qwen3-0.6B
adapter: lora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
datasets:
  - path: rows.jsonl
    type: chat_template
micro_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 1e-4
neftune_noise_alpha: 5
";

#[test]
fn a_recipe_goes_to_stdout_and_the_summary_to_stderr() {
    let folder = Folder::empty();
    folder.write("lora.yml", AXOLOTL.as_bytes());
    let ended = folder.finetune(&["import", "lora.yml"]).expect(0);
    for line in [
        "rank = 8  # carried over: lora_r (line 3)",
        "learning_rate = 0.0001  # carried over: learning_rate (line 11)",
        "global_batch_size = 8",
        "# could not be carried over: neftune_noise_alpha = 5 (line 12): no noise is added to embeddings",
    ] {
        assert!(ended.stdout.contains(line), "{line}:\n{}", ended.stdout);
    }
    ended.says("lora.yml is a configuration of axolotl: 6 keys carried over");
    let quiet = folder.finetune(&["import", "lora.yml", "--quiet"]).expect(0);
    assert_eq!((quiet.stdout, quiet.stderr.as_str()), (ended_recipe(&folder), ""));
}

/// The recipe as `--output` writes it.
fn ended_recipe(folder: &Folder) -> String {
    folder.finetune(&["import", "lora.yml", "--output", "recipe.toml"]).expect(0).says("finetune validate recipe.toml");
    std::fs::read_to_string(folder.path("recipe.toml")).expect("a recipe")
}

#[test]
fn nothing_is_written_over() {
    let folder = Folder::empty();
    folder.write("lora.yml", AXOLOTL.as_bytes());
    folder.write("recipe.toml", b"mine");
    folder
        .finetune(&["import", "lora.yml", "--output", "recipe.toml"])
        .expect(2)
        .says("recipe.toml is there already, and nothing is written over");
    assert_eq!(std::fs::read(folder.path("recipe.toml")).expect("the file"), b"mine");
}

/// (content, arguments after the file, part of the error)
#[test]
fn files_that_are_none_of_the_four() {
    let folder = Folder::empty();
    for (content, arguments, says) in [
        (
            "a: 1\nb: 2\n",
            &[][..],
            "x.yml: not a configuration of axolotl, LLaMA-Factory, torchtune or mlx-lm: its keys are a, b",
        ),
        ("a: [1\n", &[], "not YAML"),
        ("{}\n", &[], "it has no keys"),
        (
            "base_model: a/b\nadapter: lora\nmodel: a/b\niters: 3\n",
            &[],
            "say whose it is: --from axolotl or --from mlx-lm",
        ),
        (
            "model:\n  _component_: torchtune.models.llama2.llama2_7b\n",
            &[],
            "torchtune's, but it does not describe a training",
        ),
        ("a: 1\n", &["--from", "torchtune"], "it has no optimizer or no dataset"),
        ("\u{fffd}", &[], "a text without keys"),
    ] {
        folder.write("x.yml", content.as_bytes());
        let ended = folder.finetune(&[&["import", "x.yml"], arguments].concat()).expect(2).says(says);
        assert_eq!(ended.stdout, "", "{content}");
    }
    folder.finetune(&["import", "nope.yml"]).expect(2).says("nope.yml: cannot read it");
    folder.write("ours.toml", b"[model]\npath = \"m\"\n");
    folder.finetune(&["import", "ours.toml"]).expect(2).says("ours.toml is a recipe already");
}

/// A YAML file in the place of a recipe is answered with the command.
#[test]
fn a_run_of_another_tools_file_names_the_command() {
    let folder = Folder::empty();
    folder.write("lora.yml", AXOLOTL.as_bytes());
    folder
        .finetune(&["run", "lora.yml"])
        .expect(2)
        .says("`finetune import lora.yml --output recipe.toml` makes one of it");
}
