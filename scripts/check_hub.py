#!/usr/bin/env python3
"""Our downloads and uploads beside those of Python's huggingface_hub, on one hub on loopback.

    cargo build --release --workspace --bins --examples
    python scripts/check_hub.py --finetune target/release/finetune --server target/release/examples/loopback_hub

Needs huggingface_hub. It proves that the server answers as huggingface_hub expects, that both
programs lay the cache out alike, and that each finds what the other one has fetched or sent.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

TOKEN = "hf_tester"
ID = "acme/tiny"
SPLIT = "acme/split"
GOLDEN = Path(__file__).resolve().parents[1] / "tests/goldens/models/qwen3_moe"
# The files that ours takes of the model; Python takes all.
NEEDED = ["config.json", "tokenizer.json", "sub/chat_template.jinja", "model.safetensors", "README.md"]


def write_repositories(root: Path) -> None:
    model = root / "models" / ID
    (model / "sub").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text('{"model": 1}')
    (model / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    (model / "sub" / "chat_template.jinja").write_text("{{ messages }}")
    (model / "model.safetensors").write_bytes(bytes(range(256)) * 2000)
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    write_split(root / "models" / SPLIT)
    rows = root / "datasets" / "acme" / "rows"
    rows.mkdir(parents=True)
    (rows / "train.jsonl").write_text('{"text": "a"}\n')


def write_split(model: Path) -> None:
    """A golden model with its weights in two files: layer 0 and what is in no layer, and the other layers."""
    model.mkdir(parents=True)
    (model / "config.json").write_bytes((GOLDEN / "config.json").read_bytes())
    whole = (GOLDEN / "model.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    tensors = {name: at for name, at in json.loads(whole[8:start]).items() if name != "__metadata__"}
    shards, weight_map = {1: ({}, b""), 2: ({}, b"")}, {}
    for name, at in tensors.items():
        number = 2 if any(f"layers.{layer}." in name for layer in [1, 2]) else 1
        header, data = shards[number]
        begin, end = at["data_offsets"]
        header[name] = {**at, "data_offsets": [len(data), len(data) + end - begin]}
        shards[number] = (header, data + whole[start + begin : start + end])
        weight_map[name] = shard_name(number)
    for number, (header, data) in shards.items():
        text = json.dumps(header).encode()
        (model / shard_name(number)).write_bytes(struct.pack("<Q", len(text)) + text + data)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def shard_name(number: int) -> str:
    return f"model-{number:05}-of-00002.safetensors"


def tree(cache: Path) -> dict:
    """What the cache has under `models--…`: files, and where links lead. Locks and listings aside."""
    found = {}
    for path in sorted(cache.glob("models--*/**/*")):
        name = str(path.relative_to(cache))
        if path.is_symlink():
            found[name] = "-> " + os.readlink(path)
        elif path.is_file() and "/trees/" not in name:
            found[name] = path.read_bytes()
    return found


def check(what: str, same: bool) -> None:
    print(f"{'ok  ' if same else 'FAIL'} {what}")
    if not same:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--finetune", required=True)
    parser.add_argument("--server", required=True)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    write_repositories(work / "hub")
    server = subprocess.Popen(
        [arguments.server, str(work / "hub"), TOKEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        compare(arguments.finetune, server.stdout.readline().strip(), work)
    finally:
        server.stdin.close()
        server.wait(timeout=10)


def compare(program: str, endpoint: str, work: Path) -> None:
    # huggingface_hub reads these when it is imported.
    os.environ.update(HF_ENDPOINT=endpoint, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HOME=str(work / "home"))
    os.environ.pop("HF_HUB_OFFLINE", None)
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    def ours(*words: str, cache: Path, **more: str) -> str:
        environment = {**os.environ, "HF_HUB_CACHE": str(cache), **more}
        return subprocess.run([program, *words], env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout

    python_cache, our_cache = work / "python", work / "ours"
    path = snapshot_download(ID, cache_dir=python_cache, allow_patterns=NEEDED)
    report = json.loads(ours("download", ID, "--json", cache=our_cache))
    check("the same files", sorted(report["files"]) == sorted(NEEDED))
    check("the same commit", report["commit"] == Path(path).name)
    check("the same cache, file by file and link by link", tree(python_cache) == tree(our_cache))
    found = snapshot_download(ID, cache_dir=our_cache, local_files_only=True)
    check("Python finds what we fetched", Path(found) == Path(report["path"]))
    check(
        "Python finds a single file of it",
        Path(hf_hub_download(ID, "model.safetensors", cache_dir=our_cache, local_files_only=True)).read_bytes()
        == (work / "hub" / "models" / ID / "model.safetensors").read_bytes(),
    )
    offline = ours("download", ID, cache=python_cache, HF_HUB_OFFLINE="1").strip()
    check("we find what Python fetched", offline == path)
    before = tree(python_cache)
    ours("download", ID, cache=python_cache)
    check("and fetch nothing of it again", tree(python_cache) == before)
    snapshot_download(ID, cache_dir=our_cache)
    check("Python adds to our cache what we left out", (Path(found) / "pytorch_model.bin").is_file())

    compare_headers(ours, work)

    # What Python sends, we fetch; what we send, Python fetches.
    api = HfApi(token=TOKEN)
    adapter = work / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "acme/tiny"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}" + bytes(500))
    (adapter / "README.md").write_text("---\nbase_model: acme/tiny\n---\n# mine\n")
    api.create_repo("tester/python", private=True)
    api.upload_folder(folder_path=adapter, repo_id="tester/python")
    theirs = Path(ours("download", "tester/python", cache=our_cache, HF_TOKEN=TOKEN).strip())
    same = lambda folder: all((folder / file.name).read_bytes() == file.read_bytes() for file in adapter.iterdir())
    check("we fetch what Python sent", same(theirs))
    url = ours("upload", str(adapter), "tester/ours", "--private", cache=our_cache, HF_TOKEN=TOKEN).strip()
    check("the page of what we sent", url == f"{endpoint}/tester/ours")
    check("Python fetches what we sent", same(Path(snapshot_download("tester/ours", cache_dir=python_cache, token=TOKEN))))
    check("what we sent is private", api.repo_info("tester/ours").private is True)


def compare_headers(ours, work: Path) -> None:
    """Headers that are kept without their files: no part of a snapshot, and nothing that Python takes for a file."""
    from huggingface_hub import hf_hub_download, scan_cache_dir, try_to_load_from_cache

    cache, recipe = work / "headers", work / "recipe.toml"
    rows = GOLDEN / "rows.jsonl"
    recipe.write_text(f'output_dir = "run"\n[model]\npath = "{SPLIT}"\n[data]\ntrain = "{rows}"\n')
    ours("plan", str(recipe), "--memory", "64G", "--json", cache=cache)
    names = [shard_name(1), shard_name(2)]
    kept = sorted(path.name for path in cache.glob("models--*/headers/*/*"))
    check("a plan keeps the headers of the weights", kept == [f"{name}.header" for name in names])
    taken = [try_to_load_from_cache(SPLIT, name, cache_dir=cache) for name in names]
    check("Python takes none for a file", not any(isinstance(path, str) for path in taken))
    check("Python finds nothing wrong with the cache", not scan_cache_dir(cache).warnings)
    path = Path(hf_hub_download(SPLIT, names[1], cache_dir=cache))
    original = work / "hub" / "models" / SPLIT / names[1]
    check("Python fetches a file beside its header", path.read_bytes() == original.read_bytes())
    ours("download", SPLIT, cache=cache)
    check("and we fetch the others", all((path.parent / name).is_file() for name in names))


if __name__ == "__main__":
    main()
