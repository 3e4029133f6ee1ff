"""`dnd adapt`, `run`, `route` and `chat` on the tiny installation."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from cli_runner import dnd, dnd_json
from tiny_world import World, prompts_of

from dnd_sdk.adaptation.results import STEPS
from dnd_sdk.adapters import AdapterStore
from dnd_sdk.routing import Probabilities, RouterData, ScoreMap, Support, Thresholds
from dnd_sdk.routing.decision_log import read_decisions


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(prompts_of("upper")), encoding="utf-8")
    return path


@pytest.fixture
def adapted(world: World) -> World:
    """A home that holds the adapter `upper`."""
    world.session().adapt(prompts_of("upper"), name="upper")
    return world


def test_adapt_generates_and_then_reuses(world: World, prompts: Path) -> None:
    first = dnd_json("adapt", prompts, "--name", "mine", *world.options)
    assert first.keys() == {"schema_version", "decision", "score", "adapter", "n_prompts", "timings_s"}
    assert (first["decision"], first["score"], first["n_prompts"]) == ("generate", None, 20)
    assert first["adapter"] == {"name": "mine", "path": str(world.home.adapters / "mine"), "source": "generated"}
    assert tuple(first["timings_s"]) == STEPS
    second = dnd_json("adapt", prompts, *world.options)
    assert (second["decision"], second["score"], second["adapter"]) == ("reuse", 1.0, first["adapter"])


def test_adapt_for_people(world: World, prompts: Path, tmp_path: Path) -> None:
    result = dnd("adapt", prompts, "--name", "mine", "--out", tmp_path / "out", "--explain", *world.options)
    assert result.exit_code == 0, result.stderr
    lines = dict(line.split(":", 1) for line in result.stdout.splitlines())
    assert lines["decision"].strip() == "generate" and lines["adapter"].strip() == "mine"
    assert {"path", "prompts", "reason", "time", "exported"} <= lines.keys()
    assert "loading the base model" in result.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    quiet = dnd("adapt", prompts, "-q", *world.options)
    assert (quiet.stdout, quiet.stderr) == ("mine\n", "")


def test_adapt_reads_stdin_and_explains(world: World) -> None:
    lines = "\n".join(json.dumps({"prompt": p}) for p in [*prompts_of("digits"), prompts_of("digits")[0]])
    result = dnd_json("adapt", "-", "--explain", *world.options, stdin=lines)
    assert (result["decision"], result["n_prompts"]) == ("generate", 20)
    assert result["notes"] == ["removed 1 duplicate prompts"]
    assert result["neighbours"] == [] and "no stored adapter" in result["reason"]
    assert (result["probability"], result["in_distribution"]) == (None, None)


def test_adapt_reads_a_csv_column(world: World, tmp_path: Path) -> None:
    path = tmp_path / "asked.csv"
    path.write_text("id,question\n1,what is it\n2,where is it\n")
    assert dnd_json("adapt", path, "--column", "question", *world.options)["n_prompts"] == 2


def test_adapt_finds_the_prompts_of_a_log_or_takes_the_named_field(world: World, tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "what is it"}]
    path = tmp_path / "batch.jsonl.gz"
    rows = [{"custom_id": str(i), "body": {"messages": asked, "user": f"u{i}"}} for i in range(3)]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    result = dnd("adapt", path, "--mode", "reuse", "--json", *world.options)
    assert json.loads(result.stdout)["n_prompts"] == 1
    assert "note: took `body.messages` of 3 rows" in result.stderr
    assert dnd_json("adapt", path, "--field", "body.user", *world.options)["n_prompts"] == 3
    both = dnd_json("adapt", path, "--field", "body.user", "--column", "x", *world.options, code=1)["error"]
    assert both["type"] == "ConfigError"
    missing = dnd_json("adapt", path, "--field", "body.ask", *world.options, code=1)["error"]
    assert missing["type"] == "InputError" and "'body.ask'" in missing["message"] and "--field" in missing["fix"]


def test_adapt_modes(world: World, prompts: Path) -> None:
    nothing = dnd_json("adapt", prompts, "--mode", "reuse", *world.options)
    assert (nothing["decision"], nothing["adapter"]) == ("base", None)
    assert dnd("adapt", prompts, "--mode", "reuse", "-q", *world.options).stdout == "base\n"
    assert dnd_json("adapt", prompts, "--mode", "generate", *world.options)["decision"] == "generate"
    assert dnd("adapt", prompts, "--mode", "guess", *world.options).exit_code == 2


def test_adapt_without_a_generator_says_so(world: World, prompts: Path) -> None:
    bare = ["--base", world.base, "--encoder", world.encoder, "--home", world.home.root]
    result = dnd("adapt", prompts, *bare)
    assert result.exit_code == 0 and "there is no generator for" in result.stdout


def test_run_answers_with_a_named_adapter_or_the_base(adapted: World) -> None:
    named = dnd_json("run", "hello", "-a", "upper", "--max-new-tokens", 6, *adapted.options)
    assert named.keys() == {"schema_version", "text", "adapter", "decision", "usage"}
    assert (named["adapter"], named["decision"]) == ("upper", "reuse")
    assert named["usage"].keys() == {"prompt_tokens", "completion_tokens"}
    base = dnd_json("run", "-", "-a", "base", "--max-new-tokens", 6, *adapted.options, stdin="hello\n")
    assert (base["adapter"], base["decision"]) == (None, "base") and base["text"] != named["text"]
    both = dnd_json("run", "hello", "-a", "upper", "--compare", "base", "--max-new-tokens", 6, *adapted.options)
    assert (both["text"], both["base"]) == (named["text"], {"text": base["text"]})


def test_run_streams_the_same_text_to_people(adapted: World) -> None:
    options = ("--max-new-tokens", 6, "--temperature", 0.9, "--seed", 3, *adapted.options)
    shown = dnd("run", "hello", "-a", "upper", *options)
    assert shown.stdout == dnd_json("run", "hello", "-a", "upper", *options)["text"] + "\n"
    assert "[upper, 6 tokens]" in shown.stderr
    compared = dnd("run", "hello", "-a", "upper", "--compare", "base", *options).stdout
    assert compared.startswith("--- upper\n") and "\n--- base\n" in compared


SCHEMA = {
    "type": "object",
    "properties": {"queue": {"enum": ["billing", "login"]}, "urgent": {"type": "boolean"}},
    "required": ["queue", "urgent"],
    "additionalProperties": False,
}


def test_run_holds_the_answer_to_a_schema_from_a_file_or_the_command_line(adapted: World, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text("\ufeff" + json.dumps(SCHEMA, indent=2), encoding="utf-8")
    given = ("run", "hello", "-a", "upper", "--max-new-tokens", 60, *adapted.options, "--schema")
    answer = dnd_json(*given, file)
    value = json.loads(answer["text"])
    assert value.keys() == {"queue", "urgent"} and value["queue"] in ("billing", "login")
    assert answer["adapter"] == "upper"
    assert dnd_json(*given, f" {json.dumps(SCHEMA)}") == answer
    assert dnd(*given, file).stdout == answer["text"] + "\n"
    both = dnd_json(*given, file, "--compare", "base")
    assert both["text"] == answer["text"] and json.loads(both["base"]["text"]).keys() == value.keys()


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (None, "InputError", "No such file"),
        (b"\xff\xfe", "InputError", "cannot read the schema"),
        (b"[1]", "ConfigError", "must be a JSON schema"),
        (b'{"type": ', "ConfigError", "no JSON"),
        ('{"const": "%s"}' % ("\u20ac" * 30_000), "InputError", "more than 65536 bytes"),
        (b'{"type": "strange"}', "ConfigError", "at /type: Invalid type: strange"),
    ],
)
def test_a_bad_schema_is_told_in_two_lines(
    adapted: World, tmp_path: Path, content: bytes | str | None, error: str, said: str
) -> None:
    file = tmp_path / "schema.json"
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    given = ("run", "hello", "-a", "base", *adapted.options, "--schema", file)
    told = dnd_json(*given, code=1)["error"]
    assert told["type"] == error and said in told["message"] and told["fix"]
    shown = dnd(*given)
    assert shown.stdout == "" and [line.split(":")[0] for line in shown.stderr.splitlines()[-2:]] == ["error", "fix"]


def test_a_pipe_is_no_schema(adapted: World, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path, "a\0b"):
        told = dnd_json("run", "hello", *adapted.options, "--schema", place, code=1)["error"]
        assert told["type"] == "InputError" and "cannot read the schema" in told["message"]


def test_run_routes_by_default(adapted: World) -> None:
    assert dnd_json("run", "nothing like it", "--max-new-tokens", 2, *adapted.options)["decision"] == "base"


def test_stop_strings_cut_the_answer(adapted: World) -> None:
    whole = dnd_json("run", "hello", "-a", "base", "--max-new-tokens", 8, *adapted.options)["text"]
    stop = whole[2]
    cut = dnd_json("run", "hello", "-a", "base", "--max-new-tokens", 8, "--stop", stop, *adapted.options)["text"]
    assert cut == whole[: whole.index(stop)]


def test_route_shows_the_decision(adapted: World) -> None:
    one = dnd_json("route", "hello", *adapted.options)
    assert one.keys() == {"schema_version", "decision", "score", "adapter", "neighbours", "reason"}
    assert (one["decision"], one["adapter"]) == ("base", None)
    many = dnd_json("route", "-", *adapted.options, stdin="\n".join(prompts_of("digits")))
    assert many["decision"] == "generate" and len(AdapterStore(adapted.home).ls()) == 1
    shown = dnd("route", "hello", "--explain", *adapted.options).stdout
    assert shown.startswith("base\nreason: ") and dnd("route", "hello", *adapted.options).stdout == "base\n"
    assert "sure:" not in shown  # nothing was measured


def test_measured_maps_are_told(adapted: World, prompts: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapted.generator, tmp_path / "generator")
    half = ScoreMap(1e-9, 0.0)
    thresholds = Thresholds(0.9, 0.9, -1.0, {}, Probabilities(half, half, half))
    RouterData(thresholds, Support(torch.eye(32)[:2])).save(folder)
    options = ["--generator", folder, *adapted.options[:2], *adapted.options[4:]]
    one = dnd_json("route", "hello", "--explain", *options)
    assert (one["probability"], one["in_distribution"]) == (pytest.approx(0.5), None)
    shown = dnd("route", "-", "--explain", *options, stdin="\n".join(prompts_of("digits"))).stdout
    assert "sure:   50% that the nearest adapter is this job's own, 50% that the prompts are a job" in shown
    same = dnd("adapt", prompts, "--explain", *options).stdout
    assert "sure:     100% that the nearest adapter is this job's own\n" in same
    logged, _ = read_decisions(adapted.home.logs)
    assert (logged[-1].probability, logged[-1].in_distribution) == (1.0, None)
    other = dnd_json("adapt", "-", "--explain", *options, stdin="\n".join(prompts_of("digits")))
    assert (other["probability"], other["in_distribution"]) == (pytest.approx(0.5), pytest.approx(0.5))


def test_chat_keeps_the_conversation_and_switches(adapted: World) -> None:
    lines = "hello\n/adapter upper\nagain\n/adapter nope\n/fly\n/base\n\n/exit\nnever read\n"
    result = dnd("chat", "--max-new-tokens", 4, *adapted.options, stdin=lines)
    assert result.exit_code == 0, result.stderr
    assert "no adapter 'nope'" in result.stderr and "unknown command /fly" in result.stderr
    talk = dnd_json("chat", "--max-new-tokens", 4, *adapted.options, stdin="hello\n/adapter upper\nagain\n")
    assert [m["role"] for m in talk["messages"]] == ["user", "assistant"] * 2
    assert (talk["messages"][2]["content"], talk["adapter"]) == ("again", "upper")
    session = adapted.session()
    answers = [m["content"] for m in talk["messages"] if m["role"] == "assistant"]
    assert session.complete("hello", max_new_tokens=4).text == answers[0]
    assert session.complete(talk["messages"][:3], adapter="upper", max_new_tokens=4).text == answers[1]
    assert result.stdout == "".join(f"{a}\n" for a in answers)


def test_ctrl_c_stops_an_answer_but_not_the_chat(adapted: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from dnd_sdk.cli.output import Output

    pieces = iter(["raise"])

    def piece(self: Output, text: str) -> None:
        if next(pieces, None):
            raise KeyboardInterrupt

    monkeypatch.setattr(Output, "piece", piece)
    result = dnd("chat", "--max-new-tokens", 300, *adapted.options, stdin="hello\n/exit\n")
    assert result.exit_code == 0 and "[stopped" in result.stderr
    pieces = iter(["raise"])
    result = dnd("run", "hello", "-a", "upper", "--max-new-tokens", 300, *adapted.options)
    assert (result.exit_code, result.stdout) == (130, "") and result.stderr.endswith("interrupted\n")
