#!/usr/bin/env python3
"""Checks the page of `finetune serve` in a headless Chromium: both sides are asked, and answer.

    scripts/check_page.py --finetune target/release/finetune --model target/smollm2 [--adapter NAME=DIR]

`--model`: an instruct model's directory. `--browser`: a Chromium or Chrome; by default the first that starts of those
in PATH, in /Applications, and those that Playwright has fetched (`playwright install chromium-headless-shell`). It is
spoken to through a pipe, in the DevTools protocol, so Python needs nothing else. `--seconds`: what all of it may take.
Prints a line for each check and exits with 1 if one did not hold; without a browser that starts it prints SKIPPED and
exits with 0.
"""

import argparse
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from serve_server import Failure, Server, require

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell",
         "chromium-headless-shell", "headless_shell"]
SECONDS = 120
START_SECONDS = 15
last_moment = float("inf")
TOKENS = 12


def deadline():
    """How long may be waited for the next thing."""
    return min(last_moment, time.monotonic() + SECONDS)


def starts(program):
    """Whether it is a browser that runs here. Some distributions have a script by that name that says where to get one."""
    seconds = max(0, min(START_SECONDS, last_moment - time.monotonic()))
    try:
        said = subprocess.run([program, "--version"], capture_output=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return said.returncode == 0 and any(word in said.stdout for word in (b"Chrom", b"HeadlessShell"))


def find_browser():
    """The path of a browser that starts, if there is one."""
    in_path = filter(None, map(shutil.which, NAMES))
    caches = [Path.home() / ".cache/ms-playwright", Path.home() / "Library/Caches/ms-playwright"]
    named = os.environ.get("PLAYWRIGHT_BROWSERS_PATH")
    fetched = [path for cache in ([Path(named)] if named else caches)
               for name in ("chrome-headless-shell", "headless_shell", "chrome")
               for path in sorted(cache.glob(f"*/*/{name}"), reverse=True)]
    apps = [Path("/Applications") / f"{name}.app/Contents/MacOS/{name}" for name in ("Google Chrome", "Chromium")]
    return next((str(path) for path in (*in_path, *fetched, *apps) if starts(path)), None)


class Browser:
    """A headless browser with one page."""

    def __init__(self, program):
        self.folder = tempfile.TemporaryDirectory()
        theirs, self.writing = os.pipe()
        self.reading, back = os.pipe()
        # The browser reads messages from descriptor 3 and writes them to 4, each with a zero byte behind it.
        words = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--remote-debugging-pipe", f"--user-data-dir={self.folder.name}", "about:blank"]
        shell = ["sh", "-c", f'exec "$0" "$@" 3<&{theirs} 4>&{back}', *words]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(shell, pass_fds=(theirs, back), **silent)
        os.close(theirs)
        os.close(back)
        self.rest, self.last, self.session, self.errors = b"", 0, None, []
        pages = self.call("Target.getTargets")["targetInfos"]
        page = next(info["targetId"] for info in pages if info["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.writing)
        os.close(self.reading)
        shutil.rmtree(self.folder.name, ignore_errors=True)

    def message(self):
        """The next message of the browser."""
        until = deadline()
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.reading], [], [], max(0, until - time.monotonic()))
            read = os.read(self.reading, 1 << 20) if ready else b""
            require(read, "the browser says nothing")
            self.rest += read
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **parameters):
        self.last += 1
        message = {"id": self.last, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.message()
            if answer.get("id") == self.last:
                require("error" not in answer, f"{method}: {answer.get('error')}")
                return answer["result"]
            self.note(answer)

    def note(self, event):
        """Keeps what a developer would see in red."""
        method, what = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(what["exceptionDetails"].get("text", "an exception"))
        elif method == "Runtime.consoleAPICalled" and what["type"] in ("error", "assert"):
            self.errors.append(json.dumps(what["args"]))
        elif method == "Log.entryAdded" and what["entry"]["level"] == "error":
            self.errors.append(f"{what['entry']['text']} {what['entry'].get('url', '')}")

    def value(self, script):
        """What a piece of JavaScript gives."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        details = answer.get("exceptionDetails")
        require(not details, f"{script}: {details}")
        return answer["result"].get("value")

    def until(self, what, script):
        """Waits until the script gives something true."""
        until = deadline()
        while not (value := self.value(script)):
            require(time.monotonic() < until, f"{what}: it does not come")
            time.sleep(0.05)
        return value


class Checks:
    """What is checked with one page."""

    def __init__(self, browser, server):
        self.browser, self.server = browser, server

    def fill(self, name, value):
        # As a person does it: the element hears of it.
        self.browser.value(f"(() => {{ const it = byId({json.dumps(name)}); it.focus();"
                           f" it.value = {json.dumps(str(value))}; it.dispatchEvent(new Event('change')); }})()")

    def ask(self, text):
        self.fill("text", text)
        self.browser.value("byId('send').click()")

    def said(self, kind):
        """The texts of the last bubbles of a kind, one of each column."""
        script = ("[...document.querySelectorAll('section')]"
                  f".map((one) => [...one.querySelectorAll('.said.{kind}')].at(-1))"
                  ".map((one) => one && [...one.childNodes].map((part) => part.textContent))")
        return self.browser.value(script)

    def answered(self):
        self.browser.until("the end of the answers", "running === null && byId('send').textContent === 'Send'")
        require(self.browser.value("document.querySelectorAll('.bad').length") == 0, f"an error: {self.said('bad')}")
        # [thoughts, words, numbers]
        answers = self.said("assistant")
        are_whole = all(answer and answer[1].strip() and "tokens" in answer[2] for answer in answers)
        require(are_whole, f"answers: {answers}")
        return [answer[1] for answer in answers]

    def opens(self):
        self.browser.call("Page.navigate", url=self.server.url + "/")
        there = "document.readyState === 'complete' && byId('columns') && models.length"
        count = self.browser.until("the models", there)
        ids = [model["id"] for model in self.server.json("/v1/models")["data"]]
        require(self.browser.value("models") == ids and count == len(ids), f"the page shows other models than {ids}")

    def both_sides_answer(self):
        self.browser.value("byId('two').click()")
        self.fill("temperature", 0)
        self.fill("max_tokens", TOKENS)
        self.ask("What is the capital of France?")
        shown = self.answered()
        require(len(shown) == 2, f"{len(shown)} sides answer")
        models = self.browser.value("columns.map((column) => column.select.value)")
        count = self.browser.value("models.length")
        require(len(set(models)) == min(count, 2), f"of {count} models these answer: {models}")
        for model, text in zip(models, shown):
            asked = {"model": model, "temperature": 0, "max_tokens": TOKENS,
                     "messages": [{"role": "user", "content": "What is the capital of France?"}]}
            want = self.server.json("/v1/chat/completions", asked)["choices"][0]["message"]["content"]
            require(text == want, f"{model} says {want!r}, and the page shows {text!r}")

    def a_conversation_goes_on(self):
        self.ask("And of Italy?")
        self.answered()
        lengths = self.browser.value("columns.map((column) => column.messages.length)")
        require(lengths == [4, 4], f"messages of both sides: {lengths}")

    def text_stays_text(self):
        self.ask("<img src=x onerror=\"console.error('run')\"> <b>bold</b>")
        self.answered()
        elements = self.browser.value("document.querySelectorAll('.talk img, .talk b').length")
        require(elements == 0, "a message became HTML")

    def an_answer_can_be_stopped(self):
        self.fill("max_tokens", 1000)
        self.ask("Count from one to a thousand, in words.")
        self.browser.until("the first words", "[...document.querySelectorAll('section')].every((one) => "
                           "[...one.querySelectorAll('.said.assistant')].at(-1)?.childNodes[1].textContent.length > 3)")
        self.browser.value("byId('send').click()")
        self.browser.until("the stop", "running === null")
        require([answer[2] for answer in self.said("assistant")] == ["stopped", "stopped"], "it does not say `stopped`")
        until = deadline()
        while self.server.metrics()["finetune_requests_running"] > 0:
            require(time.monotonic() < until, "the server goes on with an answer that was stopped")
            time.sleep(0.05)

    def a_new_conversation_is_empty(self):
        self.browser.value("byId('reset').click()")
        require(self.browser.value("document.querySelectorAll('.said').length") == 0, "messages stay")
        require(self.browser.value("document.querySelectorAll('.empty').length") == 2, "it is not empty")

    def nothing_went_wrong(self):
        # A browser may ask for an icon, which there is none of.
        errors = [error for error in self.browser.errors if "favicon" not in error]
        require(not errors, f"the console has errors: {errors}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finetune", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--browser")
    parser.add_argument("--seconds", type=float, default=600)
    options = parser.parse_args()
    global last_moment
    last_moment = time.monotonic() + options.seconds
    browser = options.browser or find_browser()
    if not browser:
        print("SKIPPED: there is no Chromium or Chrome that starts; --browser names one")
        return 0
    adapters = [word for adapter in options.adapter for word in ("--adapter", adapter)]
    failed = 0
    with Server(options.finetune, options.model, *adapters) as server, Browser(browser) as page:
        checks = Checks(page, server)
        for check in (checks.opens, checks.both_sides_answer, checks.a_conversation_goes_on, checks.text_stays_text,
                      checks.an_answer_can_be_stopped, checks.a_new_conversation_is_empty, checks.nothing_went_wrong):
            name = check.__name__.replace("_", " ")
            try:
                check()
                print(f"ok      {name}")
            except Failure as failure:
                failed += 1
                print(f"FAILED  {name}: {failure}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as problem:
        sys.exit(f"FAILED  {problem}")
