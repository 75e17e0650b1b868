"""Conversations by chance, for check_templates.py: odd texts, values and types where those written by
hand have usual ones. The same seed gives the same conversations."""

import json
import random

TEXTS = [
    "", "a", "  hi\n\n", "<think>\nx\n</think>\n\ny", "<think>only", "y</think>z", "a</think>b</think>c",
    "/no_think q", "<tool_response>\n1\n</tool_response>", "<|im_end|>", "ünï\u2028x\u0085", '{"a": 1}',
    "'q' \"d\" \\ \n <&>", "<|channel|>analysis<|message|>t<|end|>", "\n<think>\n\n</think>\n\n", "123", "None",
    "<tool_call>\n{}\n</tool_call>", "{% x %}{{ y }}",
]  # fmt: skip
VALUES = [
    1, -3, 0.1, 1e-7, 1e21, 12345678901234567890, True, False, None, "s", "é\"'\n<b>", [], [1, "a", None, [2]], {},
    {"k": {"z": [1.5]}}, "", "true", 1.0, -0.0,
]  # fmt: skip
TYPES = ["string", "integer", "number", "boolean", "array", "object", ["string", "null"], "null", "any"]


class Chance:
    def __init__(self, seed):
        self.random = random.Random(seed)

    def is_one_of(self, parts):
        return self.random.random() < 1 / parts

    def schema(self, depth=0):
        kind = self.random.choice(TYPES)
        schema = {"type": kind}
        if self.is_one_of(3):
            schema["description"] = self.random.choice(TEXTS)
        if self.is_one_of(3):
            schema["default"] = self.random.choice(VALUES)
        if self.is_one_of(3):
            schema["enum"] = self.random.sample(VALUES, 2)
        if depth == 3:
            return schema
        if kind == "array":
            schema["items"] = self.schema(depth + 1)
        if kind == "object":
            schema["properties"] = {name: self.schema(depth + 1) for name in self.random.sample("abcde", 2)}
            schema["required"] = list(schema["properties"])[:1]
        if self.is_one_of(8):
            return {self.random.choice(["anyOf", "oneOf"]): [self.schema(depth + 1), {"type": "null"}]}
        return schema

    def tool(self):
        properties = {name: self.schema() for name in self.random.sample("abcdefgh", self.random.randint(0, 4))}
        parameters = {"type": "object", "properties": properties, "required": list(properties)[:2]}
        function = {"name": self.random.choice(["f", "look_up", "ns.g"]), "description": self.random.choice(TEXTS)}
        return {"type": "function", "function": function | ({} if self.is_one_of(8) else {"parameters": parameters})}

    def content(self, role):
        if self.is_one_of(6):
            return [{"type": "text", "text": self.random.choice(TEXTS)} for _ in range(self.random.randint(0, 3))]
        if self.is_one_of(12):
            return self.random.choice(VALUES) if role == "tool" else None
        return self.random.choice(TEXTS)

    def call(self, number):
        names = self.random.sample("abcdef", self.random.randint(0, 3))
        arguments = {name: self.random.choice(VALUES) for name in names}
        arguments = json.dumps(arguments) if self.is_one_of(6) else arguments
        function = {"name": self.random.choice(["f", "look_up"]), "arguments": arguments}
        return {"id": f"c{number:08}", "type": "function", "function": function}

    def answer(self):
        message = {"role": "assistant", "content": self.content("assistant")}
        if self.is_one_of(3):
            message[self.random.choice(["reasoning_content", "thinking", "reasoning"])] = self.random.choice(TEXTS)
        if self.is_one_of(3):
            message["tool_calls"] = [self.call(number) for number in range(self.random.randint(1, 3))]
        return message

    def conversation(self):
        messages = []
        if self.is_one_of(2):
            messages.append({"role": self.random.choice(["system", "developer"]), "content": self.content("system")})
        for _ in range(self.random.randint(1, 4)):
            messages += [{"role": "user", "content": self.content("user")}, self.answer()]
            while calls := messages[-1].get("tool_calls"):
                for call in calls:
                    content = self.content("tool")
                    messages.append({"role": "tool", "content": content, "tool_call_id": call["id"], "name": "f"})
                if self.is_one_of(6):
                    break
                messages.append(self.answer())
        return messages


def random_conversations(seed, count):
    """Conversations by name, and tools for them."""
    chance = Chance(seed)
    return {f"by chance {number}": chance.conversation() for number in range(count)}, [chance.tool() for _ in range(3)]
