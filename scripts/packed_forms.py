"""Model directories in the packed formats that people publish, and their values in f32.

Each function `write_*` takes a 16-bit model directory and writes one that is packed, as the program
that owns the format writes it where this program runs on a CPU: transformers with bitsandbytes, and
mlx-lm. FP8, compressed-tensors, GPTQ and AWQ are packed here from their formats' definitions. GGUF
files are in packed_gguf.py.

Each returns the values that the reference decodes, by transformers' tensor names, all in f32:

    bitsandbytes    its generic decoder of 4 bits, and int8_vectorwise_dequant
    MLX             mx.dequantize with scales and biases widened to f32 before
    the others      codes, zero points and scales before they are packed

None of this shares a line with the readers of crates/packed.
"""

import json
import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hub_spelling import mlx_spelling
from packed_gguf import gguf_values

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "q_a_proj", "q_b_proj",
           "kv_a_proj_with_mqa", "kv_b_proj")


def is_linear(name):
    """Whether a tensor is the matrix of a linear layer inside the decoder."""
    return name.endswith(".weight") and name.split(".")[-2] in LINEARS


def is_expert(name):
    """Whether a tensor is the matrix of an expert that a router chooses among."""
    return is_linear(name) and ".experts." in name


def widened(tensors):
    """f32, contiguous."""
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


# --- bitsandbytes ---------------------------------------------------------------------------------


def load_bitsandbytes(directory, **settings):
    """The model of transformers and bitsandbytes on the CPU. `settings`: how to pack a 16-bit directory; `attention`:
    its implementation."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype, attention = settings.pop("dtype", torch.bfloat16), settings.pop("attention", "sdpa")
    config = BitsAndBytesConfig(**settings) if settings else None
    more = {"quantization_config": config} if config else {}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, device_map="cpu", attn_implementation=attention,
                                                 **more)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
        # Its kernel for evaluation on processors with AVX512-BF16 takes multiples of 32 rows only.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if dtype == torch.float32:  # transformers keeps what the file has, and refuses model.float()
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
    return model


def bitsandbytes_4bit(weight):
    """The values of a packed matrix by the decoder for all devices, which is what CUDA does.

    The decoder for CPUs of bitsandbytes 0.50.2 counts blocks from the start of each row: with rows that are
    not whole blocks it takes wrong scales. Elsewhere both have to agree.
    """
    import bitsandbytes as bnb
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    state = weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
    value = _dequantize_4bit_compute(weight.data.reshape(-1), scales.float(), state.code, state.blocksize, state.shape,
                                     state.dtype)
    if state.shape[-1] % state.blocksize == 0:
        assert torch.equal(value, bnb.functional.dequantize_4bit(weight.data, state))
    return value


def its_program_is_right(directory):
    """Whether the CPU kernels of bitsandbytes decode this directory as its generic decoder does."""
    config = json.loads((directory / "config.json").read_text())
    four_bits = config.get("quantization_config", {}).get("load_in_4bit")
    return not four_bits or all(config[key] % 64 == 0 for key in ("hidden_size", "intermediate_size"))


def bitsandbytes_values(model):
    import bitsandbytes as bnb

    values = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            values[f"{name}.weight"] = bitsandbytes_4bit(module.weight)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            codes, scales = module.weight.data, module.weight.SCB
            values[f"{name}.weight"] = bnb.functional.int8_vectorwise_dequant(codes, scales)
    packed = set(values)
    for name, parameter in model.named_parameters():
        values.setdefault(name, parameter.data)
    return {name: value.detach().float().clone() for name, value in values.items()}, packed


def save_bitsandbytes(base, output, dtype=torch.bfloat16, **settings):
    """What transformers with bitsandbytes writes of a base."""
    if settings.get("load_in_4bit"):
        settings["bnb_4bit_compute_dtype"] = dtype
    load_bitsandbytes(base, dtype=dtype, **settings).save_pretrained(output)
    (output / "generation_config.json").unlink(missing_ok=True)


def write_bitsandbytes(base, output, dtype=torch.bfloat16, **settings):
    save_bitsandbytes(base, output, dtype, **settings)
    # What is read again, not what was in memory: a file that says less than the model would be found.
    return bitsandbytes_values(load_bitsandbytes(output, dtype=dtype))


# --- MLX ------------------------------------------------------------------------------------------


def convert_mlx(base, output, mode="affine", bits=None, group=None, overrides=None):
    """What mlx_lm.convert does, without a tokenizer. `overrides`: path ending -> settings or False; `None`: what the
    family asks for, such as 8 bits for routers."""
    import mlx.core as mx
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    mx.set_default_device(mx.cpu)
    config = json.loads((base / "config.json").read_text())
    if "text_config" not in config:
        config = mlx_spelling(config)
    model, _ = load_model(base, model_config=config)
    cast_of(model, config.get("torch_dtype"))

    def predicate(path, module):
        for ending, settings in (overrides or {}).items():
            if path.endswith(ending):
                return settings
        return True

    asked = None if overrides is None else predicate
    model, config = quantize_model(model, config, group, bits, mode=mode, quant_predicate=asked)
    save_model(output, model)
    save_config(config, output / "config.json")
    (output / "model.safetensors.index.json").unlink()


def cast_of(model, name):
    """What mlx_lm.convert does first: numbers in the type that config.json states, but for those that a model names."""
    import mlx.core as mx
    from mlx.utils import tree_map_with_path

    if name is None:
        return

    is_cast = getattr(model, "cast_predicate", lambda _: True)
    model.update(tree_map_with_path(
        lambda path, array: array.astype(getattr(mx, name)) if is_cast(path) and mx.issubdtype(array.dtype, mx.floating)
        else array, model.parameters()))


def write_mlx(base, output, overrides=None, **settings):
    """As `convert_mlx`, with `overrides` alone, whatever the family asks for."""
    convert_mlx(base, output, overrides=overrides or {}, **settings)
    return mlx_values(output)


def mlx_values(directory):
    import mlx.core as mx

    quantization = json.loads((directory / "config.json").read_text())["quantization"]
    tensors = {}
    for path in sorted(directory.glob("model*.safetensors")):
        tensors |= mx.load(str(path))
    values, packed = {}, set()
    for name, tensor in tensors.items():
        stem = name.rsplit(".", 1)[0]
        if name.endswith((".scales", ".biases")):
            continue
        if f"{stem}.scales" in tensors and name.endswith(".weight"):
            settings = quantization.get(stem, quantization)
            scales, biases = tensors[f"{stem}.scales"], tensors.get(f"{stem}.biases")
            if biases is not None:
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            tensor = mx.dequantize(tensor, scales, biases, group_size=settings["group_size"], bits=settings["bits"],
                                   mode=settings.get("mode", "affine"))
            packed.add(name)
        tensor = torch.from_numpy(np.array(tensor.astype(mx.float32)))
        for part, of_expert in experts_apart(name, tensor):
            values[part] = of_expert
            if name in packed and part != name:
                packed.add(part)
        if name not in values:
            packed.discard(name)
    together_as_gemma4(values, packed)
    return values, packed


def experts_apart(name, tensor):
    """mlx-lm's stack of a layer's experts, one by one under the names that hub files have; of LFM2, other names of
    dense parts and a convolution that is turned back."""
    in_hub = name
    if ".feed_forward." in name:
        for theirs, ours in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
            in_hub = in_hub.replace(f".{theirs}.", f".{ours}.")
    if in_hub.endswith(".conv.conv.weight"):
        tensor = tensor.transpose(1, 2)
    if ".switch_mlp." not in in_hub:
        return [(in_hub, tensor)]
    return [(in_hub.replace(".switch_mlp.", f".experts.{n}."), of_expert.contiguous()) for n, of_expert in enumerate(tensor)]


def together_as_gemma4(values, packed):
    """Gemma 4's stacks as hub files have them, with gate and up in one. They are no matrices, so not in `packed`."""
    for name in [name for name in values if name.endswith(".experts.switch_glu.gate_proj.weight")]:
        layer = name.removesuffix("switch_glu.gate_proj.weight")
        gate, up, down = (values.pop(f"{layer}switch_glu.{part}_proj.weight") for part in ("gate", "up", "down"))
        values[f"{layer}gate_up_proj"], values[f"{layer}down_proj"] = torch.cat((gate, up), dim=1), down
        packed -= {f"{layer}switch_glu.{part}_proj.weight" for part in ("gate", "up", "down")}


# --- packed here ----------------------------------------------------------------------------------


def write_own(base, output, quantization, pack, dtype=torch.bfloat16, is_packed=is_linear, model_type=None):
    """`pack`(stem, matrix) -> its file tensors, and its values in f32. What is not packed stays `dtype`."""
    tensors, values, packed = {}, {}, set()
    for name, tensor in load_file(base / "model.safetensors").items():
        if is_packed(name):
            parts, value = pack(name.removesuffix(".weight"), tensor.float().numpy())
            tensors |= {part: torch.from_numpy(np.ascontiguousarray(p)) if isinstance(p, np.ndarray) else p
                        for part, p in parts.items()}
            values[name] = torch.from_numpy(np.ascontiguousarray(value))
            packed.add(name)
        else:
            tensors[name] = tensor.to(dtype)
            values[name] = tensors[name].float()
    output.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output / "model.safetensors",
              metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = quantization
    config["model_type"] = model_type or config["model_type"]
    config["dtype"] = str(dtype).removeprefix("torch.")
    (output / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return values, packed


def nibbles(codes, order=range(8)):
    """Eight codes along the last axis to one 32-bit word; code `order[n]` is bits 4n to 4n + 4."""
    codes = codes.reshape(*codes.shape[:-1], -1, 8).astype(np.uint32)
    words = np.zeros(codes.shape[:-1], np.uint32)
    for place, n in enumerate(order):
        words |= codes[..., n] << np.uint32(4 * place)
    return words.view(np.int32)


def write_fp8_blocks(base, output, block=128):
    """DeepSeek's and Qwen's: E4M3 with one f32 scale for each block of rows and columns."""
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    def pack(stem, matrix):
        rows, columns = matrix.shape
        grid = -(-rows // block), -(-columns // block)
        scales = np.zeros(grid, np.float32)
        for i in range(grid[0]):
            for j in range(grid[1]):
                part = matrix[i * block:(i + 1) * block, j * block:(j + 1) * block]
                scales[i, j] = np.float32(np.abs(part).max()) / np.float32(448)
        wide = np.repeat(np.repeat(scales, block, 0), block, 1)[:rows, :columns]
        codes = torch.from_numpy(matrix / wide).to(torch.float8_e4m3fn)
        value = codes.float().numpy() * wide
        of_transformers = _dequantize_fp8_weight(codes, torch.from_numpy(scales), [block, block], torch.float32)
        assert (torch.from_numpy(value) == of_transformers).all(), stem
        return {f"{stem}.weight": codes, f"{stem}.weight_scale_inv": scales}, value

    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [block, block],
              "modules_to_not_convert": ["lm_head"]}
    return write_own(base, output, config, pack)


def compressed_tensors(kind, bits, format, **weights):
    """The `quantization_config` of compressed-tensors."""
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False, "observer": "minmax",
               "actorder": None, "group_size": None, "block_structure": None, **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None,
            "global_compression_ratio": None}


def write_fp8_channels(base, output):
    """compressed-tensors `float-quantized`: E4M3 with one bf16 scale a row."""
    def pack(stem, matrix):
        scales = torch.from_numpy(np.abs(matrix).max(1, keepdims=True) / np.float32(448)).bfloat16()
        codes = (torch.from_numpy(matrix) / scales.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        parts = {f"{stem}.weight": codes, f"{stem}.weight_scale": scales}
        return parts, (codes.float() * scales.float()).numpy()

    return write_own(base, output, compressed_tensors("float", 8, "float-quantized", strategy="channel"), pack)


def write_compressed_int4(base, output, group=32, experts_alone=False, model_type=None):
    """compressed-tensors `pack-quantized`, as Kimi K2 has it: symmetric, with bf16 scales. `experts_alone`: as in its
    files, and what they leave out by patterns."""
    def pack(stem, matrix):
        rows, columns = matrix.shape
        groups = matrix.reshape(rows, -1, group)
        scales = torch.from_numpy(np.abs(groups).max(-1) / np.float32(7.5)).bfloat16()
        wide = scales.float().numpy()[..., None]
        codes = np.clip(np.rint(groups / wide), -8, 7).astype(np.int32)  # which has no -0
        parts = {
            f"{stem}.weight_packed": nibbles((codes + 8).reshape(rows, columns)),
            f"{stem}.weight_scale": scales,
            f"{stem}.weight_shape": np.array(matrix.shape, np.int64),
        }
        value = (codes.astype(np.float32) * wide).reshape(rows, columns)
        if experts_alone:
            assert (torch.from_numpy(value) == decompressed(parts, stem, config)).all(), stem
        return parts, value

    config = compressed_tensors("int", 4, "pack-quantized", strategy="group", group_size=group)
    if experts_alone:
        config["ignore"] = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
    return write_own(base, output, config, pack, is_packed=is_expert if experts_alone else is_linear, model_type=model_type)


def decompressed(parts, stem, config):
    """The values by compressed-tensors itself, with scales in f32: it computes in their type."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = {key: value for key, value in config["config_groups"]["group_0"]["weights"].items() if value is not None}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    state = {"weight_packed": torch.from_numpy(parts[f"{stem}.weight_packed"]),
             "weight_scale": parts[f"{stem}.weight_scale"].float(),
             "weight_shape": torch.from_numpy(parts[f"{stem}.weight_shape"])}
    return BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, scheme)["weight"]


def asymmetric(matrix, group_of, count):
    """4-bit codes, zero points of 1 to 15 and f16 scales of groups of columns of a matrix [out, in]."""
    rows, columns = matrix.shape
    scales, zeros = np.zeros((count, rows), np.float16), np.zeros((count, rows), np.int32)
    codes = np.zeros((rows, columns), np.int32)
    for g in range(count):
        part = matrix[:, group_of == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        scales[g] = ((high - low) / 15).astype(np.float16)
        scale = scales[g].astype(np.float32)
        zeros[g] = np.clip(np.rint(-low / scale), 1, 15)
        codes[:, group_of == g] = np.clip(np.rint(part / scale[:, None]) + zeros[g][:, None], 0, 15)
    value = (codes - zeros[group_of].T).astype(np.float32) * scales[group_of].T.astype(np.float32)
    return codes, zeros, scales, value


def write_gptq(base, output, group=32, act_order=False, version=1):
    """GPTQ. Version 1 stores zero points less one. With `act_order` a column's group is drawn."""
    random = np.random.default_rng(14)

    def pack(stem, matrix):
        columns = matrix.shape[1]
        group_of = np.arange(columns) // group
        if act_order:
            group_of = random.permutation(group_of)
        codes, zeros, scales, value = asymmetric(matrix, group_of, -(-columns // group))
        parts = {
            f"{stem}.qweight": np.ascontiguousarray(nibbles(codes).T),  # eight codes along `in` to a word
            f"{stem}.qzeros": nibbles(zeros - (version == 1)),
            f"{stem}.scales": scales,
            f"{stem}.g_idx": group_of.astype(np.int32),
        }
        return parts, value

    config = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": act_order, "sym": False,
              "lm_head": False, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    return write_own(base, output, config, pack, torch.float16)


def write_awq(base, output, group=64):
    """AutoAWQ's `gemm`: eight codes along `out` to a word, in its own order."""
    from mlx_lm.utils import _unpack_awq_weights
    import mlx.core as mx

    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def pack(stem, matrix):
        columns = matrix.shape[1]
        group_of = np.arange(columns) // group
        codes, zeros, scales, value = asymmetric(matrix, group_of, columns // group)
        words = nibbles(np.ascontiguousarray(codes.T), order)
        # mlx-lm reads the same codes.
        assert (np.array(_unpack_awq_weights(mx.array(words.view(np.uint32)))) == codes.T).all()
        return {f"{stem}.qweight": words, f"{stem}.qzeros": nibbles(zeros, order), f"{stem}.scales": scales}, value

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm",
              "modules_to_not_convert": None}
    return write_own(base, output, config, pack, torch.float16)


# --- any of them ---------------------------------------------------------------------------------


def values_of(path):
    """The values of a packed directory or GGUF file, and the names of its packed matrices. Of bitsandbytes, MLX and GGUF:
    elsewhere the values come from where they are packed.
    """
    if path.suffix == ".gguf":
        return gguf_values(path)
    config = json.loads((path / "config.json").read_text())
    if "quantization" in config:
        return mlx_values(path)
    assert config["quantization_config"]["quant_method"] == "bitsandbytes", config["quantization_config"]
    return bitsandbytes_values(load_bitsandbytes(path))


# --- the same model in f32 ------------------------------------------------------------------------


def write_decoded(base, values, output):
    """A plain directory in f32 with these values, for any program."""
    output.mkdir(parents=True, exist_ok=True)
    config = json.loads((base / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    config["dtype"] = "float32"
    config.pop("torch_dtype", None)
    (output / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    values = {name: value for name, value in values.items()
              if not (config["tie_word_embeddings"] and name == "lm_head.weight")}
    save_file(widened(values), output / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (base / name).is_file():
            shutil.copy(base / name, output)
