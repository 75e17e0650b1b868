#!/usr/bin/env python3
"""Writes the goldens of the decoder families: tiny random models, and what transformers and PEFT
compute with them.

Per family, under OUTPUT/<family>/:

    config.json, generation_config.json, model.safetensors
                            the base model, as transformers saves it, in f32
    config.hub.json         the same config as most models on the hub spell it, see hub_spelling.py
    adapter/                a LoRA adapter with A and B both non-zero, as PEFT saves it
    golden.safetensors      one right-padded micro-batch and its answers:
        input_ids, attention_mask, labels   [row, position], labels unshifted, -100 outside the loss
        logits.<row>                        [length, vocabulary] with the adapter; real tokens only
        base_logits.<row>                   the same without it
        merged_logits.<row>                 the same after merge_and_unload
        grad.<PEFT file name>               gradient of (sum of token losses / trained tokens)
    golden.json             losses, versions, inverse rope frequencies (of LongRoPE the short and the long
                            ones), and how far f32 is from f64
    rows.jsonl              12 rows of tokens, the training data of curves.json
    curves.json             loss, gradient norm and learning rate of each step of a few short runs
    final_clip_cosine.safetensors   the adapter after the last step of that run
    router_loss.json, router_loss.safetensors
                            (some mixtures) losses and gradients with the auxiliary loss of the routers, and a curve
    generation.json         what transformers says greedily with its cache, see golden_generation.py
    adapter_stacked/        (Qwen3-MoE's experts) the same adapter as PEFT saves it again: one branch for all experts

Branches of gpt-oss's experts are PEFT's own (`target_parameters`): adapter/ and the last step's have them as PEFT saves
them. Gradients of these are under the names of single experts, such as `mlp.experts.3.gate_up_proj.lora_A.weight`,
and golden.json has what the model with the adapter says greedily after a prompt.

and OUTPUT/rope.json: inverse frequencies of published configs, for the branches that tiny heads do
not reach.

The f64 figures set the tolerances. An f32 implementation may differ from this one by about as much
as this one differs from f64: then both are equally exact. golden_float64.py makes that reference.

Same versions (requirements.txt) and same kind of CPU: same bytes. Another CPU may round
differently.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here comes from the hub; a lookup would be a mistake

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DeepseekV3Config, Gemma2Config, Gemma3Config,
    Gemma3TextConfig, Gemma4TextConfig, Glm4Config, Glm4MoeConfig, Glm4MoeLiteConfig, GptOssConfig, GraniteConfig,
    GraniteMoeHybridConfig, Lfm2Config, Lfm2MoeConfig, LlamaConfig, Ministral3Config, MistralConfig, MuseGlimmerConfig,
    MuseGlimmerTextConfig, Olmo3Config, Phi3Config, Qwen2Config, Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3Config,
    Qwen3MoeConfig, Qwen3NextConfig, SmolLM3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from golden_float64 import NoFloat32, in_float64, inverse_frequencies_float64, operations_of, rotary_layer_types
from golden_generation import answers
from hub_spelling import hub_spelling, wraps

IGNORED = -100
VOCABULARY = 96
# An ordinary token of these models: only the mask and the labels tell padding apart.
PADDING_ID = 0
MICRO_BATCH_LENGTHS = (17, 23, 9)
# Uneven on purpose: with equal numbers of trained tokens, a mean of means would pass for the mean.
ROW_LENGTHS = (12, 25, 7, 18, 21, 9, 30, 14, 6, 22, 16, 11)
GREEDY_PROMPT = (5, 17, 42, 9, 33, 8, 61)
GLOBAL_BATCH_SIZE = 4
MICRO_BATCH_SIZE = 2
STEPS = 20
FULL_STEPS = 10

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

VARIANTS = {
    "constant": dict(learning_rate=1e-2, weight_decay=0.01, max_grad_norm=0.0, schedule="constant",
                     warmup_steps=0, min_lr_ratio=0.0, steps=STEPS),
    "clip_cosine": dict(learning_rate=1e-2, weight_decay=0.01, max_grad_norm=0.1, schedule="cosine",
                        warmup_steps=4, min_lr_ratio=0.1, steps=STEPS),
    "linear": dict(learning_rate=1e-2, weight_decay=0.01, max_grad_norm=0.0, schedule="linear",
                   warmup_steps=5, min_lr_ratio=0.0, steps=STEPS),
}
FULL_VARIANT = dict(learning_rate=1e-3, weight_decay=0.01, max_grad_norm=0.0, schedule="constant",
                    warmup_steps=0, min_lr_ratio=0.0, steps=FULL_STEPS)


# --- models ---------------------------------------------------------------------------------------


def save_base_model(specification, directory):
    """A random model in which every weight matters: norms near one but not one, biases not zero."""
    torch.manual_seed(specification["seed"])
    config = specification["config"]()
    model = model_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
                is_text = not any(part in name for part in ("vision", "visual", "linear_attn"))
                if name == "model.language_model.norm.weight" and config.model_type == "muse_glimmer":
                    continue  # its last norm alone does not add one
                if is_text and config.model_type in NORMS_ADD_ONE:
                    parameter.sub_(1.0)
                elif config.model_type == "gemma4_text" and ("q_norm" in name or ".post_" in name):
                    parameter.mul_(0.4)  # sharp softmaxes, and 18 large steps from the embedding, magnify rounding
            elif name.endswith((".bias", ".dt_bias", "_proj_bias")):
                parameter.normal_(0.0, 0.3)
            elif name.endswith(".A_log"):
                parameter.uniform_(-3.0, 1.0)
            elif name.endswith((".sinks", ".conv.conv.weight")):
                parameter.normal_(0.0, 1.0)
            elif name.endswith((".scale", ".per_expert_scale")):
                parameter.uniform_(0.5, 1.5)
            elif config.model_type == "gpt_oss" and name.endswith(".experts.gate_up_proj"):
                parameter.mul_(5.0)  # so that gates and values reach the limit
        for name, buffer in model.named_buffers():
            if name.endswith((".e_score_correction_bias", ".expert_bias")):
                buffer.normal_(0.0, 0.2)
            elif name.endswith(".layer_scalar"):
                buffer.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    if specification.get("mxfp4"):
        pack_experts(directory)


def model_class(config):
    return AutoModelForImageTextToText if config.model_type in WHOLE_ONLY else AutoModelForCausalLM


def save_adapter(specification, directory):
    """PEFT starts B at zero, where a wrong A or scale would not show; so both are random here."""
    base = load_base(directory)
    base.name_or_path = ""  # else the adapter would name a path of this machine
    base.config._name_or_path = ""
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, task_type="CAUSAL_LM", **specification["lora"])
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.normal_(0.0, 0.2)
            elif "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(directory / "adapter")
    if specification.get("expert_branches"):
        add_expert_branches(directory / "adapter", model)
    # An empty form of a model card.
    (directory / "adapter" / "README.md").unlink(missing_ok=True)
    # PEFT holds target_modules in a set, whose order Python draws anew in each process.
    path = directory / "adapter" / "adapter_config.json"
    saved = json.loads(path.read_text())
    for key in ("target_modules", "target_parameters"):
        if isinstance(saved.get(key), list):
            saved[key].sort()
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")


def load_base(directory, float64=False, attention=None):
    """The model, by default with sdpa where that can do what the family has: caps of scores and sinks it cannot."""
    config = AutoConfig.from_pretrained(directory)
    attention = attention or ("eager" if config.model_type in ("gemma2", "gpt_oss") else "sdpa")
    # Grouped products of experts exist in f32 and 16 bits only.
    plain = dict(dtype=torch.float32, attn_implementation=attention, experts_implementation="eager")
    if getattr(config, "quantization_config", None):
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, **plain)
        model.load_state_dict(unpacked_experts(load_file(directory / "model.safetensors")))
        model.eval()
    else:
        model = model_class(config).from_pretrained(directory, **plain)
    return in_float64(model) if float64 else model


def load_with_adapter(directory, float64=False):
    model = with_adapter(load_base(directory), directory / "adapter")
    return in_float64(model) if float64 else model


def with_adapter(model, adapter):
    """The model with the adapter by PEFT, but branches of experts as `add_branches` computes them."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    if not any(re.search(r"\.experts\.\d", name) for name in tensors):
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    config = LoraConfig.from_pretrained(str(adapter))
    config.target_modules = {"q_proj"}
    config.inference_mode = False
    model = get_peft_model(model, config)
    add_branches(model, config)
    found = {peft_file_name(name): parameter for name, parameter in model.named_parameters() if "lora_" in name}
    assert found.keys() == tensors.keys(), found.keys() ^ tensors.keys()
    with torch.no_grad():
        for name, parameter in found.items():
            parameter.copy_(tensors[name])
    return model


# --- experts in MXFP4 -----------------------------------------------------------------------------
#
# The files of gpt-oss on the hub: four bits a value, and a power of two for each 32 of a row.

MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def pack_experts(directory):
    """Random experts in MXFP4 instead of the dense ones of a gpt-oss model."""
    path = directory / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            tensors[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        blocks = (experts, outputs, inputs // 32)
        low, high = ((-4, -1) if "gate_up" in name else (-6, -3))
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(127 + low, 127 + high, blocks, dtype=torch.uint8)
    save_file(tensors, path, {"format": "pt"})
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                                   "lm_head"],
        "quant_method": "mxfp4",
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def unpacked_experts(tensors):
    """The tensors with dense experts, [expert, input, output]."""
    table = torch.tensor(MXFP4_VALUES)
    table = torch.cat((table, -table))
    dense = {}
    for name, tensor in tensors.items():
        if name.endswith("_scales"):
            continue
        if not name.endswith("_blocks"):
            dense[name] = tensor
            continue
        name = name.removesuffix("_blocks")
        values = table[torch.stack((tensor & 15, tensor >> 4), dim=-1).long()].flatten(3)
        values = values * torch.exp2(tensors[f"{name}_scales"].float() - 127)[..., None]
        dense[name] = values.flatten(2).transpose(1, 2).contiguous()
    return dense


# --- branches of experts --------------------------------------------------------------------------
#
# transformers 5 holds all experts of a layer in two parameters. PEFT 0.21 gives each of those one branch
# and turns adapters with a branch for each projection of each expert into such. Trained that way they
# become something else: so a plain loop over the experts is the reference here, and PEFT is for loading.


def expert_modules(model):
    return [module for module in model.modules() if type(module).__name__ == "Qwen3MoeExperts"]


def add_branches(model, config):
    """Gives each projection of each expert a branch, under the name that PEFT's older files have."""
    for experts in expert_modules(model):
        hidden, inner = experts.hidden_dim, experts.intermediate_dim
        experts.branch_scale = config.lora_alpha / config.r
        for number in range(experts.num_experts):
            expert = torch.nn.Module()
            for part, inputs, outputs in [("gate_proj", hidden, inner), ("up_proj", hidden, inner), ("down_proj", inner, hidden)]:
                branch = torch.nn.Module()
                branch.lora_A = torch.nn.Linear(inputs, config.r, bias=False)
                branch.lora_B = torch.nn.Linear(config.r, outputs, bias=False)
                expert.add_module(part, branch)
            experts.add_module(str(number), expert)
        experts.forward = experts_with_branches.__get__(experts)


def experts_with_branches(self, hidden, chosen, weights):
    out = torch.zeros_like(hidden)

    def product(x, weight, branch):
        return x @ weight.T + self.branch_scale * branch.lora_B(branch.lora_A(x))

    for number in range(self.num_experts):
        token, place = torch.where(chosen == number)
        if len(token) == 0:
            continue
        expert, x = getattr(self, str(number)), hidden[token]
        gate_weight, up_weight = self.gate_up_proj[number].chunk(2, dim=0)
        inner = self.act_fn(product(x, gate_weight, expert.gate_proj)) * product(x, up_weight, expert.up_proj)
        y = product(inner, self.down_proj[number], expert.down_proj)
        out = out.index_add(0, token, y * weights[token, place, None])
    return out


def add_expert_branches(adapter, model):
    """Adds random branches of experts to an adapter's files."""
    add_branches(model, model.peft_config["default"])
    tensors = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            if ".experts." in name:
                parameter.data.normal_(0.0, 0.2 if "lora_A" in name else 0.1)
            tensors[peft_file_name(name)] = parameter.detach().contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    path = adapter / "adapter_config.json"
    saved = json.loads(path.read_text())
    saved["target_modules"] = ["down_proj", "gate_proj", "q_proj", "up_proj"]
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")


def of_single_experts(tensors, model):
    """PEFT's branches of stacked parameters, A [e * r, in] and B [out, r * e], as those of single experts."""
    count = getattr(model.config, "num_local_experts", None)
    found = {}
    for name, tensor in tensors.items():
        # The branch of gate_up_proj is the inner one of two.
        place = re.fullmatch(r"(.*\.mlp\.experts)(\.base_layer)?\.lora_([AB])\.weight", name)
        if not place:
            found[name] = tensor
            continue
        part = "gate_up_proj" if place[2] else "down_proj"
        for expert in range(count):
            if place[3] == "A":
                own = tensor.reshape(count, -1, tensor.shape[1])[expert]
            else:
                own = tensor.reshape(tensor.shape[0], -1, count)[:, :, expert]
            found[f"{place[1]}.{expert}.{part}.lora_{place[3]}.weight"] = own.contiguous()
    return found


@contextlib.contextmanager
def without_adapter(model):
    scales = {experts: experts.branch_scale for experts in expert_modules(model) if hasattr(experts, "branch_scale")}
    for experts in scales:
        experts.branch_scale = 0.0
    with model.disable_adapter():
        yield
    for experts, scale in scales.items():
        experts.branch_scale = scale


def merged(model):
    for experts in expert_modules(model):
        if not hasattr(experts, "branch_scale"):
            continue
        for number in range(experts.num_experts):
            expert = getattr(experts, str(number))
            change = lambda branch: experts.branch_scale * branch.lora_B.weight @ branch.lora_A.weight
            experts.gate_up_proj.data[number] += torch.cat([change(expert.gate_proj), change(expert.up_proj)])
            experts.down_proj.data[number] += change(expert.down_proj)
        experts.branch_scale = 0.0
    return model.merge_and_unload()


def save_stacked(directory, batch):
    """The adapter as PEFT loads it, which is the same function, and saves it again."""
    base = load_base(directory)
    base.name_or_path = ""
    model = PeftModel.from_pretrained(base, str(directory / "adapter"))
    with torch.no_grad():
        difference = (forward(model, batch) - forward(load_with_adapter(directory), batch)).abs()
    assert difference[batch["attention_mask"].bool()].max() < 1e-4, "PEFT loads another adapter"
    model.save_pretrained(directory / "adapter_stacked")
    (directory / "adapter_stacked" / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_stacked" / "adapter_config.json"
    saved = json.loads(path.read_text())
    saved["target_parameters"].sort()
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")


# --- rows and losses ------------------------------------------------------------------------------


def random_row(length, generator, vocabulary=VOCABULARY):
    """Tokens and unshifted labels: a prompt outside the loss, and in longer rows a second gap."""
    input_ids = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
    labels = list(input_ids)
    prompt = int(torch.randint(2, max(3, length // 2), (1,), generator=generator))
    labels[:prompt] = [IGNORED] * prompt
    if length > 15:
        gap = prompt + 2
        labels[gap:gap + 3] = [IGNORED] * 3
    return {"input_ids": input_ids, "labels": labels}


def pad(rows):
    """Rows as [row, position] tensors, padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    missing = [longest - len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.tensor([row["input_ids"] + [PADDING_ID] * n for row, n in zip(rows, missing)]),
        "attention_mask": torch.tensor([[1] * len(row["input_ids"]) + [0] * n for row, n in zip(rows, missing)]),
        "labels": torch.tensor([row["labels"] + [IGNORED] * n for row, n in zip(rows, missing)]),
    }


def forward(model, batch):
    with operations_of(model):
        if model.config.model_type == "phi3":
            return forward_by_row(model, batch)
        more = {}
        if model.config.model_type == "gemma3":  # wants to know which tokens are of images: none
            more["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        more["attention_mask"] = batch["attention_mask"]
        return model(input_ids=batch["input_ids"], use_cache=False, **more).logits


def forward_by_row(model, batch):
    """Each row alone, without padding: in a batch, the longest row chooses LongRoPE's factors for all of them."""
    longest = batch["input_ids"].shape[1]
    rows = []
    for row, length in zip(batch["input_ids"], batch["attention_mask"].sum(dim=1).tolist()):
        logits = model(input_ids=row[None, :length], use_cache=False).logits
        rows.append(torch.nn.functional.pad(logits, (0, 0, 0, longest - length)))
    return torch.cat(rows)


def token_losses(logits, labels):
    """Loss of each trained token: logits at a position answer for the label of the next."""
    targets = labels[:, 1:].flatten()
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED, reduction="none"
    )
    return losses[targets != IGNORED]


def trained_tokens(rows):
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])


def mean_loss(model, rows):
    """Mean token loss over rows, each row alone."""
    with torch.no_grad():
        total = sum(
            token_losses(forward(model, batch), batch["labels"]).double().sum().item()
            for batch in (pad([row]) for row in rows)
        )
    return total / trained_tokens(rows)


def peft_file_name(parameter_name):
    """PEFT leaves the adapter's name out of its files."""
    return parameter_name.replace(".default.", ".")


def lora_parameters(model):
    return {peft_file_name(name): p for name, p in model.named_parameters() if p.requires_grad}


# --- one micro-batch ------------------------------------------------------------------------------


def answers_to_micro_batch(directory, batch, float64):
    model = load_with_adapter(directory, float64)
    lengths = batch["attention_mask"].sum(dim=1).tolist()

    def per_row(prefix, logits):
        return {f"{prefix}.{i}": logits[i, :n].detach().clone() for i, n in enumerate(lengths)}

    with NoFloat32() if float64 else contextlib.nullcontext():
        logits = forward(model, batch)
        losses = token_losses(logits, batch["labels"])
        (losses.sum() / losses.numel()).backward()
        tensors = per_row("logits", logits)
        gradients = {name: parameter.grad.clone() for name, parameter in lora_parameters(model).items()}
        tensors |= {f"grad.{name}": gradient for name, gradient in of_single_experts(gradients, model).items()}
        with torch.no_grad():
            with without_adapter(model):
                base_logits = forward(model, batch)
            base_losses = token_losses(base_logits, batch["labels"])
            tensors |= per_row("base_logits", base_logits)
            tensors |= per_row("merged_logits", forward(merged(model), batch))
    scalars = {
        "trained_tokens": losses.numel(),
        # Token losses in the model's own type, summed in f64.
        "loss_sum": losses.double().sum().item(),
        "loss_sum_f32": losses.float().sum().item(),
        "base_loss_sum": base_losses.double().sum().item(),
    }
    return tensors, scalars


def largest_difference(prefix, tensors, reference):
    return max((t.double() - reference[k]).abs().max().item() for k, t in tensors.items() if k.startswith(prefix))


def relative_norm(pairs):
    pairs = [(a.double(), b) for a, b in pairs]
    difference = math.sqrt(sum((a - b).pow(2).sum().item() for a, b in pairs))
    return difference / math.sqrt(sum(b.pow(2).sum().item() for _, b in pairs))


def greedy(model):
    """Twelve tokens after a prompt, each with the highest logit, and how far that is above the next one at least."""
    tokens, margin = list(GREEDY_PROMPT), math.inf
    for _ in range(12):
        with torch.no_grad():
            logits = forward(model, pad([{"input_ids": tokens, "labels": tokens}]))[0, -1]
        best, second = logits.topk(2).values.tolist()
        margin = min(margin, best - second)
        tokens.append(int(logits.argmax()))
    assert margin > 1e-3, "rounding would choose the tokens"
    return {"prompt": list(GREEDY_PROMPT), "tokens": tokens[len(GREEDY_PROMPT):], "margin": margin}


def write_golden(family, directory, micro_batch_rows, rows):
    batch = pad(micro_batch_rows)
    tensors, scalars = answers_to_micro_batch(directory, batch, float64=False)
    exact, exact_scalars = answers_to_micro_batch(directory, batch, float64=True)
    gradients = [(t, exact[k]) for k, t in tensors.items() if k.startswith("grad.")]

    assert all(a.abs().max() > 0 for a, _ in gradients), "a gradient is zero: the golden would not test it"
    effect = largest_difference("logits.", tensors,
                                {k: tensors[f"base_{k}"].double() for k in tensors if k.startswith("logits.")})
    assert effect > 0.1, "the adapter hardly changes the logits"

    model = load_with_adapter(directory)
    with without_adapter(model):
        rows_loss_base = mean_loss(model, rows)
    frequencies = []
    for rotary in model.modules():
        for kind in rotary_layer_types(rotary):
            found = getattr(rotary, "original_inv_freq" if kind is None else f"{kind}_original_inv_freq")
            assert torch.allclose(found.double(), inverse_frequencies_float64(rotary.config, kind), rtol=1e-6, atol=0)
            frequencies.append(found)
    long = {}
    if model.config.model_type == "phi3":
        original = model.config.original_max_position_embeddings
        found, _ = ROPE_INIT_FUNCTIONS["longrope"](model.config, seq_len=original + 1)
        exact_found = inverse_frequencies_float64(model.config, long=True)
        assert torch.allclose(found.double(), exact_found, rtol=1e-6, atol=0)
        long = {"long_inverse_frequencies": found.tolist()}

    golden = {
        "family": family,
        "versions": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__,
                     "peft": peft.__version__},
        "rows": micro_batch_rows,
        "micro_batch": scalars,
        "rows_jsonl": {  # mean token loss over rows.jsonl
            "trained_tokens": trained_tokens(rows),
            "base_loss": rows_loss_base,
            "adapter_loss": mean_loss(model, rows),
            "adapter_loss_f64": mean_loss(load_with_adapter(directory, float64=True), rows),
        },
        "inverse_frequencies": frequencies[0].tolist() if frequencies else [],
        **long,
        "noise": {  # this f32 run against the same in f64
            "logits_max_abs": largest_difference("logits.", tensors, exact),
            "base_logits_max_abs": largest_difference("base_logits.", tensors, exact),
            "merged_logits_max_abs": largest_difference("merged_logits.", tensors, exact),
            "logits_largest": max(t.abs().max().item() for k, t in tensors.items() if k.startswith("logits.")),
            "loss_sum_relative": abs(scalars["loss_sum"] / exact_scalars["loss_sum"] - 1),
            "gradients_relative_norm": relative_norm(gradients),
            "gradients_worst_relative_norm": max(relative_norm([pair]) for pair in gradients),
        },
        "adapter_changes_logits_by": effect,
    }
    if model.peft_config["default"].target_parameters:
        golden["greedy"] = greedy(load_with_adapter(directory))
    save_file({**batch, **{k: t.contiguous() for k, t in tensors.items()}}, directory / "golden.safetensors")
    write_json(directory / "golden.json", golden)
    return golden


# --- training curves ------------------------------------------------------------------------------


def learning_rate_factor(step, variant):
    """transformers' get_linear_ and get_cosine_schedule_with_warmup, with a floor.

    `step` counts from 0. So the first step of a run with warm-up has learning rate 0, and the last
    one is still above the floor.
    """
    warmup, total, floor = variant["warmup_steps"], variant["steps"], variant["min_lr_ratio"]
    if step < warmup:
        return step / max(1, warmup)
    if variant["schedule"] == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if variant["schedule"] == "cosine" else 1 - progress
    return floor + (1 - floor) * shape


def backward_of_step(model, rows):
    """Adds the gradient of the mean loss of these rows, and returns the sum of their token losses."""
    tokens = trained_tokens(rows)
    loss_sum = 0.0
    for start in range(0, GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE):
        batch = pad(rows[start:start + MICRO_BATCH_SIZE])
        losses = token_losses(forward(model, batch), batch["labels"])
        (losses.sum() / tokens).backward()  # all tokens of the step, not of the micro-batch
        loss_sum += losses.detach().double().sum().item()
    return loss_sum, {}


def train(model, parameters, rows, variant, backward=backward_of_step):
    """The simplest training loop; returns the report of each step."""
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=variant["learning_rate"], betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=variant["weight_decay"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, variant))
    reports = []
    for step in range(variant["steps"]):
        first = step * GLOBAL_BATCH_SIZE % len(rows)
        step_rows = rows[first:first + GLOBAL_BATCH_SIZE]
        tokens = trained_tokens(step_rows)
        loss_sum, more = backward(model, step_rows)
        # Returns the norm before clipping, and scales by max / (norm + 1e-6) where that is below 1.
        gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, variant["max_grad_norm"] or math.inf)
        reports.append({"step": step + 1, "loss": loss_sum / tokens, "grad_norm": gradient_norm.item(),
                        "learning_rate": scheduler.get_last_lr()[0], "trained_tokens": tokens, **more})
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return reports


def curve(variant, reports, exact_reports):
    def noise(key):
        return max(abs(a[key] / b[key] - 1) for a, b in zip(reports, exact_reports))

    return {**variant, "noise": {"loss_relative": noise("loss"), "grad_norm_relative": noise("grad_norm")},
            "curve": reports}


def write_curves(directory, rows, full):
    curves = {}
    for name, variant in VARIANTS.items():
        results = []
        for float64 in (False, True):
            model = load_with_adapter(directory, float64)
            parameters = lora_parameters(model)
            results.append((train(model, list(parameters.values()), rows, variant), parameters))
        (reports, final), (exact_reports, exact_final) = results
        curves[name] = curve(variant, reports, exact_reports)
        curves[name]["noise"]["final_relative_norm"] = relative_norm(
            [(final[k].detach(), exact_final[k].detach()) for k in final])
        if name == "clip_cosine":
            save_file({k: p.detach().contiguous() for k, p in final.items()}, directory / f"final_{name}.safetensors")
    if full:
        results, first_norms = [], {}
        for float64 in (False, True):
            model = load_base(directory, float64)
            if not float64:
                first_norms = first_gradient_norms(copy.deepcopy(model), rows)
            results.append(train(model, list(model.parameters()), rows, FULL_VARIANT))
        curves["full"] = curve(FULL_VARIANT, *results)
        curves["full"]["first_gradient_norms"] = first_norms
    document = {
        "global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": MICRO_BATCH_SIZE,
        "optimizer": {"name": "adamw", "betas": [0.9, 0.999], "eps": 1e-8},
        "variants": curves,
    }
    write_json(directory / "curves.json", document)
    return document


def first_gradient_norms(model, rows):
    """Gradient norm of each parameter in step 1: says which one is wrong when the total is."""
    step_rows = rows[:GLOBAL_BATCH_SIZE]
    batch = pad(step_rows)
    (token_losses(forward(model, batch), batch["labels"]).sum() / trained_tokens(step_rows)).backward()
    found = model.named_parameters()  # a vision tower has no gradients
    return {name.replace("model.language_model.", "model."): parameter.grad.norm().item()
            for name, parameter in found if parameter.grad is not None}


# --- the auxiliary loss of routers ----------------------------------------------------------------
#
# Each row alone, as transformers computes it with a batch of that row. Rows are weighted by their trained
# tokens, as token losses are.

ROUTER_LOSS_FAMILIES = ("qwen3_moe", "gpt_oss")
ROUTER_LOSS_COEFFICIENT = 0.1
ROUTER_LOSS_VARIANT = dict(VARIANTS["constant"], steps=10)


def backward_with_router_loss(model, rows):
    """Adds the gradient of the mean loss of these rows with the auxiliary loss. Returns the sum of their token
    losses, and the mean of the auxiliary losses without the coefficient."""
    inner = model.get_base_model()
    inner.router_aux_loss_coef = ROUTER_LOSS_COEFFICIENT
    tokens, loss_sum, router_loss = trained_tokens(rows), 0.0, 0.0
    for row in rows:
        batch, own = pad([row]), trained_tokens([row])
        with operations_of(model):
            found = model(**batch, use_cache=False, output_router_logits=True)
        (found.loss * (own / tokens)).backward()
        alone = found.aux_loss.double().item()
        loss_sum += (found.loss.double().item() - ROUTER_LOSS_COEFFICIENT * alone) * own
        router_loss += alone * own / tokens
    return loss_sum, {"router_aux_loss": router_loss}


def write_router_loss(directory, micro_batch_rows, rows):
    of_types = []
    for float64 in (False, True):
        model = load_with_adapter(directory, float64)
        loss_sum, more = backward_with_router_loss(model, micro_batch_rows)
        gradients = {name: parameter.grad.clone() for name, parameter in lora_parameters(model).items()}
        of_types.append((loss_sum, more["router_aux_loss"], of_single_experts(gradients, model)))
    (loss_sum, router_loss, gradients), (exact_sum, exact_loss, exact) = of_types
    without = load_file(directory / "golden.safetensors")
    effect = relative_norm([(gradient, without[f"grad.{name}"].double()) for name, gradient in gradients.items()])
    assert effect > 1e-2, "the auxiliary loss hardly changes the gradients"
    results = []
    for float64 in (False, True):
        model = load_with_adapter(directory, float64)
        results.append(train(model, list(lora_parameters(model).values()), rows, ROUTER_LOSS_VARIANT,
                             backward_with_router_loss))
    document = {
        "coefficient": ROUTER_LOSS_COEFFICIENT,
        "micro_batch": {"loss_sum": loss_sum, "router_aux_loss": router_loss},
        "changes_gradients_by": effect,
        "noise": {
            "loss_sum_relative": abs(loss_sum / exact_sum - 1),
            "router_aux_loss_relative": abs(router_loss / exact_loss - 1),
            "gradients_worst_relative_norm": max(relative_norm([(gradients[name], exact[name])]) for name in gradients),
        },
        "global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": MICRO_BATCH_SIZE,
        "variant": curve(ROUTER_LOSS_VARIANT, *results),
    }
    save_file({f"grad.{name}": gradient.contiguous() for name, gradient in gradients.items()},
              directory / "router_loss.safetensors")
    write_json(directory / "router_loss.json", document)
    return document


# --- greedy answers -------------------------------------------------------------------------------


def write_generation(directory):
    """Returns how many prompts were not taken, because rounding might choose a token of their answers."""
    base = load_base(directory, attention="eager")
    adapted = with_adapter(load_base(directory, attention="eager"), directory / "adapter").eval()
    document, passed_over = {}, 0
    for name, model in (("base", base), ("adapter", adapted)):
        last_logits = lambda tokens: forward(model, pad([{"input_ids": tokens, "labels": tokens}]))[0, -1]
        document[name], more = answers(model, last_logits, VOCABULARY)
        passed_over += more
    write_json(directory / "generation.json", document)
    return passed_over


# --- checks and files -----------------------------------------------------------------------------


def check_sliding_window(directory, batch):
    """Checks that the window is applied: otherwise its golden would prove nothing."""
    windowed, unlimited = load_base(directory), load_base(directory)
    text_config = unlimited.config.get_text_config()
    window = text_config.sliding_window
    text_config.sliding_window = text_config.max_position_embeddings
    eager = load_base(directory, attention="eager")
    with torch.no_grad():
        narrow, wide, other = forward(windowed, batch)[1], forward(unlimited, batch)[1], forward(eager, batch)[1]
    # The window counts the token itself: position `window` is the first that does not see
    # position 0.
    assert (narrow - wide)[:window].abs().max() < 1e-4, "the window bites too early"
    assert (narrow - wide)[window].abs().max() > 1e-3, "the window is not applied"
    assert (narrow - other).abs().max() < 1e-4, "sdpa and eager disagree"


def check_gate_limit(directory, batch):
    """Checks that gates or values of gpt-oss's experts reach their limit in each layer."""
    limited, unlimited = load_base(directory), load_base(directory)
    for layer in unlimited.model.layers:
        layer.mlp.experts.limit = math.inf
        with torch.no_grad():
            change = (forward(limited, batch) - forward(unlimited, batch)).abs().max()
        assert change > 1e-3, "the limit is not reached"
        layer.mlp.experts.limit = limited.config.swiglu_limit


def write_hub_config(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.hub.json").write_text(json.dumps(hub_spelling(config), indent=2, sort_keys=True) + "\n")


def check_hub_config(directory, batch):
    """Checks that config.hub.json is the same model for transformers, with the names that files have beside it."""
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        shutil.copy(directory / "config.hub.json", temporary / "config.json")
        tensors = load_file(directory / "model.safetensors")
        if wraps(directory):
            tensors = {name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()}
        save_file(tensors, temporary / "model.safetensors", {"format": "pt"})
        with torch.no_grad():
            difference = (forward(load_base(temporary), batch) - forward(load_base(directory), batch)).abs().max()
    # Where a tensor lies in its file decides how it is aligned in memory, and so the order of some sums.
    assert difference < 1e-5, f"config.hub.json does not mean the same model: logits differ by {difference}"


def published_rope():
    """Inverse frequencies of real Llama 3 configs: these reach all branches of the smoothing."""
    published = {
        "Llama-3.1-8B": (128, 500000.0, 8.0),
        "Llama-3.2-1B": (64, 500000.0, 32.0),
    }
    tables = {}
    for name, (head_size, theta, factor) in published.items():
        rope = dict(LLAMA3_ROPE, rope_theta=theta, factor=factor, original_max_position_embeddings=8192)
        config = LlamaConfig(hidden_size=head_size, num_attention_heads=1, head_dim=head_size,
                             max_position_embeddings=131072, rope_parameters=dict(rope))
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        assert torch.allclose(frequencies.double(), inverse_frequencies_float64(config), rtol=1e-6, atol=0)
        tables[name] = {"head_dim": head_size, "rope_parameters": rope, "inverse_frequencies": frequencies.tolist()}
    return tables


def write_json(path, value):
    text = json.dumps(value, indent=2)
    # Lists of numbers and the flat objects of a curve on one line each, for readable diffs.
    text = re.sub(r"\[[^\[\]{}\"]*\]", lambda match: "[" + " ".join(match[0][1:-1].split()) + "]", text)
    text = re.sub(r"\{\s*\"step\"[^{}]*\}", lambda match: " ".join(match[0].split()), text)
    path.write_text(text + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "models"
    parser.add_argument("--output", type=Path, default=default, help="default: tests/goldens/models")
    parser.add_argument("--router-loss", action="store_true", help="only router_loss.*, of models that are there")
    parser.add_argument("--generation", action="store_true", help="only generation.json, of models that are there")
    parser.add_argument("--hub-config", action="store_true", help="only config.hub.json, of models that are there")
    parser.add_argument("--family", choices=list(FAMILIES), action="append", help="only this one; default: all")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    for family in arguments.family or FAMILIES:
        specification = FAMILIES[family]
        directory = arguments.output / family
        if arguments.router_loss:
            if family in ROUTER_LOSS_FAMILIES:
                micro_batch_rows = json.loads((directory / "golden.json").read_text())["rows"]
                rows = [json.loads(line) for line in (directory / "rows.jsonl").read_text().splitlines()]
                print(family, write_router_loss(directory, micro_batch_rows, rows)["noise"])
            continue
        if arguments.generation:
            print(f"{family}: {write_generation(directory)} prompts not taken", flush=True)
            continue
        if arguments.hub_config:
            write_hub_config(directory)
            check_hub_config(directory, pad(json.loads((directory / "golden.json").read_text())["rows"]))
            print(f"{family}: transformers computes the same with config.hub.json", flush=True)
            continue
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        generator = torch.Generator().manual_seed(1000 + specification["seed"])
        micro_batch_rows = [random_row(length, generator) for length in MICRO_BATCH_LENGTHS]
        rows = [random_row(length, generator) for length in ROW_LENGTHS]
        (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        save_base_model(specification, directory)
        save_adapter(specification, directory)
        batch = pad(micro_batch_rows)
        write_hub_config(directory)
        check_hub_config(directory, batch)
        if family in ("mistral", "gemma3", "olmo3", "gemma2", "gpt_oss", "gpt_oss_experts", "gemma4", "muse_glimmer"):
            check_sliding_window(directory, batch)
        if family.startswith("gpt_oss"):
            check_gate_limit(directory, batch)
        if specification.get("expert_branches"):
            save_stacked(directory, batch)
        golden = write_golden(family, directory, micro_batch_rows, rows)
        curves = write_curves(directory, rows, specification.get("full", False))
        if family in ROUTER_LOSS_FAMILIES:
            write_router_loss(directory, micro_batch_rows, rows)
        write_generation(directory)

        noise = golden["noise"]
        print(f"{family}: logits {noise['logits_max_abs']:.1e} (of {noise['logits_largest']:.1f}), "
              f"gradients {noise['gradients_relative_norm']:.1e} (worst {noise['gradients_worst_relative_norm']:.1e})")
        for name, variant in curves["variants"].items():
            first, last = variant["curve"][0]["loss"], variant["curve"][-1]["loss"]
            figures = ", ".join(f"{key} {value:.1e}" for key, value in variant["noise"].items())
            print(f"  {name}: loss {first:.4f} -> {last:.4f}; noise: {figures}")
    write_json(arguments.output / "rope.json", published_rope())
    size = sum(path.stat().st_size for path in arguments.output.rglob("*") if path.is_file())
    print(f"{size / 1e6:.2f} MB in {arguments.output}")
    if size > 14_000_000:
        sys.exit("the goldens are larger than 14 MB")


if __name__ == "__main__":
    main()
