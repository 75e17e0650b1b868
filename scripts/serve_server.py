"""A `finetune serve` process, raw sockets to it, and JSON schemas of OpenAI's answers: see check_serve.py."""

import functools
import json
import re
import select
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

START_SECONDS = 120
ANSWER_SECONDS = 300


class Failure(Exception):
    """One check that did not hold, in words."""


def require(condition, what):
    if not condition:
        raise Failure(what)


class Server:
    """The process, on a free port."""

    def __init__(self, binary, model, *arguments):
        command = [str(binary), "serve", str(model), "--port", "0", "--device", "cpu", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        found, _, _ = select.select([self.process.stdout], [], [], START_SECONDS)
        line = self.process.stdout.readline() if found else ""
        address = re.search(r"http://127\.0\.0\.1:(\d+) ", line)
        if not address:
            self.process.kill()
            said = self.process.stderr.read()[-2000:]
            raise Failure(f"{' '.join(command)} does not say where it is: {line!r} {said}")
        self.port = int(address[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def ask(self, path, body=None, headers=()):
        """(status, headers, body). A body is JSON, or bytes as they are."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json", **dict(headers)})
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
                return answer.status, answer.headers, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read().decode()

    def json(self, path, body=None, headers=(), status=200):
        got, _, text = self.ask(path, body, headers)
        require(got == status, f"{path} answers {got}, not {status}: {text[:300]}")
        return json.loads(text)

    def metrics(self):
        lines = self.ask("/metrics")[2].splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] != "#")}

    @functools.cached_property
    def positions(self):
        """Tokens that the model was made for."""
        return self.json("/v1/models")["data"][0]["max_model_len"]

    def memory(self):
        """Resident MiB."""
        with open(f"/proc/{self.process.pid}/status") as status:
            kib = next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
        return kib / 1024

    def socket(self, path="/v1/chat/completions", body=b"", announced=None, timeout=60):
        """A connection on which a request was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout)
        length = len(body) if announced is None else announced
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection

    def wait_until_idle(self, seconds=120):
        """Until nothing runs or waits."""
        end = time.monotonic() + seconds
        while True:
            metrics = self.metrics()
            busy = [metrics[f"finetune_requests_{kind}"] for kind in ("running", "waiting")]
            if busy == [0, 0]:
                return
            require(time.monotonic() < end, f"(running, waiting) stay {busy}")
            time.sleep(0.1)

    def stop(self, seconds=60):
        """The exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failure(f"no end {seconds} s after SIGTERM") from None


def read_all(connection):
    """What comes until the other side closes."""
    parts = []
    with connection:
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def record(required, **optional):
    """A schema of an object without other fields."""
    return {"type": "object", "required": list(required), "properties": {**required, **optional},
            "additionalProperties": False}


def of(name, *more):
    return {"type": [name, *more]}


TEXT, WHOLE, NUMBER = of("string"), of("integer"), of("number")
TOKEN = dict(token=TEXT, logprob=NUMBER, bytes={"type": ["array", "null"], "items": WHOLE})
LOGPROBS = {"anyOf": [of("null"), record(dict(content={"type": "array", "items": record(
    {**TOKEN, "top_logprobs": {"type": "array", "items": record(TOKEN)}})}))]}
OLD_LOGPROBS = {"anyOf": [of("null"), record({
    "tokens": {"type": "array", "items": TEXT}, "token_logprobs": {"type": "array", "items": of("number", "null")},
    "top_logprobs": {"type": ["array", "null"], "items": of("object", "null")},
    "text_offset": {"type": "array", "items": WHOLE}})]}
FINISH = {"enum": ["stop", "length", "tool_calls"]}
USAGE = record(dict(prompt_tokens=WHOLE, completion_tokens=WHOLE, total_tokens=WHOLE),
               prompt_tokens_details=record(dict(cached_tokens=WHOLE)))
CALL = dict(id=TEXT, type={"const": "function"}, function=record(dict(name=TEXT, arguments=TEXT)))
MESSAGE = record(dict(role={"const": "assistant"}, content=of("string", "null")), reasoning_content=TEXT,
                 refusal=of("string", "null"), tool_calls={"type": "array", "items": record(CALL)})
DELTA = record({}, role=TEXT, content=of("string", "null"), reasoning_content=TEXT,
               tool_calls={"type": "array", "items": record({**CALL, "index": WHOLE})})


def answer(kind, choice, **more):
    one = dict(id=TEXT, object={"const": kind}, created=WHOLE, model=TEXT,
               choices={"type": "array", "maxItems": 1, "items": choice})
    return record({**one, **more}, system_fingerprint=of("string", "null"),
                  **({} if "usage" in more else {"usage": {"anyOf": [of("null"), USAGE]}}))


def choice(finish, **parts):
    return record(dict(index={"const": 0}, finish_reason=finish, **parts))


LATER = {"anyOf": [of("null"), FINISH]}
SCHEMAS = {
    "chat": answer("chat.completion", choice(FINISH, message=MESSAGE, logprobs=LOGPROBS), usage=USAGE),
    "chat chunk": answer("chat.completion.chunk", choice(LATER, delta=DELTA, logprobs=LOGPROBS)),
    "completion": answer("text_completion", choice(FINISH, text=TEXT, logprobs=OLD_LOGPROBS), usage=USAGE),
    "completion chunk": answer("text_completion", choice(LATER, text=TEXT, logprobs=OLD_LOGPROBS)),
    "models": record(dict(object={"const": "list"}, data={"type": "array", "items": record(
        dict(id=TEXT, object={"const": "model"}, created=WHOLE, owned_by=TEXT),
        root=TEXT, parent=of("string", "null"), max_model_len=WHOLE)})),
    "error": record(dict(error=record(dict(
        message=TEXT, type=TEXT, param=of("string", "null"), code=of("string", "null"))))),
}
