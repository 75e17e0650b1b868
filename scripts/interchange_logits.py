"""Logits of programs, position by position: for the checks of check_interchange.py."""

import importlib.util
import json

import numpy as np
import torch

# Of the largest logit: f32 sums in another order give about 1e-6.
LOGITS = 2e-5


def missing(*packages):
    """Names the packages that a check needs and that are not there."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def rows_of(family):
    """Token rows. Neither mlx-lm nor llama.cpp has Mistral's window, so its rows end there."""
    config = json.loads((family.directory / "config.json").read_text())
    window = config.get("sliding_window") if config["model_type"] == "mistral" else None
    return [row["input_ids"][:window] for row in family.files["all"][1]]


def torch_logits(model, rows):
    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0].float().numpy() for row in rows]


def compare_logits(report, family, check, theirs, ours, what, bound=LOGITS):
    largest = max(float(np.abs(a - b).max()) for a, b in zip(theirs, ours))
    scale = max(float(np.abs(a).max()) for a in theirs)
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(theirs, ours))
    count = sum(len(a) for a in theirs)
    wrong = not largest <= bound * scale
    text = f"{what}: logits differ by {largest:.1e} of {scale:.1f} at most, same best token at {same} of {count}"
    report.note(family, check, text, wrong)


def refused(error, report, family, check, words):
    """Whether an export was refused by name, which is noted."""
    lines = [line for line in str(error).splitlines() if words in line]
    if lines:
        report.note(family.name, check, f"refused: {lines[:1]}")
    return bool(lines)
