"""What the tests of tools share: chat templates of the two common forms, a tool, and a base that renders tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers import tiny_tokenizer
from llamaindex_parts import ScriptedDnD

HERMES_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\nTools:\n' }}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% for c in m.tool_calls or [] %}"
    "{{ '<tool_call>' }}{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}"
    "{{ '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Renders tools, calls and results as Hermes and Qwen2.5 do, in fewer words."""

LLAMA_TEMPLATE = (
    "{% if tools is not none %}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}{% endif %}"
    "{% for m in messages %}"
    "{% if 'tool_calls' in m %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}{% set f = m.tool_calls[0].function %}"
    "{{ {'name': f.name, 'parameters': f.arguments} | tojson + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + ('ipython' if m.role == 'tool' else m.role) + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Renders them as Llama 3.x does: calls as bare JSON, one a message."""

QWEN_TEMPLATE = Path(__file__).with_name("qwen25_chat_template.jinja").read_text("utf-8")
"""Qwen2.5-Instruct's own in full, not in fewer words: a default system message, results as a user's turn."""

ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}

FUNCTION = {"name": "add", "arguments": {"a": 2, "b": 3}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "c1", "function": FUNCTION}]}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "5"}


def hermes_call(name: str = "add", /, **arguments: Any) -> str:
    """A call as Hermes and Qwen2.5 write it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def scripted(*texts: str, template: str = HERMES_TEMPLATE) -> ScriptedDnD:
    """A session that says these texts, on a tokenizer that renders tools."""
    dnd = ScriptedDnD(*texts)
    dnd.base.tokenizer = tiny_tokenizer()
    dnd.base.tokenizer.chat_template = template
    return dnd
