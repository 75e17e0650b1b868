#!/usr/bin/env python3
"""Models of random weights in the shapes that benches/results/*-families-step.json names, and a file of tokens, for
lora_step.py. Needs torch and transformers.

    benches/family_models.py DIR [NAME ...]
"""
import pathlib, sys

import torch
import transformers

from lora_recipe import make_tokens

VOCABULARY = 8192


def moe_100m():
    """Qwen3-MoE: 32 experts of width 192, 4 a token."""
    return transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1536, moe_intermediate_size=192, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, num_experts=32, num_experts_per_tok=4,
        norm_topk_prob=True, tie_word_embeddings=True)


def qwen3_5():
    """Qwen3.5: six gated delta nets and two layers of gated attention."""
    return transformers.Qwen3_5TextConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=128, linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=64,
        linear_value_head_dim=64, tie_word_embeddings=True)


def gemma3_270m():
    """Gemma 3 270M, with its vocabulary of 262,144."""
    return transformers.Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256, sliding_window=512, tie_word_embeddings=True)


SHAPES = {"moe-100m": moe_100m, "qwen3_5": qwen3_5, "gemma3-270m": gemma3_270m}

if __name__ == "__main__":
    directory = pathlib.Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    make_tokens(directory / "tokens-257.npy", VOCABULARY)
    for name in sys.argv[2:] or SHAPES:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(SHAPES[name]())
        model.save_pretrained(directory / name)
        print(f"{name}: {model.num_parameters():,} parameters")
