#!/usr/bin/env python3
"""Seconds to the first token and tokens a second of `finetune serve`, with 1 and more requests at a time.

    benches/serve.py --finetune target/release/finetune --model target/smollm2 [--streams 1 4 16] [--threads 1]

Greedy answers, streamed. Prompts differ, so that no beginning is known from before, except in the last line, which
asks the same long prompt again. Prints a table. The server runs on this machine, and the clients beside it.
"""

import argparse
import http.client
import json
import os
import subprocess
import threading
import time


def ask(port, tokens, answer):
    """Seconds to the first token, seconds to the last one, and tokens of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = {"prompt": tokens, "max_tokens": answer, "temperature": 0, "stream": True,
            "logit_bias": {}, "stream_options": {"include_usage": True}}
    begin = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    first, usage = None, None
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event["choices"] and first is None:
            first = time.perf_counter() - begin
        usage = event.get("usage") or usage
    return first, time.perf_counter() - begin, usage


def prompt(seed, length):
    """Tokens of no special meaning."""
    return [1000 + (seed * 7919 + n * 104729) % 30000 for n in range(length)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finetune", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("arguments", nargs="*", help="more arguments of `serve`")
    given = parser.parse_args()
    environment = dict(os.environ)
    if given.threads:
        environment["RAYON_NUM_THREADS"] = str(given.threads)
    command = [given.finetune, "serve", given.model, "--port", "0", "--slots", str(max(given.streams)), *given.arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    try:
        port = int(server.stdout.readline().split("http://")[1].split(" ")[0].rsplit(":", 1)[1])
        ask(port, prompt(0, 16), 4)
        print("| | |\n| --- | --- |")
        for length in (128, 2048):
            firsts = sorted(ask(port, prompt(length + n, length), 1)[0] for n in range(1, 4))
            print(f"| first token, prompt of {length} tokens | {firsts[1]:.2f} s |")
        again = ask(port, prompt(2051, 2048), 1)
        known = again[2]["prompt_tokens_details"]["cached_tokens"]
        print(f"| the last one again, {known} tokens known | {again[0]:.2f} s |")
        for streams in given.streams:
            results, threads = [], []
            for n in range(streams):
                work = lambda n=n: results.append(ask(port, prompt(5000 + streams * 100 + n, 32), given.answer))
                threads.append(threading.Thread(target=work))
            begin = time.perf_counter()
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            seconds = time.perf_counter() - begin
            tokens = sum(usage["completion_tokens"] for _, _, usage in results)
            print(f"| {streams} at a time | {tokens / seconds:.0f} tokens a second |")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
