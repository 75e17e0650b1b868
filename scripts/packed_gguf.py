"""GGUF files of Llama models, written by gguf-py and llama.cpp, and their values in f32 by gguf-py's dequantize.

What packed_forms.py does with the other packed formats.
"""

import ctypes
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


def ggml():
    """llama.cpp's own library: gguf-py has no encoder of the K types."""
    import llama_cpp

    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64,
                                            ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    return library


def gguf_bytes(matrix, kind):
    """A matrix in a type of ggml. K types are encoded by llama.cpp, the others by gguf-py."""
    import gguf

    if not kind.name.endswith("_K"):
        return gguf.quants.quantize(matrix, kind)
    shape = gguf.quant_shape_to_byte_shape(matrix.shape, kind)
    data = np.zeros(shape, np.uint8)
    matrix = np.ascontiguousarray(matrix, np.float32)
    written = ggml().ggml_quantize_chunk(int(kind), matrix.ctypes.data, data.ctypes.data, 0, *matrix.shape, None)
    assert written == data.nbytes, (written, data.nbytes)
    return data


def interleaved(matrix, heads):
    """Rows of a query or key projection as llama.cpp has them: the halves of a head take turns."""
    return matrix.reshape(heads, 2, -1, *matrix.shape[1:]).swapaxes(1, 2).reshape(matrix.shape)


def write_gguf(base, output, kind_of):
    """`kind_of`(name) -> the name of a type of ggml. Vectors are f32, as in llama.cpp's own files."""
    import gguf

    config = json.loads((base / "config.json").read_text())
    assert config["model_type"] == "llama", "the order of rows is Llama's"
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    output.mkdir(parents=True)
    writer = gguf.GGUFWriter(output / "model.gguf", "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    for name, tensor in load_file(base / "model.safetensors").items():
        matrix = tensor.float().numpy()
        turned = heads.get(name.split(".")[-2])
        if turned:
            matrix = interleaved(matrix, turned)
        kind = gguf.GGMLQuantizationType[kind_of(name) if matrix.ndim == 2 else "F32"]
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), gguf_bytes(matrix, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf_values(output / "model.gguf")


def gguf_values(path):
    """Of a file of the architecture `llama`."""
    import gguf
    from fetch_smollm2 import hub_name, in_halves, value

    reader = gguf.GGUFReader(path)
    assert value(reader, "general.architecture") == "llama"
    heads = {"attn_q": value(reader, "llama.attention.head_count"), "attn_k": value(reader, "llama.attention.head_count_kv")}
    values, packed = {}, set()
    for tensor in reader.tensors:
        matrix = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in reversed(tensor.shape)])
        part = tensor.name.split(".")[-2]
        if part in heads:
            matrix = in_halves(matrix, heads[part])
        name = hub_name(tensor.name)
        values[name] = torch.from_numpy(np.ascontiguousarray(matrix, np.float32))
        if tensor.tensor_type.name not in ("F32", "F16", "BF16"):
            packed.add(name)
    return values, packed
