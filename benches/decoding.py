#!/usr/bin/env python3
"""Tokens per second of `finetune generate` on the CPU, beside llama.cpp, mlx-lm and transformers.

    python3 benches/decoding.py --model MODEL_DIR --python PYTHON [--rounds 3] [--rows 1 8] \\
        [--threads 1 2] [--only finetune llama.cpp] [--base NAME=PATH ...] [--output FILE]

Prompts of 128 tokens are read, then 64 tokens are generated for each, greedily. Time and CPU time
are those of the 64 tokens: for finetune the difference of two runs of the whole program, of 65 tokens
and of 1. The programs take turns in every round; the table has medians. Each process may run on as
many processors as it has threads (Linux). The tokens that programs of one precision choose are
compared with ours: `agree` is the least number of equal first ones, of 8.

The files are made: MODEL_DIR as GGUF by `finetune export` (bf16, f16), as Q8_0 and Q4_0 by llama.cpp, and
as mlx4 and mlx8 by `finetune quantize`. --base adds others to what finetune generates from. A file
that a program does not make or take is left out, with its message.

PYTHON has transformers, llama_cpp, mlx_lm and numpy. The floor of a token is the bytes of the weights
over the bandwidth at which these threads read as many bytes: a token reads every weight once.
"""
import argparse, json, os, pathlib, resource, statistics, subprocess, sys, tempfile, time

from lora_runs import processor

PEERS = pathlib.Path(__file__).with_name("decoding_peers.py")
LENGTH, ROWS = 128, 8


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finetune", default=os.environ.get("FINETUNE", "target/release/finetune"))
    parser.add_argument("--model", required=True, type=pathlib.Path)
    parser.add_argument("--python", default=sys.executable, help="the Python that has the peers")
    parser.add_argument("--text", default=str(pathlib.Path(__file__).parents[1] / "ARCHITECTURE.md"),
                        help="a file of some thousand tokens, or `random` for models of random weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--only", nargs="*", help="programs: finetune llama.cpp mlx-lm transformers")
    parser.add_argument("--base", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--output")
    return parser.parse_args()


def environment(threads):
    names = ["RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"]
    return dict(os.environ, HF_HUB_OFFLINE="1", **{name: str(threads) for name in names})


def run(line, threads):
    """What a command prints. It may use as many processors as it has threads."""
    def bind():
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    ended = subprocess.run(
        [str(word) for word in line], env=environment(threads), preexec_fn=bind, capture_output=True, text=True
    )
    if ended.returncode != 0:
        lines = (ended.stderr.strip() or ended.stdout.strip() or "no message").splitlines()
        raise RuntimeError(next((line for line in lines if line.startswith("error")), lines[-1])[:300])
    return ended.stdout


def peer(options, threads, *arguments):
    lines = run([options.python, PEERS, *arguments], threads).splitlines()
    return json.loads(next(line for line in lines if line.startswith("RESULT "))[7:])


def finetune(options, base, rows, threads, prompts, folder):
    """Seconds of a step over all rows, from a long and a short run."""
    path = pathlib.Path(folder, f"rows-{rows}.jsonl")
    lines = [{"input_ids": part + part[:1], "labels": [-100] * LENGTH + part[:1]} for part in prompts[:rows]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def timed(tokens):
        line = [options.finetune, "generate", base, "--data", path, "--device", "cpu", "--json"]
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        printed = run([*line, "--max-new-tokens", tokens], threads)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        answers = [json.loads(line)["token_ids"] for line in printed.splitlines()]
        if any(len(answer) != tokens for answer in answers):
            raise RuntimeError("an answer ended early: another --text")
        return time.perf_counter() - begun, cpu, answers

    short, long = timed(1), timed(1 + options.tokens)
    figures = {"seconds": long[0] - short[0], "cpu_seconds": long[1] - short[1], "steps": options.tokens}
    return {**figures, "answers": [answer[:8] for answer in long[2]]}


def size_of(path):
    """Bytes of the weights: of the GGUF file, or of the safetensors files of a directory."""
    path = pathlib.Path(path)
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.safetensors"))


def make_files(options, folder):
    """[(program, precision, path)], and what could not be made."""
    contestants, missing = [("finetune", "bf16", options.model)], {}

    def attempt(name, function):
        try:
            return function()
        except RuntimeError as error:
            missing[name] = str(error)

    def gguf(kind):
        output = folder / f"gguf-{kind}"
        run([options.finetune, "export", options.model, "--format", "gguf", "--dtype", kind, "--output", output], 2)
        return next(output.glob("*.gguf"))

    def quantized(kind):
        run([options.finetune, "quantize", options.model, "--to", kind, "--output", folder / kind], 2)
        return folder / kind

    files = {kind: attempt(f"{kind} GGUF", lambda: gguf(kind)) for kind in ["bf16", "f16"]}
    for kind in ["q8_0", "q4_0"] if files["bf16"] else []:
        output = folder / f"{kind}.gguf"
        if attempt(kind, lambda: run([options.python, PEERS, "quantize", files["bf16"], output, kind], 2)) is not None:
            files[kind] = output
    contestants += [("llama.cpp", kind, path) for kind, path in files.items() if path]
    contestants += [("finetune", kind, files[kind]) for kind in ["q8_0"] if kind in files]
    for kind in ["mlx4", "mlx8"]:
        if path := attempt(kind, lambda: quantized(kind)):
            contestants += [("finetune", kind, path), ("mlx-lm", kind, path)]
    contestants += [("mlx-lm", "bf16", options.model), ("transformers", "bf16", options.model)]
    contestants += [("finetune", *base.split("=", 1)) for base in options.base]
    return [found for found in contestants if not options.only or found[0] in options.only], missing


def measure(options, contestants, prompts, prompts_path, folder, missing):
    """{(program, precision, rows, threads): [figures of a round]}"""
    results = {}
    for number in range(options.rounds):
        for threads in options.threads:
            for rows in options.rows:
                for program, precision, path in contestants:
                    key, name = (program, precision, rows, threads), f"{program} {precision}"
                    if name in missing:
                        continue
                    try:
                        if program == "finetune":
                            figures = finetune(options, path, rows, threads, prompts, folder)
                        else:
                            figures = peer(options, threads, program, path, prompts_path, rows, options.tokens, threads)
                    except RuntimeError as error:
                        missing[name] = str(error)
                        continue
                    results.setdefault(key, []).append(figures)
                    rate = rows * figures["steps"] / figures["seconds"]
                    print(f"round {number + 1}, {threads} threads, {rows} rows, {name}: {rate:.1f} tokens/s", file=sys.stderr)
    return results


def table_of(results, sizes, speeds):
    table = []
    for (program, precision, rows, threads), rounds in sorted(results.items(), key=lambda item: item[0][3:1:-1] + item[0]):
        steps = [figures["seconds"] / figures["steps"] for figures in rounds]
        step = statistics.median(steps)
        row = {"threads": threads, "rows": rows, "program": program, "precision": precision, "rounds": len(rounds)}
        row["tokens_per_second"] = round(rows / step, 1)
        row["from_to"] = [round(rows / max(steps), 1), round(rows / min(steps), 1)]
        row["cpu_ms_per_token"] = round(statistics.median(f["cpu_seconds"] / f["steps"] for f in rounds) / rows * 1e3, 2)
        size = sizes[(program, precision)]
        floor = size / speeds[(size, threads)]
        row["weights_MB"], row["floor_ms_per_step"] = round(size / 1e6), round(floor * 1e3, 2)
        row["step_over_floor"] = round(step / floor, 2)
        ours = results.get(("finetune", "bf16", rows, threads))
        if ours and precision == "bf16":
            pairs = zip(ours[0]["answers"], rounds[0]["answers"])
            row["agree"] = min(sum(a == b for a, b in zip(left, right)) for left, right in pairs)
        table.append(row)
    return table


def versions(python):
    code = ("import importlib.metadata as m, json\nfound = {}\n"
            "for name in ['llama_cpp_python', 'mlx', 'mlx-lm', 'torch', 'transformers', 'numpy']:\n"
            "    try: found[name] = m.version(name)\n    except m.PackageNotFoundError: pass\nprint(json.dumps(found))")
    return json.loads(run([python, "-c", code], 1))


def main():
    options = parsed()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        prompts_path = folder / "prompts.json"
        run([options.python, PEERS, "prompts", options.model, options.text, ROWS, LENGTH, prompts_path], 2)
        prompts = json.loads(prompts_path.read_text())
        contestants, missing = make_files(options, folder)
        sizes = {(program, precision): size_of(path) for program, precision, path in contestants}
        results = measure(options, contestants, prompts, prompts_path, folder, missing)
        pairs = {(size, threads) for size in sizes.values() for threads in options.threads}
        speeds = {pair: peer(options, pair[1], "bandwidth", *pair)["bytes_per_second"] for pair in sorted(pairs)}
    table = table_of(results, sizes, speeds)
    columns = [key for key in table[0] if key not in ("rounds", "from_to")]
    print("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    for row in table:
        print("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |")
    for what, why in missing.items():
        print(f"left out: {what}: {why}")
    if options.output:
        text = {
            "machine": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} processors, {processor()['processor']}",
            "date": time.strftime("%Y-%m-%d"),
            "command": "python3 benches/decoding.py " + " ".join(sys.argv[1:]),
            "versions": versions(options.python),
            "read_GB_per_second": {f"{size // 1_000_000} MB, {threads} threads": round(speed / 1e9, 1) for (size, threads), speed in speeds.items()},
            "left_out": missing,
            "table": table,
        }
        pathlib.Path(options.output).write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
