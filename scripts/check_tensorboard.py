#!/usr/bin/env python3
"""Checks that TensorBoard reads the event files of `[log] tensorboard`, and reads what
metrics.jsonl says.

    scripts/check_tensorboard.py --finetune target/release/finetune

Trains the quickstart's model for a few steps, kills the run in the middle, and resumes it. Then
each scalar must be there once for each step, with the value of metrics.jsonl rounded to f32, and
the recipe must be there as text. Every record's checksums are checked by TensorBoard itself. Needs
the package `tensorboard`.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.compat.tensorflow_stub import errors
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New
from tensorboard.util import tensor_util

ROOT = pathlib.Path(__file__).resolve().parent.parent
TAGS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "train/tokens_per_second",
    "epoch": "train/epoch",
    "eval_loss": "eval/loss",
}
SETTINGS = ["log.tensorboard=true", "train.max_steps=12", "eval.every=5", "eval.samples=0", "eval.exact_match=0",
            "checkpoint.every=4"]
DEADLINE_SECONDS = 300


def train(program, run, failpoint=None):
    command = [program, "run", ROOT / "recipes/quickstart.toml", "--output-dir", run, "--resume"]
    command += [word for setting in SETTINGS for word in ("--set", setting)]
    environment = {**os.environ, **({"FINETUNE_FAILPOINT": failpoint} if failpoint else {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    if (done.returncode != 0) != bool(failpoint):
        sys.exit(f"exit code {done.returncode}\n{done.stderr}")


def count_records(file):
    """The number of records of a file. TensorBoard raises an error if a checksum is wrong."""
    reader = PyRecordReader_New(str(file))
    count = 0
    while True:
        try:
            reader.GetNext()
        except errors.OutOfRangeError:
            return count
        count += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finetune", type=pathlib.Path, required=True)
    program = parser.parse_args().finetune.resolve()
    with tempfile.TemporaryDirectory() as folder:
        run = pathlib.Path(folder) / "run"
        # Two steps beyond the checkpoint of step 4, whose rows the resume makes again.
        train(program, run, failpoint="train.updated:7")
        train(program, run)
        files = sorted((run / "tensorboard").iterdir())
        if len(files) != 2:
            sys.exit(f"two processes have written {[file.name for file in files]}")
        records = sum(count_records(file) for file in files)
        events = event_accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={
            event_accumulator.SCALARS: 0, event_accumulator.TENSORS: 0})
        events.Reload()
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for key, tag in TAGS.items():
            want = [(row["step"], float(numpy.float32(row[key]))) for row in rows if key in row]
            found = [(event.step, event.value) for event in events.Scalars(tag)]
            if found != want:
                sys.exit(f"{tag}: TensorBoard reads {found}, metrics.jsonl has {want}")
        [text, *_] = events.Tensors("recipe/text_summary")
        recipe = tensor_util.make_ndarray(text.tensor_proto)[0].decode()
        if "    rank = 16\n" not in recipe:
            sys.exit(f"the recipe as text: {recipe!r}")
        print(f"TensorBoard reads {records} records of {len(files)} files: {len(rows)} rows, each once")


if __name__ == "__main__":
    main()
