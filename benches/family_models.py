#!/usr/bin/env python3
"""Models of random weights in the shapes that benches/results/*-families-step.json names, and a file of tokens, for
lora_step.py. Needs torch and transformers.

    benches/family_models.py DIR [--bf16] [NAME ...]

With --bf16 they are for decoding.py (--text random): in bf16, with a tokenizer of made-up words, and a config.json that
mlx-lm reads too.
"""
import argparse, json, pathlib

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


def for_generation(model, directory):
    """The model in bf16, with what `generate` and mlx-lm need beside it."""
    import tokenizers

    model.bfloat16().save_pretrained(directory)
    size = model.config.vocab_size
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{n}": n for n in range(size)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(directory / "tokenizer.json"))
    path = directory / "config.json"
    config = json.loads(path.read_text())
    if config["model_type"] == "qwen3_moe":
        config |= {"rope_theta": config["rope_parameters"]["rope_theta"], "num_experts": config["num_local_experts"]}
    path.write_text(json.dumps(config, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SHAPES))
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    make_tokens(options.directory / "tokens-257.npy", VOCABULARY)
    for name in options.names or SHAPES:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(SHAPES[name]())
        if options.bf16:
            for_generation(model, options.directory / name)
        else:
            model.save_pretrained(options.directory / name)
        print(f"{name}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
