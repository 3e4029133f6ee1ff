"""Files appear whole or not at all, and what a killed process left goes without anything else."""

from __future__ import annotations

import errno
import uuid
from pathlib import Path

import pytest

from dnd_sdk.errors import InputError, StorageError
from dnd_sdk.files.atomic import replacing, storage_errors, sweep, write_atomic


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
    sweep(tmp_path, alone=True)
    assert {p.name for p in tmp_path.iterdir()} == kept


@pytest.mark.parametrize(
    ("error", "said", "fix"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cannot read /x: No space left", "free some disk space"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "os error 28", "free some disk space"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied", "no permission: choose"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), "Not a directory", "a file stands where a folder"),
    ],
)
@pytest.mark.parametrize("all_os_errors", [True, False])
def test_what_the_disk_says_is_a_storage_error(error: Exception, said: str, fix: str, all_os_errors: bool) -> None:
    with pytest.raises(StorageError, match=said) as e, storage_errors("read", Path("/x"), all_os_errors=all_os_errors):
        raise error
    assert e.value.fix is not None and e.value.fix.startswith(fix)


@pytest.mark.parametrize("error", [OSError("no such model"), FileNotFoundError(errno.ENOENT, "No such file")])
def test_an_error_that_need_not_be_the_disks_is_told_apart_on_demand(error: OSError) -> None:
    with pytest.raises(StorageError, match=r"cannot read /x: [nN]o such"), storage_errors("read", Path("/x")):
        raise error
    with pytest.raises(type(error)) as e, storage_errors("read", Path("/x"), all_os_errors=False):
        raise error
    assert e.value is error


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), InputError("the user's"), KeyboardInterrupt()])
def test_other_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as e, storage_errors("read", Path("/x")):
        raise error
    assert e.value is error
