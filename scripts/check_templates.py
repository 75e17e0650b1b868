"""Renders chat templates with transformers, as the reference that the Rust ones are compared with.

    python scripts/check_templates.py TEMPLATE_DIR

It prints a JSON list, one entry per *.jinja file: its source, the special tokens it was given, and
each conversation rendered with and without a generation prompt. `text` is null if transformers
raised an error. The test `published_templates` of crates/dataset runs this if there is a Python
with transformers. Needs: transformers (scripts/requirements.txt).
"""

import json
import pathlib
import re
import sys

from transformers.utils.chat_template_utils import render_jinja_template

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


def render(template, messages, tools, add_generation_prompt):
    """The text, and the byte ranges of its generation blocks."""
    try:
        texts, spans = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=bool(re.search(r"\{%-?\s*generation\s*-?%\}", template)),
            add_generation_prompt=add_generation_prompt,
            **SPECIAL_TOKENS,
        )
    except Exception as error:  # jinja2 raises its own errors and whatever Python does
        return {"text": None, "error": f"{type(error).__name__}: {error}"[:200], "generation_spans": []}
    text = texts[0]
    spans = [[len(text[:place].encode()) for place in span] for span in (spans[0] if spans else [])]
    return {"text": text, "generation_spans": spans}


def golden(name, template, conversations=CONVERSATIONS, with_tools=CONVERSATIONS):
    """A template with its renderings; `with_tools` names the conversations that get tools."""
    cases = []
    for conversation, messages in conversations.items():
        for tools in (None, [WEATHER]) if conversation in with_tools else (None,):
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
        "tools": [WEATHER],
        "cases": cases,
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    paths = sorted(pathlib.Path(sys.argv[1]).glob("*.jinja"))
    json.dump([golden(path.stem, path.read_text(encoding="utf-8")) for path in paths], sys.stdout)
