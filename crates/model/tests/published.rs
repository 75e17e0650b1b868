//! Parameters of published models, computed from the shapes of their `config.json` alone, against the counts
//! that their makers or the hub state: within one in a hundred.
//!
//! The shapes are facts, written down here; keys that are left out have the value of the class. Layers that
//! predict further tokens do not count, nor do vision towers. Gemma 4's E2B and E4B are not here: their counts have
//! towers in them.

use std::path::Path;

use finetune_model::{ModelConfig, expected_tensors};
use serde_json::{Value, json};

/// [hidden size, elements inside the feed-forward part, layers, query heads, key/value heads, head_dim,
/// vocabulary]
type Sizes = [usize; 7];

fn config(model_type: &str, sizes: Sizes, more: &Value) -> Value {
    let [hidden, inner, layers, heads, key_value_heads, head_dim, vocabulary] = sizes;
    let mut config = json!({
        "model_type": model_type, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_value_heads, "head_dim": head_dim,
        "vocab_size": vocabulary,
    });
    let more = more.as_object().expect("an object").clone();
    config.as_object_mut().expect("an object").extend(more);
    config
}

fn parameters(config: &Value) -> f64 {
    let config = ModelConfig::parse(&config.to_string(), Path::new("config.json"));
    let config = config.unwrap_or_else(|error| panic!("{error}"));
    expected_tensors(&config).iter().map(|(_, shape)| shape.iter().product::<usize>() as f64).sum()
}

/// Layers with attention among convolutions.
fn attention_at(layers: &[usize]) -> Value {
    json!({"full_attn_idxs": layers, "tie_embedding": true})
}

/// (model, billions of parameters, model_type, sizes, other keys)
type Published = (&'static str, f64, &'static str, Sizes, Value);

#[rustfmt::skip]
fn of_qwen_and_gemma() -> Vec<Published> {
    let none = || json!({});
    let tied = || json!({"tie_word_embeddings": true});
    let gemma4 = |more: Value| {
        let mut keys = json!({"global_head_dim": 512, "sliding_window": 512});
        keys.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        keys
    };
    // Experts, those for each token, elements inside of one and of the shared one, value heads of delta nets.
    let qwen3_5_moe = |experts: usize, choices: usize, inner: usize, value_heads: usize| json!({
        "num_experts": experts, "num_experts_per_tok": choices, "moe_intermediate_size": inner,
        "shared_expert_intermediate_size": inner, "linear_num_value_heads": value_heads,
    });
    vec![
        ("Qwen3-30B-A3B", 30.532, "qwen3_moe", [2048, 6144, 48, 32, 4, 128, 151_936], none()),
        ("Qwen3-235B-A22B", 235.094, "qwen3_moe", [4096, 12_288, 94, 64, 4, 128, 151_936], json!({"moe_intermediate_size": 1536})),
        ("Qwen3-Next-80B-A3B", 79.674, "qwen3_next", [2048, 5120, 48, 16, 2, 256, 151_936], none()),
        ("Qwen3.5-0.8B", 0.7524, "qwen3_5_text", [1024, 3584, 24, 8, 2, 256, 248_320], json!({"linear_num_value_heads": 16, "tie_word_embeddings": true})),
        ("Qwen3.5-2B", 1.88, "qwen3_5_text", [2048, 6144, 24, 8, 2, 256, 248_320], json!({"linear_num_value_heads": 16, "tie_word_embeddings": true})),
        ("Qwen3.5-4B", 4.21, "qwen3_5_text", [2560, 9216, 32, 16, 4, 256, 248_320], tied()),
        ("Qwen3.5-9B", 8.95, "qwen3_5_text", [4096, 12_288, 32, 16, 4, 256, 248_320], none()),
        ("Qwen3.5-27B", 26.90, "qwen3_5_text", [5120, 17_408, 64, 24, 4, 256, 248_320], json!({"linear_num_value_heads": 48})),
        // The model card says 27 and the shapes; the files have 27.78, with a vision tower and a layer that predicts
        // further tokens.
        ("Qwen3.6-27B", 27.0, "qwen3_5_text", [5120, 17_408, 64, 24, 4, 256, 248_320], json!({"linear_num_value_heads": 48})),
        // Its config.json has the values of Qwen3.6-27B's, key by key (the README of a fork of msmodelslim for Qwen3.8).
        ("Qwen3.8-27B", 27.0, "qwen3_5_text", [5120, 17_408, 64, 24, 4, 256, 248_320], json!({"linear_num_value_heads": 48})),
        ("Qwen3.5-35B-A3B", 34.66, "qwen3_5_moe_text", [2048, 512, 40, 16, 2, 256, 248_320], qwen3_5_moe(256, 8, 512, 32)),
        // The model card says the shapes; the hub counts 35.1 with a vision tower of 0.45.
        ("Qwen3.6-35B-A3B", 34.65, "qwen3_5_moe_text", [2048, 512, 40, 16, 2, 256, 248_320], qwen3_5_moe(256, 8, 512, 32)),
        ("Qwen3.5-122B-A10B", 122.11, "qwen3_5_moe_text", [3072, 1024, 48, 32, 2, 256, 248_320], qwen3_5_moe(256, 8, 1024, 64)),
        ("Qwen3.5-397B-A17B", 396.35, "qwen3_5_moe_text", [4096, 1024, 60, 32, 2, 256, 248_320], qwen3_5_moe(512, 10, 1024, 64)),
        // The name says 2.4 T. Shapes as in the registry of a trainer for Qwen3.8; layers and experts are NVIDIA's page's
        // on AutoModel too. The files have 4.89 TB in bf16, with a layer that predicts further tokens.
        ("Qwen3.8-2.4T-A95B", 2400.0, "qwen3_5_moe_text", [8192, 2048, 92, 64, 4, 256, 248_320], qwen3_5_moe(512, 10, 2048, 128)),
        ("gemma-2-2b", 2.614, "gemma2", [2304, 9216, 26, 8, 4, 256, 256_000], none()),
        ("gemma-2-9b", 9.242, "gemma2", [3584, 14_336, 42, 16, 8, 256, 256_000], none()),
        ("gemma-2-27b", 27.227, "gemma2", [4608, 36_864, 46, 32, 16, 128, 256_000], none()),
        ("gemma-3-270m", 0.268, "gemma3_text", [640, 2048, 18, 4, 1, 256, 262_144], none()),
        ("gemma-3-1b", 1.0, "gemma3_text", [1152, 6912, 26, 4, 1, 256, 262_144], none()),
        ("gemma-3-4b", 3.884, "gemma3_text", [2560, 10_240, 34, 8, 4, 256, 262_208], none()),
        ("gemma-3-12b", 11.771, "gemma3_text", [3840, 15_360, 48, 16, 8, 256, 262_208], none()),
        ("gemma-3-27b", 27.016, "gemma3_text", [5376, 21_504, 62, 32, 16, 128, 262_208], none()),
        ("gemma-4-31B", 30.7, "gemma4_text", [5376, 21_504, 60, 32, 16, 256, 262_144],
            gemma4(json!({"attention_k_eq_v": true, "num_global_key_value_heads": 4, "hidden_size_per_layer_input": 0}))),
        ("gemma-4-26B-A4B", 25.2, "gemma4_text", [2816, 2112, 30, 16, 8, 256, 262_144],
            gemma4(json!({"attention_k_eq_v": true, "num_global_key_value_heads": 2, "hidden_size_per_layer_input": 0,
                "enable_moe_block": true, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}))),
    ]
}

#[rustfmt::skip]
fn of_others() -> Vec<Published> {
    let none = || json!({});
    let tied = || json!({"tie_word_embeddings": true});
    let deepseek = |experts: usize, dense: usize, more: Value| {
        let mut keys = json!({"n_routed_experts": experts, "first_k_dense_replace": dense, "n_group": 1, "topk_group": 1});
        keys.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        keys
    };
    let granite4 = |inner: usize, layers: usize| json!({
        "shared_intermediate_size": inner, "layer_types": vec!["attention"; layers], "num_local_experts": 0,
        "tie_word_embeddings": true, "position_embedding_type": "rope",
    });
    vec![
        // Stated: about 29.6 with a vision tower of about 1.8, which is not read.
        ("Muse-Glimmer-30B", 27.8, "muse_glimmer", [6656, 19_968, 52, 32, 2, 128, 202_048], none()),
        ("SmolLM3-3B", 3.075, "smollm3", [2048, 11_008, 36, 16, 4, 128, 128_256], none()),
        ("granite-3.3-2b", 2.534, "granite", [2048, 8192, 40, 32, 8, 64, 49_159], tied()),
        ("granite-3.3-8b", 8.171, "granite", [4096, 12_800, 40, 32, 8, 128, 49_159], tied()),
        ("granite-4.0-micro", 3.403, "granitemoehybrid", [2560, 8192, 40, 40, 8, 64, 100_352], granite4(8192, 40)),
        ("granite-4.0-350m", 0.352, "granitemoehybrid", [1024, 2048, 28, 16, 4, 64, 100_352], granite4(2048, 28)),
        ("Olmo-3-7B", 7.298, "olmo3", [4096, 11_008, 32, 32, 32, 128, 100_278], none()),
        ("Olmo-3-32B", 32.234, "olmo3", [5120, 27_648, 64, 40, 8, 128, 100_278], none()),
        ("Ministral-3-3B", 3.43, "ministral3", [3072, 9216, 26, 32, 8, 128, 131_072], tied()),
        ("Ministral-3-8B", 8.49, "ministral3", [4096, 14_336, 34, 32, 8, 128, 131_072], none()),
        ("Ministral-3-14B", 13.51, "ministral3", [5120, 16_384, 40, 32, 8, 128, 131_072], none()),
        ("Phi-3-mini", 3.821, "phi3", [3072, 8192, 32, 32, 32, 96, 32_064], none()),
        ("Phi-3-medium", 13.960, "phi3", [5120, 17_920, 40, 40, 10, 128, 32_064], none()),
        ("Phi-4", 14.660, "phi3", [5120, 17_920, 40, 40, 10, 128, 100_352], none()),
        ("Phi-4-mini", 3.836, "phi3", [3072, 8192, 32, 24, 8, 128, 200_064], json!({"tie_word_embeddings": true, "partial_rotary_factor": 0.75})),
        ("gpt-oss-20b", 20.915, "gpt_oss", [2880, 2880, 24, 64, 8, 64, 201_088], json!({"num_local_experts": 32})),
        ("gpt-oss-120b", 116.829, "gpt_oss", [2880, 2880, 36, 64, 8, 64, 201_088], json!({"num_local_experts": 128})),
        ("DeepSeek-V3", 671.026, "deepseek_v3", [7168, 18_432, 61, 128, 128, 64, 129_280], json!({"num_nextn_predict_layers": 1})),
        ("Kimi-K2", 1026.4, "kimi_k2", [7168, 18_432, 61, 64, 64, 64, 163_840], deepseek(384, 1, none())),
        // Text models that go on from K2's, with its shapes by their cards and config.json: 61 layers, the first dense, 384
        // experts of 2,048 and a shared one, 64 heads, 163,840 tokens. The cards say 1 T, which is K2's count rounded.
        ("Kimi-K2.5", 1026.4, "kimi_k2", [7168, 18_432, 61, 64, 64, 64, 163_840], deepseek(384, 1, none())),
        ("Kimi-K2.6", 1026.4, "kimi_k2", [7168, 18_432, 61, 64, 64, 64, 163_840], deepseek(384, 1, none())),
        ("Moonlight-16B-A3B", 15.960, "deepseek_v3", [2048, 11_264, 27, 16, 16, 64, 163_840],
            deepseek(64, 1, json!({"q_lora_rank": null, "moe_intermediate_size": 1408, "n_shared_experts": 2, "num_experts_per_tok": 6}))),
        ("GLM-4.7-Flash", 29.94, "glm4_moe_lite", [2048, 10_240, 47, 20, 20, 64, 154_880], none()),
        ("GLM-4.5", 352.8, "glm4_moe", [5120, 12_288, 92, 96, 8, 128, 151_552],
            json!({"n_routed_experts": 160, "moe_intermediate_size": 1536, "first_k_dense_replace": 3, "use_qk_norm": true, "attention_bias": true})),
        ("GLM-4.5-Air", 106.85, "glm4_moe", [4096, 10_944, 46, 96, 8, 128, 151_552], json!({"attention_bias": true})),
        ("GLM-4-9B-0414", 9.400, "glm4", [4096, 13_696, 40, 32, 2, 128, 151_552], none()),
        ("GLM-4-32B-0414", 32.566, "glm4", [6144, 23_040, 61, 48, 2, 128, 151_552], json!({"attention_bias": false})),
        ("LFM2-350M", 0.354, "lfm2", [1024, 6656, 16, 16, 8, 64, 65_536], attention_at(&[2, 5, 8, 10, 12, 14])),
        ("LFM2-700M", 0.742, "lfm2", [1536, 10_240, 16, 24, 8, 64, 65_536], attention_at(&[2, 5, 8, 10, 12, 14])),
        ("LFM2-1.2B", 1.170, "lfm2", [2048, 12_288, 16, 32, 8, 64, 65_536], attention_at(&[2, 5, 8, 10, 12, 14])),
        ("LFM2-2.6B", 2.569, "lfm2", [2048, 10_752, 30, 32, 8, 64, 65_536],
            json!({"full_attn_idxs": [2, 5, 9, 13, 17, 21, 24, 27], "tie_embedding": true, "block_auto_adjust_ff_dim": false})),
        ("LFM2-8B-A1B", 8.34, "lfm2_moe", [2048, 7168, 24, 32, 8, 64, 65_536], attention_at(&[2, 6, 10, 14, 18, 21])),
    ]
}

fn published() -> Vec<Published> {
    [of_qwen_and_gemma(), of_others()].concat()
}

#[test]
fn parameters_of_published_shapes() {
    let mut wrong = Vec::new();
    for (name, billions, model_type, sizes, more) in published() {
        let found = parameters(&config(model_type, sizes, &more)) / 1e9;
        println!("{name}: {found:.3} billion, stated {billions}");
        if (found / billions - 1.0).abs() > 0.01 {
            wrong.push(format!("{name}: {found:.3} billion, stated {billions}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Models as the hub has them, the text model in a wrapper, have the parameters of the text model.
#[test]
fn parameters_of_text_models_in_their_wrappers() {
    let published = published();
    for (name, wrapper) in [
        ("Qwen3.5-4B", "qwen3_5"),
        ("Qwen3.5-35B-A3B", "qwen3_5_moe"),
        ("Qwen3.6-27B", "qwen3_5"),
        ("Qwen3.6-35B-A3B", "qwen3_5_moe"),
        ("Qwen3.8-27B", "qwen3_5"),
        ("gemma-3-4b", "gemma3"),
        ("gemma-4-26B-A4B", "gemma4"),
        ("Ministral-3-3B", "mistral3"),
        ("Ministral-3-8B", "mistral3"),
        ("Kimi-K2.5", "kimi_k25"),
        ("Kimi-K2.6", "kimi_k25"),
    ] {
        let (_, _, model_type, sizes, more) = published.iter().find(|model| model.0 == name).expect("a model");
        let text = config(model_type, *sizes, more);
        let whole = json!({"model_type": wrapper, "text_config": text, "vision_config": {"hidden_size": 1024}});
        assert_eq!(parameters(&whole), parameters(&text), "{name} in {wrapper}");
    }
}
