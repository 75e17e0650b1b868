#!/usr/bin/env python3
"""Writes the goldens of packed weights in safetensors files: crates/packed/tests/goldens/files.

Per family a directory as a model's, with few weights of odd sizes in it:

    config.json              `quantization` or `quantization_config` alone
    model.safetensors        the packed weights, in the family's own tensors
    expected.safetensors     their values in f32 under the same names

What writes and decodes them:

    mlx            mlx: QuantizedLinear and mx.dequantize
    bitsandbytes   bitsandbytes: the state of Linear4bit and Linear8bitLt, as transformers'
                   save_pretrained writes it, its dequantization in torch, int8_vectorwise_dequant
    compressed     compressed-tensors: its compressors, and its dequantize with scales in f32
    fp8            torch's float8_e4m3fn, and transformers' own dequantization of blocks
    modelopt       numpy, after the layout of Model Optimizer's NVFP4QTensor
    mxfp4          numpy packs, after gpt_oss/torch/weights.py; transformers' Mxfp4 dequantization
    gptq, awq      numpy packs and decodes, after the layouts of GPTQModel and AutoAWQ

A decoded value has one right answer, the f32 product of code and scale. The references compute in
the scales' type by default, so their scales are widened first; what they round to at the end (NF4's
dtype) is part of the format.

    pip install --no-deps compressed-tensors==0.20.0 loguru
    python scripts/make_packed_file_goldens.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

OUTPUT = Path(__file__).parent.parent / "crates/packed/tests/goldens/files"
GENERATOR = torch.Generator().manual_seed(14)


def weights(rows, columns, dtype=torch.float32):
    """Ordinary weights with a row of zeros and one element far out."""
    matrix = torch.randn(rows, columns, generator=GENERATOR) * 0.05
    matrix[rows // 2] = 0
    matrix[0, columns - 1] = 1.5
    return matrix.to(dtype)


def integers(low, high, *shape):
    return torch.randint(low, high, shape, generator=GENERATOR, dtype=torch.int32)


def save(family, config, tensors, expected):
    directory = OUTPUT / family
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    expected = {f"{name}.weight": value.float().contiguous() for name, value in expected.items()}
    assert all(value.isfinite().all() for value in expected.values())
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    save_file(expected, directory / "expected.safetensors")
    print(family, len(expected), "weights,", sum(path.stat().st_size for path in directory.iterdir()), "bytes")


# ---- mlx ----


def mlx():
    import mlx.core as mx
    import mlx.nn as nn

    mx.set_default_device(mx.cpu)
    dtypes = {"f32": mx.float32, "bf16": mx.bfloat16, "f16": mx.float16}
    forms = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
    forms += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
    quantization = {"group_size": 64, "bits": 4}
    tensors, expected = {}, {}
    for place, (mode, bits, group) in enumerate(forms):
        kind = list(dtypes)[place % 3]
        columns = 128 if group == 128 else 192 if group == 64 else 160
        name = f"{mode}_{bits}_{group}_{kind}"
        linear = nn.Linear(columns, 3, bias=False)
        linear.weight = mx.array(weights(3, columns).numpy()).astype(dtypes[kind])
        packed = nn.QuantizedLinear.from_linear(linear, group, bits, mode)
        if place % 2 == 0:
            quantization[name] = {"group_size": group, "bits": bits, "mode": mode}
        parts = [packed.scales] + ([packed.biases] if mode == "affine" else [])
        codes = np.array(packed.weight)
        if mode == "affine":
            # mlx fuses product and sum in f32. Scales of 16 bits leave nothing to round between.
            stream = np.unpackbits(codes.view(np.uint8), axis=-1, bitorder="little").reshape(3, columns, bits)
            code = (stream.astype(np.int64) << np.arange(bits)).sum(-1).astype(np.float32)
            scales, biases = (np.repeat(np.array(part.astype(mx.float32)), group, axis=1) for part in parts)
            value = code * scales + biases
            wide = [part.astype(mx.float32) for part in parts]
            of_mlx = np.array(mx.dequantize(packed.weight, *wide, group_size=group, bits=bits))
            assert (value == of_mlx).all() if kind != "f32" else np.allclose(value, of_mlx, rtol=0, atol=2**-22)
        else:
            value = np.array(mx.dequantize(packed.weight, *parts, group_size=group, bits=bits, mode=mode, dtype=mx.float32))
        tensors[f"{name}.weight"] = torch.from_numpy(codes)
        for part, tensor in zip(("scales", "biases"), parts):
            wide = torch.from_numpy(np.array(tensor.astype(mx.float32)))
            narrow = {mx.bfloat16: torch.bfloat16, mx.float16: torch.float16}.get(tensor.dtype)
            is_bytes = tensor.dtype == mx.uint8
            tensors[f"{name}.{part}"] = torch.from_numpy(np.array(tensor)) if is_bytes else wide.to(narrow or torch.float32)
        expected[name] = torch.from_numpy(value)
    quantization["kept"] = False
    tensors["kept.weight"] = weights(3, 32, torch.bfloat16)
    save("mlx", {"quantization": quantization, "quantization_config": quantization}, tensors, expected)


# ---- bitsandbytes ----


def bitsandbytes():
    """bitsandbytes 0.50.2 decodes widths that are no multiple of its blocks wrongly on processors with
    AVX-512: `(12, 176)` comes out with errors of 1.3 in weights of 1.5, since a block that begins inside
    32 elements gets the scale of the one before. Its quantizer and its other implementations count blocks
    through the whole matrix, as CUDA does. So the values here are those of its implementation in torch.
    """
    import bitsandbytes as bnb
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    tensors, expected = {}, {}
    cases = [
        ("nf4", True, torch.bfloat16, (24, 128), 64, torch.uint8),
        ("nf4", False, torch.bfloat16, (24, 176), 64, torch.uint8),
        ("nf4", True, torch.float16, (3, 64), 64, torch.uint8),
        ("nf4", False, torch.float32, (5, 7), 64, torch.uint8),
        ("nf4", True, torch.bfloat16, (6, 128), 64, torch.bfloat16),
        ("fp4", True, torch.bfloat16, (12, 176), 64, torch.uint8),
        ("fp4", False, torch.float32, (3, 64), 128, torch.uint8),
    ]
    for kind, double, dtype, (rows, columns), block, storage in cases:
        name = f"{kind}_{rows}x{columns}{'_double' if double else ''}_{str(dtype)[6:]}"
        packed = bnb.nn.Params4bit(
            weights(rows, columns, dtype), quant_type=kind, compress_statistics=double, blocksize=block, quant_storage=storage
        ).to("cpu")
        if packed.quant_state is None:
            packed = packed._quantize("cpu")
        state = packed.quant_state
        tensors[f"{name}.weight"] = packed.data
        tensors |= {f"{name}.weight.{key}": part for key, part in state.as_dict(packed=True).items()}
        scales = state.absmax
        if double:
            scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        codes = packed.data.view(torch.uint8).reshape(-1)
        value = _dequantize_4bit_compute(codes, scales, state.code, block, (rows, columns), dtype)
        if columns % block == 0:
            assert (value == bnb.functional.dequantize_4bit(packed.data, state).reshape(rows, columns)).all(), name
        expected[name] = value
    for rows, columns in ((12, 176), (3, 64)):
        name = f"int8_{rows}x{columns}"
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weights(rows, columns, torch.float16))
        tensors[f"{name}.weight"], tensors[f"{name}.SCB"] = codes, scales
        tensors[f"{name}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
        expected[name] = bnb.functional.int8_vectorwise_dequant(codes, scales)
    tensors["kept.weight"] = weights(3, 32, torch.bfloat16)
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": ["kept", cases[0][0]],
    }
    save("bitsandbytes", {"quantization_config": config}, tensors, expected)


# ---- compressed-tensors ----


def compressed():
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    tensors, expected, groups = {}, {}, {}

    def scales_of(matrix, args, kind):
        """Scales and zero points of the largest magnitude, or of the range, of each group."""
        rows, columns = matrix.shape
        group = args.group_size or columns
        parts = matrix.float().reshape(1, 1, -1) if args.strategy == "tensor" else matrix.float().reshape(rows, -1, group)
        levels = 2**args.num_bits - 1
        if args.symmetric:
            scales = parts.abs().amax(-1) * 2 / levels
            zeros = torch.zeros(scales.shape, dtype=torch.int8)
        else:
            low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
            scales = (high - low) / levels
            zeros = (-low / scales.clamp(min=1e-9)).round() - 2 ** (args.num_bits - 1)
            zeros = zeros.clamp(-(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1) - 1).to(torch.int8)
        return scales.clamp(min=2**-14).to(kind), zeros

    def case(name, form, shape, kind=torch.bfloat16, order=None, **args):
        args = QuantizationArgs(**args)
        scheme = QuantizationScheme(targets=[name], weights=args)
        matrix = weights(*shape)
        groups[name] = {"targets": [name], "weights": json.loads(args.model_dump_json(exclude_none=True))}
        state = {"weight": matrix}
        state["weight_scale"], state["weight_zero_point"] = scales_of(matrix, args, kind)
        if args.num_bits == 8 and args.type == "float":
            state["weight_scale"] = (state["weight_scale"].float() * 255 / 2 / 448).to(kind)
            del state["weight_zero_point"]
        if args.num_bits == 4 and args.type == "float":
            del state["weight_zero_point"]
            whole = 448 * 6 / matrix.abs().max()
            largest = matrix.reshape(shape[0], -1, args.group_size).abs().amax(-1) / 6
            if form.startswith("nv"):
                state["weight_global_scale"] = whole.reshape(1)
                state["weight_scale"] = (largest * whole).clamp(min=2**-6).to(torch.float8_e4m3fn).float()
            else:
                state["weight_scale"] = torch.exp2(torch.log2(largest.clamp(min=2**-20)).floor())
        compressor = BaseCompressor.get_value_from_registry(form)
        out = compressor.compress(state, scheme)
        # Its decompress computes in the scales' type. Widened scales leave the exact product.
        wide = dict(out)
        if form == "mxfp4-pack-quantized":
            value = compressor.decompress(wide, scheme)["weight"].float()
        elif form == "nvfp4-pack-quantized":
            from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

            codes = unpack_fp4_from_uint8(out["weight_packed"], *shape, dtype=torch.float32)
            scale = out["weight_scale"].float()
            value = dequantize(codes, scale, args=args, global_scale=out["weight_global_scale"], dtype=torch.float32)
        else:
            wide["weight_scale"] = wide["weight_scale"].float()
            value = compressor.decompress(wide, scheme)["weight"]
        tensors.update({f"{name}.{key}": part.data for key, part in out.items()})
        expected[name] = value

    case("int4_group32", "pack-quantized", (48, 128), num_bits=4, strategy="group", group_size=32)
    case("int4_channel", "pack-quantized", (5, 42), kind=torch.float16, num_bits=4, strategy="channel")
    case("int4_asym", "pack-quantized", (13, 64), num_bits=4, strategy="group", group_size=16, symmetric=False)
    case("int8_group32", "pack-quantized", (6, 96), kind=torch.float32, num_bits=8, strategy="group", group_size=32)
    case("int8_asym", "pack-quantized", (6, 40), num_bits=8, strategy="channel", symmetric=False)
    case("bytes_channel", "int-quantized", (6, 40), num_bits=8, strategy="channel")
    case("bytes_asym", "int-quantized", (6, 64), num_bits=8, strategy="group", group_size=32, symmetric=False)
    case("bytes_tensor", "int-quantized", (3, 64), kind=torch.float32, num_bits=8, strategy="tensor")
    case("float_tensor", "float-quantized", (3, 64), num_bits=8, type="float", strategy="tensor")
    case("float_channel", "float-quantized", (6, 40), kind=torch.float32, num_bits=8, type="float", strategy="channel")
    case("mxfp4", "mxfp4-pack-quantized", (6, 96), num_bits=4, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8")
    case("nvfp4", "nvfp4-pack-quantized", (6, 48), num_bits=4, type="float", strategy="tensor_group", group_size=16)

    # Act-order: the columns are permuted before they are packed, and `weight_g_idx` says whither.
    name, index = "int4_order", torch.randperm(64, generator=GENERATOR) % 2
    case(name, "pack-quantized", (8, 64), num_bits=4, strategy="group", group_size=32)
    codes = expected[name] / tensors[f"{name}.weight_scale"].float().repeat_interleave(32, dim=1)
    tensors[f"{name}.weight_g_idx"] = index.to(torch.int32)
    expected[name] = codes.round() * tensors[f"{name}.weight_scale"].float()[:, index]
    tensors["int8_group32.weight_g_idx"] = torch.full((96,), -1, dtype=torch.int32)
    tensors["float_tensor.input_scale"] = torch.ones(1)
    tensors["kept.weight"] = weights(3, 32, torch.bfloat16)
    config = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups, "ignore": ["kept"]}
    save("compressed", {"quantization_config": config}, tensors, expected)


# ---- FP8 ----


def fp8():
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    tensors, expected = {}, {}
    for name, shape, block, kind in (
        ("blocks", (129, 132), [128, 128], torch.float32),
        ("blocks_bf16", (129, 20), [128, 128], torch.bfloat16),
        ("blocks_e8m0", (20, 130), [128, 128], torch.float8_e8m0fnu),
        ("tensor", (3, 64), None, torch.float32),
    ):
        rows, columns = shape
        matrix = weights(*shape)
        if block:
            high, wide = -(-rows // 128), -(-columns // 128)
            padded = torch.zeros(high * 128, wide * 128)
            padded[:rows, :columns] = matrix
            scales = padded.reshape(high, 128, wide, 128).abs().amax((1, 3)) / 448
            scales = torch.exp2(torch.log2(scales).ceil()) if kind == torch.float8_e8m0fnu else scales
            scales = scales.to(kind)
            spread = scales.float().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        else:
            scales = (matrix.abs().max() / 448).to(kind)
            spread = scales.float()
        codes = (matrix / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        value = codes.float() * spread
        of_transformers = _dequantize_fp8_weight(codes, scales.float(), block, torch.float32)
        assert (value == of_transformers).all(), name
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"] = codes, scales
        expected[name] = value
    tensors["tensor.activation_scale"] = torch.tensor(0.5)
    # All finite codes, with the smallest and largest exponent.
    every = torch.arange(256, dtype=torch.uint8)
    every[127], every[255] = 0, 128
    tensors["codes.weight"] = every.view(torch.float8_e4m3fn).reshape(2, 128)
    tensors["codes.weight_scale"] = torch.tensor([[1.0], [0.375]])
    expected["codes"] = tensors["codes.weight"].float() * tensors["codes.weight_scale"]
    tensors["mxfp8.weight"] = weights(3, 64).to(torch.float8_e4m3fn)
    tensors["mxfp8.weight_scale"] = integers(100, 140, 3, 2).to(torch.uint8)
    powers = torch.exp2(tensors["mxfp8.weight_scale"].float() - 127)
    expected["mxfp8"] = tensors["mxfp8.weight"].float() * powers.repeat_interleave(32, 1)
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    save("fp8", {"quantization_config": config}, tensors, expected)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def modelopt():
    codes = integers(0, 256, 5, 24).to(torch.uint8)
    scales = torch.rand(5, 3, generator=GENERATOR).to(torch.float8_e4m3fn)
    whole = torch.tensor(0.0123)
    values = torch.stack((E2M1[(codes & 15).long()], E2M1[(codes >> 4).long()]), -1).reshape(5, 48)
    tensors = {"nvfp4.weight": codes, "nvfp4.weight_scale": scales, "nvfp4.weight_scale_2": whole}
    tensors["nvfp4.input_scale"] = torch.tensor(1.0)
    expected = {"nvfp4": values * (scales.float() * whole).repeat_interleave(16, 1)}
    save("modelopt", {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, tensors, expected)


def mxfp4():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    codes, scales = integers(0, 256, 6, 3, 16).to(torch.uint8), integers(110, 140, 6, 3).to(torch.uint8)
    scales[0, 0] = 0
    values = torch.stack((E2M1[(codes & 15).long()], E2M1[(codes >> 4).long()]), -1).reshape(6, 96)
    value = values * torch.exp2(scales.double() - 127).float().repeat_interleave(32, 1)
    # transformers' result is [columns, rows], for a stack of experts.
    scales_of_transformers = scales.clone()
    scales_of_transformers[0, 0] = 1
    of_transformers = convert_moe_packed_tensors(codes[None], scales_of_transformers[None], dtype=torch.float32)
    assert (of_transformers[0].T[1:] == value[1:]).all()
    save("mxfp4", {"quantization_config": {"quant_method": "mxfp4"}}, {"blocks_blocks": codes, "blocks_scales": scales}, {})
    save_file({"blocks": value}, OUTPUT / "mxfp4/expected.safetensors")


# ---- GPTQ and AWQ ----


def words(codes, bits):
    """Rows of codes as little-endian streams of bits in 32-bit words."""
    stream = (codes.numpy()[..., None].astype(np.int64) >> np.arange(bits) & 1).astype(np.uint8)
    stream = stream.reshape(codes.shape[0], -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return torch.from_numpy(np.packbits(stream, axis=-1, bitorder="little").view(np.int32).copy())


def gptq(family, exact):
    tensors, expected = {}, {}
    cases = [(bits, 64 if bits != 3 else 32, 32, order) for bits in (2, 3, 4, 8) for order in (False, True)]
    cases = [(4, 96, 48, False), *(cases[2:5] if exact else cases)]
    for bits, inputs, outputs, order in cases:
        name = f"b{bits}_{outputs}x{inputs}{'_order' if order else ''}"
        count = -(-inputs // 32) if inputs > 32 else 2 if order else 1
        index = torch.arange(inputs) * count // inputs
        if order:
            index = index[torch.randperm(inputs, generator=GENERATOR)]
        codes, zeros = integers(0, 2**bits, inputs, outputs), integers(0, 2**bits, count, outputs)
        scales = (torch.rand(count, outputs, generator=GENERATOR) * 0.01 - 0.001).to(torch.float16)
        stored = words(zeros, bits)
        if not exact and bits == 3:
            stored = words((zeros - 1) & 7, 3)
        elif not exact:
            # GPTQModel takes one off all fields of a word in one subtraction.
            ones = np.uint32(0xFFFFFFFF // (2**bits - 1))
            stored = torch.from_numpy((stored.numpy().view(np.uint32) - ones).view(np.int32))
        tensors[f"{name}.qweight"] = words(codes.T.contiguous(), bits).T
        tensors[f"{name}.qzeros"], tensors[f"{name}.scales"] = stored, scales
        tensors[f"{name}.g_idx"] = index.to(torch.int32)
        expected[name] = ((codes - zeros[index]).float() * scales.float()[index]).T
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
    # The weights here differ in bits, which a model says with `dynamic`.
    config |= {"dynamic": {"+:.*": {}}, "checkpoint_format": "gptq_v2" if exact else "gptq"}
    save(family, {"quantization_config": config}, tensors, expected)


def awq():
    tensors, expected = {}, {}
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(codes):
        columns = codes.reshape(codes.shape[0], -1, 8)[:, :, order].reshape(codes.shape)
        return words(columns, 4)

    for outputs, inputs in ((48, 96), (8, 32), (136, 32)):
        name = f"gemm_{outputs}x{inputs}"
        codes, zeros = integers(0, 16, inputs, outputs), integers(0, 16, inputs // 32, outputs)
        scales = (torch.rand(inputs // 32, outputs, generator=GENERATOR) * 0.01).to(torch.float16)
        tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"], tensors[f"{name}.scales"] = pack(codes), pack(zeros), scales
        spread = [part.repeat_interleave(32, 0) for part in (zeros, scales.float())]
        expected[name] = ((codes - spread[0]).float() * spread[1]).T
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    save("awq", {"quantization_config": config}, tensors, expected)


def main():
    mlx()
    bitsandbytes()
    compressed()
    fp8()
    modelopt()
    mxfp4()
    gptq("gptq", exact=False)
    gptq("gptq_v2", exact=True)
    awq()


if __name__ == "__main__":
    main()
