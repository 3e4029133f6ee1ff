"""Answers held to a schema: what LangChain users call one, as the engine takes it, and back into their objects."""

from __future__ import annotations

import json
from collections.abc import Callable
from operator import itemgetter
from typing import Any

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import BaseCumulativeTransformOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel

from dnd_sdk.chat import checked_schema, closed_schema
from dnd_sdk.session import check_whole

_WRAPPED = frozenset({"function", "parameters", "input_schema", "inputSchema"})
"""Keys of a schema that comes as OpenAI's, Anthropic's or Bedrock's tool."""


def held_schema(schema: Any) -> str:
    """The JSON text of what an answer is held to: a pydantic class (of either version), TypedDict, tool or JSON schema.

    Objects take no other fields than the schema names, unless it says so.
    Raises `ConfigError` for what is no schema.
    """
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return checked_schema(schema)
    plain = isinstance(schema, dict) and not (_WRAPPED & schema.keys() and "properties" not in schema)
    described = schema if plain or isinstance(schema, str) else convert_to_json_schema(schema)
    return checked_schema(closed_schema(json.loads(checked_schema(described))))


def parsed(
    model: Runnable[LanguageModelInput, AIMessage], schema: Any, *, include_raw: bool
) -> Runnable[LanguageModelInput, Any]:
    """The model's answers as objects of `schema`, dicts where it is no pydantic class; or beside the raw message."""
    is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
    parser = _Whole(parser=PydanticOutputParser(pydantic_object=schema) if is_class else JsonOutputParser())
    if not include_raw:
        return model | parser
    read: Callable[[Any], Any] = itemgetter("raw")
    tried = RunnablePassthrough.assign(parsed=read | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=model) | tried.with_fallbacks([failed], exception_key="parsing_error")


class _Whole(BaseCumulativeTransformOutputParser[Any]):
    """`parser`, but for answers that were cut: LangChain's own fill in what is missing, here `InputError` is raised."""

    parser: JsonOutputParser

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """The object so far; None where there is none yet."""
        answer = result[0]
        message = answer.message if isinstance(answer, ChatGeneration) else None
        if isinstance(message, AIMessage):
            n_tokens = message.usage_metadata["output_tokens"] if message.usage_metadata else 0
            check_whole(answer.text, message.response_metadata.get("finish_reason"), n_tokens)
        return self.parser.parse_result(result, partial=partial)

    def parse(self, text: str) -> Any:
        """The object that a text is."""
        return self.parser.parse(text)
