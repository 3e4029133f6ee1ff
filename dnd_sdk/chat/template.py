"""Messages to token ids: the base's chat template applied exactly once, everything checked before the model runs.

Tools, calls and their results go through that template too. One that leaves any of them out would do so silently, so a
probe finds out first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError

from dnd_sdk.errors import ConfigError, InputError, shown
from dnd_sdk.prompts import checked_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = str | Sequence[Mapping[str, Any]]
"""A chat, oldest message first, of `role` and `content` (strings); a plain string is one user message.

An assistant's message may have `tool_calls`, each `{"type": "function", "id", "function": {"name", "arguments"}}` with
the arguments as an object or its JSON, and may then do without `content`; a tool's may have `tool_call_id` and `name`.
"""

Tools = Sequence[Mapping[str, Any]]
"""What the model may call; each `{"type": "function", "function": {"name", "description", "parameters"}}`."""

_EXTRAS = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}

_ODD_INPUT = (TypeError, ValueError, LookupError, AttributeError, RecursionError)
"""What a template's own code raises over messages or tools of another shape than it expects."""

_PROBE: list[Any] = [
    {"role": "user", "content": "probe question"},
    {
        "role": "assistant",
        "content": "",
        # some templates insist on ids of nine characters
        "tool_calls": [{"type": "function", "id": "probe0000", "function": {"name": "probe_called", "arguments": {}}}],
    },
    {"role": "tool", "tool_call_id": "probe0000", "name": "probe_called", "content": "probe result"},
]
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_offered",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}
_PROBE_WORDS = ("probe_offered", "probe_called", "probe result")
_PROBED: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, bool]] = WeakKeyDictionary()
"""Per tokenizer the chat template that was probed last, and the answer: it is asked for with every request."""


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools | None = None) -> list[int]:
    """Token ids of the chat up to where the answer begins.

    A tokenizer without a chat template gets the bare contents and its own special tokens.
    Raises `InputError` for messages or tools that are malformed, empty or refused by the template, `ConfigError` for
    tools or calls that the template would not show the model.
    """
    chat, offered = checked_chat(messages), checked_tools(tools)
    if offered or any("tool_calls" in m for m in chat):
        check_renders_tools(tokenizer)
    if tokenizer.chat_template is None:
        ids = _tokenise(tokenizer, "\n\n".join(m["content"] for m in chat), add_special_tokens=True)
    else:
        # the template writes the special tokens itself
        ids = _tokenise(tokenizer, _render(tokenizer, chat, offered), add_special_tokens=False)
    if not ids:
        raise InputError("the prompt has no tokens", fix="pass some text")
    return ids


def option_ids(tokenizer: PreTrainedTokenizerBase, option: str) -> list[int]:
    """Token ids of an answer, end of turn included when the tokenizer has one."""
    ids = _tokenise(tokenizer, option, add_special_tokens=False)
    return ids if tokenizer.eos_token_id is None else [*ids, int(tokenizer.eos_token_id)]


def renders_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template shows the model the tools on offer, the calls made before and their results."""
    template = tokenizer.chat_template
    if template is None:
        return False
    probed, answer = _PROBED.get(tokenizer, (None, False))
    if template != probed:
        answer = _shows_probe(tokenizer)
        _PROBED[tokenizer] = copy(template), answer  # a copy: several templates are a dict, which may be changed
    return answer


def _shows_probe(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        text = str(tokenizer.apply_chat_template(_PROBE, tools=[_PROBE_TOOL], tokenize=False))
    except (TemplateError, TypeError):  # a template made for other roles may also add what is not there
        return False
    return all(word in text for word in _PROBE_WORDS)


def check_renders_tools(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ConfigError` unless `renders_tools`."""
    if not renders_tools(tokenizer):
        raise tools_not_shown()


def tools_not_shown() -> ConfigError:
    """The error for tools that a base would not see."""
    return ConfigError(
        "the base's chat template does not render tools, so the model would never see them",
        fix="use DnDLLM with ReActAgent, or a base whose template renders tools, such as Qwen2.5",
    )


def checked_chat(messages: Messages) -> list[dict[str, Any]]:
    """The chat as a list of what a template may read; raises `InputError` for one that is malformed or empty."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence) or not messages:
        raise InputError("no messages", fix="pass a string or a list of {'role', 'content'}")
    return [_checked_message(m, i) for i, m in enumerate(messages)]


def _checked_message(message: Any, row: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _bad_message(message, row)
    role, content = message.get("role"), message.get("content")
    known = _EXTRAS.get(role, ()) if isinstance(role, str) else ()
    extras = {k: message[k] for k in known if _is_given(message.get(k))}
    if "tool_calls" in extras:
        content = "" if content is None else content
        extras["tool_calls"] = _checked_calls(extras["tool_calls"], row)
    texts = (role, content, *(v for k, v in extras.items() if k != "tool_calls"))
    if not all(isinstance(text, str) for text in texts):
        raise _bad_message(message, row)
    return {"role": role, "content": content, **extras}


def _is_given(value: object) -> bool:
    return value is not None and not (isinstance(value, Sequence) and not value)


def _checked_calls(calls: Any, row: int) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence):
        raise InputError(f"message {row} has tool_calls that are not a list: {shown(calls)}")
    return [_checked_call(call, row) for call in calls]


def _checked_call(call: Any, row: int) -> dict[str, Any]:
    """The call with its arguments as an object, which is what templates write out as JSON."""
    if _name_in(call) is None:
        raise InputError(f"message {row} has a tool call without a function's name: {shown(call)}")
    given = call["function"].get("arguments")
    try:
        arguments = json.loads(given) if isinstance(given, str) and given else given
    except (ValueError, RecursionError) as e:
        raise InputError(f"message {row} has a tool call whose arguments are not JSON: {shown(given)}") from e
    whole = {**call, "function": {**call["function"], "arguments": arguments if _is_given(arguments) else {}}}
    return _writable(whole, f"a tool call of message {row}")


def _writable(described: dict[str, Any], where: str) -> dict[str, Any]:
    """The same, if a template can write it out as JSON."""
    try:
        json.dumps(described)
    except (TypeError, ValueError, RecursionError) as e:
        raise InputError(f"{where} cannot be written as JSON: {str(e)[:80]}", fix="use plain values") from e
    return described


def _bad_message(message: Any, row: int) -> InputError:
    return InputError(f"message {row} is not a {{'role', 'content'}} of two strings: {shown(message)}")


def checked_tools(tools: Tools | None) -> list[dict[str, Any]]:
    """The schemas that a template can write out; raises `InputError` for what is none. None is no tools."""
    if tools is None:
        return []
    if isinstance(tools, str | bytes) or not isinstance(tools, Sequence):  # an iterator may have no end
        raise InputError(f"tools must be a list of JSON schemas, got {type(tools).__name__}", fix="pass [schema, ...]")
    for i, tool in enumerate(tools):
        if _name_in(tool) is None:
            raise InputError(
                f"tool {i} is not a {{'type': 'function', 'function': {{'name', ...}}}}: {shown(tool)}",
                fix="describe it by its JSON schema, as for OpenAI",
            )
    return [_writable(dict(tool), f"tool {i}") for i, tool in enumerate(tools)]


def _name_in(tool: Any) -> str | None:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) and name else None


def _render(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], tools: list[Any]) -> str:
    try:
        # a template asks whether there are tools at all: None is what it knows as "no"
        return str(tokenizer.apply_chat_template(chat, tools=tools or None, tokenize=False, add_generation_prompt=True))
    except (TemplateError, *_ODD_INPUT) as e:
        raise InputError(f"the base's chat template refuses these messages: {e}") from e


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool) -> list[int]:
    return list(tokenizer(checked_text(text, "the text"), add_special_tokens=add_special_tokens)["input_ids"])
