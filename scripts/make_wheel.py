#!/usr/bin/env python3
"""Puts a binary into a wheel: `pip install` then lays it into the environment's bin folder.

    scripts/make_wheel.py BINARY --version 0.1.0 --target x86_64-unknown-linux-gnu --output target/dist

A wheel is a zip with metadata (PEP 427). The name and the words come from packaging/pypi/pyproject.toml, with which
maturin makes the same wheel of a release. Needs Python 3.11, and binutils on Linux.
"""

import argparse
import base64
import hashlib
import re
import subprocess
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Later than any zip's first possible year; the same every time.
DATE = (1980, 1, 1, 0, 0, 0)


def glibc(binary: Path) -> tuple[int, int]:
    """The newest version of glibc that the binary asks for."""
    symbols = subprocess.run(["objdump", "-T", binary], check=True, capture_output=True, text=True).stdout
    versions = {(int(major), int(minor)) for major, minor in re.findall(r"GLIBC_(\d+)\.(\d+)", symbols)}
    return max(versions, default=(2, 17))


def platform(target: str, binary: Path) -> str:
    """The wheel's platform tag (PEP 600 on Linux)."""
    machine = target.split("-")[0]
    if target.endswith("-apple-darwin"):
        return "macosx_12_0_" + {"aarch64": "arm64"}.get(machine, machine)
    if target.endswith("-linux-gnu"):
        major, minor = glibc(binary)
        return f"manylinux_{major}_{minor}_{machine}"
    raise SystemExit(f"make_wheel: no wheel tag is known for {target}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary", type=Path)
    for name in ("version", "target"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    project = tomllib.loads((ROOT / "packaging/pypi/pyproject.toml").read_text())["project"]
    version, tag = arguments.version, f"py3-none-{platform(arguments.target, arguments.binary)}"
    stem = f"{project['name'].replace('-', '_')}-{version}"
    metadata = [
        "Metadata-Version: 2.4",
        f"Name: {project['name']}",
        f"Version: {version}",
        f"Summary: {project['description']}",
        f"License-Expression: {project['license']}",
        "License-File: LICENSE",
        f"Requires-Python: {project['requires-python']}",
        *(f"Keywords: {','.join(project['keywords'])}",),
        *(f"Classifier: {classifier}" for classifier in project["classifiers"]),
        "Description-Content-Type: text/markdown",
    ]
    files = [
        (f"{stem}.data/scripts/finetune", arguments.binary.read_bytes(), 0o755),
        (f"{stem}.dist-info/METADATA", ("\n".join(metadata) + "\n\n").encode() + (ROOT / "README.md").read_bytes(), 0o644),
        (f"{stem}.dist-info/WHEEL", f"Wheel-Version: 1.0\nGenerator: make_wheel\nRoot-Is-Purelib: false\nTag: {tag}\n".encode(), 0o644),
        (f"{stem}.dist-info/licenses/LICENSE", (ROOT / "LICENSE").read_bytes(), 0o644),
    ]
    record = ""
    for name, content, _ in files:
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    files.append((f"{stem}.dist-info/RECORD", (record + f"{stem}.dist-info/RECORD,,\n").encode(), 0o644))

    path = arguments.output / f"{stem}-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as wheel:
        for name, content, mode in files:
            entry = zipfile.ZipInfo(name, DATE)
            entry.external_attr = (0o100000 | mode) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            wheel.writestr(entry, content)
    print(path)


if __name__ == "__main__":
    main()
