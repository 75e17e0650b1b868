//! Packed bases in the whole program: `quantize`, `model.quantization`, and what becomes of a run over
//! them. The base is the quickstart's: 128 columns, which fill groups of 64, and 352, which do not.

use serde_json::Value;

use crate::folder::{Folder, metrics, repository, tree};
use crate::program::run;

const SCHEMES: [&str; 5] = ["mlx4", "mlx8", "mxfp4", "nf4", "int8"];

const RECIPE: &str = r#"output_dir = "run"
seed = 7
[model]
path = "model"
device = "cpu"
[lora]
rank = 4
alpha = 8
dropout = 0.1
[data]
train = "train.jsonl"
eval = "eval.jsonl"
max_seq_len = 128
[train]
max_steps = 6
global_batch_size = 4
micro_batch_size = 2
[optimizer]
learning_rate = 5e-3
[schedule]
name = "constant"
[eval]
every = 3
[checkpoint]
every = 2
keep_last = 2
result = "last"
"#;

/// The quickstart's base in `model`, some of its rows, and a recipe.
fn quickstart() -> Folder {
    let folder = Folder::empty();
    std::fs::create_dir(folder.path("model")).expect("a new directory");
    let quickstart = repository().join("datasets/quickstart");
    for entry in std::fs::read_dir(quickstart.join("base")).expect("the base") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy();
        folder.write(&format!("model/{name}"), &std::fs::read(&path).expect("a file"));
    }
    for (from, to, rows) in [("train.jsonl", "train.jsonl", 24), ("valid.jsonl", "eval.jsonl", 6)] {
        let text = std::fs::read_to_string(quickstart.join(from)).expect("rows");
        let rows: String = text.split_inclusive('\n').take(rows).collect();
        folder.write(to, rows.as_bytes());
    }
    folder.write("recipe.toml", RECIPE.as_bytes());
    folder
}

/// `finetune quantize model --to SCHEME --output OUTPUT`.
fn quantize(folder: &Folder, scheme: &str, output: &str) -> String {
    folder.finetune(&["quantize", "model", "--to", scheme, "--output", output]).expect(0).stdout
}

fn loss(folder: &Folder, arguments: &[&str]) -> f64 {
    let arguments = [&["eval"], arguments, &["--data", "eval.jsonl", "--json"]].concat();
    folder.finetune(&arguments).expect(0).json()["loss"].as_f64().expect("a loss")
}

/// The evaluation of the last step in a run's metrics.
fn last_evaluation(folder: &Folder, output: &str) -> f64 {
    let rows = metrics(&folder.path(output));
    rows.iter().rev().find_map(|row| row.get("eval_loss")?.as_f64()).expect("an evaluation")
}

/// (the form, how far the loss may be from that of the model in f32)
#[test]
fn every_form_is_written_and_answers_nearly_as_the_model() {
    let folder = quickstart();
    let dense = loss(&folder, &["model"]);
    for (scheme, near) in [("mlx4", 0.5), ("mlx8", 0.05), ("mxfp4", 0.8), ("nf4", 0.5), ("int8", 0.05)] {
        let text = quantize(&folder, scheme, scheme);
        assert!(text.contains(&format!(" in {scheme}: ")) && text.contains("bits a weight"), "{text}");
        // What does not fill its groups stays, and is named.
        let stays = text.contains("mlp.down_proj of 4 layers: its 352 columns are no multiple of 64");
        assert_eq!(stays, scheme.starts_with("mlx"), "{text}");
        let reader = if scheme.starts_with('m') { "mlx-lm" } else { "transformers with bitsandbytes" };
        assert!(text.contains(&format!("loads in    {reader}")), "{text}");
        let packed = loss(&folder, &[scheme]);
        assert!(packed != dense && (packed - dense).abs() < near, "{scheme}: {packed} against {dense}");
        // The same form, made while the model is loaded.
        assert_eq!(loss(&folder, &["model", "--quantization", scheme]), packed, "{scheme}");
    }
    let (dense, packed) = (tree(&folder.path("model")), tree(&folder.path("mlx4")));
    assert!(packed["model.safetensors"].len() * 2 < dense["model.safetensors"].len());
    assert!(packed["tokenizer.json"] == dense["tokenizer.json"], "what goes along is copied");
}

#[test]
fn quantize_tells_programs_what_came_of_it() {
    let folder = quickstart();
    let arguments = ["quantize", "model", "--to", "mlx4", "--output", "packed", "--json"];
    let ended = folder.finetune(&arguments).expect(0);
    assert_eq!(ended.stderr, "");
    let object = ended.json();
    assert_eq!((object["scheme"].as_str(), object["loads_in"].as_str()), (Some("mlx4"), Some("mlx-lm")));
    let kept = object["kept"].as_array().expect("a list");
    assert_eq!(kept.len(), 4, "one of each layer: {object}");
    assert_eq!(kept[0]["name"], "model.layers.0.mlp.down_proj.weight");
    let bytes = |key: &str| object[key].as_u64().expect("a number");
    assert!(bytes("bytes") * 2 < bytes("bytes_before"), "{object}");
    // It replaces a packed model of before, and nothing else. What does not go along is named.
    folder.write("model/audio.wav", b"RIFF");
    folder.finetune(&arguments[..6]).expect(0).says("left out    audio.wav");
    std::fs::create_dir(folder.path("mine")).expect("a new directory");
    folder.write("mine/notes.txt", b"keep");
    folder.finetune(&["quantize", "model", "--to", "mlx4", "--output", "mine"]).expect(2).says("mine");
    assert_eq!(tree(&folder.path("mine")).len(), 1);
}

/// (arguments, what is said)
#[test]
fn what_cannot_be_packed_is_refused_by_name() {
    let folder = quickstart();
    quantize(&folder, "nf4", "packed");
    folder.run("run", &["--set", "train.max_steps=1"]).expect(0);
    folder.write("tiny.gguf", b"GGUF\x03\0\0\0");
    let to = ["--to", "mlx4", "--output", "out"];
    for (arguments, says) in [
        (vec!["quantize", "packed"], "packed is packed already: bitsandbytes NF4"),
        (vec!["quantize", "run"], "is an adapter"),
        (vec!["quantize", "tiny.gguf"], "tiny.gguf is a GGUF file"),
        (vec!["quantize", "nowhere"], "there is no nowhere"),
    ] {
        let ended = folder.finetune(&[&arguments[..], &to].concat()).expect(2).says(says);
        assert!(!folder.path("out").exists(), "{arguments:?}: {}", ended.stderr);
    }
    for (arguments, says) in [
        (vec!["quantize", "model", "--to", "mlx4", "--output", "model"], "model holds model"),
        (vec!["quantize", "model", "--to", "q4_k_m", "--output", "out"], "q4_k_m"),
        (vec!["export", "run", "--format", "peft", "--quantize", "nf4", "--output", "out"], "for --format merged"),
    ] {
        folder.finetune(&arguments).expect(2).says(says);
    }
}

/// A newcomer's way over a packed base: check, train, look, ask, export.
#[test]
fn a_run_over_a_packed_base() {
    let folder = quickstart();
    quantize(&folder, "mlx4", "packed");
    let path = ["--set", "model.path=packed"];
    let found = folder.finetune(&[&["validate", "recipe.toml"], &path[..]].concat()).expect(0).stdout;
    assert!(found.contains("MLX 4-bit, groups of 64") && found.contains("matrices packed"), "{found}");
    folder.run("run", &path).expect(0);
    let trained = loss(&folder, &["run"]);
    assert!((trained - last_evaluation(&folder, "run")).abs() < 1e-4, "{trained}");
    assert!(trained < loss(&folder, &["packed"]), "something was learned");
    let prompt = ["generate", "run", "--prompt", "Hi. My lamp is broken.", "--max-new-tokens", "4", "--json"];
    assert!(folder.finetune(&prompt).expect(0).json()["token_ids"].as_array().is_some_and(|ids| !ids.is_empty()));

    // A merge decodes the base that was trained on, and says so.
    let merge = ["export", "run", "--format", "merged", "--output"];
    let ended = folder.finetune(&[&merge[..], &["merged"]].concat()).expect(0);
    ended.says("merged into the packed weights of ").says("packed (MLX 4-bit");
    assert!((loss(&folder, &["merged"]) - trained).abs() < 1e-3);
    let config: Value = serde_json::from_slice(&tree(&folder.path("merged"))["config.json"]).expect("JSON");
    assert!(config.get("quantization").is_none() && config.get("quantization_config").is_none(), "{config}");

    // Packed again only if it is asked for, with what that costs.
    let quantized =
        |scheme: &str| folder.finetune(&[&merge[..], &[scheme, "--quantize", scheme]].concat()).expect(0).stdout;
    let (four, eight) = (quantized("mlx4"), quantized("mlx8"));
    // What was packed once stays where it was: most of the change is rounded away.
    assert!(four.starts_with("warning: of the change") && four.contains("% survives in 4 bits; keep the adapter"));
    assert!(eight.starts_with("of the change") && eight.contains("% survives in 8 bits"), "{eight}");
    assert!((loss(&folder, &["mlx8"]) - trained).abs() < 0.1);

    folder.finetune(&["export", "run", "--format", "mlx", "--output", "for-mlx"]).expect(0);
    let config: Value = serde_json::from_slice(&tree(&folder.path("for-mlx"))["adapter_config.json"]).expect("JSON");
    assert!(config["model"].as_str().is_some_and(|name| name.ends_with("packed")), "{config}");
    let gguf = ["export", "run", "--format", "gguf", "--output", "gguf"];
    folder.finetune(&gguf).expect(0).says("the packed weights of");
}

/// Packing while loading has the bits of the directory that `quantize` writes.
#[test]
fn packing_while_loading_is_the_packed_directory() {
    let folder = quickstart();
    for scheme in SCHEMES {
        quantize(&folder, scheme, scheme);
        let (loaded, written) = (format!("{scheme}-loaded"), format!("{scheme}-written"));
        folder.run(&loaded, &["--set", &format!("model.quantization={scheme}")]).expect(0);
        folder.run(&written, &["--set", &format!("model.path={scheme}")]).expect(0);
        let (loaded, written) = (folder.result(&loaded), folder.result(&written));
        assert_eq!(loaded.metrics, written.metrics, "{scheme}");
        let name = "adapter/adapter_model.safetensors";
        assert!(loaded.files[name] == written.files[name], "{scheme}: another adapter");
    }
    // A base that is packed stays as it is, and that is said.
    let sets = ["--set", "model.path=mlx8", "--set", "model.quantization=nf4"];
    folder.run("twice", &sets).expect(0).says("packed already");
    assert_eq!(folder.result("twice").metrics, folder.result("mlx8-written").metrics);
}

/// An adapter remembers how its base was packed, in the run, as a checkpoint and as an export.
#[test]
fn an_adapter_is_used_over_its_base_as_it_was_trained() {
    let folder = quickstart();
    folder.run("run", &["--set", "model.quantization=nf4"]).expect(0);
    let want = last_evaluation(&folder, "run");
    folder.finetune(&["export", "run", "--format", "peft", "--output", "adapter"]).expect(0).says("nf4");
    std::fs::rename(folder.path("run/checkpoints/step-000006"), folder.path("checkpoint")).expect("a checkpoint");
    for adapter in ["run", "adapter", "checkpoint"] {
        let arguments = ["eval", "model", "--adapter", adapter, "--data", "eval.jsonl", "--json"];
        let ended = folder.finetune(&arguments).expect(0).says("packed as nf4 while it is loaded");
        let found = ended.json()["loss"].as_f64().expect("a loss");
        assert!((found - want).abs() < 1e-4, "{adapter}: {found} against {want}");
    }
    folder.finetune(&["export", "adapter", "--format", "merged", "--output", "merged"]).expect(0).says("nf4");
    assert!((loss(&folder, &["merged"]) - want).abs() < 1e-3);
    // Another form is used if it is asked for, with a word about it.
    let other = ["eval", "run", "--quantization", "int8", "--data", "eval.jsonl"];
    folder.finetune(&other).expect(0).says("packed as nf4");
}

/// A killed run goes on to the same bits, over either kind of packed base.
#[test]
fn a_resumed_run_over_a_packed_base_has_the_same_bits() {
    let folder = quickstart();
    quantize(&folder, "mxfp4", "packed");
    for set in ["model.path=packed", "model.quantization=nf4"] {
        let arguments = ["--resume", "--set", set];
        folder.run("undisturbed", &arguments).expect(0);
        let want = folder.result("undisturbed");
        for failpoint in ["train.step:4", "checkpoint.file:3"] {
            assert!(folder.run_killed_at("run", &arguments, failpoint), "{set} {failpoint}");
            folder.run("run", &arguments).expect(0);
            folder.result("run").expect_same(&want, &format!("{set} {failpoint}"));
            std::fs::remove_dir_all(folder.path("run")).expect("it is there");
        }
        std::fs::remove_dir_all(folder.path("undisturbed")).expect("it is there");
    }
    // Over another form it is another run.
    assert!(folder.run_killed_at("run", &["--set", "model.quantization=nf4"], "train.step:4"));
    let other = ["--resume", "--set", "model.quantization=int8"];
    folder.run("run", &other).expect(2).says("model.quantization");
}

/// Two processes make the bits of one.
#[test]
fn two_ranks_over_a_packed_base_are_one() {
    let folder = quickstart();
    quantize(&folder, "mlx4", "packed");
    for set in ["model.path=packed", "model.quantization=int8"] {
        let words = ["--set", set, "--set", "distributed.virtual_ranks=2"];
        folder.run("one", &words).expect(0);
        run(&mut folder.launch(&["-n", "2"], "two", &words)).expect(0);
        folder.result("two").expect_same(&folder.result("one"), set);
        for output in ["one", "two"] {
            std::fs::remove_dir_all(folder.path(output)).expect("it is there");
        }
    }
}

/// A GGUF file is a base with its tokenizer, also as the only one of a directory.
#[test]
fn a_gguf_file_is_a_base() {
    let folder = quickstart();
    folder.finetune(&["export", "model", "--format", "gguf", "--dtype", "q8_0", "--output", "gguf"]).expect(0);
    let file = "gguf/model-q8_0.gguf";
    let dense = loss(&folder, &["model"]);
    for name in [file, "gguf"] {
        assert!((loss(&folder, &[name]) - dense).abs() < 0.05, "{name}");
    }
    let set = format!("model.path={file}");
    folder.finetune(&["validate", "recipe.toml", "--set", &set]).expect(0);
    folder.run("run", &["--set", &set]).expect(0);
    let trained = loss(&folder, &["run"]);
    assert!((trained - last_evaluation(&folder, "run")).abs() < 1e-4);
    folder.finetune(&["generate", "run", "--prompt", "Hi", "--max-new-tokens", "3"]).expect(0);
    folder.finetune(&["export", "run", "--format", "merged", "--output", "merged"]).expect(0);
    assert!((loss(&folder, &["merged"]) - trained).abs() < 0.05);
    folder.finetune(&["quantize", file, "--to", "mlx4", "--output", "out"]).expect(2).says("is a GGUF file");
}
