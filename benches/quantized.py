#!/usr/bin/env python3
"""One LoRA training step over packed bases on the CPU: finetune over mlx4, mlx8, nf4 and int8 beside its own
steps over the same base in 16 and 32 bits, PyTorch + PEFT in f32 and bf16, transformers with
bitsandbytes + PEFT, and mlx-lm's QLoRA. The programs alternate in one run.

  python3 benches/quantized.py --finetune target/release/finetune --models DIR --python PYTHON \
      --torch-script torch_lora.py --mlx-script mlx_lora.py --rounds 3 --output quantized.json

The step is that of lora_step.py: batch 4 x 256 tokens, rank 8 on q and v (`qv`) or on all linear
layers (`all`), AdamW. --models is a folder of Hugging Face directories; --model names one of them, by
default `bench` (32M), which scripts/random_model.py makes if it is not there. Its other forms are
made beside it: NAME-f32 and NAME-bf16 by PYTHON (with torch and safetensors), NAME-mlx4 and the others by
`finetune quantize`. mlx-lm and bitsandbytes load these directories.

Prints two tables. The first has medians over rounds: CPU seconds of a step, peak memory, seconds from
the start of the program to its first step. The second has ratios, each with its target:

  packed     a step over a packed base against one over the bf16 base, both with f32 products
  memory     peak over the packed base against the bf16 base's peak, less its weights, plus the packed ones
  f32, bf16  finetune against torch + PEFT in the same type of products
  peers      finetune over a packed base against the program that owns the format

mlx-lm multiplies packed weights on a CPU without vector instructions and in one thread, whatever its BLAS
is: its step takes minutes. So it makes one step, in the first round only. The peers' scripts are described
in lora_step.py. A peer whose script is not given is left out.
"""
import argparse, datetime, json, pathlib, subprocess, sys, tempfile

from lora_recipe import tokens_file
from lora_runs import Runs, median, processor

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKED = ["mlx4", "mlx8", "nf4", "int8"]
BENCH = ["--hidden-size", "512", "--intermediate-size", "1408", "--num-hidden-layers", "8", "--num-attention-heads", "8",
         "--num-key-value-heads", "4", "--head-dim", "64", "--vocab-size", "8192", "--no-tie-word-embeddings"]
# The base's form, and settings. Without `dtype` a CPU holds a base as its files have it, and multiplies in f32.
OURS = {"f32": ("f32", []), "bf16 base": ("bf16", []), "bf16": ("bf16", ["model.dtype=bf16"]),
        **{name: (name, []) for name in PACKED}}
TARGETS = {"packed": 1.05, "memory": 1.0, "f32": 0.7, "bf16": 0.8, "peers": 1.0}

CAST = """
import pathlib, shutil, sys, torch
from safetensors.torch import load_file, save_file
source, output, dtype = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), getattr(torch, sys.argv[3])
output.mkdir()
for path in source.iterdir():
    if path.suffix == ".safetensors":
        tensors = {name: tensor.to(torch.bfloat16).to(dtype) for name, tensor in load_file(path).items()}
        save_file(tensors, output / path.name, metadata={"format": "pt"})
    elif path.is_file():
        shutil.copy(path, output)
"""


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finetune", required=True)
    parser.add_argument("--models", type=pathlib.Path, required=True)
    parser.add_argument("--model", default="bench")
    parser.add_argument("--python", required=True, help="one with torch, transformers, PEFT, bitsandbytes and mlx-lm")
    parser.add_argument("--torch-script")
    parser.add_argument("--mlx-script")
    parser.add_argument("--openblas", help="a shared library to preload for mlx: its own wheel's BLAS is slower")
    parser.add_argument("--targets", default="all", help="`qv`, `all` or both")
    parser.add_argument("--ours", default=" ".join(OURS).replace("bf16 base", "bf16-base"), help="forms of our own steps")
    parser.add_argument("--peers", default="torch-f32 torch-bf16 bnb mlx-lm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output")
    return parser.parse_args()


def make(options):
    """The forms of the model that are not there yet."""
    base = options.models / options.model
    options.models.mkdir(parents=True, exist_ok=True)
    if not base.exists():
        if options.model != "bench":
            sys.exit(f"{base} is missing: scripts/random_model.py makes such models")
        subprocess.run([options.python, ROOT / "scripts" / "random_model.py", "tiny", base, *BENCH], check=True)
    for name, dtype in (("f32", "float32"), ("bf16", "bfloat16")):
        form = options.models / f"{options.model}-{name}"
        if not form.exists():
            subprocess.run([options.python, "-c", CAST, base, form, dtype], check=True)
            config = json.loads((form / "config.json").read_text())
            config.update(dtype=dtype, torch_dtype=dtype)
            (form / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for name in PACKED:
        form = options.models / f"{options.model}-{name}"
        if not form.exists():
            source = options.models / f"{options.model}-bf16"
            subprocess.run([options.finetune, "quantize", source, "--to", name, "--output", form, "--quiet"], check=True)


def weight_bytes(options, form):
    return sum(path.stat().st_size for path in (options.models / f"{options.model}-{form}").glob("model*.safetensors"))


def contestants(options, runs, targets, rows, number):
    """(name, what runs it) of a round."""
    def ours(form, sets):
        return lambda: runs.finetune(f"{options.model}-{form}", targets, rows, sets)

    def torch(form, dtype):
        return lambda: runs.peer(options.python, options.torch_script, f"{options.model}-{form}", targets,
                                 more=["--dtype", dtype])

    def mlx():
        return runs.peer(options.python, options.mlx_script, f"{options.model}-mlx4", targets, options.openblas, steps=1,
                         warmup=0)

    chosen = [name.replace("bf16-base", "bf16 base") for name in options.ours.split()]
    found = [(f"finetune {name}", ours(*OURS[name])) for name in chosen]
    peers = {"torch-f32": ("torch+peft f32", torch("f32", "float32")),
             "torch-bf16": ("torch+peft bf16", torch("bf16", "bfloat16")),
             "bnb": ("bitsandbytes+peft nf4", torch("nf4", "bfloat16")),
             "mlx-lm": ("mlx-lm mlx4", mlx)}
    for name in options.peers.split():
        script = options.mlx_script if name == "mlx-lm" else options.torch_script
        if script and (name != "mlx-lm" or number == 0):
            found.append(peers[name])
    return found


def ratios(options, table):
    """(kind, what, ratio, target), of what was measured."""
    found = []

    def add(kind, targets, one, other, key="cpu_s_per_step", target=None):
        pair = [table.get((targets, name), {}).get(key) for name in (one, other)]
        if all(pair):
            found.append((kind, f"{targets}: {one} / {other}", pair[0] / pair[1], target or TARGETS[kind]))

    for targets in options.targets.split():
        for name in PACKED:
            add("packed", targets, f"finetune {name}", "finetune bf16 base")
            peaks = [table.get((targets, f"finetune {form}"), {}).get("peak_MiB") for form in (name, "bf16 base")]
            if all(peaks):
                beside = peaks[1] - weight_bytes(options, "bf16") / 2**20
                wanted = beside + weight_bytes(options, name) / 2**20
                found.append(("memory", f"{targets}: {name}, {peaks[0]} of {wanted:.0f} MiB", peaks[0] / wanted,
                              TARGETS["memory"]))
        add("f32", targets, "finetune f32", "torch+peft f32")
        add("bf16", targets, "finetune bf16", "torch+peft bf16")
        add("peers", targets, "finetune nf4", "bitsandbytes+peft nf4")
        add("peers", targets, "finetune mlx4", "mlx-lm mlx4")
    return found


def main():
    options = parse()
    make(options)
    runs = Runs(options.finetune, options.models, options.steps, options.threads)
    results, peaks = {}, {}
    with tempfile.TemporaryDirectory() as directory:
        rows = tokens_file(options.models, directory, make=True)
        for number in range(options.rounds):
            for targets in options.targets.split():
                for name, contestant in contestants(options, runs, targets, rows, number):
                    figures = contestant()
                    results.setdefault((targets, name), []).append(figures)
                    print(f"round {number + 1} {targets} {name}: {figures['cpu_s_per_step']:.3f} CPU s per step",
                          file=sys.stderr, flush=True)
        for targets, name in results:
            if name.startswith("finetune "):
                form, sets = OURS[name.removeprefix("finetune ")]
                peaks[targets, name] = runs.peak(f"{options.model}-{form}", targets, rows, sets)
    table = {}
    for (targets, name), rounds in results.items():
        rounded = lambda key, digits: None if (found := median(rounds, key)) is None else round(found, digits)
        table[targets, name] = {
            "targets": targets, "program": name, "rounds": len(rounds),
            "cpu_s_per_step": rounded("cpu_s_per_step", 3), "step_ms": rounded("step_ms_median", 1),
            "peak_MiB": peaks.get((targets, name)) or rounded("peak_rss_MiB", 0),
            "before_first_step_s": rounded("before_first_step_s", 2), "first_step_s": rounded("first_step_s", 2),
            "losses": [round(loss, 4) for loss in rounds[0].get("losses", [])],
        }
    machine = processor()
    print(f"{options.model}, {options.threads} thread{'s' * (options.threads > 1)}, {machine['processor']} "
          f"({', '.join(machine['instructions'])})")
    columns = [key for key in next(iter(table.values())) if key != "losses"]
    print(" | ".join(columns))
    for row in table.values():
        print(" | ".join("" if row[key] is None else str(row[key]) for key in columns))
    compared = ratios(options, table)
    for kind, what, ratio, target in compared:
        print(f"{kind}: {what}: {ratio:.2f} (target {target}){'' if ratio <= target else '  MISSED'}")
    if options.output:
        document = {
            "date": datetime.date.today().isoformat(), **machine, "threads": options.threads, "model": options.model,
            "command": " ".join(["python3", "benches/quantized.py", *sys.argv[1:]]),
            "weights_bytes": {form: weight_bytes(options, form) for form in ["f32", "bf16", *PACKED]},
            "steps": list(table.values()),
            "ratios": [dict(kind=kind, what=what, ratio=round(ratio, 3), target=target)
                       for kind, what, ratio, target in compared],
        }
        pathlib.Path(options.output).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
