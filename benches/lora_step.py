#!/usr/bin/env python3
"""One LoRA training step on the CPU, one thread: finetune beside PyTorch + PEFT and mlx-lm. The
programs alternate in one run.

The step: batch 4 x 256 tokens, rank 8 on q and v (`qv`) or on all linear layers (`all`), f32,
AdamW. Prints a table of medians over rounds and, with --output, writes the same as JSON.

  python3 benches/lora_step.py --finetune target/release/finetune --models DIR \
      --torch PYTHON --torch-script torch_lora.py --mlx PYTHON --mlx-script mlx_lora.py --rounds 5

--models holds Hugging Face model directories (--model names one). The peers' scripts take --model,
--targets, --steps and --warmup, and read BENCH_DIR. They print `RESULT {json}` with cpu_s_per_step,
step_ms_median, peak_rss_MiB and first_step_s. A peer that is not given is left out. CPU seconds of
a finetune step are the difference of two runs of the whole program, so that start and end cancel.
"""
import argparse, json, pathlib, sys, tempfile

from lora_recipe import tokens_file
from lora_runs import Runs, median

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--finetune", required=True)
arguments.add_argument("--models", required=True)
arguments.add_argument("--model", default="bench")
arguments.add_argument("--targets", default="qv all")
arguments.add_argument("--rounds", type=int, default=3)
arguments.add_argument("--steps", type=int, default=5)
arguments.add_argument("--threads", type=int, default=1)
arguments.add_argument("--set", action="append", default=[], help="more --set for finetune")
for peer in ["torch", "mlx"]:
    arguments.add_argument(f"--{peer}")
    arguments.add_argument(f"--{peer}-script")
arguments.add_argument("--openblas", help="a shared library to preload for mlx: its own wheel's BLAS is far slower")
arguments.add_argument("--output")
options = arguments.parse_args()

runs = Runs(options.finetune, options.models, options.steps, options.threads)


def finetune(targets, rows):
    return runs.finetune(options.model, targets, rows, options.set)


def peer(python, script, targets, preload=None):
    return runs.peer(python, script, options.model, targets, preload)


results = {}
with tempfile.TemporaryDirectory() as directory:
    rows = tokens_file(options.models, directory)
    for round_number in range(options.rounds):
        for targets in options.targets.split():
            contestants = [("finetune", lambda: finetune(targets, rows))]
            if options.torch:
                contestants.append(("torch+peft", lambda: peer(options.torch, options.torch_script, targets)))
            if options.mlx:
                contestants.append(("mlx-lm", lambda: peer(options.mlx, options.mlx_script, targets, options.openblas)))
            for name, contestant in contestants:
                figures = contestant()
                results.setdefault((targets, name), []).append(figures)
                print(f"round {round_number + 1} {targets} {name}: {figures['cpu_s_per_step']:.3f} CPU s per step", file=sys.stderr)
    for targets in options.targets.split():
        peak = runs.peak(options.model, targets, rows, options.set)
        for figures in results[(targets, "finetune")]:
            figures["peak_rss_MiB"] = peak

table = []
for (targets, name), rounds in results.items():
    table.append({
        "model": options.model, "targets": targets, "program": name, "threads": options.threads, "rounds": len(rounds),
        "cpu_s_per_step": round(median(rounds, "cpu_s_per_step"), 3), "step_ms": round(median(rounds, "step_ms_median"), 1),
        "tokens_per_second": round(4 * 256 / median(rounds, "step_ms_median") * 1e3), "peak_MiB": round(median(rounds, "peak_rss_MiB")),
        "first_step_s": round(median(rounds, "first_step_s"), 2), "losses": rounds[0].get("losses", [])[:4],
    })
columns = [key for key in table[0] if key != "losses"]
print(" | ".join(columns))
for row in table:
    print(" | ".join(str(row[key]) for key in columns))
if options.output:
    pathlib.Path(options.output).write_text(json.dumps(table, indent=1) + "\n")
