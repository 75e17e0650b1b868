//! What to take in the place of a model whose family is not there.

/// (how the class or the type begins, in small letters without `_`; what it has that is not there; what is)
const RELATIVES: [(&str, &str, &str); 17] = [
    ("lfm3", "attention with a gate for each head", "LFM2 and LFM2.5, dense and MoE"),
    (
        "qwen4",
        "n-gram tables and hyper-connections",
        "Qwen3 and Qwen3.5 (also 3.6 and 3.8), dense and MoE, and Qwen3-Next",
    ),
    ("deepseekv2", "a router of softmax scores in groups", "DeepSeek-V3, V3.1 and R1, and Moonlight"),
    ("deepseekv32", "sparse attention", "DeepSeek-V3, V3.1 and R1"),
    ("deepseekv4", "sparse attention and hyper-connections", "DeepSeek-V3, V3.1 and R1"),
    ("kimilinear", "Kimi delta attention", "Kimi K2 to K2.7"),
    ("kimik3", "Kimi delta attention", "Kimi K2 to K2.7"),
    (
        "nemotronh",
        "Mamba layers",
        "Nemotron models whose class is LlamaForCausalLM, and Qwen3.5, whose layers have states too",
    ),
    ("jamba", "Mamba layers", "Qwen3.5, whose layers have states too"),
    ("mamba", "Mamba layers", "Qwen3.5, whose layers have states too"),
    ("glmmoedsa", "sparse attention", "GLM-4.5 to 4.7, GLM-4.7-Flash and GLM-4"),
    ("glm5", "sparse attention and hyper-connections", "GLM-4.5 to 4.7, GLM-4.7-Flash and GLM-4"),
    (
        "minimax",
        "its attention and its routers",
        "Qwen3-MoE, GLM-4.5 to 4.7 and gpt-oss, which are mixtures of experts too",
    ),
    ("llama4", "attention in chunks, and its routers", "Llama 2 to 3.3"),
    ("mixtral", "experts under other names", "Qwen3-MoE and gpt-oss, which are mixtures of experts too"),
    ("mistrallarge4", "sparse attention", "Ministral 3 and Mistral Small 3"),
    ("musespark", "a mixture of experts", "Muse Glimmer"),
];

/// A sentence that names what a model has that is not there, and its nearest relatives that are.
/// `name`: its class (`Lfm3ForCausalLM`) or type (`lfm3`).
pub(super) fn in_place_of(name: &str) -> Option<String> {
    let name = name.to_lowercase().replace('_', "");
    let (_, has, relatives) = RELATIVES.iter().find(|(start, ..)| name.starts_with(start))?;
    Some(format!("not computed here: {has}; supported instead: {relatives}"))
}
