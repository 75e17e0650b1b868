#!/usr/bin/env python3
"""A LoRA step with layers in memory, with gradient checkpointing, and with layers from the disk, in turns; with --limit
also in a control group (version 1) that gives so many MiB, page cache included. Needs numpy; --limit needs root.

    benches/disk.py --finetune target/release/finetune [--layers 24] [--hidden 1024] [--micro-batches 8] [--limit 384]

The base is Llama-shaped, of random weights in bf16, with 8,192 tokens. A step is so many micro-batches of one row of 256
tokens; LoRA of rank 4 on q and v.
"""
import argparse, json, os, pathlib, re, statistics, struct, subprocess, tempfile

import numpy

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--finetune", required=True)
arguments.add_argument("--layers", type=int, default=24)
arguments.add_argument("--hidden", type=int, default=1024)
arguments.add_argument("--micro-batches", type=int, default=8)
arguments.add_argument("--steps", type=int, default=2)
arguments.add_argument("--rounds", type=int, default=1)
arguments.add_argument("--limit", type=int, help="MiB")
arguments.add_argument("--output")
options = arguments.parse_args()

VOCABULARY, TOKENS = 8192, 256
GROUP = pathlib.Path("/sys/fs/cgroup/memory/finetune-bench")


def make_base(path):
    """A base of random weights in this directory."""
    hidden, inner, heads = options.hidden, 4 * options.hidden, options.hidden // 64
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": options.layers, "num_attention_heads": heads, "num_key_value_heads": heads // 2,
        "head_dim": 64, "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (VOCABULARY, hidden), "lm_head": (VOCABULARY, hidden), "model.norm": (hidden,)}
    for n in range(options.layers):
        parts = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden // 2, hidden),
            "self_attn.v_proj": (hidden // 2, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        shapes |= {f"model.layers.{n}.{part}": shape for part, shape in parts.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(numpy.prod(shape))
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    draw = numpy.random.default_rng(0)
    with open(path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for shape in shapes.values():
            values = numpy.ones(shape, numpy.float32)
            if len(shape) > 1:
                values = (draw.random(shape, dtype=numpy.float32) - 0.5) * numpy.float32(1.5 * hidden ** -0.5)
            file.write((values.view(numpy.uint32) >> 16).astype(numpy.uint16).tobytes())
    return end


def run(directory, sets, limit):
    """Seconds of the last step, seconds waited for reads, peak and estimate in MiB, and the adapter's bytes."""
    output = pathlib.Path(directory, "run")
    command = [os.path.abspath(options.finetune), "run", "recipe.toml", "--output-dir", str(output)]
    command += [word for value in sets for word in ("--set", value)]

    def join():
        if limit:
            (GROUP / "cgroup.procs").write_text(str(os.getpid()))

    if limit:
        GROUP.mkdir(exist_ok=True)
        (GROUP / "memory.limit_in_bytes").write_text(str(limit << 20))
    ended = subprocess.run(command, cwd=directory, capture_output=True, text=True, preexec_fn=join)
    if ended.returncode != 0:
        raise SystemExit(f"{sets}: {ended.stderr}")
    number = lambda word: (lambda value, unit: float(value) * (1024 if unit == "GiB" else 1))(
        *re.search(word + r" ([0-9.]+) (MiB|GiB)", ended.stderr).groups())
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    adapter = (output / "adapter/adapter_model.safetensors").read_bytes()
    subprocess.run(["rm", "-r", str(output)], check=True)
    waited = [row.get("reading_seconds", 0.0) for row in steps]
    return statistics.median(row["seconds"] for row in steps), max(waited), number("peak memory"), number("estimated"), adapter


with tempfile.TemporaryDirectory() as directory:
    base_bytes = make_base(pathlib.Path(directory, "model"))
    rows = [[(row * 131 + n * 17) % VOCABULARY for n in range(TOKENS)] for row in range(2 * options.micro_batches)]
    text = "".join(json.dumps({"input_ids": row, "labels": row}) + "\n" for row in rows)
    pathlib.Path(directory, "train.jsonl").write_text(text)
    pathlib.Path(directory, "recipe.toml").write_text(f"""
output_dir = "run"
[model]
path = "model"
device = "cpu"
[lora]
rank = 4
target_modules = ["q_proj", "v_proj"]
[data]
train = "train.jsonl"
[train]
max_steps = {options.steps}
global_batch_size = {options.micro_batches}
micro_batch_size = 1
[checkpoint]
every = 0
""")
    variants = {
        "memory": (["model.residency=memory"], None),
        "memory, checkpointing": (["model.residency=memory", "train.gradient_checkpointing=true"], None),
        "disk": (["model.residency=disk"], None)}
    if options.limit:
        variants[f"auto, {options.limit} MiB"] = ([], options.limit)
    results = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, (sets, limit) in variants.items():
            results[name].append(run(directory, sets, limit))
    adapters = {result[4] for of_one in results.values() for result in of_one}
    print(f"base {base_bytes >> 20} MiB; {'the same adapter to the bit' if len(adapters) == 1 else 'OTHER BITS'}")
    print("layers | s a step | s waited | peak MiB | estimate MiB")
    table = []
    for name, of_one in results.items():
        seconds, waited, peak, estimate = (statistics.median(column) for column in list(zip(*of_one))[:4])
        table.append({"layers": name, "s_per_step": round(seconds, 2), "s_waited": round(waited, 4), "peak_MiB": peak,
                      "estimate_MiB": estimate})
        print(f"{name} | {seconds:.1f} | {waited:.4f} | {peak:.0f} | {estimate:.0f}")
    if options.output:
        about = {"what": __doc__.splitlines()[0], "base_MiB": base_bytes >> 20, "layers": options.layers,
                 "hidden": options.hidden, "micro_batches": options.micro_batches, "same_bits": len(adapters) == 1}
        pathlib.Path(options.output).write_text(json.dumps(about | {"table": table}, indent=1) + "\n")
