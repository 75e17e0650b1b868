"""One LoRA step of finetune, of PyTorch + PEFT and of mlx-lm, measured as lora_step.py and
quantized.py measure it: the same model, rows and settings, each in a process of its own.
"""
import json, os, pathlib, resource, statistics, subprocess, sys, tempfile, time

from lora_recipe import write_recipe


def processor():
    """The name of the processor and its number of cores, for results."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
        flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    except OSError:
        name = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True).stdout.strip()
        flags = []
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "bf16", "i8mm")
    return {"processor": name, "instructions": [flag for flag in wanted if flag in flags], "cores": os.cpu_count()}


def measured(function):
    """CPU seconds of the children that the function waited for, and its result."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = function()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result


class Runs:
    """How all programs are run. `models`: a folder of Hugging Face directories."""

    def __init__(self, binary, models, steps, threads):
        self.binary, self.models, self.steps, self.threads = binary, models, steps, threads
        self.environment = dict(os.environ, BENCH_DIR=str(models), HF_HUB_OFFLINE="1")
        for name in ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"]:
            self.environment[name] = str(threads)

    def command(self, output, model, targets, steps, rows, sets):
        """The command line of a run of `steps` steps. Its recipe is written into `output`."""
        recipe = write_recipe(output, pathlib.Path(self.models, model), targets, rows, steps)
        line = [self.binary, "run", str(recipe), "--quiet"]
        for text in sets:
            line += ["--set", text]
        return line

    def run(self, model, targets, steps, rows, sets):
        """Rows of metrics.jsonl, and seconds from the start to the first of them."""
        with tempfile.TemporaryDirectory() as output:
            start = time.time()
            line = self.command(output, model, targets, steps, rows, sets)
            child = subprocess.Popen(line, env=self.environment, stdout=subprocess.DEVNULL)
            metrics = pathlib.Path(output, "run", "metrics.jsonl")
            first = None
            while child.poll() is None:
                if first is None and metrics.exists() and metrics.stat().st_size > 0:
                    first = time.time() - start
                time.sleep(0.01)
            if child.returncode != 0:
                sys.exit(f"finetune failed with {child.returncode}")
            lines = [json.loads(line) for line in metrics.read_text().splitlines()]
            return lines, first

    def finetune(self, model, targets, rows, sets=()):
        """CPU seconds of a step are the difference of two runs, so that start and end cancel."""
        short, _ = measured(lambda: self.run(model, targets, 1, rows, sets))
        long, (lines, first) = measured(lambda: self.run(model, targets, 1 + self.steps, rows, sets))
        seconds = [line["seconds"] for line in lines[1:]]
        return {
            "cpu_s_per_step": (long - short) / self.steps,
            "step_ms_median": 1e3 * statistics.median(seconds),
            "first_step_s": first,
            "before_first_step_s": first - lines[0]["seconds"],
            "losses": [line["loss"] for line in lines[:4]],
        }

    def peak(self, model, targets, rows, sets=()):
        """Peak memory in MiB of a run of three steps, through a small process without other children."""
        code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
                "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)")
        with tempfile.TemporaryDirectory() as output:
            line = [sys.executable, "-c", code, *self.command(output, model, targets, 3, rows, sets)]
            done = subprocess.run(line, env=self.environment, stdout=subprocess.PIPE, text=True, check=True)
            return int(done.stdout)

    def peer(self, python, script, model, targets, preload=None, steps=None, warmup=1, more=()):
        """What a peer's script prints: see lora_step.py."""
        environment = dict(self.environment, T0=str(time.time()))
        if preload:
            environment["LD_PRELOAD"] = preload
        line = [python, script, "--model", model, "--targets", targets, "--steps", str(steps or self.steps),
                "--warmup", str(warmup), *more]
        if "torch" in os.path.basename(script):
            line += ["--threads", str(self.threads)]
        printed = subprocess.run(line, env=environment, capture_output=True, text=True)
        found = [line for line in printed.stdout.splitlines() if line.startswith("RESULT ")]
        if not found:
            sys.exit(f"{script} failed:\n{printed.stderr[-2000:]}")
        return json.loads(found[0][7:])


def median(rounds, key):
    """Of a figure over rounds; `None` if no round has it."""
    found = [figures[key] for figures in rounds if figures.get(key) is not None]
    return statistics.median(found) if found else None
