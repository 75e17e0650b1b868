"""Multimodal models whose text model is packed, for check_packed.py: the small Gemma 3 of the goldens with its vision
tower, as transformers with bitsandbytes packs and loads it.

    quantize    `finetune quantize`: packed parameters are those of transformers when it is told to leave the other
                parts, whose bytes stay
    merged      `export --format merged` of what transformers wrote: the other parts are those of the base, or decoded
                where they were packed too; the text model is decoded, and transformers loads the whole
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import packed_forms as forms

MODEL = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "models" / "gemma3_multimodal"
# All beside the text model, as transformers has it in memory.
OTHERS = ["model.vision_tower", "model.multi_modal_projector"]
SKIPPED = ["lm_head", *OTHERS]
FORMS = {"nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "int8": dict(load_in_8bit=True)}


def load(directory, **settings):
    """The whole model on the CPU, and what transformers misses or does not know."""
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    more = {"quantization_config": BitsAndBytesConfig(**settings)} if settings else {}
    model, said = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager", output_loading_info=True, **more)
    wrong = {key: sorted(said[key])[:3] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if said.get(key)}
    return model.eval(), wrong


def in_16_bits(output):
    """The golden model in bf16."""
    output.mkdir()
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(MODEL / "model.safetensors").items()}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((MODEL / "config.json").read_text()) | {"dtype": "bfloat16"}
    (output / "config.json").write_text(json.dumps(config))
    return output


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def parameters(model):
    """All parameters by name, packed ones as their codes."""
    return {name: parameter.data for name, parameter in model.named_parameters()}


def differing(one, other):
    return sorted(one.keys() ^ other.keys()) + [key for key in one.keys() & other.keys() if not same(one[key], other[key])]


def is_other(name):
    return name.startswith(tuple(OTHERS))


def decoded(model):
    """What all parameters mean, in bf16."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    values = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "quant_state"):
            values[name] = forms.bitsandbytes_4bit(parameter).bfloat16()
        elif parameter.dtype == torch.int8:
            values[name] = int8_vectorwise_dequant(parameter.data, parameter.SCB).bfloat16()
        else:
            values[name] = parameter.data
    return values


def check_quantize(run_finetune, binary, base, form, work, report):
    ours = work / f"ours-{form}"
    run_finetune(binary, "quantize", base, "--to", form, "--output", ours)
    (mine, wrong), (theirs, _) = load(ours), load(base, llm_int8_skip_modules=SKIPPED, **FORMS[form])
    mine, theirs = parameters(mine), parameters(theirs)
    packed = [name for name, parameter in theirs.items() if not parameter.is_floating_point()]
    bad = differing(mine, theirs)
    text = f"{len(theirs) - len(bad)} of {len(theirs)} parameters are transformers', {len(packed)} of them packed"
    report.note("multimodal", form, f"{text} {bad[:3] or ''} {wrong or ''}", wrong=bool(bad or wrong) or not packed)


def check_merged(run_finetune, binary, base, form, skipped, work, report):
    name = f"{form}-{'text' if skipped else 'all'}"
    packed, output = work / f"theirs-{name}", work / f"merged-{name}"
    theirs, _ = load(base, llm_int8_skip_modules=skipped, **FORMS[form])
    theirs.save_pretrained(packed)
    run_finetune(binary, "export", packed, "--format", "merged", "--output", output)
    mine, wrong = load(output)
    mine, want = parameters(mine), decoded(theirs)
    bad = differing(mine, want)
    others = [key for key in want if is_other(key)]
    left = [key for key in ("quantization", "quantization_config") if key in json.loads((output / "config.json").read_text())]
    text = f"{len(want) - len(bad)} of {len(want)} parameters are the decoded ones, {len(others)} of other parts"
    report.note("multimodal", "merged", f"{name}: {text} {bad[:3] or ''} {wrong or ''} {left or ''}",
                wrong=bool(bad or wrong or left) or not others)


def check_multimodal(run_finetune, binary, work, report):
    base = in_16_bits(work / "base")
    for form in FORMS:
        check_quantize(run_finetune, binary, base, form, work, report)
        for skipped in (SKIPPED, ["lm_head"]):
            check_merged(run_finetune, binary, base, form, skipped, work, report)
