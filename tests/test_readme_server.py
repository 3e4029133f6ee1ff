"""The README's calls of the server, made by curl as they stand but for the port."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from documented import markdown_commands
from server_parts import serving
from test_readme import ROOT, TEXT
from tiny_world import World

CALLS = [command for command in markdown_commands(TEXT) if command.startswith("curl ")]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_calls_of_the_readme_are_answered(world: World) -> None:
    assert len(CALLS) == 2
    with serving(world.session(), answer_tokens=4) as served:
        said = []
        for command in CALLS:
            line = command.replace("http://127.0.0.1:8000", served.now.url)
            done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, cwd=ROOT)
            said.append(json.loads(done.stdout))
    chat, adapted = said
    assert chat["model"] == "dnd:auto" and chat["choices"][0]["message"]["role"] == "assistant"
    assert (adapted["decision"], adapted["adapter"]["name"], adapted["n_prompts"]) == ("generate", "tickets", 90)
