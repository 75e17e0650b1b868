#!/usr/bin/env python3
"""Writes tests/goldens/expert_gradients/<family>: PEFT's branches of stacked experts over golden models, and gradients.

    pip install -r scripts/requirements.txt
    python scripts/make_expert_gradient_goldens.py

transformers 5 holds the experts of a layer in two parameters, and PEFT trains a branch for each of them
(`target_parameters`). gate_up_proj has one A for gates and values. Per family there are

    adapter_config.json, adapter_model.safetensors   as PEFT saves them, with A and B both non-zero
    golden.safetensors   logits.<row> of the rows of the model's golden.json, and grad.<PEFT file name>, the gradient
                         of (sum of token losses / trained tokens)
    golden.json          versions, and how far these are from the same in f64

The models are those of tests/goldens/models: run make_goldens.py before this.
"""

import argparse
import contextlib
import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from golden_experts import tidy_adapter
from golden_figures import largest_difference, relative_norm, write_json
from golden_float64 import NoFloat32, in_float64
from golden_models import load_base, lora_parameters, with_adapter
from golden_rows import forward, pad, token_losses

GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "goldens"
# A layer of attention that has a branch beside the experts, as most adapters do.
FAMILIES = {
    "deepseek_v3": "o_proj",
    "glm4_moe": "o_proj",
    "glm4_moe_lite": "o_proj",
    "qwen3_5_moe": "o_proj",
    "qwen3_next": "o_proj",
    "lfm2_moe": "out_proj",
    "gemma4_moe": "o_proj",
}


def save_adapter(base, attention, seed, directory):
    base.name_or_path = base.config._name_or_path = ""
    config = LoraConfig(
        r=2, lora_alpha=6, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=[attention],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.2 if "lora_A" in name else 0.1)
    model.save_pretrained(directory)
    tidy_adapter(directory)


def answers(model_directory, adapter, batch, float64):
    model = with_adapter(load_base(model_directory), adapter)
    if float64:
        model = in_float64(model)
    with NoFloat32() if float64 else contextlib.nullcontext():
        logits = forward(model, batch)
        losses = token_losses(logits, batch["labels"])
        (losses.sum() / losses.numel()).backward()
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    tensors = {f"logits.{i}": logits[i, :n].detach().clone() for i, n in enumerate(lengths)}
    return tensors | {f"grad.{name}": parameter.grad.clone() for name, parameter in lora_parameters(model).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=GOLDENS / "expert_gradients")
    parser.add_argument("--family", choices=list(FAMILIES), action="append", help="only this one; default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for family in arguments.family or FAMILIES:
        source, directory = GOLDENS / "models" / family, arguments.output / family
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        save_adapter(load_base(source), FAMILIES[family], 400 + list(FAMILIES).index(family), directory)
        batch = pad(json.loads((source / "golden.json").read_text())["rows"])
        tensors, exact = (answers(source, directory, batch, float64) for float64 in (False, True))
        gradients = {name: (tensor, exact[name]) for name, tensor in tensors.items() if name.startswith("grad.")}
        assert all(tensor.abs().max() > 0 for tensor, _ in gradients.values()), "a gradient is zero"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "golden.safetensors")
        noise = {
            "logits_max_abs": largest_difference("logits.", tensors, exact),
            "gradients_relative_norm": relative_norm(list(gradients.values())),
            "gradients_worst_relative_norm": max(relative_norm([pair]) for pair in gradients.values()),
        }
        versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__,
                    "peft": peft.__version__}
        write_json(directory / "golden.json", {"versions": versions, "noise": noise})
        print(family, noise, len(gradients), flush=True)


if __name__ == "__main__":
    main()
