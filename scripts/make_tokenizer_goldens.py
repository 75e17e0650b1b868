#!/usr/bin/env python3
"""Writes tests/goldens/tokenizers/configs.json: what transformers makes of a tiny tokenizer.json beside other files.

    pip install transformers==5.23.0 tokenizers==0.23.3
    HF_HUB_OFFLINE=1 python scripts/make_tokenizer_goldens.py

`tokenizer` is a byte-level tokenizer.json with four merges. Each case has `files` that lie beside it, `changes` of its
pre-tokenizer, and what transformers' AutoTokenizer says of that: `ids` of some texts, without what the post-processor
adds, the `special` tokens, and `chat`, the ids that apply_chat_template gives.
"""

import json
import logging
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "tests" / "goldens" / "tokenizers" / "configs.json"

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHAT = [{"role": "user", "content": "the a<note>b"}]


def bytes_as_letters():
    """GPT-2's letters for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, more = [], 0
    for byte in range(256):
        if byte in plain:
            letters.append(chr(byte))
        else:
            letters.append(chr(256 + more))
            more += 1
    return letters


def added(number, content, special=True, **flags):
    token = {"id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False}
    return token | {"normalized": False, "special": special} | flags


def tokenizer():
    merges = ["t h", "th e", "Ġ the", "Ġ a"]
    vocabulary = {letter: number for number, letter in enumerate(bytes_as_letters())}
    for merge in merges:
        vocabulary[merge.replace(" ", "")] = len(vocabulary)
    first = len(vocabulary)
    texts = [("<|endoftext|>", True), ("<|im_start|>", True), ("<|im_end|>", True), ("<note>", False)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(first + n, text, special) for n, (text, special) in enumerate(texts)],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def listed(*more):
    """added_tokens_decoder of the tokenizer, and of further tokens."""
    tokens = [*tokenizer()["added_tokens"], *more]
    return {str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in tokens}


END, START = {"eos_token": "<|endoftext|>"}, {"bos_token": "<|im_start|>"}


# The model types of config.json that are trained here and whose tokenizers are byte-level.
KINDS = """deepseek_v3 glm4 glm4_moe glm4_moe_lite gpt_oss granite granitemoehybrid kimi_k25 lfm2 lfm2_moe llama ministral3
mistral mistral3 muse_glimmer olmo3 phi3 qwen2 qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
smollm3""".split()
CLASSES = [None, "PreTrainedTokenizerFast", "GPT2TokenizerFast", "Qwen2Tokenizer"]


def prefix_spaces():
    """(files, changes of the pre-tokenizer): who decides whether a text begins with a space."""
    for kind in KINDS:
        more = ["GPT2Tokenizer", "Qwen2TokenizerFast", "GPTNeoXTokenizer", "LlamaTokenizerFast"] if kind in ("llama", "qwen2") else []
        for name in [*CLASSES, *more]:
            for said in [None, True, False]:
                config = dict(END)
                if name:
                    config["tokenizer_class"] = name
                if said is not None:
                    config["add_prefix_space"] = said
                files = {"config.json": {"model_type": kind}, "tokenizer_config.json": config}
                yield files, {"add_prefix_space": said is not True}
    # A class that config.json names.
    files = {"config.json": {"model_type": "llama", "tokenizer_class": "GPT2Tokenizer"}, "tokenizer_config.json": END}
    yield files, {"add_prefix_space": True}


def splitting():
    for name in [None, "GPT2Tokenizer", "Qwen2Tokenizer"]:
        for said in [True, False]:
            config = END | {"split_special_tokens": said, "chat_template": TEMPLATE}
            if name:
                config["tokenizer_class"] = name
            yield {"config.json": {"model_type": "llama"}, "tokenizer_config.json": config}, {}


def maps():
    """tokenizer_config.json, special_tokens_map.json and added_tokens.json that do not agree."""
    flags = {"lstrip": True, "normalized": False, "rstrip": True, "single_word": False}
    new = added(264, "<new>")
    for config, older, more in [
        (END, {"eos_token": "<|im_end|>"}, None),
        (END, {"eos_token": None}, None),
        (END, START, None),
        (END | {"pad_token": "<pad>"}, {"pad_token": {"content": "<pad>", **flags}}, None),
        (END | {"pad_token": {"content": "<pad>", **flags, "__type": "AddedToken"}}, {"pad_token": "<pad>"}, None),
        (END, {"pad_token": {"content": "<pad>", **flags}}, None),
        (END | {"unk_token": "<one>"}, {"unk_token": "<two>", "extra_special_tokens": ["<three>"]}, None),
        (END | {"extra_special_tokens": ["<one>"]}, {"extra_special_tokens": ["<two>", "<one>"]}, None),
        (END | {"additional_special_tokens": ["<one>"]}, {"additional_special_tokens": ["<two>"]}, None),
        (END, {"additional_special_tokens": ["<two>"]}, None),
        (END, {"call_token": "<two>"}, None),
        (END, START, {"<new>": 264}),
        (END, {"pad_token": "<new>"}, {"<new>": 264}),
        (END | {"added_tokens_decoder": listed()}, {"eos_token": "<|im_end|>", **START}, None),
        (END | {"added_tokens_decoder": listed()}, {"pad_token": "<pad>", "extra_special_tokens": ["<two>"]}, None),
        (END | {"added_tokens_decoder": listed()}, {"additional_special_tokens": ["<two>"]}, {"<more>": 264}),
        (END | {"added_tokens_decoder": listed(new)}, START, None),
        ({"added_tokens_decoder": listed(new)}, END | START, None),
        ({"added_tokens_decoder": {}}, END | START, None),
        ({}, END | START, None),
        ({}, {"additional_special_tokens": ["<two>"]}, None),
        ({"extra_special_tokens": []}, {"additional_special_tokens": ["<two>"]}, None),
        ({"additional_special_tokens": []}, {"additional_special_tokens": ["<two>"]}, None),
        ({}, {"additional_special_tokens": ["<two>"], "extra_special_tokens": ["<one>"]}, None),
        ({}, {"extra_special_tokens": {"call_token": "<two>"}}, None),
    ]:
        files = {"config.json": {"model_type": "llama"}, "tokenizer_config.json": config}
        files["special_tokens_map.json"] = older
        if more:
            files["added_tokens.json"] = more
        yield files, {}


def case(files, changes, texts):
    made = tokenizer()
    made["pre_tokenizer"] |= changes
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {"tokenizer.json": made, **files}.items():
            (Path(folder) / name).write_text(json.dumps(content))
        found = AutoTokenizer.from_pretrained(folder)
        row = {"files": files, "changes": changes, "class": type(found).__name__}
        row["ids"] = {text: found(text, add_special_tokens=False)["input_ids"] for text in texts}
        row["special"] = {
            name: text for name, text in found.special_tokens_map.items() if name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        if found.chat_template:
            row["chat"] = found.apply_chat_template(CHAT, tokenize=True, return_dict=False)
        return row


def main():
    logging.disable(logging.WARNING)
    groups = {
        "prefix": (prefix_spaces(), ["the a"]),
        "split": (splitting(), ["<|im_start|>the<note>a<|im_end|>"]),
        "maps": (maps(), ["<|im_end|>a <pad> a<one><two><three><new><more>"]),
    }
    cases = {name: [case(*row, texts) for row in rows] for name, (rows, texts) in groups.items()}
    lines = [f'  "{name}": [\n' + ",\n".join(f"    {json.dumps(row)}" for row in rows) + "\n  ]" for name, rows in cases.items()]
    head = f'{{\n  "tokenizer": {json.dumps(tokenizer())},\n'
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(head + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
