"""Short training runs of a golden model: curves.json, and router_loss.json with the auxiliary loss of routers."""

import copy
import math

import torch
from safetensors.torch import load_file, save_file

from golden_experts import of_single_experts
from golden_figures import relative_norm, write_json
from golden_float64 import operations_of
from golden_models import load_base, load_with_adapter, lora_parameters
from golden_rows import forward, pad, token_losses, trained_tokens

GLOBAL_BATCH_SIZE = 4
MICRO_BATCH_SIZE = 2
STEPS = 20
FULL_STEPS = 10
VARIANTS = {
    "constant": dict(learning_rate=1e-2, weight_decay=0.01, max_grad_norm=0.0, schedule="constant",
                     warmup_steps=0, min_lr_ratio=0.0, steps=STEPS),
    "clip_cosine": dict(learning_rate=1e-2, weight_decay=0.01, max_grad_norm=0.1, schedule="cosine",
                        warmup_steps=4, min_lr_ratio=0.1, steps=STEPS),
    "linear": dict(learning_rate=1e-2, weight_decay=0.01, max_grad_norm=0.0, schedule="linear",
                   warmup_steps=5, min_lr_ratio=0.0, steps=STEPS),
}
FULL_VARIANT = dict(learning_rate=1e-3, weight_decay=0.01, max_grad_norm=0.0, schedule="constant",
                    warmup_steps=0, min_lr_ratio=0.0, steps=FULL_STEPS)


def learning_rate_factor(step, variant):
    """transformers' get_linear_ and get_cosine_schedule_with_warmup, with a floor.

    `step` counts from 0. So the first step of a run with warm-up has learning rate 0, and the last
    one is still above the floor.
    """
    warmup, total, floor = variant["warmup_steps"], variant["steps"], variant["min_lr_ratio"]
    if step < warmup:
        return step / max(1, warmup)
    if variant["schedule"] == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if variant["schedule"] == "cosine" else 1 - progress
    return floor + (1 - floor) * shape


def backward_of_step(model, rows):
    """Adds the gradient of the mean loss of these rows, and returns the sum of their token losses."""
    tokens = trained_tokens(rows)
    loss_sum = 0.0
    for start in range(0, GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE):
        batch = pad(rows[start:start + MICRO_BATCH_SIZE])
        losses = token_losses(forward(model, batch), batch["labels"])
        (losses.sum() / tokens).backward()  # all tokens of the step, not of the micro-batch
        loss_sum += losses.detach().double().sum().item()
    return loss_sum, {}


def train(model, parameters, rows, variant, backward=backward_of_step):
    """The simplest training loop; returns the report of each step."""
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=variant["learning_rate"], betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=variant["weight_decay"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, variant))
    reports = []
    for step in range(variant["steps"]):
        first = step * GLOBAL_BATCH_SIZE % len(rows)
        step_rows = rows[first:first + GLOBAL_BATCH_SIZE]
        tokens = trained_tokens(step_rows)
        loss_sum, more = backward(model, step_rows)
        # Returns the norm before clipping, and scales by max / (norm + 1e-6) where that is below 1.
        gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, variant["max_grad_norm"] or math.inf)
        reports.append({"step": step + 1, "loss": loss_sum / tokens, "grad_norm": gradient_norm.item(),
                        "learning_rate": scheduler.get_last_lr()[0], "trained_tokens": tokens, **more})
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return reports


def curve(variant, reports, exact_reports):
    def noise(key):
        return max(abs(a[key] / b[key] - 1) for a, b in zip(reports, exact_reports))

    return {**variant, "noise": {"loss_relative": noise("loss"), "grad_norm_relative": noise("grad_norm")},
            "curve": reports}


def write_curves(directory, rows, full):
    curves = {}
    for name, variant in VARIANTS.items():
        results = []
        for float64 in (False, True):
            model = load_with_adapter(directory, float64)
            parameters = lora_parameters(model)
            results.append((train(model, list(parameters.values()), rows, variant), parameters))
        (reports, final), (exact_reports, exact_final) = results
        curves[name] = curve(variant, reports, exact_reports)
        curves[name]["noise"]["final_relative_norm"] = relative_norm(
            [(final[k].detach(), exact_final[k].detach()) for k in final])
        if name == "clip_cosine":
            save_file({k: p.detach().contiguous() for k, p in final.items()}, directory / f"final_{name}.safetensors")
    if full:
        results, first_norms = [], {}
        for float64 in (False, True):
            model = load_base(directory, float64)
            if not float64:
                first_norms = first_gradient_norms(copy.deepcopy(model), rows)
            results.append(train(model, list(model.parameters()), rows, FULL_VARIANT))
        curves["full"] = curve(FULL_VARIANT, *results)
        curves["full"]["first_gradient_norms"] = first_norms
    document = {
        "global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": MICRO_BATCH_SIZE,
        "optimizer": {"name": "adamw", "betas": [0.9, 0.999], "eps": 1e-8},
        "variants": curves,
    }
    write_json(directory / "curves.json", document)
    return document


def first_gradient_norms(model, rows):
    """Gradient norm of each parameter in step 1: says which one is wrong when the total is."""
    step_rows = rows[:GLOBAL_BATCH_SIZE]
    batch = pad(step_rows)
    (token_losses(forward(model, batch), batch["labels"]).sum() / trained_tokens(step_rows)).backward()
    found = model.named_parameters()  # a vision tower has no gradients
    return {name.replace("model.language_model.", "model."): parameter.grad.norm().item()
            for name, parameter in found if parameter.grad is not None}


# --- the auxiliary loss of routers ----------------------------------------------------------------
#
# Each row alone, as transformers computes it with a batch of that row. Rows are weighted by their trained
# tokens, as token losses are.

ROUTER_LOSS_COEFFICIENT = 0.1
ROUTER_LOSS_VARIANT = dict(VARIANTS["constant"], steps=10)


def backward_with_router_loss(model, rows):
    """Adds the gradient of the mean loss of these rows with the auxiliary loss. Returns the sum of their token
    losses, and the mean of the auxiliary losses without the coefficient."""
    inner = model.get_base_model()
    inner.router_aux_loss_coef = ROUTER_LOSS_COEFFICIENT
    tokens, loss_sum, router_loss = trained_tokens(rows), 0.0, 0.0
    for row in rows:
        batch, own = pad([row]), trained_tokens([row])
        with operations_of(model):
            found = model(**batch, use_cache=False, output_router_logits=True)
        (found.loss * (own / tokens)).backward()
        alone = found.aux_loss.double().item()
        loss_sum += (found.loss.double().item() - ROUTER_LOSS_COEFFICIENT * alone) * own
        router_loss += alone * own / tokens
    return loss_sum, {"router_aux_loss": router_loss}


def write_router_loss(directory, micro_batch_rows, rows):
    of_types = []
    for float64 in (False, True):
        model = load_with_adapter(directory, float64)
        loss_sum, more = backward_with_router_loss(model, micro_batch_rows)
        gradients = {name: parameter.grad.clone() for name, parameter in lora_parameters(model).items()}
        of_types.append((loss_sum, more["router_aux_loss"], of_single_experts(gradients, model)))
    (loss_sum, router_loss, gradients), (exact_sum, exact_loss, exact) = of_types
    without = load_file(directory / "golden.safetensors")
    effect = relative_norm([(gradient, without[f"grad.{name}"].double()) for name, gradient in gradients.items()])
    assert effect > 1e-2, "the auxiliary loss hardly changes the gradients"
    results = []
    for float64 in (False, True):
        model = load_with_adapter(directory, float64)
        results.append(train(model, list(lora_parameters(model).values()), rows, ROUTER_LOSS_VARIANT,
                             backward_with_router_loss))
    document = {
        "coefficient": ROUTER_LOSS_COEFFICIENT,
        "micro_batch": {"loss_sum": loss_sum, "router_aux_loss": router_loss},
        "changes_gradients_by": effect,
        "noise": {
            "loss_sum_relative": abs(loss_sum / exact_sum - 1),
            "router_aux_loss_relative": abs(router_loss / exact_loss - 1),
            "gradients_worst_relative_norm": max(relative_norm([(gradients[name], exact[name])]) for name in gradients),
        },
        "global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": MICRO_BATCH_SIZE,
        "variant": curve(ROUTER_LOSS_VARIANT, *results),
    }
    save_file({f"grad.{name}": gradient.contiguous() for name, gradient in gradients.items()},
              directory / "router_loss.safetensors")
    write_json(directory / "router_loss.json", document)
    return document
