"""`DnDLLM`: a LlamaIndex LLM whose every call can be answered by another adapter of one resident base."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any, TypeVar

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.bridge.pydantic import BaseModel, Field, PrivateAttr
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.prompts import PromptTemplate
from llama_index.core.types import PydanticProgramMode

from dnd_sdk.chat import Tools
from dnd_sdk.config import SAMPLING
from dnd_sdk.errors import ConfigError
from dnd_sdk.integrations.llamaindex.calls import aends_with_its_reader, ends_with_its_reader, reader_leaves
from dnd_sdk.integrations.llamaindex.messages import (
    Chat,
    chat_part,
    chat_response,
    completion_part,
    completion_response,
    to_chat,
    user_message,
)
from dnd_sdk.models import DEFAULT_BASE
from dnd_sdk.session import (
    ALIASES,
    Call,
    CompletionStream,
    DnD,
    Lazy,
    ModelFields,
    as_config_error,
    call_options,
    check_known,
    model_settings,
    who_answers,
)

Model = TypeVar("Model", bound=BaseModel)


class DnDLLM(CustomLLM, ModelFields):
    """One resident base LLM with its adapters; safe to share between threads and tasks.

    Every call takes `adapter`, `max_new_tokens` (or `max_tokens`), `temperature`, `top_p`, `top_k`, `min_p`,
    `repetition_penalty`, `stop` and `seed`, which win over the fields here, and `schema`; other options raise
    `ConfigError`. Chat messages go through the base's own chat template, a prompt being one user message. `raw` holds
    `usage` and `dnd` (adapter and decision), in streams on the last item. A stream that is closed, and an asynchronous
    call that is cancelled, stops generating within a token.

    `structured_predict`, its three siblings and `as_structured_llm` hold the answer to the class's schema, as a call
    with a `schema` is held to that. Where `max_new_tokens` cuts such an answer, the call (a stream at its end) raises
    `InputError`.
    """

    base: str = Field(DEFAULT_BASE, description="Embedded name, folder or Hugging Face id of the base.")
    max_new_tokens: int = Field(256, description="Upper bound on the tokens of one answer.")
    pydantic_program_mode: PydanticProgramMode = Field(
        PydanticProgramMode.LLM, description="llm: structured answers are held to their schema."
    )

    _dnd: Lazy[DnD] = PrivateAttr()

    def __init__(self, dnd: DnD | None = None, **settings: Any) -> None:
        """Share a resident `dnd`, or load one from `base`, `generator`, ... on first use.

        With `dnd`, the fields `base`, `encoder` and `home` say what it is; its generator's folder is not known, so hand
        the `dnd` to `from_dict` as well. `adapter` may also be an `Adapter`, `stop` one string.
        Raises `ConfigError` for options that are unknown, out of range or without effect.
        """
        check_known(settings, (*type(self).model_fields, *ALIASES), type(self).__name__)
        settings = model_settings(settings)
        if settings.get("messages_to_prompt") not in (None, generic_messages_to_prompt):
            raise ConfigError("messages_to_prompt has no effect: the base's own chat template is used")
        if dnd is not None:
            settings |= {"base": dnd.base.name, "encoder": dnd.encoder.name, "home": str(dnd.home.root)}
        with as_config_error(type(self).__name__):
            super().__init__(**settings)
        self._dnd = Lazy(lambda: self._checked(self._load() if dnd is None else dnd))
        if dnd is not None:
            self._dnd.get()

    @classmethod
    def class_name(cls) -> str:
        """The name in serialised settings."""
        return "DnDLLM"

    @property
    def dnd(self) -> DnD:
        """The resident session: adapt, observe, list adapters there. Loads it when it is not here yet."""
        return self._dnd.get()

    @property
    def metadata(self) -> LLMMetadata:
        """Facts of the base, which this loads when it is not here yet."""
        dnd = self.dnd
        return LLMMetadata(
            context_window=dnd.engine.context_tokens,
            num_output=self.max_new_tokens,
            is_chat_model=dnd.engine.has_chat_template,
            is_function_calling_model=False,
            model_name=dnd.base.name,
        )

    def to_payload(self) -> dict[str, Any]:
        """What events say of this LLM; unlike `metadata` it never loads, as events fire in the event loop."""
        known = self.metadata.model_dump() if self._dnd.is_made else {"model_name": self.base}
        return {"class_name": self.class_name(), **known}

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer one user message. `formatted` says that `completion_to_prompt`, if any, was applied already."""
        return completion_response(self._call(self._user(prompt, formatted), kwargs).answer())

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a chat. Raises `InputError` for content that is not text."""
        return chat_response(self._chat_call(messages, kwargs).answer())

    @ends_with_its_reader
    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """`complete` piece by piece; the last item has no delta but `raw`."""
        call = self._call(self._user(prompt, formatted), kwargs)
        return (completion_part(p) for p in call.parts())

    @ends_with_its_reader
    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """`chat` piece by piece; the last item has no delta but `raw`."""
        call = self._chat_call(messages, kwargs)
        return (chat_part(p) for p in call.parts())

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """`complete` in another thread."""
        return completion_response(await self._call(self._user(prompt, formatted), kwargs).aanswer())

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat` in another thread."""
        return chat_response(await self._chat_call(messages, kwargs).aanswer())

    @aends_with_its_reader
    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """`stream_complete` in another thread."""
        call = self._call(self._user(prompt, formatted), kwargs)
        return (completion_part(p) async for p in call.aparts())

    @aends_with_its_reader
    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """`stream_chat` in another thread."""
        call = self._chat_call(messages, kwargs)
        return (chat_part(p) async for p in call.aparts())

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """An answer that is an `output_cls`; `llm_kwargs` are options of the call, `schema=None` holds it to nothing.

        Raises `ConfigError` for a class whose schema cannot be enforced.
        """
        return super().structured_predict(output_cls, prompt, self._held(output_cls, llm_kwargs), **prompt_args)

    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """`structured_predict` in another thread."""
        return await super().astructured_predict(output_cls, prompt, self._held(output_cls, llm_kwargs), **prompt_args)

    def stream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        """`structured_predict` as it comes: objects with what is there so far, at last an `output_cls`."""
        return super().stream_structured_predict(output_cls, prompt, self._held(output_cls, llm_kwargs), **prompt_args)

    async def astream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        """`stream_structured_predict` in another thread."""
        held = self._held(output_cls, llm_kwargs)
        return await super().astream_structured_predict(output_cls, prompt, held, **prompt_args)

    def _held(self, output_cls: type[BaseModel], options: dict[str, Any] | None) -> dict[str, Any]:
        """The options of a structured call; programs of other modes ask in ways of their own, as by a tool."""
        if self.pydantic_program_mode is not PydanticProgramMode.LLM:
            return options or {}
        return {"schema": output_cls, **(options or {})}

    def _load(self) -> DnD:
        return DnD.load(
            self.base, self.generator, encoder=self.encoder, home=self.home, device=self.device, dtype=self.dtype
        )

    def _checked(self, dnd: DnD) -> DnD:
        """The session, if it can do what this class promises; raises `ConfigError`."""
        return dnd

    def _defaults(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*SAMPLING, "adapter")}

    def _user(self, prompt: str, formatted: bool) -> Chat:
        assert self.completion_to_prompt is not None  # LlamaIndex puts the identity there
        return user_message(prompt if formatted else self.completion_to_prompt(prompt))

    def _chat_call(self, messages: Sequence[ChatMessage], given: dict[str, Any]) -> Call:
        return self._call(to_chat(messages), given)

    def _call(self, chat: Chat, given: dict[str, Any], tools: Tools = (), *, parallel: bool = True) -> Call:
        """The call, its options checked already."""
        adapter, sampling = call_options(self._defaults(), given, self.class_name())

        def start(end: threading.Event) -> CompletionStream:
            who = who_answers(self.dnd, chat, adapter, tools, observe=self.observe)
            return self.dnd.stream(chat, who, tools=tools or None, cancel=end, **sampling)

        held = given.get("schema") is not None
        return Call(start, tools=tools, parallel=parallel, held=held, end=reader_leaves())
