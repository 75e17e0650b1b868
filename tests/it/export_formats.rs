//! `finetune export` for other programs: GGUF files, mlx-lm's adapters, several adapters in one,
//! number types. That those programs read them is `scripts/check_interchange.py`'s.

use finetune_gguf::{File, TensorType, Value};
use serde_json::json;

use crate::commands::chat_model;
use crate::folder::{CRASH_RECIPE, Folder, golden, tree};

fn trained() -> Folder {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &[]).expect(0);
    folder
}

fn loss(folder: &Folder, model: &[&str]) -> f64 {
    let arguments = [&["eval"], model, &["--data", "eval.jsonl", "--json"]].concat();
    folder.finetune(&arguments).expect(0).json()["loss"].as_f64().expect("a loss")
}

fn export(folder: &Folder, source: &[&str], format: &str, output: &str) {
    folder.finetune(&[&["export"], source, &["--format", format, "--output", output]].concat()).expect(0);
}

/// PEFT's and mlx-lm's forms of one adapter give the same loss to the last bit, and each becomes the
/// other again without a change.
#[test]
fn an_adapter_goes_to_mlx_and_back() {
    let folder = trained();
    export(&folder, &["run"], "mlx", "mlx");
    export(&folder, &["model", "--adapter", "mlx"], "peft", "back");
    export(&folder, &["model", "--adapter", "back"], "mlx", "again");
    let files = |output: &str| tree(&folder.path(output));
    let config: serde_json::Value = serde_json::from_slice(&files("mlx")["adapter_config.json"]).expect("JSON");
    assert_eq!(config["fine_tune_type"], "lora");
    assert_eq!(config["lora_parameters"]["rank"], 4);
    assert_eq!(config["lora_parameters"]["scale"], 2.0);
    assert_eq!(config["lora_parameters"]["dropout"], 0.1);
    let all = json!([
        "mlp.down_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
        "self_attn.v_proj"
    ]);
    assert_eq!(config["lora_parameters"]["keys"], all);
    assert!(files("mlx")["adapters.safetensors"] == files("again")["adapters.safetensors"]);
    assert!(files("back")["adapter_model.safetensors"] == files("run/adapter")["adapter_model.safetensors"]);
    let want = loss(&folder, &["run"]);
    for adapter in ["mlx", "back"] {
        assert_eq!(loss(&folder, &["model", "--adapter", adapter]), want, "{adapter}");
    }
}

/// mlx-lm has one rank and one scale. A branch of another scale has the ratio in B, exactly if it is
/// a power of two. Modules that are not the same in the last layers are named in full.
#[test]
fn patterns_of_ranks_and_alphas_fit_into_mlx() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let patterns = [
        "--set",
        "lora.rank_pattern={q_proj = 2}",
        "--set",
        "lora.alpha_pattern={k_proj = 16, up_proj = 10}",
        "--set",
        "lora.target_modules=[\"q_proj\", \"k_proj\", \"model.layers.0.mlp.up_proj\"]",
    ];
    folder.run("run", &patterns).expect(0);
    let ended = folder.finetune(&["export", "run", "--format", "mlx", "--output", "mlx"]).expect(0);
    let ended = ended.says("filled up to 4 with zeros").says("B of `model.layers.0.mlp.up_proj` is multiplied");
    assert!(!ended.stderr.contains("k_proj` is multiplied"), "2 is exact: {}", ended.stderr);
    let (want, found) = (loss(&folder, &["run"]), loss(&folder, &["model", "--adapter", "mlx"]));
    assert!((want - found).abs() < 1e-6, "{found} against {want}");
}

/// Several adapters are one whose rank is the sum. Weights and `--scale` multiply.
#[test]
fn several_adapters_are_added_up() {
    let folder = trained();
    let (base, with_adapter) = (loss(&folder, &["model"]), loss(&folder, &["run"]));
    let cases: [(&[&str], f64); 4] = [
        (&["--adapter", "run=0.25", "--adapter", "run/adapter=0.75"], with_adapter),
        (&["--adapter", "run=2", "--adapter", "run=-1"], with_adapter),
        (&["--adapter", "run=0.5", "--adapter", "run=0.5", "--scale", "0"], base),
        (&["--adapter", "run=4", "--scale", "0.25"], with_adapter),
    ];
    for (n, (adapters, want)) in cases.into_iter().enumerate() {
        for format in ["merged", "peft", "mlx"] {
            let output = format!("{format}-{n}");
            export(&folder, &[&["model"], adapters].concat(), format, &output);
            let found = match format {
                "merged" => loss(&folder, &[&output]),
                _ => loss(&folder, &["model", "--adapter", &output]),
            };
            assert!((found - want).abs() < 1e-5, "{format} of {adapters:?}: {found} against {want}");
        }
    }
    // The model directory itself is a merge of nothing, in another number type.
    export(&folder, &["model", "--dtype", "bf16"], "merged", "bf16");
    assert!((loss(&folder, &["bf16"]) - base).abs() < 2e-2);
    export(&folder, &["run", "--dtype", "f16"], "merged", "f16");
    let config: serde_json::Value = serde_json::from_slice(&tree(&folder.path("f16"))["config.json"]).expect("JSON");
    assert!(config["dtype"] == "float16" || config["torch_dtype"] == "float16", "{config}");
    assert!((loss(&folder, &["f16"]) - with_adapter).abs() < 2e-2);
}

#[test]
fn a_model_with_its_tokenizer_and_template_in_a_gguf_file() {
    let folder = chat_model();
    let ended = folder.finetune(&["export", "run", "--format", "gguf", "--output", "out"]).expect(0);
    assert!(ended.stdout.starts_with("model-f16.gguf: "), "{}", ended.stdout);
    let file = File::open(&folder.path("out/model-f16.gguf")).expect("a GGUF file");
    let text = |key: &str| file.get(key).and_then(Value::as_str).map(str::to_owned);
    assert_eq!(text("general.architecture").as_deref(), Some("llama"));
    assert_eq!(text("tokenizer.ggml.pre").as_deref(), Some("gpt-2"));
    let template = std::fs::read_to_string(folder.path("model/chat_template.jinja")).expect("a template");
    assert_eq!(text("tokenizer.chat_template"), Some(template));
    let number = |key: &str| file.get(key).and_then(Value::as_u64);
    assert_eq!((number("llama.block_count"), number("llama.vocab_size")), (Some(1), Some(1024)));
    assert_eq!(number("tokenizer.ggml.eos_token_id"), Some(0));
    assert_eq!(file.get("tokenizer.ggml.tokens").and_then(Value::as_array).map(<[Value]>::len), Some(1024));
    let kind = |name: &str| file.tensors().iter().find(|tensor| tensor.name == name).map(|tensor| tensor.kind);
    assert_eq!(kind("token_embd.weight"), Some(TensorType::F16));
    assert_eq!(kind("blk.0.attn_norm.weight"), Some(TensorType::F32));
    assert_eq!(kind("output.weight"), None, "the output layer is the embedding");
    let modelfile = String::from_utf8(tree(&folder.path("out"))["Modelfile"].clone()).expect("text");
    assert!(modelfile.contains("FROM ./model-f16.gguf\n"), "{modelfile}");
    assert!(modelfile.contains("PARAMETER stop \"<|end|>\"\n"), "{modelfile}");
    // An export of the same kind takes its place, one of another does not.
    folder.finetune(&["export", "run", "--format", "gguf", "--dtype", "f32", "--output", "out"]).expect(0);
    let names: Vec<String> = tree(&folder.path("out")).into_keys().collect();
    assert_eq!(names, ["Modelfile", "manifest.json", "model-f32.gguf"]);
    folder.finetune(&["export", "run", "--format", "merged", "--output", "out"]).expect(2).says("a GGUF export");
}

/// In f32 the numbers of the file are those of the merged model, with rows of queries and keys in
/// llama.cpp's order for the families that it turns otherwise.
#[test]
fn numbers_of_gguf_files() {
    let folder = trained();
    export(&folder, &["run"], "merged", "merged");
    export(&folder, &["run", "--dtype", "f32"], "gguf", "gguf");
    let file = File::open(&folder.path("gguf/model-f32.gguf")).expect("a GGUF file");
    let merged = finetune_store::TensorSet::open_model(&folder.path("merged")).expect("a merged model");
    let values = |name: &str| -> Vec<f32> {
        let bytes = merged.get(name).expect(name).bytes().expect("its bytes");
        bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
    };
    for (ours, theirs) in [
        ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"),
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        ("model.layers.1.self_attn.q_norm.weight", "blk.1.attn_q_norm.weight"),
        ("model.embed_tokens.weight", "token_embd.weight"),
    ] {
        assert!(file.values(theirs).expect(theirs) == values(ours), "{theirs}");
    }
    let source = golden("llama").to_string_lossy().into_owned();
    export(&folder, &[&source, "--dtype", "f32"], "gguf", "llama");
    let file = File::open(&folder.path("llama/model-f32.gguf")).expect("a GGUF file");
    let base = finetune_store::TensorSet::open_model(&golden("llama")).expect("a golden model");
    let bytes = base.get("model.layers.0.self_attn.k_proj.weight").expect("a tensor").bytes().expect("its bytes");
    let rows = |bytes: &[u8], at: usize| bytes[at * 32 * 4..(at + 1) * 32 * 4].to_vec();
    let theirs = file.bytes("blk.0.attn_k.weight").expect("its bytes");
    // Heads of 8 elements: the second row is the fifth, the third the second.
    for (at, from) in [(0, 0), (1, 4), (2, 1), (7, 7), (8, 8), (9, 12)] {
        assert!(rows(&theirs, at) == rows(&bytes, from), "row {at}");
    }
}

#[test]
fn an_adapter_alone_in_a_gguf_file() {
    let folder = trained();
    export(&folder, &["run", "--adapter-only"], "gguf", "out");
    let file = File::open(&folder.path("out/adapter.gguf")).expect("a GGUF file");
    let text = |key: &str| file.get(key).and_then(Value::as_str).map(str::to_owned);
    assert_eq!(text("general.type").as_deref(), Some("adapter"));
    assert_eq!(text("adapter.type").as_deref(), Some("lora"));
    assert_eq!(text("general.architecture").as_deref(), Some("qwen3"));
    assert_eq!(file.get("adapter.lora.alpha"), Some(&Value::F32(8.0)));
    let adapter =
        finetune_store::TensorFile::open(&folder.path("run/adapter/adapter_model.safetensors")).expect("an adapter");
    assert_eq!(file.tensors().len(), adapter.names().count());
    for half in ["lora_A", "lora_B"] {
        let ours = format!("base_model.model.model.layers.0.self_attn.q_proj.{half}.weight");
        let theirs = format!("blk.0.attn_q.weight.{}", half.to_lowercase());
        let bytes = adapter.get(&ours).expect("a tensor").bytes().expect("its bytes");
        assert!(file.bytes(&theirs).expect("its bytes") == bytes, "{half}");
    }
    let modelfile = String::from_utf8(tree(&folder.path("out"))["Modelfile"].clone()).expect("text");
    assert!(modelfile.contains("ADAPTER ./adapter.gguf\n"), "{modelfile}");
}

/// (arguments after `export`, part of the refusal)
#[test]
fn exports_that_are_refused() {
    let folder = trained();
    let table: [(&[&str], &str); 11] = [
        (&["run", "--format", "peft", "--dtype", "bf16"], "an adapter stays in f32"),
        (&["run", "--format", "merged", "--dtype", "q8_0"], "q8_0 is a type of whole models in GGUF files"),
        (&["run", "--format", "gguf", "--adapter-only", "--dtype", "q8_0"], "q8_0 is a type of whole models"),
        (&["run", "--format", "mlx", "--adapter-only"], "--adapter-only is for --format gguf"),
        (&["run", "--format", "merged", "--scale", "inf"], "--scale is no finite number"),
        (&["model", "--format", "merged"], "with no adapter to export"),
        (&["model", "--format", "gguf", "--adapter-only"], "has no adapter"),
        (&["model", "--format", "gguf", "--scale", "2"], "has no adapter"),
        (&["run", "--format", "peft", "--adapter", "run"], "with --adapter a model directory is meant"),
        (&["no\u{1b}[2Jrun", "--format", "peft"], r"there is no no\u{1b}[2Jrun"),
        (&["model", "--format", "merged", "--adapter", "run=much"], "after `=` belongs the adapter's weight"),
    ];
    for (arguments, part) in table {
        let arguments = [&["export"], arguments, &["--output", "out"]].concat();
        folder.finetune(&arguments).expect(2).says(part);
        assert!(!folder.path("out").exists(), "{arguments:?}");
    }
    // A layer that llama.cpp would compute otherwise is named.
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.path("model/config.json")).expect("a config")).expect("JSON");
    config["rope_parameters"] = json!({"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16});
    folder.write("model/config.json", config.to_string().as_bytes());
    let gguf = ["export", "model", "--format", "gguf", "--output", "out"];
    folder.finetune(&gguf).expect(2).says("its `qwen3` has no rope scaling `llama3`");
}
