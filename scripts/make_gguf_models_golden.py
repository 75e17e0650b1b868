#!/usr/bin/env python3
"""Writes tests/goldens/gguf/models: GGUF files that llama.cpp's own converter makes of the tiny golden models.

    pip install --no-deps torch==2.15.0 transformers==5.23.0 safetensors==0.8.0
    python scripts/make_gguf_models_golden.py --llama-cpp PATH

PATH is a checkout of llama.cpp at commit 0c1e57098bba43ac29e6e3b677cdceebdd22334f: its `conversion` package and its
`gguf-py`. (The source distribution llama_cpp_python-0.3.36.tar.gz has that commit in `vendor/llama.cpp`.) No code of it
is taken over: it is imported from there.

Per case, `NAME.gguf` and `NAME.safetensors` with the logits [tokens, vocabulary] that transformers computes of the
directory which the file was made of, `base_logits.ROW` for each row of the golden model. That directory is the golden
model, but for what a GGUF file cannot say: those keys of its config have the values that llama.cpp takes for granted.
Cases of Q8_0 are made of weights that are Q8_0's (or f16's, in rows that are no whole blocks), so their file holds what
transformers computed with.

llama.cpp computes Granite without positions where a key says so. The converter writes that key for models with Mamba
layers only, whatever config.json says, so here it is told (`granite4_nope`).

Tokenizers are left out: the tiny models have none. tests/goldens/gguf/tokenizers.json is about those.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "goldens"
OUTPUT = GOLDENS / "gguf" / "models"
MTP = {"qwen3_5", "qwen3_5_moe", "qwen3_next"}

DEEPSEEK = dict(scoring_func="sigmoid")
# Of two layers, as the hub spells it. llama.cpp has one width for layers without experts.
GRANITE4 = dict(layer_types=["attention"] * 2, intermediate_size=56)
# (name, golden model, type, keys of the config that have another value)
CASES = [
    ("qwen3_moe", "qwen3_moe_experts", "f32", dict(norm_topk_prob=True)),
    ("qwen3_moe_q8_0", "qwen3_moe_experts", "q8_0", dict(norm_topk_prob=True)),
    ("gemma2", "gemma2", "f32", dict(query_pre_attn_scalar=16)),
    ("gemma3", "gemma3", "f32", dict(query_pre_attn_scalar=16, layer_types=["sliding_attention"] * 3)),
    # Twice the layers, so that the sixth sees all keys.
    ("gemma3_q8_0", "gemma3", "q8_0", dict(
        query_pre_attn_scalar=16, num_hidden_layers=6,
        layer_types=["sliding_attention"] * 5 + ["full_attention"])),
    ("gemma4", "gemma4", "f32", {}),
    ("gemma4_k_eq_v", "gemma4_k_eq_v", "f32", {}),
    ("gemma4_moe", "gemma4_moe", "f32", {}),
    ("gpt_oss", "gpt_oss", "f32", {}),
    ("gpt_oss_mxfp4", "gpt_oss_mxfp4", "f32", {}),
    ("deepseek_v3", "deepseek_v3", "f32", dict(DEEPSEEK, rope_parameters=dict(mscale=0.8, mscale_all_dim=0.8))),
    ("deepseek_v3_q8_0", "deepseek_v3_plain", "q8_0", DEEPSEEK),
    ("glm4_moe_lite", "glm4_moe_lite", "f32", dict(DEEPSEEK, first_k_dense_replace=1)),
    ("glm4_moe", "glm4_moe", "f32", {}),
    ("glm4", "glm4", "f32", {}),
    ("lfm2", "lfm2", "f32", dict(conv_bias=False)),
    ("lfm2_moe", "lfm2_moe", "f32", dict(routed_scaling_factor=1.0)),
    ("phi3", "phi3", "f32", {}),
    ("ministral3", "ministral3", "f32", {}),
    ("olmo3", "olmo3", "f32", {}),
    ("granite", "granite", "f32", {}),
    ("granite4", "granitemoehybrid_rope", "f32", GRANITE4),
    ("granite4_nope", "granitemoehybrid", "f32", GRANITE4),
    ("qwen3_next", "qwen3_next", "f32", {}),
    ("qwen3_5", "qwen3_5", "f32", {}),
    ("qwen3_5_q8_0", "qwen3_5", "q8_0", {}),
    ("qwen3_5_moe", "qwen3_5_moe", "f32", {}),
    ("llama3", "llama3", "f32", {}),
]


def merged(config, changes):
    for key, value in changes.items():
        if isinstance(value, dict):
            config[key] = merged(dict(config[key]), value)
        else:
            config[key] = value
    return config


def rounded(tensor, gguf):
    """A tensor whose numbers are those of its Q8_0."""
    if tensor.dim() < 2 or not tensor.is_floating_point():
        return tensor
    if tensor.shape[-1] % 32 != 0:
        return tensor.half().float()
    kind = gguf.GGMLQuantizationType.Q8_0
    values = gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind)
    return torch.from_numpy(values.reshape(tuple(tensor.shape)).copy())


def prepare(name, family, kind, changes, directory, gguf):
    """The directory that a file is made of. Returns the config as transformers should read it."""
    source = GOLDENS / "models" / family
    tensors = load_file(source / "model.safetensors")
    if changes.get("num_hidden_layers") == 6:
        later = lambda key: re.sub(r"layers\.(\d)", lambda found: f"layers.{int(found[1]) + 3}", key)
        tensors |= {later(key): value.clone() for key, value in tensors.items() if ".layers." in key}
    if changes.get("conv_bias") is False:
        tensors = {key: value for key, value in tensors.items() if not (".conv." in key and key.endswith(".bias"))}
    if kind == "q8_0":
        tensors = {key: rounded(value, gguf) for key, value in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = merged(json.loads((source / "config.json").read_text()), changes)
    (directory / "config.json").write_text(json.dumps(config))
    vocabulary = config["vocab_size"]
    if family.startswith("gemma"):
        # The converter cuts the embedding to the tokenizer's length.
        tokens = {f"t{n}": n for n in range(vocabulary)}
        (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": []}))
    return config


def logits(directory, family):
    """transformers' logits of each row of the golden model, in f32."""
    rows = json.loads((GOLDENS / "models" / family / "golden.json").read_text())["rows"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    found = {}
    with torch.no_grad():
        for n, row in enumerate(rows):
            found[f"base_logits.{n}"] = model(torch.tensor([row["input_ids"]])).logits[0].float().contiguous()
    return found


def convert(directory, family, kind, path, conversion, gguf):
    hparams = conversion.ModelBase.load_hparams(directory, False)
    cls = conversion.get_model_class(conversion.get_model_architecture(hparams, conversion.ModelType.TEXT))
    types = {"f32": gguf.LlamaFileType.ALL_F32, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    nothing = lambda self: None
    attributes = {"set_vocab": nothing, "model_arch": cls.model_arch}
    if family in MTP:
        attributes["no_mtp"] = True
    made = type(cls.__name__, (cls,), attributes)
    with torch.inference_mode():
        writer = made(directory, types[kind], path, model_name=path.stem)
        if hasattr(writer, "impl"):
            writer.impl.set_vocab = lambda: None
        if hparams.get("position_embedding_type") == "nope":
            told = writer.gguf_writer.add_rope_scaling_finetuned
            writer.gguf_writer.add_rope_scaling_finetuned = lambda _: told(False)
        writer.write()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--case", action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = arguments.llama_cpp.resolve()
    sys.path[:0] = [str(root), str(root / "gguf-py")]
    import conversion
    import gguf

    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, family, kind, changes in CASES:
        if arguments.case and name not in arguments.case:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            prepare(name, family, kind, changes, directory, gguf)
            expected = logits(directory, family)
            path = arguments.output / f"{name}.gguf"
            convert(directory, family, kind, path, conversion, gguf)
        save_file(expected, arguments.output / f"{name}.safetensors", metadata={"golden": family})
        print(f"{path.name}: {path.stat().st_size} bytes", flush=True)


if __name__ == "__main__":
    main()
