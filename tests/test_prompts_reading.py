"""Prompt files in every format, and every way they can be wrong."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import count, repeat
from pathlib import Path

import pytest

from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.prompts import reading, sources
from dnd_sdk.prompts.reading import MAX_PROMPTS, clean_prompts, prompt_set_hash, read_prompts


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", '\ufeff  first \r\n\n\nsecond\n{"not": json\nlast')
    found = read_prompts(path)
    assert found.prompts == ("first", "second", '{"not": json', "last")
    assert found.notes == () and found.n_read == 4


def test_jsonl_prompt_and_messages(tmp_path: Path) -> None:
    rows = [
        {"prompt": "plain", "response": "ignored"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "old"}, {"role": "assistant"}]},
        {
            "messages": [
                {"role": "user", "content": "older"},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}],
                },
            ]
        },
    ]
    path = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_prompts(path).prompts == ("plain", "old", "a\nb")


def test_csv_column_with_quotes_and_newlines(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", '\ufeffid, text \n1,"one, two"\n2,"line\nbreak"\n3,\n4\n')
    found = read_prompts(path, column="text")
    assert found.prompts == ("one, two", "line\nbreak")
    assert found.notes == ("skipped 2 blank prompts",)


@pytest.mark.parametrize("content", ["one\ntwo\n", '\n{"prompt": "one"}\n{"prompt": "two"}\n'])
@pytest.mark.parametrize("as_text", [False, True])
def test_standard_input_is_told_apart(content: str, as_text: bool) -> None:
    stream = io.StringIO(content) if as_text else io.BytesIO(content.encode())
    assert read_prompts("-", stdin=stream).prompts == ("one", "two")


def test_standard_input_of_the_process() -> None:
    code = "from dnd_sdk.prompts.reading import read_prompts; print(read_prompts('-').prompts)"
    run = subprocess.run([sys.executable, "-c", code], input="a\nb\n", capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "('a', 'b')"


def test_file_without_suffix_is_read_like_standard_input(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path / "prompts", '{"prompt": "x"}')).prompts == ("x",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.txt", "", "e.txt holds no prompts"),
        ("e.txt", " \n\t\n", "holds no prompts"),
        ("e.jsonl", "\n", "holds no prompts"),
        ("e.csv", "", "no column 'prompt'; its columns are \\[\\]"),
        ("e.csv", "prompt\n", "holds no prompts"),
        ("b.txt", b"ok\nab\0cd\n", "b.txt line 2 holds a NUL byte at offset 5"),
        ("u16.txt", "hello".encode("utf-16"), "line 1 .*UTF-8 text|line 1 .*NUL byte"),
        ("l1.txt", "ok\ncaf\xe9\n".encode("latin-1"), "l1.txt line 2 is not UTF-8: byte 0xe9 at offset 6"),
        ("bom.txt", b"\xef\xbb\xbf\xff", "line 1 is not UTF-8: byte 0xff at offset 3"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n\n{"text": "b"}\n',
            "p.jsonl line 3 has neither a text 'prompt' .*only text \\(str\\)",
        ),
        ("p.jsonl", '{"prompt": 3}\n', "line 1 has neither .*prompt \\(int\\)"),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}\n', "line 1 has neither"),
        ("p.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}\n', "line 1 has neither"),
        ("p.jsonl", '{"prompt": "a"}\nnot json\n', "line 2 is not JSON"),
        ("p.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("p.jsonl", '["a"]\n', "line 1 holds a JSON list, expected an object"),
        ("p.jsonl", '{"prompt": "\\ud800"}\n', "line 1 holds half of a surrogate pair"),
        ("p.csv", "id,name\n1,a\n", "no column 'prompt'; its columns are \\['id', 'name'\\]"),
        ("p.csv", 'prompt\nfine\n"' + "x" * 200_000, "line 3 is not CSV: field larger"),
        ("p.pdf", "x", "unknown suffix '.pdf'"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_prompts(write(tmp_path / name, content))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file .*gone\.txt"):
        read_prompts(tmp_path / "gone.txt")
    with pytest.raises(InputError, match="is a folder"):
        read_prompts(tmp_path)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources, "open", refuse, raising=False)
    with pytest.raises(InputError, match=r"cannot read .*p\.txt: Permission denied"):
        read_prompts(write(tmp_path / "p.txt", "x"))


def test_long_lines_are_kept_up_to_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 2**20)
    path = write(tmp_path / "p.txt", "short\n" + "x" * (2**20 - 1) + "\n")
    assert len(read_prompts(path).prompts[1]) == 2**20 - 1
    write(path, "short\n" + "x" * (2**20 + 1))
    with pytest.raises(InputError, match=r"p\.txt line 2 is longer than 1 MiB"):
        read_prompts(path)


def test_huge_files_are_refused_before_and_while_reading(tmp_path: Path) -> None:
    path = tmp_path / "huge.txt"
    with open(path, "wb") as f:
        f.truncate(sources.MAX_FILE_BYTES + 1)  # sparse: takes no space
    with pytest.raises(InputError, match=r"huge\.txt is larger than 2 GiB"):
        read_prompts(path)


def test_endless_streams_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 1000)
    with pytest.raises(InputError, match="standard input is larger"):
        read_prompts("-", stdin=io.BytesIO(b"abc\n" * 300))


def test_hundred_thousand_prompts_are_sampled_the_same_way_every_time(tmp_path: Path) -> None:
    texts = [f"prompt {i}" for i in range(100_000)]
    found = read_prompts(write(tmp_path / "a.txt", "\n".join(texts)))
    assert found.notes == ("read 100000 prompts, sampled 512",)
    assert len(found.prompts) == MAX_PROMPTS and found.n_read == 100_000
    assert list(found.prompts) == sorted(found.prompts, key=texts.index), "in file order"
    random.Random(0).shuffle(texts)
    assert set(read_prompts(write(tmp_path / "b.txt", "\n".join(texts))).prompts) == set(found.prompts)


def test_the_sample_is_spread_over_the_whole_input() -> None:
    # 512 of 100 blocks of 100: each block gets about 5; a sample of the head or tail would leave blocks empty
    found = clean_prompts(f"prompt {i}" for i in range(10_000))
    blocks = Counter(int(p.split()[1]) // 1000 for p in found.prompts)
    assert len(blocks) == 10 and min(blocks.values()) > 25


def test_duplicates_are_removed_with_a_note_even_when_sampling() -> None:
    found = clean_prompts(["a", " a", "b", "a\n"])
    assert found.prompts == ("a", "b") and found.notes == ("removed 2 duplicate prompts",) and found.n_read == 4
    many = clean_prompts([f"p{i % 700}" for i in range(2100)])
    assert len(set(many.prompts)) == MAX_PROMPTS
    assert many.prompts == clean_prompts([f"p{i}" for i in range(700)]).prompts


def test_one_prompt_is_enough_and_limit_is_checked() -> None:
    assert clean_prompts(["only"]).prompts == ("only",)
    assert len(clean_prompts(["a", "b", "c"], limit=2).prompts) == 2
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        clean_prompts(["a"], limit=0)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a string", r"must be a list of strings, got str\n  fix: pass \[prompt"),
        (b"bytes", "got bytes"),
        ({"a": 1}, "got dict"),
        (3, "got int"),
        ([], "holds no prompts"),
        (["", "  "], "holds no prompts"),
        (["a", 3], "prompt 1 is a int"),
        (["a", None], "prompt 1 is a NoneType"),
        (["a", "\udcff"], "prompt 1 holds half of a surrogate pair"),
    ],
)
def test_bad_lists(prompts: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        clean_prompts(prompts)  # type: ignore[arg-type]


def test_an_iterator_without_end_is_refused_and_a_long_list_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_ITEMS", 100)
    for endless in (repeat("a"), map(str, count()), repeat(" ")):
        with pytest.raises(InputError, match=r"go on after MAX_ITEMS = 100 of them.*\n  fix: .*islice"):
            clean_prompts(endless)
    assert clean_prompts(str(i) for i in range(100)).n_read == 100
    assert clean_prompts([str(i) for i in range(101)]).n_read == 101


def test_an_iterator_that_fails_is_told_with_its_place_and_cause() -> None:
    def failing() -> Iterator[str]:
        yield "a"
        raise ZeroDivisionError("theirs")

    with pytest.raises(InputError, match="prompt 1 could not be had: ZeroDivisionError: theirs") as e:
        clean_prompts(failing())
    assert isinstance(e.value.__cause__, ZeroDivisionError)

    def interrupted() -> Iterator[str]:
        yield "a"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        clean_prompts(interrupted())


def test_hash_ignores_order_duplicates_and_whitespace_only() -> None:
    assert prompt_set_hash(["a", "b"]) == prompt_set_hash([" b\n", "a", "a"])
    hashes = {prompt_set_hash(p) for p in (["a", "b"], ["ab"], ["a"], ["a", "b", "c"], ["A", "b"], ["a b"])}
    assert len(hashes) == 6 and all(len(h) == 64 for h in hashes)


def test_reading_prompts_loads_no_torch() -> None:
    code = "import sys, dnd_sdk.prompts.reading; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
