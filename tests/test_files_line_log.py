"""Lines that several processes add to: whoever reads on reads the file it knows, or all of another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dnd_sdk.files import LineLog


def log_in(folder: Path) -> LineLog:
    return LineLog(folder / "log", {"format_version": 1})


def put_back(path: Path, backup: Path) -> None:
    os.replace(backup, path)


def write_over(path: Path, backup: Path) -> None:
    path.write_bytes(backup.read_bytes())


@pytest.mark.parametrize("restore", [put_back, write_over])
def test_a_backup_that_was_added_to_is_read_from_its_beginning(
    tmp_path: Path, restore: Callable[[Path, Path], None]
) -> None:
    log, backup = log_in(tmp_path), tmp_path / "backup"
    log.fold([{"n": 1}])
    shutil.copy(log.path, backup)
    log.append([{"n": 2}])
    restore(log.path, backup)
    other = log_in(tmp_path)
    other.read()
    other.append([{"n": 3}, {"n": 4}])
    assert log.read() == ([{"n": 1}, {"n": 3}, {"n": 4}], True)
    assert log.read() == ([], False)


def test_what_was_only_added_to_is_read_on(tmp_path: Path) -> None:
    log, other = log_in(tmp_path), log_in(tmp_path)
    log.fold([])
    assert other.read() == ([], True)
    for n in range(3):
        log.append([{"n": n}])
        assert other.read() == ([{"n": n}], False) == ([{"n": n}], log.read()[1])


def test_a_file_that_is_gone_cannot_be_read_on(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    assert log.read() == ([], False)
    log.fold([{"n": 1}])
    log.path.unlink()
    with pytest.raises(FileNotFoundError):
        log.read()
    assert log.is_new and log.read() == ([], False)


def test_lines_that_others_wrote_where_no_lock_held_them_off_are_read_on(tmp_path: Path) -> None:
    log, other = log_in(tmp_path), log_in(tmp_path)
    log.fold([])
    other.read()
    other.append([{"n": 1}])
    log.append([{"n": 2}])
    assert log.read() == ([{"n": 1}, {"n": 2}], False)
    assert log.read() == ([], False) and other.read() == ([{"n": 2}], False)
