#!/usr/bin/env python3
"""Writes crates/packed/tests/goldens/*.safetensors: small matrices, packed by mlx and bitsandbytes on the CPU.

    pip install mlx==0.32.4 bitsandbytes==0.50.2 torch safetensors
    python scripts/make_packed_format_goldens.py

A file for each number type. `CASE` is a matrix; `CASE.SCHEME.TENSOR` are the tensors that the reference writes for a
layer `layer`, without its name; `CASE.SCHEME.decoded` is what the reference decodes them to, in the matrix's type. The
test (crates/packed/tests/quantizers.rs) packs and decodes them again and compares all bytes.
"""

from pathlib import Path

import bitsandbytes as bnb
import mlx.core as mx
import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parent.parent / "crates" / "packed" / "tests" / "goldens"
TYPES = {
    "f32": (torch.float32, mx.float32),
    "f16": (torch.float16, mx.float16),
    "bf16": (torch.bfloat16, mx.bfloat16),
}
MLX = {
    "mlx4": {"group_size": 64, "bits": 4},
    "mlx8": {"group_size": 64, "bits": 8},
    "mxfp4": {"mode": "mxfp4"},
}


def matrices(kind):
    """(name, f32 matrix, schemes)"""
    every = ["mlx4", "mlx8", "mxfp4", "nf4", "int8"]
    random = np.random.default_rng(20261128)
    normal = random.standard_normal((12, 192)) * 0.02
    yield "normal", normal, every
    yield "edges", edges(random), every
    # Each row of another magnitude; the largest number at and beside 6 times a power of two, for mxfp4's scale.
    powers = np.exp2(np.arange(-20, 13, 3)) * np.resize([6, 6 * (1 + 2**-7), 6 * (1 - 2**-7)], 11)
    yield "powers", powers[:, None] * np.resize([-1, 0.3, -0.7, 0.5], 64), every
    # Blocks of 64 cross rows, and the last one is not whole.
    yield "odd", random.standard_normal((7, 37)), ["nf4", "int8"]
    zeros = random.standard_normal((3, 45))
    zeros[1:] = 0
    yield "zeros", zeros, ["nf4", "int8"]
    # Halves of a step of bitsandbytes' int8 and in the middle of NF4's values.
    yield "ties", np.arange(-127, 127.5, 0.5)[:508].reshape(2, 254), ["nf4", "int8"]
    if kind != "f16":
        # Beyond what f16 holds: int8 is made from f16.
        yield "huge", random.standard_normal((2, 128)) * 1e30, ["mlx4", "mlx8", "mxfp4", "nf4"]


def edges(random):
    rows = np.zeros((14, 64))
    rows[1] = -0.0
    rows[2], rows[3] = 0.37, -0.37
    rows[4] = 1e-8
    rows[5] = -1e-6 * random.random(64)
    rows[6, 17] = -3.0
    rows[7] = 6e4 * random.uniform(-1, 1, 64)
    rows[8] = random.random(64)
    rows[9] = -random.random(64)
    rows[10] = np.arange(64) / 63  # from zero on
    rows[11] = np.arange(-32, 32)  # codes of 4 and 8 bits in the middle
    rows[12, ::2], rows[12, 1::2] = 1, -1
    rows[13] = np.arange(64) * 6e-8  # the smallest numbers of f16
    return rows


def of_mlx(matrix, scheme):
    packed = mx.quantize(matrix, **MLX[scheme])
    tensors = dict(zip(("weight", "scales", "biases"), packed))
    tensors["decoded"] = mx.dequantize(*packed, **MLX[scheme])
    if tensors["decoded"].dtype != matrix.dtype:
        tensors["decoded"] = tensors["decoded"].astype(matrix.dtype)
    return {name: of_array(array) for name, array in tensors.items()}


def of_array(array):
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def of_bitsandbytes(matrix, scheme):
    rows, columns = matrix.shape
    if scheme == "nf4":
        layer = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4", compress_statistics=False)
        layer.weight = bnb.nn.Params4bit(matrix, requires_grad=False, quant_type="nf4", compress_statistics=False)
        layer = layer.to("cpu")
        decoded = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    else:
        layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(matrix, requires_grad=False, has_fp16_weights=False)
        layer = layer.to("cpu")
        decoded = int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
        assert decoded.dtype == torch.float32
    return {**layer.state_dict(), "decoded": decoded}


def main():
    mx.set_default_device(mx.cpu)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for kind, (torch_type, mlx_type) in TYPES.items():
        tensors = {}
        for name, values, schemes in matrices(kind):
            matrix = torch.from_numpy(values.astype(np.float32)).to(torch_type)
            tensors[name] = matrix
            for scheme in schemes:
                if scheme in MLX:
                    packed = of_mlx(mx.array(matrix.float().numpy()).astype(mlx_type), scheme)
                else:
                    packed = of_bitsandbytes(matrix.clone(), scheme)
                tensors |= {f"{name}.{scheme}.{tensor}": values for tensor, values in packed.items()}
        tensors = {name: values.contiguous().clone() for name, values in tensors.items()}
        save_file(tensors, FOLDER / f"{kind}.safetensors")


if __name__ == "__main__":
    main()
