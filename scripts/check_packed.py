#!/usr/bin/env python3
"""Checks packed bases with the whole program, beside transformers with bitsandbytes, mlx-lm and gguf-py.

    scripts/check_packed.py --finetune target/release/finetune [--smollm2 DIR]

make_packed_goldens.py is for the maths of the model; this is for commands and files. For the cases
of tests/goldens/packed that a reference program decodes:

    decoded     five steps over the packed base and over the f32 directory that the reference decodes:
                the same losses and the same adapter, bit by bit
    eval        `finetune eval` against transformers over the decoded values in f32
    peer        the same against the program that owns the format, over its packed weights: mlx-lm in
                f32; bitsandbytes in bf16, which it is made for, within BF16. Over nf4 it also has the loss
                of transformers in bf16 over the decoded values
    adapter     mlx-lm with `export --format mlx` over the same packed base, PEFT over bitsandbytes' model
    merged      `export --format merged`: decoded values and B A added in f64 and rounded once; at most one
                element in a thousand off, by one unit

    quantize    `finetune quantize` of a 16-bit base: tensors and sizes are those of mlx-lm's or
                bitsandbytes' own directory, byte by byte, and both programs load it. Models with experts and
                multimodal ones, too, by their family (`--case qwen3_moe`)
    read        `finetune eval` over what mlx-lm wrote of these, against mlx-lm
    multimodal  a whole multimodal model, packed for bitsandbytes and merged again (packed_multimodal.py)

With --smollm2 DIR (what fetch_smollm2.py wrote), for SmolLM2-135M-Instruct in mlx4, nf4 and its own
GGUF file: quantize, eval and peer on rows of datasets/quickstart, five steps, and a greedy answer
against transformers over the decoded values.

Prints a table; exits with 1 if anything differs. Needs requirements.txt. Checks of a program that
is not there (bitsandbytes, mlx-lm, gguf) say SKIPPED.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes compiles its decoder for each shape

import numpy as np
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import packed_forms as forms
from check_interchange import Failure, Report, load_model, our_loss, run_finetune
from golden_rows import IGNORED, mean_loss, token_losses, trained_tokens
from interchange_logits import compare_logits, missing, torch_logits
from make_expert_goldens import BITSANDBYTES, FAMILIES, MLX, WITHOUT_CLASS, WRAPPERS, forms_of, write_base
from packed_multimodal import check_multimodal

GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "packed"
QUICKSTART = GOLDENS.parent.parent.parent / "datasets" / "quickstart" / "valid.jsonl"
STEPS = 5
# Losses of bitsandbytes in bf16 (nf4) and with activations of 8 bits (int8), against ours in f32. The largest seen is
# 1.7e-2: SmolLM2 with an adapter, of a loss of 1.95.
BF16 = 3e-2
# Merged weights in f32, of up to about 1.
F32 = 1e-6
NEEDS = {"bitsandbytes": ("bitsandbytes",), "mlx": ("mlx", "mlx_lm"), "gguf": ("gguf",),
         "experts": ()}
SCHEMES = {
    **{form: ("mlx", partial(forms.convert_mlx, **settings)) for form, settings in MLX.items()},
    **{form: ("bitsandbytes", partial(forms.save_bitsandbytes, **settings)) for form, settings in BITSANDBYTES.items()},
}
# Families whose directories of mlx-lm are also read: with other names, norms of 1 + w, matrices of heads.
READ = ("qwen3_next", "deepseek_v3", "granitemoehybrid", *WRAPPERS)
QUESTION = "What is the capital of France?"
NEW_TOKENS = 16


def quietly(function, *arguments):
    """mlx-lm prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


class Packed:
    """A packed base, the same base decoded by its reference, and rows."""

    def __init__(self, name, owner, path, work, rows, tokenizer=None):
        self.name, self.owner, self.path, self.work = name, owner, path, work
        self.rows = (rows, [json.loads(line) for line in rows.read_text().splitlines()])
        self.values, self.packed = quietly(forms.values_of, path)
        self.decoded = work / "decoded"
        config = path if path.is_dir() else tokenizer
        forms.write_decoded(config, self.values, self.decoded)

    def token_rows(self):
        return [row["input_ids"] for row in self.rows[1]]


def of_golden(case, work):
    directory = GOLDENS / case
    golden = json.loads((directory / "golden.json").read_text())
    base = GOLDENS / "bases" / golden["base"]
    path = directory / "model.gguf" if golden["format"] == "gguf" else directory
    return Packed(case, golden["format"], path, work, base / "rows.jsonl", tokenizer=base), golden


# --- losses ---------------------------------------------------------------------------------------


def mlx_model(directory, adapter=None):
    """mlx-lm's model over its packed weights, with f32 for all other numbers."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model as load

    mx.set_default_device(mx.cpu)
    model, _ = load(directory)
    if adapter is not None:
        model = load_adapters(model, str(adapter))
    model.set_dtype(mx.float32)
    return model.eval()


def mlx_logits(model, rows):
    import mlx.core as mx

    return [np.array(model(mx.array([row]))[0]) for row in rows]


def mlx_loss(model, rows):
    total = 0.0
    for row in rows:
        logits = torch.from_numpy(mlx_logits(model, [row["input_ids"]])[0])[None]
        total += token_losses(logits, torch.tensor([row["labels"]])).double().sum().item()
    return total / trained_tokens(rows)


def check_bitsandbytes(base, ours, report):
    theirs = mean_loss(forms.load_bitsandbytes(base.path).eval(), base.rows[1])
    report.compare(base.name, "peer", "bf16", theirs, ours, BF16)
    if "nf4" in base.name:  # fp4's file is f32, and int8's products are not those of the decoded values
        plain = AutoModelForCausalLM.from_pretrained(base.decoded, dtype=torch.bfloat16, attn_implementation="sdpa")
        report.compare(base.name, "peer", "decoded", theirs, mean_loss(plain.eval(), base.rows[1]))


def check_losses(binary, base, report):
    ours = our_loss(binary, base.path, base.rows)
    report.compare(base.name, "eval", "all", mean_loss(load_model(base.decoded), base.rows[1]), ours)
    if base.owner == "mlx":
        report.compare(base.name, "peer", "f32", mlx_loss(mlx_model(base.path), base.rows[1]), ours)
    elif base.owner == "bitsandbytes" and forms.its_program_is_right(base.path):
        check_bitsandbytes(base, ours, report)


# --- runs -----------------------------------------------------------------------------------------


def train(binary, base, path, name, rows):
    """Five steps. Returns the run's directory and the losses."""
    run = base.work / name
    recipe = base.work / f"{name}.toml"
    down = "w2" if any(tensor.endswith(".w2.weight") for tensor in base.values) else "down_proj"  # LFM2
    recipe.write_text(f"""\
output_dir = {json.dumps(str(run))}
seed = 7

[model]
path = {json.dumps(str(path))}
device = "cpu"
dtype = "f32"

[lora]
rank = 4
alpha = 8
target_modules = ["q_proj", "v_proj", "{down}"]

[data]
train = {json.dumps(str(rows))}
format = "tokens"
shuffle = false

[train]
max_steps = {STEPS}
global_batch_size = 4
micro_batch_size = 2

[optimizer]
learning_rate = 2e-3
""")
    run_finetune(binary, "run", recipe)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return run, [line["loss"] for line in lines if "loss" in line]


def check_runs(binary, base, report):
    run, losses = train(binary, base, base.path, "run", base.rows[0])
    plain, plain_losses = train(binary, base, base.decoded, "run-decoded", base.rows[0])
    mine, other = [load_file(path / "adapter" / "adapter_model.safetensors") for path in (run, plain)]
    different = [name for name in other if not torch.equal(mine[name], other[name])]
    trained = any(tensor.abs().max() > 0 for name, tensor in mine.items() if "lora_B" in name)
    text = (f"{STEPS} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}; {len(different)} of {len(other)} tensors differ, "
            f"losses {'the same' if losses == plain_losses else 'differ'}")
    report.note(base.name, "decoded", text, wrong=bool(different) or losses != plain_losses or not trained
                or mine.keys() != other.keys())
    return run


def check_adapter(binary, base, run, report):
    """The adapter of a run over a packed base, in the program that owns the format."""
    peft = PeftModel.from_pretrained(load_model(base.decoded), str(run / "adapter")).eval()
    ours = our_loss(binary, base.path, base.rows, run / "adapter")
    report.compare(base.name, "adapter", "all", mean_loss(peft, base.rows[1]), ours)
    has_experts = any(".experts." in name for name in load_file(run / "adapter" / "adapter_model.safetensors"))
    if base.owner == "mlx" and has_experts:
        report.note(base.name, "adapter", "SKIPPED: mlx-lm's form of branches of experts is not written")
    elif base.owner == "mlx":
        exported = base.work / "mlx"
        run_finetune(binary, "export", run, "--format", "mlx", "--output", exported)
        found = mlx_logits(quietly(mlx_model, base.path, exported), base.token_rows())
        compare_logits(report, base.name, "adapter", torch_logits(peft, base.token_rows()), found,
                       "PEFT over decoded values, mlx-lm over its packed ones")
    elif base.owner == "bitsandbytes" and forms.its_program_is_right(base.path):
        model = PeftModel.from_pretrained(forms.load_bitsandbytes(base.path), str(run / "adapter")).eval()
        written = load_file(run / "adapter" / "adapter_model.safetensors")
        loaded = get_peft_model_state_dict(model)
        same = loaded.keys() == written.keys() and all(torch.equal(loaded[name].float(), written[name]) for name in written)
        report.note(base.name, "adapter", f"PEFT over bitsandbytes' model: {len(written)} tensors as written", not same)
        report.compare(base.name, "adapter", "bf16", mean_loss(model.eval(), base.rows[1]), ours, BF16)


def check_merged(binary, base, run, report):
    output = base.work / "merged"
    run_finetune(binary, "export", run, "--format", "merged", "--output", output)
    merged = {}
    for path in sorted(output.glob("*.safetensors")):
        merged |= load_file(path)
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    elements = different = 0
    beyond = []
    for name, value in base.values.items():
        if name not in merged and name == "lm_head.weight":
            continue  # tied
        mine, want = merged[name], value.double()
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in adapter:
            a, b = adapter[f"{stem}.lora_A.weight"].double(), adapter[f"{stem}.lora_B.weight"].double()
            want = want + scale * (b @ a)
        rounded = want.to(mine.dtype)  # once, from f64
        # f32 has no room to hide the order of a sum of f32 products in.
        off = mine != rounded if mine.dtype != torch.float32 else (mine.double() - want).abs() > F32
        elements += mine.numel()
        different += int(off.sum())
        unit = torch.finfo(mine.dtype).eps * rounded.double().abs() if mine.dtype != torch.float32 else F32
        if ((mine.double() - rounded.double()).abs() > unit).any():
            beyond.append(name)
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in merged.values()})
    text = f"{', '.join(kinds)}: {different} of {elements} elements are not the rounded sum, {len(beyond)} matrices beyond a unit"
    report.note(base.name, "merged", text, wrong=bool(beyond) or different > elements * 1e-3)
    config = json.loads((output / "config.json").read_text())
    left = [key for key in ("quantization", "quantization_config") if config.get(key)]
    report.note(base.name, "merged", f"config.json has {left or 'nothing'} of packing", wrong=bool(left))
    theirs = mean_loss(load_model(output), base.rows[1])
    report.compare(base.name, "merged", "ours", theirs, our_loss(binary, output, base.rows))


# --- quantize -------------------------------------------------------------------------------------


def tensors_of(directory):
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        if path.name.startswith("model"):
            tensors |= load_file(path)
    return tensors


def same_tensor(name, a, b):
    if "quant_state" in name:
        return [json.loads(bytes(tensor.numpy())) for tensor in (a, b)] == [json.loads(bytes(b.numpy()))] * 2
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def check_quantize(binary, name, base, work, report, theirs=None, case=None, **loading):
    """`finetune quantize` of the 16-bit directory `base`, against `theirs`, or else what the other program writes now.
    Returns our directory. `loading`: how bitsandbytes' model is loaded.
    """
    case = case or base.name
    owner, write = SCHEMES[name]
    ours = work / f"quantized-{name}"
    run_finetune(binary, "quantize", base, "--to", name, "--output", ours)
    written = theirs is None
    if written:
        theirs = work / f"theirs-{name}"
        quietly(write, base, theirs)
    mine, other = tensors_of(ours), tensors_of(theirs)
    # mlx-lm packs the matrices of heads too where they are wide enough, ours keep their numbers.
    packs_heads = any(key.endswith(("embed_q.scales", "unembed_out.scales")) for key in other)
    if owner == "mlx":  # which makes two matrices of a head's kv_b_proj, of ours when it loads them
        for tensors in (mine, other):
            for key in [key for key in tensors if any(part in key for part in ("kv_b_proj", "embed_q", "unembed_out"))]:
                del tensors[key]
    wrong = sorted(mine.keys() ^ other.keys())
    wrong += [key for key in mine.keys() & other.keys() if not same_tensor(key, mine[key], other[key])]
    text = f"{len(other) - len(wrong)} of {len(other)} tensors are {owner}'s, byte by byte"
    report.note(case, name, text + (f"; not {', '.join(wrong[:3])}" if wrong else ""), wrong=bool(wrong))
    if written:
        return ours  # the checks of losses load it
    if owner == "mlx":
        rows = [list(range(1, 20))]
        pair = [mlx_logits(quietly(mlx_model, path), rows)[0] for path in (ours, theirs)]
        largest = np.abs(pair[0] - pair[1]).max()
        if packs_heads:
            text = f"mlx-lm loads it; heads are packed in its own alone: logits differ by {largest:.1e}"
            report.note(case, name, text, wrong=not largest < 0.2 * np.abs(pair[1]).max())
        else:
            report.note(case, name, "mlx-lm loads it and computes the same", wrong=largest != 0)
    else:
        pair = [forms.bitsandbytes_values(forms.load_bitsandbytes(path, **loading))[0] for path in (ours, theirs)]
        same = pair[0].keys() == pair[1].keys() and all(torch.equal(pair[0][key], pair[1][key]) for key in pair[0])
        report.note(case, name, "transformers with bitsandbytes loads it, with the same values", wrong=not same)
    return ours


def check_experts(binary, family, work, report):
    """`finetune quantize` of a model with experts, or of a multimodal one."""
    base = work / "base"
    write_base(family, base)
    loading = {"attention": "eager"} if family == "gpt_oss" else {}
    for name, (owner, write) in SCHEMES.items():
        if absent := missing(*NEEDS[owner]):
            report.skipped(family, name, absent)
        elif family in WRAPPERS and owner == "bitsandbytes":
            pass  # packed_multimodal.py has a whole model of one
        elif name not in forms_of(family):
            try:
                run_finetune(binary, "quantize", base, "--to", name, "--output", work / name)
                report.note(family, name, "it is written, and was to be refused", wrong=True)
            except Failure as error:
                is_told = "mlx-lm would not load" in str(error)
                report.note(family, name, "refused by name" if is_told else str(error), wrong=not is_told)
        else:
            theirs = work / f"written-{name}"
            quietly(partial(write, base, theirs, **(loading if owner == "bitsandbytes" else {})))
            check_quantize(binary, name, base, work, report, theirs=theirs, case=family, **loading)
            if name == "mlx4" and family in READ:
                check_read(binary, theirs, family, report)


def check_read(binary, directory, family, report):
    """What mlx-lm wrote is a base: the loss over it is mlx-lm's. In plain numbers transformers loads it as a text model."""
    path = GOLDENS / "bases" / "deepseek_v3" / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    theirs = quietly(lambda: mlx_loss(mlx_model(directory), rows))
    report.compare(family, "read", "mlx4", theirs, our_loss(binary, directory, (path, rows)))
    if family not in WITHOUT_CLASS:
        output = directory.parent / "merged"
        run_finetune(binary, "export", directory, "--format", "merged", "--output", output)
        report.compare(family, "merged", "mlx4", mean_loss(load_model(output), rows), our_loss(binary, output, (path, rows)))


# --- SmolLM2 --------------------------------------------------------------------------------------


def quickstart_rows(directory, output, count=4):
    """The first rows of the quickstart's validation as tokens, the answer trained. They are few because mlx-lm takes
    15 s a row: its wheel for CPUs has a slow BLAS.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    lines = []
    for line in QUICKSTART.read_text().splitlines()[:count]:
        messages = json.loads(line)["messages"]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        prompt = len(tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False))
        lines.append(json.dumps({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}))
    output.write_text("".join(line + "\n" for line in lines))
    return output


def check_answer(binary, base, directory, report):
    settings = ("--max-new-tokens", NEW_TOKENS, "--temperature", "0", "--device", "cpu", "--json")
    answer = json.loads(run_finetune(binary, "generate", base.path, "--prompt", QUESTION, *settings))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True,
                                           return_dict=False)
    model = load_model(base.decoded)
    ids, ends = torch.tensor([prompt]), {tokenizer.eos_token_id}
    with torch.no_grad():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
                               pad_token_id=tokenizer.eos_token_id)[0, len(prompt):].tolist()
    ours, theirs = [[token for token in tokens if token not in ends] for tokens in (answer["token_ids"], found)]
    report.note(base.name, "answer", f"{tokenizer.decode(ours)!r}", wrong=ours != theirs)


def check_smollm2(binary, directory, work, report):
    rows = quickstart_rows(directory, work / "rows.jsonl")
    bases = []
    for name in ("mlx4", "nf4"):
        owner = SCHEMES[name][0]
        if absent := missing(*NEEDS[owner]):
            report.skipped("smollm2", name, absent)
            continue
        ours = check_quantize(binary, name, directory, work, report)
        folder = work / name
        folder.mkdir()
        bases.append(Packed(f"smollm2 {name}", owner, ours, folder, rows))
    if absent := missing(*NEEDS["gguf"]):
        report.skipped("smollm2", "gguf", absent)
    else:
        from fetch_smollm2 import packed_file

        folder = work / "gguf"
        folder.mkdir()
        file = packed_file(str(folder))
        bases.append(Packed("smollm2 gguf", "gguf", file, folder, rows, tokenizer=directory))
    for base in bases:
        check_losses(binary, base, report)
        check_adapter(binary, base, check_runs(binary, base, report), report)
        check_answer(binary, base, directory, report)


# --- the table ------------------------------------------------------------------------------------


def check_case(binary, case, work, report):
    base, golden = of_golden(case, work)
    hashes = {name: about["shape"] for name, about in golden["packed"].items()}
    assert hashes.keys() == base.packed, "the golden was made of another file"
    check_losses(binary, base, report)
    run = check_runs(binary, base, report)
    check_adapter(binary, base, run, report)
    check_merged(binary, base, run, report)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--finetune", type=Path, required=True, metavar="BIN", help="the binary to check")
    parser.add_argument("--case", action="append", metavar="NAME", help="check this golden case or family only (may be repeated)")
    parser.add_argument("--smollm2", type=Path, metavar="DIR", help="also check a real model: what fetch_smollm2.py wrote")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each layer about rounding
    binary, report = arguments.finetune.resolve(), Report()

    with tempfile.TemporaryDirectory() as temporary:
        def check(name, owner, what):
            if absent := missing(*NEEDS[owner]):
                return report.skipped(name, owner, absent)
            work = Path(temporary).resolve() / name
            work.mkdir()
            try:
                what(work)
            except Exception as error:  # a library may raise anything: a failed check, not the end
                words = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
                report.note(name, "failed", words, wrong=True)

        for path in sorted(GOLDENS.glob("*/golden.json")):
            case, owner = path.parent.name, json.loads(path.read_text())["format"]
            if owner in NEEDS and (not arguments.case or case in arguments.case):
                check(case, owner, lambda work: check_case(binary, case, work, report))
        for family in FAMILIES:
            if not arguments.case or family in arguments.case:
                check(family, "experts", lambda work: check_experts(binary, family, work, report))
        if not arguments.case or "multimodal" in arguments.case:
            check("multimodal", "bitsandbytes", lambda work: check_multimodal(run_finetune, binary, work, report))
        for name, (owner, _) in SCHEMES.items():
            if not arguments.case:
                check(f"to {name}", owner, lambda work: check_quantize(
                    binary, name, GOLDENS / "bases" / "llama", work, report, theirs=GOLDENS / name))
        if arguments.smollm2:
            check("smollm2", "gguf", lambda work: check_smollm2(binary, arguments.smollm2.resolve(), work, report))
    if report.failures:
        sys.exit(f"{report.failures} checks failed")
    print(f"every difference is within its bound: f32 1e-05, bitsandbytes in bf16 {BF16}; bits are bits")


if __name__ == "__main__":
    main()
