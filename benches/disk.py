#!/usr/bin/env python3
"""A LoRA step over a base that is larger than the memory allowed: finetune with layers in memory, computed again and from
the disk, beside transformers + PEFT and accelerate's offload to the disk.

    benches/disk.py --finetune target/release/finetune [--peer PYTHON] [--limit MIB ...] [--layers 24] [--hidden 1024]
                    [--micro-batches 8] [--rounds 1] [--output FILE]

All of them take turns in every round, each in a control group of its own (needs Linux and root). What can do without the
layers in memory runs again for each --limit: so many MiB for the group, page cache included, without swap. Before each run
the base is dropped from the page cache, so that reading it counts. The base is Llama-shaped, of random weights in bf16,
with 8,192 tokens: 24 layers of 1024 are 0.74 GiB, 30 of 2048 are 3.0. A step is so many micro-batches of one row of 256
tokens; LoRA of rank 4 on q and v. The table has medians.

PYTHON has torch, transformers, PEFT and accelerate; disk_peer.py says how they are used. finetune computes in f32 from the
weights in bf16, a peer as --peer-dtype says. With --peer-rows a peer takes more rows through the model together, as
micro-batches of its own. A peer runs without the limit first, so its libraries are in the page cache by then, and count
for no limit.

`waited` are seconds of a step without a layer to compute (finetune alone counts them), `anonymous` is the most that was
no page cache (looked at every 20 ms), `peak` has the page cache with it, `read` is what a run has read from the disk.
Needs numpy; the directory for temporary files (TMPDIR) has to be on a disk.
"""
import argparse, datetime, json, os, pathlib, re, signal, statistics, subprocess, sys, tempfile, time

from lora_runs import median, processor

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from memory_group import MemoryGroup, forget
from random_model import write_model

VOCABULARY, TOKENS = 8192, 256
RECIPE = """
output_dir = "run"
[model]
path = "model"
device = "cpu"
[lora]
rank = 4
alpha = 8
target_modules = ["q_proj", "v_proj"]
[data]
train = "train.jsonl"
shuffle = false
[train]
max_steps = {steps}
global_batch_size = {micro_batches}
micro_batch_size = 1
max_grad_norm = 0.0
[optimizer]
learning_rate = 1e-4
[schedule]
name = "constant"
[checkpoint]
every = 0
"""
WAYS = {
    "finetune, in memory": ["model.residency=memory"],
    "finetune, in memory, computed again": ["model.residency=memory", "train.gradient_checkpointing=true"],
    "finetune, from the disk": ["model.residency=disk"]}
PEERS = {
    "transformers + PEFT, computed again": "plain",
    "accelerate, layers on disk, as it is": "accelerate-as-is",
    "accelerate, layers on disk, adapter on the CPU": "accelerate"}


def make_work(directory, options):
    """The base, the rows and the recipe, in this directory. Bytes of the base."""
    sizes = {
        "hidden_size": options.hidden, "intermediate_size": 4 * options.hidden, "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 64, "num_key_value_heads": options.hidden // 128, "head_dim": 64,
        "vocab_size": VOCABULARY, "tie_word_embeddings": False}
    (directory / "model").mkdir()
    total = write_model(directory / "model", sizes, 1)
    rows = [[(row * 131 + n * 17) % VOCABULARY for n in range(TOKENS)]
            for row in range(options.steps * options.micro_batches)]
    text = "".join(json.dumps({"input_ids": row, "labels": row}) + "\n" for row in rows)
    (directory / "train.jsonl").write_text(text)
    (directory / "recipe.toml").write_text(RECIPE.format(steps=options.steps, micro_batches=options.micro_batches))
    return total


def watched(command, directory, limit, options):
    """Runs a command in a group of its own. What it printed to both streams, an error or `None`, and figures."""
    for path in (directory / "model").glob("*.safetensors"):
        forget(path)
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    for name in ["OMP_NUM_THREADS", "RAYON_NUM_THREADS"]:
        environment[name] = str(options.threads)
    group = MemoryGroup("finetune-bench", limit and limit << 20)
    anonymous, error, end = 0, None, time.monotonic() + options.seconds
    with open(directory / "printed", "w+") as printed, open(directory / "said", "w+") as said:
        child = subprocess.Popen(command, cwd=directory, stdout=printed, stderr=said, env=environment,
                                 preexec_fn=group.join)
        while True:
            ended, status, usage = os.wait4(child.pid, os.WNOHANG)
            if ended:
                break
            anonymous = max(anonymous, group.anonymous())
            if time.monotonic() > end and not error:
                error = f"not done after {options.seconds} s"
                child.kill()
            time.sleep(0.02)
        child.returncode = os.waitstatus_to_exitcode(status)
        for file in (printed, said):
            file.seek(0)
        printed, said = printed.read(), said.read()
    if child.returncode and not error:
        error = (said.strip().splitlines() or [""])[-1] or f"exit code {child.returncode}"
        if child.returncode == -signal.SIGKILL and group.kills():
            error = "killed for want of memory"
    # ru_inblock counts blocks of 512 bytes that the process has caused to be read, by calls and by faults.
    found = {"anonymous_MiB": anonymous / 2**20, "read_MiB": usage.ru_inblock / 2**11, "major_faults": usage.ru_majflt}
    if group.peak():
        found["peak_MiB"] = group.peak() / 2**20
    group.close()
    return printed, said, error, found


def mebibytes(word, text):
    number, unit = re.search(word + r" ([0-9.]+) (MiB|GiB)", text).groups()
    return float(number) * (1024 if unit == "GiB" else 1)


def run_finetune(directory, sets, limit, options):
    """Figures of a run, with its adapter's bytes. A failure ends the bench."""
    output = directory / "run"
    command = [options.finetune, "run", "recipe.toml", "--output-dir", str(output)]
    command += [word for value in sets for word in ("--set", value)]
    _, said, error, found = watched(command, directory, limit, options)
    if error:
        sys.exit(f"finetune with {sets}, limit {limit}: {error}\n{said}")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    found |= {
        "s_per_step": statistics.median(row["seconds"] for row in rows),
        "s_waited": statistics.median(row.get("reading_seconds", 0.0) for row in rows),
        "own_peak_MiB": mebibytes("peak memory", said), "estimate_MiB": mebibytes("estimated", said),
        "losses": [row["loss"] for row in rows],
        "adapter": (output / "adapter/adapter_model.safetensors").read_bytes()}
    subprocess.run(["rm", "-r", str(output)], check=True)
    return found


def run_peer(directory, way, limit, options):
    """Figures of a run; with `error`, if it failed."""
    command = [options.peer, str(ROOT / "benches/disk_peer.py"), way, "model", "train.jsonl", options.peer_dtype,
               str(options.steps), str(options.micro_batches // options.peer_rows), str(options.peer_rows)]
    printed, _, error, found = watched(command, directory, limit, options)
    lines = [json.loads(line[7:]) for line in printed.splitlines() if line.startswith("RESULT ")]
    steps = [line for line in lines if "seconds" in line]
    if error:
        found["error"] = error
    if steps:
        found["s_per_step"] = statistics.median(line["seconds"] for line in steps)
    found["losses"] = [line["loss"] for line in steps]
    return found | {key: line[key] for line in lines for key in line if key == "versions"}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finetune", required=True, type=os.path.abspath)
    parser.add_argument("--peer", metavar="PYTHON", type=os.path.abspath)
    parser.add_argument("--peer-rows", type=int, default=1)
    parser.add_argument("--peer-dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=int, nargs="+", default=[], metavar="MIB")
    parser.add_argument("--seconds", type=int, default=180, help="after which a run is given up")
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    if options.micro_batches % options.peer_rows:
        parser.error("--micro-batches is a multiple of --peer-rows")
    return options


def contestants(options):
    """(name, limit in MiB or None, a function of the directory) of each run of a round."""
    limits = [None, *options.limit]
    for name, sets in WAYS.items():
        # What holds all layers has no room under the limit, and refuses to begin.
        for limit in limits if name == "finetune, from the disk" else [None]:
            yield name, limit, lambda directory, sets=sets, limit=limit: run_finetune(directory, sets, limit, options)
    for name, way in PEERS.items() if options.peer else []:
        for limit in [None] if way == "accelerate-as-is" else limits:
            yield name, limit, lambda directory, way=way, limit=limit: run_peer(directory, way, limit, options)


def row_of(name, limit, rounds):
    """Medians over rounds, for the table."""
    row = {"program": name, "limit_MiB": limit}
    digits = {"s_per_step": 2, "s_waited": 4, "anonymous_MiB": 0, "peak_MiB": 0, "own_peak_MiB": 0, "estimate_MiB": 0,
              "read_MiB": 0, "major_faults": 0}
    for key, places in digits.items():
        if (value := median(rounds, key)) is not None:
            row[key] = round(value, places or None)
    row["losses"] = [round(loss, 4) for loss in rounds[0]["losses"]]
    errors = [found["error"] for found in rounds if "error" in found]
    return row | ({"error": errors[0]} if errors else {})


def main():
    options = parse()
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        base = make_work(directory, options)
        for number in range(options.rounds):
            for name, limit, run in contestants(options):
                found = run(directory)
                results.setdefault((name, limit), []).append(found)
                shown = {key: value for key, value in found.items() if key != "adapter"}
                print(f"round {number + 1}, {name}, limit {limit}: {shown}", file=sys.stderr, flush=True)
    everything = [found for rounds in results.values() for found in rounds]
    same = len({found["adapter"] for found in everything if "adapter" in found}) == 1
    table = [row_of(name, limit, rounds) for (name, limit), rounds in results.items()]
    print(f"base {base >> 20} MiB; finetune's adapters: {'the same to the bit' if same else 'OTHER BITS'}")
    columns = ["program", "limit_MiB", "s_per_step", "s_waited", "anonymous_MiB", "peak_MiB", "estimate_MiB", "read_MiB",
               "error"]
    print(" | ".join(columns))
    for row in table:
        print(" | ".join("" if row.get(key) is None else str(row[key]) for key in columns))
    if options.output:
        versions = next((found["versions"] for found in everything if "versions" in found), {})
        about = {"what": " ".join(__doc__.split("\n\n")[0].split()), "date": datetime.date.today().isoformat(),
                 **processor(),
                 "versions": versions, "base_MiB": base >> 20, "layers": options.layers, "hidden": options.hidden,
                 "micro_batches": options.micro_batches, "peer_rows": options.peer_rows,
                 "peer_dtype": options.peer_dtype, "steps": options.steps,
                 "rounds": options.rounds, "threads": options.threads, "same_bits": same}
        options.output.write_text(json.dumps(about | {"table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
