#!/usr/bin/env python3
"""How long until all others know of a lost rank, and until the run goes on.

Runs `finetune launch --max-restarts 1` on the quickstart. One rank is killed, or frozen, at a
random moment. With --stages the ranks hold the model's four layers together, each row is a
micro-batch, and the rank is stopped in turn while it sends or receives, forward or back, whichever
rank it is.

  python3 benches/losses.py --finetune target/release/finetune --ranks 3 --trials 30
  python3 benches/losses.py --finetune target/release/finetune --ranks 3 --stages --trials 24 --freezes 12
"""
import argparse, json, os, pathlib, random, re, signal, statistics, subprocess, sys, tempfile, threading, time

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--finetune", required=True)
arguments.add_argument("--ranks", type=int, default=3)
arguments.add_argument("--stages", action="store_true")
arguments.add_argument("--trials", type=int, default=30)
arguments.add_argument("--freezes", type=int, default=10)
arguments.add_argument("--seed", type=int, default=1)
arguments.add_argument("--output")
options = arguments.parse_args()
root = pathlib.Path(__file__).resolve().parent.parent
dice = random.Random(options.seed)


def last_step(metrics):
    try:
        lines = metrics.read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, ValueError):
        return 0


ROWS = 4


def hops(rank, point):
    """How often a rank sends or receives in a step, forward and back: layer n is on rank n mod the ranks."""
    other = lambda n: 0 <= n < 4 and n % options.ranks != rank
    mine = range(rank, 4, options.ranks)
    above, below = (ROWS * sum(other(n + step) for n in mine) for step in (1, -1))
    return (above, below) if point == "hops.send" else (below, above)


def held(trial, go):
    """The rank of a trial, and where it is held up until there is a file `go`: in the 13th step."""
    rank, point, back = trial % options.ranks, ("hops.send", "hops.receive")[trial // options.ranks % 2], trial // options.ranks // 2 % 2
    ways = hops(rank, point)
    hit = 12 * sum(ways) + back * ways[0] + (ways[back] + 1) // 2
    return rank, f"{point}:{hit}@{rank}+{go}"


def without_evaluation(directory):
    """The quickstart's recipe without held-back rows, which would go through the layers too."""
    text = (root / "recipes/quickstart.toml").read_text().replace('"../', f'"{root}/')
    text = re.sub(r"(?ms)^eval = .*?\n|^\[eval\].*?(?=^\[)", "", text)
    recipe = pathlib.Path(directory, "recipe.toml")
    recipe.write_text(text)
    return recipe


def trial(what, directory, number):
    metrics, go = pathlib.Path(directory, "run", "metrics.jsonl"), pathlib.Path(directory, "go")
    recipe = without_evaluation(directory) if options.stages else root / "recipes/quickstart.toml"
    line = [options.finetune, "launch", "-n", str(options.ranks), "--max-restarts", "1", "--", str(recipe),
            "--output-dir", str(metrics.parent), "--set", "train.max_steps=100000", "--set", "checkpoint.every=10",
            "--set", "log.every=1000000"]
    environment = dict(os.environ)
    if options.stages:
        line += ["--set", f"parallel.stages={options.ranks}", "--set", f"train.global_batch_size={ROWS}",
                 "--set", "train.micro_batch_size=1"]
        rank, environment["FINETUNE_FAILPOINT"] = held(number, go)
    else:
        line += ["--set", "eval.samples=0", "--set", "eval.exact_match=0", "--set", "eval.every=0"]
    child = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    heard = []
    def listen():
        for text in child.stderr:
            heard.append((time.monotonic(), text))
    threading.Thread(target=listen, daemon=True).start()
    is_there = lambda: any("held up at" in text for _, text in list(heard)) if options.stages else last_step(metrics) >= 12
    while not is_there():
        if child.poll() is not None:
            sys.exit(f"{line}: exit code {child.returncode}\n" + "".join(text for _, text in heard))
        time.sleep(0.01)
    time.sleep(dice.random() * 0.3)
    ranks = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True).stdout.split()
    victim = int(ranks[rank if options.stages else dice.randrange(len(ranks))])
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL if what == "kill" else signal.SIGSTOP)
    # Those that start again are not held up.
    go.touch()
    known = restarted = gone_on = resumed_at = None
    while gone_on is None and time.monotonic() - began < 60:
        lost = [at for at, text in list(heard) if "was lost" in text and "] error" in text]
        if known is None and len(lost) >= options.ranks - 1:
            known = lost[options.ranks - 2] - began
        if restarted is None:
            restarted = next((at - began for at, text in list(heard) if "starting again" in text), None)
        for at, text in list(heard):
            if restarted is not None and at - began > restarted and resumed_at is None:
                found = re.search(r"going on from .*\(step (\d+)\)", text)
                resumed_at = int(found.group(1)) if found else None
        if resumed_at is not None and last_step(metrics) > resumed_at:
            gone_on = time.monotonic() - began
        time.sleep(0.002)
    child.send_signal(signal.SIGINT)
    child.wait()
    return known, gone_on


table = []
for what, count in [("kill", options.trials), ("freeze", options.freezes)]:
    times = []
    for number in range(count):
        with tempfile.TemporaryDirectory() as directory:
            times.append(trial(what, directory, number))
    known = sorted(known for known, _ in times if known is not None)
    gone_on = sorted(after for _, after in times if after is not None)
    percentile = lambda values, share: values[min(len(values) - 1, int(share * len(values)))]
    table.append({"what": what, "ranks": options.ranks, "stages": options.ranks if options.stages else 1, "trials": count, "known": len(known),
                  "known_ms_median": round(1e3 * statistics.median(known)), "known_ms_p99": round(1e3 * percentile(known, 0.99)),
                  "next_step_ms_median": round(1e3 * statistics.median(gone_on)), "next_step_ms_p99": round(1e3 * percentile(gone_on, 0.99))})
    print(table[-1])
if options.output:
    pathlib.Path(options.output).write_text(json.dumps(table, indent=1) + "\n")
