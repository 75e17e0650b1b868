"""The tiny random models of make_goldens.py, family by family: their configs, seeds, and what LoRA trains of them."""

from transformers import (
    DeepseekV3Config, Gemma2Config, Gemma3Config, Gemma3TextConfig, Gemma4TextConfig, Glm4Config, Glm4MoeConfig, Glm4MoeLiteConfig, GptOssConfig, GraniteConfig,
    GraniteMoeHybridConfig, Lfm2Config, Lfm2MoeConfig, LlamaConfig, Ministral3Config, MistralConfig, MuseGlimmerConfig,
    MuseGlimmerTextConfig, Olmo3Config, Phi3Config, Qwen2Config, Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3Config,
    Qwen3MoeConfig, Qwen3NextConfig, SmolLM3Config,
)

VOCABULARY = 96
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=80,
    num_attention_heads=4,
    max_position_embeddings=64,
    initializer_range=0.2,  # ten times the usual: logits that differ between tokens
    bos_token_id=1,
    eos_token_id=2,
)
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# A large epsilon: the norm of a result near zero would magnify its rounding.
QWEN3_5 = dict(
    {**SIZES, "initializer_range": 0.1}, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-2,
    linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=16, linear_value_head_dim=12, linear_conv_kernel_dim=4, tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                     "mrope_section": [2, 1, 1], "mrope_interleaved": True},
)
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
# Multi-head latent attention, and experts chosen by sigmoids.
LATENT = dict(
    {**SIZES, "intermediate_size": 40}, num_key_value_heads=4, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8,
    v_head_dim=10, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=12, rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
# Layers that see all keys have wider heads and turn half of their pairs.
GEMMA4 = dict(
    {key: value for key, value in SIZES.items() if key != "intermediate_size"}, head_dim=8, global_head_dim=16,
    sliding_window=5, rms_norm_eps=1e-5, final_logit_softcapping=3.0, pad_token_id=None, tie_word_embeddings=True,
    rope_parameters={
        # Fast enough that also the pairs that stand still would turn far.
        "full_attention": {"rope_type": "proportional", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        "sliding_attention": dict(PLAIN_ROPE),
    },
)
# Attention in every layer and no experts.
GRANITE4 = dict(
    SIZES, num_hidden_layers=2, rms_norm_eps=1e-5, layer_types=["full_attention"] * 2, num_local_experts=0,
    num_experts_per_tok=0, shared_intermediate_size=56, embedding_multiplier=12.0, attention_multiplier=0.25,
    residual_multiplier=0.22, logits_scaling=3.0, mamba_n_heads=4, mamba_d_state=8, tie_word_embeddings=True,
    rope_parameters=dict(PLAIN_ROPE),
)


def gpt_oss(intermediate_size, experts=6, **more):
    """Layers that see 5 and all keys in turn; gates and values that reach their limit."""
    return dict(
        dict(
            config=lambda: GptOssConfig(
                **dict(SIZES, intermediate_size=intermediate_size, initializer_range=0.12), num_hidden_layers=2,
                num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-3, sliding_window=5, num_local_experts=experts,
                num_experts_per_tok=2, tie_word_embeddings=False,
                rope_parameters=dict(YARN_ROPE, truncate=False, original_max_position_embeddings=32),
            ),
            lora=dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        ),
        **more,
    )


# PEFT's branches of stacked parameters.
GPT_OSS_EXPERTS = dict(
    experts=4,
    lora=dict(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
)


FAMILIES = {
    "llama3": dict(
        seed=1,
        config=lambda: LlamaConfig(
            **SIZES, num_hidden_layers=2, num_key_value_heads=2, rms_norm_eps=1e-5,
            rope_parameters=dict(LLAMA3_ROPE), tie_word_embeddings=False,
        ),
        lora=dict(target_modules="all-linear"),
    ),
    "llama": dict(
        # Chosen: with rsLoRA's scale of 4, some seeds make curves that magnify rounding
        # ten-thousandfold.
        seed=22,
        config=lambda: LlamaConfig(
            **SIZES, num_hidden_layers=3, num_key_value_heads=4, rms_norm_eps=1e-6,
            rope_parameters=dict(PLAIN_ROPE), tie_word_embeddings=True,
        ),
        lora=dict(target_modules="all-linear", use_rslora=True),
        full=True,
    ),
    "qwen2": dict(
        seed=3,
        config=lambda: Qwen2Config(
            **SIZES, num_hidden_layers=2, num_key_value_heads=2, rms_norm_eps=1e-6,
            rope_parameters=dict(PLAIN_ROPE, rope_theta=1000000.0), tie_word_embeddings=True,
        ),
        lora=dict(target_modules=["q_proj", "v_proj"]),
        full=True,
    ),
    "qwen3": dict(
        seed=4,
        # 4 heads of 16 are 64 wide. So o_proj is not square, and hidden_size / heads is not the
        # size of a head.
        config=lambda: Qwen3Config(
            **SIZES, num_hidden_layers=2, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6,
            rope_parameters=dict(PLAIN_ROPE, rope_theta=1000000.0), tie_word_embeddings=False,
        ),
        lora=dict(target_modules="all-linear"),
    ),
    "mistral": dict(
        seed=5,
        config=lambda: MistralConfig(
            **SIZES, num_hidden_layers=2, num_key_value_heads=2, rms_norm_eps=1e-5, sliding_window=5,
            rope_parameters=dict(PLAIN_ROPE), tie_word_embeddings=False,
        ),
        lora=dict(target_modules=r".*\.(1)\.mlp\.(gate|up|down)_proj"),
    ),
    "smollm3": dict(
        seed=6,
        # The second of three layers has no rotary embedding.
        config=lambda: SmolLM3Config(
            **SIZES, num_hidden_layers=3, num_key_value_heads=2, rms_norm_eps=1e-6, no_rope_layers=[1, 0, 1],
            pad_token_id=None, rope_parameters=dict(PLAIN_ROPE, rope_theta=2000000.0), tie_word_embeddings=True,
        ),
        lora=dict(target_modules="all-linear"),
        full=True,
    ),
    "gemma3": dict(
        seed=7,
        # The second of three layers sees all keys, with a rotary embedding of its own. Scores are not
        # divided by the root of a head's size.
        config=lambda: Gemma3TextConfig(
            **SIZES, num_hidden_layers=3, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"], query_pre_attn_scalar=24,
            pad_token_id=None, tie_word_embeddings=True, rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": dict(PLAIN_ROPE),
            },
        ),
        lora=dict(target_modules="all-linear"),
        full=True,
    ),
    "qwen3_moe": dict(
        seed=8,
        # The second of three layers is dense.
        config=lambda: Qwen3MoeConfig(
            **SIZES, num_hidden_layers=3, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, num_experts=6,
            num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True, mlp_only_layers=[1],
            rope_parameters=dict(PLAIN_ROPE, rope_theta=1000000.0), tie_word_embeddings=False,
        ),
        lora=dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    ),
    "qwen3_moe_experts": dict(
        seed=9,
        # With norm_topk_prob false, the weights of a token's experts do not add up to one.
        config=lambda: Qwen3MoeConfig(
            **SIZES, num_hidden_layers=2, num_key_value_heads=4, rms_norm_eps=1e-6, num_experts=5,
            num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=False,
            rope_parameters=dict(PLAIN_ROPE), tie_word_embeddings=True,
        ),
        lora=dict(target_modules=["q_proj"]),
        expert_branches=True,
    ),
    "gemma3_multimodal": dict(
        seed=10,
        config=lambda: Gemma3Config(
            text_config=Gemma3TextConfig(
                **SIZES, num_hidden_layers=2, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, sliding_window=5,
                layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=24, pad_token_id=None,
                rope_parameters={"full_attention": dict(PLAIN_ROPE, rope_theta=1000000.0),
                                 "sliding_attention": dict(PLAIN_ROPE)},
            ).to_dict(),
            vision_config=dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                               image_size=28, patch_size=14),
            mm_tokens_per_image=4, boi_token_index=90, eoi_token_index=91, image_token_index=92,
        ),
        lora=dict(target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)"),
    ),
    "ministral3": dict(
        seed=11,
        # Queries grow from position 8 on.
        config=lambda: Ministral3Config(
            **SIZES, num_hidden_layers=2, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, pad_token_id=None,
            rope_parameters=dict(YARN_ROPE, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1),
            tie_word_embeddings=False,
        ),
        lora=dict(target_modules=["q_proj", "k_proj", "gate_proj"]),
    ),
    "granite": dict(
        seed=12,
        config=lambda: GraniteConfig(
            **SIZES, num_hidden_layers=2, num_key_value_heads=2, rms_norm_eps=1e-5, embedding_multiplier=12.0,
            attention_multiplier=0.25, residual_multiplier=0.22, logits_scaling=3.0,
            rope_parameters=dict(PLAIN_ROPE), tie_word_embeddings=True,
        ),
        lora=dict(target_modules=["q_proj", "o_proj", "down_proj"]),
        full=True,
    ),
    "olmo3": dict(
        seed=13,
        # The fourth layer sees all keys, with positions of its own.
        config=lambda: Olmo3Config(
            **SIZES, num_hidden_layers=4, num_key_value_heads=2, rms_norm_eps=1e-6, sliding_window=5, pad_token_id=None,
            rope_parameters={"full_attention": dict(YARN_ROPE, rope_theta=500000.0),
                             "sliding_attention": dict(PLAIN_ROPE, rope_theta=500000.0)},
            tie_word_embeddings=False,
        ),
        lora=dict(target_modules=["q_proj", "v_proj", "up_proj"]),
        full=True,
    ),
    "qwen3_5": dict(
        seed=14,
        # The third of four layers has attention; two value heads share a key head.
        config=lambda: Qwen3_5TextConfig(**QWEN3_5, num_hidden_layers=4, layer_types=[
            "linear_attention", "linear_attention", "full_attention", "linear_attention"]),
        lora=dict(target_modules="all-linear"),
    ),
    "qwen3_5_moe": dict(
        seed=15,
        config=lambda: Qwen3_5MoeTextConfig(
            **{key: value for key, value in QWEN3_5.items() if key != "intermediate_size"}, num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"], num_experts=6, num_experts_per_tok=2,
            moe_intermediate_size=24, shared_expert_intermediate_size=20,
        ),
        lora=dict(target_modules="all-linear"),
    ),
    "gemma2": dict(
        seed=100,
        # Layers see 5 and all keys in turn. The caps are low enough that scores and logits reach them.
        config=lambda: Gemma2Config(
            **dict(SIZES, intermediate_size=48), num_hidden_layers=3, num_key_value_heads=2, head_dim=16,
            rms_norm_eps=1e-6, sliding_window=5, query_pre_attn_scalar=24, attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0, pad_token_id=None, tie_word_embeddings=True, rope_parameters=dict(PLAIN_ROPE),
        ),
        lora=dict(target_modules="all-linear"),
        full=True,
    ),
    "phi3": dict(
        seed=109,
        # Rows of up to 16 tokens turn by the short factors, longer ones by the long factors.
        config=lambda: Phi3Config(
            **dict(SIZES, intermediate_size=56, num_attention_heads=2), num_hidden_layers=2, num_key_value_heads=1,
            rms_norm_eps=1e-5, original_max_position_embeddings=16, pad_token_id=None, sliding_window=None,
            tie_word_embeddings=False, rope_parameters={
                "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.25, 1.5, 2.0], "long_factor": [1.5, 2.5, 4.0, 9.0]},
        ),
        lora=dict(target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
        full=True,
    ),
    "gpt_oss": dict(seed=18, **gpt_oss(intermediate_size=24)),
    "gpt_oss_mxfp4": dict(seed=19, **gpt_oss(intermediate_size=64), mxfp4=True),  # two blocks in a row of down_proj
    "gpt_oss_experts": dict(seed=34, **gpt_oss(intermediate_size=24, **GPT_OSS_EXPERTS)),
    "gpt_oss_mxfp4_experts": dict(seed=35, **gpt_oss(intermediate_size=32, **GPT_OSS_EXPERTS), mxfp4=True),
    "deepseek_v3": dict(
        seed=20,
        # The best two of four groups of experts; the first layer is dense.
        config=lambda: DeepseekV3Config(
            **LATENT, num_hidden_layers=3, first_k_dense_replace=1, q_lora_rank=12, n_group=4, topk_group=2,
            n_shared_experts=2, routed_scaling_factor=2.5, norm_topk_prob=True,
            rope_parameters=dict(YARN_ROPE, mscale=1.0, mscale_all_dim=0.8),
        ),
        lora=dict(target_modules=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]),
    ),
    "deepseek_v3_plain": dict(
        seed=121,
        config=lambda: DeepseekV3Config(
            **LATENT, num_hidden_layers=2, first_k_dense_replace=1, q_lora_rank=None, n_group=1, topk_group=1,
            n_shared_experts=1, routed_scaling_factor=1.5, norm_topk_prob=False, rope_parameters=dict(PLAIN_ROPE),
        ),
        lora=dict(target_modules=["q_proj", "kv_b_proj"]),
    ),
    "glm4_moe_lite": dict(
        seed=120,
        config=lambda: Glm4MoeLiteConfig(
            **LATENT, num_hidden_layers=2, mlp_layer_types=["dense", "sparse"], q_lora_rank=12, n_group=1, topk_group=1,
            n_shared_experts=1, routed_scaling_factor=1.8, norm_topk_prob=True,
            rope_parameters=dict(PLAIN_ROPE, rope_theta=1000000.0),
        ),
        lora=dict(target_modules=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]),
    ),
    "glm4_moe": dict(
        seed=24,
        config=lambda: Glm4MoeConfig(
            **dict(SIZES, intermediate_size=40), num_hidden_layers=2, first_k_dense_replace=1, num_key_value_heads=2,
            head_dim=16, rms_norm_eps=1e-5, attention_bias=True, use_qk_norm=True, n_routed_experts=8,
            num_experts_per_tok=3, n_group=1, topk_group=1, n_shared_experts=1, moe_intermediate_size=12,
            routed_scaling_factor=1.5, norm_topk_prob=True, tie_word_embeddings=False,
            rope_parameters=dict(PLAIN_ROPE, partial_rotary_factor=0.5),
        ),
        lora=dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    ),
    "gemma4": dict(
        seed=301,
        # As E2B: the last two layers take keys and values from the last layer before them of their kind.
        config=lambda: Gemma4TextConfig(
            **dict(GEMMA4, rms_norm_eps=1e-2, initializer_range=0.15), num_hidden_layers=6, intermediate_size=24,
            num_key_value_heads=1, num_kv_shared_layers=2,
            use_double_wide_mlp=True, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention",
                         "sliding_attention", "full_attention"],
        ),
        lora=dict(target_modules="all-linear"),
    ),
    "gemma4_k_eq_v": dict(
        seed=131,
        # As 31B: where a layer sees all keys, values are the keys before their norm.
        config=lambda: Gemma4TextConfig(
            **GEMMA4, num_hidden_layers=3, intermediate_size=40, num_key_value_heads=2, num_global_key_value_heads=1,
            attention_k_eq_v=True, hidden_size_per_layer_input=0,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
        ),
        lora=dict(target_modules="all-linear"),
    ),
    "gemma4_moe": dict(
        seed=27,
        # As 26B-A4B: experts beside the dense layers.
        config=lambda: Gemma4TextConfig(
            **GEMMA4, num_hidden_layers=2, intermediate_size=40, num_key_value_heads=2, num_global_key_value_heads=1,
            attention_k_eq_v=True, hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=6, top_k_experts=2,
            moe_intermediate_size=12, layer_types=["sliding_attention", "full_attention"],
        ),
        lora=dict(target_modules=["q_proj", "o_proj", "gate_proj", "down_proj"]),
    ),
    "lfm2": dict(
        seed=130,
        # The feed-forward layers are as wide as 80 * 2/3 * 1.1 rounded up to a multiple of 16: 64.
        config=lambda: Lfm2Config(
            **SIZES, num_hidden_layers=3, num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"],
            norm_eps=1e-5, conv_bias=True, conv_L_cache=3, block_auto_adjust_ff_dim=True, block_ffn_dim_multiplier=1.1,
            block_multiple_of=16, pad_token_id=None, tie_word_embeddings=True,
            rope_parameters=dict(PLAIN_ROPE, rope_theta=1000000.0),
        ),
        lora=dict(target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"]),
        full=True,
    ),
    "lfm2_moe": dict(
        seed=133,
        config=lambda: Lfm2MoeConfig(
            **dict(SIZES, intermediate_size=40), num_hidden_layers=3, num_key_value_heads=2,
            layer_types=["conv", "full_attention", "conv"], norm_eps=1e-5, conv_bias=False, conv_L_cache=3,
            num_dense_layers=1, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12, use_expert_bias=True,
            norm_topk_prob=True, routed_scaling_factor=1.5, pad_token_id=None, tie_word_embeddings=True,
            rope_parameters=dict(PLAIN_ROPE, rope_theta=1000000.0),
        ),
        lora=dict(target_modules=["q_proj", "in_proj", "out_proj"]),
    ),
    "qwen3_next": dict(
        seed=30,
        config=lambda: Qwen3NextConfig(
            **dict(QWEN3_5, rope_parameters=dict(PLAIN_ROPE, partial_rotary_factor=0.5)), num_hidden_layers=3,
            layer_types=["linear_attention", "full_attention", "linear_attention"], num_experts=6,
            num_experts_per_tok=2, moe_intermediate_size=12, shared_expert_intermediate_size=20, norm_topk_prob=True,
        ),
        lora=dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_ba", "out_proj"]),
    ),
    "granitemoehybrid": dict(
        seed=31,
        config=lambda: GraniteMoeHybridConfig(**GRANITE4, num_key_value_heads=2, position_embedding_type="nope"),
        lora=dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "input_linear", "output_linear"]),
        full=True,
    ),
    "granitemoehybrid_rope": dict(
        seed=33,
        config=lambda: GraniteMoeHybridConfig(**GRANITE4, num_key_value_heads=4, position_embedding_type="rope"),
        lora=dict(target_modules=["q_proj", "output_linear"]),
    ),
    "muse_glimmer": dict(
        seed=39,
        # Counted from the last layer, every fourth sees all keys and has no positions: the first and the fifth.
        config=lambda: MuseGlimmerConfig(
            text_config=MuseGlimmerTextConfig(
                **dict(SIZES, intermediate_size=48), num_hidden_layers=5, num_key_value_heads=2, head_dim=16,
                rms_norm_eps=1e-2, post_norm_eps=3e-2, sliding_window=5, qk_scale_factor=1.5, output_multiplier=0.5,
                final_logit_softcapping=3.0, pad_token_id=None, rope_parameters=dict(PLAIN_ROPE),
            ).to_dict(),
            vision_config=dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                               patch_size=2, pos_emb_height=2, pos_emb_width=2),
            # Tokens of images are replaced by token 0, so rows have none.
            out_hidden_size=32, projector_hidden_size=8, image_token_id=1000, video_token_id=1001,
        ),
        lora=dict(target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"),
        full=True,
    ),
    "glm4": dict(
        seed=32,
        config=lambda: Glm4Config(
            **dict(SIZES, intermediate_size=48), num_hidden_layers=2, num_key_value_heads=2, head_dim=16,
            rms_norm_eps=1e-5, attention_bias=True, pad_token_id=None, tie_word_embeddings=False,
            rope_parameters=dict(PLAIN_ROPE, partial_rotary_factor=0.5),
        ),
        lora=dict(target_modules="all-linear"),
        full=True,
    ),
}

# Families whose norms multiply by 1 + weight.
NORMS_ADD_ONE = ("gemma2", "gemma3_text", "gemma3", "muse_glimmer", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
# Multimodal classes that AutoModelForCausalLM does not know.
WHOLE_ONLY = ("muse_glimmer",)
# Families with a golden of the auxiliary loss of routers.
ROUTER_LOSS_FAMILIES = ("qwen3_moe", "gpt_oss")
