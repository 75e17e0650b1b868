#!/usr/bin/env python3
"""Writes the goldens of `finetune quantize` for models with experts: what mlx-lm, and transformers with
bitsandbytes, write of tiny 16-bit bases.

Under OUTPUT/<family>.json:

    config          config.json of the base, as most models on the hub spell it
    tensors         of the base, by name: number type, shape. The values are those of `drawn`, which a
                    test can make too
    written         by form (mlx4, nf4, ...): the tensors of the other program's directory, by name: number
                    type, shape, FNV-1a (64 bits) of the bytes. Of `quant_state` of bitsandbytes, which is
                    JSON text, the hash is null
    quantization    by form: what the other program adds to config.json

What is converted is made of the same values: a file in the hub's spelling, experts one by one. The versions are
those of make_packed_goldens.py.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes compiles its decoder for each shape

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeLiteConfig, GptOssConfig, Qwen3NextConfig

import packed_forms as forms
from make_goldens import PLAIN_ROPE, SIZES
from make_packed_goldens import BASES, NARROW, deepseek_v3, fnv

# Groups of 64 fit most matrices. 96 columns of experts fit groups of 32 only.
EXPERTS = dict(num_hidden_layers=2, moe_intermediate_size=96, tie_word_embeddings=False, rope_parameters=dict(PLAIN_ROPE))
GLM = dict(EXPERTS, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, n_group=1,
           topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.5)
FAMILIES = {
    "qwen3_moe": BASES["qwen3_moe"]["config"],
    "lfm2_moe": BASES["lfm2_moe"]["config"],
    "gemma4_moe": BASES["gemma4_moe"]["config"],
    "glm4_moe": lambda: Glm4MoeConfig(**{**NARROW, "intermediate_size": 80}, **GLM, head_dim=16, use_qk_norm=True),
    "deepseek_v3": lambda: deepseek_v3(moe_intermediate_size=96, n_group=4, topk_group=2, first_k_dense_replace=1,
                                       num_hidden_layers=2, intermediate_size=80),
    "gpt_oss": lambda: GptOssConfig(**{**NARROW, "intermediate_size": 64}, num_hidden_layers=1, num_local_experts=4,
                                    num_experts_per_tok=2, head_dim=16, sliding_window=8, tie_word_embeddings=False,
                                    rope_parameters=dict(PLAIN_ROPE), layer_types=["full_attention"]),
    "qwen3_next": lambda: Qwen3NextConfig(
        **{**NARROW, "intermediate_size": 80}, **EXPERTS, head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=16, linear_conv_kernel_dim=4, num_experts=4, num_experts_per_tok=2,
        shared_expert_intermediate_size=64, norm_topk_prob=True, layer_types=["linear_attention", "full_attention"]),
}
MLX = {"mlx4": dict(bits=4, group=64), "mlx8": dict(bits=8, group=64), "mxfp4": dict(mode="mxfp4")}
BITSANDBYTES = {"nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "int8": dict(load_in_8bit=True)}
# mlx-lm reads gpt-oss's experts in MXFP4 only; of Qwen3-Next it writes norms to which 1 was added.
NOT_IN_MLX = ("gpt_oss", "qwen3_next")


def drawn(name, count):
    """`count` numbers, others for each name: eight bits times a power of two, another for each 64 of them, so exact in
    bf16. The bits are a counter that is mixed as MurmurHash3's finalizer does it."""
    seed = np.uint32(int(fnv(name.encode()), 16) & 0xFFFFFFFF)
    bits = np.arange(count, dtype=np.uint32) + seed
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits ^= bits >> np.uint32(shift)
        bits *= np.uint32(factor)
    bits ^= bits >> np.uint32(16)
    codes = (bits >> np.uint32(24)).astype(np.float32) - 128
    return codes * np.exp2(-8 - (np.arange(count) // 64 + seed % 8) % 5).astype(np.float32)


def write_base(family, directory):
    """The names and shapes of transformers, as it writes them, and other values."""
    torch.manual_seed(1)
    config = FAMILIES[family]()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    tensors = {}
    with safe_open(directory / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            values = torch.from_numpy(drawn(name, tensor.numel())).reshape(tensor.shape)
            in_f32 = name.endswith(("expert_bias", "e_score_correction_bias"))  # so it is in files of the hub
            tensors[name] = values.to(torch.float32 if in_f32 else torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = forms.in_hub_spelling(json.loads((directory / "config.json").read_text()))
    for key in ("transformers_version", "_name_or_path"):
        config.pop(key, None)
    (directory / "config.json").write_text(json.dumps(config))
    return config


def header(directory, hashes):
    """The tensors of a directory, by name: type, shape and, if it is asked for, the hash of the bytes."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, about in json.loads(data[8:8 + size]).items():
            if name == "__metadata__":
                continue
            begin, end = (8 + size + offset for offset in about["data_offsets"])
            found[name] = [about["dtype"], about["shape"]]
            if hashes:
                found[name].append(None if "quant_state" in name else fnv(data[begin:end]))
    return dict(sorted(found.items()))


def of_family(family, work):
    base = work / "base"
    config = write_base(family, base)
    written, quantization = {}, {}
    for form, settings in (MLX | BITSANDBYTES).items():
        output = work / form
        if form in MLX and family in NOT_IN_MLX:
            continue
        write = forms.convert_mlx if form in MLX else forms.save_bitsandbytes
        with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints
            write(base, output, **settings, **({"attention": "eager"} if family == "gpt_oss" else {}))
        written[form] = header(output, hashes=True)
        saved = json.loads((output / "config.json").read_text())
        quantization[form] = saved["quantization_config"]
    return {"config": config, "tensors": header(base, hashes=False), "written": written, "quantization": quantization}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "experts"
    parser.add_argument("--output", type=Path, default=default, help="default: tests/goldens/experts")
    parser.add_argument("--family", choices=list(FAMILIES), action="append", help="only this one; default: all")
    arguments = parser.parse_args()

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for family in arguments.family or FAMILIES:
        with tempfile.TemporaryDirectory() as temporary:
            golden = of_family(family, Path(temporary))
        path = arguments.output / f"{family}.json"
        path.write_text(json.dumps(golden, sort_keys=True, separators=(",", ":")) + "\n")
        print(f"{family}: {path.stat().st_size // 1000} kB, " +
              ", ".join(f"{form} {len(tensors)} tensors" for form, tensors in golden["written"].items()), flush=True)


if __name__ == "__main__":
    main()
