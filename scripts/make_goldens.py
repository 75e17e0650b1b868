#!/usr/bin/env python3
"""Writes the goldens of the decoder families: tiny random models, and what transformers and PEFT
compute with them.

Per family, under OUTPUT/<family>/:

    config.json, generation_config.json, model.safetensors
                            the base model, as transformers saves it, in f32
    config.hub.json         the same config as most models on the hub spell it, see hub_spelling.py
    adapter/                a LoRA adapter with A and B both non-zero, as PEFT saves it
    golden.safetensors      one right-padded micro-batch and its answers:
        input_ids, attention_mask, labels   [row, position], labels unshifted, -100 outside the loss
        logits.<row>                        [length, vocabulary] with the adapter; real tokens only
        base_logits.<row>                   the same without it
        merged_logits.<row>                 the same after merge_and_unload
        grad.<PEFT file name>               gradient of (sum of token losses / trained tokens)
    golden.json             losses, versions, inverse rope frequencies (of LongRoPE the short and the long
                            ones), and how far f32 is from f64
    rows.jsonl              12 rows of tokens, the training data of curves.json
    curves.json             loss, gradient norm and learning rate of each step of a few short runs
    final_clip_cosine.safetensors   the adapter after the last step of that run
    router_loss.json, router_loss.safetensors
                            (some mixtures) losses and gradients with the auxiliary loss of the routers, and a curve
    generation.json         what transformers says greedily with its cache, see golden_generation.py
    adapter_stacked/        (Qwen3-MoE's experts) the same adapter as PEFT saves it again: one branch for all experts

Branches of gpt-oss's experts are PEFT's own (`target_parameters`): adapter/ and the last step's have them as PEFT saves
them. Gradients of these are under the names of single experts, such as `mlp.experts.3.gate_up_proj.lora_A.weight`,
and golden.json has what the model with the adapter says greedily after a prompt.

and OUTPUT/rope.json: inverse frequencies of published configs, for the branches that tiny heads do
not reach.

The f64 figures set the tolerances. An f32 implementation may differ from this one by about as much
as this one differs from f64: then both are equally exact. golden_float64.py makes that reference.

Same versions (requirements.txt) and same kind of CPU: same bytes. Another CPU may round
differently.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here comes from the hub; a lookup would be a mistake

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from golden_curves import write_curves, write_router_loss
from golden_families import FAMILIES, LLAMA3_ROPE, ROUTER_LOSS_FAMILIES, VOCABULARY
from golden_figures import write_json
from golden_float64 import inverse_frequencies_float64
from golden_generation import answers
from golden_micro_batch import write_golden
from golden_models import load_base, save_adapter, save_base_model, save_stacked, with_adapter
from golden_rows import ROW_LENGTHS, forward, pad, random_row
from hub_spelling import hub_spelling, wraps

MICRO_BATCH_LENGTHS = (17, 23, 9)


# --- greedy answers -------------------------------------------------------------------------------


def write_generation(directory):
    """Returns how many prompts were not taken, because rounding might choose a token of their answers."""
    base = load_base(directory, attention="eager")
    adapted = with_adapter(load_base(directory, attention="eager"), directory / "adapter").eval()
    document, passed_over = {}, 0
    for name, model in (("base", base), ("adapter", adapted)):
        last_logits = lambda tokens: forward(model, pad([{"input_ids": tokens, "labels": tokens}]))[0, -1]
        document[name], more = answers(model, last_logits, VOCABULARY)
        passed_over += more
    write_json(directory / "generation.json", document)
    return passed_over


# --- checks and files -----------------------------------------------------------------------------


def check_sliding_window(directory, batch):
    """Checks that the window is applied: otherwise its golden would prove nothing."""
    windowed, unlimited = load_base(directory), load_base(directory)
    text_config = unlimited.config.get_text_config()
    window = text_config.sliding_window
    text_config.sliding_window = text_config.max_position_embeddings
    eager = load_base(directory, attention="eager")
    with torch.no_grad():
        narrow, wide, other = forward(windowed, batch)[1], forward(unlimited, batch)[1], forward(eager, batch)[1]
    # The window counts the token itself: position `window` is the first that does not see
    # position 0.
    assert (narrow - wide)[:window].abs().max() < 1e-4, "the window bites too early"
    assert (narrow - wide)[window].abs().max() > 1e-3, "the window is not applied"
    assert (narrow - other).abs().max() < 1e-4, "sdpa and eager disagree"


def check_gate_limit(directory, batch):
    """Checks that gates or values of gpt-oss's experts reach their limit in each layer."""
    limited, unlimited = load_base(directory), load_base(directory)
    for layer in unlimited.model.layers:
        layer.mlp.experts.limit = math.inf
        with torch.no_grad():
            change = (forward(limited, batch) - forward(unlimited, batch)).abs().max()
        assert change > 1e-3, "the limit is not reached"
        layer.mlp.experts.limit = limited.config.swiglu_limit


def write_hub_config(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.hub.json").write_text(json.dumps(hub_spelling(config), indent=2, sort_keys=True) + "\n")


def check_hub_config(directory, batch):
    """Checks that config.hub.json is the same model for transformers, with the names that files have beside it."""
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        shutil.copy(directory / "config.hub.json", temporary / "config.json")
        tensors = load_file(directory / "model.safetensors")
        if wraps(directory):
            tensors = {name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()}
        save_file(tensors, temporary / "model.safetensors", {"format": "pt"})
        with torch.no_grad():
            difference = (forward(load_base(temporary), batch) - forward(load_base(directory), batch)).abs().max()
    # Where a tensor lies in its file decides how it is aligned in memory, and so the order of some sums.
    assert difference < 1e-5, f"config.hub.json does not mean the same model: logits differ by {difference}"


def published_rope():
    """Inverse frequencies of real Llama 3 configs: these reach all branches of the smoothing."""
    published = {
        "Llama-3.1-8B": (128, 500000.0, 8.0),
        "Llama-3.2-1B": (64, 500000.0, 32.0),
    }
    tables = {}
    for name, (head_size, theta, factor) in published.items():
        rope = dict(LLAMA3_ROPE, rope_theta=theta, factor=factor, original_max_position_embeddings=8192)
        config = LlamaConfig(hidden_size=head_size, num_attention_heads=1, head_dim=head_size,
                             max_position_embeddings=131072, rope_parameters=dict(rope))
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        assert torch.allclose(frequencies.double(), inverse_frequencies_float64(config), rtol=1e-6, atol=0)
        tables[name] = {"head_dim": head_size, "rope_parameters": rope, "inverse_frequencies": frequencies.tolist()}
    return tables


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "models"
    parser.add_argument("--output", type=Path, default=default, help="default: tests/goldens/models")
    parser.add_argument("--router-loss", action="store_true", help="only router_loss.*, of models that are there")
    parser.add_argument("--generation", action="store_true", help="only generation.json, of models that are there")
    parser.add_argument("--hub-config", action="store_true", help="only config.hub.json, of models that are there")
    parser.add_argument("--family", choices=list(FAMILIES), action="append", help="only this one; default: all")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    for family in arguments.family or FAMILIES:
        specification = FAMILIES[family]
        directory = arguments.output / family
        if arguments.router_loss:
            if family in ROUTER_LOSS_FAMILIES:
                micro_batch_rows = json.loads((directory / "golden.json").read_text())["rows"]
                rows = [json.loads(line) for line in (directory / "rows.jsonl").read_text().splitlines()]
                print(family, write_router_loss(directory, micro_batch_rows, rows)["noise"])
            continue
        if arguments.generation:
            print(f"{family}: {write_generation(directory)} prompts not taken", flush=True)
            continue
        if arguments.hub_config:
            write_hub_config(directory)
            check_hub_config(directory, pad(json.loads((directory / "golden.json").read_text())["rows"]))
            print(f"{family}: transformers computes the same with config.hub.json", flush=True)
            continue
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        generator = torch.Generator().manual_seed(1000 + specification["seed"])
        micro_batch_rows = [random_row(length, generator) for length in MICRO_BATCH_LENGTHS]
        rows = [random_row(length, generator) for length in ROW_LENGTHS]
        (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        save_base_model(specification, directory)
        save_adapter(specification, directory)
        batch = pad(micro_batch_rows)
        write_hub_config(directory)
        check_hub_config(directory, batch)
        if family in ("mistral", "gemma3", "olmo3", "gemma2", "gpt_oss", "gpt_oss_experts", "gemma4", "muse_glimmer"):
            check_sliding_window(directory, batch)
        if family.startswith("gpt_oss"):
            check_gate_limit(directory, batch)
        if specification.get("expert_branches"):
            save_stacked(directory, batch)
        golden = write_golden(family, directory, micro_batch_rows, rows)
        curves = write_curves(directory, rows, specification.get("full", False))
        if family in ROUTER_LOSS_FAMILIES:
            write_router_loss(directory, micro_batch_rows, rows)
        write_generation(directory)

        noise = golden["noise"]
        print(f"{family}: logits {noise['logits_max_abs']:.1e} (of {noise['logits_largest']:.1f}), "
              f"gradients {noise['gradients_relative_norm']:.1e} (worst {noise['gradients_worst_relative_norm']:.1e})")
        for name, variant in curves["variants"].items():
            first, last = variant["curve"][0]["loss"], variant["curve"][-1]["loss"]
            figures = ", ".join(f"{key} {value:.1e}" for key, value in variant["noise"].items())
            print(f"  {name}: loss {first:.4f} -> {last:.4f}; noise: {figures}")
    write_json(arguments.output / "rope.json", published_rope())
    size = sum(path.stat().st_size for path in arguments.output.rglob("*") if path.is_file())
    print(f"{size / 1e6:.2f} MB in {arguments.output}")
    if size > 14_000_000:
        sys.exit("the goldens are larger than 14 MB")


if __name__ == "__main__":
    main()
