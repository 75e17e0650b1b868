#!/usr/bin/env python3
"""Writes a Llama-shaped model directory with random bf16 weights, and rows of random tokens.

They are for measuring time and memory.

    python3 scripts/random_model.py 8b DIRECTORY --rows 1024 --rows 2048

SHAPE is one of tiny, 1b (Llama 3.2 1B), 8b (Llama 3.1 8B) and 70b (Llama 3.1 70B); the options
override single sizes. DIRECTORY gets config.json and model.safetensors, or shards with an index
above 5 GB, as transformers writes them. There is no tokenizer: each `--rows LENGTH` adds
rows-LENGTH.jsonl, rows of that many tokens, all of them trained on.

Weights are normal with standard deviation 0.02 (what transformers initializes Llama with) and norms
are 1, so that activations, losses and gradients are finite and of ordinary size. The values come
from one block that all matrices are cut from, so that writing runs at the speed of the disk and
takes 100 MB of memory for a model of any size. The same arguments give the same bytes. Needs numpy
only.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy

# Sizes as in config.json. Everything that is not here is the same for all of them, see `config`.
SHAPES = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}

# The limit of `finetune export`, and for years that of transformers.
SHARD_BYTES = 5_000_000_000
DEVIATION = 0.02
# Prime, so that rows of a matrix larger than the block are not repetitions of each other: no layer
# has a length that divides it. 2^24 less 3.
BLOCK_VALUES = 16_777_213


def config(sizes):
    """config.json in the spelling of the hub, which transformers 4 and 5 both read."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "initializer_range": DEVIATION,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def tensors(sizes):
    """Name and shape of every tensor, in the model's order."""
    hidden, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    query = sizes["num_attention_heads"] * sizes["head_dim"]
    key = sizes["num_key_value_heads"] * sizes["head_dim"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(sizes["num_hidden_layers"]):
        for name, shape in [
            ("input_layernorm", (hidden,)),
            ("self_attn.q_proj", (query, hidden)),
            ("self_attn.k_proj", (key, hidden)),
            ("self_attn.v_proj", (key, hidden)),
            ("self_attn.o_proj", (hidden, query)),
            ("post_attention_layernorm", (hidden,)),
            ("mlp.gate_proj", (inner, hidden)),
            ("mlp.up_proj", (inner, hidden)),
            ("mlp.down_proj", (hidden, inner)),
        ]:
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    if not sizes["tie_word_embeddings"]:
        yield "lm_head.weight", (vocabulary, hidden)


def count(shape):
    total = 1
    for length in shape:
        total *= length
    return total


def bf16(values):
    """f32 as the bits of bf16, to the nearest, ties to even. NaN is not handled: there is none."""
    bits = values.astype(numpy.float32).view(numpy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def shards(specifications, size_of):
    """The tensors in lists of at most SHARD_BYTES; a larger one has a list of its own."""
    filled, size = [], 0
    for specification in specifications:
        needed = size_of(specification)
        if filled and size + needed > SHARD_BYTES:
            yield filled
            filled, size = [], 0
        filled.append(specification)
        size += needed
    yield filled


def header(tensors):
    """The bytes before the tensors, (name, dtype, shape, bytes) each: length and JSON (huggingface/safetensors,
    README, "Format")."""
    entries, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape, size in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


class Values:
    """An endless sequence of random bf16 values: the block, repeated."""

    def __init__(self, seed, needed):
        generator = numpy.random.default_rng(seed)
        block, left = bytearray(), min(BLOCK_VALUES, needed)
        while left > 0:  # in pieces, as the f32 values take several times the room of what is kept
            piece = generator.standard_normal(min(left, 1 << 20), dtype=numpy.float32)
            block += bf16(piece * numpy.float32(DEVIATION)).tobytes()
            left -= len(piece)
        self.block = memoryview(block)
        self.position = 0

    def write(self, file, values):
        """The next values of the sequence."""
        left = 2 * values
        while left > 0:
            piece = self.block[self.position:self.position + left]
            file.write(piece)
            left -= len(piece)
            self.position = (self.position + len(piece)) % len(self.block)


def write_model(directory, sizes, seed):
    """Returns the bytes of all tensors."""
    specifications = list(tensors(sizes))
    parts = list(shards(specifications, lambda tensor: 2 * count(tensor[1])))
    values = Values(seed, sum(count(shape) for _, shape in specifications))
    total, weight_map = 0, {}
    for number, part in enumerate(parts):
        file_name = "model.safetensors" if len(parts) == 1 else f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        with open(directory / file_name, "wb", buffering=0) as file:
            file.write(header((name, "BF16", shape, 2 * count(shape)) for name, shape in part))
            for name, shape in part:
                if len(shape) == 1:
                    file.write(bf16(numpy.ones(shape)).tobytes())
                else:
                    values.write(file, count(shape))
                total += 2 * count(shape)
                weight_map[name] = file_name
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(config(sizes), indent=2) + "\n")
    return total


def write_rows(path, length, rows, vocabulary, seed):
    # One stream for each length, so that asking for another length does not change this one's rows.
    generator = numpy.random.default_rng([seed, length])
    with open(path, "w") as file:
        for _ in range(rows):
            tokens = generator.integers(0, vocabulary, length).tolist()
            file.write(json.dumps({"input_ids": tokens, "labels": tokens}) + "\n")


def check(sizes):
    """Refuses sizes that no Llama can have."""
    if any(size < 1 for key, size in sizes.items() if key != "tie_word_embeddings"):
        sys.exit("random_model: every size is 1 or more")
    if sizes["head_dim"] % 2:
        sys.exit("random_model: head_dim is even, or there are no rotary positions")
    if sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
        sys.exit("random_model: num_attention_heads is a multiple of num_key_value_heads")


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("shape", metavar="SHAPE", choices=SHAPES, help=", ".join(SHAPES))
    arguments.add_argument("directory", metavar="DIRECTORY", type=Path)
    arguments.add_argument("--rows", metavar="LENGTH", type=int, action="append", default=[], help="may be repeated")
    arguments.add_argument("--row-count", metavar="N", type=int, default=64)
    arguments.add_argument("--seed", metavar="N", type=int, default=1)
    for key, value in SHAPES["tiny"].items():
        option = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            arguments.add_argument(option, action=argparse.BooleanOptionalAction, default=None)
        else:
            arguments.add_argument(option, metavar="N", type=int)
    options = arguments.parse_args()

    sizes = dict(SHAPES[options.shape])
    sizes.update({key: getattr(options, key) for key in sizes if getattr(options, key) is not None})
    check(sizes)
    options.directory.mkdir(parents=True, exist_ok=True)
    stale = [path.name for path in options.directory.glob("model*.safetensors*")]
    if stale:
        # A single file beside shards would win over them when the model is loaded.
        sys.exit(f"random_model: {options.directory} has a model already ({stale[0]})")
    start = time.monotonic()
    total = write_model(options.directory, sizes, options.seed)
    for length in options.rows:
        path = options.directory / f"rows-{length}.jsonl"
        write_rows(path, length, options.row_count, sizes["vocab_size"], options.seed)
    seconds = time.monotonic() - start
    print(f"{options.directory}: {total // 2:,} parameters, {total / 2**30:.2f} GiB in {seconds:.1f} s")


if __name__ == "__main__":
    main()
