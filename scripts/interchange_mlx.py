"""The checks of check_interchange.py for mlx-lm.

PEFT's and mlx-lm's logits of the adapter of one run; an adapter that mlx-lm saved, read by `finetune`; mlx -> peft ->
mlx gives the same bytes.

mlx-lm 0.32 loads each golden model: see `mlx_case`. Where it computes something else than transformers (`DIFFERS`),
the check is made within bounds, or of what mlx-lm computes.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy

from interchange_logits import compare_logits, refused, rows_of, torch_logits

KEYS = ("self_attn.q_proj", "mlp.down_proj", "linear_attn.out_proj", "conv.out_proj", "mlp.switch_mlp.down_proj")


@dataclasses.dataclass
class MlxCase:
    """One model as each program loads it."""

    # For `finetune`, and whether transformers loads it too and not the golden model.
    base: Path
    # For mlx-lm.
    mlx: Path
    rows: list
    loads_base: bool = False
    # Modules of the adapter that mlx-lm saves.
    keys: tuple = KEYS
    # Modules of which `finetune` has one matrix: an adapter with an A for each comes back with the ranks of all.
    apart: tuple = ()
    # Makes a model of transformers compute what mlx-lm computes.
    change: object = lambda model: model


def mlx_logits(directory, adapter, rows):
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)  # the GPU multiplies f32 less exactly
    model, _ = load_model(directory)
    if adapter is not None:
        model = load_adapters(model, str(adapter))
    model.eval()
    return [np.array(model(mx.array([row]))[0].astype(mx.float32)) for row in rows]


def save_mlx_adapter(directory, keys, output):
    """An adapter as mlx-lm saves it: random values on the last layer, in mlx-lm's own settings."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model, save_config

    mx.set_default_device(mx.cpu)
    mx.random.seed(3)
    model, _ = load_model(directory)
    settings = {"rank": 3, "scale": 7.0, "dropout": 0.0, "keys": list(keys)}
    model.freeze()
    linear_to_lora_layers(model, 1, settings)
    values = dict(tree_flatten(model.trainable_parameters()))
    values = {name: 0.2 * mx.random.normal(value.shape) for name, value in values.items()}
    output.mkdir()
    mx.save_safetensors(str(output / "adapters.safetensors"), values)
    config = {"model": str(directory), "fine_tune_type": "lora", "num_layers": 1, "lora_parameters": settings}
    save_config(config, output / "adapter_config.json")


# Each model as mlx-lm has it

# What mlx-lm 0.32.2 computes in another way than transformers, and what is compared nevertheless.
ROUNDED_FACTOR = "it rounds the factor of embeddings to bf16; transformers is made to do so"
WHOLE_RANGE = "it rounds the range of YaRN, whatever `truncate` says; config.json asks for that"
NO_WINDOWS = "it has no windows; rows end where the first would"
DIFFERS = {
    "gemma2": NO_WINDOWS,
    "gemma3": ROUNDED_FACTOR,
    "gemma3_multimodal": ROUNDED_FACTOR,
    "glm4_moe_lite": "it has config.json's epsilon in the norms inside of latent attention; so has transformers then",
    "gpt_oss": WHOLE_RANGE,
    "gpt_oss_experts": WHOLE_RANGE,
    "gpt_oss_mxfp4": WHOLE_RANGE,
    "gpt_oss_mxfp4_experts": WHOLE_RANGE,
    "mistral": NO_WINDOWS,
    "phi3": "it has the factors of long rows for all rows; only long rows are compared",
}


def read(path):
    return json.loads(path.read_text())


def model_of(family, name, config, tensors=None):
    """A directory with a config and the tensors of a golden model."""
    directory = family.work / name
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = tensors or load_numpy(family.directory / "model.safetensors")
    save_numpy(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def with_rounded_factor(model):
    """Gemma 3 as mlx-lm has it."""
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale).bfloat16().float()
    return model


def with_eps_of_config(model):
    """GLM-4.7-Flash as mlx-lm has it. In transformers these norms have 1e-6."""
    for module in model.modules():
        for norm in ("q_a_layernorm", "kv_a_layernorm"):
            if getattr(module, norm, None) is not None:
                getattr(module, norm).variance_epsilon = model.config.rms_norm_eps
    return model


def in_stacks(tensors):
    """Qwen3.5's experts as the hub has them: gate and up, and down, of all experts of a layer."""
    found, parts = {}, {}
    for name, value in tensors.items():
        stack, single, rest = name.partition(".experts.")
        if single:
            number, part = rest.removesuffix(".weight").split(".")
            parts.setdefault(f"{stack}.experts", {})[part, int(number)] = value
        else:
            found[name] = value
    for stack, of in parts.items():
        count = len(of) // 3
        of_part = lambda part: np.stack([of[part, n] for n in range(count)])
        found[f"{stack}.gate_up_proj"] = np.concatenate([of_part("gate_proj"), of_part("up_proj")], axis=1)
        found[f"{stack}.down_proj"] = of_part("down_proj")
    return found


def single_experts(tensors):
    """gpt-oss's experts in 16 bits or more as mlx-lm's own files have them: it reads those of the hub in MXFP4 only."""
    found = {}
    for name, value in tensors.items():
        if not name.endswith((".gate_up_proj", ".gate_up_proj_bias", ".down_proj", ".down_proj_bias")):
            found[name] = value
        elif name.endswith("_bias"):
            stem = name.removesuffix("_bias")
            if "gate_up" not in name:
                found[f"{stem}.bias"] = value
                continue
            for n, part in enumerate(("gate_proj", "up_proj")):
                found[stem.replace("gate_up_proj", f"{part}.bias")] = value[..., n::2]
        elif "gate_up" in name:
            for n, part in enumerate(("gate_proj", "up_proj")):
                found[name.replace("gate_up_proj", f"{part}.weight")] = value[..., n::2].swapaxes(-1, -2)
        else:
            found[f"{name}.weight"] = value.swapaxes(-1, -2)
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def mlx_case(family):
    """A golden model with the hub's config.json, which mlx-lm reads, but where it does not."""
    name, directory, rows = family.name, family.directory, rows_of(family)
    config, hub = read(directory / "config.json"), read(directory / "config.hub.json")
    tensors = load_numpy(directory / "model.safetensors")
    case = MlxCase(base=directory, mlx=directory, rows=rows)
    if name == "gemma2":
        case.rows = [row[:config["sliding_window"]] for row in rows]
    elif name == "muse_glimmer":
        # It strips the text model of `model.language_model` and knows nothing of the rest.
        tensors = {name: value for name, value in tensors.items() if not name.startswith("model.vision_")}
        hub = config
    elif name.startswith("gpt_oss"):
        config["rope_parameters"]["truncate"] = hub["rope_scaling"]["truncate"] = True
        case = dataclasses.replace(case, base=model_of(family, "mlx-base", config), loads_base=True)
        if "quantization_config" not in config:
            tensors = single_experts(tensors)
    elif name in ("gemma3", "gemma3_multimodal"):
        case.change = with_rounded_factor
        if name == "gemma3_multimodal":
            # It takes the number of tokens from the whole, where the hub's files have none.
            hub["vocab_size"] = hub["text_config"]["vocab_size"]
    elif name.startswith("gemma4"):
        hub = hub["text_config"]
    elif name.startswith("granitemoehybrid"):
        # Published models say both, with the same value.
        hub["intermediate_size"] = hub["shared_intermediate_size"]
        case.keys, case.apart = ("self_attn.q_proj", "mlp.down_proj"), ("mlp.gate_proj", "mlp.up_proj")
    elif name == "glm4_moe_lite":
        case.change = with_eps_of_config
    elif name == "lfm2":
        hub["block_dim"] = hub["hidden_size"]
    elif name == "ministral3":
        hub = config
    elif name == "phi3":
        case.rows = [row for row in rows if len(row) > config["original_max_position_embeddings"]]
    elif name.startswith("qwen3_5"):
        # It knows the multimodal model only.
        tensors = {name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()}
        tensors = in_stacks(tensors)
        case.base = model_of(family, "mlx-base", hub, tensors)
    case.mlx = model_of(family, "hub", hub, tensors)
    return case


def compare_run(run_finetune, binary, family, report, run, case, load):
    """The adapter of one run in both programs, or that mlx-lm has no place for it."""
    exported = family.work / "mlx"
    # The other base has the same weights under other names.
    source = [run] if case.base == family.directory else [case.base, "--adapter", run / "adapter", "--force"]
    try:
        run_finetune(binary, "export", *source, "--format", "mlx", "--output", exported)
    except Exception as error:
        if refused(error, report, family, "mlx", "mlx-lm"):
            return
        raise
    peft_model = PeftModel.from_pretrained(load(), str(run / "adapter")).eval()
    compare_logits(report, family.name, "mlx", torch_logits(peft_model, case.rows),
                   mlx_logits(case.mlx, exported, case.rows), "PEFT and mlx-lm with one run's adapter")


def check_mlx(run_finetune, our_loss, binary, family, report, run):
    case = mlx_case(family)
    if family.name in DIFFERS:
        report.note(family.name, "mlx", f"mlx-lm differs: {DIFFERS[family.name]}")
    load = lambda: case.change(family.load(case.base if case.loads_base else family.directory))
    compare_run(run_finetune, binary, family, report, run, case, load)
    check_saved(run_finetune, our_loss, binary, family, report, case, load, "mlx-saved", case.keys)
    if case.apart:
        check_saved(run_finetune, our_loss, binary, family, report, case, load, "mlx-apart", case.apart)


def check_saved(run_finetune, our_loss, binary, family, report, case, load, name, keys):
    """An adapter of mlx-lm's own: it computes the same in PEFT, and comes back as it was."""
    saved, back, again = (family.work / f"{name}{step}" for step in ("", "-to-peft", "-again"))
    save_mlx_adapter(case.mlx, keys, saved)
    run_finetune(binary, "export", case.base, "--adapter", saved, "--format", "peft", "--output", back)
    run_finetune(binary, "export", case.base, "--adapter", back, "--format", "mlx", "--output", again)
    if keys is case.keys:
        compare_files(report, family, saved, again)
    theirs = mlx_logits(case.mlx, saved, case.rows)
    peft = PeftModel.from_pretrained(load(), str(back)).eval()
    compare_logits(report, family.name, "mlx", theirs, torch_logits(peft, case.rows),
                   "mlx-lm's own adapter, and PEFT with our form of it")
    if keys is case.apart:
        compare_logits(report, family.name, "mlx", theirs, mlx_logits(case.mlx, again, case.rows),
                       "mlx-lm's own adapter, and mlx-lm with what went through PEFT's form")
    rows = family.files["all"]
    report.compare(family.name, "mlx saved", "all", our_loss(binary, case.base, rows, back),
                   our_loss(binary, case.base, rows, saved))


def compare_files(report, family, saved, again):
    one, other = load_numpy(saved / "adapters.safetensors"), load_numpy(again / "adapters.safetensors")
    same = one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    settings = [read(path / "adapter_config.json") for path in (saved, again)]
    parameters = [{key: each["lora_parameters"][key] for key in ("rank", "scale")} for each in settings]
    same = same and parameters[0] == parameters[1]
    report.note(family.name, "mlx", f"mlx-lm's adapter -> peft -> mlx: {len(one)} tensors, bit by bit the same",
                wrong=not same)
