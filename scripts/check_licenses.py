#!/usr/bin/env python3
"""Compares the license of every dependency in `cargo metadata --locked` with deny.toml."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def is_allowed(expression: str, allowed: set[str]) -> bool:
    """Whether an SPDX expression (`/` is an old `OR`) can be met by allowed licenses alone."""
    words = re.findall(r"[()]|[^()\s]+", expression.replace("/", " OR "))
    terms, place = [], 0
    while place < len(words):
        word = words[place]
        if word in ("(", ")", "AND", "OR"):
            terms.append(word.lower())
        else:
            if words[place + 1 : place + 2] == ["WITH"]:
                word, place = " ".join(words[place : place + 3]), place + 2
            terms.append(str(word in allowed))
        place += 1
    # Only True, False, and, or and brackets are left.
    return bool(eval(" ".join(terms), {"__builtins__": {}}))


def main() -> int:
    rules = tomllib.loads((ROOT / "deny.toml").read_text())["licenses"]
    allowed = set(rules["allow"])
    clarified = {entry["crate"]: entry["expression"] for entry in rules.get("clarify", [])}
    command = ["cargo", "metadata", "--locked", "--format-version", "1"]
    packages = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)["packages"]
    bad = []
    for package in packages:
        name = package["name"]
        expression = package["license"] or clarified.get(name)
        if expression is None or not is_allowed(expression, allowed):
            bad.append(f"{name} {package['version']}: {expression or 'no license is named'}")
    print("\n".join(bad) or f"the licenses of {len(packages)} packages are in deny.toml")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
