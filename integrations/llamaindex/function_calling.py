"""`DnDFunctionCallingLLM`: a `DnDLLM` that offers tools to the base and reads its calls, for LlamaIndex's agents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, LLMMetadata, MessageRole, ToolCallBlock
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools import BaseTool

from dnd_sdk.chat import choose_tools, tools_not_shown
from dnd_sdk.errors import InputError
from dnd_sdk.integrations.llamaindex.llm import DnDLLM
from dnd_sdk.integrations.llamaindex.messages import to_tool_chat
from dnd_sdk.session import Call, DnD


class DnDFunctionCallingLLM(DnDLLM, FunctionCallingLLM):
    """`DnDLLM` for `FunctionAgent` and `predict_and_call`.

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
        offered = choose_tools(schemas, kwargs.pop("tool_choice", None)).tools
        return {"messages": messages, "tools": offered, "parallel_tool_calls": allow_parallel_tool_calls, **kwargs}

    def _chat_call(self, messages: Sequence[ChatMessage], given: dict[str, Any]) -> Call:
        options = dict(given)
        tools, parallel = options.pop("tools", None) or (), options.pop("parallel_tool_calls", True)
        return self._call(to_tool_chat(messages), options, tools, parallel=parallel)
