#!/usr/bin/env python3
"""Writes tests/goldens/tiktoken/{kimi,qwen}: two tiny tokenizers in tiktoken's form, and the ids that tiktoken gives to
some texts.

    pip install tiktoken==0.12.0
    python scripts/make_tiktoken_goldens.py

Each directory has the files of a published one: the ranks (`tiktoken.model`, `qwen.tiktoken`), tokenizer_config.json,
and for kimi a tokenization_kimi.py with the pattern. The ranks are trained here, over the texts below.

    pip install tokenizers==0.23.3
    python scripts/make_tiktoken_goldens.py --compare 20000
    python scripts/make_tiktoken_goldens.py --compare 20000 --ranks tiktoken.model --like kimi

compares tiktoken with Hugging Face's tokenizers, which gets the tokenizer.json that crates/dataset/src/tiktoken.rs
makes. The texts are random. `--points` splits every code point between letters in both programs. Nothing is written.
"""

import argparse
import base64
import collections
import json
import random
import sys
import time
import unicodedata
from pathlib import Path

import regex
import tiktoken

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "goldens" / "tiktoken"
SIZE = 600

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
KIMI = [
    r"[\p{Han}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?",
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
]
QWEN = (
    CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"kimi": "|".join(KIMI), "qwen": QWEN}

# Of the ids behind the ranks, those that have a name in Kimi-K2's tokenizer_config.json.
KIMI_NAMES = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    254: "[UNK]",
    255: "[PAD]",
}
RESERVED = 256

TRAINING = [
    "The tokenizer splits a text into pieces, and every piece becomes one or more tokens. The ranks say which pair of "
    "tokens is merged first. It's the same for all texts, isn't it? They're read line by line, and we've counted them.",
    "I'm sure that you'll find what you're looking for; he'd said so, and she'd agreed. DON'T SHOUT, THEY'VE HEARD IT.",
    "def read(path: str) -> dict:\n    with open(path) as file:\n        return {line: rank for rank, line in "
    "enumerate(file)}\n\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path\n",
    "今天天气很好，我们一起去公园散步。你好，世界！中文和English混合在一起，数字有123和4567。模型读取文本，然后输出结果。",
    "我们的模型可以回答问题，也可以写代码。你们好！这是一个测试，那是另一个测试。北京、上海和广州是中国的大城市。",
    "Сегодня хорошая погода, и мы идём гулять в парк. Привет, мир! Это проверка, которая проверяет слова и числа.",
    "Модель читает текст и пишет ответ. Мы не знаем, что будет завтра, но сегодня всё хорошо.",
    "こんにちは世界。これはテストです。안녕하세요 세계! 이것은 시험입니다. สวัสดีชาวโลก नमस्ते दुनिया مرحبا بالعالم שלום עולם",
    "2024-01-31 12:34:56 0.001 1,000,000 42 7 365 1234567890 3.14159265 100% $5.99 €20 ½ ² ③ ٣٤",
    "😀😀😀 👍🏽👍🏽 👨\u200d👩\u200d👧 🇩🇪 🎉🎉 emoji😀inline 🙂 ok 🙂\n",
    "    four spaces\n        eight spaces\n\ttab\n\t\ttwo tabs\r\nwindows line\r\n\n\n   \n" + " " * 40 + "end",
    "Ünïcödé façade Straße Łódź e\u0301 ñ Ελληνικά κείμενα ǅ ﬁ K",
    '{"key": [1, 2, {"a": null}], "b": true, "name": "value", "list": ["x", "y"]}\n',
    "https://example.com/a/b?c=d&e=f#g user@example.org !!! ??? ... --- *** === ### ((())) [[]] {{}} <|>",
]
# Whole pieces that no merge makes: nothing but the look-up of a piece finds them.
UNMERGED = {
    "kimi": ["测试一下看看", " Unmergeable", "\u2003\u2003\u2003"],
    "qwen": ["неxyz", " Unmergeable", "\u2003\u2003\u2003"],
}

TEXTS = [
    "",
    "a",
    " ",
    "\n",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces before, and behind  ",
    "   three",
    " " * 5,
    " " * 41 + "x",
    "\t\t\ttabs\tand\t tabs",
    "\n\n\n",
    "  \n  \n\n  x",
    "line\r\nline\r\n\r\nline\rend",
    "a\u00a0b\u2003c\u3000d\u2028e\u0085f",
    "\u2003\u2003\u2003",
    "Unmergeable Unmergeable unmergeable",
    "it's don't we've they're I'm you'll he'd",
    "IT'S DON'T WE'VE THEY'RE I'M YOU'LL HE'D",
    "'s 't 'RE 'quoted' o'clock rock'n'roll It’s",
    "'\u017f and 's: a long s",
    "HTTPServer XMLHttpRequest camelCase PascalCase snake_case SCREAMING_CASE x1y2z3",
    "ǅungla ǆ Ǆ ﬁnd K",
    "你好",
    "你好，世界！",
    "今天天气很好，我们一起去公园散步。",
    "中文English混合texte和数字123在一起4567890。",
    "测试一下看看",
    "测试一下看看吧 测试一下看看",
    "〇一二三〆々〻 豈更 𠀀𠀁 ⺀⼀",
    "漢字とひらがなとカタカナ、ｶﾅ、㍿",
    "안녕하세요 세계! 각 각 한국어",
    "Привет, мир! Сегодня хорошая погода.",
    "ПРИВЕТ Мир приветМир",
    "Καλημέρα κόσμε ΣΊΣΥΦΟΣ",
    "مرحبا بالعالم ٣٤٥٦ שלום עולם",
    "नमस्ते दुनिया क्षत्रिय १२३४",
    "สวัสดีชาวโลก ภาษาไทย ๑๒๓๔",
    "e\u0301 é n\u0303 ñ a\u0328\u0301 \u0301x q\u0323\u0307",
    "1 12 123 1234 12345 123456 1234567",
    "3.14159, -1e-5, 0xFF, 1,000,000.00 ½ ² ③ Ⅷ",
    "2024-01-31T12:34:56Z",
    "😀",
    "😀😀😀 emoji😀inline",
    "👍🏽 👨\u200d👩\u200d👧 🇩🇪 ☺\ufe0f",
    "!!!??? ... --- *** ((())) ``` ~~~\n\n",
    "def f(x: int) -> str:\n    return f\"{x!r}\" if x > 0 else None\n",
    "\tif (a && b) {\r\n\t\treturn c[0];\r\n\t}\n",
    '{"key": [1, 2, {"a": null}], "b": true}',
    "https://example.com/a/b?c=d&e=f#g user@example.org $5.99 €20 100%",
    "a" * 70,
    "ababababababababab",
    "aaaaaaa bbbbbbb aaaaaaa",
    "=" * 33 + "\n" + "-" * 33 + "\n",
    "\u0000\u0001\u001f\u007f\u0080\uffff\U0010ffff",
    "zero\u200bwidth\ufeffmark \u200fright",
    "<|im_end|>",
    "<|im_end|><|im_end|>\n<|im_end|>",
    "<|im_user|>user<|im_middle|>Hi<|im_end|><|im_assistant|>assistant<|im_middle|>",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "[BOS]Hi[EOS] [EOT] [UNK] [PAD] [bos]",
    "<|endoftext|> <|extra_0|><|extra_10|> <|extra_204|><|extra_205|>",
    "<|reserved_token_605|> x<|reserved_token_608|>y <|reserved_token_856|>",
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>",
    "<|im_end <|im_end| > <|im_ end|> |im_end|>",
]


def byte_order():
    """The bytes in the order of published ranks: those that print come first."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [bytes([byte]) for byte in prints + [byte for byte in range(256) if byte not in prints]]


def train(like):
    """Ranks by byte-pair encoding: the most frequent pair becomes a token, again and again."""
    pieces = collections.Counter()
    for text in TRAINING:
        pieces.update(regex.findall("(?V1)" + PATTERNS[like], text))
    words = [([bytes([byte]) for byte in piece.encode()], count) for piece, count in sorted(pieces.items())]
    extra = [text.encode() for text in UNMERGED[like]]
    tokens = byte_order()
    while len(tokens) < SIZE - len(extra):
        pairs = collections.Counter()
        for parts, count in words:
            for pair in zip(parts, parts[1:]):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        made = best[0] + best[1]
        # Two pairs may make the same token.
        if made not in tokens:
            tokens.append(made)
        for parts, _ in words:
            place = 0
            while place + 1 < len(parts):
                if (parts[place], parts[place + 1]) == best:
                    parts[place : place + 2] = [made]
                place += 1
    return {token: rank for rank, token in enumerate(tokens + extra)}


def special_tokens(like, size):
    if like == "kimi":
        return {KIMI_NAMES.get(place, f"<|reserved_token_{size + place}|>"): size + place for place in range(RESERVED)}
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + [f"<|extra_{number}|>" for number in range(205)]
    return {name: size + place for place, name in enumerate(names)}


def encoding(like, ranks):
    return tiktoken.Encoding(
        like, pat_str=PATTERNS[like], mergeable_ranks=ranks, special_tokens=special_tokens(like, len(ranks))
    )


def prepared(like, text):
    """What tokenization_qwen.py does to a text before tiktoken gets it."""
    return unicodedata.normalize("NFC", text) if like == "qwen" else text


def config(like, size):
    if like == "qwen":
        return {
            "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
            "model_max_length": 8192,
            "tokenizer_class": "QWenTokenizer",
        }
    settings = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    listed = {
        str(size + place): {"content": name, **settings, "special": "tool_call" not in name}
        for place, name in KIMI_NAMES.items()
    }
    return {
        "added_tokens_decoder": listed,
        "additional_special_tokens": ["<|im_end|>", "<|im_user|>", "<|im_assistant|>", "[EOT]", "<|im_system|>"],
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "model_max_length": 1048576,
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": "[UNK]",
    }


def module():
    """What is read of a tokenization_kimi.py."""
    lines = "".join(f'            r"""{part}""",\n' for part in KIMI)
    return (
        '"""A stand-in for the module that a published directory has: the pattern, and nothing that runs."""\n\n\n'
        "class TikTokenTokenizer:\n"
        f"    num_reserved_special_tokens = {RESERVED}\n\n"
        f'    # What a text is split by.\n    pat_str = "|".join(\n        [\n{lines}        ]\n    )\n\n'
        "    def arguments(self, ranks, special_tokens):\n"
        "        return dict(\n            pat_str=self.pat_str,\n            mergeable_ranks=ranks,\n"
        "            special_tokens=special_tokens,\n        )\n"
    )


def write(like):
    folder = FOLDER / like
    folder.mkdir(parents=True, exist_ok=True)
    ranks = train(like)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (folder / ("tiktoken.model" if like == "kimi" else "qwen.tiktoken")).write_text("".join(lines))
    (folder / "tokenizer_config.json").write_text(json.dumps(config(like, len(ranks)), indent=2) + "\n")
    if like == "kimi":
        (folder / "tokenization_kimi.py").write_text(module())
    made = encoding(like, ranks)
    rows = [{"text": text, "ids": made.encode(prepared(like, text), allowed_special="all")} for text in TEXTS]
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows]
    (folder / "ids.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {len(ranks)} ranks, {len(TEXTS)} texts, {size} bytes")


def read_ranks(path):
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def letters():
    """GPT-2's printable character of each byte."""
    order = [token[0] for token in byte_order()]
    printable = order[:188]
    return {byte: chr(byte) if byte in printable else chr(256 + order[188:].index(byte)) for byte in order}


def rebuilt(like, ranks):
    """The tokenizer.json of crates/dataset/src/tiktoken.rs."""
    from tokenizers import Tokenizer

    letter = letters()
    written = {token: "".join(letter[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = [(token[:place], token[place:]) for place in range(1, len(token))]
        known = [(ranks[left], ranks[right], left, right) for left, right in parts if left in ranks and right in ranks]
        merges += [[written[left], written[right]] for _, _, left, right in sorted(known)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": id, "content": text, **flags} for text, id in special_tokens(like, len(ranks)).items()]
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[like]}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = {text: ranks[token] for token, text in written.items()}
    made = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if like == "qwen" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": merges,
        },
    }
    text = json.dumps(made, ensure_ascii=False)
    start = time.monotonic()
    tokenizer = Tokenizer.from_str(text)
    seconds = time.monotonic() - start
    size = len(text.encode())
    print(f"{like}: {len(ranks)} ranks, {len(merges)} merges, {size} bytes of JSON read in {seconds:.2f} s")
    return tokenizer


BLOCKS = [
    (0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE80), (0x1E00, 0x2070),
    (0x2E80, 0x3400), (0x4E00, 0x5200), (0xAC00, 0xAD00), (0xF900, 0xFB10), (0xFE00, 0xFE10), (0xFF00, 0xFFF0),
    (0x1F300, 0x1F650), (0x20000, 0x20100), (0, 0x110000),
]  # fmt: skip


class RandomTexts:
    """Texts of many kinds: words, code points, the vocabulary's own tokens, and few letters again and again."""

    def __init__(self, ranks, special, seed):
        self.random = random.Random(seed)
        decoded = (token.decode(errors="ignore") for token in ranks)
        self.tokens = [text for text in decoded if text]
        self.long = [text for text in self.tokens if len(text) > 2]
        self.special = list(special)
        self.words = " ".join(TRAINING + TEXTS).split(" ")

    def point(self):
        first, end = self.random.choice(BLOCKS)
        code = self.random.randrange(first, end)
        return " " if 0xD800 <= code < 0xE000 else chr(code)

    def part(self):
        choice, many = self.random.randrange(12), self.random.randrange
        if choice < 2:
            return self.random.choice(self.words) + self.random.choice([" ", "", "\n", "  "])
        if choice < 4:
            return self.random.choice(self.tokens)
        if choice == 4:
            # A token with its end cut off, before another one.
            text = self.random.choice(self.long or self.tokens)
            return text[: many(len(text) + 1)] + self.random.choice(self.tokens)
        if choice == 5:
            return "".join(self.point() for _ in range(1 + many(8)))
        if choice == 6:
            few = ["ab", "aab", "na", "的是", "= -", "01", "ха", " \n", "\t ", "xX", "-", "😀a", "ah", "_"]
            letters = self.random.choice(few)
            return "".join(self.random.choice(letters) for _ in range(1 + many(60)))
        if choice == 7:
            return self.random.choice([" ", "\n", "\t", "\r\n", "\u3000", "=", "a", "哈", "0", "!"]) * many(40)
        if choice == 8:
            return str(many(10 ** (1 + many(12))))
        if choice == 9:
            return self.random.choice(self.special) if many(2) else self.random.choice(["'s", "'LL", "'", "n't", "’s"])
        if choice == 10:
            return self.random.choice(self.tokens) * (1 + many(6))
        word = "".join(self.random.choice("etaoinshrdlucmfwypvbgkjqxz") for _ in range(1 + many(14)))
        return self.random.choice([word, word.upper(), word.title(), " " + word, "_" + word])

    def text(self):
        return "".join(self.part() for _ in range(1 + self.random.randrange(12)))


def compare(like, ranks, count, seed):
    tokenizer, made = rebuilt(like, ranks), encoding(like, ranks)
    texts = RandomTexts(ranks, special_tokens(like, len(ranks)), seed)
    different, composed, characters, tokens = 0, 0, 0, 0
    for number in range(count):
        text = TEXTS[number] if number < len(TEXTS) else texts.text()
        want = made.encode(prepared(like, text), allowed_special="all")
        found = tokenizer.encode(text, add_special_tokens=False).ids
        characters, tokens = characters + len(text), tokens + len(want)
        if want != found and tokenizer.encode(prepared(like, text), add_special_tokens=False).ids == want:
            # Python composes the whole text, across special tokens too, and knows newer marks than tokenizers' NFC.
            composed += 1
        elif want != found:
            different += 1
            if different <= 10:
                same = [one == other for one, other in zip(want, found)]
                place = same.index(False) if False in same else len(same)
                print(f"  {number}: {text[:80]!r} at token {place}:")
                for name, ids in (("tiktoken", want), ("tokenizers", found)):
                    near = [made.decode_single_token_bytes(id) for id in ids[max(0, place - 1) : place + 5]]
                    print(f"    {name:10} {near}")
        elif like == "kimi" and tokenizer.decode(found, skip_special_tokens=False) != text:
            different += 1
            print(f"  {number}: decoded otherwise: {text[:80]!r}")
    size = f"{characters} characters, {tokens} tokens"
    print(f"{like}: {different} of {count} texts differ, {composed} more in NFC alone ({size})")
    return different


def compare_points(like, ranks):
    """Splits each code point between two letters, and behind a space, in both programs."""
    tokenizer, made = rebuilt(like, ranks), encoding(like, ranks)
    different = []
    for code in range(0x110000):
        if 0xD800 <= code < 0xE000:
            continue
        point = chr(code)
        # NFC changes neighbours; it is not what is compared here.
        text = f"a{point}b {point}B1{point}{point}\n{point}中{point}"
        if like == "qwen":
            text = prepared(like, text)
        if made.encode(text, allowed_special="all") != tokenizer.encode(text, add_special_tokens=False).ids:
            different.append(code)
    names = ", ".join(f"U+{code:04X} {unicodedata.name(chr(code), '?')}" for code in different[:20])
    print(f"{like}: {len(different)} of {0x110000 - 0x800} code points differ {names}")
    return len(different)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", type=int, metavar="TEXTS", help="compare on so many random texts")
    parser.add_argument("--points", action="store_true", help="compare on every code point")
    parser.add_argument("--ranks", type=Path, help="ranks to compare with, in place of the tiny ones")
    parser.add_argument("--like", choices=list(PATTERNS), help="compare this pattern only")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    likes = [arguments.like] if arguments.like else list(PATTERNS)
    different = 0
    for like in likes:
        if not (arguments.compare or arguments.points):
            write(like)
            continue
        ranks = read_ranks(arguments.ranks) if arguments.ranks else train(like)
        if arguments.compare:
            different += compare(like, ranks, arguments.compare, arguments.seed)
        if arguments.points:
            different += compare_points(like, ranks)
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
