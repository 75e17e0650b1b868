#!/usr/bin/env python3
"""Seconds to the first token and tokens a second of `finetune serve`, and of other servers of OpenAI's interface, with 1
and more requests at a time.

    benches/serve.py --finetune target/release/finetune --model target/smollm2 [--base NAME=PATH ...]
                     [--peer NAME='COMMAND {port} {slots} {threads}' ...] [--launch stages:2 tensor:2 ...]
                     [--streams 1 4 16 64] [--threads 1] [--rounds 3] [--held 16 --held-tokens 256]
                     [--python PYTHON] [--output FILE]

Greedy answers to prompts of text, streamed. Prompts differ, so that no beginning is known from before, except in the row
"known", which asks finetune the same long prompt again. The programs take turns in every round, each started anew; the
table has medians. Server and clients run on this machine; the server may use as many processors as --threads says.

--base serves another form of the model with finetune; the default is one, `bf16`, of --model. --launch serves the first
of them over so many processes, with --threads each: `finetune launch -n 2 --parallel stages -- serve`. They may use as
many processors as they have threads, if the machine has so many. PYTHON (with `tokenizers` and `numpy`) cuts the prompts
from --text, and measures how fast memory is read.

Rows besides: "decoding" has one answer's tokens a second from its second token on. "share of the floor" compares that with
the bandwidth at which as many threads read memory, over the bytes of the weights: a token reads every weight once. Stages
compute one after the other, so theirs is the bandwidth of one process. "each further process" is what a token takes
longer than in one process, over the processes beyond the first. "memory" is resident, of all processes of the server:
after the most streams; and in a server started anew, what each of --held answers of --held-tokens takes beyond the first
one, at the peak. Servers that reserve room for all slots at the start have nothing there. Keys and values alone are
printed below. Prompts and answers count.
"""

import argparse
import json
import os
import pathlib
import shlex
import signal
import statistics
import subprocess
import sys
import time

from decoding import peer, size_of
from lora_runs import processor
from serving import Server, ask, ask_together

SHORT = 32
CUT = """
import json, sys, tokenizers
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
ids = tokenizer.encode(open(sys.argv[2]).read(), add_special_tokens=False).ids
found = {}
for length, count in json.loads(sys.argv[3]):
    texts, at = [], length * 7 % 1000
    while len(texts) < count:
        text = tokenizer.decode([ids[(at + n) % len(ids)] for n in range(length)])
        at += length // 2 + 17
        if len(tokenizer.encode(text, add_special_tokens=False).ids) == length:
            texts.append(text)
    found[length] = texts
print(json.dumps(found))
"""


class Prompts:
    """Texts of so many tokens, none of them twice."""

    def __init__(self, given, wanted):
        command = [given.python, "-c", CUT, given.model / "tokenizer.json", given.text, json.dumps(wanted)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        self.texts = {int(length): texts for length, texts in json.loads(printed).items()}

    def next(self, length):
        return self.texts[length].pop()


class Program:
    """A server to measure: its command, its processes, and the file of its weights."""

    def __init__(self, given, command, weights, ranks=1, together=True):
        self.command, self.ranks = command, ranks
        self.weights = size_of(weights)
        self.is_ours = shlex.split(command)[0] == given.finetune
        self.slots = max([*given.streams, given.held])
        self.threads = given.threads
        here = len(os.sched_getaffinity(0))
        self.processors = min(here, given.threads * ranks)
        # Threads that read weights at the same time.
        self.readers = self.processors if together else given.threads

    def start(self):
        return Server(self.command, self.slots, self.threads, self.processors)


def weights_in(command, model):
    """The file or directory of weights that a command names, or --model."""
    for word in shlex.split(command):
        path = pathlib.Path(word.partition("=")[2] or word)
        if path.suffix == ".gguf" and path.is_file() or path.is_dir() and any(path.glob("*.safetensors")):
            return path
    return model


def programs_of(given):
    """{name: program}, in the order in which they take turns."""
    more = shlex.join(given.arguments)
    bases = dict(base.split("=", 1) for base in given.base or [f"bf16={given.model}"])
    serve = lambda path: f"serve {shlex.quote(path)} --port {{port}} --slots {{slots}} {more}"
    finetune = shlex.quote(given.finetune)
    programs = {f"finetune {name}": Program(given, f"{finetune} {serve(path)}", path) for name, path in bases.items()}
    name, path = next(iter(bases.items()))
    for each in given.launch:
        how, _, ranks = each.partition(":")
        command = f"{finetune} launch -n {int(ranks)} --parallel {how} -- {serve(path)}"
        programs[f"finetune {name}, {how} of {ranks}"] = Program(given, command, path, int(ranks), how == "tensor")
    for each in given.peer:
        name, command = each.split("=", 1)
        programs[name] = Program(given, command, weights_in(command, given.model))
    return programs


def speeds_of(server, prompts, given, is_ours):
    """{row: figure} of one server in one round."""
    ask(server.port, prompts.next(SHORT), 4)
    found = {}
    for length in given.first:
        text = prompts.next(length)
        found[f"first token of {length}, s"] = ask(server.port, text, 1).first
        if is_ours and length == max(given.first):
            found["known, s"] = ask(server.port, text, 1).first
    rate = ask(server.port, prompts.next(SHORT), given.answer).rate
    if rate:
        found["decoding, tokens/s"] = rate
    for streams in given.streams:
        answers, seconds = ask_together(server.port, [prompts.next(SHORT) for _ in range(streams)], given.answer)
        found[f"{streams} at a time, tokens/s"] = sum(answer.tokens for answer in answers) / seconds
    found["memory, MiB"] = server.memory()
    return found


def memory_of(server, prompts, given):
    """{row: figure}: what an answer takes beyond the first one, and the tokens of one."""
    ask(server.port, prompts.next(SHORT), 4)
    peaks, tokens = [], []
    for count in (1, given.held):
        texts = [prompts.next(SHORT) for _ in range(count)]
        peak, (answers, _) = server.peak_during(lambda: ask_together(server.port, texts, given.held_tokens))
        peaks.append(peak)
        tokens = [(answer.prompt_tokens or SHORT) + answer.tokens for answer in answers]
    return {"memory with 1 answer, MiB": peaks[0], f"memory with {given.held} answers, MiB": peaks[1],
            "memory an answer, MiB": (peaks[1] - peaks[0]) / (given.held - 1),
            "tokens of one of these": statistics.mean(tokens)}


def key_bytes(model):
    """Bytes of a token's keys and values in 16 bits, by the model's config.json. None where they are kept otherwise."""
    config = json.loads((model / "config.json").read_text())
    config = config.get("text_config", config)
    try:
        heads = config["num_attention_heads"]
        each = config.get("head_dim") or config["hidden_size"] // heads
        return 2 * 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * each
    except KeyError:
        return None


def table_of(results, bandwidths, programs):
    """{program: {row: median}}, with the shares of the floor and the cost of further processes."""
    table = {}
    for name, rounds in results.items():
        rows = list(dict.fromkeys(row for one in rounds for row in one))
        table[name] = {row: statistics.median(one[row] for one in rounds if row in one) for row in rows}
    alone = next(iter(table.values())).get("decoding, tokens/s")
    for name, found in table.items():
        rate, program = found.get("decoding, tokens/s"), programs[name]
        if rate and program.weights:
            floor = statistics.median(bandwidths[program.weights, program.readers]) / program.weights
            found |= {"floor, tokens/s": floor, "share of the floor": rate / floor}
        if rate and alone and program.ranks > 1:
            found["each further process, ms a token"] = (1 / rate - 1 / alone) * 1e3 / (program.ranks - 1)
    return {name: {row: round(figure, 3) for row, figure in found.items()} for name, found in table.items()}


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finetune", required=True)
    parser.add_argument("--model", required=True, type=pathlib.Path)
    parser.add_argument("--base", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--launch", nargs="+", default=[], metavar="HOW:RANKS", help="stages:2, tensor:4, ...")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--first", type=int, nargs="+", default=[128, 2048], help="lengths of prompts")
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--held", type=int, default=16, help="answers whose memory is compared with one's; 0: not measured")
    parser.add_argument("--held-tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--text", default=str(pathlib.Path(__file__).parents[1] / "ARCHITECTURE.md"))
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("arguments", nargs="*", help="more arguments of `serve`")
    given = parser.parse_args()
    for each in given.launch:
        how, _, ranks = each.partition(":")
        if how not in ("stages", "tensor") or not ranks.isdigit() or int(ranks) < 2:
            parser.error(f"--launch {each}: write stages:2 or tensor:2, with 2 processes or more")
    if given.held == 1 or given.held < 0:
        parser.error("--held: 2 answers or more, or 0")
    return given


def measured(given, programs, prompts):
    """({program: [figures of a round]}, {(bytes, threads): [bytes a second of a round]}, what was left out)"""
    results, bandwidths, missing = {}, {}, {}
    for number in range(given.rounds):
        for weights, readers in dict.fromkeys((each.weights, each.readers) for each in programs.values() if each.weights):
            speed = peer(given, readers, "bandwidth", weights, readers)["bytes_per_second"]
            bandwidths.setdefault((weights, readers), []).append(speed)
        for name, program in programs.items():
            if name in missing:
                continue
            try:
                with program.start() as server:
                    found = speeds_of(server, prompts, given, program.is_ours)
                if given.held:
                    with program.start() as server:
                        found |= memory_of(server, prompts, given)
            except (OSError, RuntimeError, ValueError) as error:
                missing[name] = f"round {number + 1}: {error}"
                print(f"{name}: {missing[name]}", file=sys.stderr)
                continue
            results.setdefault(name, []).append(found)
            print(f"round {number + 1}, {name}: {found}", file=sys.stderr)
    return results, bandwidths, missing


def main():
    given = parsed()
    # So that a server does not outlive a run that is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    programs = programs_of(given)
    rounds = given.rounds * len(programs)
    short = 2 + sum(given.streams) + (2 + given.held if given.held else 0)
    prompts = Prompts(given, [(SHORT, rounds * short)] + [(length, rounds) for length in given.first])
    results, bandwidths, missing = measured(given, programs, prompts)
    if not results:
        sys.exit("no program could be measured")
    table = table_of(results, bandwidths, programs)
    rows = list(dict.fromkeys(row for of_one in table.values() for row in of_one))
    print("| | " + " | ".join(table) + " |\n" + "| --- " * (len(table) + 1) + "|")
    for row in rows:
        print(f"| {row} | " + " | ".join(f"{of_one[row]:.3g}" if row in of_one else "" for of_one in table.values()) + " |")
    bytes_of_token = key_bytes(given.model)
    about = {"machine": f"{os.cpu_count()} processors, {processor()['processor']}", "date": time.strftime("%Y-%m-%d"),
             "threads": given.threads, "rounds": given.rounds, "answer": given.answer,
             "read_GB_per_second": {f"{weights // 1_000_000} MB, {readers} threads": round(statistics.median(speeds) / 1e9, 2)
                                    for (weights, readers), speeds in bandwidths.items()},
             "key_and_value_bytes_of_a_token_in_16_bits": bytes_of_token, "left_out": missing, "table": table, "all": results}
    if given.held and bytes_of_token:
        mib = bytes_of_token * (SHORT + given.held_tokens) / 2**20
        print(f"Keys and values of {SHORT + given.held_tokens} tokens: {mib:.3g} MiB in 16 bits, {2 * mib:.3g} MiB in 32.")
    for name, why in missing.items():
        print(f"left out: {name}: {why}")
    if given.output:
        given.output.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
