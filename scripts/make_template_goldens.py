"""Writes tests/goldens/templates/*.json: small chat templates of our own, rendered by transformers.

    python scripts/make_template_goldens.py

Needs: transformers (scripts/requirements.txt). The test `goldens` of crates/dataset renders them
and compares every byte.
"""

import json
import pathlib

from check_templates import CONVERSATIONS, golden

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

HEADER = """\
{{- bos_token }}
{%- if tools is defined and tools is not none %}
    {{- "Tools:\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- set content = '<|header|>' + message['role'] + '<|/header|>\\n\\n' + message['content'] | trim + '<|eot|>' %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header|>assistant<|/header|>\\n\\n' }}
{%- endif %}
"""

BRACKETS = """\
{%- if messages[0]['role'] == 'system' -%}
    {%- set system_message = messages[0]['content'] -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{{ bos_token }}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must alternate, and ' ~ message.role ~ ' came') }}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {%- if loop.first and system_message is defined -%}
            {{ ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else -%}
            {{ ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif -%}
    {%- else -%}
        {{ ' ' + message['content'].strip() + eos_token }}
    {%- endif -%}
{%- endfor -%}
"""

GENERATION = """\
{% for message in messages %}
{% if message.role == 'assistant' %}
<|assistant|>
{% generation %}
  {{ message.content }}{{ eos_token }}
{% set content = 'changed' %}
{%- endgeneration %}

{% else %}
<|{{ message.role }}|>
    {%- generation -%}  {%- endgeneration +%}
{{ message.content }}
{% endif %}
{% endfor %}
{{ content }}{# {% generation %} #}{{ '{% generation %}' }}{% raw %}{% generation %}{% endraw %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""

TOOLS = """\
{%- for tool in tools or [] %}
{{ tool | tojson }}
{{ tool | tojson(ensure_ascii=True) }}
{{ tool | tojson(sort_keys=true, separators=(',', ':')) }}
{{ tool }}
{{ tool.function.parameters.required }}|{{ tool.function.parameters.properties.items() | list | length }}
{%- for name, parameter in tool.function.parameters.properties | items %}
{{ loop.index }} {{ name }}: {{ parameter.get('type', 'any') }} {{ parameter.default }} {{ parameter.default is defined }}
{%- endfor %}
{%- endfor %}
{%- for message in messages %}
{{ message.role }}: {{ message.content }}
{%- for call in message.tool_calls or [] %}
{{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{%- if call.function.arguments is mapping %}{% for key, value in call.function.arguments.items() %}
{{ key }}={{ value }}{% endfor %}{% endif %}
{%- endfor %}
{%- endfor %}
"""

PYTHON = """\
{%- set ns = namespace(last=-1, found=false, names=[]) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and not ns.found %}
        {%- set ns.found = true %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
    {%- set ns.names = ns.names + [message.role] %}
{%- endfor %}
{{ ns.last }} {{ ns.found }} {{ ns.names }} {{ none }} {{ None is none }} {{ True }} {{ 1 == 1.0 }} {{ 7 // 2 }} {{ 7 / 2 }}
{{ missing }}|{{ missing is defined }}|{{ missing | default('x') }}|{{ 'x' in missing }}|{{ unk_token }}
{% for message in messages %}
    {% if loop.index0 == 5 %}
        {% break %}
    {% endif %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% set text = message.content if message.content is string else message.content | map(attribute='text') | join('+') %}
    {{ text.strip() }} | {{ text.lstrip('\\n') }} | {{ text.rstrip() }}
    {{ text.split('</think>')[-1] }} {{ text.split() }} {{ text.startswith('<think>') }} {{ text.endswith(('x', 'e')) }}
    {{ text.find('é') }} {{ text[1:3] }} {{ text[-2:] }} {{ text[:1] }} {{ text | length }} {{ text.upper() }}
    {{ text.replace('a', 'b') }} {{ text.title() }} {{ text is iterable }} {{ text is sequence }}
    {{ [text, 1, 2.5, true, none, {'k': text}] }} {{ (text, 1) | list }} {{ [1, 2, none] | join(', ') }}
    {{ loop.first }} {{ loop.last }} {{ loop.index }} {{ loop.length }} {{ messages[loop.index0 - 1].role }}
    {%- if loop.previtem is defined %} {{ loop.previtem.role }}{% endif %}

    {{- 'a' if message.role in ['user', 'tool'] else 'b' }}
{% else %}
nothing
{% endfor %}
{% macro show(item, mark='*') -%}
    {{ mark }}{{ item }}{{ caller() if caller is defined else '' }}
{%- endmacro %}
{{ show(1) }} {{ show('x', mark='-') }}{% call show(2) %} called{% endcall %}

{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{- messages | rejectattr('role', 'equalto', 'user') | map(attribute='role') | list }}
{%+ if true %} kept {%+ endif %}
   {#- comment -#}   x
{{ dict(a=1, b='c') }} {{ 'a%' }} {{ 'é' ~ 1 ~ 'x' }} {{ 1.0 }} {{ 1e20 }} {{ -3 | abs }} {{ 3 | string + 'x' }}
"""

SHIFTING = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' and not loop.last %}
        {{- '<|assistant|>' + message.content.split('</think>')[-1] + '<|end|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|assistant|>' + message.content + '<|end|>' }}
    {%- else %}
        {{- '<|' + message.role + '|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""

TEMPLATES = {
    "chatml": CHATML,
    "header": HEADER,
    "brackets": BRACKETS,
    "generation": GENERATION,
    "tools": TOOLS,
    "python": PYTHON,
    "shifting": SHIFTING,
}

# Only templates that print tools are given some: a rendering with tools is ten times as long.
WITH_TOOLS = {"header": ["one turn"], "tools": ["system", "tool call", "tool call as text", "two answers"]}

if __name__ == "__main__":
    directory = pathlib.Path(__file__).parent.parent / "tests" / "goldens" / "templates"
    directory.mkdir(parents=True, exist_ok=True)
    for name, template in TEMPLATES.items():
        with_tools = WITH_TOOLS.get(name, [])
        conversations = {
            conversation: messages
            for conversation, messages in CONVERSATIONS.items()
            if name == "tools" or not any("tool_calls" in message for message in messages)
        }
        written = golden(name, template, conversations, with_tools)
        text = json.dumps(written, ensure_ascii=False, indent=0)
        (directory / f"{name}.json").write_text(text + "\n", encoding="utf-8")
