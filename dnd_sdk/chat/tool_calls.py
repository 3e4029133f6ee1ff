"""Tool calls in an answer's text, as the common open models write them.

* Hermes and Qwen2.5: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them, text around them.
* Llama 3.x: `{"name": ..., "parameters": {...}}` and nothing else. As such an object may also be an answer, it counts
  only when it names a tool that was offered. Small models of the others write it, too, or put it into a code fence.

What looks like a call and is none (broken JSON, no name) stays plain text: a model's slip is no error of the program.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

from dnd_sdk.chat.arguments import parameters_by_tool, typed

if TYPE_CHECKING:
    from dnd_sdk.chat.template import Tools

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_TAG = "<|python_tag|>"
"""Llama may put it before a call."""
_FENCE = "```"
_FENCE_OPENED = re.compile(r"```\w*\s*")
"""With the language, if one is named."""
_DECODER = json.JSONDecoder()


class ToolCall(NamedTuple):
    """One call."""

    name: str
    arguments: dict[str, Any]


class Reading(NamedTuple):
    """An answer taken apart."""

    text: str
    """What is said beside the calls; without calls the whole answer as it was."""
    calls: tuple[ToolCall, ...]


def read_answer(text: str, tools: Tools | None) -> Reading:
    """The calls in a whole answer and what is said beside them; `tools` are the schemas on offer, None: any tool."""
    parameters = parameters_by_tool(tools or ())
    bare = _bare_call(text, None if tools is None else parameters)
    said, calls = _tagged_calls(text) if bare is None else Reading("", (bare,))
    return Reading(said, tuple(ToolCall(c.name, typed(c.arguments, parameters.get(c.name, {}))) for c in calls))


def new_call_id() -> str:
    """An id for a call: models write none, frameworks want one."""
    return uuid.uuid4().hex[:9]  # Mistral's templates insist on nine characters


def plain_so_far(text: str) -> str:
    """The part of an answer still being written that `read_answer(...).text` is sure to begin with."""
    if _may_be_bare(text.lstrip()):
        return ""
    at = text.find(_OPEN)
    if at < 0:
        begun = next((n for n in range(len(_OPEN) - 1, 0, -1) if text.endswith(_OPEN[:n])), 0)
        at = len(text) - begun
    return text[:at].rstrip()


def _may_be_bare(start: str) -> bool:
    """Whether an answer that begins so, without space in front, may turn out to be a call and nothing else."""
    if start and any(opening.startswith(start) for opening in (_TAG, _FENCE)):
        return True
    fence = _FENCE_OPENED.match(start)
    return start.startswith(("{", _TAG)) if fence is None else start[fence.end() :][:1] in ("", "{")


def _bare_call(text: str, offered: Collection[str] | None) -> ToolCall | None:
    body = text.strip().removeprefix(_TAG).strip()
    fence = _FENCE_OPENED.match(body)
    if fence is not None:
        body = body[fence.end() :].removesuffix(_FENCE).rstrip()
    made, end = _json_at(body, 0)
    if made is None:  # the last brace may be missing, the arguments are then whole all the same
        made, end = _json_at(body + "}", 0)
    call = _as_call(made, needs_arguments=True)
    if call is None or end < len(body) or (offered is not None and call.name not in offered):
        return None
    return call


def _tagged_calls(text: str) -> Reading:
    calls: list[ToolCall] = []
    said, kept = [""], 0  # texts between the calls; up to where `text` is dealt with
    at = text.find(_OPEN)
    while at >= 0:
        made, stop = _json_at(text, at + len(_OPEN))
        call, end = _as_call(made), _closed(text, stop)
        if call is not None and end is not None:
            calls.append(call)
            said[-1] += text[kept:at]
            said.append("")
            kept = end
        at = text.find(_OPEN, at + len(_OPEN) if end is None else end)
    if not calls:
        return Reading(text, ())
    said[-1] += text[kept:]
    first, *others = said
    return Reading("\n".join(t for t in (first.rstrip(), *(o.strip() for o in others)) if t), tuple(calls))


def _json_at(text: str, at: int) -> tuple[Any, int]:
    """The JSON value at `at`, and where the text goes on after it; None for what is none."""
    while at < len(text) and text[at].isspace():
        at += 1
    try:
        made, at = _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None, at
    while at < len(text) and text[at].isspace():
        at += 1
    return made, at


def _closed(text: str, end: int) -> int | None:
    """Where the text goes on after the closing tag; the model may leave it out before the next call and at the end."""
    if text.startswith(_CLOSE, end):
        return end + len(_CLOSE)
    return end if end == len(text) or text.startswith(_OPEN, end) else None


def _as_call(made: Any, *, needs_arguments: bool = False) -> ToolCall | None:
    if not isinstance(made, dict):
        return None
    name = made.get("name")
    arguments = made.get("arguments", made.get("parameters", None if needs_arguments else {}))
    if isinstance(arguments, str):  # JSON within JSON, as some models were taught
        arguments = _json_at(arguments, 0)[0]
    return ToolCall(name, arguments) if isinstance(name, str) and name and isinstance(arguments, dict) else None
