"""What every check knows: where the server is, and what its base says (see `scripted_base`). Needs no package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

URL = os.environ.get("DND_URL", "")
KEY = os.environ.get("DND_API_KEY", "")
MODEL, BASE, ENCODER, WIDTH = "dnd:auto", "qwen2.5-coder-0.5b", "all-minilm-l6-v2", 384
EXAMPLES = Path(__file__).parents[2] / "examples" / "clients"
QUESTION = "What is the weather in Paris?"

MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

SAYS = "It is sunny in Paris today."
"""To any question, and to any beginning of a text."""

TEXTS = {
    "say": SAYS,
    "call": '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>',
    "told": "The tool says: sunny.",
    "code": 'Thought: I know it.\n<code>\nfinal_answer("It is sunny.")\n</code>',
    "react": "Thought: I can answer without using any more tools.\nAnswer: It is sunny.",
    "fields": "[[ ## answer ## ]]\nParis\n\n[[ ## completed ## ]]",
    "graph": '("entity"<|>ACME<|>ORGANIZATION<|>Acme makes anvils)\n##\n("entity"<|>PARIS<|>GEO<|>A city)\n##\n'
    '("relationship"<|>ACME<|>PARIS<|>Acme is in Paris<|>9)\n<|COMPLETE|>',
}
"""What it can say, by name."""


def run_example(name: str) -> str:
    """Run `examples/clients/NAME` as a user would; what it printed. Raises for one that fails."""
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{name} failed: {done.stderr.strip()}")
    return done.stdout


def says(output: str, *wanted: str) -> None:
    """Raise unless the output has all of these, in this order."""
    rest = output
    for text in wanted:
        assert text in rest, f"no {text!r} in {rest!r}"
        rest = rest.partition(text)[2]
