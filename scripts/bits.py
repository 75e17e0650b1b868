#!/usr/bin/env python3
"""Prints hashes of what a program trains: the proof that a change keeps every bit of a run.

    scripts/bits.py target/release/finetune > before.txt
    (change the code)
    scripts/bits.py target/release/finetune | diff before.txt -

Each line is a run of ten steps on the CPU, with one hash over its result, its checkpoints (state,
moments and manifests) and the losses, gradient norms and learning rates of its metrics. With
`--peer OTHER` the program OTHER is rank 1 of the runs of two ranks. Both then have to speak the
same protocol. The bits depend on the processor's instructions (AVX2, AVX-512, NEON), so tables of
two machines are not compared.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODELS = ROOT / "tests/goldens/models"
RECIPE = """output_dir = "run"
seed = 7
[model]
path = "model"
device = "cpu"
[data]
train = "train.jsonl"
eval = "eval.jsonl"
[train]
max_steps = 10
global_batch_size = 5
micro_batch_size = 2
[optimizer]
learning_rate = 5e-3
[eval]
every = 2
[checkpoint]
every = 4
keep_best = true
"""
LORA = "[lora]\nrank = 4\nalpha = 8\ndropout = 0.1\n"
# Name, settings, ranks.
VARIANTS = [
    ("lora", [], 1),
    ("lora, 2 ranks", [], 2),
    ("lora, 2 ranks as one", ["distributed.virtual_ranks=2"], 1),
    ("lora, 3 ranks, ring", ["distributed.topology=ring"], 3),
    ("lora, recomputed", ["train.gradient_checkpointing=true"], 1),
    ("lora, some layers", ['lora.target_modules=["q_proj","down_proj"]', "lora.layers_to_transform=[1]"], 1),
    ("full", ["train.method=full"], 1),
    ("full, recomputed", ["train.method=full", "train.gradient_checkpointing=true"], 1),
    ("full, 2 ranks", ["train.method=full"], 2),
]
# Numbers of a row of metrics.jsonl that do not depend on the time.
STEADY = ["step", "epoch", "loss", "trained_tokens", "tokens", "grad_norm", "learning_rate", "eval_loss", "eval_tokens"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train(program, peer, folder, settings, ranks):
    arguments = ["run", "recipe.toml", *(part for setting in settings for part in ("--set", setting))]
    base = {key: value for key, value in os.environ.items() if not key.startswith("FINETUNE_")}
    environments = [base]
    if ranks > 1:
        port = str(free_port())
        environments = [
            base | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            for rank in range(ranks)
        ]
    processes = [
        subprocess.Popen([peer if rank == 1 and peer else program, *arguments], cwd=folder, env=environment,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank, environment in enumerate(environments)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        if process.returncode != 0:
            sys.exit(f"{folder} {settings}: exit code {process.returncode}\n{output}")


def run_hash(run):
    """One hash over what a run leaves that two runs of the same recipe have in common."""
    total = hashlib.sha256()
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = path.relative_to(run).as_posix()
        if name in ("report.html", "run.json", ".lock"):
            continue
        contents = path.read_bytes()
        if name == "metrics.jsonl":
            rows = (json.loads(line) for line in contents.splitlines())
            contents = json.dumps([{key: row[key] for key in STEADY if key in row} for row in rows]).encode()
        total.update(name.encode() + b"\0" + hashlib.sha256(contents).digest())
    return total.hexdigest()[:32]


def put(folder, family, other, recipe):
    shutil.copytree(MODELS / family, folder / "model")
    shutil.copy(MODELS / family / "rows.jsonl", folder / "train.jsonl")
    shutil.copy(MODELS / other / "rows.jsonl", folder / "eval.jsonl")
    (folder / "recipe.toml").write_text(recipe)


def only_by_lora(family):
    """Whether `method = "full"` is refused: experts, gated delta nets, parts of multimodal models."""
    config = json.loads((MODELS / family / "config.json").read_text())
    return any(key in config for key in ("text_config", "num_local_experts", "linear_num_key_heads"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=pathlib.Path)
    parser.add_argument("--peer", type=pathlib.Path)
    parser.add_argument("--family", action="append", help="only this one; default: all that there are")
    options = parser.parse_args()
    program, peer = options.program.resolve(), options.peer and options.peer.resolve()
    families = options.family or sorted(path.name for path in MODELS.iterdir() if (path / "rows.jsonl").exists())
    # Paths get into adapter_config.json and model cards, so the folder has the same name each time.
    temporary = pathlib.Path(tempfile.gettempdir()) / "finetune-bits"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for family in families:
            other = "qwen3" if family == "llama" else "llama"
            for name, settings, ranks in VARIANTS:
                if (peer and ranks == 1) or ("train.method=full" in settings and only_by_lora(family)):
                    continue
                folder = temporary / "here"
                folder.mkdir()
                put(folder, family, other, RECIPE if "train.method=full" in settings else RECIPE + LORA)
                train(program, peer, folder, settings, ranks)
                print(f"{family:10} {name:22} {run_hash(folder / 'run')}", flush=True)
                shutil.rmtree(folder)
        if not peer:
            folder = temporary / "quickstart"
            settings = ["--set", "train.max_steps=6", "--set", "checkpoint.every=3", "--output-dir", str(folder)]
            command = [program, "run", "recipes/quickstart.toml", *settings]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode != 0:
                sys.exit(done.stderr)
            print(f"{'quickstart':10} {'lora, chat':22} {run_hash(folder)}")
    finally:
        shutil.rmtree(temporary)


if __name__ == "__main__":
    main()
