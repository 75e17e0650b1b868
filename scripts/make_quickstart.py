#!/usr/bin/env python3
"""Make the data of `recipes/quickstart.toml`, the same bytes on every machine.

The example turns a support desk's messages into JSON tickets. Everything in it is made
here, with Python's standard library alone:

    python3 scripts/make_quickstart.py --corpus runs/quickstart-corpus.jsonl

writes

    datasets/quickstart/base/            config, tokenizer and chat template of a tiny Llama
    datasets/quickstart/train.jsonl      600 chats to learn the task from
    datasets/quickstart/valid.jsonl      100 held-back chats, none of them in train.jsonl
    runs/quickstart-corpus.jsonl         plain text to pre-train the base from (not committed)

The weights, `base/model.safetensors`, are not made here: `recipes/quickstart-pretrain.toml`
has `finetune` itself pre-train them. This script never writes or deletes that file.

The corpus holds letters, notes and lists in which the same facts are told twice in different
forms, so that the base learns to copy words from what it has just read. It holds no JSON
object and no chat. The adapter then only has to teach the form of the answer.
"""

import argparse
import json
import random
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAIN_ROWS = 600
VALID_ROWS = 100
CORPUS_ROWS = 24_000
VOCABULARY_SIZE = 1024

# The last 8 names, 6 cities and 6 items occur in the corpus and in the held-back rows,
# never in the training rows.
NAMES = """Mira Nora Tilda Omar Lena Hugo Ivan Sara Felix Anna Bruno Clara Dina Emil Greta
Hanna Jonas Karl Laura Marek Nina Oskar Paula Rosa Simon Tara Viktor Wanda Yara Adam Bella
Carlos Daria Erik Frida Ines Jakob Kira Leon Maya Niko Olga Pavel Rita Stefan Tomas Ulla
Zora""".split()
CITIES = """Oslo Rome Paris Lima Cairo Delhi Dublin Vienna Prague Lisbon Madrid Berlin
Athens Boston Denver Dallas Havana Kyoto London Malmo Milan Nairobi Quito Riga Seoul Sofia
Sydney Tokyo Tunis Turin Warsaw Zurich""".split()
COLOURS = "blue red green black white yellow brown silver pink purple".split()
ITEMS = """lamp chair table radio clock kettle toaster phone camera printer heater mirror
carpet jacket bottle basket guitar ladder blanket pillow scanner speaker helmet bicycle
backpack teapot keyboard monitor wallet curtain fan drill""".split()
HELD_BACK_NAMES, HELD_BACK_CITIES, HELD_BACK_ITEMS = NAMES[-8:], CITIES[-6:], ITEMS[-6:]

# The word on the ticket, and how people say it.
PROBLEMS = {
    "broken": ["arrived broken", "came in pieces", "is cracked"],
    "missing": ["never arrived", "did not come", "is still not here"],
    "late": ["arrived too late", "came two weeks late", "took a whole month"],
    "dirty": ["arrived dirty", "is full of stains", "needs a wash"],
    "noisy": ["makes a loud noise", "is very noisy", "hums all night"],
    "small": ["is too small", "does not fit", "is not big enough"],
    "wrong": ["is the wrong one", "is not what I chose", "is not the right model"],
    "dead": ["does not turn on", "will not start", "has no power"],
}
WANTS = {
    "replacement": ["Please send a new one.", "Can you send another one?"],
    "refund": ["I want my money back.", "Please return my money."],
    "repair": ["Please fix it.", "Can someone mend it?"],
    "pickup": ["Please collect it.", "Can you come and take it away?"],
}
KEYS = ["name", "city", "item", "problem", "wants"]

END, USER, ASSISTANT, PAD = "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


class Dice:
    """Choices made from `random.Random.random()` only, the one method whose sequence Python
    promises never to change."""

    def __init__(self, seed):
        self.source = random.Random(seed)

    def below(self, bound):
        return int(self.source.random() * bound)

    def pick(self, options):
        return options[self.below(len(options))]

    def some(self, options, count):
        """`count` different options in random order."""
        rest = list(options)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]

    def shuffled(self, options):
        return self.some(options, len(options))


# --- what happened, and the message about it ------------------------------------------------


def draw_case(dice, names, cities, items):
    problem, want = dice.pick(list(PROBLEMS)), dice.pick(list(WANTS))
    return {
        "name": dice.pick(names),
        "city": dice.pick(cities),
        "item": dice.pick(COLOURS) + " " + dice.pick(items),
        "problem": problem,
        "wants": want,
        "problem said": dice.pick(PROBLEMS[problem]),
        "wish said": dice.pick(WANTS[want]),
    }


OPENINGS = [
    "Hello, {name} from {city} here.",
    "Hi, this is {name} in {city}.",
    "Good morning, my name is {name} and I live in {city}.",
    "Dear team, I am {name}, writing from {city}.",
]
BODIES = [
    "The {item} I ordered {problem said}.",
    "My new {item} {problem said}.",
    "I bought a {item} from you, but it {problem said}.",
    "About the {item}: it {problem said}.",
]
CLOSINGS = ["Thanks, {name}, {city}.", "Best wishes from {city}, {name}"]


def message(dice, case):
    body, wish = dice.pick(BODIES), "{wish said}"
    if dice.below(4):
        parts = [dice.pick(OPENINGS), body, wish]
    else:
        parts = [dice.pick(["Hello.", "Hi."]), body, wish, dice.pick(CLOSINGS)]
    return " ".join(parts).format(**case)


def chat_row(text, case):
    ticket = json.dumps({key: case[key] for key in KEYS}, separators=(",", ":"))
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": ticket}]
    return {"messages": chat}


def make_chats():
    dice = Dice(20240501)
    texts = set()

    def rows(count, draw):
        made = []
        while len(made) < count:
            case = draw()
            text = message(dice, case)
            if text not in texts:
                texts.add(text)
                made.append(chat_row(text, case))
        return made

    names, cities, items = NAMES[:-8], CITIES[:-6], ITEMS[:-6]
    train = rows(TRAIN_ROWS, lambda: draw_case(dice, names, cities, items))
    # Half of the held-back rows are new combinations of known words; in the other half
    # the name, the city and the item are all words that no training row has.
    valid = []
    for _ in range(VALID_ROWS // 2):
        valid += rows(1, lambda: draw_case(dice, names, cities, items))
        valid += rows(
            1, lambda: draw_case(dice, HELD_BACK_NAMES, HELD_BACK_CITIES, HELD_BACK_ITEMS)
        )
    return train, valid


# --- the corpus: the same facts told again and again ----------------------------------------

STORIES = [
    "{name} lives in {city} and owns a {item}.",
    "In {city} there is a shop. There {name} saw a {item}.",
    "One day {name} went to {city} with a {item}.",
    "A {item} was sent to {city}. It was for {name}.",
    "{city} is where {name} keeps the {item}.",
]
TOLD_AGAIN = [
    "Note: {name} of {city} says that the {item} is {problem} and asks for a {wants}.",
    "A {wants} is due to {name} in {city}, as the {item} was {problem}.",
    "From: {name}. Place: {city}. About: {item}. Trouble: {problem}. Wish: {wants}.",
    "({name}, {city}) - {item} - {problem} - {wants}",
    '"{name}","{city}","{item}","{problem}","{wants}"',
    '"{item}","{problem}","{wants}","{name}","{city}"',
    '"{name}":"{city}" "{item}":"{problem}" "{name}":"{wants}"',
    '"{city}":"{name}" "{wants}":"{item}" "{item}":"{problem}"',
    '{{"{name}","{item}","{wants}"}} {{"{city}","{problem}"}}',
]
STORY_TOLD_AGAIN = [
    "Who? {name}. Where? {city}. What? {item}.",
    "So the {item} in {city} belongs to {name}.",
    '"{name}","{city}","{item}"',
    '"{item}":"{name}" "{name}":"{city}"',
    '{{"{city}","{name}","{item}"}}',
]
QUESTIONS = {
    "name": "Who",
    "city": "Where",
    "item": "What",
    "problem": "Trouble",
    "wants": "Wish",
}


def keyed_note(dice, case, keys):
    """Key and value in one of several styles, the keys in random order."""
    keys = dice.shuffled(keys)
    style = dice.below(5)
    if style == 0:
        return "\n".join(f"{key}: {case[key]}" for key in keys)
    if style == 1:
        return ", ".join(f'{key} "{case[key]}"' for key in keys)
    if style == 2:
        return "; ".join(f"{key}={case[key]}" for key in keys)
    if style == 3:
        return " ".join(f'{QUESTIONS[key]}? "{case[key]}".' for key in keys)
    return " ".join(f"{key} ({case[key]})" for key in keys)


LIST_STYLES = 6


def word_list(words, style):
    if style == 0:
        return " ".join(words)
    if style == 1:
        return ", ".join(words) + "."
    if style == 2:
        return ",".join(f'"{word}"' for word in words)
    if style == 3:
        return "{" + ",".join(f'"{word}"' for word in words) + "}"
    if style == 4:
        return "\n".join(words)
    return "-".join(f"({word})" for word in words)


def corpus_row(dice):
    kind = dice.below(20)
    case = draw_case(dice, NAMES, CITIES, ITEMS)
    if kind < 8:
        parts = [message(dice, case)]
        notes = [dice.pick(TOLD_AGAIN).format(**case), keyed_note(dice, case, KEYS)]
        parts += dice.shuffled(notes)
    elif kind < 11:
        other = draw_case(dice, NAMES, CITIES, ITEMS)
        parts = [dice.pick(STORIES).format(**case) + " " + dice.pick(STORIES).format(**other)]
        for told in dice.shuffled([case, other]):
            if dice.below(2):
                parts.append(keyed_note(dice, told, KEYS[:3]))
            else:
                parts.append(dice.pick(STORY_TOLD_AGAIN).format(**told))
    else:
        # Nothing but copying, the one thing that the adapter cannot teach. Half of these rows
        # repeat a list as it stands, which is learned first; half change its form.
        words = [dice.pick(NAMES + CITIES + COLOURS + ITEMS) for _ in range(4 + dice.below(8))]
        styles = [dice.below(LIST_STYLES) for _ in range(3)]
        if dice.below(2):
            styles = styles[:1] * 3
        parts = [word_list(words, style) for style in styles]
    return "\n".join(parts)


def make_corpus():
    dice = Dice(7)
    return [corpus_row(dice) for _ in range(CORPUS_ROWS)]


# --- the tokenizer: byte-level BPE ----------------------------------------------------------

# What the ByteLevel pre-tokenizer's pattern does to ASCII text.
WORD = re.compile(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")


def byte_alphabet():
    """GPT-2's table from bytes to printable characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(printable))
    return table


def train_bpe(texts, merge_count):
    alphabet = byte_alphabet()
    counts = {}
    for text in texts:
        for word in WORD.findall(text):
            counts[word] = counts.get(word, 0) + 1
    words = [
        ([alphabet[byte] for byte in word.encode()], count)
        for word, count in sorted(counts.items())
    ]
    merges = []
    while len(merges) < merge_count:
        pairs = {}
        for pieces, count in words:
            for pair in zip(pieces, pieces[1:]):
                pairs[pair] = pairs.get(pair, 0) + count
        if not pairs:
            break
        # The most frequent pair; of equals, the first in the alphabet.
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for pieces, _ in words:
            at = 0
            while at + 1 < len(pieces):
                if (pieces[at], pieces[at + 1]) == best:
                    pieces[at : at + 2] = ["".join(best)]
                at += 1
    return merges


def make_tokenizer(merges):
    special = [END, USER, ASSISTANT, PAD]
    tokens = special + sorted(byte_alphabet().values())
    for left, right in merges:
        if left + right not in tokens:
            tokens.append(left + right)
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, content in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }


def make_config(vocabulary_size):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary_size,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        # 1 / sqrt(hidden_size): with the usual 0.02 a model this narrow is slow to learn to copy.
        "initializer_range": 0.08,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 3,
        "torch_dtype": "float32",
        "use_cache": True,
    }


# --- files ----------------------------------------------------------------------------------


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    print(f"{path}: {len(text.encode())} bytes")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_rows(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, help="also write the pre-training corpus here")
    parser.add_argument("--output", type=Path, default=ROOT / "datasets" / "quickstart")
    arguments = parser.parse_args()

    corpus = make_corpus()
    special_and_bytes = 4 + 256
    tokenizer = make_tokenizer(train_bpe(corpus, VOCABULARY_SIZE - special_and_bytes))
    vocabulary_size = len(tokenizer["model"]["vocab"])
    assert vocabulary_size == VOCABULARY_SIZE, vocabulary_size
    train, valid = make_chats()

    base = arguments.output / "base"
    write_json(base / "config.json", make_config(vocabulary_size))
    write_json(base / "generation_config.json", {"eos_token_id": 0, "pad_token_id": 3})
    write_json(base / "tokenizer.json", tokenizer)
    write_json(
        base / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 512,
            "eos_token": END,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": False,
            "additional_special_tokens": [USER, ASSISTANT],
        },
    )
    write_text(base / "chat_template.jinja", CHAT_TEMPLATE)
    write_rows(arguments.output / "train.jsonl", train)
    write_rows(arguments.output / "valid.jsonl", valid)
    if arguments.corpus:
        write_rows(arguments.corpus, [{"text": text} for text in corpus])


if __name__ == "__main__":
    main()
