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
import subprocess
import sys
import tempfile
from pathlib import Path

TOKEN = "hf_tester"
ID = "acme/tiny"
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
    rows = root / "datasets" / "acme" / "rows"
    rows.mkdir(parents=True)
    (rows / "train.jsonl").write_text('{"text": "a"}\n')


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


if __name__ == "__main__":
    main()
