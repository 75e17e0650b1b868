"""Renders chat templates with transformers, as the reference that the Rust ones are compared with.

    python scripts/check_templates.py TEMPLATE_DIR...

It prints a JSON list, one entry per *.jinja file: its source, the special tokens it was given, and
each conversation rendered with and without a generation prompt, with tools, and with each of the
variables that the template reads (`chat_template_kwargs`). `text` is null if transformers raised an
error. `masks` are the rows that each conversation becomes, by the definition of `train_on`: the
trained part between the signs of `TRAINED`. TRL's package has templates to try
(site-packages/trl/chat_templates), also with generation blocks. Some conversations are made by
chance, other ones for each template. The tests `published_templates` and `published_masks`
of crates/dataset run this if there is a Python with transformers. Needs: transformers
(scripts/requirements.txt).
"""

import datetime
import json
import pathlib
import re
import sys
import types

from random_conversations import random_conversations
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

# What a template is told when it asks for the time: `data.date` of the tests, at 00:00.
DATE = "2025-03-09"
TRAINED = "\u27e6", "\u27e7"
# Conversations by chance for each template.
RANDOM = 12

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <now> & \"here\" – für jeden Ort",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "A city"},
                "days": {"type": "integer", "default": 3},
                "factor": {"type": "number", "default": 1.0},
                "tiny": {"type": "number", "default": 0.00001},
                "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
                "tags": {"type": "array", "items": {"type": "string"}, "nullable": True},
                "options": {"type": "object", "properties": {"fast": {"type": "boolean"}}},
                "either": {"oneOf": [{"type": "string", "default": "x"}, {"type": "number"}]},
            },
            "required": ["city"],
        },
        "return": {"type": "string"},
    },
}

# Types as servers of tools write them.
LOOK_UP = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "",
        "parameters": {
            "type": "object",
            "properties": {
                "word": {"type": ["string", "null"], "default": None},
                "pages": {"type": "array", "items": {"type": "object", "properties": {"n": {"type": "integer"}}}},
                "how": {"anyOf": [{"type": "string", "enum": ["whole", "part"]}, {"type": "null"}]},
            },
            "additionalProperties": False,
        },
        "strict": True,
    },
}
NO_ARGUMENTS = {"type": "function", "function": {"name": "stop", "description": "Stops.", "parameters": {}}}
MORE_TOOLS = [WEATHER, LOOK_UP, NO_ARGUMENTS]


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def call(arguments, content="", identifier="abcdef123"):
    function = {"name": "weather", "arguments": arguments}
    return message("assistant", content, tool_calls=[{"id": identifier, "type": "function", "function": function}])


def answer(text, identifier="abcdef123"):
    return message("tool", text, tool_call_id=identifier, name="weather")


ARGUMENTS = {"city": "Zürich \"Mitte\"", "days": 2, "factor": 0.5, "flags": [True, None, 1e20], "nested": {}}

CONVERSATIONS = {
    "one turn": [message("user", "Hi"), message("assistant", "Hello!")],
    "prompt only": [message("user", "Hi")],
    "system": [message("system", "Be brief."), message("user", "Hi"), message("assistant", "Hello!")],
    "several turns": [
        message("system", "Be\nbrief."),
        message("user", "1 + 1?"),
        message("assistant", "2"),
        message("user", "2 + 2?"),
        message("assistant", "4"),
        message("user", "3 + 3?"),
        message("assistant", "6"),
    ],
    "unicode": [message("user", "¿Qué? 日本語 🦀\u200d é"), message("assistant", "“Naïve” – ß\u00a0x")],
    "white space": [message("user", "  \n a \t\n\n"), message("assistant", "\n\n b\r\n  ")],
    "empty": [message("user", ""), message("assistant", "")],
    "template signs": [message("user", "{{ x }} {% y %} {# z #} <&'\">"), message("assistant", "</s><s>\\n")],
    "thinking in text": [
        message("user", "Think"),
        message("assistant", "<think>\nhm\n</think>\n\nDone."),
        message("user", "Again"),
        message("assistant", "<think>\nhm hm\n</think>\n\nDone again."),
    ],
    "reasoning": [message("user", "Think"), message("assistant", "Done.", reasoning_content="hm\nhm")],
    "thinking key": [message("user", "Think"), message("assistant", "Done.", thinking="hm")],
    "parts": [
        message("user", [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]),
        message("assistant", [{"type": "text", "text": "Hello"}]),
    ],
    "system parts": [
        message("system", [{"type": "text", "text": "Be brief."}]),
        message("user", "Hi"),
        message("assistant", "Hello"),
    ],
    "two users": [message("user", "a"), message("user", "b"), message("assistant", "c")],
    "assistant first": [message("assistant", "a"), message("user", "b"), message("assistant", "c")],
    "late system": [message("user", "a"), message("system", "b"), message("assistant", "c")],
    "unknown role": [message("user", "a"), message("ghost", "b"), message("assistant", "c")],
    "no messages": [],
    "no content": [message("user", "a"), message("assistant", None)],
    "tool call": [
        message("user", "Weather?"),
        call(ARGUMENTS),
        answer('{"sky": "grau"}'),
        message("assistant", "Grey."),
        message("user", "Thanks"),
        message("assistant", "Welcome."),
    ],
    "tool call as text": [message("user", "Weather?"), call('{"city": "Bern"}', None), answer("grey")],
    "tool call with content": [message("user", "Weather?"), call({"city": "Bern"}, "One moment."), answer("grey")],
    "two answers": [
        message("user", "Weather?"),
        call({"city": "Bern"}),
        answer("grey"),
        answer("blue", "abcdef124"),
        message("assistant", "Both."),
    ],
}


# Conversations for published templates alone: the goldens of our own have those above.
MORE_CONVERSATIONS = {
    "reasoning in all answers": [
        message("system", "Be brief."),
        message("user", "One?"),
        message("assistant", "First.", reasoning_content="hm 1"),
        message("user", "Two?"),
        message("assistant", "Second.", reasoning_content="\nhm 2\n"),
        message("user", "Three?"),
        message("assistant", "Third.", reasoning_content="hm 3"),
    ],
    "reasoning in the first answer": [
        message("user", "One?"),
        message("assistant", "First.", reasoning_content="hm 1"),
        message("user", "Two?"),
        message("assistant", "Second."),
    ],
    "reasoning in the last answer": [
        message("user", "One?"),
        message("assistant", "First."),
        message("user", "Two?"),
        message("assistant", "Second.", reasoning_content="hm 2"),
    ],
    "reasoning beside parts": [
        message("user", "One?"),
        message("assistant", [{"type": "text", "text": "It's 1"}], reasoning_content="hm 1"),
        message("user", [{"type": "text", "text": "Two?"}]),
        message("assistant", [{"type": "text", "text": "2."}], reasoning_content="hm 2"),
    ],
    "empty reasoning": [message("user", "One?"), message("assistant", "First.", reasoning_content="")],
    "reasoning beside calls": [
        message("user", "Weather?"),
        {**call({"city": "Bern"}), "reasoning_content": "ask"},
        answer("grey"),
        {**call({"city": "Basel"}, "", "abcdef124"), "reasoning_content": "ask again"},
        answer("blue", "abcdef124"),
        message("assistant", "Both.", reasoning_content="tell"),
        message("user", "Thanks"),
        message("assistant", "Welcome.", reasoning_content="be kind"),
    ],
    "two calls in one message": [
        message("user", "Weather?"),
        {
            **call({"city": "Bern"}),
            "tool_calls": call({"city": "Bern"})["tool_calls"] + call({"city": "Chur"}, "", "abcdef124")["tool_calls"],
        },
        answer("grey"),
        answer("blue", "abcdef124"),
        message("assistant", "Both."),
    ],
    "ends with a call": [message("system", "Be brief."), message("user", "Weather?"), call({"city": "Bern"})],
    "answer of a tool as data": [
        message("user", "Weather?"),
        call({"city": "Bern"}),
        answer({"sky": "grey", "degrees": 3.5}),
        message("assistant", "Grey."),
    ],
    "odd arguments": [
        message("user", "Weather?"),
        call({"large": 1e21, "small": 1e-7, "none": None, "list": [1.0, "it's", {"a": []}], "text": "<a>\n"}),
        answer("grey"),
        message("assistant", "Grey."),
    ],
    "developer": [message("developer", "Be brief."), message("user", "Hi"), message("assistant", "Hello!")],
    "nothink": [message("user", "Hi /nothink"), message("assistant", "Hello!"), message("user", "/no_think")],
}

# Variables that templates read; each is tried where the template has its name.
VARIABLES = [
    {"enable_thinking": False},
    {"enable_thinking": True},
    {"thinking": True},
    {"reasoning_effort": "high"},
    {"model_identity": "You are a parrot."},
    {"builtin_tools": ["browser", "python"]},
    {"date_string": "26 Jul 2024"},
    {"tools_in_user_message": False},
    {"custom_tools": [WEATHER]},
    {"today": "2024-07-26"},
    {"clear_thinking": False},
    {"preserve_thinking": True},
    {"documents": [{"title": "A", "text": "b"}]},
    {"truncate_history_thinking": False},
    {"low_effort": True},
    {"medium_effort": True},
    {"reasoning_strength": "low"},
    {"knowledge_cutoff": "2025-01", "current_date": "2026-01-01"},
    {"tool_namespace_descriptions": {"weather": "About the sky"}},
]


def stop_the_clock():
    """Makes `strftime_now` of templates tell `DATE`."""
    moment = datetime.datetime.fromisoformat(DATE)
    chat_template_utils.datetime = types.SimpleNamespace(now=lambda: moment)


def render(template, messages, tools, add_generation_prompt, variables=None):
    """The text, and the byte ranges of its generation blocks."""
    try:
        texts, spans = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=bool(re.search(r"\{%-?\s*generation\s*-?%\}", template)),
            add_generation_prompt=add_generation_prompt,
            **SPECIAL_TOKENS,
            **(variables or {}),
        )
    except Exception as error:  # jinja2 raises its own errors and whatever Python does
        return {"text": None, "error": f"{type(error).__name__}: {error}"[:200], "generation_spans": []}
    text = texts[0]
    spans = [[len(text[:place].encode()) for place in span] for span in (spans[0] if spans else [])]
    return {"text": text, "generation_spans": spans}


def golden(name, template, conversations=CONVERSATIONS, with_tools=CONVERSATIONS, all_tools=(WEATHER,)):
    """A template with its renderings; `with_tools` names the conversations that get tools."""
    cases = []
    for conversation, messages in conversations.items():
        for tools in (None, list(all_tools)) if conversation in with_tools else (None,):
            for add_generation_prompt in (False, True):
                cases.append({
                    "conversation": conversation,
                    "tools": tools is not None,
                    "add_generation_prompt": add_generation_prompt,
                    **render(template, messages, tools, add_generation_prompt),
                })
    return {
        "name": name,
        "template": template,
        "special_tokens": SPECIAL_TOKENS,
        "conversations": conversations,
        "tools": list(all_tools),
        "cases": cases,
    }


def with_variables(template, conversations):
    """Cases of a template with the variables that it reads, as `golden` has those without."""
    cases = []
    for variables in VARIABLES:
        if not any(name in template for name in variables):
            continue
        for conversation, messages in conversations.items():
            for tools in (None, MORE_TOOLS):
                for add_generation_prompt in (False, True):
                    cases.append({
                        "conversation": conversation,
                        "tools": tools is not None,
                        "add_generation_prompt": add_generation_prompt,
                        "variables": variables,
                        **render(template, messages, tools, add_generation_prompt, variables),
                    })
    return cases


def shown(text, spans):
    """The text with its trained parts, byte ranges, between the signs of `TRAINED`."""
    rest, out, place = text.encode(), "", 0
    joined = []
    for start, end in sorted(spans):
        if joined and joined[-1][1] == start:
            joined[-1][1] = end
        elif start < end:
            joined.append([start, end])
    for start, end in joined:
        out += rest[place:start].decode() + TRAINED[0] + rest[start:end].decode() + TRAINED[1]
        place = end
    return out + rest[place:].decode()


def thinks_twice(before, upto):
    """Whether an answer has reasoning behind reasoning that the prompt or the template has closed.

    The definition has nothing for it: the empty block is none of the answer's.
    """
    rest = upto[len(before) :]
    empty = re.match(r"\s*(<think>)?\s*</think>", rest)
    is_closed = re.search(r"(</think>|<channel\|>)\s*$", before)
    return bool((empty or is_closed) and re.match(r"\s*<think>", rest if is_closed else rest[empty.end() :]))


def loses_reasoning(message, before, upto):
    """Whether the template leaves out the reasoning of an answer, which the definition knows from no other place."""
    reasoning = next((message[key] for key in ("reasoning_content", "thinking", "reasoning") if message.get(key)), "")
    return reasoning.strip() not in upto[len(before) :]


def mask(template, messages, tools, train_on):
    """The rows of a conversation as `shown`, or None if the definition has no answer for it.

    A turn is what its rendering adds to that of the messages before it with the generation prompt.
    If each of these is a beginning of the whole, there is one row; else the template's generation
    blocks say what is trained; else each turn is a row of its own.
    """
    turns = [place for place, it in enumerate(messages) if it["role"] == "assistant"]
    wanted = turns[-1:] if train_on == "last" else turns
    full = render(template, messages, tools, False)
    if not wanted or full["text"] is None:
        return None
    pairs = []
    for turn in wanted:
        before = render(template, messages[:turn], tools, True)["text"]
        upto = render(template, messages[: turn + 1], tools, False)["text"]
        if before is None or upto is None or not upto.startswith(before):
            pairs.append(None)
        else:
            pairs.append((before, upto))
    if any(pair is not None and thinks_twice(*pair) for pair in pairs):
        return None
    if not full["generation_spans"] and any(
        pair is not None and loses_reasoning(messages[turn], *pair) for turn, pair in zip(wanted, pairs)
    ):
        return None
    if all(pair is not None and full["text"].startswith(pair[1]) for pair in pairs):
        spans = [[len(before.encode()), len(upto.encode())] for before, upto in pairs]
        return [shown(full["text"], spans)]
    if blocks := full["generation_spans"]:
        if train_on == "last":
            blocks = blocks[-1:] if len(blocks) == len(turns) else None
        return blocks and [shown(full["text"], blocks)]
    if any(pair is None for pair in pairs):
        return None
    return [shown(upto, [[len(before.encode()), len(upto.encode())]]) for before, upto in pairs]


# Conversations that rows may say in another form than the template writes: nothing to compare.
OTHER_FORMS = ("parts", "system parts", "tool call as text", "reasoning beside parts")


def as_read(template, messages, tools):
    """The messages in the form in which rows are read: what a tool answered as data is JSON text
    where the template leaves it out or prints it as Python."""
    data = [it["content"] for it in messages if it["role"] == "tool" and isinstance(it["content"], dict)]
    text = render(template, messages, tools, False)["text"]
    words = [str(word) for content in data for pair in content.items() for word in pair]
    if text is not None and all(word in text for word in words) and not any(str(it) in text for it in data):
        return messages
    return [
        {**it, "content": json.dumps(it["content"], ensure_ascii=False)} if it["content"] in data else it
        for it in messages
    ]


def masks(template, conversations):
    """Rows of each conversation that a model can be trained on, for both values of `train_on`."""
    return [
        {
            "conversation": conversation,
            "tools": tools is not None,
            "train_on": train_on,
            "rows": mask(template, as_read(template, messages, tools), tools, train_on),
        }
        for conversation, messages in conversations.items()
        if conversation not in OTHER_FORMS
        for tools in (None, MORE_TOOLS)
        for train_on in ("assistant", "last")
    ]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    stop_the_clock()
    written = []
    for path in (path for folder in sys.argv[1:] for path in sorted(pathlib.Path(folder).glob("*.jinja"))):
        template = path.read_text(encoding="utf-8")
        conversations = CONVERSATIONS | MORE_CONVERSATIONS
        one = golden(path.stem, template, conversations, conversations, MORE_TOOLS)
        one["cases"] += with_variables(template, conversations)
        written.append({**one, "date": DATE, "masks": masks(template, conversations)})
        conversations, tools = random_conversations(path.stem, RANDOM)
        one = golden(f"{path.stem} by chance", template, conversations, conversations, tools)
        written.append({**one, "date": DATE, "masks": []})
    json.dump(written, sys.stdout)
