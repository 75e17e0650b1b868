#!/usr/bin/env python3
"""Writes tests/goldens/gguf/tokenizers.json: the ids that llama.cpp gives to some texts.

    pip install gguf==0.19.0 llama-cpp-python==0.3.36 tokenizers
    python scripts/make_gguf_tokenizer_golden.py

`bytes` has the ids for each of llama.cpp's ways to split text (`tokenizer.ggml.pre`), all with the tokens and merges of
datasets/quickstart/base. `pieces` has a small vocabulary of SentencePiece's kind, trained on the texts, and its ids
with and without a space before a text.
"""

import json
import tempfile
from pathlib import Path

import gguf
import llama_cpp
from tokenizers import Tokenizer, models, normalizers, trainers

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "tests" / "goldens" / "gguf" / "tokenizers.json"
PRE = ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken", "default"]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

TEXTS = [
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces before, and behind  ",
    "numbers: 7 42 365 1234567 3.14159, ½ ² ③ ٣٤ and  12 after two spaces",
    "don't DON'T we've They'Re I'm he'd It’s 'quoted'",
    "tabs\tand\t\tline\nbreaks\n\n\n  and\r\nothers\r\n",
    "def f(x: int) -> str:\n    return f\"{x!r}\" if x > 0 else None\n",
    '{"key": [1, 2, {"a": null}], "b": true}',
    "https://example.com/a/b?c=d&e=f#g user@example.org $5.99 €20 100% ~^|<=>",
    "Ünïcödé façade Straße Łódź, e\u0301 ñ",
    "Привет, мир! Γειά σου Κόσμε",
    "你好，世界！ こんにちは世界。 안녕하세요 세계!",
    "مرحبا بالعالم! שלום עולם! नमस्ते दुनिया! สวัสดีชาวโลก",
    "😀 👍🏽 👨\u200d👩\u200d👧 🇩🇪 emoji😀inline",
    "CamelCase snake_case XMLHttpRequest SCREAMING x1y2z3 ǅ",
    "!!!??? ... --- *** ((())) ```",
    "a",
    " ",
    "\n",
    "   \n   ",
    "",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "<|user|>Hi<|end|>\n<|assistant|> Hello <|end|>",
    "[INST] Hi [/INST] there </s><s> again</s>",
    "<|use r|> <|end <0x0A> ▁ mark",
]


def ids_of(write, texts):
    """llama.cpp's ids for a file that `write` puts the tokenizer into."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        write(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        return [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]


def of_bytes(pre):
    quickstart = json.loads((ROOT / "datasets" / "quickstart" / "base" / "tokenizer.json").read_text())
    tokens = {index: text for text, index in quickstart["model"]["vocab"].items()}
    special = {token["id"] for token in quickstart["added_tokens"]}
    tokens.update((token["id"], token["content"]) for token in quickstart["added_tokens"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in quickstart["model"]["merges"]]

    def write(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list([tokens[index] for index in range(len(tokens))])
        writer.add_token_types([CONTROL if index in special else NORMAL for index in range(len(tokens))])
        writer.add_token_merges(merges)

    return ids_of(write, TEXTS)


def vocabulary_of_pieces():
    """(text, score, type) of each token."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], max_token_length=12, show_progress=False)
    readme = (ROOT / "README.md").read_text().splitlines()[:60]
    trained.train_from_iterator([text for text in readme + TEXTS[:10]], trainer)
    model = json.loads(trained.to_str())["model"]
    made = ["".join(merge) for merge in model["merges"]]
    letters = sorted(set(model["vocab"]) - set(made) - {"<unk>"})
    tokens = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    tokens += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    tokens += [(text, -float(place), NORMAL) for place, text in enumerate(dict.fromkeys(made))]
    tokens += [(text, -1000.0 - place, NORMAL) for place, text in enumerate(letters)]
    tokens += [("[INST]", 0.0, USER_DEFINED), ("<|end|>", 0.0, CONTROL)]
    return tokens


def of_pieces(tokens, space):
    def write(writer):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([text for text, _, _ in tokens])
        writer.add_token_scores([score for _, score, _ in tokens])
        writer.add_token_types([kind for _, _, kind in tokens])
        writer.add_add_space_prefix(space)

    return ids_of(write, TEXTS)


def main():
    tokens = vocabulary_of_pieces()
    golden = {
        "texts": TEXTS,
        "bytes": {pre: of_bytes(pre) for pre in PRE},
        "pieces": {"tokens": tokens, "with_space": of_pieces(tokens, True), "without_space": of_pieces(tokens, False)},
    }
    rows = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}" for key, value in golden.items()]
    FILE.write_text("{" + ",\n".join(rows) + "}\n")
    print(f"{FILE}: {FILE.stat().st_size} bytes, {len(tokens)} pieces")


if __name__ == "__main__":
    main()
