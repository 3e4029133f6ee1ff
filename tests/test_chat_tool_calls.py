"""Calls are found in what models write, everything else stays text, and a stream never shows what becomes a call."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnd_sdk.chat.tool_calls import ToolCall, plain_so_far, read_answer

NUMBERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
OFFERED = [
    {"type": "function", "function": {"name": "add", "parameters": NUMBERS}},
    {"type": "function", "function": {"name": "look_up"}},
]
ADD = ToolCall("add", {"a": 2, "b": 3})
HERMES = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
LOOK = '<tool_call>{"name": "look_up", "arguments": {"what": "</tool_call> or {"}}</tool_call>'
LLAMA = '{"name": "add", "parameters": {"a": 2, "b": 3}}'


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (HERMES, "", [ADD]),
        (f"I must add.\n{HERMES}", "I must add.", [ADD]),
        (f" I add. {HERMES}\n and then look.\n{LOOK} ", " I add.\nand then look.", ["add", "look_up"]),
        (f"{HERMES}\n{HERMES}", "", [ADD, ADD]),
        (HERMES.removesuffix("</tool_call>"), "", [ADD]),
        (HERMES.replace("\n</tool_call>", LOOK), "", ["add", "look_up"]),
        ('<tool_call>{"name": "other"}</tool_call>', "", [ToolCall("other", {})]),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 2, \\"b\\": 3}"}</tool_call>', "", [ADD]),
        ('<tool_call>{"name": "add", "parameters": {"a": 2, "b": 3}}</tool_call>', "", [ADD]),
        (f"<tool_call>oops</tool_call> {HERMES}", "<tool_call>oops</tool_call>", [ADD]),
        (LLAMA, "", [ADD]),
        (f"\n<|python_tag|>{LLAMA}\n", "", [ADD]),
        (LLAMA.replace("parameters", "arguments"), "", [ADD]),
        (f"```json\n{LLAMA}\n```", "", [ADD]),
        (f" ```\n{json.dumps(json.loads(LLAMA), indent=2)}", "", [ADD]),
        (LLAMA[:-1], "", [ADD]),
        (f"```json\n{LLAMA[:-1]}\n```", "", [ADD]),
        (LLAMA.replace("2", '"2"').replace("3", '" 3"'), "", [ADD]),
    ],
)
def test_calls_are_read(text: str, said: str, calls: list[ToolCall | str]) -> None:
    reading = read_answer(text, OFFERED)
    assert reading.text == said
    assert [c if isinstance(w, ToolCall) else c.name for c, w in zip(reading.calls, calls, strict=True)] == calls


def test_a_tag_within_a_string_ends_nothing() -> None:
    assert read_answer(LOOK, OFFERED).calls == (ToolCall("look_up", {"what": "</tool_call> or {"}),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " plain, with a space at both ends ",
        '<tool_call>{"name": "add", "arguments": {"a": 2}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {}}}</tool_call>',
        '<tool_call>["add"]</tool_call>',
        '<tool_call>{"name": 7}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "add", "arguments": "[1"}</tool_call>',
        "<tool_call>",
        "<tool_call>" + "[" * 200_000,
        "<tool_call>" + "9" * 5_000,
        LLAMA.replace("add", "no_tool_of_ours"),
        '{"name": "add"}',
        '{"name": "add", "red": 0}',
        f"{LLAMA} there you are",
        f"Here: {LLAMA}",
        f"{LLAMA}; {LLAMA}",
        LLAMA[:-2],
        LLAMA[:-3],
        f"```json\n{LLAMA}\n```\nThere you are.",
        f"```json\n{LLAMA}\n{LLAMA}\n```",
        f"```python\nadd({LLAMA})\n```",
        "```",
        "```" + "{" * 200_000,
        "{" * 200_000,
    ],
    ids=lambda t: t[:50],
)
def test_anything_else_is_plain_text_as_it_was(text: str) -> None:
    assert read_answer(text, OFFERED) == (text, ())


def test_a_stream_holds_calls_back_and_nothing_else() -> None:
    said = f"I add. {HERMES}"
    assert [plain_so_far(said[:n]) for n in (1, 6, 7, 8, 12, len(said))] == ["I", "I add.", *["I add."] * 4]
    assert plain_so_far("2 < 3 and <b>") == "2 < 3 and <b>"
    assert {plain_so_far(LLAMA[:n]) for n in range(len(LLAMA) + 1)} == {""}
    assert {plain_so_far(t) for t in (" <|pyth", "<|python_tag|>{", "\n{")} == {""}
    assert plain_so_far("<|pies|>") == "<|pies|>"
    fenced = f" ```json\n{LLAMA}\n```"
    assert {plain_so_far(fenced[:n]) for n in range(len(fenced) + 1)} == {""}
    code = "```python\nprint(2)\n```"
    assert [plain_so_far(code[:n]) for n in (2, 9, 11, len(code))] == ["", "", "```python\np", code]


PIECES = st.sampled_from(
    ["<tool_call>", "</tool_call>", HERMES, LOOK, LLAMA, "{", '"', " ", "\n", "a < b", "<", "<|python_tag|>", "```"]
)


@given(st.lists(PIECES, max_size=6).map("".join))
def test_what_a_stream_showed_is_how_the_text_begins(text: str) -> None:
    shown = [plain_so_far(text[:n]) for n in range(len(text) + 1)]
    whole = read_answer(text, OFFERED).text
    assert all(later.startswith(earlier) for earlier, later in zip(shown, [*shown[1:], whole], strict=True))


@given(st.text(max_size=20), st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3))
def test_whatever_the_arguments_they_come_back(before: str, arguments: dict[str, int | str]) -> None:
    body = json.dumps({"name": "add", "arguments": arguments}, ensure_ascii=False)
    assert read_answer(f"{before}<tool_call>{body}</tool_call>", OFFERED).calls == (ToolCall("add", arguments),)
