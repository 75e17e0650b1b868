#!/usr/bin/env python3
"""LoRA training steps of PyTorch + PEFT on a GPU, on the model directory and rows of finetune.

    python3 benches/gpu_torch.py --model DIR --rows ROWS.jsonl --batch 4 --dtype bf16 \\
        [--checkpointing] [--compile]
    python3 benches/gpu_torch.py --measure-matmul

It does the same work as finetune: rows {"input_ids", "labels"} in file order, --batch of them a
step; LoRA on all linear layers; sum of the token losses over the trained tokens; AdamW (fused); no
dropout, no clipping, no warm-up of the learning rate. Attention is torch's
scaled_dot_product_attention. f32 products are f32: TF32 is off.

Prints one JSON object on standard output. tokens_per_second and seconds_per_step are medians of the
steps after --warmup; the device is idle before and after each. It also has every step's loss and
seconds, and over the whole program peak_bytes (what tensors took) and peak_reserved_bytes (what the
process held). Like `finetune`, it counts a row's tokens as they stand in the file. Progress goes to
standard error. If memory runs out, it exits with 5. If it is stopped (SIGTERM) after some steps, it
prints the figures of these. scripts/gpu-check runs it beside finetune.

How the adapter is computed in 16 bits (--adapter) changes the time:
  autocast  the adapter is f32, its products are in 16 bits, as in finetune and in transformers'
            Trainer with bf16=True
  f32       the adapter and its products are f32, as in PEFT without autocast: slow, because these
            products do not use the matrix units
  same      the adapter is in 16 bits as well: fastest, and loses small updates

--compile compiles every decoder layer, and the loss, with torch.compile. One layer is compiled, and
the others take its code. --compile=model compiles the model as one piece, which takes minutes for
many layers.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import time

START = time.monotonic()
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here comes from the hub; a lookup would only wait
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--model", metavar="DIR")
arguments.add_argument("--rows", metavar="FILE")
arguments.add_argument("--batch", metavar="ROWS", type=int, default=4)
arguments.add_argument("--steps", metavar="N", type=int, default=12)
arguments.add_argument("--warmup", metavar="N", type=int, default=3, help="first steps that are not counted")
arguments.add_argument("--dtype", choices=["bf16", "f16", "f32"], default="bf16")
arguments.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
arguments.add_argument("--compile", nargs="?", const="layers", choices=["layers", "model"])
arguments.add_argument("--adapter", choices=["autocast", "f32", "same"], default="autocast")
arguments.add_argument("--rank", metavar="N", type=int, default=16)
arguments.add_argument("--alpha", metavar="N", type=float, default=32)
arguments.add_argument("--learning-rate", metavar="RATE", type=float, default=1e-4)
arguments.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try this script")
arguments.add_argument("--measure-matmul", action="store_true", help="the rate of large matrix products, and nothing else")
options = arguments.parse_args()
if not options.measure_matmul and not (options.model and options.rows):
    arguments.error("--model and --rows, or --measure-matmul")
if options.warmup >= options.steps:
    arguments.error("--steps is more than --warmup")

import torch
import torch.nn.functional as F

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
IGNORED = -100

torch.backends.cuda.matmul.allow_tf32 = False


class Stopped(BaseException):
    """SIGTERM, as of a time limit. It is no Exception: torch.compile would take one for its own."""


def stop(*_):
    raise Stopped


def say(text):
    print(text, file=sys.stderr, flush=True)


def synchronize():
    if options.device == "cuda":
        torch.cuda.synchronize()


def measure_matmul():
    """TFLOP/s of square matrix products, by number type: what the card really does at best."""
    size = 8192 if options.device == "cuda" else 512
    rates = {}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(size, size, device=options.device).to(dtype) for _ in range(2))
        out = torch.empty(size, size, device=options.device, dtype=dtype)
        times = []
        for _ in range(13):
            synchronize()
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            synchronize()
            times.append(time.perf_counter() - start)
        rates[name] = round(2 * size**3 / statistics.median(times[3:]) / 1e12, 1)
    return rates


def batches():
    """(input_ids, labels, trained tokens) of each step, in file order. The file is repeated."""
    with open(options.rows) as file:
        rows = [json.loads(line) for line in file if line.strip()]
    for step in range(options.steps):
        chosen = [rows[(step * options.batch + n) % len(rows)] for n in range(options.batch)]
        if len({len(row["input_ids"]) for row in chosen}) != 1:
            sys.exit("gpu_torch: the rows of a step have different lengths; padding would be counted as work")
        labels = [row.get("labels", row["input_ids"]) for row in chosen]
        trained = sum(label != IGNORED for row in labels for label in row[1:])
        yield torch.tensor([row["input_ids"] for row in chosen]), torch.tensor(labels), trained


def load():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = {"dtype": DTYPES[options.dtype], "attn_implementation": "sdpa"}
    with contextlib.suppress(ImportError):
        # With it, tensors go to the device one by one, without a copy of all in memory.
        import accelerate  # noqa: F401

        settings["device_map"] = {"": options.device}
    model = AutoModelForCausalLM.from_pretrained(options.model, **settings).to(options.device)
    model.config.use_cache = False
    lora = LoraConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora, autocast_adapter_dtype=options.adapter != "same")
    model.train()
    if options.checkpointing:
        # This comes after PEFT. Otherwise PEFT makes the embedding's output need a gradient.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def token_losses(logits, labels):
    """Sum over trained tokens. The labels are shifted, as in transformers: no logits are copied."""
    shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].reshape(-1)
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), shifted, ignore_index=IGNORED, reduction="sum")


def loss_function(model):
    losses = token_losses
    if options.compile == "layers":
        for layer in model.get_base_model().model.layers:
            layer.compile(dynamic=False)
        losses = torch.compile(token_losses, dynamic=False)

    def loss(ids, labels):
        return losses(model(input_ids=ids, use_cache=False).logits, labels)

    return torch.compile(loss, dynamic=False) if options.compile == "model" else loss


def train():
    import peft
    import transformers

    model = load()
    synchronize()
    ready = time.monotonic() - START
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.01, fused=options.device == "cuda")
    loss_of = loss_function(model)
    autocast = options.dtype != "f32" and options.adapter == "autocast"
    seconds, losses, tokens, first = [], [], 0, None
    signal.signal(signal.SIGTERM, stop)
    try:
        for ids, labels, trained in batches():
            synchronize()
            start = time.perf_counter()
            ids, labels = ids.to(options.device), labels.to(options.device)
            with torch.autocast(options.device, dtype=DTYPES[options.dtype]) if autocast else contextlib.nullcontext():
                loss = loss_of(ids, labels)
            (loss / trained).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item() / trained)
            synchronize()
            seconds.append(time.perf_counter() - start)
            tokens = ids.numel()
            first = first or time.monotonic() - START
            say(f"step {len(seconds)}/{options.steps}  loss {losses[-1]:.4f}  {seconds[-1]:.3f} s")
    except Stopped:
        say(f"stopped after {len(seconds)} steps")
        if len(seconds) <= options.warmup:
            sys.exit(143)
    counted = seconds[options.warmup:]
    median = statistics.median(counted)
    on_card = options.device == "cuda"
    return {
        "program": "torch+peft" + (", compiled" if options.compile else ""),
        "compile": options.compile,
        "dtype": options.dtype,
        "adapter": options.adapter,
        "checkpointing": options.checkpointing,
        "batch": options.batch,
        "tokens": tokens,
        "steps": len(seconds),
        "trained_parameters": sum(parameter.numel() for parameter in parameters),
        "tokens_per_second": tokens / median,
        "seconds_per_step": median,
        "seconds": seconds,
        "losses": losses,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_card else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if on_card else None,
        "loaded_after": round(ready, 2),
        "first_step_after": round(first, 2),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"] if options.compile else None,
        "device": torch.cuda.get_device_name() if on_card else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }


if options.device == "cuda" and not torch.cuda.is_available():
    sys.exit(f"gpu_torch: torch {torch.__version__} finds no GPU here")
try:
    if options.measure_matmul:
        card = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
        result = {"device": card, "torch": torch.__version__, "tflops": measure_matmul()}
    else:
        result = train()
except torch.OutOfMemoryError as error:
    say(f"gpu_torch: out of memory: {error}")
    sys.exit(5)
print(json.dumps(result), flush=True)
