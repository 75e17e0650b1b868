"""The f64 references of make_goldens.py: a transformers model in which nothing is rounded to f32.

transformers computes norms, rotary embeddings, routers and softmaxes in f32 even in an f64 model.
Against such a reference, tolerances would be too small.
"""

import contextlib
import math

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from transformers.models.qwen3_next import modeling_qwen3_next


def in_float64(model):
    """The model with the same weights in f64, and frequencies and factors that were never in f32."""
    model = model.double()
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)
        for kind in rotary_layer_types(module):
            prefix = "" if kind is None else f"{kind}_"
            factor = getattr(module, f"{prefix}attention_scaling")
            assert math.isclose(factor, attention_factor(module.config, kind), rel_tol=1e-12)
            exact = inverse_frequencies_float64(module.config, kind)
            setattr(module, f"{prefix}inv_freq", exact)
            setattr(module, f"{prefix}original_inv_freq", exact.clone())
    return model


@contextlib.contextmanager
def operations_of(model):
    """What a forward pass must run in: for an f64 model, with every operation in f64."""
    if next(model.parameters()).dtype != torch.float64:
        yield
        return
    torch.set_default_dtype(torch.float64)  # of the quotient of integers, and of new tensors
    try:
        with Float64Only():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


class Float64Only(TorchFunctionMode):
    """Gives f64 to code that asks for f32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            return args[0].double()
        exact = lambda value: torch.float64 if value is torch.float32 else value
        return function(*map(exact, args), **{key: exact(value) for key, value in (kwargs or {}).items()})


class NoFloat32(TorchDispatchMode):
    """Stops at an operation that rounds to f32."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            # Numbers on their own are constants: they become f64 with the tensor they meet.
            rounded = isinstance(result, torch.Tensor) and result.dtype == torch.float32 and result.dim() > 0
            assert not rounded, f"{function} is in f32"
        return results


def rotary_layer_types(module):
    """The kinds of layers that a rotary embedding tells apart, [None] if it does not; [] for other modules, those
    of a vision tower with them, which no text goes through."""
    if "vision" in getattr(getattr(module, "config", None), "model_type", ""):
        return []
    if hasattr(module, "inv_freq"):
        return [None]
    return [kind for kind in ("full_attention", "sliding_attention") if hasattr(module, f"{kind}_inv_freq")]


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
for modeling in (modeling_qwen3_5, modeling_qwen3_5_moe, modeling_qwen3_next):
    modeling.torch_chunk_gated_delta_rule = delta_rule


def rope_of(config, layer_type):
    return config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]


def attention_factor(config, layer_type=None):
    """What YaRN and LongRoPE multiply cosines and sines by."""
    rope = rope_of(config, layer_type)
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        return math.sqrt(1 + math.log(config.max_position_embeddings / original) / math.log(original))
    if rope["rope_type"] != "yarn":
        return 1.0
    scale = lambda m: 0.1 * m * math.log(rope["factor"]) + 1.0
    return scale(rope["mscale"]) / scale(rope["mscale_all_dim"]) if "mscale" in rope else scale(1.0)


def inverse_frequencies_float64(config, layer_type=None, long=False):
    """Written from the formulas (RoFormer; Llama 3.1's smoothing): a check of transformers' own."""
    rope = rope_of(config, layer_type)
    if config.model_type == "gemma4_text":  # heads of another size in layers that see all keys
        config = config.per_layer_config[layer_type]
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    partial = rope.get("partial_rotary_factor", 1.0)
    if rope["rope_type"] == "proportional":  # a part of the pairs turns, but all channels count
        turning = int(partial * head_size // 2)
        return torch.tensor([rope["rope_theta"] ** (-2 * pair / head_size) if pair < turning else 0.0
                             for pair in range(head_size // 2)], dtype=torch.float64)
    head_size = int(head_size * partial)
    frequencies = []
    for dimension in range(0, head_size, 2):
        frequency = rope["rope_theta"] ** (-dimension / head_size)
        if rope["rope_type"] == "linear":
            frequency /= rope["factor"]
        if rope["rope_type"] == "longrope":
            frequency /= rope["long_factor" if long else "short_factor"][dimension // 2]
        if rope["rope_type"] == "yarn":
            original = rope["original_max_position_embeddings"]
            turning = lambda turns: (head_size * math.log(original / (turns * 2 * math.pi))
                                     / (2 * math.log(rope["rope_theta"])))
            low, high = turning(rope["beta_fast"]), turning(rope["beta_slow"])
            if rope.get("truncate", True):
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, head_size - 1)
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
