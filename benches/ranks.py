#!/usr/bin/env python3
"""A LoRA step on one rank and on two, one thread each: finetune beside torchrun + DDP over gloo and
mlx.launch's ring.

The step: global batch 4 x 256 tokens (two ranks share the rows), rank 8 on q and v (`qv`) or on all
linear layers (`all`), f32, AdamW. The programs alternate. The table has medians over rounds, CPU
seconds of all ranks together and the largest peak memory of a rank. With --output the same is
written as JSON.

  python3 benches/ranks.py --finetune target/release/finetune --models DIR \
      --torch PYTHON --torch-script torch_lora.py --mlx PYTHON --mlx-script mlx_lora.py --rounds 3

The peers' scripts are those of lora_step.py. Under torchrun and mlx.launch they train on all ranks.
"""
import argparse, json, os, pathlib, statistics, subprocess, sys, tempfile, time

from lora_recipe import tokens_file, write_recipe

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--finetune", required=True)
arguments.add_argument("--models", required=True)
arguments.add_argument("--model", default="bench")
arguments.add_argument("--targets", default="qv all")
arguments.add_argument("--ranks", default="1 2")
arguments.add_argument("--rounds", type=int, default=3)
arguments.add_argument("--steps", type=int, default=6)
for peer in ["torch", "mlx"]:
    arguments.add_argument(f"--{peer}")
    arguments.add_argument(f"--{peer}-script")
arguments.add_argument("--openblas", help="a shared library to preload for mlx: its own wheel's BLAS is far slower")
arguments.add_argument("--output")
options = arguments.parse_args()

environment = dict(os.environ, BENCH_DIR=options.models, HF_HUB_OFFLINE="1", T0=str(time.time()))
for name in ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"]:
    environment[name] = "1"


def run_finetune(targets, ranks, steps, rows):
    """Rows of metrics.jsonl, and the CPU seconds of all processes."""
    with tempfile.TemporaryDirectory() as output:
        model = pathlib.Path(options.models, options.model)
        recipe = write_recipe(output, model, targets, rows, steps)
        line = [options.finetune, "--quiet"]
        line += ["run", str(recipe)] if ranks == 1 else ["launch", "-n", str(ranks), "--", str(recipe)]
        code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2);"
                "u = resource.getrusage(resource.RUSAGE_CHILDREN); print(u.ru_utime + u.ru_stime, u.ru_maxrss // 1024)")
        line = [sys.executable, "-c", code, *line]
        printed = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
        text = pathlib.Path(output, "run", "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()], float(printed[0]), int(printed[1])


def finetune(targets, ranks, rows):
    """Two runs of the whole program, so that start and end cancel in the CPU seconds."""
    _, short, _ = run_finetune(targets, ranks, 1, rows)
    lines, long, peak = run_finetune(targets, ranks, 1 + options.steps, rows)
    lines = lines[1:]
    return {
        "cpu_s_per_step": (long - short) / options.steps,
        "step_ms_median": 1e3 * statistics.median(line["seconds"] for line in lines),
        # What a step takes beyond the slowest rank's own rows: reducing, clipping, updating.
        "besides_ms": 1e3 * statistics.median(
            line["seconds"] - max([rank["seconds"] for rank in line.get("ranks", [])] or [line["seconds"]]) for line in lines),
        "peak_rss_MiB": peak,
    }


def results_of(line, preload=None):
    child = dict(environment, T0=str(time.time()))
    if preload:
        child["LD_PRELOAD"] = preload
    printed = subprocess.run(line, env=child, capture_output=True, text=True)
    # Two ranks can write into one line.
    found = [json.JSONDecoder().raw_decode(text)[0] for text in printed.stdout.split("RESULT ")[1:]]
    if not found:
        sys.exit(f"{line} failed:\n{printed.stdout[-1000:]}\n{printed.stderr[-2000:]}")
    return {
        "cpu_s_per_step": sum(result["cpu_s_per_step"] for result in found),
        "step_ms_median": max(result["step_ms_median"] for result in found),
        "peak_rss_MiB": max(result["peak_rss_MiB"] for result in found),
    }


def torch(targets, ranks):
    script = [options.torch_script, "--model", options.model, "--targets", targets, "--steps", str(options.steps), "--warmup", "1", "--threads", "1"]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return results_of([options.torch, *start, *script])


def mlx(targets, ranks):
    script = [options.mlx_script, "--model", options.model, "--targets", targets, "--steps", str(options.steps), "--warmup", "1"]
    if ranks == 1:
        return results_of([options.mlx, *script], options.openblas)
    launch = str(pathlib.Path(options.mlx).parent / "mlx.launch")
    start = [launch, "-n", str(ranks), "--backend", "ring", "--python", options.mlx]
    for name in ["OPENBLAS_NUM_THREADS", "BENCH_DIR", "HF_HUB_OFFLINE"]:
        start += ["--env", f"{name}={environment[name]}"]
    if options.openblas:
        start += ["--env", f"LD_PRELOAD={options.openblas}"]
    return results_of([*start, *script])


results = {}
with tempfile.TemporaryDirectory() as directory:
    rows = tokens_file(options.models, directory)
    for round_number in range(options.rounds):
        for targets in options.targets.split():
            for ranks in map(int, options.ranks.split()):
                contestants = [("finetune", lambda: finetune(targets, ranks, rows))]
                if options.torch:
                    contestants.append(("torch+peft", lambda: torch(targets, ranks)))
                if options.mlx:
                    contestants.append(("mlx-lm", lambda: mlx(targets, ranks)))
                for name, contestant in contestants:
                    figures = contestant()
                    results.setdefault((targets, name, ranks), []).append(figures)
                    print(f"round {round_number + 1} {targets} {name} {ranks}: {figures}", file=sys.stderr)

table = []
for (targets, name, ranks), rounds in results.items():
    median = lambda key: statistics.median(figures[key] for figures in rounds)
    one = results.get((targets, name, 1))
    alone = statistics.median(figures["step_ms_median"] for figures in one) if one else None
    row = {
        "model": options.model, "targets": targets, "program": name, "ranks": ranks, "rounds": len(rounds),
        "step_ms": round(median("step_ms_median"), 1), "tokens_per_second": round(4 * 256 / median("step_ms_median") * 1e3),
        "cpu_s_per_step": round(median("cpu_s_per_step"), 3), "peak_MiB": round(median("peak_rss_MiB")),
        "efficiency": round(alone / median("step_ms_median") / ranks, 3) if alone else None,
    }
    if name == "finetune" and ranks > 1:
        row["besides_ms"] = round(median("besides_ms"), 1)
    table.append(row)
columns = ["model", "targets", "program", "ranks", "rounds", "step_ms", "tokens_per_second", "cpu_s_per_step", "peak_MiB", "efficiency"]
print(" | ".join(columns))
for row in table:
    print(" | ".join(str(row[key]) for key in columns))
if options.output:
    pathlib.Path(options.output).write_text(json.dumps(table, indent=1) + "\n")
