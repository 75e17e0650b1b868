#!/usr/bin/env python3
"""Checks that transformers and PEFT read what `finetune` writes, and compute the same losses.

    scripts/check_interchange.py --finetune target/release/finetune

make_goldens.py is for the other direction: whether `finetune` computes what they compute. For each
family under tests/goldens/models this script trains three steps with the binary, then checks

    golden      `finetune eval` of the adapter that PEFT wrote, against golden.json
    base        the same without an adapter
    adapter     PEFT loads RUN/adapter: the same parameter names, every value, the same losses as
                `finetune eval`
    checkpoint  the same of RUN/checkpoints/step-000003
    merged      transformers loads `finetune export --format merged`: no key missing or left over,
                PEFT's losses
    linear, experts
                (mixtures) the same as adapter of what `all-linear` trains, and of a PEFT export of that with
                experts: dense layers, shared experts and routers have names that PEFT takes for experts'
    bf16, f16   the base stored in 16 bits and in shards: losses with the adapter, and a merge that
                equals PEFT's merge in f32 rounded once (at most one element in a thousand off, by
                one unit)
    mlx         mlx-lm's adapters: see interchange_mlx.py
    gguf, several, pieces, smollm2
                llama.cpp's files, several adapters: see interchange_formats.py

For each case under tests/goldens/adapters (DoRA, modules trained in full, LoRA on embedding and output
layer), on the base that it names:

    golden      `finetune eval` of the adapter that PEFT wrote, against PEFT
    adapter     PEFT loads what three steps with the case's settings wrote: names, values, losses
    merged      transformers loads the merged export: PEFT's losses

    add_tokens  a run with two new tokens: the tokenizer has them, PEFT loads the adapter into a resized
                model, transformers loads the merged export

Losses are mean token losses, of the whole file and of single rows, so that two wrong rows cannot
make up for each other. Prints a table; exits with 1 if anything differs. Needs requirements.txt.
Checks of a program that is not there (mlx-lm, gguf, llama-cpp-python) say SKIPPED.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from golden_rows import IGNORED, mean_loss
from interchange_formats import check_formats_of_case, check_gguf, check_pieces, check_several, check_smollm2
from interchange_logits import missing
from interchange_mlx import check_mlx

TOLERANCE = 1e-5  # f32 differs from f64 by about 1e-7 in these losses; the goldens record it
STEPS = 3
# Rows of rows.jsonl, among them the longest, which is longer than Mistral's window.
SINGLE_ROWS = (0, 4, 6)
DEADLINE_SECONDS = 300
# What is trained beside q_proj with new tokens, by the golden model. llama and qwen2 are tied.
NEW_TOKENS = {
    "llama": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "qwen2": dict(target_modules=["q_proj", "embed_tokens"]),
    "qwen3": dict(target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"]),
}


class Failure(Exception):
    """One check that did not hold, in words."""


class Report:
    """The table: one line per check, printed as it is known."""

    def __init__(self):
        self.failures = []
        print(f"{'family or case':<21}{'check':<12}{'rows':<6}{'theirs':>14}{'ours':>14}{'difference':>12}")

    def compare(self, family, check, rows, theirs, ours, tolerance=TOLERANCE):
        difference = abs(theirs - ours)
        wrong = not difference <= tolerance  # not `>`: NaN is wrong too
        self.failures += [f"{family}: {check} {rows}"] * wrong
        print(f"{family:<21}{check:<12}{rows:<6}{theirs:>14.8f}{ours:>14.8f}{difference:>12.1e}{'  WRONG' * wrong}",
              flush=True)

    def note(self, family, check, text, wrong=False):
        wrong = bool(wrong)  # a comparison of numpy's does not multiply a list
        self.failures += [f"{family}: {check} {text}"] * wrong
        print(f"{family:<21}{check:<12}{text}{'  WRONG' * wrong}", flush=True)

    def skipped(self, family, check, packages):
        print(f"{family:<21}{check:<12}SKIPPED: no Python package {', '.join(packages)}", flush=True)


class Family:
    """A golden family, with its training rows as whole and single-row files."""

    def __init__(self, directory, work):
        self.name = directory.name
        self.directory = directory
        self.work = work
        lines = (directory / "rows.jsonl").read_text().splitlines()
        self.files = {"all": (directory / "rows.jsonl", [json.loads(line) for line in lines])}
        for row in SINGLE_ROWS:
            path = work / f"row-{row}.jsonl"
            path.write_text(lines[row] + "\n")
            self.files[str(row)] = (path, [json.loads(lines[row])])

    def load(self, directory=None):
        return load_model(directory or self.directory)


def run_finetune(binary, *arguments):
    command = [str(binary), *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    except subprocess.TimeoutExpired:
        raise Failure(f"{' '.join(command)}: no end after {DEADLINE_SECONDS} s") from None
    if done.returncode != 0:
        raise Failure(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def our_loss(binary, model, rows, adapter=None):
    """The mean token loss by `finetune eval`; also checks its number of trained tokens."""
    path, parsed = rows
    arguments = ["eval", model, "--data", path, "--json"]
    if adapter is not None:
        arguments += ["--adapter", adapter]
    output = run_finetune(binary, *arguments)
    try:
        answer = json.loads(output)
        loss, tokens = float(answer["loss"]), int(answer["tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(f"finetune eval --json is not {{\"loss\", \"tokens\"}} ({error!r}): {output!r}") from None
    expected = sum(label != IGNORED for row in parsed for label in row["labels"][1:])
    if tokens != expected:
        raise Failure(f"finetune eval counts {tokens} trained tokens in {path.name}, not {expected}")
    return loss


def toml(value):
    """JSON's strings, numbers and lists are TOML's too. Tables are not."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


def target_modules(lora):
    """As a recipe names them: PEFT names the parameters of experts apart."""
    experts = ["experts"] if lora.get("target_parameters") and isinstance(lora["target_modules"], list) else []
    return lora["target_modules"] + experts if experts else lora["target_modules"]


def write_recipe(family, settings=None, rows=None, data=""):
    """LoRA settings as PEFT has them, by default the golden adapter's, in a recipe without anything
    that is not needed.
    """
    lora = settings or json.loads((family.directory / "adapter" / "adapter_config.json").read_text())
    more = "".join(f"{key} = {toml(lora[key])}\n" for key in ("use_dora", "experts", "modules_to_save", "rank_pattern",
                                                            "alpha_pattern") if lora.get(key))
    recipe = family.work / "recipe.toml"
    recipe.write_text(f"""\
output_dir = {json.dumps(str(family.work / "run"))}
seed = 7

[model]
path = {json.dumps(str(family.directory))}
device = "cpu"
dtype = "f32"

[lora]
rank = {lora["r"]}
alpha = {lora["lora_alpha"]}
target_modules = {json.dumps(target_modules(lora))}
use_rslora = {json.dumps(lora["use_rslora"])}
{more}
[data]
train = {json.dumps(str(rows or family.directory / "rows.jsonl"))}
format = "tokens"
max_seq_len = 64
shuffle = false
{data}

[train]
max_steps = {STEPS}
global_batch_size = 4
micro_batch_size = 2

[optimizer]
learning_rate = 1e-2

[schedule]
name = "constant"
""")
    return recipe


# Families whose soft caps or sinks torch's own attention does not have.
EAGER = ("gemma2", "gpt_oss")
# Multimodal classes that AutoModelForCausalLM does not know.
WHOLE_ONLY = ("muse_glimmer",)


def model_class(directory):
    kind = json.loads((Path(directory) / "config.json").read_text())["model_type"]
    return AutoModelForImageTextToText if kind in WHOLE_ONLY else AutoModelForCausalLM


def load_model(directory):
    kind = json.loads((Path(directory) / "config.json").read_text())["model_type"]
    model, loading = model_class(directory).from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager" if kind in EAGER else "sdpa",
        output_loading_info=True
    )
    wrong = {key: value for key, value in loading.items() if value}
    if wrong:
        raise Failure(f"transformers loads {directory} with {wrong}")
    return model.eval()


def load_with_peft(family, adapter, rows=None):
    """PEFT's model. PEFT only warns of unknown names, so names and values are compared here. `rows`:
    to which number of rows embedding and output layer are resized first. Their matrices as they were
    before training are saved then.
    """
    base = load_model(family.directory)
    if rows:
        base.resize_token_embeddings(rows)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    written = load_file(adapter / "adapter_model.safetensors")
    if rows:
        state = model.state_dict()
        loaded |= {key: state[key] for key in written if key not in loaded and key in state}
    if loaded.keys() != written.keys():
        raise Failure(f"parameter names differ: PEFT wants also {sorted(loaded.keys() - written.keys())}, "
                      f"does not know {sorted(written.keys() - loaded.keys())}")
    for name, tensor in written.items():
        if tensor.dtype != torch.float32:
            raise Failure(f"{name} is {tensor.dtype}; an adapter is kept in f32")
        if not torch.equal(loaded[name], tensor):
            raise Failure(f"{name} changed in loading")
    if not any(tensor.abs().max() > 0 for name, tensor in written.items()
               if "lora_B" in name or "embedding_A" in name):
        raise Failure("every B is zero: nothing was trained")
    return model


def check_family(binary, family, report):
    golden = json.loads((family.directory / "golden.json").read_text())
    rows = family.files["all"]
    ours = our_loss(binary, family.directory, rows, family.directory / "adapter")
    report.compare(family.name, "golden", "all", golden["rows_jsonl"]["adapter_loss"], ours)
    report.compare(family.name, "base", "all", golden["rows_jsonl"]["base_loss"],
                   our_loss(binary, family.directory, rows))

    run_finetune(binary, "run", write_recipe(family))
    run = family.work / "run"
    peft_losses = {}
    adapters = [("adapter", run / "adapter"), ("checkpoint", run / f"checkpoints/step-{STEPS:06}")]
    names = load_file(run / "adapter/adapter_model.safetensors")
    if any(re.search(r"\.experts\.\d", name) for name in names):
        # PEFT holds experts in stacks, under other names than a run's own files have.
        stacked = family.work / "stacked"
        run_finetune(binary, "export", run, "--format", "peft", "--output", stacked)
        adapters = [("stacked", stacked)]
    for check, adapter in adapters:
        model = load_with_peft(family, adapter)
        for name, file in family.files.items():
            peft_losses[name] = mean_loss(model, file[1])
            report.compare(family.name, check, name, peft_losses[name],
                           our_loss(binary, family.directory, file, adapter))

    merged = family.work / "merged"
    run_finetune(binary, "export", run, "--format", "merged", "--output", merged)
    model = load_model(merged)
    for name, (_, parsed) in family.files.items():
        # Neither column is `finetune`: PEFT with our adapter, transformers with our merge of it.
        report.compare(family.name, "merged", name, peft_losses[name], mean_loss(model, parsed))
    report.compare(family.name, "merged", "ours", peft_losses["all"], our_loss(binary, merged, rows))

    check_mixture(binary, family, report)
    config = json.loads((family.directory / "config.json").read_text())
    # What is packed stays so, and transformers does not save it in 16 bits.
    halves = () if "quantization_config" in config else (("bf16", torch.bfloat16), ("f16", torch.float16))
    for name, dtype in halves:
        check_half(binary, family, report, name, dtype)

    if absent := missing("mlx", "mlx_lm"):
        report.skipped(family.name, "mlx", absent)
    else:
        check_mlx(run_finetune, our_loss, binary, family, report, run)
    check_gguf(run_finetune, binary, family, report, run, merged, adapters[0][1])
    settings = json.loads((run / "adapter/adapter_config.json").read_text())
    # PEFT does not add up branches of parameters.
    if adapters[0][0] != "stacked" and not settings.get("target_parameters"):
        check_several(run_finetune, our_loss, mean_loss, binary, family, report, run)


def check_mixture(binary, family, report):
    """Layers beside experts, in a run of their own. PEFT goes by the last parts of names, and says nothing of the
    branches that it leaves out: load_with_peft does."""
    config = json.loads((family.directory / "config.json").read_text())
    text = config.get("text_config", config)
    has_experts = text.get("num_experts_per_tok") or text.get("top_k_experts")
    if not has_experts or "quantization_config" in config:
        return
    settings = {"r": 4, "lora_alpha": 8, "use_rslora": False, "target_modules": "all-linear"}
    for check, more in (("linear", {}), ("experts", {"experts": True})):
        work = family.work / f"mixture-{check}"
        work.mkdir()
        here = Family(family.directory, work)
        run_finetune(binary, "run", write_recipe(here, {**settings, **more}))
        adapter = work / "run" / "adapter"
        if more:
            run_finetune(binary, "export", work / "run", "--format", "peft", "--output", work / "exported")
            adapter = work / "exported"
        model = load_with_peft(here, adapter)
        for name, file in here.files.items():
            report.compare(family.name, check, name, mean_loss(model, file[1]),
                           our_loss(binary, family.directory, file, adapter))


def compare_adapter_and_merge(binary, family, report, case, files, rows=None):
    """What a run has written: PEFT loads its adapter, transformers its merged export."""
    run, merged = family.work / "run", family.work / "merged"
    model = load_with_peft(family, run / "adapter", rows)
    losses = {name: mean_loss(model, parsed) for name, (_, parsed) in files.items()}
    for name, file in files.items():
        report.compare(case, "adapter", name, losses[name], our_loss(binary, family.directory, file, run / "adapter"))
    run_finetune(binary, "export", run, "--format", "merged", "--output", merged)
    model = load_model(merged)
    for name, (_, parsed) in files.items():
        report.compare(case, "merged", name, losses[name], mean_loss(model, parsed))
    report.compare(case, "merged", "ours", losses["all"], our_loss(binary, merged, files["all"]))


def check_case(binary, directory, work, report):
    """An adapter that is more than LoRA on linear layers."""
    case = json.loads((directory / "case.json").read_text())
    family = Family(directory.parent.parent / "models" / case["family"], work)
    model = PeftModel.from_pretrained(load_model(family.directory), str(directory / "adapter")).eval()
    for name, file in family.files.items():
        report.compare(directory.name, "golden", name, mean_loss(model, file[1]),
                       our_loss(binary, family.directory, file, directory / "adapter"))
    check_formats_of_case(run_finetune, binary, family, report, directory, model)
    settings = json.loads((directory / "adapter" / "adapter_config.json").read_text())
    run_finetune(binary, "run", write_recipe(family, settings))
    compare_adapter_and_merge(binary, family, report, directory.name, family.files)


def write_tokenizer(directory, vocabulary):
    """One word for each token of a golden model."""
    import tokenizers

    words = {f"w{n}": n for n in range(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')


def check_new_tokens(binary, goldens, work, report, name, settings):
    """A run that adds two tokens to a golden model which has a tokenizer, on rows that hold them."""
    # AutoTokenizer would give a Qwen2 model Qwen2's own class, whatever its tokenizer.json says.
    from transformers import PreTrainedTokenizerFast

    original = Family(goldens / "models" / name, work)
    directory = work / "base"
    load_model(original.directory).save_pretrained(directory)
    vocabulary = load_model(directory).config.vocab_size
    write_tokenizer(directory, vocabulary)
    lines = []
    for row in original.files["all"][1]:
        changed = [vocabulary + n % 2 if n % 5 == 4 else token for n, token in enumerate(row["input_ids"])]
        labels = [token if label != IGNORED else IGNORED for token, label in zip(changed, row["labels"])]
        lines.append(json.dumps({"input_ids": changed, "labels": labels}))
    (directory / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
    family = Family(directory, work)
    recipe = write_recipe(family, {"r": 4, "lora_alpha": 8, "use_rslora": False, **settings},
                          data='add_tokens = ["<tool>", "<end tool>"]')
    run_finetune(binary, "run", recipe)
    for where in ("run/adapter", "merged"):
        if where == "merged":
            compare_adapter_and_merge(binary, family, report, f"tokens {name}", family.files, rows=vocabulary + 2)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(work / where)
        ids = tokenizer("w5<tool>w6 <end tool>")["input_ids"]
        report.note(f"tokens {name}", where, f"{len(tokenizer)} tokens, {ids}",
                    wrong=len(tokenizer) != vocabulary + 2 or ids != [5, vocabulary, 6, vocabulary + 1])
    config = json.loads((work / "merged" / "config.json").read_text())
    if config["vocab_size"] != vocabulary + 2:
        report.note(f"tokens {name}", "merged", f"vocab_size = {config['vocab_size']}", wrong=True)


def check_half(binary, family, report, name, dtype):
    base, adapter = family.work / name, family.directory / "adapter"
    load_model(family.directory).to(dtype).save_pretrained(base, max_shard_size="30KB")
    model = PeftModel.from_pretrained(load_model(base), str(adapter)).eval()
    path, parsed = family.files["all"]
    report.compare(family.name, name, "all", mean_loss(model, parsed), our_loss(binary, base, (path, parsed), adapter))

    output = family.work / f"{name}-merged"
    run_finetune(binary, "export", base, "--adapter", adapter, "--format", "merged", "--output", output)
    theirs = {key: value.to(dtype) for key, value in model.merge_and_unload().state_dict().items()}
    ours = model_class(output).from_pretrained(output, dtype=dtype).state_dict()
    missing = sorted(theirs.keys() ^ ours.keys())
    elements = different = 0
    beyond = False
    for key in theirs.keys() & ours.keys():
        mine, reference = ours[key].float(), theirs[key].float()
        unit = torch.finfo(dtype).eps * reference.abs()
        elements += mine.numel()
        different += int((mine != reference).sum())
        beyond |= bool(((mine - reference).abs() > unit).any())
    # Both sum in f32. Another order of the sum seldom crosses a rounding boundary of the 16-bit
    # type, and then by one unit.
    if missing or beyond or different > elements * 1e-3:
        report.note(family.name, name, f"merged weights: {different} of {elements} differ, names {missing}", wrong=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--finetune", type=Path, required=True, metavar="BIN", help="the binary to check")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep runs and exports here; default: a temporary one")
    parser.add_argument("--family", action="append", metavar="NAME", help="check this golden family only (may be repeated)")
    parser.add_argument("--smollm2", type=Path, metavar="DIR", help="also check a real model: what fetch_smollm2.py wrote")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    binary = arguments.finetune.resolve()
    goldens = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "models"
    directories = sorted(path.parent for path in goldens.glob("*/golden.json"))
    if not directories:
        sys.exit(f"no goldens under {goldens}")
    if arguments.family:
        directories = [path for path in directories if path.name in arguments.family]

    with tempfile.TemporaryDirectory() as temporary:
        # A directory of its own in --work too: output directories of an earlier check would be in
        # the way.
        if arguments.work:
            arguments.work.mkdir(parents=True, exist_ok=True)
            root = Path(tempfile.mkdtemp(prefix="interchange-", dir=arguments.work)).resolve()
        else:
            root = Path(temporary).resolve()
        report = Report()
        for directory in directories:
            work = root / directory.name
            work.mkdir()
            try:
                check_family(binary, Family(directory, work), report)
            except Exception as error:  # a library may raise anything: a failed check, not the end
                words = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
                report.note(directory.name, "failed", words, wrong=True)

        def check(name, what):
            work = root / f"case-{name}"
            work.mkdir()
            try:
                what(work)
            except Exception as error:  # as above
                words = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
                report.note(name, "failed", words, wrong=True)

        cases = [] if arguments.family else sorted(path.parent for path in goldens.parent.glob("adapters/*/case.json"))
        for directory in cases:
            check(directory.name, lambda work: check_case(binary, directory, work, report))
        for name, settings in NEW_TOKENS.items() if cases else ():
            check(f"tokens-{name}", lambda work: check_new_tokens(binary, goldens.parent, work, report, name, settings))
        if not arguments.family:
            check("pieces", lambda work: check_pieces(run_finetune, binary, work, report))
        if arguments.smollm2:
            check_smollm2(run_finetune, binary, arguments.smollm2.resolve(), root, report)
    if report.failures:
        sys.exit("\n".join([f"{len(report.failures)} checks failed:", *report.failures]))
    print(f"every difference is within {TOLERANCE}")


if __name__ == "__main__":
    main()
