#!/usr/bin/env python3
"""Seconds to the first token and tokens a second of `finetune serve`, and of other servers of OpenAI's interface, with 1
and more requests at a time.

    benches/serve.py --finetune target/release/finetune --model target/smollm2 [--base NAME=PATH ...]
                     [--peer NAME='COMMAND {port} {slots} {threads}' ...] [--streams 1 4 16 64] [--threads 1] [--rounds 3]
                     [--python PYTHON] [--output FILE]

Greedy answers to prompts of text, streamed. Prompts differ, so that no beginning is known from before, except in the row
"known", which asks finetune the same long prompt again. The programs take turns in every round, each started anew; the
table has medians. Server and clients run on this machine; the server may use as many processors as --threads says.

--base serves another form of the model with finetune; the default is one, `bf16`, of --model. PYTHON (with `tokenizers`)
cuts the prompts from --text. A row "memory" has the MiB (resident) of the server after the most streams.
"""

import argparse
import http.client
import json
import os
import pathlib
import shlex
import socket
import statistics
import subprocess
import sys
import threading
import time

from decoding import environment
from lora_runs import processor

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


def ask(port, prompt, answer):
    """Seconds to the first token, to the last one, tokens of the answer, and the usage."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=900)
    body = {"prompt": prompt, "max_tokens": answer, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}
    begin = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    first, usage = None, None
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event.get("choices") and first is None:
            first = time.perf_counter() - begin
        usage = event.get("usage") or usage
    seconds = time.perf_counter() - begin
    return first, seconds, usage["completion_tokens"], usage


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server that answers, until the end of the block."""

    def __init__(self, command, given):
        self.port = free_port()
        words = shlex.split(command.format(port=self.port, slots=max(given.streams), threads=given.threads))
        bind = lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:given.threads])
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                        env=environment(given.threads), preexec_fn=bind)
        self.command = command

    def __enter__(self):
        end = time.monotonic() + 300
        while time.monotonic() < end and self.process.poll() is None:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return self
            except OSError:
                pass
            time.sleep(0.1)
        self.__exit__()
        sys.exit(f"no answer from: {self.command}")

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def memory(self):
        for line in pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        return 0.0


def measure(server, prompts, given, is_ours):
    """{row: figure} of one round."""
    ask(server.port, prompts.next(32), 4)
    found = {}
    for length in given.first:
        text = prompts.next(length)
        found[f"first token of {length}, s"] = ask(server.port, text, 1)[0]
        if is_ours and length == max(given.first):
            found["known, s"] = ask(server.port, text, 1)[0]
    for streams in given.streams:
        results = []
        texts = [prompts.next(32) for _ in range(streams)]
        threads = [threading.Thread(target=lambda text=text: results.append(ask(server.port, text, given.answer)))
                   for text in texts]
        begin = time.perf_counter()
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        seconds = time.perf_counter() - begin
        assert len(results) == streams, "a client failed"
        found[f"{streams} at a time, tokens/s"] = sum(tokens for _, _, tokens, _ in results) / seconds
    found["memory, MiB"] = server.memory()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finetune", required=True)
    parser.add_argument("--model", required=True, type=pathlib.Path)
    parser.add_argument("--base", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--first", type=int, nargs="+", default=[128, 2048], help="lengths of prompts")
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--text", default=str(pathlib.Path(__file__).parents[1] / "ARCHITECTURE.md"))
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("arguments", nargs="*", help="more arguments of `serve`")
    given = parser.parse_args()
    more = shlex.join(given.arguments)
    programs = {}
    for base in given.base or [f"bf16={given.model}"]:
        name, path = base.split("=", 1)
        programs[f"finetune {name}"] = f"{given.finetune} serve {path} --port {{port}} --slots {{slots}} {more}"
    programs |= dict(peer.split("=", 1) for peer in given.peer)
    rounds = given.rounds * len(programs)
    wanted = [(32, rounds * (1 + sum(given.streams)))] + [(length, rounds) for length in given.first]
    prompts = Prompts(given, wanted)
    results = {name: [] for name in programs}
    for number in range(given.rounds):
        for name, command in programs.items():
            with Server(command, given) as server:
                results[name].append(measure(server, prompts, given, name.startswith("finetune ")))
            print(f"round {number + 1}, {name}: {results[name][-1]}", file=sys.stderr)
    table = {name: {row: round(statistics.median(each[row] for each in of_one), 3) for row in of_one[0]}
             for name, of_one in results.items()}
    rows = list(dict.fromkeys(row for of_one in table.values() for row in of_one))
    print("| | " + " | ".join(table) + " |\n" + "| --- " * (len(table) + 1) + "|")
    for row in rows:
        print(f"| {row} | " + " | ".join(f"{of_one[row]:.3g}" if row in of_one else "" for of_one in table.values()) + " |")
    if given.output:
        about = {"machine": f"{os.cpu_count()} processors, {processor()['processor']}",
                 "date": time.strftime("%Y-%m-%d"), "threads": given.threads, "rounds": given.rounds,
                 "answer": given.answer, "table": table, "all": results}
        given.output.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
