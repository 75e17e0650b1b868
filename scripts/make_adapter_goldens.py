#!/usr/bin/env python3
"""Writes the goldens of adapters that are more than LoRA on linear layers: DoRA, modules trained in
full, LoRA on embedding and output layer.

The base models are those of make_goldens.py, which has to have run before. For each case, under
OUTPUT/<case>/:

    case.json               the base's family, PEFT's settings, losses, and how far f32 is from f64
    adapter/                the adapter as PEFT saves it, with random values
    golden.safetensors      answers to the micro-batch of the family's golden.json:
        logits.<row>, grad.<PEFT file name>     as in make_goldens.py
        merged.<tensor>                         tensors of the merged model that differ from the base
        dropout.grad.<PEFT file name>           (some cases) gradients with dropout, whose mask is drawn
                                                as finetune draws it
    curve.json              loss and gradient norm of a few AdamW steps on the family's rows.jsonl

PEFT merges a branch of a tied embedding into the output layer too, so that its merged model is not
the adapter's. There `merged.` is what the adapter computes with, from PEFT's own delta weights.

Same versions (requirements.txt) and same kind of CPU: same bytes.
"""

import argparse
import json
import math
import os
import shutil
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from golden_curves import GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE, train
from golden_experts import peft_file_name, tidy_adapter
from golden_figures import relative_norm, write_json
from golden_float64 import in_float64
from golden_models import load_base
from golden_rows import forward, pad, token_losses, trained_tokens

STEPS = 6
VARIANT = dict(learning_rate=1e-2, weight_decay=0.01, max_grad_norm=0.0, schedule="constant", warmup_steps=0,
               min_lr_ratio=0.0, steps=STEPS)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# llama and qwen2 are tied; llama3 and qwen3 are not. qwen2 has biases.
CASES = {
    "dora": ("llama3", dict(target_modules=ALL, use_dora=True)),
    "dora_biases": ("qwen2", dict(target_modules=["q_proj", "v_proj", "down_proj"], use_dora=True, use_rslora=True,
                                  rank_pattern={"v_proj": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 3})),
    "saved_tied": ("qwen2", dict(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])),
    "saved_embedding_tied": ("llama", dict(target_modules=["v_proj"], modules_to_save=["embed_tokens"])),
    "saved_both": ("llama", dict(target_modules=["q_proj", "o_proj"],
                                 modules_to_save=["embed_tokens", "lm_head", "norm", "k_proj"])),
    "saved_untied": ("qwen3", dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "mlp"])),
    "embedding_tied": ("qwen2", dict(target_modules=["q_proj", "embed_tokens"])),
    "head_tied": ("llama", dict(target_modules=["q_proj", "lm_head"], use_rslora=True, alpha_pattern={"lm_head": 2})),
    "vocabulary_untied": ("llama3", dict(target_modules=["down_proj", "embed_tokens", "lm_head"],
                                         rank_pattern={"lm_head": 3})),
}
SEED = 4711
# Cases that are also differentiated with dropout, with finetune's seed and step.
DROPOUT = dict(probability=0.3, seed=5, step=3)
WITH_DROPOUT = ("dora", "dora_biases", "vocabulary_untied")
# finetune's number for random numbers of dropout.
PURPOSE = 3


def write_adapter(family_directory, directory, settings):
    """PEFT starts B at zero, where a wrong A or scale would not show; so all values are random."""
    torch.manual_seed(SEED)
    base = load_base(family_directory)
    base.name_or_path = ""  # else the adapter would name a path of this machine
    base.config._name_or_path = ""
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if "magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.4))
            elif "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
            elif "lora_A" in name or "embedding_B" in name:
                parameter.normal_(0.0, 0.2)
            else:
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(directory / "adapter")
    tidy_adapter(directory / "adapter")


def load(family_directory, directory, float64=False):
    model = PeftModel.from_pretrained(load_base(family_directory), str(directory / "adapter"), is_trainable=True)
    return in_float64(model) if float64 else model


def parameters(model):
    """Trained parameters by their names in PEFT's files."""
    named = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = peft_file_name(name).replace(".modules_to_save", "").removesuffix(".default")
            named[name.removesuffix(".weight") if "magnitude" in name else name] = parameter
    return named


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011) of tensors of 32-bit numbers held in 64 bits."""
    mask = 0xFFFFFFFF
    counter, key = [c & mask for c in counter], list(key)
    for round in range(10):
        if round:
            key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
        a, b = [counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57]
        counter = [b >> 32 ^ counter[1] ^ key[0], b & mask, a >> 32 ^ counter[3] ^ key[1], a & mask]
    return counter


class SameDropout(torch.nn.Module):
    """Dropout of a module's input with the mask that finetune draws."""

    def __init__(self, number):
        super().__init__()
        block = philox([DROPOUT["step"], 0, number, PURPOSE], [DROPOUT["seed"], 0])
        self.key = [block[0] ^ block[2], block[1] ^ block[3]]

    def forward(self, x):
        mask = [[self.of_token(row, position, x.shape[2]) for position in range(x.shape[1])]
                for row in range(x.shape[0])]
        return x * torch.tensor(mask, dtype=x.dtype)

    def of_token(self, row, position, width):
        words = [word for n in range(-(-width // 4)) for word in philox([n, position, row, 0], self.key)]
        factor = torch.tensor(1.0) / (1.0 - torch.tensor(DROPOUT["probability"]))
        return [0.0 if (word >> 8) / 2**24 < DROPOUT["probability"] else factor.item() for word in words[:width]]


def with_dropout(model):
    """The same model with dropout. Modules are numbered in model order, the output layer last."""
    base = model.get_base_model()
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj"]
    names = [f"model.layers.{n}.{part}" for n in range(base.config.num_hidden_layers) for part in parts] + ["lm_head"]
    for number, name in enumerate(names):
        module = base.get_submodule(name)
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = SameDropout(number)
    return model.train()


def answers(model, batch):
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    logits = forward(model, batch)
    losses = token_losses(logits, batch["labels"])
    (losses.sum() / losses.numel()).backward()
    tensors = {f"logits.{i}": logits[i, :n].detach().clone() for i, n in enumerate(lengths)}
    for name, parameter in parameters(model).items():
        tensors[f"grad.{name}"] = parameter.grad.clone()
    return tensors, losses.double().sum().item()


def merged(family_directory, directory):
    """Tensors of the merged model that are not the base's."""
    base = load_base(family_directory).state_dict()
    model = load(family_directory, directory)
    tied = model.get_base_model().config.tie_word_embeddings
    deltas = {}
    for name, module in model.get_base_model().named_modules():
        if name in ("model.embed_tokens", "lm_head") and hasattr(module, "get_delta_weight"):
            deltas[f"{name}.weight"] = module.get_delta_weight("default").detach().clone()
    state = {name: tensor.clone() for name, tensor in model.merge_and_unload().state_dict().items()}
    if tied and deltas:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = base[name] + deltas.get(name, 0)
    return {name: tensor.contiguous() for name, tensor in state.items() if not torch.equal(tensor, base[name])}


def write_case(name, output):
    family, settings = CASES[name]
    family_directory, directory = output.parent / "models" / family, output / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_adapter(family_directory, directory, settings)
    batch = pad(json.loads((family_directory / "golden.json").read_text())["rows"])
    rows = [json.loads(line) for line in (family_directory / "rows.jsonl").read_text().splitlines()]

    tensors, loss = answers(load(family_directory, directory), batch)
    exact, exact_loss = answers(load(family_directory, directory, float64=True), batch)
    gradients = {k: (t, exact[k]) for k, t in tensors.items() if k.startswith("grad.")}
    assert all(a.abs().max() > 0 for a, _ in gradients.values()), "a gradient is zero: the golden would not test it"
    changed = merged(family_directory, directory)
    tensors |= {f"merged.{key}": tensor for key, tensor in changed.items()}

    dropout = None
    if name in WITH_DROPOUT:
        found, dropped = answers(with_dropout(load(family_directory, directory)), batch)
        tensors |= {f"dropout.{key}": tensor for key, tensor in found.items() if key.startswith("grad.")}
        dropout = {**DROPOUT, "loss_sum": dropped}

    results = []
    for float64 in (False, True):
        model = load(family_directory, directory, float64)
        results.append(train(model, list(parameters(model).values()), rows, VARIANT))
    reports, exact_reports = results
    noise = {
        "logits_max_abs": max((t.double() - exact[k]).abs().max().item() for k, t in tensors.items()
                              if k.startswith("logits.")),
        "loss_sum_relative": abs(loss / exact_loss - 1),
        "gradients_worst_relative_norm": max(relative_norm([pair]) for pair in gradients.values()),
        "curve_loss_relative": max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(reports, exact_reports)),
        "curve_grad_norm_relative": max(abs(a["grad_norm"] / b["grad_norm"] - 1)
                                        for a, b in zip(reports, exact_reports)),
    }
    save_file({k: t.contiguous() for k, t in tensors.items()}, directory / "golden.safetensors")
    write_json(directory / "case.json", {
        "family": family, "settings": settings, "trained_tokens": trained_tokens(
            json.loads((family_directory / "golden.json").read_text())["rows"]),
        "loss_sum": loss, "changed": sorted(changed), "dropout": dropout, "noise": noise,
    })
    write_json(directory / "curve.json", {
        **VARIANT, "global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": MICRO_BATCH_SIZE,
        "noise": {"loss_relative": noise["curve_loss_relative"],
                  "grad_norm_relative": noise["curve_grad_norm_relative"]},
        "curve": reports,
    })
    figures = ", ".join(f"{key} {value:.1e}" for key, value in noise.items())
    print(f"{name} ({family}): loss {reports[0]['loss']:.4f} -> {reports[-1]['loss']:.4f}; {figures}")
    assert math.isfinite(reports[-1]["loss"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "adapters"
    parser.add_argument("--output", type=Path, default=default, help="default: tests/goldens/adapters")
    parser.add_argument("--case", choices=list(CASES), action="append", help="only this one; default: all")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # PEFT's about tied layers and saved embeddings

    for name in arguments.case or CASES:
        write_case(name, arguments.output)
    size = sum(path.stat().st_size for path in arguments.output.rglob("*") if path.is_file())
    print(f"{size / 1e6:.2f} MB in {arguments.output}")
    if size > 2_000_000:
        sys.exit("the goldens are larger than 2 MB")


if __name__ == "__main__":
    main()
