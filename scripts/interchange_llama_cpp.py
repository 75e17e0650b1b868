"""Golden models as llama.cpp has them: for the check `gguf` of check_interchange.py.

Much stands in no key of a GGUF file, and llama.cpp takes it for granted. A golden model in which it is something else
is refused, and one in which it is as llama.cpp takes it (`TAKEN`) is compared. Where llama.cpp computes something
else than transformers, whatever the file says (`DIFFERS`), transformers is made to compute that too.
"""

import dataclasses
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file as load_numpy
from transformers import AutoConfig, AutoModelForCausalLM

from interchange_logits import LOGITS, rows_of
from interchange_mlx import model_of, with_eps_of_config

SLIDING, FULL = "sliding_attention", "full_attention"
# The number in the lengths of queries and keys of delta nets is the same as in all norms.
DELTA = dict(linear_value_head_dim=16, rms_norm_eps=1e-6)
# Keys of config.json as llama.cpp takes them for granted. None: the key is left out.
TAKEN = {
    "deepseek_v3": dict(rope_parameters=dict(mscale=0.8, mscale_all_dim=0.8)),
    "gemma2": dict(query_pre_attn_scalar=16),
    # Every sixth layer sees all keys.
    "gemma3": dict(query_pre_attn_scalar=16, num_hidden_layers=6, layer_types=[SLIDING] * 5 + [FULL]),
    "gemma3_multimodal": dict(text_config=dict(query_pre_attn_scalar=16, layer_types=[SLIDING] * 2)),
    # The last layers with keys and values of their own are one of each kind.
    "gemma4": dict(layer_types=[SLIDING] * 3 + [FULL, SLIDING, FULL],
                   per_layer_config={"2": None, "3": dict(head_dim=16)}),
    "lfm2": dict(conv_bias=False),
    "lfm2_moe": dict(routed_scaling_factor=1.0),
    "qwen3_5": DELTA,
    "qwen3_5_moe": DELTA,
    "qwen3_moe": dict(mlp_only_layers=[]),
    "qwen3_moe_experts": dict(norm_topk_prob=True),
    "qwen3_next": DELTA,
    # Every fourth layer has no rotary embedding.
    "smollm3": dict(num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0], layer_types=[FULL] * 4),
}
# Those of which tensors have other shapes then, or there are more of them.
RESHAPED = ("gemma3", "gemma4", "qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "smollm3")

# Families that llama.cpp has none of.
WITHOUT_LLAMA_CPP = ("muse_glimmer",)

# A number that is rounded to f16 may come to the next one: a unit of it.
HALF = 2**-11
HALF_GELU = "it looks GELU up by numbers in f16; so does transformers then"
EPSILON = "it has config.json's epsilon in the norms inside of latent attention; so has transformers then"
WHOLE_RANGE = "it rounds the range of YaRN, whatever `truncate` says; so does transformers then"
LONG_ROWS = "it has the factors of long rows for all rows; only long rows are compared"
DIFFERS = {
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_multimodal", "gemma4", "gemma4_k_eq_v", "gemma4_moe"), HALF_GELU),
    **dict.fromkeys(("deepseek_v3", "deepseek_v3_plain", "glm4_moe_lite"), EPSILON),
    **dict.fromkeys(("gpt_oss", "gpt_oss_experts", "gpt_oss_mxfp4", "gpt_oss_mxfp4_experts"), WHOLE_RANGE),
    "mistral": "it has no window; rows end where it would begin to matter",
    "phi3": LONG_ROWS,
}
ROUNDED_INPUTS = "it rounds to Q8_0 what is multiplied with experts in MXFP4; so does transformers then"


@dataclasses.dataclass
class LlamaCppCase:
    """A model with an adapter, as all programs load it."""

    base: Path
    # For `finetune`, and as PEFT reads it.
    adapter: Path
    peft_adapter: Path
    rows: list
    # The base for transformers, if that is another one.
    theirs: Path | None = None
    # How much of the largest logit may differ.
    bound: float = LOGITS
    # Makes a model of transformers compute what llama.cpp computes.
    change: object = lambda model: model


def with_changes(config, changes):
    for key, value in changes.items():
        if value is None:
            config.pop(key)
        else:
            config[key] = with_changes(config.get(key, {}), value) if isinstance(value, dict) else value
    return config


class HalfGelu(torch.nn.Module):
    def forward(self, values):
        looked_up = torch.nn.functional.gelu(values.half().float(), approximate="tanh").half().float()
        return torch.where(values.abs() < 10, looked_up, values.clamp(min=0))


def with_half_gelu(model):
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = HalfGelu()
    return model


def in_q8_0(values):
    import gguf

    kind = gguf.GGMLQuantizationType.Q8_0
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), kind), kind))


def with_rounded_inputs(model):
    """gpt-oss's experts in MXFP4 as llama.cpp has them: it multiplies whole numbers of 8 bits with them."""
    for module in model.modules():
        if hasattr(module, "_apply_gate") and hasattr(module, "gate_up_proj_bias"):
            forward, gate = module.forward, module._apply_gate
            module.forward = lambda states, *rest, forward=forward, **named: forward(in_q8_0(states), *rest, **named)
            module._apply_gate = lambda both, gate=gate: in_q8_0(gate(both))
    return model


def has_mxfp4(path):
    import gguf

    return any(tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4 for tensor in gguf.GGUFReader(path).tensors)


def reshaped(family, config):
    """A model with what fits of the golden one's weights and with random ones, and a random adapter on the same
    modules as the golden one's."""
    torch.manual_seed(5)
    directory, adapter = family.work / "llama-cpp", family.work / "llama-cpp-adapter"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(family.directory, config=AutoConfig.from_pretrained(directory),
                                                 dtype=torch.float32, ignore_mismatched_sizes=True)
    model.save_pretrained(directory)
    settings = LoraConfig.from_pretrained(family.directory / "adapter")
    settings.init_lora_weights, settings.inference_mode = False, False
    get_peft_model(model, settings).save_pretrained(adapter)
    return directory, adapter


def llama_cpp_case(family, run, peft_adapter):
    """A golden model with the adapter of its run. `peft_adapter`: that as PEFT reads it."""
    name, rows = family.name, rows_of(family)
    config = json.loads((family.directory / "config.json").read_text())
    case = LlamaCppCase(family.directory, run / "adapter", peft_adapter, rows)
    changes = TAKEN.get(name)
    if DIFFERS.get(name) == WHOLE_RANGE:
        truncated = with_changes(dict(config), dict(rope_parameters=dict(truncate=True)))
        case.theirs = model_of(family, "llama-cpp-truncated", truncated)
    elif DIFFERS.get(name) == LONG_ROWS:
        case.rows = [row for row in rows if len(row) > config["original_max_position_embeddings"]]
    elif DIFFERS.get(name) == EPSILON:
        case.change = with_eps_of_config
    elif DIFFERS.get(name) == HALF_GELU:
        case.change, case.bound = with_half_gelu, HALF
    if name in RESHAPED:
        case.base, case.adapter = reshaped(family, with_changes(config, changes))
        case.peft_adapter = case.adapter
    elif changes:
        tensors = load_numpy(family.directory / "model.safetensors")
        if name == "lfm2":
            tensors = {key: value for key, value in tensors.items() if not (".conv." in key and key.endswith(".bias"))}
        case.base = model_of(family, "llama-cpp", with_changes(config, changes), tensors)
    return case
