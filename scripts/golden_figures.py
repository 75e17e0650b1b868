"""How far two results are apart, and files of figures."""

import json
import math
import re


def largest_difference(prefix, tensors, reference):
    return max((t.double() - reference[k]).abs().max().item() for k, t in tensors.items() if k.startswith(prefix))


def relative_norm(pairs):
    pairs = [(a.double(), b) for a, b in pairs]
    difference = math.sqrt(sum((a - b).pow(2).sum().item() for a, b in pairs))
    return difference / math.sqrt(sum(b.pow(2).sum().item() for _, b in pairs))


def write_json(path, value):
    text = json.dumps(value, indent=2)
    # Lists of numbers and the flat objects of a curve on one line each, for readable diffs.
    text = re.sub(r"\[[^\[\]{}\"]*\]", lambda match: "[" + " ".join(match[0][1:-1].split()) + "]", text)
    text = re.sub(r"\{\s*\"step\"[^{}]*\}", lambda match: " ".join(match[0].split()), text)
    path.write_text(text + "\n")
