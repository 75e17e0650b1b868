//! Model directories as they are found: other heads, extra tensors, odd configs, numbers that are
//! not finite, links.

use std::path::Path;

use finetune_advice::Advice as _;
use finetune_model::adapter::Adapter;
use finetune_model::merge::{MergedForm, companion_files, left_out, write_merged};
use finetune_model::{Model, ModelConfig, ModelError, Placement, expected_tensors};
use finetune_store::{Dtype, RealDisk, Staging, StoreError};
use serde_json::{Value, json};

use crate::made::{Tensor, f32s, floats, golden, model, put, read_json, write, write_tensors};

mod made;

fn load(directory: &Path) -> Result<Model, ModelError> {
    Model::load(directory, &Placement::cpu(None))
}

const TOKENS: [u32; 7] = [5, 17, 42, 9, 33, 8, 61];

fn bits(directory: &Path) -> Vec<u32> {
    let logits = load(directory).expect("the model").logits(&TOKENS).expect("logits");
    logits.iter().map(|logit| logit.to_bits()).collect()
}

fn add(tensors: &mut Vec<Tensor>, name: &str, shape: &[usize], value: f32) {
    let count: usize = shape.iter().product();
    tensors.push((name.to_owned(), Dtype::F32, shape.to_vec(), f32s(&vec![value; count])));
}

/// The embedding as an output layer of its own, times a factor.
fn add_head(tensors: &mut Vec<Tensor>, factor: f32) {
    let embedding =
        tensors.iter().find(|tensor| tensor.0 == "model.embed_tokens.weight").expect("an embedding").clone();
    let values: Vec<f32> = floats(&embedding.3).iter().map(|value| value * factor).collect();
    tensors.push(("lm_head.weight".to_owned(), Dtype::F32, embedding.2, f32s(&values)));
}

/// transformers keeps the two apart if they differ, whatever config.json says (since 5.8).
#[test]
fn an_output_layer_of_its_own_is_used() {
    for family in ["llama", "qwen2"] {
        let untied = model(family, |config, tensors| {
            config["tie_word_embeddings"] = json!(false);
            add_head(tensors, -1.5);
        });
        let other = model(family, |_, tensors| add_head(tensors, -1.5));
        assert!(bits(other.path()) == bits(untied.path()), "{family}: the head of the file");
        assert!(bits(other.path()) != bits(&golden(family)), "{family}");
        let config = Model::check(other.path()).expect("a config");
        assert!(config.notices[0].contains("lm_head.weight"), "{:?}", config.notices);
        let names: Vec<String> = expected_tensors(&config).into_iter().map(|(name, _)| name).collect();
        assert!(names.contains(&"lm_head.weight".to_owned()), "it is counted and, with all weights, trained");
        // config.json tells readers that do not compare.
        let files = companion_files(other.path(), Dtype::F32, &[]).expect("files");
        let config: Value = serde_json::from_slice(&files[0].1).expect("JSON");
        assert_eq!((files[0].0.as_str(), &config["tie_word_embeddings"]), ("config.json", &json!(false)));
        // The same values twice are tied.
        let same = model(family, |_, tensors| add_head(tensors, 1.0));
        assert!(bits(same.path()) == bits(&golden(family)), "{family}: the same values");
        let config = ModelConfig::load(same.path()).expect("a config");
        assert!(config.tied_embeddings && config.notices.is_empty(), "{:?}", config.notices);
    }
}

/// (a tensor beyond the config's, its shape, whether it is passed over and named, passed over in
/// silence, or refused)
#[test]
fn extra_tensors() {
    const NAMED: Option<bool> = Some(true);
    const SILENT: Option<bool> = Some(false);
    let layer = "model.layers.0.";
    for (name, shape, want) in [
        ("v_head.summary.weight".to_owned(), vec![1, 32], NAMED),
        ("score.weight".to_owned(), vec![2, 32], NAMED),
        (format!("{layer}self_attn.k_proj.k_scale"), vec![1], NAMED),
        (format!("{layer}self_attn.v_scale"), vec![1], NAMED),
        (format!("{layer}self_attn.masked_bias"), vec![], NAMED),
        (format!("{layer}self_attn.bias"), vec![1, 1, 8, 8], NAMED),
        (format!("{layer}mlp.empty.weight"), vec![0, 4], NAMED),
        (format!("{layer}self_attn.rotary_emb.cos_cached"), vec![8, 8], NAMED),
        // Frequencies that are not the config's.
        (format!("{layer}self_attn.rotary_emb.inv_freq"), vec![4], NAMED),
        (format!("{layer}self_attn.o_proj.bias"), vec![32], None),
        (format!("{layer}mlp.up_proj.bias"), vec![80], None),
        (format!("{layer}mlp.up_proj.weight_scale"), vec![80], None),
        (format!("{layer}post_feedforward_layernorm.weight"), vec![32], None),
        ("model.layers.3.input_layernorm.weight".to_owned(), vec![32], None),
        ("lm_head.bias".to_owned(), vec![96], None),
    ] {
        let made = model("llama", |_, tensors| add(tensors, &name, &shape, 3.0));
        check_extra(made.path(), &name, want);
    }
    let frequencies = ModelConfig::load(&golden("llama")).expect("a config").ropes[0].frequencies();
    let name = format!("{layer}self_attn.rotary_emb.inv_freq");
    let made = model("llama", |_, tensors| {
        tensors.push((name.clone(), Dtype::F32, vec![frequencies.len()], f32s(&frequencies)));
    });
    check_extra(made.path(), &name, SILENT);
}

fn check_extra(directory: &Path, name: &str, want: Option<bool>) {
    match (load(directory), want) {
        (Ok(model), Some(named)) => {
            assert_eq!(model.notices().iter().any(|notice| notice.contains(name)), named, "{name}");
            assert!(bits(directory) == bits(&golden("llama")), "{name}");
        }
        (Err(error), None) => {
            assert!(error.to_string().contains(name), "{error}");
            assert!(!error.hints()[0].contains("download"), "{error}: {:?}", error.hints());
        }
        (found, want) => panic!("{name}: {:?}, expected {want:?}", found.map(|model| model.notices().to_vec())),
    }
}

/// An index that leaves a tensor out: the tensor is used, and a notice says so.
#[test]
fn tensors_that_the_index_leaves_out() {
    let made = model("llama", |_, _| {});
    let tensors = made::read_tensors(&made.path().join("model.safetensors"));
    let (first, second) = tensors.split_at(5);
    write_tensors(&made.path().join("a.safetensors"), first);
    write_tensors(&made.path().join("b.safetensors"), second);
    std::fs::remove_file(made.path().join("model.safetensors")).expect("removed");
    let of = |tensors: &[Tensor], file: &str| -> Vec<(String, Value)> {
        tensors.iter().map(|tensor| (tensor.0.clone(), json!(file))).collect()
    };
    let mut map: serde_json::Map<String, Value> =
        of(first, "a.safetensors").into_iter().chain(of(second, "b.safetensors")).collect();
    map.remove(&first[1].0).expect("it was there");
    write(&made.path().join("model.safetensors.index.json"), json!({"weight_map": map}).to_string());
    let model = load(made.path()).expect("the model");
    assert!(model.notices()[0].contains(&first[1].0), "{:?}", model.notices());
    assert!(bits(made.path()) == bits(&golden("llama")));
}

fn parse(family: &str, change: impl FnOnce(&mut Value)) -> Result<ModelConfig, ModelError> {
    let mut config = read_json(&golden(family).join("config.json"));
    change(&mut config);
    ModelConfig::parse(&config.to_string(), Path::new("config.json"))
}

/// (key, value): each is refused with file and key.
#[test]
fn numbers_of_a_config_have_ranges() {
    let linear = |factor: f64| json!({"rope_type": "linear", "factor": factor, "rope_theta": 10000.0});
    let llama3 = |low: f64, high: f64, original: f64| {
        json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": original, "rope_theta": 10000.0})
    };
    for (key, value, part) in [
        ("rope_parameters", json!({"rope_theta": 0.0}), "rope_theta"),
        ("rope_parameters", json!({"rope_theta": -1.0}), "rope_theta"),
        ("rope_parameters", json!({"rope_theta": 1e300}), "rope_theta"),
        ("rope_parameters", linear(0.0), "factor"),
        ("rope_parameters", linear(-2.0), "factor"),
        ("rope_parameters", llama3(0.0, 4.0, 64.0), "low_freq_factor"),
        ("rope_parameters", llama3(4.0, 4.0, 64.0), "high_freq_factor"),
        ("rope_parameters", llama3(1.0, 4.0, -64.0), "original_max_position_embeddings"),
        ("rope_parameters", json!({"rope_type": "longrope", "factor": 4.0}), "`short_factor` should be a list of 4"),
        ("rms_norm_eps", json!(-1.0), "rms_norm_eps"),
        ("rms_norm_eps", json!(0), "rms_norm_eps"),
        ("rms_norm_eps", json!(1e30), "rms_norm_eps"),
        ("initializer_range", json!(-0.02), "initializer_range"),
        ("initializer_range", json!(1e9), "initializer_range"),
        ("attention_dropout", json!(1.5), "attention_dropout"),
        ("eos_token_id", json!(1_000_000_000_000u64), "eos_token_id"),
        ("eos_token_id", json!(-1), "eos_token_id"),
        ("eos_token_id", json!({"a": 1}), "eos_token_id"),
        ("eos_token_id", json!([2, 96]), "eos_token_id"),
        ("eos_token_id", json!("</s>"), "eos_token_id"),
        ("hidden_size", json!(0), "hidden_size"),
        ("vocab_size", json!(1u64 << 40), "vocab_size"),
        ("max_position_embeddings", json!(-5), "max_position_embeddings"),
    ] {
        let error = parse("llama", |config| config[key] = value.clone()).expect_err(key).to_string();
        assert!(error.contains("config.json") && error.contains(part), "{key} = {value}: {error}");
    }
    let huge = parse("llama", |config| {
        for key in ["hidden_size", "intermediate_size", "vocab_size"] {
            config[key] = json!(1 << 24);
        }
        config["num_hidden_layers"] = json!(4096);
    });
    assert!(huge.is_err_and(|error| error.to_string().contains("weights, more than any model has")));
    for value in [json!(2), json!([2, 95]), json!([]), Value::Null] {
        parse("llama", |config| config["eos_token_id"] = value.clone()).expect("tokens of the vocabulary");
    }
}

/// Settings that change nothing here, or change training only, or have a way out.
#[test]
fn settings_of_others() {
    let plain = parse("llama", |_| {}).expect("a config");
    assert_eq!(parse("llama", |config| config["hidden_act"] = json!("swish")).expect("silu's other name"), plain);
    let dropout = parse("llama", |config| config["attention_dropout"] = json!(0.1)).expect("a config");
    assert!(dropout.notices[0].contains("attention_dropout = 0.1"), "{:?}", dropout.notices);
    assert_eq!(ModelConfig { notices: vec![], ..dropout }, plain);
    for (key, value, hint) in [
        ("rope_parameters", json!({"rope_type": "dynamic", "factor": 4.0}), "max_position_embeddings"),
        ("quantization_config", json!("fp8"), "fetch it again"),
    ] {
        let error = parse("llama", |config| config[key] = value).expect_err(key);
        assert!(error.hints()[0].contains(hint), "{error}: {:?}", error.hints());
    }
    // Each class has its own length if config.json leaves it out.
    for (family, length) in [("llama", 2048), ("mistral", 131_072), ("qwen2", 32_768)] {
        let without = parse(family, |config| {
            config.as_object_mut().expect("an object").remove("max_position_embeddings");
        });
        let config = without.expect("a config");
        assert_eq!(config.max_position_embeddings, length, "{family}");
        assert_eq!(config.length_notice(length), None);
        assert!(config.length_notice(length + 1).is_some_and(|notice| notice.contains(&length.to_string())));
    }
}

/// (model_type, architectures, the class that it is read as, whether a notice says so):
/// transformers goes by the type.
#[test]
fn the_type_says_what_a_model_is() {
    let table: [(Value, Value, Option<&str>, bool); 9] = [
        (json!("mistral"), json!(["MistralForCausalLM"]), Some("MistralForCausalLM"), false),
        (json!("mistral"), json!(["LlamaForCausalLM"]), Some("MistralForCausalLM"), true),
        (json!("llama"), json!(["LLaMAForCausalLM"]), Some("LlamaForCausalLM"), true),
        (json!("llama"), Value::Null, Some("LlamaForCausalLM"), false),
        (Value::Null, json!(["MistralForCausalLM"]), Some("MistralForCausalLM"), false),
        (json!("llava"), json!(["LlamaForCausalLM"]), None, false),
        (json!("gpt2"), json!(["GPT2LMHeadModel"]), None, false),
        (json!("mistral"), json!(["MistralForSequenceClassification"]), None, false),
        (Value::Null, Value::Null, None, false),
    ];
    for (kind, architectures, want, said) in table {
        let parsed = parse("mistral", |config| {
            config["model_type"] = kind.clone();
            config["architectures"] = architectures.clone();
        });
        let shown = format!("{kind} {architectures}: {parsed:?}");
        match (parsed, want) {
            (Ok(config), Some(class)) => {
                assert_eq!((config.family.architecture, !config.notices.is_empty()), (class, said), "{shown}");
                assert_eq!(config.layers[0].window.is_some(), class.starts_with("Mistral"), "{shown}");
            }
            (Err(ModelError::Architecture { .. }), None) => {}
            _ => panic!("{shown}, expected {want:?}"),
        }
    }
}

#[test]
fn numbers_that_are_none_are_found_while_loading() {
    let of_dtype = |dtype: Dtype| {
        move |tensors: &mut Vec<Tensor>| {
            for tensor in tensors.iter_mut().filter(|_| dtype == Dtype::BF16) {
                let upper: Vec<u8> = tensor.3.chunks_exact(4).flat_map(|b| [b[2], b[3]]).collect();
                (tensor.1, tensor.3) = (dtype, upper.into());
            }
        }
    };
    for name in ["model.norm.weight", "model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight"] {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for dtype in [Dtype::F32, Dtype::BF16] {
                let made = model("llama", |_, tensors| {
                    put(tensors, name, 17, value);
                    of_dtype(dtype)(tensors);
                });
                let loaded = load(made.path()).expect_err("not finite");
                let checked = Model::check(made.path()).expect_err("not finite");
                for error in [loaded, checked] {
                    assert!(error.is_about_numbers(), "{error}");
                    assert!(error.to_string().contains(name) && error.to_string().contains("element 17"), "{error}");
                }
            }
        }
    }
    // Finite, but not in the type that was asked for.
    let made = model("llama", |_, tensors| put(tensors, "model.embed_tokens.weight", 0, 1e6));
    let at = Placement::cpu(Some(finetune_model::FloatType::F16));
    let error = Model::load(made.path(), &at).expect_err("beyond f16");
    assert!(error.to_string().contains("once rounded to f16") && error.hints()[0].contains("bf16"), "{error}");
    load(made.path()).expect("fine in f32");
}

fn merge(base: &Path, adapter: &Adapter) -> Result<(), ModelError> {
    let parent = tempfile::tempdir().expect("a directory");
    let merged = {
        let mut staging = Staging::begin(&RealDisk, parent.path(), "merged").expect("a new directory");
        write_merged(&RealDisk, base, adapter, &mut staging, MergedForm::of_shards(u64::MAX), &[], &|_, _| {})
            .map(|_| ())
    };
    // Given up or not, this test publishes nothing and leaves nothing.
    assert_eq!(std::fs::read_dir(parent.path()).expect("a directory").count(), 0);
    merged
}

#[test]
fn a_merge_that_is_not_finite_names_its_tensor() {
    let read = || {
        let config = ModelConfig::load(&golden("llama")).expect("a config");
        Adapter::read(&golden("llama").join("adapter"), &config).expect("an adapter")
    };
    merge(&golden("llama"), &read()).expect("a merge");
    let error = merge(model("llama", |_, t| put(t, "model.norm.weight", 3, f32::NAN)).path(), &read());
    assert!(error.expect_err("the base").to_string().contains("model.norm.weight"));
    // The product overflows f32, then only f16.
    let mut adapter = read();
    adapter.values.iter_mut().for_each(|value| *value *= 1e25);
    let error = merge(&golden("llama"), &adapter).expect_err("infinite").to_string();
    assert!(error.contains("_proj.weight") && error.contains("not finite once merged (element"), "{error}");
    let halved = model("llama", |_, tensors| {
        for tensor in tensors.iter_mut() {
            // Zeros of either sign are the same: the adapter counts.
            (tensor.1, tensor.3) = (Dtype::F16, vec![0; tensor.3.len() / 2].into());
        }
    });
    let mut adapter = read();
    adapter.values.iter_mut().for_each(|value| *value = 300.0);
    let error = merge(halved.path(), &adapter).expect_err("beyond f16");
    assert!(error.to_string().contains("once merged and rounded to F16"), "{error}");
    assert!(error.is_about_numbers() && error.hints()[0].contains("bf16"), "{error}");
}

#[test]
fn companions_go_along_or_are_named() {
    let made = model("llama", |_, _| {});
    let along = [
        "NOTICE",
        "LICENSE",
        "LICENSE.txt",
        "USE_POLICY.md",
        "chat_template.jinja",
        "chat_template.json",
        "configuration_own.py",
        "generation_config.json",
        "modeling_own.py",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tekken.json",
        "tiktoken.model",
        "tokenization_own.py",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer.model.v3",
        "vocab.txt",
        "qwen.tiktoken",
    ];
    let left = ["README.md", "additional_chat_templates/", "convert.py"];
    for name in along.iter().chain(&left[..1]).chain(&left[2..]) {
        write(&made.path().join(name), name);
    }
    std::fs::create_dir(made.path().join("additional_chat_templates")).expect("a folder");
    for silent in [".gitattributes", "pytorch_model.bin", "manifest.json", "model.gguf"] {
        write(&made.path().join(silent), "x");
    }
    let names = |files: Vec<(String, Vec<u8>)>| {
        let mut names: Vec<String> = files.into_iter().map(|(name, _)| name).collect();
        names.sort();
        names
    };
    let mut want: Vec<String> = along.iter().map(|name| (*name).to_owned()).chain(["config.json".to_owned()]).collect();
    want.sort();
    assert_eq!(names(companion_files(made.path(), Dtype::F32, &[]).expect("files")), want);
    assert_eq!(left_out(made.path()), left);
    // The files of a training take the place of the base's.
    let text = [("chat_template.jinja".to_owned(), b"new".to_vec()), ("own.json".to_owned(), b"{}".to_vec())];
    let files = companion_files(made.path(), Dtype::F32, &text).expect("files");
    let of =
        |name: &str| files.iter().filter(|(own, _)| own == name).map(|(_, bytes)| bytes.clone()).collect::<Vec<_>>();
    assert_eq!((of("chat_template.jinja"), of("own.json")), (vec![b"new".to_vec()], vec![b"{}".to_vec()]));
    assert_eq!(of("chat_template.json"), Vec::<Vec<u8>>::new());
    assert_eq!(of("LICENSE"), [b"LICENSE".to_vec()]);
}

#[cfg(unix)]
#[test]
fn a_link_out_of_the_directory_is_not_exported() {
    let made = model("llama", |_, _| {});
    let elsewhere = tempfile::tempdir().expect("a directory");
    write(&elsewhere.path().join("secret"), "private");
    write(&made.path().join("own"), "{{ messages }}");
    std::os::unix::fs::symlink(made.path().join("own"), made.path().join("chat_template.jinja")).expect("a link");
    companion_files(made.path(), Dtype::F32, &[]).expect("a link inside");
    std::os::unix::fs::symlink(elsewhere.path().join("secret"), made.path().join("LICENSE")).expect("a link");
    let error = companion_files(made.path(), Dtype::F32, &[]).expect_err("a link out");
    assert!(matches!(error, ModelError::Store(StoreError::LinkOut { .. })), "{error}");
    assert!(error.to_string().contains("LICENSE") && !error.to_string().contains("private"), "{error}");
    // The base's files that the training's text replaces are not read.
    let text = [("LICENSE".to_owned(), b"own".to_vec())];
    companion_files(made.path(), Dtype::F32, &text).expect("replaced");
}

/// config.json that is no config: a pointer, a page, a directory.
#[test]
fn what_is_no_config_is_named() {
    for (text, part) in [
        ("version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
        ("<html><body>", "a web page"),
        ("\u{feff}{", "config.json"),
        ("[]", "config.json"),
    ] {
        let made = tempfile::tempdir().expect("a directory");
        write(&made.path().join("config.json"), text);
        let error = ModelConfig::load(made.path()).expect_err(part).to_string();
        assert!(error.contains(part), "{error}");
    }
}

/// (changes of config.json, whether each of three layers has a rotary embedding, its window), as
/// SmolLM3Config of transformers has them.
#[test]
fn layers_without_rotary_embedding() {
    let list = json!([1, 0, 1]);
    let table: [(Value, [bool; 3], [Option<usize>; 3]); 6] = [
        (json!({}), [true, false, true], [None; 3]),
        (json!({"no_rope_layers": null, "no_rope_layer_interval": 3}), [true, true, false], [None; 3]),
        (json!({"no_rope_layers": null}), [true; 3], [None; 3]),
        (
            json!({"no_rope_layers": list, "use_sliding_window": true, "sliding_window": 8, "layer_types": null}),
            [true, false, true],
            [None, Some(8), None],
        ),
        (
            json!({"use_sliding_window": true, "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
            [true, false, true],
            [Some(8), None, Some(8)],
        ),
        (json!({"use_sliding_window": true, "layer_types": null}), [true, false, true], [None; 3]),
    ];
    for (changes, ropes, windows) in table {
        let config = parse("smollm3", |config| {
            for (key, value) in changes.as_object().expect("an object") {
                config[key] = value.clone();
            }
        });
        let config = config.expect("a config");
        let layers: Vec<_> = config.layers.iter().map(|layer| (layer.rope.is_some(), layer.window)).collect();
        let want: Vec<_> = ropes.into_iter().zip(windows).collect();
        assert_eq!(layers, want, "{changes}");
    }
    for wrong in [json!([1, 0]), json!([1, 2, 1]), json!("1, 0, 1")] {
        let error = parse("smollm3", |config| config["no_rope_layers"] = wrong.clone()).expect_err("no such layers");
        assert!(error.to_string().contains("`no_rope_layers` should be a list of 0 and 1 for 3 layers"), "{error}");
    }
}

/// (changes of the hub's spelling, the window of each of three layers, theta of its rotary embedding), as
/// Gemma3TextConfig of transformers has them.
#[test]
fn layers_with_a_window_and_their_own_rotary_embedding() {
    let (all, windowed) = ((None, 1e6), (Some(5_usize), 1e4));
    let table = [
        (json!({}), [windowed, all, windowed]),
        (json!({"sliding_window_pattern": null}), [windowed; 3]),
        (json!({"rope_local_base_freq": 2e4}), [(Some(5), 2e4), all, (Some(5), 2e4)]),
        (json!({"layer_types": ["full_attention", "full_attention", "sliding_attention"]}), [all, all, windowed]),
    ];
    let hub = std::fs::read_to_string(golden("gemma3").join("config.hub.json")).expect("config.hub.json");
    let parse = |changes: &Value| {
        let mut config: Value = serde_json::from_str(&hub).expect("JSON");
        for (key, value) in changes.as_object().expect("an object") {
            config[key] = value.clone();
        }
        ModelConfig::parse(&config.to_string(), Path::new("config.json"))
    };
    for (changes, want) in table {
        let config = parse(&changes).expect("a config");
        let theta = |rope: Option<usize>| config.ropes[rope.expect("a rotary embedding")].theta;
        let layers: Vec<_> = config.layers.iter().map(|layer| (layer.window, theta(layer.rope))).collect();
        assert_eq!(layers, want, "{changes}");
    }
    for (key, value) in [
        ("use_bidirectional_attention", json!(true)),
        ("attn_logit_softcapping", json!(50.0)),
        ("final_logit_softcapping", json!(30.0)),
        ("hidden_activation", json!("gelu")),
    ] {
        let error = parse(&json!({key: value})).expect_err("another model").to_string();
        assert!(error.contains(key), "{error}");
    }
}
