"""What the gguf package says of the GGUF files that `finetune export` writes: see interchange_formats.py."""

import json

import numpy as np
from safetensors.torch import load_file

# Models whose tensors lie in a file as in a directory, but for the rows of queries and keys. The others are compared
# with files of llama.cpp's converter in crates/model/tests/gguf_written.rs.
AS_THEY_ARE = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


def known_keys(group):
    """All keys that gguf-py has names of."""
    for name, value in vars(group).items():
        if isinstance(value, str) and not name.startswith("_"):
            yield value
        elif isinstance(value, type):
            yield from known_keys(value)


def check_names(report, family, path, kind):
    """Names of tensors and keys are those of gguf-py for the architecture."""
    import gguf

    reader = gguf.GGUFReader(path)
    text = lambda key: reader.fields[key].contents()
    arch = text("general.architecture")
    known = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[known]}
    # Newer than gguf-py 0.19.
    keys = {key.replace("{arch}", arch) for key in known_keys(gguf.Keys)} | {f"{arch}.attention.recurrent_layers"}

    def is_known(name):
        stem = name.rsplit(".", 1)[0] if name.endswith((".weight", ".bias", ".scale")) else name
        block = stem.split(".")[1] if stem.startswith("blk.") else None
        return any(stem == (one.format(bid=block) if block else one) for one in names)

    other = [tensor.name for tensor in reader.tensors if not is_known(tensor.name)]
    own = [key for key in reader.fields if not key.startswith(("GGUF.", "tokenizer.")) and key not in keys]
    said = f"{kind}: {len(reader.tensors)} tensors and {len(reader.fields)} keys of `{arch}`, not known to gguf-py: {other + own}"
    report.note(family.name, "gguf", said, wrong=bool(other or own))


def check_numbers(report, family, merged, path, kind):
    """The numbers of a file against the merged export: gguf-py makes the same bytes of them."""
    import gguf

    config = json.loads((merged / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    interleaved = config["model_type"] in ("llama", "mistral", "smollm3")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    tensors = load_file(merged / "model.safetensors").items()
    want = {names.get_name(name, try_suffixes=(".weight", ".bias")): value for name, value in tensors}
    reader = gguf.GGUFReader(path)
    compared = different = 0
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        numbers = want.pop(tensor.name).float().numpy()
        part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        if interleaved and part in heads:
            width = numbers.shape[0] // heads[part]
            rest = numbers.shape[1:]
            numbers = numbers.reshape(heads[part], 2, width // 2, *rest).swapaxes(1, 2).reshape(numbers.shape)
        theirs = np.ascontiguousarray(gguf.quants.quantize(numbers, tensor.tensor_type)).view(np.uint8).ravel()
        ours = np.ascontiguousarray(tensor.data).view(np.uint8).ravel()
        compared += ours.size
        different += int((theirs != ours).sum()) if theirs.shape == ours.shape else ours.size
    left = [name for name in want if name]
    text = f"{kind}: {different} of {compared} bytes differ from gguf-py's, {len(left)} tensors missing"
    report.note(family.name, "gguf", text, wrong=bool(different or left))
