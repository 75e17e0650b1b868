"""Experts of the golden models: packed in MXFP4, and with branches of LoRA of their own."""

import contextlib
import json
import re

import torch
from safetensors.torch import load_file, save_file

# --- experts in MXFP4 -----------------------------------------------------------------------------
#
# The files of gpt-oss on the hub: four bits a value, and a power of two for each 32 of a row.

MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def pack_experts(directory):
    """Random experts in MXFP4 instead of the dense ones of a gpt-oss model."""
    path = directory / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            tensors[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        blocks = (experts, outputs, inputs // 32)
        low, high = ((-4, -1) if "gate_up" in name else (-6, -3))
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(127 + low, 127 + high, blocks, dtype=torch.uint8)
    save_file(tensors, path, {"format": "pt"})
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                                   "lm_head"],
        "quant_method": "mxfp4",
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def unpacked_experts(tensors):
    """The tensors with dense experts, [expert, input, output]."""
    table = torch.tensor(MXFP4_VALUES)
    table = torch.cat((table, -table))
    dense = {}
    for name, tensor in tensors.items():
        if name.endswith("_scales"):
            continue
        if not name.endswith("_blocks"):
            dense[name] = tensor
            continue
        name = name.removesuffix("_blocks")
        values = table[torch.stack((tensor & 15, tensor >> 4), dim=-1).long()].flatten(3)
        values = values * torch.exp2(tensors[f"{name}_scales"].float() - 127)[..., None]
        dense[name] = values.flatten(2).transpose(1, 2).contiguous()
    return dense


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
    tidy_adapter(adapter, target_modules=["down_proj", "gate_proj", "q_proj", "up_proj"])


def tidy_adapter(adapter, **settings):
    """An adapter's files without an empty form of a model card, and with these settings.

    PEFT holds names of modules in sets, whose order Python draws anew in each process."""
    (adapter / "README.md").unlink(missing_ok=True)
    path = adapter / "adapter_config.json"
    saved = json.loads(path.read_text()) | settings
    for key in ("target_modules", "target_parameters"):
        if isinstance(saved.get(key), list):
            saved[key].sort()
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")


def of_single_experts(tensors, model):
    """PEFT's branches of stacked parameters, A [e * r, in] and B [out, r * e], as those of single experts."""
    count = getattr(model.config, "num_local_experts", None)
    found = {}
    for name, tensor in tensors.items():
        # The branch of gate_up_proj is the inner one of two.
        place = re.fullmatch(r"(.*\.mlp\.experts)(\.base_layer)?\.lora_([AB])\.weight", name)
        if not place:
            found[name] = tensor
            continue
        part = "gate_up_proj" if place[2] else "down_proj"
        for expert in range(count):
            if place[3] == "A":
                own = tensor.reshape(count, -1, tensor.shape[1])[expert]
            else:
                own = tensor.reshape(tensor.shape[0], -1, count)[:, :, expert]
            found[f"{place[1]}.{expert}.{part}.lora_{place[3]}.weight"] = own.contiguous()
    return found


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


def peft_file_name(parameter_name):
    """PEFT leaves the adapter's name out of its files."""
    return parameter_name.replace(".default.", ".")
