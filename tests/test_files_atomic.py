"""Files appear whole or not at all, and what a killed process left goes without anything else."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from dnd_sdk.errors import StorageError
from dnd_sdk.files.atomic import replacing, sweep, write_atomic


def test_an_error_while_writing_leaves_the_old_content_alone(tmp_path: Path) -> None:
    file = tmp_path / "f"
    write_atomic(file, "old")
    with pytest.raises(RuntimeError, match="boom"), replacing(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError("boom")
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and file.read_text() == "old"
    with pytest.raises(StorageError, match="cannot write"):
        write_atomic(file / "below", b"x")


def test_a_sweep_takes_what_a_killed_write_left_and_nothing_else(tmp_path: Path) -> None:
    kept = {".gitignore", ".git", "losses.jsonl", f"losses.{uuid.uuid4().hex}"}
    (tmp_path / ".git").mkdir()
    for name in kept - {".git"}:
        (tmp_path / name).write_text("mine")
    writing = replacing(tmp_path / "checkpoint.safetensors")
    writing.__enter__().write_text("half")
    assert len(list(tmp_path.iterdir())) == len(kept) + 1
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == kept
