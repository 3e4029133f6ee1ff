"""Prompt files as people have them: shapes of logs and data sets, tables, a named field; and anything else."""

from __future__ import annotations

import gzip
import io
import json
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dnd_sdk.errors import ConfigError, DndError, InputError
from dnd_sdk.prompts import PromptSet, read_prompts, user_text

USER = {"role": "user", "content": "hello"}
CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "old"},
    USER,
    {"role": "assistant", "content": "x"},
]
PARTS = [{"type": "input_text", "text": "hello"}]
SHARE = [{"from": "system", "value": "s"}, {"from": "human", "value": "hello"}, {"from": "gpt", "value": "x"}]

ROWS: dict[str, tuple[Any, str]] = {
    "chat": ({"messages": CHAT}, "`messages`"),
    "openai batch": ({"custom_id": "1", "method": "POST", "body": {"model": "m", "messages": CHAT}}, "`body.messages`"),
    "openai responses": ({"custom_id": "1", "body": {"model": "m", "input": "hello"}}, "`body.input`"),
    "openai parts": ({"body": {"input": [{"role": "user", "content": PARTS}]}}, "`body.input`"),
    "openai completions": ({"body": {"prompt": "hello"}}, "`body.prompt`"),
    "anthropic batch": ({"custom_id": "1", "params": {"system": "s", "messages": CHAT}}, "`params.messages`"),
    "sharegpt": ({"id": "1", "conversations": SHARE}, "`conversations`"),
    "alpaca without input": ({"instruction": "hello", "input": "", "output": "x"}, "`instruction` with `input`"),
    "question": ({"id": 1, "question": "hello", "answer": "x"}, "`question`"),
    "query": ({"query": "hello"}, "`query`"),
    "input": ({"input": "hello", "target": "x"}, "`input`"),
    "text": ({"text": "hello"}, "`text`"),
    "text itself": ("hello", "the text itself"),
    "list of messages": (CHAT, "the list of messages"),
}  # fmt: skip


def write(path: Path, content: str | bytes) -> Path:
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" and content else raw)
    return path


@pytest.mark.parametrize(
    "name", ["p.jsonl", "p.ndjson", "p.json", "p.jsonl.gz", "array.json", "array.json.gz", "pretty.json"]
)
@pytest.mark.parametrize("kind", ROWS)
def test_shapes_are_recognised_and_said(tmp_path: Path, kind: str, name: str) -> None:
    row, label = ROWS[kind]
    content = "\n".join([json.dumps(row)] * 2)
    if name.startswith(("array", "pretty")) or (isinstance(row, list) and name == "p.json"):
        content = json.dumps([row, row], indent=2 if name.startswith("pretty") else None)
    found = read_prompts(write(tmp_path / name, content))
    assert found.prompts == ("hello",)
    assert found.notes == (f"took {label} of 2 rows", "removed 1 duplicate prompts")


def test_alpaca_joins_instruction_and_input(tmp_path: Path) -> None:
    rows = [{"instruction": "Translate.", "input": "chat", "output": "cat", "text": "all of it"}]
    assert read_prompts(write(tmp_path / "p.json", json.dumps(rows))).prompts == ("Translate.\nchat",)
    table = write(tmp_path / "p.csv", "instruction,input,output\nTranslate.,chat,cat\nGreet.,,hi\n")
    assert read_prompts(table).prompts == ("Translate.\nchat", "Greet.")


def test_trl_prompts_are_messages(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path / "p.jsonl", json.dumps({"prompt": CHAT}))).prompts == ("hello",)


def test_the_first_row_decides(tmp_path: Path) -> None:
    """A question here and an answer there would be no prompts of one job."""
    path = write(tmp_path / "p.jsonl", '{"question": "q", "text": "t"}\n{"text": "u"}\n')
    with pytest.raises(InputError, match=r"line 2 has neither .*rows before it have, only text \(str\)"):
        read_prompts(path)
    write(path, '{"question": "q"}\n{"prompt": "p"}\n' + json.dumps({"messages": CHAT}))
    found = read_prompts(path)
    assert found.prompts == ("q", "p", "hello")
    assert found.notes == ("took `question` of 1 row, `prompt` of 1 row, `messages` of 1 row",)


@pytest.mark.parametrize(
    ("field", "row", "prompts"),
    [
        ("ask", {"ask": "a", "prompt": "p"}, ["a"]),
        ("a.b", {"a": {"b": "x"}}, ["x"]),
        ("a.b", {"a.b": "y", "a": {"b": "x"}}, ["y"]),
        ("request.log.q", {"request": {"log.q": "z"}}, ["z"]),
        ("data.q", {"data": [{"q": "1"}, {"q": "2"}]}, ["1", "2"]),
        ("turns.0.content", {"turns": [{"content": "first"}, {"content": "second"}]}, ["first"]),
        ("turns.-1.content", {"turns": [{"content": "first"}, {"content": "second"}]}, ["second"]),
        ("log.turns", {"log": {"turns": CHAT}}, ["hello"]),
        ("prompts", {"prompts": ["a", "b"]}, ["a", "b"]),
    ],
)
def test_a_field_is_named(tmp_path: Path, field: str, row: dict[str, Any], prompts: list[str]) -> None:
    for name in ("p.jsonl", "p.json"):
        found = read_prompts(write(tmp_path / name, json.dumps(row)), field=field)
        assert list(found.prompts) == prompts and found.notes == ()


@pytest.mark.parametrize("field", ["b", "a.c", "a.b.c", "n", "a.0", "l.5", "l.x", "none", "l.0.q.z", "....", "m.x"])
def test_a_field_that_is_not_there_is_named(tmp_path: Path, field: str) -> None:
    row = {"a": {"b": "x"}, "n": 3, "l": [{"q": "y"}, 3], "none": None, "prompt": "p", "m": [{"x": "1"}, {"y": "2"}]}
    with pytest.raises(InputError, match=f"line 1 has no text at the field {field!r}, only a \\(dict\\)") as e:
        read_prompts(write(tmp_path / "p.jsonl", json.dumps(row)), field=field)
    assert "--field" in str(e.value.fix)


@pytest.mark.parametrize("bad", ["", "x" * 300, 5])
def test_bad_fields(tmp_path: Path, bad: Any) -> None:
    path = write(tmp_path / "p.jsonl", '{"prompt": "p"}')
    with pytest.raises(ConfigError, match="the field must be a name of 1 to 256 characters"):
        read_prompts(path, field=bad)
    with pytest.raises(ConfigError, match="both a column and a field"):
        read_prompts(path, field="a", column="b")


def test_lists_in_lists_are_not_multiplied(tmp_path: Path) -> None:
    deep: Any = "x"
    for _ in range(60):
        deep = [deep, deep]
    deep = json.loads(json.dumps([[[["x"] * 10] * 10] * 10] * 10))
    with pytest.raises(InputError, match="no text at the field"):
        read_prompts(write(tmp_path / "p.jsonl", json.dumps({"a": deep})), field=".".join("a" * 60))


@pytest.mark.parametrize(
    ("name", "content", "notes"),
    [
        ("p.csv", "id,question\n1,a\n2,b;c\n", ("took `question` of 2 rows",)),
        ("p.csv", "id;prompt\n1;a\n2;b;c\n", ("read a table whose columns are parted by semicolons",)),
        ("p.csv", "\n\nid\tprompt\n1\ta\n2\tb\n", ("read a table whose columns are parted by tabs",)),
        ("p.tsv", "id\tprompt\n1\ta\n2\tb, c\n", ()),
        ("p.tsv.gz", "id\tPrompt\n1\ta\n2\tb, c\n", ()),
        ("p.csv.gz", 'id;Question\n1;a\n2;"b\nc"\n', ("parted by semicolons", "took `question` of 2 rows")),
    ],
)
def test_tables(tmp_path: Path, name: str, content: str, notes: tuple[str, ...]) -> None:
    found = read_prompts(write(tmp_path / name, content))
    assert len(found.prompts) == 2 and found.prompts[0] == "a" and found.prompts[1].startswith("b")
    assert len(found.notes) == len(notes)
    assert all(wanted in note for wanted, note in zip(notes, found.notes, strict=True))


def test_a_named_column_is_taken_whatever_the_delimiter(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", "prompt;my, own\nno;yes\n")
    assert read_prompts(path, column="my, own").prompts == read_prompts(path, field="my, own").prompts == ("yes",)
    with pytest.raises(InputError, match=r"no column 'x'; its columns are \['prompt', 'my, own'\]|no column 'x'"):
        read_prompts(path, column="x")


def test_an_explicit_column_takes_no_other_shape(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '{"text": "t"}')
    with pytest.raises(InputError, match="neither a text 'ask'"):
        read_prompts(path, column="ask")


def test_parts_that_are_no_text_are_counted(tmp_path: Path) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://x"}}
    parts = [{"type": "text", "text": "what is this"}, image, image]
    later = [{"role": "user", "content": parts}, {"role": "user", "content": [{"type": "tool_result"}]}]
    rows = [{"messages": [{"role": "user", "content": parts}]}, {"messages": later}]
    found = read_prompts(write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows))))
    assert found.prompts == ("what is this",)
    assert "left out 5 parts of messages that are no text (images or the like)" in found.notes


ROWS_ON_STDIN = (
    '[{"prompt": "a"}, {"prompt": "b"}]',
    '[\n {"prompt": "a"},\n {"prompt": "b"}\n]',
    '{\n"prompt": "a"\n}{"prompt": "b"}',
    "a\nb",
)


@pytest.mark.parametrize("content", ROWS_ON_STDIN)
@pytest.mark.parametrize("packed", [False, True])
def test_standard_input_holds_any_of_them(content: str, packed: bool) -> None:
    raw = gzip.compress(content.encode()) if packed else content.encode()
    assert read_prompts("-", stdin=io.BufferedReader(io.BytesIO(raw))).prompts == ("a", "b")


def test_text_in_brackets_is_text() -> None:
    lines = b"[INST] hi [/INST]\n[1] what is it\n"
    assert len(read_prompts("-", stdin=io.BytesIO(lines)).prompts) == 2


def test_large_arrays_are_read_in_pieces(tmp_path: Path) -> None:
    rows = [{"prompt": f"prompt {i} é" + "x" * 300} for i in range(20_000)]
    path = write(tmp_path / "p.json", json.dumps(rows, ensure_ascii=False))  # one line of 7 MB
    found = read_prompts(path, limit=30_000)
    assert found.n_read == 20_000 and found.prompts == tuple(r["prompt"] for r in rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"prompt": "a"}', "item 1 is not JSON: it is followed by ''"),
        ('[{"prompt": "a"} {"prompt": "b"}]', "item 1 is not JSON: it is followed by '{'"),
        ('[{"prompt": "a"},]', "item 2 is not JSON: Expecting value"),
        ('[{"prompt": "a"}] x', "more text follows"),
        ('{"prompt": "a"', "item 1 is not JSON"),
        ("hello", "item 1 is not JSON: Expecting value"),
        ("[" * 100_000, "item 1 is not JSON"),
        ("1" * 5000, "item 1 "),
        ("[1, 2]", "item 1 holds a JSON int, expected an object"),
        ('{"data": [{"prompt": "a"}]}', r"item 1 has neither .*only data \(list\)"),
        ("[]", "holds no prompts"),
        ("", "holds no prompts"),
        ('{"\\ud800": 1}', r"only \\ud800 \(int\)"),
        ('{"prompt": "\\ud800"}', "item 1 holds half of a surrogate pair"),
        (b'[{"prompt": "a\xff"}]', r"p\.json is not UTF-8: byte 0xff at offset 14"),
        (b'[{"prompt": "a\xc3', r"p\.json is not UTF-8: byte 0xc3 at offset 14"),
        (b"[\0]", "NUL byte at offset 1"),
        (b"\xef\xbb\xbf\xff", "byte 0xff at offset 3"),
    ],
)
def test_bad_json_names_the_item(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as e:
        read_prompts(write(tmp_path / "p.json", content))
    assert len(str(e.value).encode()) < 2000


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path / "p.json", '\ufeff[{"prompt": "a"}]')).prompts == ("a",)


def test_paths_that_cannot_be() -> None:
    for path in ("x" * 5000, "a\0b", "y" * 300 + ".txt"):
        with pytest.raises(InputError) as e:
            read_prompts(path)
        assert len(str(e.value)) < 1000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["prompt", "messages", "body", "role", "content", "from", "value", "conversations", "type",
                         "text", "instruction", "input", "question", "a", "user"])
        | st.text(max_size=4), inner, max_size=4,
    ),
    max_leaves=20,
)  # fmt: skip
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "human", "system", 3]), "content": JSON})
    | st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", None]), "value": JSON}),
    max_size=3,
)
SHAPED = st.dictionaries(st.sampled_from(["messages", "conversations", "prompt", "body"]), MESSAGES | JSON, max_size=3)
LINES = st.lists(st.sampled_from([",", ";", "\t", '"', "\n", "\r", "prompt", "question", "é", "{", "}", "[", "]", ":"]))
CONTENT = (
    st.binary(max_size=200)
    | st.lists(JSON | SHAPED, max_size=4).map(lambda v: json.dumps(v).encode())
    | st.lists(JSON | SHAPED, max_size=4).map(lambda v: "\n".join(map(json.dumps, v)).encode())
    | LINES.map(lambda v: "".join(v).encode())
)
SUFFIXES = ["", ".txt", ".jsonl", ".json", ".csv", ".tsv"]


def right(found: PromptSet) -> bool:
    """Distinct prompts of real text without blank ends, and notes that can be printed."""
    for text in (*found.prompts, *found.notes):
        assert text and text == text.strip() and text.encode()
    return 0 < len(set(found.prompts)) == len(found.prompts) <= found.n_read


@settings(max_examples=400, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=CONTENT,
    suffix=st.sampled_from(SUFFIXES),
    packing=st.sampled_from(["plain", "packed", "torn", "named"]),
    field=st.none() | st.sampled_from(["a", "body.messages", "messages.0.content", "..", "0", "a.-1.a"]) | st.text(),
)
def test_whatever_the_file_a_right_result_or_a_dnd_error(
    tmp_path: Path, content: bytes, suffix: str, packing: str, field: str | None
) -> None:
    path = tmp_path / f"p{suffix}{'' if packing == 'plain' else '.gz'}"
    raw = gzip.compress(content) if packing in ("packed", "torn") else content
    path.write_bytes(raw[: len(raw) * 2 // 3] if packing == "torn" else raw)
    try:
        assert right(read_prompts(path, field=field))
    except DndError as e:
        assert len(str(e).encode()) < 2000


@settings(max_examples=200, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip), min_size=1
    )
)
def test_every_shape_gives_back_what_was_written(tmp_path: Path, texts: list[str]) -> None:
    wanted = tuple(dict.fromkeys(t.strip() for t in texts))
    for shape in (
        lambda t: {"body": {"messages": [{"role": "user", "content": t}]}},
        lambda t: {"conversations": [{"from": "human", "value": t}, {"from": "gpt", "value": "x"}]},
        lambda t: {"instruction": t, "input": ""},
        lambda t: {"question": t},
        lambda t: t,
    ):
        rows = [shape(t) for t in texts]
        array = write(tmp_path / "p.json.gz", json.dumps(rows))
        lines = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))
        assert read_prompts(array).prompts == read_prompts(lines).prompts == wanted


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "a"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": None}], "a"),
        (({"from": "human", "value": "a"},), "a"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}], "a"),
        ([UserDict(role="user", content="a"), 5], "a"),
        ([{"role": "system", "content": "a"}], None),
        ([], None),
        ("user", None),
        (None, None),
    ],
)
def test_what_a_chat_is_about(messages: object, text: str | None) -> None:
    assert user_text(messages) == text
