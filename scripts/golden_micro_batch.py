"""What a golden model answers to one micro-batch: golden.safetensors and golden.json."""

import contextlib
import math

import peft
import torch
import transformers
from safetensors.torch import save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from golden_experts import merged, of_single_experts, without_adapter
from golden_figures import largest_difference, relative_norm, write_json
from golden_float64 import NoFloat32, inverse_frequencies_float64, rotary_layer_types
from golden_models import load_with_adapter, lora_parameters
from golden_rows import forward, mean_loss, pad, token_losses, trained_tokens

GREEDY_PROMPT = (5, 17, 42, 9, 33, 8, 61)


def answers_to_micro_batch(directory, batch, float64):
    model = load_with_adapter(directory, float64)
    lengths = batch["attention_mask"].sum(dim=1).tolist()

    def per_row(prefix, logits):
        return {f"{prefix}.{i}": logits[i, :n].detach().clone() for i, n in enumerate(lengths)}

    with NoFloat32() if float64 else contextlib.nullcontext():
        logits = forward(model, batch)
        losses = token_losses(logits, batch["labels"])
        (losses.sum() / losses.numel()).backward()
        tensors = per_row("logits", logits)
        gradients = {name: parameter.grad.clone() for name, parameter in lora_parameters(model).items()}
        tensors |= {f"grad.{name}": gradient for name, gradient in of_single_experts(gradients, model).items()}
        with torch.no_grad():
            with without_adapter(model):
                base_logits = forward(model, batch)
            base_losses = token_losses(base_logits, batch["labels"])
            tensors |= per_row("base_logits", base_logits)
            tensors |= per_row("merged_logits", forward(merged(model), batch))
    scalars = {
        "trained_tokens": losses.numel(),
        # Token losses in the model's own type, summed in f64.
        "loss_sum": losses.double().sum().item(),
        "loss_sum_f32": losses.float().sum().item(),
        "base_loss_sum": base_losses.double().sum().item(),
    }
    return tensors, scalars


def greedy(model):
    """Twelve tokens after a prompt, each with the highest logit, and how far that is above the next one at least."""
    tokens, margin = list(GREEDY_PROMPT), math.inf
    for _ in range(12):
        with torch.no_grad():
            logits = forward(model, pad([{"input_ids": tokens, "labels": tokens}]))[0, -1]
        best, second = logits.topk(2).values.tolist()
        margin = min(margin, best - second)
        tokens.append(int(logits.argmax()))
    assert margin > 1e-3, "rounding would choose the tokens"
    return {"prompt": list(GREEDY_PROMPT), "tokens": tokens[len(GREEDY_PROMPT):], "margin": margin}


def write_golden(family, directory, micro_batch_rows, rows):
    batch = pad(micro_batch_rows)
    tensors, scalars = answers_to_micro_batch(directory, batch, float64=False)
    exact, exact_scalars = answers_to_micro_batch(directory, batch, float64=True)
    gradients = [(t, exact[k]) for k, t in tensors.items() if k.startswith("grad.")]

    assert all(a.abs().max() > 0 for a, _ in gradients), "a gradient is zero: the golden would not test it"
    effect = largest_difference("logits.", tensors,
                                {k: tensors[f"base_{k}"].double() for k in tensors if k.startswith("logits.")})
    assert effect > 0.1, "the adapter hardly changes the logits"

    model = load_with_adapter(directory)
    with without_adapter(model):
        rows_loss_base = mean_loss(model, rows)
    frequencies = []
    for rotary in model.modules():
        for kind in rotary_layer_types(rotary):
            found = getattr(rotary, "original_inv_freq" if kind is None else f"{kind}_original_inv_freq")
            assert torch.allclose(found.double(), inverse_frequencies_float64(rotary.config, kind), rtol=1e-6, atol=0)
            frequencies.append(found)
    long = {}
    if model.config.model_type == "phi3":
        original = model.config.original_max_position_embeddings
        found, _ = ROPE_INIT_FUNCTIONS["longrope"](model.config, seq_len=original + 1)
        exact_found = inverse_frequencies_float64(model.config, long=True)
        assert torch.allclose(found.double(), exact_found, rtol=1e-6, atol=0)
        long = {"long_inverse_frequencies": found.tolist()}

    golden = {
        "family": family,
        "versions": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__,
                     "peft": peft.__version__},
        "rows": micro_batch_rows,
        "micro_batch": scalars,
        "rows_jsonl": {  # mean token loss over rows.jsonl
            "trained_tokens": trained_tokens(rows),
            "base_loss": rows_loss_base,
            "adapter_loss": mean_loss(model, rows),
            "adapter_loss_f64": mean_loss(load_with_adapter(directory, float64=True), rows),
        },
        "inverse_frequencies": frequencies[0].tolist() if frequencies else [],
        **long,
        "noise": {  # this f32 run against the same in f64
            "logits_max_abs": largest_difference("logits.", tensors, exact),
            "base_logits_max_abs": largest_difference("base_logits.", tensors, exact),
            "merged_logits_max_abs": largest_difference("merged_logits.", tensors, exact),
            "logits_largest": max(t.abs().max().item() for k, t in tensors.items() if k.startswith("logits.")),
            "loss_sum_relative": abs(scalars["loss_sum"] / exact_scalars["loss_sum"] - 1),
            "gradients_relative_norm": relative_norm(gradients),
            "gradients_worst_relative_norm": max(relative_norm([pair]) for pair in gradients),
        },
        "adapter_changes_logits_by": effect,
    }
    if model.peft_config["default"].target_parameters:
        golden["greedy"] = greedy(load_with_adapter(directory))
    save_file({**batch, **{k: t.contiguous() for k, t in tensors.items()}}, directory / "golden.safetensors")
    write_json(directory / "golden.json", golden)
    return golden
