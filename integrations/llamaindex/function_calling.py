"""`DnDFunctionCallingLLM`: a `DnDLLM` that offers tools to the base and reads its calls, for LlamaIndex's agents."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, LLMMetadata, MessageRole, ToolCallBlock
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools import BaseTool

from dnd_sdk.chat import Tools, plain_so_far, read_answer, tools_not_shown
from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.integrations.llamaindex.calls import Call, Part
from dnd_sdk.integrations.llamaindex.llm import DnDLLM
from dnd_sdk.integrations.llamaindex.messages import to_tool_chat
from dnd_sdk.session import CompletionStream, DnD

_ANY_TOOL = (None, "auto", "any", "required")


class DnDFunctionCallingLLM(DnDLLM, FunctionCallingLLM):
    """`DnDLLM` for `FunctionAgent` and `predict_and_call`; a `schema` and tools exclude each other.

    Tools, calls and results are rendered by the base's own chat template; calls are read from the answer as
    `tool_calls` says. A base whose template does not render tools raises `ConfigError`: at once when it is resident,
    else when it is loaded. With tools on offer `"auto"` is the base, and nothing is observed: adapters call tools that
    nobody needs. `chat` and its three siblings also take `tools` (JSON schemas) and `parallel_tool_calls`
    (False: only the first call counts). Nothing forces a model to call a tool, so `tool_required` and `tool_choice` of
    "required" only offer them; a tool's name as `tool_choice` offers that one alone, "none" offers none.
    In streams the text of a call is held back; the last item has the calls.
    """

    @classmethod
    def class_name(cls) -> str:
        """The name in serialised settings."""
        return "DnDFunctionCallingLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """Facts of the base, which this loads when it is not here yet."""
        return super().metadata.model_copy(  # type: ignore[safe-super] # DnDLLM's, which mypy cannot see here
            update={"is_function_calling_model": True}
        )

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The calls of an answer; without any an empty list, or `InputError` (a `ValueError`) if that is an error."""
        blocks = [b for b in response.message.blocks if isinstance(b, ToolCallBlock)]
        if error_on_no_tool_call and not blocks:
            raise InputError(
                f"expected at least one tool call, the answer is {(response.message.content or '')[:80]!r}",
                fix="ask again, or pass error_on_no_tool_call=False to take the text",
            )
        return [
            ToolSelection(tool_id=b.tool_call_id or "", tool_name=b.tool_name, tool_kwargs=b.tool_kwargs)
            for b in blocks
        ]

    def _checked(self, dnd: DnD) -> DnD:
        if not dnd.engine.shows_tools:
            raise tools_not_shown()
        return dnd

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = list(chat_history or [])
        if user_msg is not None:
            said = (
                user_msg if isinstance(user_msg, ChatMessage) else ChatMessage(role=MessageRole.USER, content=user_msg)
            )
            messages.append(said)
        # the limit on a description's length is OpenAI's own
        schemas = [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools]
        offered = _chosen(schemas, kwargs.pop("tool_choice", None))
        return {"messages": messages, "tools": offered, "parallel_tool_calls": allow_parallel_tool_calls, **kwargs}

    def _chat_call(self, messages: Sequence[ChatMessage], given: dict[str, Any]) -> Call:
        options = dict(given)
        tools, parallel = options.pop("tools", None) or (), options.pop("parallel_tool_calls", True)
        chat = to_tool_chat(messages)
        if not tools:
            return self._call(chat, options)
        return _ToolCall(self._start(chat, options, tools=tools), tools, parallel)


class _ToolCall(Call):
    """A request with tools on offer: the calls leave the text and go beside it."""

    def __init__(self, start: Callable[[threading.Event], CompletionStream], tools: Tools, parallel: bool) -> None:
        super().__init__(start)
        self._tools, self._parallel = tools, parallel

    def answer(self) -> Part:
        """The whole answer."""
        return self._read(super().answer())

    def parts(self) -> Iterator[Part]:
        """What is plain text for sure as it comes, then the rest of the text, then once more whole with the calls."""
        shown = ""
        for part in super().parts():
            whole = None if part.completion is None else self._read(part)
            text = plain_so_far(part.text) if whole is None else whole.text
            if len(text) > len(shown):
                yield Part(text, text[len(shown) :])
                shown = text
            if whole is not None:
                yield whole

    def _read(self, part: Part) -> Part:
        text, calls = read_answer(part.text, self._tools)
        return part._replace(text=text, calls=calls if self._parallel else calls[:1])


def _names(tools: Sequence[dict[str, Any]]) -> list[str]:
    return [tool["function"]["name"] for tool in tools]


def _chosen(tools: list[dict[str, Any]], choice: Any) -> list[dict[str, Any]]:
    """The tools to offer under LlamaIndex's or OpenAI's `tool_choice`; raises `ConfigError` for one that is unknown."""
    name = choice.get("function", {}).get("name") if isinstance(choice, dict) else choice
    if name in _ANY_TOOL or name == "none":
        return [] if name == "none" else tools
    if name not in _names(tools):
        raise ConfigError(
            f"tool_choice {choice!r} is no tool on offer",
            fix=f"use one of {', '.join(['auto', 'none', 'required', *_names(tools)])}",
        )
    return [t for t in tools if t["function"]["name"] == name]
