#!/usr/bin/env python3
"""Writes what other programs count of published models, by their shapes alone (published_shapes.py): parameters in
transformers, and bytes in mlx-lm and bitsandbytes if they are packed. No weights are made: transformers' are on the
device `meta`, mlx-lm's are never computed.

    target/oracle/bin/python scripts/make_published_golden.py

Needs requirements.txt, and mlx-lm as make_packed_goldens.py does.

OUTPUT is one JSON object a model:

    model, billions, config     the shape, and what its makers state
    parameters                  of the text model in transformers, buffers that are saved among them
    encoders                    (Gemma 4's E2B and E4B) parameters of the encoders, which the stated count has too
    by_row                      (the same) elements of the table of each layer's inputs, of which only rows are read
    bytes                       of the weights without that table: mlx4, mlx8 and mxfp4 as mlx-lm packs a model of bf16,
                                but for routers, which stay; nf4 and int8 as bitsandbytes packs linear layers
"""

import argparse
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here comes from the hub; a lookup would be a mistake

import mlx.core as mx
import torch
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    MuseGlimmerConfig,
    MuseGlimmerForConditionalGeneration,
)

from published_shapes import ENCODERS, PUBLISHED

# Bits, elements of a group, and kind of each form of mlx-lm.
MLX_FORMS = {"mlx4": (4, 64, "affine"), "mlx8": (8, 64, "affine"), "mxfp4": (4, 32, "mxfp4")}
# Of mlx-lm's modules. Which experts they choose is sensitive.
MLX_ROUTERS = (".gate", ".router", ".router.proj")
PER_LAYER_TABLE = "embed_tokens_per_layer.weight"
BYTES = 2  # of a number that is not packed

# Classes that transformers and mlx-lm have under other names.
IN_TRANSFORMERS = {"kimi_k2": "deepseek_v3"}
IN_MLX = {
    "gemma4_unified_text": "gemma4_text",
    "muse_glimmer_text": "muse_glimmer",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5_moe",
}
# Those that mlx-lm has only inside of a multimodal model, and transformers too.
INSIDE = ("qwen3_5_text", "qwen3_5_moe_text")
WHOLE_ONLY = ("muse_glimmer_text",)


# --- transformers, bitsandbytes -------------------------------------------------------------------


def transformers_config(shape):
    shape = dict(shape)
    kind = shape.pop("model_type")
    return AutoConfig.for_model(IN_TRANSFORMERS.get(kind, kind), **shape)


def without_weights(make, config):
    with torch.device("meta"):
        return make(config)


def saved_numbers(model):
    """Name and number of elements of what is saved: parameters, each once, and buffers."""
    yield from ((name, value.numel()) for name, value in model.named_parameters())
    for prefix, module in model.named_modules():
        for name, value in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", value.numel()


def linear_layers(model, kind):
    """Rows and columns of each linear layer but the output layer and routers, experts one by one."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head" and not name.endswith("router.proj"):
            yield module.out_features, module.in_features
    for name, value in model.named_parameters():
        if value.dim() == 3 and ".experts." in name:
            experts, rows, columns = value.shape
            # gpt-oss's lie the other way.
            yield from [(columns, rows) if kind == "gpt_oss" else (rows, columns)] * experts


def bitsandbytes_bytes(parameters, layers):
    linear = sum(rows * columns for rows, columns in layers)
    dense = (parameters - linear) * BYTES
    return {
        # Half a byte each, and a scale in f32 for 64.
        "nf4": dense + linear // 2 + linear // 64 * 4,
        # A byte each, and a scale in f32 for each row.
        "int8": dense + linear + sum(rows for rows, _ in layers) * 4,
    }


def encoders_of(shape):
    """Parameters of Gemma 4's encoders, which have the class's defaults, and what leads from them to the text model."""
    text = {key: value for key, value in shape.items() if key != "model_type"}
    whole = Gemma4Config(text_config=text, vision_config={}, audio_config={})
    named = without_weights(Gemma4ForConditionalGeneration, whole).named_parameters()
    return sum(value.numel() for name, value in named if "language_model" not in name and "lm_head" not in name)


# --- mlx-lm ---------------------------------------------------------------------------------------


def mlx_model(shape, config):
    defaults = {"rope_theta": 1e4, "partial_rotary_factor": 1.0, "block_dim": shape["hidden_size"]}
    # Rotary embeddings have no weights. The shape's own keys are those of files, as mlx-lm reads them.
    values = {**defaults, **config.to_dict(), **shape, "rope_scaling": None}
    kind = values["model_type"]
    values["model_type"] = IN_MLX.get(kind, kind)
    if "num_local_experts" in values and kind != "gpt_oss":
        values.setdefault("num_experts", values["num_local_experts"])
    if kind in INSIDE:
        values = {"model_type": values["model_type"], "text_config": values}
    model_class, arguments = _get_classes(values)
    model = model_class(arguments.from_dict(values))
    model.set_dtype(mx.bfloat16)
    if config.tie_word_embeddings and "lm_head" in model:
        model.pop("lm_head")  # so does mlx-lm where a file has none
    return model


def mlx_bytes(shape, config, bits, group, mode):
    model = mlx_model(shape, config)

    def is_packed(path, module):
        is_whole = hasattr(module, "to_quantized") and module.weight.shape[-1] % group == 0
        return is_whole and not path.endswith(MLX_ROUTERS)

    nn.quantize(model, group_size=group, bits=bits, mode=mode, class_predicate=is_packed)
    return sum(value.nbytes for name, value in tree_flatten(model.parameters()) if "per_layer." not in name)


# --- all ------------------------------------------------------------------------------------------


def text_model(config):
    """With its output layer."""
    if config.model_type not in WHOLE_ONLY:
        return without_weights(AutoModelForCausalLM.from_config, config)
    whole = without_weights(MuseGlimmerForConditionalGeneration, MuseGlimmerConfig(text_config=config.to_dict()))
    parts = {"model": whole.model.language_model, "lm_head": whole.lm_head}
    return torch.nn.ModuleDict(parts)


def counted(published):
    config = transformers_config(published["config"])
    model = text_model(config)
    numbers = list(saved_numbers(model))
    parameters = sum(count for _, count in numbers)
    by_row = sum(count for name, count in numbers if name.endswith(PER_LAYER_TABLE))
    found = {**published, "parameters": parameters}
    if published["model"] in ENCODERS:
        found.update(encoders=encoders_of(published["config"]), by_row=by_row)
    packed = {form: mlx_bytes(published["config"], config, *how) for form, how in MLX_FORMS.items()}
    layers = list(linear_layers(model, published["config"]["model_type"]))
    found["bytes"] = {**packed, **bitsandbytes_bytes(parameters - by_row, layers)}
    return found


def main():
    repository = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=repository / "tests/goldens/published.json")
    output = parser.parse_args().output
    lines = []
    for published in PUBLISHED:
        found = counted(published)
        lines.append(json.dumps(found))
        print(f"{found['model']}: {found['parameters']:,}, stated {published['billions']} billion", flush=True)
    output.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
