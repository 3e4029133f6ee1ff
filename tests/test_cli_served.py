"""Commands beside a real server of a tiny base: the same objects either way, and the whole life of one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_runner import dnd, dnd_json
from server_parts import Served, quiet, serving
from tiny_world import World, prompts_of

from dnd_sdk.cli.options import ModelOptions
from dnd_sdk.client import ServerClient, find_server, read_presence, write_presence
from dnd_sdk.errors import InputError
from dnd_sdk.prompts import Role
from dnd_sdk.session import DnD


@pytest.fixture
def served(adapted: World) -> Iterator[Served]:
    """A server of a home with the adapters `upper` and `lower`."""
    dnd = DnD.load(str(adapted.base), adapted.generator, home=adapted.home)
    with serving(dnd) as running:
        settings = {"generator": str(adapted.generator)}
        write_presence(
            adapted.home,
            url=running.now.url,
            key=None,
            base=str(adapted.base),
            instance=running.now.instance,
            settings=settings,
        )
        yield running


def both(monkeypatch: pytest.MonkeyPatch, *words: Any, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a command gives without the server, and with it, when it loads nothing."""
    here = dnd_json(*words, "--no-server", **more)
    with monkeypatch.context() as patch:
        patch.setattr(ModelOptions, "load", None)
        return here, dnd_json(*words, **more)


def test_answers_are_the_same_either_way(served: Served, adapted: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (
        ["-a", "upper", "--compare", "base"],
        ["-a", "base", "--temperature", 0.8, "--top-p", 0.9, "--min-p", 0.01, "--seed", 4],
        ["-a", "auto", "--repetition-penalty", 1.2],
        ["-a", served.dnd.store.get("lower").id, "--stop", "e"],
        ["-a", "upper", "--schema", '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}'],
    ):
        here, there = both(monkeypatch, "run", "hello", "--max-new-tokens", 12, *words, *adapted.options)
        assert there == here, words


def test_a_role_is_the_same_either_way(
    served: Served, adapted: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    role = tmp_path / "role.md"
    role.write_text("# Role: judge\n\n## Goals\n- be brief\n")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(prompts_of("digits")))
    made = dnd_json("adapt", prompts, "--role", role, "--name", "judge", *adapted.options)
    assert (made["decision"], made["adapter"]["name"]) == ("generate", "judge")
    for words in (
        ["-a", "auto", "--role", role],
        ["-a", "upper", "--role", role],
        ["-a", "judge", "--compare", "base"],
    ):
        here, there = both(monkeypatch, "run", prompts_of("digits")[0], "--max-new-tokens", 8, *words, *adapted.options)
        assert there == here, words
    here, there = both(monkeypatch, "route", "-", "--role", role, *adapted.options, stdin=prompts.read_text())
    assert there == here


def test_decisions_are_the_same_either_way(
    served: Served, adapted: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for words, stdin in ((["hello"], None), (["-"], "\n".join(prompts_of("digits")))):
        here, there = both(monkeypatch, "route", *words, "--explain", *adapted.options, stdin=stdin)
        assert there == here
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"{p}\nx"}) for p in [*prompts_of("upper"), "twice", "twice"]))
    for words in (["--mode", "reuse"], ["--mode", "merge", "--top-k", 2], []):
        here, there = both(monkeypatch, "adapt", prompts, "--explain", *words, *adapted.options)
        assert here.pop("timings_s").keys() == there.pop("timings_s").keys()
        if here["adapter"] and not words:  # made, and then found again
            here |= {name: there[name] for name in ("decision", "score", "reason", "notes", "neighbours")}
            assert there["decision"] == "reuse"
        assert there == here, words


def test_adapters_made_by_a_server_are_exported_here(served: Served, adapted: World, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(prompts_of("digits")))
    made = dnd_json("adapt", prompts, "--name", "digits", "--out", tmp_path / "out", *adapted.options)
    assert made["adapter"]["path"] == str(adapted.home.adapters / "digits")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_refusals_are_the_same_either_way(served: Served, adapted: World) -> None:
    for words, code in (
        (["run", "hello", "-a", "uper"], 4),
        (["run", "x " * 600, "-a", "base"], 1),
        (["run", "hello", "--temperature", "-1"], 1),
        (["run", "hello", "--schema", '{"type": "strange"}'], 1),
    ):
        errors = [dnd_json(*words, *adapted.options, *more, code=code)["error"] for more in ([], ["--no-server"])]
        assert errors[0]["type"] == errors[1]["type"] and errors[0]["message"] and errors[0]["fix"]
    assert "did you mean 'upper'?" in dnd("run", "hello", "-a", "uper", *adapted.options).stderr


def test_a_prompt_set_beyond_the_limit_of_json_is_taken(served: Served, adapted: World) -> None:
    prompts = adapted.home.root / "long.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"{i} " + "long " * 20_000}) for i in range(60)))
    assert prompts.stat().st_size > 5 * 2**20
    assert dnd_json("adapt", prompts, "--mode", "reuse", *adapted.options)["n_prompts"] == 60


def test_ctrl_c_frees_the_row(served: Served, adapted: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from dnd_sdk.cli.output import Output

    def piece(*_: object) -> None:
        assert served.dnd.engine.n_running == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(Output, "piece", piece)
    given = ["--max-new-tokens", 400, "--schema", '{"type": "string", "minLength": 380}', *adapted.options]
    assert dnd("run", "hello", "-a", "upper", *given).exit_code == 130
    assert quiet(served.dnd)


def test_a_key_is_taken_from_the_file(adapted: World) -> None:
    with serving(adapted.session(), api_keys=["agents=a-long-secret"]) as running:
        where = {"url": running.now.url, "base": str(adapted.base), "instance": running.now.instance}
        write_presence(adapted.home, key="a-long-secret", **where)
        found = find_server(adapted.home)
        assert found is not None and ServerClient(found, adapted.home).status()["running"] == 0
        write_presence(adapted.home, key="another-secret", **where)
        told = dnd_json("ps", "--home", adapted.home.root, code=1)["error"]
        assert told["type"] == "ServerError" and "key" in told["message"]


def test_what_the_client_takes_the_library_takes(served: Served, adapted: World) -> None:
    found = find_server(adapted.home)
    assert found is not None
    client, role = ServerClient(found, adapted.home), Role.parse("# Role: judge\n")
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    answers = [c.complete(asked, "upper", max_new_tokens=5) for c in (client, served.dnd)]
    assert answers[0].text == answers[1].text and answers[0].finish_reason == answers[1].finish_reason
    for c in (client, served.dnd):
        with pytest.raises(InputError):
            c.complete(asked, role=role)


RUN = "import sys; from dnd_sdk.cli.main import main; sys.argv[0] = 'dnd'; main()"
HEAVY = ("torch", "transformers", "numpy", "dnd_sdk.session.session", "httpx", "dnd_sdk.adapters.store")


def test_the_whole_life_of_a_server(adapted: World) -> None:
    home = ["--home", str(adapted.home.root)]
    dnd_command = [sys.executable, "-c", RUN]
    server = subprocess.Popen(
        [*dnd_command, "serve", "--port", "0", "--json", *adapted.options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None and server.stderr is not None
        started = json.loads(server.stdout.readline())
        assert started["pid"] == server.pid
        words = ["run", "hello", "-a", "upper", "--max-new-tokens", "4", "-q", "--json", *adapted.options]
        answers = [light(words) for _ in range(2)]
        assert answers[0] == answers[1] and answers[0]["adapter"] == "upper"
        shown = dnd_json("ps", *home)["server"]
        assert (shown["url"], shown["pid"], shown["resident"]) == (started["url"], server.pid, ["upper"])
        assert dnd_json("stop", *home)["stopped"]["pid"] == server.pid
        assert server.wait(30) == 0 and read_presence(adapted.home) is None
        assert dnd_json("ps", *home)["server"] is None
    finally:
        server.kill()
        server.communicate()


def light(words: list[str]) -> dict[str, Any]:
    """A command in a process of its own, which loads nothing heavy."""
    report = (
        f"import atexit, sys; atexit.register(lambda: print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{report}\n{RUN}", *words], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr.splitlines() == ["[]"]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
