"""Gzipped prompt files: known by their bytes, refused when torn, and when they are bombs."""

from __future__ import annotations

import gzip
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from dnd_sdk.errors import InputError
from dnd_sdk.prompts import read_prompts, sources


def test_gzip_is_known_by_its_bytes(tmp_path: Path) -> None:
    for name in ("p.txt", "p.gz", "p"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(b"a\n") + gzip.compress(b"b\n"))
        assert read_prompts(path).prompts == ("a", "b")


def test_broken_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(b"hello\n" * 1000)
    for raw in (b"plain text", whole[:-4], whole[:20], whole[:15] + b"\xff" * 9 + whole[24:], whole + b"rest"):
        (tmp_path / "p.txt.gz").write_bytes(raw)
        with pytest.raises(InputError, match=r"p\.txt\.gz is no whole gzip file"):
            read_prompts(tmp_path / "p.txt.gz")
    (tmp_path / "p.pdf.gz").write_bytes(whole)
    with pytest.raises(InputError, match=r"unknown suffix '\.pdf'"):
        read_prompts(tmp_path / "p.pdf.gz")


@pytest.mark.parametrize("name", ["b.txt.gz", "b.json.gz", "b.jsonl.gz", "b.csv.gz", "b.gz"])
@pytest.mark.parametrize("unit", [b"a\n", b" ", b"\n", b"a", b"\0", b'"', b"[", b"1 "])
def test_gzip_bombs_are_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, unit: bytes) -> None:
    monkeypatch.setattr(sources, "FREE_BYTES", 2**16)  # 1/64 of what is free, for the test's time
    (tmp_path / name).write_bytes(gzip.compress(unit * (2 * 2**20 // len(unit)), compresslevel=9))
    start = time.process_time()
    with pytest.raises(InputError):
        read_prompts(tmp_path / name)
    assert time.process_time() - start < 5


def test_unpacked_text_has_the_limit_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 2000)
    lines = "".join(f"prompt {i}\n" for i in range(400))
    for name, text in (("p.txt.gz", lines), ("p.json.gz", json.dumps(lines.split("\n")))):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
        with pytest.raises(InputError, match="is larger than"):
            read_prompts(tmp_path / name)


class Counting(io.BufferedReader):
    """Standard input that counts what is asked of it."""

    n_calls = 0

    def readline(self, *args: Any) -> bytes:
        self.n_calls += 1
        return super().readline(*args)

    def read(self, *args: Any) -> bytes:
        self.n_calls += 1
        return super().read(*args)

    def peek(self, *args: Any) -> bytes:
        self.n_calls += 1
        return super().peek(*args)


@pytest.mark.parametrize("blank", [b"\n", b" \t\r\n", b"\r\n"])
@pytest.mark.parametrize(("first", "second"), [(b"", b"{"), (b'{"prompt": "a"}\n', b"{")])
def test_blank_lines_cost_next_to_nothing_and_count_as_lines(first: bytes, second: bytes, blank: bytes) -> None:
    n = 2**18
    stream = Counting(io.BytesIO(first + blank * n + second + b'"prompt": "b"}\n' + blank * n + b"{no JSON}\n"))
    line = n + 2 + bool(first) + n
    with pytest.raises(InputError, match=f"standard input line {line} is not JSON"):
        read_prompts("-", stdin=stream)
    assert stream.n_calls < n // 64


@pytest.mark.parametrize("name", ["p.jsonl", "p.txt", "p.csv", "p.jsonl.gz", "p"])
def test_blank_lines_alone(tmp_path: Path, name: str) -> None:
    content = b"\n" * 2**20
    (tmp_path / name).write_bytes(gzip.compress(content, compresslevel=1) if name.endswith("gz") else content)
    with pytest.raises(InputError, match=r"holds no prompts|has no column"):
        read_prompts(tmp_path / name)


def test_blank_lines_inside_a_quoted_field_stay(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b'\n \n\nprompt,other\n"a\n\n\nb",1\n\n\nc,2\n')
    assert read_prompts(tmp_path / "p.csv").prompts == ("a\n\n\nb", "c")
