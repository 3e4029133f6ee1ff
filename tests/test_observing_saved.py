"""The saved stream: goes on as if never stopped, survives damage, crashes and other processes."""

from __future__ import annotations

import json
import multiprocessing
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from routing_parts import task_vectors
from safetensors.torch import save_file

import dnd_sdk.observing.saved as stream_state
from dnd_sdk.errors import StorageError
from dnd_sdk.files import locked
from dnd_sdk.observing.prompt_stream import Choice, PromptStream, StreamSettings
from dnd_sdk.observing.saved import STATE_FILE, load_stream, save_stream

SMALL = StreamSettings(min_prompts=6, max_prompts=8, max_clusters=16)


def pairs(seed: int = 0) -> list[tuple[str, torch.Tensor]]:
    """Three tasks of 20 prompts, shuffled."""
    mixed = [(f"{t} {i}", v) for t in range(3) for i, v in enumerate(task_vectors(t, 20, width=256))]
    random.Random(seed).shuffle(mixed)
    return mixed


def fed(stream: PromptStream, some: list[tuple[str, torch.Tensor]]) -> list[Any]:
    return [stream.add(*pair) for pair in some]


@pytest.mark.parametrize("at", [1, 15, 40])
def test_a_saved_stream_goes_on_as_if_never_stopped(tmp_path: Path, at: int) -> None:
    whole, half = PromptStream(SMALL), PromptStream(SMALL)
    expected = fed(whole, pairs())
    found = fed(half, pairs()[:at])
    save_stream(half, tmp_path / "s", encoder="e")
    again = load_stream(tmp_path / "s", SMALL, encoder="e")
    assert found + fed(again, pairs()[at:]) == expected
    for cluster in whole.sizes():
        assert again.prompts(cluster) == whole.prompts(cluster)
        assert torch.equal(again.vectors(cluster), whole.vectors(cluster))


def test_choices_are_kept(tmp_path: Path) -> None:
    stream = PromptStream(SMALL)
    fed(stream, pairs())
    chosen = [Choice("generate", "a"), Choice("reuse", "b", final=False), Choice("base", None)]
    for cluster, choice in zip(stream.sizes(), chosen, strict=False):
        stream.choose(cluster, choice)
    save_stream(stream, tmp_path / "s", encoder="e")
    again = load_stream(tmp_path / "s", SMALL, encoder="e")
    assert [again.choice(c) for c in again.sizes()] == [stream.choice(c) for c in stream.sizes()]
    assert [c.chosen_at for c in again.clusters] == [c.chosen_at for c in stream.clusters]


def test_an_empty_stream_and_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_stream(tmp_path / "s", encoder="e").sizes() == {}
    save_stream(PromptStream(), tmp_path / "s", encoder="e")
    assert load_stream(tmp_path / "s", encoder="e").sizes() == {}
    assert not caplog.records


def test_smaller_settings_than_it_was_saved_under(tmp_path: Path) -> None:
    stream = PromptStream(SMALL)
    fed(stream, pairs())
    save_stream(stream, tmp_path / "s", encoder="e")
    again = load_stream(tmp_path / "s", StreamSettings(min_prompts=2, max_prompts=2, max_clusters=2), encoder="e")
    assert len(again.sizes()) == 2 and all(len(again.prompts(c)) == 2 for c in again.sizes())
    assert again.sums is not None and len(again.sums) == 2


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / STATE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cluster(**changes: object) -> list[dict[str, object]]:
    return [{"id": 0, "n": 1, "used": 1, "chosen_at": 0, "prompts": ["a"], "choice": None} | changes]


def tensors(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    "harm",
    [
        lambda d: tensors(d).unlink(),
        lambda d: tensors(d).write_bytes(b"torn"),
        lambda d: save_file({"sums": task_vectors(1, 1), "vectors": task_vectors(1, 1)}, tensors(d)),
        lambda d: (d / STATE_FILE).write_text("{"),
        lambda d: (d / STATE_FILE).write_text("[]"),
        lambda d: rewrite(d, clusters=[]),
        lambda d: rewrite(d, clusters=[{"name": 1}]),
        lambda d: rewrite(d, clusters=cluster(prompts=[7])),
        lambda d: rewrite(d, clusters=cluster(prompts=["a", "b"])),
        lambda d: rewrite(d, clusters=cluster(id="0")),
        lambda d: rewrite(d, clusters=cluster(id=5)),
        lambda d: rewrite(d, clusters=cluster(n=0)),
        lambda d: rewrite(d, clusters=cluster(choice={"decision": "reuse", "adapter_id": None, "final": True})),
        lambda d: rewrite(d, clusters=cluster(choice={"decision": "buy", "adapter_id": "x", "final": True})),
        lambda d: rewrite(d, clusters=cluster(choice=[])),
        lambda d: rewrite(d, sha256="../../../../etc"),
        lambda d: rewrite(d, encoder="other"),
        lambda d: rewrite(d, format_version=9),
        lambda d: rewrite(d, next_id=None),
    ],
)
def test_unusable_state_is_set_aside(tmp_path: Path, harm: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "s"
    stream = PromptStream()
    stream.add("a", task_vectors(0, 1))
    save_stream(stream, folder, encoder="e")
    assert load_stream(folder, encoder="e").sizes() == {0: 1}
    harm(folder)
    assert load_stream(folder, encoder="e").sizes() == {}
    assert "starting anew" in caplog.text and (tmp_path / "s.unusable" / STATE_FILE).exists()
    save_stream(stream, folder, encoder="e")
    assert load_stream(folder, encoder="e").sizes() == {0: 1}


def test_a_crash_between_the_two_files_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = PromptStream(SMALL)
    fed(stream, pairs()[:10])
    save_stream(stream, tmp_path / "s", encoder="e")
    fed(stream, pairs()[10:])
    real = stream_state.write_atomic

    def dies(path: Path, data: bytes) -> None:
        if path.name == STATE_FILE:
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(stream_state, "write_atomic", dies)
    with pytest.raises(KeyboardInterrupt):
        save_stream(stream, tmp_path / "s", encoder="e")
    assert sum(load_stream(tmp_path / "s", SMALL, encoder="e").sizes().values()) == 10


def test_only_the_latest_tensors_are_kept(tmp_path: Path) -> None:
    stream = PromptStream(SMALL)
    for pair in pairs()[:5]:
        stream.add(*pair)
        save_stream(stream, tmp_path / "s", encoder="e")
    assert len(list((tmp_path / "s").glob("*.safetensors"))) == 1


def test_an_unwritable_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        save_stream(PromptStream(), tmp_path / "file" / "state", encoder="e")


def test_a_lock_that_is_never_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_state, "LOCK_TIMEOUT_S", 0.05)
    (tmp_path / "s").mkdir()
    with locked(tmp_path / "s"), pytest.raises(StorageError, match="another process"):
        save_stream(PromptStream(), tmp_path / "s", encoder="e")


def save_many(folder: Path, task: int, n: int) -> None:
    stream = PromptStream(SMALL)
    for i, v in enumerate(task_vectors(task, n, spread=0.1)):
        stream.add(f"{task} {i}", v)
        save_stream(stream, folder, encoder="e")


def test_of_two_processes_the_last_to_write_wins_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=save_many, args=(tmp_path / "s", t, 12)) for t in (0, 1)]
    for w in writers:
        w.start()
    while any(w.is_alive() for w in writers):
        tasks = {p.split()[0] for c in load_stream(tmp_path / "s", SMALL, encoder="e").clusters for p in c.prompts}
        assert len(tasks) <= 1
    assert [w.exitcode for w in writers] == [0, 0]
    assert list(load_stream(tmp_path / "s", SMALL, encoder="e").sizes().values()) == [12] and not caplog.records
