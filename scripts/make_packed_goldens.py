#!/usr/bin/env python3
"""Writes the goldens of packed bases: tiny models in the formats that people publish, and what
transformers and PEFT compute with their decoded values.

Under OUTPUT/bases/<base>/ is `adapter/` with A and B both non-zero, the micro-batch (`rows.json`) and
the training data of the curves (`rows.jsonl`); of the base `llama` also the 16-bit model, to be
quantized when it is loaded. Per case, under OUTPUT/<case>/:

    config.json, model.safetensors      the base, packed by the reference (scripts/packed_forms.py)
    model.gguf                          instead of both, in the cases gguf_*
    golden.json
        base, settings                  what it was made from
        packed                          by matrix: its shape, and FNV-1a (64 bits) of all its values, f32 in
                                        row order, little-endian
        micro_batch, noise, curve       loss, how far f32 is from f64, 20 steps of AdamW
        packed_forward                  the largest distance of the logits that the reference computes
                                        over its own packed weights, in f32 and in bf16
    golden.safetensors
        ends.<matrix>                   the first and the last row of each packed matrix, [2, columns]
        logits.<row>                    [length, vocabulary] with the adapter
        grad.<PEFT file name>           gradient of (sum of token losses / trained tokens)

All of it is f32 arithmetic over weights that the reference has decoded to f32: this is what
finetune's CPU computes, and, as packed_forward shows, what MLX computes in f32. bitsandbytes does so
if the file says f32 (fp4). If it says bf16 (nf4), bitsandbytes in f32 does not round the decoded
values to bf16 in the forward pass, but in the backward pass: only in bf16 it agrees with itself. Its
int8 rounds activations to 8 bits in any type. Its CPU kernels take wrong scales if rows are not whole
blocks (nf4), so the values of 4-bit matrices are those of its generic decoder, and no logits over
packed weights are compared there.

Same versions and same kind of CPU: same bytes. The versions are in golden.json:

    pip install --no-deps bitsandbytes==0.50.2
    pip install --no-deps compressed-tensors==0.20.0 loguru
    pip install gguf==0.19.0 "mlx[cpu]==0.32.4" mlx-lm==0.32.2 llama-cpp-python==0.3.36
"""

import argparse
import contextlib
import io
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes compiles its decoder for each shape

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config, Gemma4TextConfig, Lfm2MoeConfig, LlamaConfig, Qwen2Config, Qwen3MoeConfig,
)

import packed_forms as forms
from golden_curves import GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE, curve, train
from golden_families import PLAIN_ROPE, SIZES
from golden_figures import relative_norm, write_json
from golden_micro_batch import answers_to_micro_batch
from golden_models import load_with_adapter, lora_parameters, save_adapter, save_base_model
from golden_rows import ROW_LENGTHS, pad, random_row
from packed_gguf import write_gguf

VOCABULARY = 64
MICRO_BATCH_LENGTHS = (8, 13)
VARIANT = dict(learning_rate=1e-2, weight_decay=0.01, max_grad_norm=0.0, schedule="constant", warmup_steps=0,
               min_lr_ratio=0.0, steps=20)
LIMIT = 3_000_000
NARROW = dict(SIZES, vocab_size=VOCABULARY, hidden_size=64, num_key_value_heads=2, rms_norm_eps=1e-5, initializer_range=0.12)



def deepseek_v3(**sizes):
    return DeepseekV3Config(
        **{**NARROW, "num_key_value_heads": 4, **sizes}, q_lora_rank=40, kv_lora_rank=48, qk_nope_head_dim=12,
        qk_rope_head_dim=8, v_head_dim=10, n_routed_experts=8 if sizes["n_group"] > 1 else 4, num_experts_per_tok=2,
        n_shared_experts=1, routed_scaling_factor=2.5, norm_topk_prob=True, tie_word_embeddings=False,
        rope_parameters=dict(PLAIN_ROPE))


BASES = {
    # Tied. Rows of 80 elements: 64 and 32 do not divide them.
    "llama": dict(
        seed=31,
        config=lambda: LlamaConfig(**{**NARROW, "intermediate_size": 80}, num_hidden_layers=1,
                                   rope_parameters=dict(PLAIN_ROPE), tie_word_embeddings=True),
        lora=dict(target_modules="all-linear"),
    ),
    # Not tied, with biases. Rows of 192: more than one block of 128, the second not full.
    "qwen2": dict(
        seed=32,
        config=lambda: Qwen2Config(**{**NARROW, "intermediate_size": 192}, num_hidden_layers=1,
                                   rope_parameters=dict(PLAIN_ROPE, rope_theta=1000000.0), tie_word_embeddings=False),
        lora=dict(target_modules="all-linear"),
    ),
    # Rows of 256, for the K types of GGUF.
    "wide": dict(
        seed=33,
        config=lambda: LlamaConfig(**{**NARROW, "hidden_size": 32, "intermediate_size": 256}, num_hidden_layers=3,
                                   rope_parameters=dict(PLAIN_ROPE), tie_word_embeddings=False),
        lora=dict(target_modules=["q_proj", "down_proj"]),
    ),
    # Experts, which mlx-lm holds in stacks.
    "qwen3_moe": dict(
        seed=34,
        config=lambda: Qwen3MoeConfig(**{**NARROW, "intermediate_size": 128}, num_hidden_layers=2, num_experts=4,
                                      num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True, head_dim=16,
                                      rope_parameters=dict(PLAIN_ROPE), tie_word_embeddings=True),
        lora=dict(target_modules=["q_proj", "v_proj"]),
    ),
    # Latent attention and experts. 144 rows are one block of FP8 and a part of one.
    "deepseek_v3": dict(
        seed=35,
        config=lambda: deepseek_v3(moe_intermediate_size=144, n_group=4, topk_group=2, first_k_dense_replace=1,
                                   num_hidden_layers=2, intermediate_size=80),
        lora=dict(target_modules=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]),
    ),
    # The same in one group, as Kimi K2 is.
    "kimi_k2": dict(
        seed=36,
        config=lambda: deepseek_v3(moe_intermediate_size=96, n_group=1, topk_group=1, first_k_dense_replace=1,
                                   num_hidden_layers=2, intermediate_size=80),
        lora=dict(target_modules=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]),
    ),
    # mlx-lm has other names for its feed-forward parts.
    "lfm2_moe": dict(
        seed=37,
        config=lambda: Lfm2MoeConfig(
            **{key: value for key, value in NARROW.items() if key != "rms_norm_eps"}, num_hidden_layers=3,
            layer_types=["conv", "full_attention", "conv"], norm_eps=1e-5, conv_bias=False, conv_L_cache=3,
            num_dense_layers=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, use_expert_bias=True,
            norm_topk_prob=True, routed_scaling_factor=1.0, pad_token_id=None, tie_word_embeddings=True,
            rope_parameters=dict(PLAIN_ROPE, rope_theta=1000000.0)),
        lora=dict(target_modules=["q_proj", "in_proj", "out_proj"]),
    ),
    "gemma4_moe": dict(
        seed=38,
        config=lambda: Gemma4TextConfig(
            **{**NARROW, "num_key_value_heads": 2, "intermediate_size": 64}, num_hidden_layers=2, head_dim=16,
            global_head_dim=32, num_global_key_value_heads=1, attention_k_eq_v=True, hidden_size_per_layer_input=0,
            num_kv_shared_layers=0, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32,
            sliding_window=5, final_logit_softcapping=3.0, pad_token_id=None, tie_word_embeddings=True,
            layer_types=["sliding_attention", "full_attention"], rope_parameters={
                "full_attention": {"rope_type": "proportional", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
                "sliding_attention": dict(PLAIN_ROPE)}),
        lora=dict(target_modules=["q_proj", "o_proj", "down_proj"]),
    ),
}

NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")
# Types of the case gguf_k, by the ending of a tensor's name.
GGUF_K = {
    "0.mlp.down_proj": "Q4_K", "1.mlp.down_proj": "Q5_K", "2.mlp.down_proj": "Q6_K",
    "0.mlp.gate_proj": "Q4_0", "1.mlp.gate_proj": "Q5_0", "2.mlp.gate_proj": "Q5_1",
    "0.mlp.up_proj": "Q4_1", "1.mlp.up_proj": "Q8_0", "2.mlp.up_proj": "BF16",
    "1.self_attn.q_proj": "F16", "lm_head": "Q8_0", "embed_tokens": "Q5_1",
}
CASES = {
    "nf4": ("llama", forms.write_bitsandbytes, NF4),
    "nf4_double": ("qwen2", forms.write_bitsandbytes, dict(NF4, bnb_4bit_use_double_quant=True)),
    "fp4": ("qwen2", forms.write_bitsandbytes, dict(load_in_4bit=True, bnb_4bit_quant_type="fp4", dtype=torch.float32)),
    "int8": ("llama", forms.write_bitsandbytes, dict(load_in_8bit=True)),
    "mlx4": ("llama", forms.write_mlx, dict(bits=4, group=64)),
    "mlx8": ("llama", forms.write_mlx, dict(bits=8, group=64)),
    "mlx3": ("qwen2", forms.write_mlx, dict(bits=3, group=32)),
    "mlx_mixed": ("qwen2", forms.write_mlx, dict(bits=4, group=32, overrides={
        "v_proj": {"group_size": 64, "bits": 6}, "down_proj": {"group_size": 64, "bits": 5},
        "k_proj": {"group_size": 64, "bits": 2}, "o_proj": False})),
    "mlx_experts": ("qwen3_moe", forms.write_mlx, dict(bits=4, group=64, overrides={
        "mlp.gate": {"group_size": 64, "bits": 8}})),
    "mxfp4": ("llama", forms.write_mlx, dict(mode="mxfp4")),
    "fp8_blocks": ("qwen2", forms.write_fp8_blocks, {}),
    "fp8_channels": ("llama", forms.write_fp8_channels, {}),
    "compressed_int4": ("qwen2", forms.write_compressed_int4, {}),
    "fp8_deepseek_v3": ("deepseek_v3", forms.write_fp8_blocks, {}),
    "int4_kimi_k2": ("kimi_k2", forms.write_compressed_int4, dict(experts_alone=True, model_type="kimi_k2")),
    "mlx_lfm2_moe": ("lfm2_moe", forms.write_mlx, dict(bits=4, group=32, overrides={
        "feed_forward.gate": {"group_size": 32, "bits": 8}})),
    "mlx_gemma4_moe": ("gemma4_moe", forms.write_mlx, dict(bits=4, group=32, overrides={
        "router.proj": {"group_size": 32, "bits": 8}})),
    "gptq": ("llama", forms.write_gptq, {}),
    "gptq_act_order": ("qwen2", forms.write_gptq, dict(group=64, act_order=True, version=2)),
    "awq": ("qwen2", forms.write_awq, {}),
    "gguf_q4_1": ("llama", write_gguf, dict(kind_of=lambda name: "Q8_0" if "embed" in name else
                                                  "F16" if "down_proj" in name else "Q4_1")),
    "gguf_k": ("wide", write_gguf, dict(kind_of=lambda name: next(
        (kind for ending, kind in GGUF_K.items() if name.removesuffix(".weight").endswith(ending)), "Q4_0"))),
}


# Programs that compute over packed weights on a CPU.
OWNERS = {"bitsandbytes": ("bitsandbytes",), "mlx": ("mlx", "mlx-lm")}


def write_base(name, directory):
    """The 16-bit model: save_base_model's values, rounded to bf16."""
    specification = BASES[name]
    save_base_model(specification, directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(directory)
    (directory / "generation_config.json").unlink()
    save_adapter(specification, directory)
    generator = torch.Generator().manual_seed(1000 + specification["seed"])
    rows = [random_row(length, generator, VOCABULARY) for length in ROW_LENGTHS]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    micro_batch = [random_row(length, generator, VOCABULARY) for length in MICRO_BATCH_LENGTHS]
    write_json(directory / "rows.json", {"rows": micro_batch})
    return rows, micro_batch


def fnv(data):
    """FNV-1a of 64 bits: short in every language."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def reference_logits(directory, owner, rows, float32):
    """Logits of the program that owns the format, over its own packed weights."""
    if owner == "bitsandbytes":
        model = forms.load_bitsandbytes(directory, dtype=torch.float32 if float32 else torch.bfloat16)
        with torch.no_grad():
            return [model(row[None]).logits[0].float() for row in rows]
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(directory)
    if float32:
        model.set_dtype(mx.float32)  # scales and biases too; codes are integers and stay
    return [torch.from_numpy(np.array(model(mx.array([row.tolist()]))[0].astype(mx.float32))) for row in rows]


def packed_forward(directory, owner, tensors, batch):
    """The largest distance of the reference's own logits over packed weights, without the adapter."""
    if owner not in OWNERS or not forms.its_program_is_right(directory):
        return None
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    rows = [batch["input_ids"][n, :length] for n, length in enumerate(lengths)]
    want = [tensors[f"base_logits.{n}"] for n in range(len(rows))]
    distances = [max((a - b).abs().max().item() for a, b in zip(reference_logits(directory, owner, rows, float32), want))
                 for float32 in (True, False)]
    return {"f32": distances[0], "bf16": distances[1], "largest_logit": max(b.abs().max().item() for b in want)}


def curve_of(directory, rows):
    results = []
    for float64 in (False, True):
        model = load_with_adapter(directory, float64)
        results.append(train(model, list(lora_parameters(model).values()), rows, VARIANT))
    return {"global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": MICRO_BATCH_SIZE, **curve(VARIANT, *results)}


def settings_in_words(settings):
    """What JSON can hold of a case's settings."""
    return {key: str(value).removeprefix("torch.") for key, value in settings.items() if not callable(value)}


def write_case(name, base, rows, micro_batch, output):
    base_name, write, settings = CASES[name]
    shutil.rmtree(output, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints
        values, packed = write(base, output, **settings)
    batch = pad(micro_batch)
    with tempfile.TemporaryDirectory() as temporary:
        decoded = Path(temporary)
        forms.write_decoded(base, values, decoded)
        shutil.copytree(base / "adapter", decoded / "adapter")
        tensors, scalars = answers_to_micro_batch(decoded, batch, float64=False)
        exact, exact_scalars = answers_to_micro_batch(decoded, batch, float64=True)
        trained = curve_of(decoded, rows)
    gradients = {key: (tensor, exact[key]) for key, tensor in tensors.items() if key.startswith("grad.")}
    assert all(a.abs().max() > 0 for a, _ in gradients.values()), "a gradient is zero: the golden would not test it"
    logits = {key: tensor for key, tensor in tensors.items() if key.startswith("logits.")}
    noise = {
        "logits_max_abs": max((tensor.double() - exact[key]).abs().max().item() for key, tensor in logits.items()),
        "logits_largest": max(tensor.abs().max().item() for tensor in logits.values()),
        "loss_sum_relative": abs(scalars["loss_sum"] / exact_scalars["loss_sum"] - 1),
        "gradients_worst_relative_norm": max(relative_norm([pair]) for pair in gradients.values()),
    }
    original = load_file(base / "model.safetensors")
    changed = max(relative_norm([(values[key], original[key].double())]) for key in packed)
    owner = write.__name__.removeprefix("write_")
    packages = OWNERS | {"gguf": ("gguf", "llama-cpp-python")}
    golden = {
        "base": base_name,
        "format": owner,
        "settings": settings_in_words(settings),
        "versions": {package: version(package).split("+")[0]
                     for package in ("torch", "transformers", "peft", *packages.get(owner, ()))},
        "packed": {key: {"shape": list(values[key].shape), "fnv": fnv(values[key].numpy().astype("<f4").tobytes())}
                   for key in sorted(packed)},
        "micro_batch": scalars,
        "noise": noise,
        "largest_change_by_packing": changed,
        "packed_forward": packed_forward(output, owner, tensors, batch),
        "curve": trained,
    }
    ends = {f"ends.{key}": values[key][[0, -1]] for key in packed}
    kept = {key: tensor for key, tensor in tensors.items() if key.startswith(("logits.", "grad."))}
    save_file({key: tensor.contiguous() for key, tensor in (kept | ends).items()}, output / "golden.safetensors")
    write_json(output / "golden.json", golden)
    forward = golden["packed_forward"]
    words = f"; {owner} over packed weights: {forward['f32']:.1e}, bf16 {forward['bf16']:.1e}" if forward else ""
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{name} ({base_name}): {size // 1000} kB, {len(packed)} matrices change by at most {changed:.3f}; "
          f"loss {trained['curve'][0]['loss']:.4f} -> {trained['curve'][-1]['loss']:.4f}; noise: logits "
          f"{noise['logits_max_abs']:.1e} of {noise['logits_largest']:.1f}, gradients "
          f"{noise['gradients_worst_relative_norm']:.1e}, curve {trained['noise']['loss_relative']:.1e}{words}", flush=True)
    assert noise["logits_max_abs"] < 6e-6 and math.isfinite(trained["curve"][-1]["loss"])
    exact_in_f32 = owner == "mlx" or name == "fp4"
    assert not exact_in_f32 or forward["f32"] < 1e-5, "the reference computes something else"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "packed"
    parser.add_argument("--output", type=Path, default=default, help="default: tests/goldens/packed")
    parser.add_argument("--case", choices=list(CASES), action="append", help="only this one; default: all")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each layer about rounding

    made = {}
    for name in BASES:
        directory = arguments.output / "bases" / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        made[name] = write_base(name, directory)
    for name in arguments.case or CASES:
        base = CASES[name][0]
        write_case(name, arguments.output / "bases" / base, *made[base], arguments.output / name)
    for name in ("qwen2", "wide", "qwen3_moe", "deepseek_v3", "kimi_k2", "lfm2_moe", "gemma4_moe"):  # nothing is quantized out of these when they are loaded
        (arguments.output / "bases" / name / "model.safetensors").unlink()
    size = sum(path.stat().st_size for path in arguments.output.rglob("*") if path.is_file())
    print(f"{size / 1e6:.2f} MB in {arguments.output}")
    if size > LIMIT:
        sys.exit(f"the goldens are larger than {LIMIT / 1e6} MB")


if __name__ == "__main__":
    main()
