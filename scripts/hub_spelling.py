"""config.json as most models on the hub spell it, which is config.hub.json of the golden models, and as mlx-lm does.

Up to 2025 that is the spelling of transformers 4: `rope_theta`, `rope_scaling`, `torch_dtype`, and no list of the
kinds of layers that a class knows by a pattern. Newer models have transformers 5's `rope_parameters` and `dtype`, are
multimodal (`text_config`), and differ in single keys.
"""

import json

# What files on the hub do not say, because the class computes it or is newer than they are.
NOT_ON_HUB = {
    "deepseek_v3": ("qk_head_dim", "rope_interleave"),
    "glm4_moe_lite": ("qk_head_dim", "rope_interleave", "mlp_layer_types"),
    "gpt_oss": ("swiglu_alpha",),
    "granitemoehybrid": ("time_step_limit",),
    "muse_glimmer_text": ("layer_rope_theta",),
}
# What they say besides.
ONLY_ON_HUB = {
    "deepseek_v3": dict(scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1, ep_size=1),
    # The multimodal class puts it in the place of images.
    "gemma4_text": dict(pad_token_id=0),
    "glm4_moe_lite": dict(topk_method="noaux_tc", first_k_dense_replace=1),
    "gpt_oss": dict(experts_per_token=2, initial_context_length=32),
    "qwen3_5_text": dict(attn_output_gate=True, mamba_ssm_dtype="float32"),
    "qwen3_5_moe_text": dict(attn_output_gate=True, mamba_ssm_dtype="float32"),
    "qwen3_next": dict(full_attention_interval=2),
    # Qwen2 files name a window and switch it off: a reader must not look at the number alone.
    "qwen2": dict(sliding_window=5, use_sliding_window=False, max_window_layers=1),
}
# Text models that the hub has inside of multimodal ones: `model_type` and class of these.
WRAPPERS = {
    "gemma4_text": ("gemma4", "Gemma4ForConditionalGeneration"),
    "qwen3_5_moe_text": ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
    "qwen3_5_text": ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
}


def hub_spelling(config):
    if "text_config" in config:
        text = older_keys(dict(config["text_config"]))
        config = {**config, "text_config": text}
        # The whole says it.
        config["torch_dtype"] = config.pop("dtype")
        for key in ("torch_dtype", "transformers_version"):
            text.pop(key)
        return config
    if config["model_type"] in WRAPPERS:
        return wrapped(dict(config))
    return older_keys(dict(config))


def wraps(directory):
    """Whether config.hub.json is of a multimodal model, and config.json of the text model in it."""
    one, other = (json.loads((directory / name).read_text()) for name in ("config.hub.json", "config.json"))
    return "text_config" in one and "text_config" not in other


def wrapped(config):
    kind = config["model_type"]
    layer_types = config["layer_types"]
    if kind == "gemma4_text":
        heads_of_full_layers(config)
    else:
        config["full_attention_interval"] = layer_types.index("full_attention") + 1
        del config["layer_types"]
    del config["architectures"]
    config.update(ONLY_ON_HUB.get(kind, {}))
    model_type, architecture = WRAPPERS[kind]
    whole = {key: config[key] for key in ("dtype", "tie_word_embeddings")}
    version = config.pop("transformers_version")
    return {**whole, "architectures": [architecture], "model_type": model_type, "text_config": config,
            "transformers_version": version}


def heads_of_full_layers(config):
    """Gemma 4's heads of layers that see all keys, in keys of the model instead of each layer's."""
    own = config.pop("per_layer_config")[str(config["layer_types"].index("full_attention"))]
    config["global_head_dim"], config["num_global_key_value_heads"] = own["head_dim"], own.get("num_key_value_heads")


def older_rope(config, rope):
    """`rope_parameters` in the keys that they had before transformers 5."""
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    scales = rope.get("rope_type", rope.get("type", "default")) != "default"
    config["rope_scaling"] = rope if scales else None


def mlx_spelling(config):
    """config.json of a text model with the keys that mlx-lm asks for, and all others as they are."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters", None) or {})
    if config["model_type"] == "gemma4_text":
        config["rope_parameters"] = rope  # of both kinds of layers
        if "per_layer_config" in config:
            heads_of_full_layers(config)
    elif rope:
        older_rope(config, rope)
    config["torch_dtype"] = config.pop("dtype", config.get("torch_dtype"))
    if config["model_type"] == "granitemoehybrid":
        config["layer_types"] = ["attention"] * len(config["layer_types"])
    elif "num_local_experts" in config and config["model_type"] != "gpt_oss":
        config["num_experts"] = config.pop("num_local_experts")
    return config


def older_keys(config):
    """The spelling of Llama 3 and Qwen2 on the hub: before transformers 5, and 4.45's head_dim."""
    kind = config["model_type"]
    rope = dict(config.pop("rope_parameters"))
    if kind == "olmo3":
        rope = dict(rope["full_attention"])
    if kind == "gemma3_text":
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = config["layer_types"].index("full_attention") + 1
        config.pop("_sliding_window_pattern", None)
        rope = dict(rope["full_attention"])
    if kind in ("phi3", "deepseek_v3"):
        rope["type"] = rope.pop("rope_type")
    if kind == "phi3":
        rope.pop("original_max_position_embeddings")
    older_rope(config, rope)
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.43.0"
    layer_types = config.pop("layer_types", None)
    head_dim = config.get("head_dim")
    # These classes have a padding token of their own where config.json names none, and Gemma's a size of
    # heads.
    if kind not in ("smollm3", "gemma2", "gemma3_text", "glm4", "lfm2", "lfm2_moe", "olmo3", "ministral3", "phi3"):
        config.pop("pad_token_id", None)
    if kind not in ("gemma2", "gemma3_text", "glm4", "glm4_moe", "gpt_oss", "ministral3", "muse_glimmer_text", "qwen3",
                    "qwen3_next"):
        config.pop("head_dim", None)
    if kind == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts", config.get("num_experts"))
        config["head_dim"] = head_dim or config["hidden_size"] // config["num_attention_heads"]
    if kind in ("gpt_oss", "lfm2_moe"):
        config["layer_types"] = layer_types
    if kind == "granitemoehybrid":
        config["layer_types"] = ["attention"] * len(layer_types)
    if kind == "lfm2":
        config["full_attn_idxs"] = [layer for layer, name in enumerate(layer_types) if name == "full_attention"]
        config["block_ff_dim"] = config.pop("intermediate_size")
        config["tie_embedding"] = config.pop("tie_word_embeddings")
    for key in NOT_ON_HUB.get(kind, ()):
        config.pop(key, None)
    config.update(ONLY_ON_HUB.get(kind, {}))
    return config
