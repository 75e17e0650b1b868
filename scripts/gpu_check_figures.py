"""Reads what the programs of scripts/gpu-check left, and reckons.

gpu_check_figures.py run KEY=VALUE...      what a run came to: appends a line to results.jsonl, says it in a line
gpu_check_figures.py machine KEY=VALUE...  appends what is known of the machine
gpu_check_figures.py table RESULTS         the table, in Markdown
"""
import json, pathlib, re, statistics, sys

WARMUP = 3
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
# Dense TFLOP/s by the vendors' data sheets: matrix units in 16 bits with sums in f32, and plain
# f32. A name that is not here (the PCIe and NVL versions of Hopper are slower, laptops' chips too)
# is judged by a measured product.
PEAKS = [
    (r"H100 (80GB HBM3|SXM)", 989.0, 67.0),
    (r"H200(?! NVL)", 989.0, 67.0),
    (r"A100", 312.0, 19.5),
    (r"RTX 4090(?! (D|Laptop))", 165.0, 82.6),
]


def peak_flops(machine, dtype):
    """(FLOP/s, where that is from); (None, None) where nothing is known."""
    for pattern, narrow, wide in PEAKS:
        if re.search(pattern, machine.get("card") or ""):
            return 1e12 * (wide if dtype == "f32" else narrow), "data sheet"
    measured = (machine.get("matmul_tflops") or {}).get(dtype)
    return (1e12 * measured, "measured product") if measured else (None, None)


def model_flops(config, rows, length):
    """Operations that one LoRA step needs: forward, and backward to the activations.

    4 per weight of a matrix and token; the embedding is looked up, not multiplied. Attention: two products forward and four
    backward, of which causality leaves half. The adapter's own products (1 % at rank 16) and whatever is computed a second
    time under gradient checkpointing are not counted, for no program.
    """
    hidden, inner, heads = (config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    width, layers = config["head_dim"], config["num_hidden_layers"]
    attention = hidden * width * (2 * heads + 2 * config["num_key_value_heads"])
    weights = layers * (attention + 3 * hidden * inner) + config["vocab_size"] * hidden
    return 4 * weights * rows * length + layers * rows * 6 * length**2 * width * heads


def read(path):
    try:
        return pathlib.Path(path).read_text(errors="replace")
    except OSError:
        return ""


def json_lines(text):
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def size(text, pattern):
    found = re.search(pattern, text)
    return round(float(found.group(1)) * UNITS[found.group(2)]) if found else None


def number(text, pattern):
    found = re.search(pattern, text)
    return float(found.group(1)) if found else None


def finetune_figures(run, said):
    rows = [row for row in json_lines(read(f"{run}/metrics.jsonl")) if "loss" in row and "seconds" in row]
    counted = rows[WARMUP:]
    # On a GPU and on the CPU:
    # "12 steps in 9s, peak memory of the GPU 20.1 GiB (estimated 19.8 GiB), of the program 1.2 GiB"
    # "12 steps in 9s, peak memory 1.2 GiB (estimated 1.1 GiB)"
    amount = r"([\d.]+) (bytes|KiB|MiB|GiB)"
    end = next((line for line in said.splitlines() if "peak memory" in line), "")
    # "training on NVIDIA H100 80GB HBM3 (GPU, Vulkan), bf16"
    trained_on = re.search(r"^training on (.+), (\w+)$", said, re.MULTILINE)
    return {
        "steps": len(rows),
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in counted) if counted else None,
        "seconds_per_step": statistics.median(row["seconds"] for row in counted) if counted else None,
        "seconds": [row["seconds"] for row in rows],
        "losses": [row["loss"] for row in rows],
        "peak_bytes": size(end, rf"of the GPU {amount}"),
        "estimated_bytes": size(end, rf"estimated {amount}"),
        "host_peak_bytes": size(end, rf"(?:of the program|peak memory) {amount}"),
        "trained_on": trained_on.group(1) if trained_on else None,
        "computed_in": trained_on.group(2) if trained_on else None,
        "loaded_after": number(said, r"ready after ([\d.]+) s"),
        "first_step_after": number(said, r"first step done ([\d.]+) s after"),
    }


def torch_figures(stdout):
    found = [value for value in json_lines(stdout) if "tokens_per_second" in value]
    return {key: value for key, value in found[-1].items() if key not in ("program", "dtype", "checkpointing")} if found else {}


def failure(code, wall, limit, said):
    """Why a run failed, in a few words; None if it did not."""
    if code == 0:
        return None
    if code == 124 or code == 137 and wall >= limit:
        return f"stopped after {limit} s"
    if code == 137:
        return "killed, as the system does where its own memory runs out"
    if re.search(r"out of memory|OutOfMemory|OUT_OF_DEVICE_MEMORY", said, re.IGNORECASE):
        return "out of memory"
    errors = [line.strip() for line in said.splitlines() if re.search(r"error|panicked|^gpu_torch:", line, re.IGNORECASE)]
    return f"exit code {code}" + (f": {errors[-1][:90]}" if errors else "")


def run(given):
    given = {key: json.loads(value) if key in ("round", "rows", "length", "code", "checkpointing", "wall", "limit") else value
             for key, value in given.items()}
    stdout, said = read(given["stdout"]), read(given["stderr"]).replace("\r", "\n")
    ours = given["program"].startswith("finetune")
    found = finetune_figures(given["run"], said + stdout) if ours else torch_figures(stdout)
    machine = next((value["machine"] for value in json_lines(read(given["results"])) if "machine" in value), {})
    computed_in = found.get("computed_in") or given["dtype"]
    peak, _ = peak_flops(machine, computed_in)
    flops = model_flops(json.loads(read(given["config"])), given["rows"], given["length"])
    samples = [int(line) for line in read(given["memory"]).split() if line.isdigit()]
    result = {key: given[key] for key in ("round", "model", "dtype", "rows", "length", "checkpointing", "program")}
    result |= {"code": given["code"], "wall_seconds": given["wall"]}
    result["failure"] = failure(given["code"], given["wall"], given["limit"], said + stdout)
    result |= found
    if not result.get("tokens_per_second"):
        result["tokens_per_second"] = None
        result["failure"] = result["failure"] or "no figures in its output"
    elif result["failure"]:
        result["failure"] += f", {result['steps']} steps done"
    elif computed_in != given["dtype"] and result["trained_on"] != "CPU":
        # A device that lacks the type gets f32, which is right for a user and wrong in a
        # comparison.
        result["failure"] = f"computed in {computed_in}"
    rate = result["tokens_per_second"]
    result["model_flops_per_step"] = flops
    result["of_peak"] = flops * rate / (given["rows"] * given["length"]) / peak if rate and peak else None
    result["smi_peak_bytes"] = max(samples) * 2**20 if samples else None
    with open(given["results"], "a") as file:
        file.write(json.dumps(result) + "\n")
    losses = result.get("losses") or []
    parts = [f"{rate:,.0f} tokens/s" if rate else None, f"{result['of_peak']:.1%} of peak" if result["of_peak"] else None,
             f"tensors {gib(result.get('peak_bytes'))}, card {gib(result['smi_peak_bytes'])}" if rate else None,
             f"loss {losses[0]:.4f} to {losses[-1]:.4f}" if losses else None,
             f"{result['wall_seconds']:.0f} s in all", f"FAILED: {result['failure']}" if result["failure"] else None]
    print("  ".join(part for part in parts if part))
    sys.exit(1 if result["failure"] else 0)


def gib(size):
    return f"{size / 2**30:.1f} GiB" if size else "-"


def table(path):
    lines = list(json_lines(read(path)))
    machine = next((line["machine"] for line in lines if "machine" in line), {})
    cases = {}
    for line in lines:
        if "program" in line:
            case = (line["model"], line["dtype"], line["rows"], line["length"], line["checkpointing"])
            cases.setdefault(case, {}).setdefault(line["program"], []).append(line)
    facts = [machine.get("card") or "no NVIDIA card", f"driver {machine['driver']}" if machine.get("driver") else None]
    for dtype in ("bf16", "f32"):
        peak, source = peak_flops(machine, dtype)
        product = (machine.get("matmul_tflops") or {}).get(dtype)
        of_torch = f", torch's largest product {product:g}" if product and source == "data sheet" else ""
        facts.append(f"{dtype} peak {peak / 1e12:g} TFLOP/s ({source}{of_torch})" if peak else None)
    print("; ".join(fact for fact in facts if fact) + ".\n")
    columns = ["model", "type", "micro-batch", "recompute", "program", "tokens/s", "× torch", "of peak", "tensors",
               "estimated", "on the card", "first step after", "loss, first to last", "rounds"]
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    failures, far = [], []
    for case, programs in cases.items():
        model, dtype, rows, length, checkpointing = case
        what = [model, dtype, f"{rows} × {length}", "yes" if checkpointing else "no"]
        with_figures = {name: [one for one in runs if one["tokens_per_second"]] for name, runs in programs.items()}
        median = lambda runs, key: statistics.median([one[key] for one in runs if one.get(key) is not None] or [0])
        base = median(with_figures.get("torch+peft", []), "tokens_per_second")
        for name, runs in sorted(programs.items()):
            failed = next((one["failure"] for one in runs if one["failure"]), None)
            if failed:
                failures.append(f"{' '.join(what)}, {name}: {failed}")
            good = with_figures[name]
            if not good:
                print("| " + " | ".join(what + [name, failed] + [""] * 8) + " |")
                continue
            rate, losses = median(good, "tokens_per_second"), good[0]["losses"]
            share, first = median(good, "of_peak"), median(good, "first_step_after")
            shown = [f"{rate:,.0f}", f"{rate / base:.2f}" if base else "-", f"{share:.1%}" if share else "-",
                     gib(median(good, "peak_bytes")), gib(median(good, "estimated_bytes")), gib(median(good, "smi_peak_bytes")),
                     f"{first:.1f} s" if first else "-", f"{losses[0]:.4f} to {losses[-1]:.4f}", str(len(good))]
            other = good[0].get("computed_in") not in (None, dtype) and good[0]["trained_on"] != "CPU"
            name += f" (in {good[0]['computed_in']})" if other else ""
            print("| " + " | ".join(what + [name] + shown) + " |")
        # The adapter starts as nothing, so the first loss is the base model's, whatever computed
        # it.
        firsts = {name: runs[0]["losses"][0] for name, runs in with_figures.items() if runs}
        if firsts and max(firsts.values()) - min(firsts.values()) > 0.01 * min(firsts.values()):
            far.append(f"{' '.join(what)}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in firsts.items()))
    print("\nmicro-batch: rows × tokens, one a step. recompute: gradient checkpointing. × torch: tokens/s over those of torch+peft "
          "uncompiled.\nof peak: operations of the model, recomputed ones not counted again. tensors: what the program says it "
          "took at most;\nestimated: what finetune expected before the run; on the card: nvidia-smi's largest reading.")
    for title, notes in [("Failed:", failures), ("First losses differ by more than 1 %, and should not:", far)]:
        if notes:
            print(f"\n{title}\n\n" + "\n".join(f"- {note}" for note in notes))


def main():
    if sys.argv[1] == "table":
        return table(sys.argv[2])
    given = dict(argument.split("=", 1) for argument in sys.argv[2:])
    if sys.argv[1] == "run":
        return run(given)
    results = given.pop("results")
    matmul = next(json_lines(given.pop("matmul")), {})
    given |= {"matmul_tflops": matmul.get("tflops"), "torch": matmul.get("torch")}
    given["card"] = given.get("card") or (matmul.get("device") if matmul.get("device") != "cpu" else None)
    with open(results, "a") as file:
        file.write(json.dumps({"machine": given}) + "\n")


main()
