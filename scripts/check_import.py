#!/usr/bin/env python3
"""Compares what `finetune import` makes of published configurations with what each tool makes of them.

    python3 scripts/check_import.py            # needs PyYAML

crates/import/tests/expected.txt is the table of the values that our importer reads, written by the tests of
finetune-import. This script shares no code with the importer: it reads the same YAML files with PyYAML and computes
each value from the tool's own rules and defaults. A value that has no counterpart here (another optimizer's curve,
half an epoch) is skipped, and counted.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent / "crates/import/tests"
SKIP = object()  # no counterpart: any value of ours is a placeholder, which the recipe says


class Loader(yaml.SafeLoader):
    """As mlx-lm and OmegaConf read numbers: 1e-5 is one."""


FLOAT = re.compile(r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9_]+)$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def interpolate(value, root):
    """OmegaConf's ${key} for scalars."""
    if isinstance(value, dict):
        return {key: interpolate(item, root) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolate(item, root) for item in value]
    while isinstance(value, str) and (found := re.fullmatch(r"\$\{(\w+)\}", value)):
        value = root.get(found[1])
    return value


def number(value):
    return None if value is None else float(value)



def warmup(steps, ratio, zero_counts):
    """(warmup_steps, warmup_ratio) as transformers takes them."""
    if steps is not None and (float(steps) > 0 or zero_counts or ratio is None):
        steps = float(steps)
        return (None, steps) if 0 < steps < 1 else (int(steps), None)
    return (None, float(ratio)) if ratio is not None else (0, None)


def schedule(name, out, kwargs, rate):
    """transformers' get_scheduler."""
    if name in ("cosine", "linear", "constant"):
        out["schedule.name"] = name
    elif name == "constant_with_warmup":
        out["schedule.name"] = "constant"
    elif name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        out["schedule.name"] = "cosine"
        if "min_lr_rate" in kwargs:
            out["schedule.min_lr_ratio"] = float(kwargs["min_lr_rate"])
        elif "min_lr" in kwargs:
            out["schedule.min_lr_ratio"] = float(kwargs["min_lr"]) / rate
    else:
        out["schedule.name"] = SKIP


def trainer(c, out):
    """What transformers' TrainingArguments say in both tools."""
    beta1, beta2 = c.get("adam_beta1"), c.get("adam_beta2")
    out["optimizer.betas"] = [0.9 if beta1 is None else float(beta1), 0.999 if beta2 is None else float(beta2)]
    out["optimizer.eps"] = 1e-8 if c.get("adam_epsilon") is None else float(c["adam_epsilon"])
    out["optimizer.weight_decay"] = float(c.get("weight_decay") or 0)
    out["train.max_grad_norm"] = 1.0 if c.get("max_grad_norm") is None else float(c["max_grad_norm"])
    out["seed"] = 42 if c.get("seed") is None else c["seed"]


def length(c, epochs, default, out):
    steps, count = c.get("max_steps"), c.get(epochs)
    if steps and steps > 0:
        out["train.max_steps"], out["train.epochs"] = int(steps), None
    else:
        count = default if count is None else float(count)
        out["train.max_steps"], out["train.epochs"] = None, (int(count) if count == int(count) and count > 0 else SKIP)


def strip_heads(names):
    return [name for name in names if name.rsplit(".")[-1] not in ("lm_head", "embed_tokens", "wte", "wpe", "embed_out")]


def axolotl(text):
    c = yaml.safe_load(text)
    out = {}
    trainer(c, out)
    out["train.method"] = "lora" if c.get("adapter") in ("lora", "qlora") else "full" if not c.get("adapter") else SKIP
    full = out["train.method"] == "full"
    out["model.quantization"] = (
        None if full else "nf4" if c.get("load_in_4bit") else "int8" if c.get("load_in_8bit") else None
    )
    bf16, fp16 = c.get("bf16") or c.get("bfloat16"), c.get("fp16") or c.get("float16")
    # f16 beside a GPU that decides about bf16: axolotl takes f16.
    out["model.dtype"] = "bf16" if bf16 in (True, "full") else "f16" if fp16 else "auto"
    if not full:
        out["lora.rank"] = SKIP if c.get("lora_r") is None else int(c["lora_r"])
        out["lora.alpha"] = SKIP if c.get("lora_alpha") is None else float(c["lora_alpha"])
        out["lora.dropout"] = float(c.get("lora_dropout") or 0)
        out["lora.use_rslora"] = bool(c.get("peft_use_rslora"))
        out["lora.use_dora"] = bool(c.get("peft_use_dora"))
        out["lora.modules_to_save"] = c.get("lora_modules_to_save") or []
        out["lora.layers_to_transform"] = c.get("peft_layers_to_transform")
        targets = c.get("lora_target_modules")
        if c.get("lora_target_linear"):
            out["lora.target_modules"] = "all-linear"
        elif isinstance(targets, list):
            out["lora.target_modules"] = strip_heads(targets)
        else:
            out["lora.target_modules"] = targets or SKIP
    out["data.max_seq_len"] = c.get("sequence_len", 512)
    out["data.overlong"] = {"raise": "error"}.get(c.get("excess_length_strategy"), c.get("excess_length_strategy") or "drop")
    out["data.packing"] = bool(c.get("sample_packing"))
    out["data.train_on"] = "all" if c.get("train_on_inputs") else "assistant"
    out["data.shuffle"] = True if c.get("shuffle_merged_datasets") is None else c["shuffle_merged_datasets"]
    length(c, "num_epochs", 1, out)
    micro = c.get("micro_batch_size") or 1
    accumulation = c.get("gradient_accumulation_steps") or (c["batch_size"] // micro if c.get("batch_size") else 1)
    out["train.micro_batch_size"], out["train.global_batch_size"] = micro, micro * accumulation
    out["train.gradient_checkpointing"] = bool(c.get("gradient_checkpointing"))
    rate = float(c["learning_rate"])
    out["optimizer.learning_rate"] = rate
    name = c.get("lr_scheduler") or "cosine"
    schedule(name, out, c.get("lr_scheduler_kwargs") or {}, rate)
    out.setdefault("schedule.min_lr_ratio", float(c.get("cosine_min_lr_ratio") or 0) if name == "cosine" else 0.0)
    steps, ratio = c.get("warmup_steps"), c.get("warmup_ratio")
    if name == "constant":
        out["schedule.warmup_steps"], out["schedule.warmup_ratio"] = 0, None
    elif steps is None and ratio is None:
        out["schedule.warmup_steps"], out["schedule.warmup_ratio"] = None, 0.03
    elif steps == 1:
        out["schedule.warmup_steps"], out["schedule.warmup_ratio"] = 2, None
    else:
        out["schedule.warmup_steps"], out["schedule.warmup_ratio"] = warmup(steps, ratio, True)
    return out


def llama_factory(text):
    c = yaml.load(text, Loader)
    c = interpolate(c, c)
    out = {}
    trainer(c, out)
    kind = c.get("finetuning_type", "lora")
    out["train.method"] = kind if kind in ("lora", "full") else SKIP
    out["model.dtype"] = "bf16" if c.get("bf16") or c.get("pure_bf16") else "f16" if c.get("fp16") else "auto"
    if kind != "full":
        rank = c.get("lora_rank", 8)
        out["lora.rank"] = rank
        out["lora.alpha"] = float(c.get("lora_alpha") or 2 * rank)
        out["lora.dropout"] = float(c.get("lora_dropout") or 0)
        out["lora.use_rslora"], out["lora.use_dora"] = bool(c.get("use_rslora")), bool(c.get("use_dora"))
        target = c.get("lora_target", "all")
        out["lora.target_modules"] = "all-linear" if target == "all" else [part.strip() for part in target.split(",")]
        bits = c.get("quantization_bit")
        if c.get("quantization_method", "bnb") not in ("bnb", "bitsandbytes"):
            bits = None
        out["model.quantization"] = {4: "nf4", 8: "int8", None: None}.get(bits, SKIP)
    out["data.max_seq_len"] = c.get("cutoff_len", 2048)
    out["data.overlong"] = "truncate"
    packing = c.get("packing")
    out["data.packing"] = bool(c.get("neat_packing")) or (c.get("stage") == "pt" if packing is None else packing)
    out["data.train_on"] = "all" if c.get("train_on_prompt") else "last" if c.get("mask_history") else "assistant"
    out["data.shuffle"] = not c.get("disable_shuffling")
    length(c, "num_train_epochs", 3, out)
    micro = c.get("per_device_train_batch_size", 8)
    out["train.micro_batch_size"] = micro
    out["train.global_batch_size"] = micro * c.get("gradient_accumulation_steps", 1)
    out["train.gradient_checkpointing"] = not c.get("disable_gradient_checkpointing")
    rate = float(c.get("learning_rate", 5e-5))
    out["optimizer.learning_rate"] = rate
    name = c.get("lr_scheduler_type", "linear")
    schedule(name, out, c.get("lr_scheduler_kwargs") or {}, rate)
    out.setdefault("schedule.min_lr_ratio", 0.0)
    steps, ratio = warmup(c.get("warmup_steps"), c.get("warmup_ratio"), False)
    if name == "constant":
        steps, ratio = 0, None
    out["schedule.warmup_steps"], out["schedule.warmup_ratio"] = steps, ratio
    return out


def torchtune(text):
    c = yaml.load(text, Loader)
    c = interpolate(c, c)
    model, out = c.get("model") or {}, {}
    name = model.get("_component_", "").rsplit(".")[-1]
    lora = name.startswith(("lora_", "qlora_")) or "lora_rank" in model
    out["train.method"] = ("lora" if lora else "full") if model else SKIP
    out["seed"] = 42 if c.get("seed") is None else c["seed"]
    out["model.dtype"] = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}[c["dtype"]]
    if lora:
        out["lora.rank"] = model.get("lora_rank", 8)
        out["lora.alpha"] = float(model.get("lora_alpha", 16))
        out["lora.dropout"] = float(model.get("lora_dropout", 0))
        out["lora.use_dora"] = bool(model.get("use_dora"))
        out["model.quantization"] = "nf4" if name.startswith("qlora_") or model.get("quantize_base") else None
        ours = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
        targets = [ours[key] for key in model["lora_attn_modules"]]
        if model.get("apply_lora_to_mlp"):
            targets += ["gate_proj", "up_proj", "down_proj"]
        if "phi" in name:
            fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
            targets = list(dict.fromkeys(fused.get(key, key) for key in targets))
        out["lora.target_modules"] = targets
    most = (c.get("tokenizer") or {}).get("max_seq_len")
    out["data.max_seq_len"] = SKIP if most is None else most
    out["data.overlong"] = SKIP if most is None else "truncate"
    dataset = c["dataset"] if isinstance(c["dataset"], dict) else {}
    out["data.packing"] = bool(dataset.get("packed"))
    kind = dataset.get("_component_", "").rsplit(".")[-1]
    on_input = dataset.get("train_on_input", kind in ("alpaca_dataset", "alpaca_cleaned_dataset"))
    text_only = kind in ("text_completion_dataset", "wikitext_dataset")
    out["data.train_on"] = "all" if on_input or text_only else "assistant"
    out["data.shuffle"] = bool(c.get("shuffle"))
    epochs, most = c.get("epochs") or 1, c.get("max_steps_per_epoch")
    out["train.epochs"], out["train.max_steps"] = (None, epochs * most) if most else (epochs, None)
    rows = c.get("batch_size") or 1
    out["train.micro_batch_size"] = rows
    out["train.global_batch_size"] = rows * (c.get("gradient_accumulation_steps") or 1)
    norm = c.get("clip_grad_norm")
    out["train.max_grad_norm"] = 0.0 if norm in (None, "inf") else float(norm)
    out["train.gradient_checkpointing"] = bool(c.get("enable_activation_checkpointing"))
    optimizer = c["optimizer"]
    out["optimizer.learning_rate"] = float(optimizer.get("lr", 1e-3))
    out["optimizer.weight_decay"] = float(optimizer.get("weight_decay", 0.01)) if "AdamW" in optimizer["_component_"] else SKIP
    out["optimizer.betas"] = list(optimizer.get("betas", [0.9, 0.999]))
    out["optimizer.eps"] = float(optimizer.get("eps", 1e-8))
    curve = c.get("lr_scheduler")
    out["schedule.name"] = "constant" if not curve else "cosine" if curve["_component_"].endswith("get_cosine_schedule_with_warmup") else SKIP
    out["schedule.warmup_steps"] = curve.get("num_warmup_steps", 0) if curve else 0
    out["schedule.min_lr_ratio"] = 0.0
    return out


def mlx_lm(text):
    c, out = yaml.load(text, Loader), {}
    defaults = {
        "fine_tune_type": "lora", "optimizer": "adam", "seed": 0, "batch_size": 4, "iters": 1000,
        "learning_rate": 1e-5, "max_seq_length": 2048, "grad_checkpoint": False, "grad_accumulation_steps": 1,
        "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0}, "mask_prompt": False, "optimizer_config": {},
    }
    for key, value in defaults.items():
        if c.get(key) is None:
            c[key] = value
    out["seed"] = c["seed"]
    kind = c["fine_tune_type"]
    out["train.method"] = "full" if kind == "full" else "lora"
    if kind != "full":
        lora = c["lora_parameters"]
        out["lora.rank"] = lora.get("rank", SKIP)
        has = "rank" in lora and "scale" in lora
        out["lora.alpha"] = float(lora["scale"]) * lora["rank"] if has else SKIP
        out["lora.dropout"] = float(lora.get("dropout", 0.0))
        out["lora.use_dora"] = kind == "dora"
        out["lora.target_modules"] = lora.get("keys") or "all-linear"
    out["data.max_seq_len"], out["data.overlong"] = c["max_seq_length"], "truncate"
    out["data.train_on"] = "last" if c["mask_prompt"] else "all"
    accumulation = c["grad_accumulation_steps"]
    out["train.max_steps"], out["train.epochs"] = max(c["iters"] // accumulation, 1), None
    out["train.micro_batch_size"] = c["batch_size"]
    out["train.global_batch_size"] = c["batch_size"] * accumulation
    out["train.gradient_checkpointing"] = c["grad_checkpoint"]
    out["train.max_grad_norm"] = 0.0
    name = c["optimizer"].lower()
    settings = c["optimizer_config"].get(name) or {}
    known = name in ("adam", "adamw")
    out["optimizer.weight_decay"] = SKIP if not known else 0.0 if name == "adam" else float(settings.get("weight_decay", 0.01))
    out["optimizer.betas"] = list(settings.get("betas", [0.9, 0.999])) if known else SKIP
    out["optimizer.eps"] = float(settings.get("eps", 1e-8)) if known else SKIP
    curve = c.get("lr_schedule")
    if not curve:
        out["optimizer.learning_rate"], out["schedule.name"] = float(c["learning_rate"]), "constant"
        out["schedule.warmup_steps"] = 0
        return out
    arguments = curve["arguments"]
    out["optimizer.learning_rate"] = float(arguments[0])
    out["schedule.warmup_steps"] = curve.get("warmup", 0)
    if curve["name"] == "cosine_decay":
        out["schedule.name"] = "cosine"
        out["schedule.min_lr_ratio"] = (arguments[2] if len(arguments) > 2 else 0.0) / arguments[0]
    elif curve["name"] == "linear_schedule" and arguments[1] <= arguments[0]:
        out["schedule.name"], out["schedule.min_lr_ratio"] = "linear", arguments[1] / arguments[0]
    else:
        out["schedule.name"] = SKIP
    return out


TOOLS = {"axolotl": axolotl, "llama-factory": llama_factory, "torchtune": torchtune, "mlx-lm": mlx_lm}


def table():
    """{file: {key: value}} of our importer."""
    files, values = {}, None
    for line in (ROOT / "expected.txt").read_text().splitlines():
        if not line.startswith(" "):
            values = files.setdefault(line, {})
            continue
        key, value = line.strip().split(" = ", 1)
        values[key] = json.loads(value)
    return files


def same(ours, theirs):
    if isinstance(ours, (int, float)) and isinstance(theirs, (int, float)) and not isinstance(theirs, bool):
        return abs(float(ours) - float(theirs)) <= 1e-9 * max(1e-30, abs(float(theirs)))
    if isinstance(ours, list) and isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs))
    return ours == theirs


def main():
    files, wrong, compared, skipped = table(), [], Counter(), Counter()
    for file, ours in files.items():
        tool = file.split("/")[0]
        theirs = TOOLS[tool]((ROOT / "configs" / file).read_text())
        for key, value in theirs.items():
            if value is SKIP:
                skipped[tool] += 1
                continue
            compared[tool] += 1
            if not same(ours.get(key), value):
                wrong.append(f"{file}: {key}: ours {ours.get(key)!r}, theirs {value!r}")
    counts = Counter(file.split("/")[0] for file in files)
    for tool in TOOLS:
        print(f"{tool:<14} {counts[tool]:>4} files, {compared[tool]:>5} values compared, {skipped[tool]:>4} without a counterpart")
    print(*wrong, sep="\n")
    if wrong or min(counts[tool] for tool in TOOLS) < 40:
        sys.exit(1)
    print("no wrong value")


if __name__ == "__main__":
    main()
