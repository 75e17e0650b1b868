"""A server of OpenAI's interface in a process of its own, and a client that times what it streams: see serve.py."""

import http.client
import json
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import tempfile
import threading
import time

from decoding import environment

START_SECONDS = 300


class Answer:
    """What one streamed request brought, and when."""

    def __init__(self, seconds, pieces, first, usage, finish, asked):
        self.seconds, self.first = seconds, first
        usage = usage or {}
        # Without a usage, an answer that was cut has the tokens that were asked for, and another one about a token a piece.
        self.tokens = usage.get("completion_tokens") or (asked if finish == "length" else len(pieces))
        self.prompt_tokens = usage.get("prompt_tokens")
        # Some servers hold a word back until it is whole, so a piece may be several tokens: their mean is taken.
        gaps = pieces[-1] - pieces[0] if len(pieces) > 1 else 0.0
        self.rate = (len(pieces) - 1) / gaps * self.tokens / len(pieces) if gaps > 0 else None


def post(port, body):
    """The connection and the response of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1800)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def first_model(port):
    """The id of the first model that the server lists."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/v1/models")
    return json.loads(connection.getresponse().read())["data"][0]["id"]


def ask(port, prompt, tokens):
    """The greedy answer of so many tokens."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}
    begin = time.perf_counter()
    connection, response = post(port, body)
    said = response.read() if response.status != 200 else b""
    if b"model" in said:
        # Most servers take the model that they have. The others want its id.
        body["model"] = first_model(port)
        begin = time.perf_counter()
        connection, response = post(port, body)
        said = response.read() if response.status != 200 else b""
    if response.status != 200:
        raise RuntimeError(f"port {port} answers {response.status}: {said[:300]}")
    first, usage, finish, pieces = None, None, None, []
    for line in response:
        if not line.startswith(b"data:") or (text := line[5:].strip()) == b"[DONE]":
            continue
        event, now = json.loads(text), time.perf_counter()
        if "error" in event:
            raise RuntimeError(f"port {port} ends a stream with {event['error']}")
        usage = event.get("usage") or usage
        for choice in event.get("choices") or []:
            first = first or now - begin
            finish = choice.get("finish_reason") or finish
            if choice.get("text"):
                pieces.append(now)
    seconds = time.perf_counter() - begin
    connection.close()
    return Answer(seconds, pieces, first, usage, finish, tokens)


def ask_together(port, texts, tokens):
    """The answers to all texts at a time, and the seconds until the last one."""
    answers, failures = [], []

    def one(text):
        try:
            answers.append(ask(port, text, tokens))
        except (OSError, RuntimeError, ValueError) as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=[text]) for text in texts]
    begin = time.perf_counter()
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    if failures:
        raise failures[0]
    return answers, time.perf_counter() - begin


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server that answers, until the end of the block. It may use so many processors."""

    def __init__(self, command, slots, threads, processors):
        self.port = free_port()
        words = shlex.split(command.format(port=self.port, slots=slots, threads=threads))
        bind = lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:processors])
        # A session of its own, so that what it has started can be ended with it.
        self.said = tempfile.TemporaryFile()
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=self.said,
                                        env=environment(threads), preexec_fn=bind, start_new_session=True)
        self.command = command

    def __enter__(self):
        end = time.monotonic() + START_SECONDS
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
        self.said.seek(0)
        raise RuntimeError(f"no answer from: {self.command}: {self.said.read()[-600:].decode(errors='replace').strip()}")

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def processes(self):
        """Ids of the server's process and of all that it started."""
        found = [self.process.pid]
        for pid in found:
            for children in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
                found += map(int, children.read_text().split())
        return found

    def memory(self):
        """Resident MiB of all its processes."""
        kib = 0
        for pid in self.processes():
            try:
                lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
            except OSError:
                continue
            kib += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
        return kib / 1024

    def peak_during(self, work):
        """The most resident MiB while `work` is done, and what it returns."""
        most, done = [self.memory()], threading.Event()

        def watch():
            while not done.wait(0.05):
                most.append(self.memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            result = work()
        finally:
            done.set()
            watcher.join()
        return max(most), result
