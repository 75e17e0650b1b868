#!/usr/bin/env python3
"""Peak memory of a run beside what `finetune validate` estimates: the promise is 15 percent.

    python3 benches/memory.py MODEL_DIR [MODEL_DIR ...] [--device cpu|gpu] [--dtype f32|bf16|f16] \\
        [--quick]

A model is a directory with rows-LENGTH.jsonl files, as scripts/random_model.py writes it. For each
model, recipes are validated and run for three steps: several lengths, micro-batches and targets,
with and without gradient checkpointing. Prints a markdown table, and on standard error one JSON
line per run. Needs Python's standard library only.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_bytes(text):
    number, unit = re.fullmatch(r"([\d.]+) (B|KiB|MiB|GiB)", text).groups()
    return float(number) * UNITS[unit]


def recipe(model, rows, args, case, output):
    targets = '"all-linear"' if case["targets"] == "all" else '["q_proj", "v_proj"]'
    return f"""output_dir = "{output}"
[model]
path = "{model}"
device = "{args.device}"
dtype = "{args.dtype}"
[lora]
rank = 16
target_modules = {targets}
[data]
train = "{rows}"
format = "tokens"
max_seq_len = {case["length"]}
[train]
max_steps = 3
global_batch_size = {case["rows"]}
micro_batch_size = {case["rows"]}
gradient_checkpointing = {str(case["checkpointing"]).lower()}
[checkpoint]
every = 0
"""


def measure(args, model, case):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.toml"
        rows = model / f"rows-{case['length']}.jsonl"
        path.write_text(recipe(model.resolve(), rows.resolve(), args, case, Path(folder) / "run"))
        found = subprocess.run([args.finetune, "validate", path, "--json"], capture_output=True, text=True)
        if found.returncode != 0:
            return {**case, "model": model.name, "error": found.stderr.strip().splitlines()[0]}
        estimate = json.loads(found.stdout.splitlines()[-1])["estimate"]
        ended = subprocess.run([args.finetune, "run", path], capture_output=True, text=True, timeout=args.limit)
        if ended.returncode != 0:
            return {**case, "model": model.name, "error": ended.stderr.strip().splitlines()[-1]}
        words = ended.stderr
        peak = re.search(r"peak memory of the GPU ([\d.]+ \w+)", words) or re.search(r"peak memory ([\d.]+ \w+)", words)
        peak = parse_bytes(peak.group(1))
        return {**case, "model": model.name, "estimate": estimate, "peak": peak, "ratio": estimate["total"] / peak}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quick", action="store_true", help="two recipes per model and length")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one run")
    parser.add_argument("--finetune", default=os.environ.get("FINETUNE", "target/release/finetune"))
    args = parser.parse_args()
    print("| model | rows × tokens | targets | checkpointing | estimate MiB | peak MiB | estimate / peak |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    worst = 0.0
    for model in args.models:
        lengths = sorted(int(path.stem.removeprefix("rows-")) for path in model.glob("rows-*.jsonl"))
        for length in lengths:
            for rows in (1, 4):
                for targets in ("qv", "all"):
                    for checkpointing in (False, True):
                        if args.quick and (rows == 1 or targets == "qv"):
                            continue
                        case = {"length": length, "rows": rows, "targets": targets, "checkpointing": checkpointing}
                        got = measure(args, model, case)
                        print(json.dumps(got), file=sys.stderr, flush=True)
                        start = f"| {model.name} | {rows} × {length} | {targets} | {'on' if checkpointing else 'off'} |"
                        if "error" in got:
                            print(f"{start} {got['error']} | | |", flush=True)
                            continue
                        worst = max(worst, abs(got["ratio"] - 1))
                        estimate, peak = got["estimate"]["total"] / (1 << 20), got["peak"] / (1 << 20)
                        print(f"{start} {estimate:.0f} | {peak:.0f} | {got['ratio']:.2f} |", flush=True)
    print(f"\nfurthest from the peak: {100 * worst:.0f} %")


if __name__ == "__main__":
    main()
