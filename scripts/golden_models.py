"""The golden models: a base and its adapter are made and saved, and loaded again in f32 or f64."""

import re

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from golden_experts import (
    add_branches, add_expert_branches, pack_experts, peft_file_name, tidy_adapter, unpacked_experts)
from golden_families import NORMS_ADD_ONE, WHOLE_ONLY
from golden_float64 import in_float64
from golden_rows import forward


def save_base_model(specification, directory):
    """A random model in which every weight matters: norms near one but not one, biases not zero."""
    torch.manual_seed(specification["seed"])
    config = specification["config"]()
    model = model_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
                is_text = not any(part in name for part in ("vision", "visual", "linear_attn"))
                if name == "model.language_model.norm.weight" and config.model_type == "muse_glimmer":
                    continue  # its last norm alone does not add one
                if is_text and config.model_type in NORMS_ADD_ONE:
                    parameter.sub_(1.0)
                elif config.model_type == "gemma4_text" and ("q_norm" in name or ".post_" in name):
                    parameter.mul_(0.4)  # sharp softmaxes, and 18 large steps from the embedding, magnify rounding
            elif name.endswith((".bias", ".dt_bias", "_proj_bias")):
                parameter.normal_(0.0, 0.3)
            elif name.endswith(".A_log"):
                parameter.uniform_(-3.0, 1.0)
            elif name.endswith((".sinks", ".conv.conv.weight")):
                parameter.normal_(0.0, 1.0)
            elif name.endswith((".scale", ".per_expert_scale")):
                parameter.uniform_(0.5, 1.5)
            elif config.model_type == "gpt_oss" and name.endswith(".experts.gate_up_proj"):
                parameter.mul_(5.0)  # so that gates and values reach the limit
        for name, buffer in model.named_buffers():
            if name.endswith((".e_score_correction_bias", ".expert_bias")):
                buffer.normal_(0.0, 0.2)
            elif name.endswith(".layer_scalar"):
                buffer.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    if specification.get("mxfp4"):
        pack_experts(directory)


def model_class(config):
    return AutoModelForImageTextToText if config.model_type in WHOLE_ONLY else AutoModelForCausalLM


def save_adapter(specification, directory):
    """PEFT starts B at zero, where a wrong A or scale would not show; so both are random here."""
    base = load_base(directory)
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
    tidy_adapter(directory / "adapter")


def load_base(directory, float64=False, attention=None):
    """The model, by default with sdpa where that can do what the family has: caps of scores and sinks it cannot."""
    config = AutoConfig.from_pretrained(directory)
    attention = attention or ("eager" if config.model_type in ("gemma2", "gpt_oss") else "sdpa")
    # Grouped products of experts exist in f32 and 16 bits only.
    plain = dict(dtype=torch.float32, attn_implementation=attention, experts_implementation="eager")
    if getattr(config, "quantization_config", None):
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, **plain)
        model.load_state_dict(unpacked_experts(load_file(directory / "model.safetensors")))
        model.eval()
    else:
        model = model_class(config).from_pretrained(directory, **plain)
    return in_float64(model) if float64 else model


def load_with_adapter(directory, float64=False):
    model = with_adapter(load_base(directory), directory / "adapter")
    return in_float64(model) if float64 else model


def with_adapter(model, adapter):
    """The model with the adapter by PEFT, but branches of experts as `add_branches` computes them."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    if not any(re.search(r"\.experts\.\d", name) for name in tensors):
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


def lora_parameters(model):
    return {peft_file_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def save_stacked(directory, batch):
    """The adapter as PEFT loads it, which is the same function, and saves it again."""
    base = load_base(directory)
    base.name_or_path = ""
    model = PeftModel.from_pretrained(base, str(directory / "adapter"))
    with torch.no_grad():
        difference = (forward(model, batch) - forward(load_with_adapter(directory), batch)).abs()
    assert difference[batch["attention_mask"].bool()].max() < 1e-4, "PEFT loads another adapter"
    model.save_pretrained(directory / "adapter_stacked")
    tidy_adapter(directory / "adapter_stacked")
