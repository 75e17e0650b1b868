#!/usr/bin/env python3
"""Writes the goldens of `finetune quantize` for models with experts and for multimodal ones: what mlx-lm, and
transformers with bitsandbytes, write of tiny 16-bit bases.

Under OUTPUT/<family>.json:

    config          config.json of the base, as most models on the hub spell it
    tensors         of the base, by name: number type, shape. The values are those of `drawn`, which a
                    test can make too
    written         by form (mlx4, nf4, ...): the tensors of the other program's directory, by name: number
                    type, shape, FNV-1a (64 bits) of the bytes. Of `quant_state` of bitsandbytes, which is
                    JSON text, the hash is null
    quantization    by form: what the other program adds to config.json

What is converted is made of the same values: a file in the hub's spelling, experts one by one where the hub has
them so. Of multimodal models mlx-lm has the text model. bitsandbytes is given that alone here; the other parts of the
golden are the base's. A whole model is in packed_multimodal.py. The versions are those of make_packed_goldens.py.
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
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM, Gemma3TextConfig, Gemma4TextConfig, Glm4MoeConfig, GptOssConfig, GraniteMoeHybridConfig,
    Ministral3Config, MuseGlimmerTextConfig, Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig,
)

import packed_forms as forms
from golden_families import GRANITE4, PLAIN_ROPE, YARN_ROPE
from hub_spelling import mlx_spelling
from make_packed_goldens import BASES, NARROW, deepseek_v3, fnv


def of_wide_heads(config):
    """With latent attention whose matrices of heads have columns that fill a group, so that mlx-lm packs them."""
    config.kv_lora_rank = config.qk_nope_head_dim = 64
    config.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    return config


# Groups of 64 fit most matrices. 96 columns of experts fit groups of 32 only.
EXPERTS = dict(num_hidden_layers=2, moe_intermediate_size=96, tie_word_embeddings=False, rope_parameters=dict(PLAIN_ROPE))
GLM = dict(EXPERTS, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, n_group=1,
           topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.5)
# A delta net and attention in turn, which mlx-lm knows by the interval.
DELTA = dict(num_hidden_layers=2, head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
             linear_value_head_dim=16, linear_conv_kernel_dim=4, layer_types=["linear_attention", "full_attention"],
             tie_word_embeddings=False)
SHARED = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, shared_expert_intermediate_size=64)
QWEN3_5_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1], "mrope_interleaved": True}
WINDOWS = dict(num_hidden_layers=2, head_dim=16, sliding_window=5, pad_token_id=None,
               layer_types=["sliding_attention", "full_attention"])
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
    # Its dense part has other names in mlx-lm, and gate and up apart: 2 x 64 rows of 64 columns here.
    "granitemoehybrid": lambda: GraniteMoeHybridConfig(**{**GRANITE4, **NARROW, "intermediate_size": 64, "shared_intermediate_size": 64}),
    "qwen3_next": lambda: Qwen3NextConfig(
        **{**NARROW, "intermediate_size": 80}, **DELTA, **SHARED, norm_topk_prob=True, rope_parameters=dict(PLAIN_ROPE)),
    "qwen3_5": lambda: Qwen3_5TextConfig(
        **{**NARROW, "intermediate_size": 96}, **{**DELTA, "tie_word_embeddings": True}, rope_parameters=QWEN3_5_ROPE),
    "qwen3_5_moe": lambda: Qwen3_5MoeTextConfig(**NARROW, **DELTA, **SHARED, rope_parameters=QWEN3_5_ROPE),
    "gemma3": lambda: Gemma3TextConfig(**{**NARROW, "intermediate_size": 80}, **WINDOWS, rope_parameters={
        "full_attention": dict(PLAIN_ROPE, rope_theta=1000000.0), "sliding_attention": dict(PLAIN_ROPE)}),
    # The last two layers take keys and values from the two before them, and each layer has inputs of its own.
    "gemma4": lambda: Gemma4TextConfig(
        **{**NARROW, "intermediate_size": 64}, **{**WINDOWS, "num_hidden_layers": 4, "layer_types": 2 * WINDOWS["layer_types"]},
        global_head_dim=32, num_kv_shared_layers=2, hidden_size_per_layer_input=64, vocab_size_per_layer_input=64,
        tie_word_embeddings=True, rope_parameters={
            "full_attention": {"rope_type": "proportional", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
            "sliding_attention": dict(PLAIN_ROPE)}),
    "mistral3": lambda: Ministral3Config(
        **{**NARROW, "intermediate_size": 80}, num_hidden_layers=1, head_dim=16, pad_token_id=None, tie_word_embeddings=False,
        rope_parameters=dict(YARN_ROPE, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)),
    "kimi_k25": lambda: of_wide_heads(deepseek_v3(
        moe_intermediate_size=64, n_group=1, topk_group=1, first_k_dense_replace=1, num_hidden_layers=2,
        intermediate_size=64)),
    "muse_glimmer": lambda: MuseGlimmerTextConfig(
        **{**NARROW, "intermediate_size": 64}, **WINDOWS, rope_parameters=dict(PLAIN_ROPE), tie_word_embeddings=False),
}
# Multimodal models as the hub has them: the class, how names of the text model and of its output layer begin, tensors
# of other parts, the type of the text model if it is not that of the table, and keys of config.json.
VOCABULARY = {"vocab_size": NARROW["vocab_size"]}  # mlx-lm's Gemma takes it from there
WRAPPERS = {
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", "model.language_model.", "",
                ["model.visual.pos_embed.weight", "mtp.fc.weight"], None, {}),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", "model.language_model.", "",
                    ["model.visual.pos_embed.weight", "mtp.fc.weight"], None, {}),
    "gemma3": ("Gemma3ForConditionalGeneration", "language_model.model.", "language_model.",
               ["vision_tower.probe", "multi_modal_projector.mm_soft_emb_norm.weight"], None, VOCABULARY),
    "gemma4": ("Gemma4ForConditionalGeneration", "model.language_model.", "",
               ["model.vision_tower.std_bias", "model.embed_vision.embedding_projection.weight"], None, VOCABULARY),
    "mistral3": ("Mistral3ForConditionalGeneration", "language_model.model.", "language_model.",
                 ["vision_tower.ln_pre.weight", "multi_modal_projector.norm.weight"], None, {}),
    "kimi_k25": ("KimiK25ForConditionalGeneration", "language_model.model.", "language_model.",
                 ["vision_tower.patch_embed.pos_emb.weight", "mm_projector.pre_norm.weight"], "kimi_k2", {}),
    "muse_glimmer": ("MuseGlimmerForConditionalGeneration", "model.language_model.", "",
                     ["vision_tower.ln_pre.weight"], None, {}),
}
MLX = {"mlx4": dict(bits=4, group=64), "mlx8": dict(bits=8, group=64), "mxfp4": dict(mode="mxfp4")}
BITSANDBYTES = {"nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "int8": dict(load_in_8bit=True)}
# transformers has no class with an output layer of the text model alone.
WITHOUT_CLASS = ("muse_glimmer",)
# mlx-lm reads gpt-oss's experts in MXFP4 only.
NOT_IN_MLX = ("gpt_oss",)
# Tensors in f32 beside bf16, as files of the hub have them: how their names end.
IN_F32 = {
    "qwen3_5": (".A_log", ".linear_attn.norm.weight"),
    "qwen3_5_moe": (".A_log", ".linear_attn.norm.weight"),
}
CORRECTIONS = ("expert_bias", "e_score_correction_bias")


def forms_of(family):
    """The forms that another program loads the family in."""
    of_mlx = {} if family in NOT_IN_MLX else MLX
    return of_mlx if family in WITHOUT_CLASS else of_mlx | BITSANDBYTES


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
    model = text_model(FAMILIES[family]())
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    with safe_open(directory / "model.safetensors", "pt") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
    config = json.loads((directory / "config.json").read_text())
    for key in ("transformers_version", "_name_or_path"):
        config.pop(key, None)
    # mlx-lm has an interval instead of `layer_types`.
    if config.get("layer_types") == ["linear_attention", "full_attention"]:
        config["full_attention_interval"] = 2
    if config["model_type"] == "gemma3_text":
        config["sliding_window_pattern"] = 2
    if family in WRAPPERS:
        shapes, config = wrapped(family, shapes, config)
    else:
        config = mlx_spelling(config)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        values = torch.from_numpy(drawn(name, int(np.prod(shape)))).reshape(shape)
        in_f32 = name.endswith(CORRECTIONS + IN_F32.get(family, ()))
        tensors[name] = values.to(torch.float32 if in_f32 else torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return config


def text_model(config):
    """A model of a text model's config. Of Muse Glimmer transformers has no class for that alone, with an output layer."""
    if config.model_type != "muse_glimmer_text":
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = torch.nn.Module()
    model.model = transformers.AutoModel.from_config(config, dtype=torch.bfloat16)
    model.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=torch.bfloat16)

    def save_pretrained(directory):
        directory.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(config.to_dict()))

    model.save_pretrained = save_pretrained
    return model


def wrapped(family, shapes, text):
    """Names, shapes and config.json of a multimodal model with this text model."""
    name, _, _, others, model_type, keys = WRAPPERS[family]
    if family == "qwen3_5_moe":
        shapes = in_stacks(shapes)
    text = {key: value for key, value in text.items() if key != "architectures"}
    text["model_type"] = model_type or text["model_type"]
    if text["model_type"] in ("gemma4_text", "kimi_k2"):  # others keep `rope_parameters` there
        text = mlx_spelling(text)
    for key in ("dtype", "torch_dtype"):
        text.pop(key, None)
    config = {"architectures": [name], "model_type": family, "torch_dtype": "bfloat16", "text_config": text,
              "vision_config": {"hidden_size": 8}, "tie_word_embeddings": text["tie_word_embeddings"], **keys}
    return {inside(family, own): shape for own, shape in shapes.items()} | {other: [8, 8] for other in others}, config


def in_stacks(shapes):
    """The shapes with experts in transformers' stacks, as the hub has Qwen3.5's."""
    stacked, experts = {}, {}
    for name, shape in shapes.items():
        if ".experts." not in name:
            stacked[name] = shape
            continue
        layer, rest = name.split(".experts.")
        experts.setdefault(layer, {})[rest.split(".", 1)[1]] = shape
    for layer, of_layer in experts.items():
        width, hidden = of_layer["gate_proj.weight"]
        count = len([name for name in shapes if name.startswith(f"{layer}.experts.")]) // len(of_layer)
        stacked[f"{layer}.experts.gate_up_proj"] = [count, 2 * width, hidden]
        stacked[f"{layer}.experts.down_proj"] = [count, hidden, width]
    return stacked


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


def inside(family, name):
    """The name in the multimodal model of a tensor of the text model."""
    _, before, before_output, *_ = WRAPPERS[family]
    return before + name.removeprefix("model.") if name.startswith("model.") else before_output + name


def skipped(family):
    """What bitsandbytes leaves of a multimodal model: other parts, as in memory and as in the files."""
    parts = sorted({".".join(name.split(".")[:2 if name.startswith("model.") else 1]) for name in WRAPPERS[family][3]})
    both = [[part] if part.startswith("model.") else [f"model.{part}", part] for part in parts]
    return ["lm_head", *(name for names in both for name in names)]


def bitsandbytes_of_text(family, base, work, settings):
    """What bitsandbytes packs of the text model in a multimodal one, under the names in that, and all else as the base
    has it: experts in its stacks, numbers in their types."""
    text, output = work / "text", work / "text-packed"
    for directory in (text, output):
        shutil.rmtree(directory, ignore_errors=True)
    text_model(FAMILIES[family]()).save_pretrained(text)
    names = {inside(family, name): name for name in text_names(family, text)}
    tensors = load_file(base / "model.safetensors")
    save_file({names[name]: tensor for name, tensor in tensors.items() if name in names}, text / "model.safetensors",
              metadata={"format": "pt"})
    forms.save_bitsandbytes(text, output, **settings)
    found = {inside(family, name): about for name, about in header(output, hashes=True).items() if ".experts." not in name}
    stays = {name: about for name, about in header(base, hashes=True).items()
             if name not in found or found[name][0] not in ("U8", "I8")}
    quantization = json.loads((output / "config.json").read_text())["quantization_config"]
    return found | stays, quantization | {"llm_int8_skip_modules": skipped(family)}


def text_names(family, text):
    """The names of a text model's tensors, with experts in stacks where the hub has the multimodal model so."""
    with safe_open(text / "model.safetensors", "pt") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
    return in_stacks(shapes) if family == "qwen3_5_moe" else shapes


def of_family(family, work):
    base = work / "base"
    config = write_base(family, base)
    written, quantization = {}, {}
    for form, settings in forms_of(family).items():
        if family in WRAPPERS and form in BITSANDBYTES:
            written[form], quantization[form] = bitsandbytes_of_text(family, base, work, settings)
            continue
        output = work / form
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
