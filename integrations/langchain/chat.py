"""`DnDChat`: a LangChain chat model whose every call can be answered by another adapter of one resident base."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import get_config_list
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import Field

from dnd_sdk.chat import call_schema, choose_tools, tools_not_shown
from dnd_sdk.config import SAMPLING
from dnd_sdk.errors import ConfigError, shown
from dnd_sdk.integrations.langchain.messages import chunk, to_chat, whole_message
from dnd_sdk.integrations.langchain.structured import held_schema, parsed
from dnd_sdk.models import DEFAULT_BASE
from dnd_sdk.session import (
    MAX_THREADS,
    Call,
    CompletionStream,
    DnD,
    Lazy,
    ModelFields,
    as_config_error,
    call_options,
    check_known,
    model_settings,
    renamed,
    who_answers,
)

_REMOTE = frozenset({"api_key", "base_url", "max_retries", "timeout"})
"""What LangChain's models of remote services take: accepted, so that this can take their place, and not used."""
_JSON_MODE = {"type": "object"}


class DnDChat(BaseChatModel, ModelFields):
    """One resident base LLM with its adapters; safe to share between threads and tasks.

    Every call takes `adapter`, `max_tokens` (or `max_new_tokens`), `temperature`, `top_p`, `top_k`, `min_p`,
    `repetition_penalty`, `stop`, `seed`, which win over the fields here, and `schema`, `logprobs`, `tools`,
    `tool_choice`, `parallel_tool_calls`; other options raise `ConfigError`. Messages go through the base's own chat
    template; content that is not text raises `InputError`. `response_metadata` says who answered (`adapter`,
    `decision`) and why it ended (`finish_reason`: `stop`, `length` or `cancelled`). A stream that is closed, and an
    asynchronous call that is cancelled, stops generating within a token. `batch` keeps the engine's running batch full.

    Tools are rendered by the base's chat template; one that renders none raises `ConfigError`. With tools on offer
    `"auto"` is the base. In streams the text of a call is held back, the last chunk has the calls.
    """

    model: str = Field(DEFAULT_BASE, description="Embedded name, folder or Hugging Face id of the base.")
    max_tokens: int = Field(256, description="Upper bound on the tokens of one answer.")
    streaming: bool | None = Field(None, description="True: invoke streams too; False: stream does not.")
    resident: Any = Field(None, exclude=True, repr=False, description="The session; made on first use, see `dnd`.")

    def __init__(self, dnd: DnD | None = None, **settings: Any) -> None:
        """Share a resident `dnd`, or load one from `model`, `generator`, ... on first use.

        With `dnd`, the fields `model`, `encoder` and `home` say what it is, and what is pickled or serialised: its
        generator's folder is not known, so pass that too if it is not the shipped one. `adapter` may also be an
        `Adapter`, `stop` one string. Raises `ConfigError` for options that are unknown or out of range.
        """
        owner = type(self)
        known = (*owner.model_fields, "max_new_tokens", "stop_sequences", *_REMOTE)
        check_known(settings, known, owner.__name__)
        settings = _as_fields({k: v for k, v in settings.items() if k not in _REMOTE})
        if dnd is not None:
            settings |= {"model": dnd.base.name, "encoder": dnd.encoder.name, "home": str(dnd.home.root)}
            settings["resident"] = Lazy(lambda: dnd)
            settings["resident"].get()
        with as_config_error(owner.__name__):
            super().__init__(**settings)
        self.resident = self.resident or Lazy(self._load)

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Its settings are; the session stays where it is."""
        return True

    @property
    def dnd(self) -> DnD:
        """The resident session: adapt, observe, list adapters there. Loads it when it is not here yet."""
        session: DnD = self.resident.get()
        return session

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """The answers in order; as many at a time as fill the engine's batch, unless `max_concurrency` says less."""
        return super().batch(inputs, _wide(config, len(inputs)), return_exceptions=return_exceptions, **kwargs)

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with tools on offer; `kwargs` are options of its calls.

        `tool_choice`: None or "auto", "any" or "required" (the answer is held to be a call), a tool's name (of that
        tool), "none". Raises `ConfigError` for a name that is not on offer, and for a base that renders no tools.
        """
        described = [convert_to_openai_tool(t, strict=strict) for t in tools]
        choose_tools(described, tool_choice)
        if self.resident.is_made and not self.dnd.engine.shows_tools:
            raise tools_not_shown()
        choice = {} if tool_choice is None else {"tool_choice": tool_choice}
        return self.bind(tools=described, **choice, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """The model with answers that fit a pydantic class, TypedDict, tool or JSON schema.

        `json_schema` holds the text to it, `function_calling` makes it the call of a tool, `json_mode` holds the text
        to some JSON object; `strict` is always so. `kwargs` are options of the calls, none for `function_calling`.
        Where `max_tokens` cuts an answer, `InputError` is raised.
        `include_raw`: the message as `raw`, the object as `parsed`, what went wrong as `parsing_error`.
        Raises `ConfigError` for what is no schema.
        """
        if method == "function_calling":
            return super().with_structured_output(schema, include_raw=include_raw, **kwargs)
        if method not in ("json_schema", "json_mode"):
            raise ConfigError(
                f"method must be json_schema, function_calling or json_mode, got {shown(method)}",
                fix="leave it out for json_schema",
            )
        told = {"kwargs": {"method": method, "strict": strict}, "schema": schema}
        held = held_schema(schema if method == "json_schema" else _JSON_MODE)
        return parsed(
            self.bind(schema=held, ls_structured_output_format=told, **kwargs), schema, include_raw=include_raw
        )

    def get_token_ids(self, text: str) -> list[int]:
        """The text in the base's own tokens, for `get_num_tokens` and `trim_messages`."""
        local = self.dnd.engine.local
        if self.custom_get_token_ids is not None or local is None:
            return super().get_token_ids(text)
        return list(local.base.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def _llm_type(self) -> str:
        return "dnd"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": self.model, **self._defaults()}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return super()._get_ls_params(stop=stop or self.stop or None, **kwargs)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        whole = self._call(messages, stop, kwargs).answer()
        return ChatResult(generations=[ChatGeneration(message=whole_message(whole, self.model))])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        whole = await self._call(messages, stop, kwargs).aanswer()
        return ChatResult(generations=[ChatGeneration(message=whole_message(whole, self.model))])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for part in self._call(messages, stop, kwargs).parts():
            yield ChatGenerationChunk(message=chunk(part, self.model))

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async for part in self._call(messages, stop, kwargs).aparts():
            yield ChatGenerationChunk(message=chunk(part, self.model))

    def _call(self, messages: Sequence[BaseMessage], stop: list[str] | None, given: dict[str, Any]) -> Call:
        """The call, its options checked already."""
        options = {**given} if stop is None else {**given, "stop": stop}
        options.pop("stream", None)  # LangChain's own, which it leaves among them
        offer = choose_tools(options.pop("tools", None) or (), options.pop("tool_choice", None))
        parallel = options.pop("parallel_tool_calls", None) is not False
        if offer.must_call:
            if options.get("schema") is not None:
                raise ConfigError("an answer is held to a schema or to be a tool's call, not to both", fix="pass one")
            options["schema"] = call_schema(offer.tools)
        adapter, sampling = call_options(self._defaults(), options, type(self).__name__)
        chat = to_chat(messages)

        def start(end: threading.Event) -> CompletionStream:
            who = who_answers(self.dnd, chat, adapter, offer.tools, observe=self.observe)
            return self.dnd.stream(chat, who, tools=offer.tools or None, cancel=end, **sampling)

        return Call(start, tools=offer.tools, parallel=parallel, held=offer.must_call)

    def _defaults(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in (*SAMPLING, "adapter") if name != "max_new_tokens"}
        return {**fields, "max_new_tokens": self.max_tokens}

    def _load(self) -> DnD:
        return DnD.load(
            self.model, self.generator, encoder=self.encoder, home=self.home, device=self.device, dtype=self.dtype
        )

    def __getstate__(self) -> dict[Any, Any]:
        """What is pickled: the settings, without the session."""
        state = super().__getstate__()
        return {**state, "__dict__": {k: v for k, v in state["__dict__"].items() if k != "resident"}}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """The settings again; the session is loaded on first use."""
        super().__setstate__(state)
        self.resident = Lazy(self._load)


def _as_fields(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings by the names of the fields, those of sampling checked; None of these is the default."""
    if "stop_sequences" in settings:
        settings["stop"] = settings.pop("stop_sequences")
    given = {k: v for k, v in renamed(settings).items() if v is not None or k not in SAMPLING}
    checked = model_settings(given)
    return {"max_tokens" if k == "max_new_tokens" else k: v for k, v in checked.items()}


def _wide(config: RunnableConfig | list[RunnableConfig] | None, n_inputs: int) -> list[RunnableConfig]:
    """The configurations of a batch; LangChain's own default is a few threads, which leave the engine idle."""
    configs = get_config_list(config, n_inputs)
    return [{**c, "max_concurrency": c.get("max_concurrency") or MAX_THREADS} for c in configs]
