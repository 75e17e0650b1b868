#!/usr/bin/env python3
"""Writes the goldens of the decoder families: tiny random models, and what transformers and PEFT
compute with them.

Per family, under OUTPUT/<family>/:

    config.json, generation_config.json, model.safetensors
                            the base model, as transformers saves it, in f32
    config.hub.json         (some families) the same config as most models on the hub spell it
    adapter/                a LoRA adapter with A and B both non-zero, as PEFT saves it
    golden.safetensors      one right-padded micro-batch and its answers:
        input_ids, attention_mask, labels   [row, position], labels unshifted, -100 outside the loss
        logits.<row>                        [length, vocabulary] with the adapter; real tokens only
        base_logits.<row>                   the same without it
        merged_logits.<row>                 the same after merge_and_unload
        grad.<PEFT file name>               gradient of (sum of token losses / trained tokens)
    golden.json             losses, versions, inverse rope frequencies, and how far f32 is from f64
    rows.jsonl              12 rows of tokens, the training data of curves.json
    curves.json             loss, gradient norm and learning rate of each step of a few short runs
    final_clip_cosine.safetensors   the adapter after the last step of that run
    adapter_stacked/        (experts) the same adapter as PEFT saves it again: one branch for all experts

and OUTPUT/rope.json: inverse frequencies of published configs, for the branches that tiny heads do
not reach.

The f64 figures set the tolerances. An f32 implementation may differ from this one by about as much
as this one differs from f64: then both are equally exact. transformers computes norms and rope in
f32 even in an f64 model, so `in_float64` replaces these two. Otherwise the tolerances would be too
small.

Same versions (requirements.txt) and same kind of CPU: same bytes. Another CPU may round
differently.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here comes from the hub; a lookup would be a mistake

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM, Gemma3Config, Gemma3TextConfig, GraniteConfig, LlamaConfig, Ministral3Config, MistralConfig,
    Olmo3Config, Qwen2Config, Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3Config, Qwen3MoeConfig, SmolLM3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

IGNORED = -100
VOCABULARY = 96
# An ordinary token of these models: only the mask and the labels tell padding apart.
PADDING_ID = 0
MICRO_BATCH_LENGTHS = (17, 23, 9)
# Uneven on purpose: with equal numbers of trained tokens, a mean of means would pass for the mean.
ROW_LENGTHS = (12, 25, 7, 18, 21, 9, 30, 14, 6, 22, 16, 11)
GLOBAL_BATCH_SIZE = 4
MICRO_BATCH_SIZE = 2
STEPS = 20
FULL_STEPS = 10

SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=80,
    num_attention_heads=4,
    max_position_embeddings=64,
    initializer_range=0.2,  # ten times the usual: logits that differ between tokens
    bos_token_id=1,
    eos_token_id=2,
)
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# A large epsilon: the norm of a result near zero would magnify its rounding.
QWEN3_5 = dict(
    {**SIZES, "initializer_range": 0.1}, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-2,
    linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=16, linear_value_head_dim=12, linear_conv_kernel_dim=4, tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                     "mrope_section": [2, 1, 1], "mrope_interleaved": True},
)
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}

FAMILIES = {
    "llama3": dict(
        seed=1,
        config=lambda: LlamaConfig(
            **SIZES, num_hidden_layers=2, num_key_value_heads=2, rms_norm_eps=1e-5,
            rope_parameters=dict(LLAMA3_ROPE), tie_word_embeddings=False,
        ),
        lora=dict(target_modules="all-linear"),
        hub_config=True,
    ),
    "llama": dict(
        # Chosen: with rsLoRA's scale of 4, some seeds make curves that magnify rounding
        # ten-thousandfold.
        seed=22,
        config=lambda: LlamaConfig(
            **SIZES, num_hidden_layers=3, num_key_value_heads=4, rms_norm_eps=1e-6,
            rope_parameters=dict(PLAIN_ROPE), tie_word_embeddings=True,
        ),
        lora=dict(target_modules="all-linear", use_rslora=True),
        full=True,
    ),
    "qwen2": dict(
        seed=3,
        config=lambda: Qwen2Config(
            **SIZES, num_hidden_layers=2, num_key_value_heads=2, rms_norm_eps=1e-6,
            rope_parameters=dict(PLAIN_ROPE, rope_theta=1000000.0), tie_word_embeddings=True,
        ),
        lora=dict(target_modules=["q_proj", "v_proj"]),
        hub_config=True,
        full=True,
    ),
    "qwen3": dict(
        seed=4,
        # 4 heads of 16 are 64 wide. So o_proj is not square, and hidden_size / heads is not the
        # size of a head.
        config=lambda: Qwen3Config(
            **SIZES, num_hidden_layers=2, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6,
            rope_parameters=dict(PLAIN_ROPE, rope_theta=1000000.0), tie_word_embeddings=False,
        ),
        lora=dict(target_modules="all-linear"),
    ),
    "mistral": dict(
        seed=5,
        config=lambda: MistralConfig(
            **SIZES, num_hidden_layers=2, num_key_value_heads=2, rms_norm_eps=1e-5, sliding_window=5,
            rope_parameters=dict(PLAIN_ROPE), tie_word_embeddings=False,
        ),
        lora=dict(target_modules=r".*\.(1)\.mlp\.(gate|up|down)_proj"),
    ),
    "smollm3": dict(
        seed=6,
        # The second of three layers has no rotary embedding.
        config=lambda: SmolLM3Config(
            **SIZES, num_hidden_layers=3, num_key_value_heads=2, rms_norm_eps=1e-6, no_rope_layers=[1, 0, 1],
            pad_token_id=None, rope_parameters=dict(PLAIN_ROPE, rope_theta=2000000.0), tie_word_embeddings=True,
        ),
        lora=dict(target_modules="all-linear"),
        hub_config=True,
        full=True,
    ),
    "gemma3": dict(
        seed=7,
        # The second of three layers sees all keys, with a rotary embedding of its own. Scores are not
        # divided by the root of a head's size.
        config=lambda: Gemma3TextConfig(
            **SIZES, num_hidden_layers=3, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"], query_pre_attn_scalar=24,
            pad_token_id=None, tie_word_embeddings=True, rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": dict(PLAIN_ROPE),
            },
        ),
        lora=dict(target_modules="all-linear"),
        hub_config=True,
        full=True,
    ),
    "qwen3_moe": dict(
        seed=8,
        # The second of three layers is dense.
        config=lambda: Qwen3MoeConfig(
            **SIZES, num_hidden_layers=3, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, num_experts=6,
            num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True, mlp_only_layers=[1],
            rope_parameters=dict(PLAIN_ROPE, rope_theta=1000000.0), tie_word_embeddings=False,
        ),
        lora=dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        hub_config=True,
    ),
    "qwen3_moe_experts": dict(
        seed=9,
        # With norm_topk_prob false, the weights of a token's experts do not add up to one.
        config=lambda: Qwen3MoeConfig(
            **SIZES, num_hidden_layers=2, num_key_value_heads=4, rms_norm_eps=1e-6, num_experts=5,
            num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=False,
            rope_parameters=dict(PLAIN_ROPE), tie_word_embeddings=True,
        ),
        lora=dict(target_modules=["q_proj"]),
        expert_branches=True,
    ),
    "gemma3_multimodal": dict(
        seed=10,
        config=lambda: Gemma3Config(
            text_config=Gemma3TextConfig(
                **SIZES, num_hidden_layers=2, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, sliding_window=5,
                layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=24, pad_token_id=None,
                rope_parameters={"full_attention": dict(PLAIN_ROPE, rope_theta=1000000.0),
                                 "sliding_attention": dict(PLAIN_ROPE)},
            ).to_dict(),
            vision_config=dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                               image_size=28, patch_size=14),
            mm_tokens_per_image=4, boi_token_index=90, eoi_token_index=91, image_token_index=92,
        ),
        lora=dict(target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)"),
    ),
    "ministral3": dict(
        seed=11,
        # Queries grow from position 8 on.
        config=lambda: Ministral3Config(
            **SIZES, num_hidden_layers=2, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, pad_token_id=None,
            rope_parameters=dict(YARN_ROPE, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1),
            tie_word_embeddings=False,
        ),
        lora=dict(target_modules=["q_proj", "k_proj", "gate_proj"]),
        hub_config=True,
    ),
    "granite": dict(
        seed=12,
        config=lambda: GraniteConfig(
            **SIZES, num_hidden_layers=2, num_key_value_heads=2, rms_norm_eps=1e-5, embedding_multiplier=12.0,
            attention_multiplier=0.25, residual_multiplier=0.22, logits_scaling=3.0,
            rope_parameters=dict(PLAIN_ROPE), tie_word_embeddings=True,
        ),
        lora=dict(target_modules=["q_proj", "o_proj", "down_proj"]),
        hub_config=True,
        full=True,
    ),
    "olmo3": dict(
        seed=13,
        # The fourth layer sees all keys, with positions of its own.
        config=lambda: Olmo3Config(
            **SIZES, num_hidden_layers=4, num_key_value_heads=2, rms_norm_eps=1e-6, sliding_window=5, pad_token_id=None,
            rope_parameters={"full_attention": dict(YARN_ROPE, rope_theta=500000.0),
                             "sliding_attention": dict(PLAIN_ROPE, rope_theta=500000.0)},
            tie_word_embeddings=False,
        ),
        lora=dict(target_modules=["q_proj", "v_proj", "up_proj"]),
        hub_config=True,
        full=True,
    ),
    "qwen3_5": dict(
        seed=14,
        # The third of four layers has attention; two value heads share a key head.
        config=lambda: Qwen3_5TextConfig(**QWEN3_5, num_hidden_layers=4, layer_types=[
            "linear_attention", "linear_attention", "full_attention", "linear_attention"]),
        lora=dict(target_modules="all-linear"),
    ),
    "qwen3_5_moe": dict(
        seed=15,
        config=lambda: Qwen3_5MoeTextConfig(
            **{key: value for key, value in QWEN3_5.items() if key != "intermediate_size"}, num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"], num_experts=6, num_experts_per_tok=2,
            moe_intermediate_size=24, shared_expert_intermediate_size=20,
        ),
        lora=dict(target_modules="all-linear"),
    ),
}

# Families whose norms multiply by 1 + weight.
NORMS_ADD_ONE = ("gemma3_text", "gemma3", "qwen3_5_text", "qwen3_5_moe_text")

VARIANTS = {
    "constant": dict(learning_rate=1e-2, weight_decay=0.01, max_grad_norm=0.0, schedule="constant",
                     warmup_steps=0, min_lr_ratio=0.0, steps=STEPS),
    "clip_cosine": dict(learning_rate=1e-2, weight_decay=0.01, max_grad_norm=0.1, schedule="cosine",
                        warmup_steps=4, min_lr_ratio=0.1, steps=STEPS),
    "linear": dict(learning_rate=1e-2, weight_decay=0.01, max_grad_norm=0.0, schedule="linear",
                   warmup_steps=5, min_lr_ratio=0.0, steps=STEPS),
}
FULL_VARIANT = dict(learning_rate=1e-3, weight_decay=0.01, max_grad_norm=0.0, schedule="constant",
                    warmup_steps=0, min_lr_ratio=0.0, steps=FULL_STEPS)


# --- models ---------------------------------------------------------------------------------------


def save_base_model(specification, directory):
    """A random model in which every weight matters: norms near one but not one, biases not zero."""
    torch.manual_seed(specification["seed"])
    config = specification["config"]()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
                is_text = not any(part in name for part in ("vision", "visual", "linear_attn"))
                if is_text and config.model_type in NORMS_ADD_ONE:
                    parameter.sub_(1.0)
            elif name.endswith((".bias", ".dt_bias")):
                parameter.normal_(0.0, 0.3)
            elif name.endswith(".A_log"):
                parameter.uniform_(-3.0, 1.0)
    model.save_pretrained(directory)


def save_adapter(specification, directory):
    """PEFT starts B at zero, where a wrong A or scale would not show; so both are random here."""
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    base.name_or_path = ""  # else the adapter would name a path of this machine
    base.config._name_or_path = ""
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, task_type="CAUSAL_LM", **specification["lora"])
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.normal_(0.0, 0.2)
            elif "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(directory / "adapter")
    if specification.get("expert_branches"):
        add_expert_branches(directory / "adapter", model)
    # An empty form of a model card.
    (directory / "adapter" / "README.md").unlink(missing_ok=True)
    # PEFT holds target_modules in a set, whose order Python draws anew in each process.
    path = directory / "adapter" / "adapter_config.json"
    saved = json.loads(path.read_text())
    if isinstance(saved["target_modules"], list):
        saved["target_modules"].sort()
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")


# Grouped products of experts exist in f32 and 16 bits only.
PLAIN = dict(dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager")


def load_base(directory, float64=False):
    model = AutoModelForCausalLM.from_pretrained(directory, **PLAIN)
    return in_float64(model) if float64 else model


def load_with_adapter(directory, float64=False):
    model = AutoModelForCausalLM.from_pretrained(directory, **PLAIN)
    model = with_adapter(model, directory / "adapter")
    return in_float64(model) if float64 else model


def with_adapter(model, adapter):
    """The model with the adapter by PEFT, but branches of experts as `add_branches` computes them."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    if not any(".experts." in name for name in tensors):
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    config = LoraConfig.from_pretrained(str(adapter))
    config.target_modules = {"q_proj"}
    config.inference_mode = False
    model = get_peft_model(model, config)
    add_branches(model, config)
    found = {peft_file_name(name): parameter for name, parameter in model.named_parameters() if "lora_" in name}
    assert found.keys() == tensors.keys(), found.keys() ^ tensors.keys()
    with torch.no_grad():
        for name, parameter in found.items():
            parameter.copy_(tensors[name])
    return model


# --- branches of experts --------------------------------------------------------------------------
#
# transformers 5 holds all experts of a layer in two parameters. PEFT 0.21 gives each of those one branch
# and turns adapters with a branch for each projection of each expert into such. Trained that way they
# become something else: so a plain loop over the experts is the reference here, and PEFT is for loading.


def expert_modules(model):
    return [module for module in model.modules() if type(module).__name__ == "Qwen3MoeExperts"]


def add_branches(model, config):
    """Gives each projection of each expert a branch, under the name that PEFT's older files have."""
    for experts in expert_modules(model):
        hidden, inner = experts.hidden_dim, experts.intermediate_dim
        experts.branch_scale = config.lora_alpha / config.r
        for number in range(experts.num_experts):
            expert = torch.nn.Module()
            for part, inputs, outputs in [("gate_proj", hidden, inner), ("up_proj", hidden, inner), ("down_proj", inner, hidden)]:
                branch = torch.nn.Module()
                branch.lora_A = torch.nn.Linear(inputs, config.r, bias=False)
                branch.lora_B = torch.nn.Linear(config.r, outputs, bias=False)
                expert.add_module(part, branch)
            experts.add_module(str(number), expert)
        experts.forward = experts_with_branches.__get__(experts)


def experts_with_branches(self, hidden, chosen, weights):
    out = torch.zeros_like(hidden)

    def product(x, weight, branch):
        return x @ weight.T + self.branch_scale * branch.lora_B(branch.lora_A(x))

    for number in range(self.num_experts):
        token, place = torch.where(chosen == number)
        if len(token) == 0:
            continue
        expert, x = getattr(self, str(number)), hidden[token]
        gate_weight, up_weight = self.gate_up_proj[number].chunk(2, dim=0)
        inner = self.act_fn(product(x, gate_weight, expert.gate_proj)) * product(x, up_weight, expert.up_proj)
        y = product(inner, self.down_proj[number], expert.down_proj)
        out = out.index_add(0, token, y * weights[token, place, None])
    return out


def add_expert_branches(adapter, model):
    """Adds random branches of experts to an adapter's files."""
    add_branches(model, model.peft_config["default"])
    tensors = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            if ".experts." in name:
                parameter.data.normal_(0.0, 0.2 if "lora_A" in name else 0.1)
            tensors[peft_file_name(name)] = parameter.detach().contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    path = adapter / "adapter_config.json"
    saved = json.loads(path.read_text())
    saved["target_modules"] = ["down_proj", "gate_proj", "q_proj", "up_proj"]
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def without_adapter(model):
    scales = {experts: experts.branch_scale for experts in expert_modules(model) if hasattr(experts, "branch_scale")}
    for experts in scales:
        experts.branch_scale = 0.0
    with model.disable_adapter():
        yield
    for experts, scale in scales.items():
        experts.branch_scale = scale


def merged(model):
    for experts in expert_modules(model):
        if not hasattr(experts, "branch_scale"):
            continue
        for number in range(experts.num_experts):
            expert = getattr(experts, str(number))
            change = lambda branch: experts.branch_scale * branch.lora_B.weight @ branch.lora_A.weight
            experts.gate_up_proj.data[number] += torch.cat([change(expert.gate_proj), change(expert.up_proj)])
            experts.down_proj.data[number] += change(expert.down_proj)
        experts.branch_scale = 0.0
    return model.merge_and_unload()


def save_stacked(directory, batch):
    """The adapter as PEFT loads it, which is the same function, and saves it again."""
    base = AutoModelForCausalLM.from_pretrained(directory, **PLAIN)
    base.name_or_path = ""
    model = PeftModel.from_pretrained(base, str(directory / "adapter"))
    with torch.no_grad():
        difference = (forward(model, batch) - forward(load_with_adapter(directory), batch)).abs()
    assert difference[batch["attention_mask"].bool()].max() < 1e-4, "PEFT loads another adapter"
    model.save_pretrained(directory / "adapter_stacked")
    (directory / "adapter_stacked" / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_stacked" / "adapter_config.json"
    saved = json.loads(path.read_text())
    saved["target_parameters"].sort()
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")


def in_float64(model):
    """The model with the same weights and every operation in f64, norms and rope included."""
    model = model.double()
    for module in model.modules():
        if type(module).__name__ in ("Qwen3_5RMSNormGated", "Qwen3_5MoeRMSNormGated"):
            module.forward = gated_norm_float64.__get__(module)
        elif hasattr(module, "variance_epsilon"):
            module.forward = rms_norm_float64.__get__(module)
        elif type(module).__name__ in ("Gemma3RMSNorm", "Qwen3_5RMSNorm", "Qwen3_5MoeRMSNorm"):
            module.forward = centred_rms_norm_float64.__get__(module)
        elif type(module).__name__ in ("Qwen3MoeTopKRouter", "Qwen3_5MoeTopKRouter"):
            module.forward = router_float64.__get__(module)
        elif hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)
        elif layer_types := rotary_layer_types(module):
            module.inverse_frequencies = {
                kind: inverse_frequencies_float64(module.config, kind) for kind in layer_types
            }
            module.factors = {kind: attention_factor(module.config, kind) for kind in layer_types}
            module.forward = rope_float64.__get__(module)
    return model


def rotary_layer_types(module):
    """The kinds of layers that a rotary embedding tells apart, [None] if it does not; [] for other modules."""
    if hasattr(module, "inv_freq"):
        return [None]
    return [kind for kind in ("full_attention", "sliding_attention") if hasattr(module, f"{kind}_inv_freq")]


def rms_norm_float64(self, hidden):
    assert hidden.dtype == torch.float64
    return self.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def centred_rms_norm_float64(self, hidden):
    assert hidden.dtype == torch.float64
    return (1 + self.weight) * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps))


def gated_norm_float64(self, hidden, gate):
    return rms_norm_float64(self, hidden) * torch.nn.functional.silu(gate)


def delta_rule(query, key, value, g, beta, **keywords):
    """The recurrence itself, token by token, in f64: transformers has chunks in f32."""
    if query.dtype != torch.float64:
        return CHUNKED(query, key, value, g, beta, **keywords)
    repeats = value.shape[2] // key.shape[2]
    unit = lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
    query = (unit(query) * query.shape[-1] ** -0.5).repeat_interleave(repeats, dim=2)
    key = unit(key).repeat_interleave(repeats, dim=2)
    state = torch.zeros(*value.shape[::2], key.shape[-1], value.shape[-1], dtype=value.dtype)
    out = []
    for n in range(value.shape[1]):
        state = state * g[:, n, :, None, None].to(state.dtype).exp()
        error = value[:, n] - torch.einsum("bhxy,bhx->bhy", state, key[:, n])
        state = state + torch.einsum("bhx,bhy->bhxy", key[:, n], beta[:, n, :, None] * error)
        out.append(torch.einsum("bhxy,bhx->bhy", state, query[:, n]))
    return torch.stack(out, dim=1), None


CHUNKED = modeling_qwen3_5.torch_chunk_gated_delta_rule
modeling_qwen3_5.torch_chunk_gated_delta_rule = delta_rule
modeling_qwen3_5_moe.torch_chunk_gated_delta_rule = delta_rule


def router_float64(self, hidden):
    assert hidden.dtype == torch.float64
    logits = torch.nn.functional.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
    weights, experts = torch.topk(logits.softmax(dim=-1), self.top_k, dim=-1)
    if getattr(self, "norm_topk_prob", True):
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return logits, weights, experts


def rope_float64(self, hidden, position_ids, layer_type=None):
    assert hidden.dtype == torch.float64
    if position_ids.dim() == 3:  # of text, height and width, which are the same without images
        position_ids = position_ids[0]
    angles = position_ids[..., None].double() * self.inverse_frequencies[layer_type]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * self.factors[layer_type], angles.sin() * self.factors[layer_type]


def attention_factor(config, layer_type=None):
    """What YaRN multiplies cosines and sines by."""
    rope = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    if rope["rope_type"] != "yarn":
        return 1.0
    scale = lambda m: 0.1 * m * math.log(rope["factor"]) + 1.0
    return scale(rope["mscale"]) / scale(rope["mscale_all_dim"]) if "mscale" in rope else scale(1.0)


def inverse_frequencies_float64(config, layer_type=None):
    """Written from the formulas (RoFormer; Llama 3.1's smoothing): a check of transformers' own."""
    rope = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head_size = int(head_size * rope.get("partial_rotary_factor", 1.0))
    frequencies = []
    for dimension in range(0, head_size, 2):
        frequency = rope["rope_theta"] ** (-dimension / head_size)
        if rope["rope_type"] == "linear":
            frequency /= rope["factor"]
        if rope["rope_type"] == "yarn":
            turning = lambda turns: (head_size * math.log(rope["original_max_position_embeddings"] / (turns * 2 * math.pi))
                                     / (2 * math.log(rope["rope_theta"])))
            low, high = max(math.floor(turning(rope["beta_fast"])), 0), min(math.ceil(turning(rope["beta_slow"])), head_size - 1)
            ramp = min(max((dimension / 2 - low) / ((high if high != low else low + 0.001) - low), 0.0), 1.0)
            frequency = ramp * frequency / rope["factor"] + (1 - ramp) * frequency
        if rope["rope_type"] == "llama3":
            wavelength = 2 * math.pi / frequency
            original = rope["original_max_position_embeddings"]
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            if wavelength > original / low:
                frequency /= rope["factor"]
            elif wavelength >= original / high:
                smooth = (original / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / rope["factor"] + smooth * frequency
        frequencies.append(frequency)
    return torch.tensor(frequencies, dtype=torch.float64)


def write_hub_config(directory):
    """The spelling of Llama 3 and Qwen2 on the hub: before transformers 5, and 4.45's head_dim."""
    config = json.loads((directory / "config.json").read_text())
    rope = dict(config.pop("rope_parameters"))
    if config["model_type"] == "olmo3":
        rope = dict(rope["full_attention"])
    if config["model_type"] == "gemma3_text":
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = config["layer_types"].index("full_attention") + 1
        config.pop("_sliding_window_pattern", None)
        rope = dict(rope["full_attention"])
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.43.0"
    config.pop("layer_types", None)
    head_dim = config.get("head_dim")
    # These classes have a padding token of their own where config.json names none, and Gemma's a size of
    # heads.
    if config["model_type"] not in ("smollm3", "gemma3_text", "olmo3", "ministral3"):
        config.pop("pad_token_id", None)
    if config["model_type"] not in ("gemma3_text", "ministral3"):
        config.pop("head_dim", None)
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts", config.get("num_experts"))
        config["head_dim"] = head_dim
    if config["model_type"] == "qwen2":
        # Qwen2 files name a window and switch it off: a reader must not look at the number alone.
        config.update(sliding_window=5, use_sliding_window=False, max_window_layers=1)
    (directory / "config.hub.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


# --- rows and losses ------------------------------------------------------------------------------


def random_row(length, generator, vocabulary=VOCABULARY):
    """Tokens and unshifted labels: a prompt outside the loss, and in longer rows a second gap."""
    input_ids = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
    labels = list(input_ids)
    prompt = int(torch.randint(2, max(3, length // 2), (1,), generator=generator))
    labels[:prompt] = [IGNORED] * prompt
    if length > 15:
        gap = prompt + 2
        labels[gap:gap + 3] = [IGNORED] * 3
    return {"input_ids": input_ids, "labels": labels}


def pad(rows):
    """Rows as [row, position] tensors, padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    missing = [longest - len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.tensor([row["input_ids"] + [PADDING_ID] * n for row, n in zip(rows, missing)]),
        "attention_mask": torch.tensor([[1] * len(row["input_ids"]) + [0] * n for row, n in zip(rows, missing)]),
        "labels": torch.tensor([row["labels"] + [IGNORED] * n for row, n in zip(rows, missing)]),
    }


def forward(model, batch):
    more = {}
    if model.config.model_type == "gemma3":  # wants to know which tokens are of images: none
        more["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **more).logits


def token_losses(logits, labels):
    """Loss of each trained token: logits at a position answer for the label of the next."""
    targets = labels[:, 1:].flatten()
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED, reduction="none"
    )
    return losses[targets != IGNORED]


def trained_tokens(rows):
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])


def mean_loss(model, rows):
    """Mean token loss over rows, each row alone."""
    with torch.no_grad():
        total = sum(
            token_losses(forward(model, batch), batch["labels"]).double().sum().item()
            for batch in (pad([row]) for row in rows)
        )
    return total / trained_tokens(rows)


def peft_file_name(parameter_name):
    """PEFT leaves the adapter's name out of its files."""
    return parameter_name.replace(".default.", ".")


def lora_parameters(model):
    return {peft_file_name(name): p for name, p in model.named_parameters() if p.requires_grad}


# --- one micro-batch ------------------------------------------------------------------------------


def answers_to_micro_batch(directory, batch, float64):
    model = load_with_adapter(directory, float64)
    lengths = batch["attention_mask"].sum(dim=1).tolist()

    def per_row(prefix, logits):
        return {f"{prefix}.{i}": logits[i, :n].detach().clone() for i, n in enumerate(lengths)}

    logits = forward(model, batch)
    losses = token_losses(logits, batch["labels"])
    (losses.sum() / losses.numel()).backward()
    tensors = per_row("logits", logits)
    for name, parameter in lora_parameters(model).items():
        tensors[f"grad.{name}"] = parameter.grad.clone()
    with torch.no_grad():
        with without_adapter(model):
            base_logits = forward(model, batch)
        base_losses = token_losses(base_logits, batch["labels"])
        tensors |= per_row("base_logits", base_logits)
        tensors |= per_row("merged_logits", forward(merged(model), batch))
    scalars = {
        "trained_tokens": losses.numel(),
        # Token losses in the model's own type, summed in f64.
        "loss_sum": losses.double().sum().item(),
        "loss_sum_f32": losses.float().sum().item(),
        "base_loss_sum": base_losses.double().sum().item(),
    }
    return tensors, scalars


def largest_difference(prefix, tensors, reference):
    return max((t.double() - reference[k]).abs().max().item() for k, t in tensors.items() if k.startswith(prefix))


def relative_norm(pairs):
    pairs = [(a.double(), b) for a, b in pairs]
    difference = math.sqrt(sum((a - b).pow(2).sum().item() for a, b in pairs))
    return difference / math.sqrt(sum(b.pow(2).sum().item() for _, b in pairs))


def write_golden(family, directory, micro_batch_rows, rows):
    batch = pad(micro_batch_rows)
    tensors, scalars = answers_to_micro_batch(directory, batch, float64=False)
    exact, exact_scalars = answers_to_micro_batch(directory, batch, float64=True)
    gradients = [(t, exact[k]) for k, t in tensors.items() if k.startswith("grad.")]

    assert all(a.abs().max() > 0 for a, _ in gradients), "a gradient is zero: the golden would not test it"
    effect = largest_difference("logits.", tensors,
                                {k: tensors[f"base_{k}"].double() for k in tensors if k.startswith("logits.")})
    assert effect > 0.1, "the adapter hardly changes the logits"

    model = load_with_adapter(directory)
    with without_adapter(model):
        rows_loss_base = mean_loss(model, rows)
    rotary = next(m for m in model.modules() if rotary_layer_types(m))
    frequencies = {}
    for kind in rotary_layer_types(rotary):
        buffer = "inv_freq" if kind is None else f"{kind}_inv_freq"
        frequencies[buffer] = getattr(rotary, buffer)
        exact_frequencies = inverse_frequencies_float64(rotary.config, kind)
        assert torch.allclose(frequencies[buffer].double(), exact_frequencies, rtol=1e-6, atol=0)

    golden = {
        "family": family,
        "versions": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__,
                     "peft": peft.__version__},
        "rows": micro_batch_rows,
        "micro_batch": scalars,
        "rows_jsonl": {  # mean token loss over rows.jsonl
            "trained_tokens": trained_tokens(rows),
            "base_loss": rows_loss_base,
            "adapter_loss": mean_loss(model, rows),
            "adapter_loss_f64": mean_loss(load_with_adapter(directory, float64=True), rows),
        },
        "inverse_frequencies": next(iter(frequencies.values())).tolist(),
        "noise": {  # this f32 run against the same in f64
            "logits_max_abs": largest_difference("logits.", tensors, exact),
            "base_logits_max_abs": largest_difference("base_logits.", tensors, exact),
            "merged_logits_max_abs": largest_difference("merged_logits.", tensors, exact),
            "logits_largest": max(t.abs().max().item() for k, t in tensors.items() if k.startswith("logits.")),
            "loss_sum_relative": abs(scalars["loss_sum"] / exact_scalars["loss_sum"] - 1),
            "gradients_relative_norm": relative_norm(gradients),
            "gradients_worst_relative_norm": max(relative_norm([pair]) for pair in gradients),
        },
        "adapter_changes_logits_by": effect,
    }
    save_file({**batch, **{k: t.contiguous() for k, t in tensors.items()}}, directory / "golden.safetensors")
    write_json(directory / "golden.json", golden)
    return golden


# --- training curves ------------------------------------------------------------------------------


def learning_rate_factor(step, variant):
    """transformers' get_linear_ and get_cosine_schedule_with_warmup, with a floor.

    `step` counts from 0. So the first step of a run with warm-up has learning rate 0, and the last
    one is still above the floor.
    """
    warmup, total, floor = variant["warmup_steps"], variant["steps"], variant["min_lr_ratio"]
    if step < warmup:
        return step / max(1, warmup)
    if variant["schedule"] == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if variant["schedule"] == "cosine" else 1 - progress
    return floor + (1 - floor) * shape


def train(model, parameters, rows, variant):
    """The simplest training loop; returns the report of each step."""
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=variant["learning_rate"], betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=variant["weight_decay"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, variant))
    reports = []
    for step in range(variant["steps"]):
        first = step * GLOBAL_BATCH_SIZE % len(rows)
        step_rows = rows[first:first + GLOBAL_BATCH_SIZE]
        tokens = trained_tokens(step_rows)
        loss_sum = 0.0
        for start in range(0, GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE):
            batch = pad(step_rows[start:start + MICRO_BATCH_SIZE])
            losses = token_losses(forward(model, batch), batch["labels"])
            (losses.sum() / tokens).backward()  # all tokens of the step, not of the micro-batch
            loss_sum += losses.detach().double().sum().item()
        # Returns the norm before clipping, and scales by max / (norm + 1e-6) where that is below 1.
        gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, variant["max_grad_norm"] or math.inf)
        reports.append({"step": step + 1, "loss": loss_sum / tokens, "grad_norm": gradient_norm.item(),
                        "learning_rate": scheduler.get_last_lr()[0], "trained_tokens": tokens})
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return reports


def curve(variant, reports, exact_reports):
    def noise(key):
        return max(abs(a[key] / b[key] - 1) for a, b in zip(reports, exact_reports))

    return {**variant, "noise": {"loss_relative": noise("loss"), "grad_norm_relative": noise("grad_norm")},
            "curve": reports}


def write_curves(directory, rows, full):
    curves = {}
    for name, variant in VARIANTS.items():
        results = []
        for float64 in (False, True):
            model = load_with_adapter(directory, float64)
            parameters = lora_parameters(model)
            results.append((train(model, list(parameters.values()), rows, variant), parameters))
        (reports, final), (exact_reports, exact_final) = results
        curves[name] = curve(variant, reports, exact_reports)
        curves[name]["noise"]["final_relative_norm"] = relative_norm(
            [(final[k].detach(), exact_final[k].detach()) for k in final])
        if name == "clip_cosine":
            save_file({k: p.detach().contiguous() for k, p in final.items()}, directory / f"final_{name}.safetensors")
    if full:
        results, first_norms = [], {}
        for float64 in (False, True):
            model = load_base(directory, float64)
            if not float64:
                first_norms = first_gradient_norms(copy.deepcopy(model), rows)
            results.append(train(model, list(model.parameters()), rows, FULL_VARIANT))
        curves["full"] = curve(FULL_VARIANT, *results)
        curves["full"]["first_gradient_norms"] = first_norms
    document = {
        "global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": MICRO_BATCH_SIZE,
        "optimizer": {"name": "adamw", "betas": [0.9, 0.999], "eps": 1e-8},
        "variants": curves,
    }
    write_json(directory / "curves.json", document)
    return document


def first_gradient_norms(model, rows):
    """Gradient norm of each parameter in step 1: says which one is wrong when the total is."""
    step_rows = rows[:GLOBAL_BATCH_SIZE]
    batch = pad(step_rows)
    (token_losses(forward(model, batch), batch["labels"]).sum() / trained_tokens(step_rows)).backward()
    return {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}


# --- checks and files -----------------------------------------------------------------------------


def check_sliding_window(directory, batch):
    """Checks that the window is applied: otherwise its golden would prove nothing."""
    windowed, unlimited = load_base(directory), load_base(directory)
    window = unlimited.config.sliding_window
    unlimited.config.sliding_window = unlimited.config.max_position_embeddings
    eager = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        narrow, wide, other = forward(windowed, batch)[1], forward(unlimited, batch)[1], forward(eager, batch)[1]
    # The window counts the token itself: position `window` is the first that does not see
    # position 0.
    assert (narrow - wide)[:window].abs().max() < 1e-4, "the window bites too early"
    assert (narrow - wide)[window].abs().max() > 1e-3, "the window is not applied"
    assert (narrow - other).abs().max() < 1e-4, "sdpa and eager disagree"


def check_hub_config(directory, batch):
    with tempfile.TemporaryDirectory() as temporary:
        shutil.copy(directory / "config.hub.json", Path(temporary) / "config.json")
        shutil.copy(directory / "model.safetensors", temporary)
        with torch.no_grad():
            same = torch.equal(forward(load_base(Path(temporary)), batch), forward(load_base(directory), batch))
    assert same, "config.hub.json does not mean the same model"


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


def write_json(path, value):
    text = json.dumps(value, indent=2)
    # Lists of numbers and the flat objects of a curve on one line each, for readable diffs.
    text = re.sub(r"\[[^\[\]{}\"]*\]", lambda match: "[" + " ".join(match[0][1:-1].split()) + "]", text)
    text = re.sub(r"\{\s*\"step\"[^{}]*\}", lambda match: " ".join(match[0].split()), text)
    path.write_text(text + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "models"
    parser.add_argument("--output", type=Path, default=default, help="default: tests/goldens/models")
    parser.add_argument("--family", choices=list(FAMILIES), action="append", help="only this one; default: all")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    for family in arguments.family or FAMILIES:
        specification = FAMILIES[family]
        directory = arguments.output / family
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        generator = torch.Generator().manual_seed(1000 + specification["seed"])
        micro_batch_rows = [random_row(length, generator) for length in MICRO_BATCH_LENGTHS]
        rows = [random_row(length, generator) for length in ROW_LENGTHS]
        (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        save_base_model(specification, directory)
        save_adapter(specification, directory)
        batch = pad(micro_batch_rows)
        if specification.get("hub_config"):
            write_hub_config(directory)
            check_hub_config(directory, batch)
        if family in ("mistral", "gemma3", "olmo3"):
            check_sliding_window(directory, batch)
        if specification.get("expert_branches"):
            save_stacked(directory, batch)
        golden = write_golden(family, directory, micro_batch_rows, rows)
        curves = write_curves(directory, rows, specification.get("full", False))

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
    if size > 6_000_000:
        sys.exit("the goldens are larger than 6 MB")


if __name__ == "__main__":
    main()
