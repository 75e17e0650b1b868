"""Shapes of published models: what `config.json` of the text model says that decides about its tensors, and the
parameters that its makers, or the hub, state.

All of these are facts. Keys that are left out have the value of the class. `billions` counts the text model, without
layers that predict further tokens; `ENCODERS` are those whose stated count has encoders of images and sound in it.

Where the shapes are from, unless a comment says something else: the models' `config.json` on the hub. Those of
`tests/goldens/configs` are whole. Class defaults of transformers 5.23 are the published shapes of DeepSeek-V3,
GLM-4.5-Air, GLM-4.7-Flash, gpt-oss-120b, Qwen3-Next and Muse Glimmer.
"""

# Hidden size, elements inside the feed-forward part, layers, query heads, key/value heads, head_dim, vocabulary.
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)

TIED = dict(tie_word_embeddings=True)


def model(name, billions, model_type, sizes, **more):
    config = dict(model_type=model_type, **dict(zip(SIZES, sizes, strict=True)), **more)
    return dict(model=name, billions=billions, config=config)


def qwen3_5_moe(experts, choices, inner, value_heads):
    return dict(
        num_experts=experts,
        num_experts_per_tok=choices,
        moe_intermediate_size=inner,
        shared_expert_intermediate_size=inner,
        linear_num_value_heads=value_heads,
    )


QWEN = [
    model("Qwen3-30B-A3B", 30.532, "qwen3_moe", (2048, 6144, 48, 32, 4, 128, 151_936)),
    # Its `intermediate_size` is 5472, which no layer has: config.json of copies of it.
    model("Qwen3-Coder-30B-A3B", 30.532, "qwen3_moe", (2048, 5472, 48, 32, 4, 128, 151_936)),
    model("Qwen3-235B-A22B", 235.094, "qwen3_moe", (4096, 12_288, 94, 64, 4, 128, 151_936), moe_intermediate_size=1536),
    # The card says 480. config.json as vLLM's page for Kunlun has it.
    model(
        "Qwen3-Coder-480B-A35B",
        480.0,
        "qwen3_moe",
        (6144, 8192, 62, 96, 8, 128, 151_936),
        moe_intermediate_size=2560,
        num_experts=160,
    ),
    model("Qwen3-Next-80B-A3B", 79.674, "qwen3_next", (2048, 5120, 48, 16, 2, 256, 151_936)),
    model(
        "Qwen3.5-0.8B", 0.7524, "qwen3_5_text", (1024, 3584, 24, 8, 2, 256, 248_320),
        linear_num_value_heads=16, **TIED,
    ),
    model("Qwen3.5-2B", 1.88, "qwen3_5_text", (2048, 6144, 24, 8, 2, 256, 248_320), linear_num_value_heads=16, **TIED),
    model("Qwen3.5-4B", 4.21, "qwen3_5_text", (2560, 9216, 32, 16, 4, 256, 248_320), **TIED),
    model("Qwen3.5-9B", 8.95, "qwen3_5_text", (4096, 12_288, 32, 16, 4, 256, 248_320)),
    model("Qwen3.5-27B", 26.90, "qwen3_5_text", (5120, 17_408, 64, 24, 4, 256, 248_320), linear_num_value_heads=48),
    # The card says 27 and the shapes; the files have 27.78, with a vision tower and a layer that predicts further
    # tokens.
    model("Qwen3.6-27B", 27.0, "qwen3_5_text", (5120, 17_408, 64, 24, 4, 256, 248_320), linear_num_value_heads=48),
    # Its config.json has the values of Qwen3.6-27B's, key by key (the README of a fork of msmodelslim for Qwen3.8).
    model("Qwen3.8-27B", 27.0, "qwen3_5_text", (5120, 17_408, 64, 24, 4, 256, 248_320), linear_num_value_heads=48),
    model(
        "Qwen3.5-35B-A3B", 34.66, "qwen3_5_moe_text", (2048, 512, 40, 16, 2, 256, 248_320),
        **qwen3_5_moe(256, 8, 512, 32),
    ),
    # The card says the shapes; the hub counts 35.1 with a vision tower of 0.45.
    model(
        "Qwen3.6-35B-A3B", 34.65, "qwen3_5_moe_text", (2048, 512, 40, 16, 2, 256, 248_320),
        **qwen3_5_moe(256, 8, 512, 32),
    ),
    model(
        "Qwen3.5-122B-A10B", 122.11, "qwen3_5_moe_text", (3072, 1024, 48, 32, 2, 256, 248_320),
        **qwen3_5_moe(256, 8, 1024, 64),
    ),
    model(
        "Qwen3.5-397B-A17B", 396.35, "qwen3_5_moe_text", (4096, 1024, 60, 32, 2, 256, 248_320),
        **qwen3_5_moe(512, 10, 1024, 64),
    ),
    # The name says 2.4 T. Shapes as in the registry of a trainer for Qwen3.8; layers and experts are NVIDIA's page's
    # on AutoModel too. The files have 4.89 TB in bf16, with a layer that predicts further tokens.
    model(
        "Qwen3.8-2.4T-A95B", 2400.0, "qwen3_5_moe_text", (8192, 2048, 92, 64, 4, 256, 248_320),
        **qwen3_5_moe(512, 10, 2048, 128),
    ),
]

GEMMA = [
    model("gemma-2-2b", 2.614, "gemma2", (2304, 9216, 26, 8, 4, 256, 256_000)),
    model("gemma-2-9b", 9.242, "gemma2", (3584, 14_336, 42, 16, 8, 256, 256_000)),
    model("gemma-2-27b", 27.227, "gemma2", (4608, 36_864, 46, 32, 16, 128, 256_000)),
    model("gemma-3-270m", 0.268, "gemma3_text", (640, 2048, 18, 4, 1, 256, 262_144)),
    model("gemma-3-1b", 1.0, "gemma3_text", (1152, 6912, 26, 4, 1, 256, 262_144)),
    model("gemma-3-4b", 3.884, "gemma3_text", (2560, 10_240, 34, 8, 4, 256, 262_208)),
    model("gemma-3-12b", 11.771, "gemma3_text", (3840, 15_360, 48, 16, 8, 256, 262_208)),
    model("gemma-3-27b", 27.016, "gemma3_text", (5376, 21_504, 62, 32, 16, 128, 262_208)),
    # The card of Gemma 4 says 5.1 and 8 "with embeddings", which is with both encoders too. Shapes: config.json of
    # copies, and what Ollama shows of its files.
    model(
        "gemma-4-E2B",
        5.1,
        "gemma4_text",
        (1536, 6144, 35, 8, 1, 256, 262_144),
        global_head_dim=512,
        sliding_window=512,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
        layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 7,
    ),
    model(
        "gemma-4-E4B",
        8.0,
        "gemma4_text",
        (2560, 10_240, 42, 8, 2, 256, 262_144),
        global_head_dim=512,
        sliding_window=512,
        num_kv_shared_layers=18,
    ),
    # The card says 11.95, with 0.04 that take images and sound. Shapes: what Ollama shows of its files; one key/value
    # head of layers that see all keys, from the page of a port to Neuron.
    model(
        "gemma-4-12B",
        11.95,
        "gemma4_unified_text",
        (3840, 15_360, 48, 16, 8, 256, 262_144),
        global_head_dim=512,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
    ),
    model(
        "gemma-4-31B",
        30.7,
        "gemma4_text",
        (5376, 21_504, 60, 32, 16, 256, 262_144),
        global_head_dim=512,
        sliding_window=1024,
        num_global_key_value_heads=4,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
    ),
    model(
        "gemma-4-26B-A4B",
        25.2,
        "gemma4_text",
        (2816, 2112, 30, 16, 8, 256, 262_144),
        global_head_dim=512,
        sliding_window=1024,
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    ),
]

# Those whose stated count has encoders in it, which the class's defaults describe.
ENCODERS = ("gemma-4-E2B", "gemma-4-E4B")


def granite4(inner, layers):
    return dict(
        shared_intermediate_size=inner,
        layer_types=["attention"] * layers,
        num_local_experts=0,
        position_embedding_type="rope",
        **TIED,
    )


GRANITE_AND_OTHERS = [
    # Stated: about 29.6 with a vision tower of about 1.8, which is not read.
    model("Muse-Glimmer-30B", 27.8, "muse_glimmer_text", (6656, 19_968, 52, 32, 2, 128, 202_048)),
    model("SmolLM3-3B", 3.075, "smollm3", (2048, 11_008, 36, 16, 4, 128, 128_256)),
    # Versions 3.0 to 3.2 have four tokens less.
    model("granite-3.2-2b", 2.534, "granite", (2048, 8192, 40, 32, 8, 64, 49_155), **TIED),
    model("granite-3.2-8b", 8.171, "granite", (4096, 12_800, 40, 32, 8, 128, 49_155), **TIED),
    model("granite-3.3-2b", 2.534, "granite", (2048, 8192, 40, 32, 8, 64, 49_159), **TIED),
    model("granite-3.3-8b", 8.171, "granite", (4096, 12_800, 40, 32, 8, 128, 49_159), **TIED),
    model("granite-4.0-350m", 0.352, "granitemoehybrid", (1024, 2048, 28, 16, 4, 64, 100_352), **granite4(2048, 28)),
    # What Ollama shows of its files; whatmodel's page has the hub's count.
    model("granite-4.0-1b", 1.63, "granitemoehybrid", (2048, 4096, 40, 16, 4, 128, 100_352), **granite4(4096, 40)),
    model("granite-4.0-micro", 3.403, "granitemoehybrid", (2560, 8192, 40, 40, 8, 64, 100_352), **granite4(8192, 40)),
    model("Olmo-3-7B", 7.298, "olmo3", (4096, 11_008, 32, 32, 32, 128, 100_278)),
    model("Olmo-3-32B", 32.234, "olmo3", (5120, 27_648, 64, 40, 8, 128, 100_278)),
    model("Ministral-3-3B", 3.43, "ministral3", (3072, 9216, 26, 32, 8, 128, 131_072), **TIED),
    model("Ministral-3-8B", 8.49, "ministral3", (4096, 14_336, 34, 32, 8, 128, 131_072)),
    model("Ministral-3-14B", 13.51, "ministral3", (5120, 16_384, 40, 32, 8, 128, 131_072)),
    # Versions 3.0 to 3.2; later ones with a vision tower, which is not read. config.json of a copy of 3.2 without it.
    model("Mistral-Small-3.2-24B", 23.572, "mistral", (5120, 32_768, 40, 32, 8, 128, 131_072)),
    model("Phi-3-mini", 3.821, "phi3", (3072, 8192, 32, 32, 32, 96, 32_064)),
    # config.json of copies of it; the card says 3.8.
    model("Phi-3.5-mini", 3.8, "phi3", (3072, 8192, 32, 32, 32, 96, 32_064)),
    model("Phi-3-medium", 13.960, "phi3", (5120, 17_920, 40, 40, 10, 128, 32_064)),
    model("Phi-4", 14.660, "phi3", (5120, 17_920, 40, 40, 10, 128, 100_352)),
    model("Phi-4-mini", 3.836, "phi3", (3072, 8192, 32, 24, 8, 128, 200_064), partial_rotary_factor=0.75, **TIED),
    model("gpt-oss-20b", 20.915, "gpt_oss", (2880, 2880, 24, 64, 8, 64, 201_088), num_local_experts=32),
    model("gpt-oss-120b", 116.829, "gpt_oss", (2880, 2880, 36, 64, 8, 64, 201_088), num_local_experts=128),
]

KIMI = dict(n_routed_experts=384, first_k_dense_replace=1, n_group=1, topk_group=1)
KIMI_SIZES = (7168, 18_432, 61, 64, 64, 64, 163_840)
GLM = dict(
    n_routed_experts=160, moe_intermediate_size=1536, first_k_dense_replace=3, use_qk_norm=True, attention_bias=True
)
GLM_SIZES = (5120, 12_288, 92, 96, 8, 128, 151_552)

LATENT_AND_GLM = [
    model("DeepSeek-V3", 671.026, "deepseek_v3", (7168, 18_432, 61, 128, 128, 64, 129_280), num_nextn_predict_layers=1),
    # DeepSeek-V3-Base, further trained, as its card says; 671.
    model("DeepSeek-R1", 671.0, "deepseek_v3", (7168, 18_432, 61, 128, 128, 64, 129_280), num_nextn_predict_layers=1),
    model("Kimi-K2", 1026.4, "kimi_k2", KIMI_SIZES, **KIMI),
    # Text models that go on from K2's, with its shapes by their cards and config.json: 61 layers, the first dense,
    # 384 experts of 2,048 and a shared one, 64 heads, 163,840 tokens. K2.7's card says that its architecture is that
    # of K2.5 and K2.6. The cards say 1 T, which is K2's count rounded.
    model("Kimi-K2.5", 1026.4, "kimi_k2", KIMI_SIZES, **KIMI),
    model("Kimi-K2.6", 1026.4, "kimi_k2", KIMI_SIZES, **KIMI),
    model("Kimi-K2.7-Code", 1026.4, "kimi_k2", KIMI_SIZES, **KIMI),
    model(
        "Moonlight-16B-A3B",
        15.960,
        "deepseek_v3",
        (2048, 11_264, 27, 16, 16, 64, 163_840),
        n_routed_experts=64,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=None,
        moe_intermediate_size=1408,
        n_shared_experts=2,
        num_experts_per_tok=6,
    ),
    model("GLM-4.7-Flash", 29.94, "glm4_moe_lite", (2048, 10_240, 47, 20, 20, 64, 154_880)),
    # The cards say 355, and 106 of Air; the hub counts 358 and 110, with the layer that predicts further tokens.
    # 4.6 and 4.7: config.json of 4.7, and of a copy of 4.6 in 4 bits.
    model("GLM-4.5", 355.0, "glm4_moe", GLM_SIZES, **GLM),
    model("GLM-4.6", 355.0, "glm4_moe", GLM_SIZES, **GLM),
    model("GLM-4.7", 355.0, "glm4_moe", GLM_SIZES, **GLM),
    model("GLM-4.5-Air", 106.0, "glm4_moe", (4096, 10_944, 46, 96, 8, 128, 151_552), attention_bias=True),
    model("GLM-4-9B-0414", 9.400, "glm4", (4096, 13_696, 40, 32, 2, 128, 151_552)),
    model("GLM-4-32B-0414", 32.566, "glm4", (6144, 23_040, 61, 48, 2, 128, 151_552), attention_bias=False),
]


def attention_at(layers, of):
    """Layers with attention among convolutions."""
    kinds = ["full_attention" if n in layers else "conv" for n in range(of)]
    return dict(layer_types=kinds, **TIED)


# `intermediate_size` of LFM2 is that of files, and a third more than the layers have where the class adjusts it.
LFM = [
    model("LFM2-350M", 0.354, "lfm2", (1024, 6656, 16, 16, 8, 64, 65_536), **attention_at([2, 5, 8, 10, 12, 14], 16)),
    model("LFM2-700M", 0.742, "lfm2", (1536, 10_240, 16, 24, 8, 64, 65_536), **attention_at([2, 5, 8, 10, 12, 14], 16)),
    model("LFM2-1.2B", 1.170, "lfm2", (2048, 12_288, 16, 32, 8, 64, 65_536), **attention_at([2, 5, 8, 10, 12, 14], 16)),
    # What Ollama shows of its files; the card says 1.17.
    model(
        "LFM2.5-1.2B", 1.17, "lfm2", (2048, 12_288, 16, 32, 8, 64, 65_536),
        **attention_at([2, 5, 8, 10, 12, 14], 16),
    ),
    model(
        "LFM2-2.6B",
        2.569,
        "lfm2",
        (2048, 10_752, 30, 32, 8, 64, 65_536),
        block_auto_adjust_ff_dim=False,
        **attention_at([2, 5, 9, 13, 17, 21, 24, 27], 30),
    ),
    model(
        "LFM2-8B-A1B", 8.34, "lfm2_moe", (2048, 7168, 24, 32, 8, 64, 65_536),
        **attention_at([2, 6, 10, 14, 18, 21], 24),
    ),
]

PUBLISHED = QWEN + GEMMA + GRANITE_AND_OTHERS + LATENT_AND_GLM + LFM
