#!/usr/bin/env python3
"""Checks `finetune serve` with OpenAI's own client, and under load.

    pip install openai jsonschema
    scripts/check_serve.py --finetune target/release/finetune --model target/smollm2

`--model`: an instruct model's directory. More checks come with

    --adapter RUN         an adapter of the model, as a model id, loaded and unloaded
    --tools FILE          a chat template with tools, such as qwen3.jinja
    --oracle PYTHON       a Python with torch and transformers: their greedy texts are ours
    --requests N          the load: so many mixed requests (0: none), then SIGTERM in the middle of streams

All servers run on the CPU at 127.0.0.1. RAYON_NUM_THREADS holds as everywhere. Prints a line for
each check, and exits with 1 if one did not hold.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import jsonschema
import openai

from serve_load import check_load, check_stop
from serve_server import SCHEMAS, Failure, Server, require

PROMPTS = ["What is the capital of France?", "Write one sentence about the sea.", "2 + 2 ="]
TOKENS = 24
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather of a city", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
THEIRS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
directory, tokens, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
texts = []
for prompt in prompts:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    texts.append(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True))
print(json.dumps(texts))
"""


class Checks:
    """What is checked with one server."""

    def __init__(self, server, options):
        self.server, self.options = server, options
        self.client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=300)
        self.id = self.client.models.list().data[0].id

    def chat(self, text="Say hello.", **more):
        settings = dict(model=self.id, max_tokens=TOKENS, temperature=0) | more
        return self.client.chat.completions.create(messages=[{"role": "user", "content": text}], **settings)

    def complete(self, prompt="Once upon a time", **more):
        settings = dict(model=self.id, max_tokens=TOKENS, temperature=0) | more
        return self.client.completions.create(prompt=prompt, **settings)

    def schemas(self):
        messages = [{"role": "user", "content": "Hi"}]
        for more in ({}, {"logprobs": True, "top_logprobs": 3}):
            self.of_schema("chat", {"messages": messages, "max_tokens": 4} | more)
        for more in ({}, {"logprobs": 2}):
            self.of_schema("completion", {"prompt": "Hi", "max_tokens": 4} | more)
        jsonschema.validate(self.server.json("/v1/models"), SCHEMAS["models"])

    def of_schema(self, kind, body):
        path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
        jsonschema.validate(self.server.json(path, body), SCHEMAS[kind])
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        status, headers, text = self.server.ask(path, body)
        require(status == 200 and headers["content-type"].startswith("text/event-stream"), f"{status} {text[:200]}")
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        require(events.pop() == "[DONE]", f"the stream ends with {text[-80:]!r}")
        for event in events:
            jsonschema.validate(json.loads(event), SCHEMAS[kind + " chunk"])
        require(json.loads(events[-1])["choices"] == [] and json.loads(events[-1])["usage"], "usage comes last")

    def streams(self):
        for settings in (dict(temperature=0), dict(temperature=1, seed=3)):
            whole, stream = self.chat(**settings), list(self.chat(
                stream=True, stream_options={"include_usage": True}, **settings))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
            require(text == whole.choices[0].message.content, f"{text!r} is not {whole.choices[0].message.content!r}")
            require(stream[-1].usage.completion_tokens == whole.usage.completion_tokens, "usage differs")
            require(stream[-2].choices[0].finish_reason == whole.choices[0].finish_reason, "finish_reason differs")
            whole, stream = self.complete(**settings), self.complete(stream=True, **settings)
            text = "".join(chunk.choices[0].text for chunk in stream)
            require(text == whole.choices[0].text, f"{text!r} is not {whole.choices[0].text!r}")
        usage = whole.usage
        require(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, f"{usage}")

    def choices(self):
        content = self.chat(logprobs=True, top_logprobs=5).choices[0].logprobs.content
        for token in content:
            top = [other.logprob for other in token.top_logprobs]
            require(len(top) == 5 and top == sorted(top, reverse=True), f"{top}")
            require(abs(top[0] - token.logprob) < 1e-6, f"greedy is not the likeliest: {token}")
        # A character may be several tokens.
        letters = self.chat("Answer with emojis only.", logprobs=True, temperature=1.3, seed=4).choices[0]
        bytes_of = b"".join(bytes(token.bytes) for token in letters.logprobs.content)
        # An answer may end within a character, or have bytes of none: those are shown as U+FFFD.
        shown = bytes_of.decode(errors="replace")
        require(letters.message.content.strip("\ufffd") in shown, f"{bytes_of} is not {letters.message.content!r}")
        old = self.complete(logprobs=2).choices[0]
        require("".join(old.logprobs.tokens) == old.text, f"{old.logprobs.tokens} is not {old.text!r}")
        require(old.logprobs.text_offset[0] == 0, "offsets begin at the answer")
        echo = self.complete(PROMPTS[0], echo=True, logprobs=1, max_tokens=1).choices[0]
        require(echo.text.startswith(PROMPTS[0]), f"{echo.text!r} does not begin with its prompt")
        first, *others = echo.logprobs.token_logprobs
        require(first is None and all(number <= 0 for number in others), f"{echo.logprobs.token_logprobs}")
        usual = self.complete().choices[0].text
        word = usual.split()[2]
        stopped = self.complete(stop=[word]).choices[0]
        require((stopped.text, stopped.finish_reason) == (usual[:usual.index(word)], "stop"), f"{stopped}")
        first = self.client.completions.create(model=self.id, prompt=[1, 96], max_tokens=1, temperature=0,
                                               logit_bias={"42": 100}, logprobs=0).choices[0].logprobs.tokens
        second = self.complete(prompt=[1, 96], max_tokens=2, logit_bias={"42": 100}, logprobs=0).choices[0]
        require(second.logprobs.tokens == first * 2, f"{second} is not twice {first}")
        one = self.chat(max_tokens=1)
        require((one.usage.completion_tokens, one.choices[0].finish_reason) == (1, "length"), f"{one}")
        prompts = PROMPTS[:2]
        several = [choice.text for choice in self.complete(prompt=prompts).choices]
        require(several == [self.complete(prompt=prompt).choices[0].text for prompt in prompts], f"{several}")
        newer = self.chat(max_tokens=openai.NOT_GIVEN, max_completion_tokens=2)
        require(newer.usage.completion_tokens == 2, f"{newer.usage}")

    def seeds(self):
        ask = lambda: self.chat(temperature=1.2, seed=11).choices[0].message.content
        alone = ask()
        answers = [[] for _ in range(12)]
        threads = [threading.Thread(target=lambda n=n: answers[n].append(
            ask() if n % 3 == 0 else self.chat(f"Number {n}?", temperature=1.2).choices[0].message.content))
            for n in range(12)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        require(all(answers[n] == [alone] for n in range(0, 12, 3)), f"{answers[::3]} is not {alone!r}")
        require(len({answer[0] for answer in answers}) > 6, "without a seed all answers are the same")

    def refusals(self):
        for kind, ask, param in [
            (openai.BadRequestError, lambda: self.chat(n=1000), "n"),
            (openai.BadRequestError, lambda: self.chat(temperature=-1), "temperature"),
            (openai.BadRequestError, lambda: self.chat(top_logprobs=2), "top_logprobs"),
            (openai.BadRequestError, lambda: self.chat(response_format={"type": "grammar"}), "response_format"),
            (openai.BadRequestError, lambda: self.chat(tool_choice="required"), "tool_choice"),
            (openai.BadRequestError, lambda: self.complete(prompt=["a", ["b"]]), "prompt"),
            (openai.BadRequestError, lambda: self.complete(prompt=[4_000_000]), "prompt"),
            (openai.BadRequestError, lambda: self.complete(max_tokens=10_000_000), "prompt"),
            (openai.NotFoundError, lambda: self.chat(model="nobody"), "model"),
            (openai.NotFoundError, lambda: self.client.embeddings.create(model=self.id, input="x"), None),
            (openai.NotFoundError, lambda: self.client.models.retrieve("nobody"), "model"),
        ]:
            try:
                ask()
            except kind as error:
                jsonschema.validate(error.response.json(), SCHEMAS["error"])
                require(error.param == param, f"the field is {error.param}, not {param}: {error}")
            else:
                raise Failure(f"{param} is not refused")
        for path, body, status in [("/v1/nothing", b"{}", 404), ("/v1/chat/completions", None, 405),
                                   ("/v1/chat/completions", b"{", 400)]:
            jsonschema.validate(self.server.json(path, body, status=status), SCHEMAS["error"])

    def texts(self):
        """The same texts as `finetune generate`, and as transformers."""
        ours = [self.complete(prompt).choices[0].text for prompt in PROMPTS]
        for prompt, text in zip(PROMPTS, ours):
            for raw in ("--raw", None):
                command = [self.options.finetune, "generate", self.options.model, "--prompt", prompt, "--json", raw,
                           "--max-new-tokens", TOKENS, "--temperature", 0, "--device", "cpu"]
                done = subprocess.run([str(part) for part in command if part is not None], capture_output=True)
                said = json.loads(done.stdout)["text"]
                text = text if raw else self.chat(prompt).choices[0].message.content
                require(said == text, f"generate says {said!r}, the server {text!r}")
        if self.options.oracle:
            command = [self.options.oracle, "-c", THEIRS, self.options.model, str(TOKENS), json.dumps(PROMPTS)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            theirs = json.loads(done.stdout)
            require(theirs == ours, f"transformers says {theirs}, the server {ours}")


def check_key(options):
    """401, and 429 with one slot and no queue."""
    with tempfile.TemporaryDirectory() as folder:
        key = Path(folder) / "key"
        key.write_text("secret\n")
        with Server(options.finetune, options.model, "--api-key-file", key, "--slots", 1, "--queue", 0) as server:
            jsonschema.validate(server.json("/v1/models", status=401), SCHEMAS["error"])
            client = openai.OpenAI(base_url=server.url + "/v1", api_key="secret", max_retries=0)
            model = client.models.list().data[0].id
            ask = lambda: client.completions.create(model=model, prompt="Once", max_tokens=400, stream=True,
                                                    logit_bias={"28": 100})
            stream = iter(ask())
            next(stream)
            try:
                ask()
            except openai.RateLimitError as error:
                jsonschema.validate(error.response.json(), SCHEMAS["error"])
                require(error.response.headers["retry-after"] == "1", "no Retry-After")
            else:
                raise Failure("a second request is not refused")
            require(len(list(stream)) > 100, "the first answer goes on")


def check_adapters(options):
    adapter = Path(options.adapter).resolve()
    with Server(options.finetune, options.model, "--adapter", f"first={adapter}",
                "--adapters-dir", adapter.parent) as server:
        checks = Checks(server, options)
        ids = lambda: [model.id for model in checks.client.models.list()]
        base, first = ids()
        require(first == "first", f"{first}")
        text = lambda model: checks.chat("What can you do?", model=model).choices[0].message.content
        require(text(base) != text(first), "the adapter changes nothing")
        loaded = server.ask("/v1/load_lora_adapter", {"lora_name": "second", "lora_path": adapter.name})
        require(loaded[0] == 200 and ids() == [base, "first", "second"], f"{loaded}")
        require(text("second") == text("first"), "the same adapter says something else")
        server.json("/v1/load_lora_adapter", {"lora_name": "second", "lora_path": adapter.name}, status=400)
        server.json("/v1/load_lora_adapter", {"lora_name": "third", "lora_path": "/etc"}, status=400)
        server.json("/v1/unload_lora_adapter", {"lora_name": "second"})
        require(ids() == [base, "first"], f"{ids()}")
        server.json("/v1/unload_lora_adapter", {"lora_name": base}, status=400)
        server.json("/v1/unload_lora_adapter", {"lora_name": "second"}, status=404)


def check_reasoning(options):
    """A template that opens reasoning: the answer is reasoning until its closing tag."""
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "opened.jinja"
        template.write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}<think>\n")
        with Server(options.finetune, options.model, "--chat-template", template) as server:
            checks = Checks(server, options)
            message = checks.chat().choices[0].message
            deltas = [chunk.choices[0].delta for chunk in checks.chat(stream=True) if chunk.choices]
            streamed = ["".join(getattr(delta, name, None) or "" for delta in deltas)
                        for name in ("reasoning_content", "content")]
            require(message.reasoning_content and "</think>" not in message.reasoning_content, f"{message}")
            require(streamed == [message.reasoning_content, message.content], f"{streamed} is not {message}")


def check_tools(options):
    """Tools go through the template. What the model says then is its own affair: either form is taken."""
    with Server(options.finetune, options.model, "--chat-template", options.tools) as server:
        checks = Checks(server, options)
        plain, asked = checks.chat("Weather in Paris?"), checks.chat("Weather in Paris?", tools=[TOOL])
        require(asked.usage.prompt_tokens > plain.usage.prompt_tokens + 40, "the template does not show the tools")
        off = checks.chat("Weather in Paris?", tools=[TOOL], tool_choice="none")
        require(off.usage.prompt_tokens == plain.usage.prompt_tokens, "tool_choice none shows the tools")
        others = [{"type": "function", "function": {"name": name}} for name in ("news", "time")]
        named = {"type": "function", "function": {"name": "weather"}}
        allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
        forced = checks.chat("Hi", tools=[*others, TOOL], tool_choice=allowed, max_tokens=200).choices[0]
        is_meant = lambda: forced.message.tool_calls[0].function.name == "weather"
        require(forced.finish_reason == "length" or is_meant(), f"{forced}")
        called = {"name": "weather", "arguments": '{"city": "Paris"}'}
        call = {"id": "call00001", "type": "function", "function": called}
        messages = [{"role": "user", "content": "Weather in Paris?"},
                    {"role": "assistant", "content": None, "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": "call00001", "content": "rain"}]
        for stream in (False, True):
            answer = checks.client.chat.completions.create(model=checks.id, messages=messages, tools=[TOOL],
                                                           max_tokens=8, stream=stream)
            if stream:
                require(list(answer)[-1].choices[0].finish_reason, "a stream has no end")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finetune", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--tools", type=Path)
    parser.add_argument("--oracle")
    parser.add_argument("--requests", type=int, default=300)
    options = parser.parse_args()
    failures = 0

    def check(name, work):
        nonlocal failures
        try:
            print(f"{name:<12}{work() or 'ok'}", flush=True)
        except (Failure, jsonschema.ValidationError, openai.OpenAIError, OSError, LookupError) as error:
            failures += 1
            print(f"{name:<12}WRONG: {type(error).__name__}: {str(error)[:600]}", flush=True)

    with Server(options.finetune, options.model) as server:
        checks = Checks(server, options)
        for work in (checks.schemas, checks.streams, checks.choices, checks.seeds, checks.refusals, checks.texts):
            check(work.__name__, work)
    check("key", lambda: check_key(options))
    check("reasoning", lambda: check_reasoning(options))
    for name, given, work in [("adapters", options.adapter, check_adapters), ("tools", options.tools, check_tools)]:
        check(name, (lambda: work(options)) if given else lambda: f"SKIPPED: no --{name.removesuffix('s')}")
    if options.requests:
        check("load", lambda: check_load(options))
        check("stop", lambda: check_stop(options))
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
