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
import argparse, json, os, pathlib, resource, statistics, subprocess, sys, tempfile, time

from lora_recipe import tokens_file, write_recipe

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

environment = dict(os.environ, BENCH_DIR=options.models, HF_HUB_OFFLINE="1")
for name in ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"]:
    environment[name] = str(options.threads)


def command(output, targets, steps, rows):
    """The command line of a run of `steps` steps. Its recipe is written into `output`."""
    model = pathlib.Path(options.models, options.model)
    recipe = write_recipe(output, model, targets, rows, steps)
    line = [options.finetune, "run", str(recipe), "--quiet"]
    for text in options.set:
        line += ["--set", text]
    return line


def run_finetune(targets, steps, rows):
    """Rows of metrics.jsonl, and seconds from the start to the first of them."""
    with tempfile.TemporaryDirectory() as output:
        start = time.time()
        child = subprocess.Popen(command(output, targets, steps, rows), env=environment)
        metrics = pathlib.Path(output, "run", "metrics.jsonl")
        first = None
        while child.poll() is None:
            if first is None and metrics.exists() and metrics.stat().st_size > 0:
                first = time.time() - start
            time.sleep(0.01)
        if child.returncode != 0:
            sys.exit(f"finetune failed with {child.returncode}")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        return lines, first


def measured(function):
    """CPU seconds of the children that the function waited for, and its result."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = function()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result


def finetune(targets, rows):
    short, _ = measured(lambda: run_finetune(targets, 1, rows))
    long, (lines, first) = measured(lambda: run_finetune(targets, 1 + options.steps, rows))
    seconds = [line["seconds"] for line in lines[1:]]
    return {
        "cpu_s_per_step": (long - short) / options.steps,
        "step_ms_median": 1e3 * statistics.median(seconds),
        "first_step_s": first,
        "losses": [line["loss"] for line in lines[:4]],
    }


def peer(python, script, targets, preload=None):
    child_environment = dict(environment, T0=str(time.time()))
    if preload:
        child_environment["LD_PRELOAD"] = preload
    line = [python, script, "--model", options.model, "--targets", targets, "--steps", str(options.steps), "--warmup", "1"]
    if "torch" in os.path.basename(script):
        line += ["--threads", str(options.threads)]
    printed = subprocess.run(line, env=child_environment, capture_output=True, text=True)
    found = [line for line in printed.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        sys.exit(f"{script} failed:\n{printed.stderr[-2000:]}")
    return json.loads(found[0][7:])


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
    # Peak memory is measured in another run, through a small process that has no other children.
    for targets in options.targets.split():
        code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
                "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)")
        with tempfile.TemporaryDirectory() as output:
            line = [sys.executable, "-c", code, *command(output, targets, 3, rows)]
            peak = int(subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)
            for figures in results[(targets, "finetune")]:
                figures["peak_rss_MiB"] = peak

table = []
for (targets, name), rounds in results.items():
    median = lambda key: statistics.median(figures[key] for figures in rounds if figures.get(key) is not None)
    table.append({
        "model": options.model, "targets": targets, "program": name, "threads": options.threads, "rounds": len(rounds),
        "cpu_s_per_step": round(median("cpu_s_per_step"), 3), "step_ms": round(median("step_ms_median"), 1),
        "tokens_per_second": round(4 * 256 / median("step_ms_median") * 1e3), "peak_MiB": round(median("peak_rss_MiB")),
        "first_step_s": round(median("first_step_s"), 2), "losses": rounds[0].get("losses", [])[:4],
    })
columns = [key for key in table[0] if key != "losses"]
print(" | ".join(columns))
for row in table:
    print(" | ".join(str(row[key]) for key in columns))
if options.output:
    pathlib.Path(options.output).write_text(json.dumps(table, indent=1) + "\n")
