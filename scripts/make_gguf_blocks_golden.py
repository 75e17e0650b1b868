#!/usr/bin/env python3
"""Writes tests/goldens/gguf/blocks.safetensors: blocks of every packed type that is read, and what they mean.

    pip install gguf==0.19.0 safetensors
    python scripts/make_gguf_blocks_golden.py

`NAME.blocks` are bytes [rows, bytes of a row], `NAME.values` the f32 that gguf-py's `dequantize` makes of them. Codes
and small factors are random bytes. The f16 numbers of a block are random finite ones, with the edges among them. The
exponents of MXFP4 are so small that no value is beyond f32.
"""

from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors.numpy import save_file

FILE = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "gguf" / "blocks.safetensors"
# Bytes at which the f16 numbers of a block begin.
HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "MXFP4": [],
}
EDGES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x7BFF, 0xFBFF, 0x3C00]


def main():
    random = np.random.default_rng(20261128)
    tensors = {}
    for name, places in HALVES.items():
        kind = GGMLQuantizationType[name]
        elements, size = GGML_QUANT_SIZES[kind]
        rows, blocks = (9, 5) if elements == 32 else (5, 3)
        data = random.integers(0, 256, (rows * blocks, size), dtype=np.uint8)
        for n, place in enumerate(places):
            halves = (random.standard_normal(rows * blocks) * 10.0 ** random.integers(-4, 2, rows * blocks)).astype(np.float16)
            bits = halves.view(np.uint16)
            edges = np.roll(np.array(EDGES, dtype=np.uint16), n)
            bits[: len(edges)] = edges
            data[:, place : place + 2] = bits.reshape(-1, 1).view(np.uint8)
        if name == "MXFP4":
            data[:, 0] = random.integers(0, 252, rows * blocks)
            data[:4, 0] = [0, 1, 2, 251]
        data = data.reshape(rows, blocks * size)
        values = gguf.quants.dequantize(data, kind)
        assert values.shape == (rows, blocks * elements) and values.dtype == np.float32 and np.isfinite(values).all()
        tensors[f"{name}.blocks"] = data
        tensors[f"{name}.values"] = values
    FILE.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, FILE)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
