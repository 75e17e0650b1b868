"""Load on `finetune serve`: see check_serve.py."""

import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from serve_server import Failure, Server, read_all, require

SLOTS, QUEUE = 8, 16
# More than there is room for, so that some are refused.
CLIENTS = 40
# After so many requests everything has its size.
WARM = 0.3
MOST_MIB = 24

BROKEN = [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000] + [b'{"prompt": %s}' % rest for rest in (
    b"1", b"[]", b"[-1]", b"[1e9]", b'"x", "max_tokens": "many"', b'"x", "stop": {"a": 1}', b'"x", "seed": 1e40',
    b'"x", "logit_bias": {"-1": 3}', b'"x", "temperature": 1e999')]


def text(length, first=0):
    return " ".join(f"word{(first + n) % 97}" for n in range(length))


def ask(server, body, path="/v1/completions"):
    return server.ask(path, body)[0]


def whole(server, chance):
    settings = dict(max_tokens=chance.randint(1, 12), temperature=chance.choice([0, 1]), seed=chance.randint(0, 9))
    messages = [{"role": "user", "content": text(chance.randint(1, 60), chance.randint(0, 96))}]
    return ask(server, {"messages": messages, **settings}, "/v1/chat/completions"), {200, 429}


def long(server, chance):
    """Prompts of several parts, of which a few begin alike."""
    words = min(500, chance.randint(server.positions // 16, server.positions // 8))
    return ask(server, {"prompt": text(words, chance.randint(0, 2)), "max_tokens": 2}), {200, 429}


def cancelled(server, chance):
    body = json.dumps({"prompt": text(20), "max_tokens": 200, "stream": chance.random() < 0.7}).encode()
    with server.socket("/v1/completions", body) as connection:
        if chance.random() < 0.5:
            connection.settimeout(chance.random())
            try:
                connection.recv(100)
            except TimeoutError:
                pass
        if chance.random() < 0.3:
            # A reset, not an orderly end.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    return 0, {0}


def slow(server, chance):
    body = json.dumps({"prompt": text(5), "max_tokens": 20, "stream": True, "logprobs": 5}).encode()
    with server.socket("/v1/completions", body) as connection:
        got = b""
        while part := connection.recv(chance.randint(20, 400)):
            got += part
            time.sleep(0.01)
    status = int(got.split(b" ", 2)[1])
    require(status != 200 or b"data: [DONE]" in got, "a slow reader's stream has no end")
    return status, {200, 429}


def broken(server, chance):
    return ask(server, chance.choice(BROKEN)), {400}


def huge(server, chance):
    choice = chance.randint(0, 2)
    if choice == 0:
        return ask(server, {"prompt": "x" * 3_000_000}), {400}
    if choice == 1:
        return ask(server, {"prompt": [5] * 500_000}), {400}
    with server.socket("/v1/completions", b"{", announced=1 << 40) as connection:
        return int(connection.recv(100).split(b" ", 2)[1]), {413}


def half_open(server, chance):
    """A request that never comes to its end, and one whose client only closes its own side."""
    if chance.random() < 0.5:
        connection = server.socket("/v1/completions", b'{"prompt"', announced=1000)
        time.sleep(chance.random() / 10)
        connection.close()
        return 0, {0}
    body = json.dumps({"prompt": "Once", "max_tokens": 3}).encode()
    connection = server.socket("/v1/completions", body)
    connection.shutdown(socket.SHUT_WR)
    got = read_all(connection)
    return int(got.split(b" ", 2)[1]) if got else 0, {0, 200, 429}


KINDS = [whole] * 5 + [long, cancelled, cancelled, slow, broken, broken, huge, half_open]


def check_load(options):
    counts, memory, lock = {}, [], threading.Lock()
    first = {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 1, "seed": 5, "logprobs": 3}
    with Server(options.finetune, options.model, "--slots", SLOTS, "--queue", QUEUE) as server:
        before = server.json("/v1/completions", first)["choices"]

        def one(n):
            chance = random.Random(n)
            kind = chance.choice(KINDS)
            status, wanted = kind(server, chance)
            require(status in wanted, f"request {n}, {kind.__name__}: {status}")
            with lock:
                counts[kind.__name__, status] = counts.get((kind.__name__, status), 0) + 1

        def several(numbers):
            with ThreadPoolExecutor(CLIENTS) as pool:
                list(pool.map(one, numbers))
            server.wait_until_idle()
            # Earlier prompts are kept up to a bound of their own.
            memory.append(server.memory() - server.metrics()["finetune_prefix_bytes"] / (1 << 20))

        # Pauses in which nothing runs, so that sizes can be compared.
        bounds = [round(options.requests * part) for part in (0, WARM, 0.55, 0.8, 1)]
        for begin, end in zip(bounds, bounds[1:]):
            several(range(begin, end))
        require(server.json("/health") == {"status": "ok"}, "not healthy")
        after = server.json("/v1/completions", first)["choices"]
        require(after == before, f"the first request is answered in another way: {after}, not {before}")
    print(f"{'':<12}" + ", ".join(f"{kind} {status or 'left'}: {n}" for (kind, status), n in sorted(counts.items())))
    shown = ", ".join(f"{mib:.0f}" for mib in memory)
    # Before, threads still meet words for the first time, which they remember.
    if options.requests >= 1000:
        require(memory[-1] - memory[-2] < MOST_MIB, f"memory grows: {shown} MiB")
    return f"ok: resident after {', '.join(map(str, bounds[1:]))} requests, without earlier prompts: {shown} MiB"


def check_stop(options):
    """SIGTERM in the middle of streams: their clients get an error at the end, and the exit code is 0."""
    with Server(options.finetune, options.model, "--grace", 0) as server:
        asked = {"prompt": "Once", "max_tokens": server.positions // 2, "stream": True, "logit_bias": {"28": 100}}
        body = json.dumps(asked).encode()
        streams = [server.socket("/v1/completions", body) for _ in range(10)]
        # A request that comes after the signal is refused, so all must have begun.
        heads = [stream.recv(1 << 12) for stream in streams]
        require(all(head.startswith(b"HTTP/1.1 200") for head in heads), f"{heads}")
        ends = ThreadPoolExecutor(len(streams)).map(read_all, streams)
        begun = time.monotonic()
        code = server.stop()
        seconds = time.monotonic() - begun
        for end in ends:
            if b"service_unavailable_error" not in end[-400:] or not end.rstrip(b"0\r\n").endswith(b"data: [DONE]"):
                raise Failure(f"a stream ends with {end[-200:]!r}")
    require(code == 0 and seconds < 10, f"exit code {code} after {seconds:.1f} s")
    return f"ok: exit code 0 after {seconds:.1f} s"
