//! Models of families that are not there are refused by name, with what is supported instead.

mod made;

use std::path::Path;

use finetune_advice::Advice;
use finetune_model::{ModelConfig, ModelError};
use serde_json::{Value, json};

use crate::made::{golden, read_json};

fn refused(config: &Value) -> ModelError {
    ModelConfig::parse(&config.to_string(), Path::new("models/new/config.json")).expect_err("refused")
}

/// (model_type, class, a part of what is said of it)
#[test]
fn families_that_are_not_there() {
    for (model_type, class, instead) in [
        ("lfm3", "Lfm3ForCausalLM", "LFM2"),
        ("qwen4_exp_text", "Qwen4ExpForCausalLM", "Qwen3.5"),
        ("qwen4_exp", "Qwen4ExpForConditionalGeneration", "Qwen3.5"),
        ("deepseek_v2", "DeepseekV2ForCausalLM", "DeepSeek-V3"),
        ("deepseek_v32", "DeepseekV32ForCausalLM", "DeepSeek-V3, V3.1 and R1"),
        ("deepseek_v4", "DeepseekV4ForCausalLM", "DeepSeek-V3, V3.1 and R1"),
        ("kimi_linear", "KimiLinearForCausalLM", "Kimi K2"),
        ("nemotron_h", "NemotronHForCausalLM", "LlamaForCausalLM"),
        ("glm_moe_dsa", "GlmMoeDsaForCausalLM", "GLM-4.5 to 4.7"),
        ("glm5_next", "Glm5NextForConditionalGeneration", "GLM-4.5 to 4.7"),
        ("minimax", "MiniMaxForCausalLM", "Qwen3-MoE"),
        ("minimax_m2", "MiniMaxM2ForCausalLM", "Qwen3-MoE"),
        ("llama4", "Llama4ForConditionalGeneration", "Llama 2 to 3.3"),
        ("mixtral", "MixtralForCausalLM", "gpt-oss"),
        ("mistral_large4", "MistralLarge4ForConditionalGeneration", "Ministral 3"),
        ("muse_spark", "MuseSparkForConditionalGeneration", "Muse Glimmer"),
    ] {
        // With the class, and by the type alone.
        for (architectures, name) in [(json!([class]), class), (Value::Null, model_type)] {
            let mut config = read_json(&golden("llama").join("config.json"));
            (config["model_type"], config["architectures"]) = (json!(model_type), architectures);
            let error = refused(&config);
            let (said, hints) = (error.to_string(), error.hints());
            assert!(said.contains("models/new/config.json") && said.contains(&format!("`{name}`")), "{said}");
            assert!(hints[0].contains("supported instead: ") && hints[0].contains(instead), "{name}: {hints:?}");
            assert!(hints[1].starts_with("supported: LlamaForCausalLM, "), "{name}: {hints:?}");
        }
    }
    // Of others it is known only what there is.
    let mut config = read_json(&golden("llama").join("config.json"));
    (config["model_type"], config["architectures"]) = (json!("gpt2"), json!(["GPT2LMHeadModel"]));
    assert_eq!(refused(&config).hints().len(), 1);
}

/// A known name never has such a sentence: what is there is not refused.
#[test]
fn families_that_are_there() {
    for family in std::fs::read_dir(golden("llama").parent().expect("a folder")).expect("the goldens") {
        let path = family.expect("an entry").path();
        if path.is_dir() {
            ModelConfig::load(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
    }
}

/// (key, value): Granite 4 with Mamba layers or experts.
#[test]
fn granite_4_with_mamba_layers() {
    for (key, value) in [
        ("layer_types", json!(["mamba", "full_attention"])),
        ("layer_types", json!(["attention", "mamba"])),
        ("layer_types", Value::Null),
        ("num_local_experts", json!(8)),
        ("num_local_experts", Value::Null),
    ] {
        let mut config = read_json(&golden("granitemoehybrid").join("config.json"));
        config[key] = value.clone();
        let error = refused(&config);
        let (said, hints) = (error.to_string(), error.hints());
        assert!(said.contains("models/new/config.json") && said.contains(key), "{said}");
        assert!(hints[0].contains("attention alone") && hints[0].contains("supported"), "{value}: {hints:?}");
    }
}

/// (a golden model, the kind that its list may have beside full attention)
#[test]
fn lists_of_kinds_of_layers_have_one_for_each() {
    for (family, other) in [
        ("gemma2", "sliding_attention"),
        ("gemma3", "sliding_attention"),
        ("gemma3_multimodal", "sliding_attention"),
        ("gemma4", "sliding_attention"),
        ("gpt_oss", "sliding_attention"),
        ("muse_glimmer", "sliding_attention"),
        ("olmo3", "sliding_attention"),
        ("qwen2", "sliding_attention"),
        ("qwen3", "sliding_attention"),
        ("smollm3", "sliding_attention"),
        ("qwen3_5", "linear_attention"),
        ("qwen3_5_moe", "linear_attention"),
        ("qwen3_next", "linear_attention"),
        ("lfm2", "conv"),
        ("lfm2_moe", "conv"),
        ("granitemoehybrid", "full_attention"),
    ] {
        let config = read_json(&golden(family).join("config.json"));
        let with = |change: &dyn Fn(&mut Vec<Value>)| {
            let mut config = config.clone();
            let text = if config.get("text_config").is_some() { &mut config["text_config"] } else { &mut config };
            change(text["layer_types"].as_array_mut().expect("kinds of layers"));
            refused(&config).to_string()
        };
        let layers = config.get("text_config").unwrap_or(&config)["num_hidden_layers"].as_u64().expect("a number");
        let short = with(&|list| drop(list.pop()));
        let long = with(&|list| list.extend_from_within(..1));
        for (said, entries) in [(short, layers - 1), (long, layers + 1)] {
            let want = format!("`layer_types` has {entries} entries, and `num_hidden_layers` is {layers}");
            assert!(said.contains("models/new/config.json") && said.contains(&want), "{family}: {said}");
        }
        if family != "granitemoehybrid" {
            for kind in [json!("chunked_attention"), json!(1), Value::Null] {
                let said = with(&|list| list[1] = kind.clone());
                let want = format!("`layer_types` has {kind} for layer 1, where \"full_attention\" or \"{other}\"");
                assert!(said.contains(&want), "{family}: {said}");
            }
        }
        let mut no_list = config.clone();
        let text = if no_list.get("text_config").is_some() { &mut no_list["text_config"] } else { &mut no_list };
        text["layer_types"] = json!("full_attention");
        assert!(refused(&no_list).to_string().contains("layer_types"), "{family}");
    }
    let mut config = read_json(&golden("glm4_moe_lite").join("config.json"));
    config["mlp_layer_types"] = json!(["dense"]);
    let said = refused(&config).to_string();
    assert!(said.contains("`mlp_layer_types` has 1 entries, and `num_hidden_layers` is 2"), "{said}");
}
