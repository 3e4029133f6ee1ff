"""Evaluation and bench on a tiny real session: the parts meet as they do in `dnd eval` and `dnd bench adapt`."""

from __future__ import annotations

import json
from pathlib import Path

from cli_runner import dnd, dnd_json
from eval_fakes import LABELS
from tiny_world import World, prompts_of

from dnd_sdk.bench.adapting import bench_adapt, render_adapting
from dnd_sdk.config import Home
from dnd_sdk.evaluation import EvalSettings, Zoo, default_methods, evaluate
from dnd_sdk.evaluation.drawing import conditioning_prompts, donors
from dnd_sdk.routing import choose_exemplars
from dnd_sdk.session import DnD
from dnd_sdk.tasks.reading import Row, Task


def task_of(name: str) -> Task:
    rows = [Row(p, LABELS[i % 2], "train" if i < 12 else "test") for i, p in enumerate(prompts_of(name))]
    return Task(name, "f", "label", LABELS, "exact_match", "validation", "MIT", tuple(rows[:12]), tuple(rows[12:]))


def stored_zoo(dnd: DnD, folder: Path) -> Zoo:
    """Adapters generated for `digits` and `lower`, in a store of their own."""
    assert dnd.generator is not None
    store = type(dnd.store)(Home(folder))
    for name in ("digits", "lower"):
        encoded = dnd.encoder.encode(prompts_of(name), state_tokens=dnd.generator.state_tokens)
        store.put(
            dnd.generator.generate(encoded.states),
            dnd.layout,
            name=name,
            exemplars=choose_exemplars(encoded.pooled),
            base_name=dnd.base.name,
            base_fingerprint=dnd.base.fingerprint,
            source="trained",
            encoder_fingerprint=dnd.encoder.fingerprint,
        )
    return Zoo(folder, dnd.layout, dnd.base.fingerprint, dnd.encoder.fingerprint)


def test_every_method_answers_as_a_user_of_the_session_would_see(world: World, tmp_path: Path) -> None:
    dnd, tasks = world.session(), [task_of("upper"), task_of("digits")]
    zoo = stored_zoo(dnd, tmp_path / "zoo")
    settings = EvalSettings(limit=3, max_new_tokens=5, run_dir=tmp_path / "run")
    methods = default_methods(zoo)
    report = evaluate(dnd, tasks, methods, settings, zoo=zoo)
    assert report["failures"] == [] and list(report["methods"]) == list(methods)
    assert (report["base"], report["generator"]) == (dnd.base.name, dnd.generator.id)
    assert dnd.engine.bank.resident() == [] and dnd.store.ls() == []

    said = {}
    for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        said[record["task"], record["method"]] = record["outputs"]
    own = dnd.adapt(conditioning_prompts(tasks[0], 0), mode="generate").adapter
    others = dnd.adapt(conditioning_prompts(donors(tasks, 0)["upper"], 0), mode="generate").adapter
    for method, adapter in (("base", None), ("generated", own), ("shuffled", others)):
        rows = {r.prompt: dnd.complete(r.prompt, adapter, max_new_tokens=5).text for r in tasks[0].test}
        assert set(said["upper", method]) <= set(rows.values())
    assert own is not None and others is not None and own.id != others.id
    assert said["upper", "generated"] != said["upper", "base"]
    assert zoo.rank(dnd.encoder.encode(conditioning_prompts(tasks[1], 0)).pooled)[0][0] == "digits"

    again = evaluate(world.session(), tasks, methods, settings, zoo=zoo)
    assert again == report
    assert len((tmp_path / "run" / "results.jsonl").read_text().splitlines()) == len(said)


def test_the_command_names_methods_and_keeps_what_it_trained(world: World, tmp_path: Path) -> None:
    folder, run = tmp_path / "tasks", tmp_path / "run"
    folder.mkdir()
    for name in ("upper", "digits"):
        task = task_of(name)
        rows = ({"prompt": r.prompt, "response": r.response, "split": r.split} for r in (*task.train, *task.test))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    options = ["--set", "all", "--limit", 1, "--run-dir", run, *world.options]
    report = dnd_json("eval", folder, "--methods", "base,icl-1,scratch-1", "--against", "icl-1", *options)
    assert list(report["methods"]["scratch-1"]["vs"]) == ["base", "icl-1"] and report["failures"] == []
    assert report["settings"]["against"] == "icl-1" and len(list((run / "trained").iterdir())) == 2
    assert list(dnd_json("eval", folder, "--part", "2/2", *options)["methods"]["zero"]["tasks"]) == ["upper"]
    assert (
        dnd_json("eval", folder, "--answered", "--methods", "base,icl-1,scratch-1", "--against", "icl-1", *options)
        == report
    )
    for part in ("3/2", "2", "a/b"):
        assert "part" in dnd_json("eval", folder, "--part", part, *options, code=1)["error"]["message"]
    refused = dnd_json("eval", folder, "--methods", "base,magic-3", *options, code=1)["error"]
    assert refused["type"] == "ConfigError" and "merge-K" in refused["fix"]


def test_a_folder_that_names_no_roles_is_taken_whole_with_a_note(world: World, tmp_path: Path) -> None:
    for name in ("upper", "digits"):
        task = task_of(name)
        rows = ({"prompt": r.prompt, "response": r.response, "split": r.split} for r in (*task.train, *task.test))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = ["eval", tmp_path, "--methods", "base", "--limit", 1, *world.options]
    whole = dnd(*command, "--json")
    assert list(json.loads(whole.stdout)["methods"]["base"]["tasks"]) == ["digits", "upper"]
    assert "names a role, so all are taken" in whole.stderr
    (tmp_path / "index.json").write_text('[{"name": "upper", "role": "validation"}]')
    named = dnd(*command, "--json")
    assert list(json.loads(named.stdout)["methods"]["base"]["tasks"]) == ["upper"]
    assert "names a role" not in named.stderr
    (tmp_path / "index.json").write_text('[{"name": "upper", "role": "train"}]')
    assert "no tasks with role 'validation'" in dnd_json(*command, code=1)["error"]["message"]


def test_bench_measures_a_session_and_leaves_no_trace(world: World) -> None:
    dnd = world.session()
    kept = dnd.adapt(prompts_of("lower")).adapter
    report = json.loads(json.dumps(bench_adapt(dnd, n_prompts=8, repeats=1), allow_nan=False))
    numbers = ("encode_s", "adapt_s", "reuse_ms", "decode_base_tokens_s", "decode_adapter_tokens_s", "peak_rss_mb")
    assert all(report[k] > 0 for k in numbers)
    assert set(report["adapt_steps_s"]) >= {"encode", "generate", "store", "swap", "total"}
    assert report["machine"]["base"] == dnd.base.name and "adapt / encode" in render_adapting(report)
    assert dnd.store.ls() == [kept] and dnd.engine.bank.resident() == [kept.id]
