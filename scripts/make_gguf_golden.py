#!/usr/bin/env python3
"""Writes tests/goldens/gguf/golden.gguf: a file of gguf-py with every type that finetune writes.

    pip install gguf==0.19.0
    python scripts/make_gguf_golden.py

The tensors `*.f32` hold numbers in f32, `*.f16`, `*.bf16` and `*.q8_0` the same numbers as gguf-py rounds them. The
test (crates/gguf/tests/golden.rs) rounds and writes them again and compares all bytes.
"""

from pathlib import Path

import gguf
import numpy as np

FILE = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "gguf" / "golden.gguf"
TYPES = ("F32", "F16", "BF16", "Q8_0")


def matrices():
    """(name, f32 matrix): random ones of several magnitudes, and the edges of rounding."""
    random = np.random.default_rng(20261127)
    yield "random", random.standard_normal((16, 64)).astype(np.float32)
    magnitudes = np.float32(10) ** random.integers(-8, 5, (8, 1)).astype(np.float32)
    yield "magnitudes", (random.standard_normal((8, 96)) * magnitudes).astype(np.float32).clip(-60000, 60000)
    # The largest number of each block is 127, so the scale is 1 and every k + 0.5 lies in the middle.
    ties = np.arange(-63.5, 64.0, 1.0, dtype=np.float32).reshape(4, 32)
    ties[:, 0] = [127, -127, 127, -127]
    yield "ties", ties
    # Halves of the last place of f16 and bf16, and numbers beside them.
    steps = np.float32(1) + np.arange(64, dtype=np.float32).reshape(2, 32) * np.float32(2.0**-12)
    yield "steps", steps
    edges = np.zeros((5, 32), dtype=np.float32)
    edges[1, :3] = [-0.0, 1e-45, -1e-45]  # the smallest numbers of f32
    edges[2, :3] = [6e-8, -3e-8, 1e-7]  # those of f16
    edges[3, :3] = [65504, -65504, 1]  # its largest
    edges[4, 5] = -1.0
    yield "edges", edges


def main():
    writer = gguf.GGUFWriter(FILE, "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("golden")
    writer.add_uint8("golden.u8", 200)
    writer.add_int8("golden.i8", -100)
    writer.add_uint16("golden.u16", 60_000)
    writer.add_int16("golden.i16", -30_000)
    writer.add_uint32("golden.u32", 4_000_000_000)
    writer.add_int32("golden.i32", -2_000_000_000)
    writer.add_float32("golden.f32", 0.1)
    writer.add_uint64("golden.u64", 1 << 63)
    writer.add_int64("golden.i64", -(1 << 62))
    writer.add_float64("golden.f64", 0.1)
    writer.add_bool("golden.yes", True)
    writer.add_bool("golden.no", False)
    writer.add_array("golden.strings", ["<s>", "ä\n", "🦙"])
    writer.add_array("golden.numbers", [1, -2, 3])
    writer.add_array("golden.floats", [0.5, -1000.0])
    writer.add_array("golden.flags", [True, False])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for name, matrix in matrices():
        for kind in TYPES:
            quantization = gguf.GGMLQuantizationType[kind]
            data = gguf.quants.quantize(matrix, quantization)
            writer.add_tensor(f"{name}.{kind.lower()}", data, raw_dtype=quantization)
    writer.add_tensor("vector", np.arange(3, dtype=np.float32))
    FILE.parent.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{FILE}: {FILE.stat().st_size} bytes by gguf-py")


if __name__ == "__main__":
    main()
