"""The `llm` command with the example's model file: an answer, without a stream, to a schema, with a tool; its log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import EXAMPLES, KEY, QUESTION, SAYS, TEXTS, URL

DEFAULT_URL = "http://127.0.0.1:8000/v1"
TOOL = 'def weather(city: str) -> str:\n    "Say what the weather is in a city."\n    return "sunny"\n'


def llm(*words: str) -> str:
    program = Path(sys.executable).with_name("llm")
    done = subprocess.run([program, *words], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr.strip()
    return done.stdout.strip()


def main(folder: Path) -> None:
    os.environ["LLM_USER_PATH"] = str(folder)
    models = EXAMPLES / "llm" / "extra-openai-models.yaml"
    text = models.read_text("utf-8")
    assert DEFAULT_URL in text
    (folder / models.name).write_text(text.replace(DEFAULT_URL, URL), "utf-8")
    llm("keys", "set", "dnd", "--value", KEY)
    assert llm("-m", "dnd-auto", QUESTION) == llm("-m", "dnd-auto", "--no-stream", QUESTION) == SAYS
    for entry in json.loads(llm("logs", "-n", "2", "--json")):
        assert entry["response"] == SAYS and entry["input_tokens"] > 0 and entry["output_tokens"] > 0, entry
    made = json.loads(llm("-m", "dnd-auto", "--schema", "queue, urgent bool", QUESTION))
    assert made.keys() == {"queue", "urgent"} and isinstance(made["urgent"], bool), made
    assert llm("-m", "dnd-auto", "--functions", TOOL, QUESTION).endswith(TEXTS["told"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(made))
