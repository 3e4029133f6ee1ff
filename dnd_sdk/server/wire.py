"""Bodies of requests in OpenAI's shapes, and what a stream's events look like.

What is not named here is ignored, since clients send much of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from dnd_sdk.config import MAX_LOGPROBS

MAX_CHOICES = 16
MAX_INPUTS = 2048
MAX_TOOLS = 128
MAX_PROMPTS = 10_000
"""In a list; files may hold more, of which a sample is taken."""


def _plain_number(value: Any) -> Any:
    if isinstance(value, str | bytes | bool):  # else taken for what it looks like: false for 0
        raise ValueError("must be a number")
    return value


_NUMBER = BeforeValidator(_plain_number)
Bias = Annotated[float | None, Field(ge=-2, le=2), _NUMBER]
Flag = Annotated[bool | None, Field(strict=True)]
Seed = Annotated[int | None, Field(ge=-(2**63), lt=2**63), _NUMBER]
Tokens = Annotated[int | None, Field(ge=1, le=2**31), _NUMBER]
Name = Annotated[str, Field(min_length=1, max_length=512)]
Stop = str | Annotated[list[str], Field(max_length=64, fail_fast=True)] | None
_Ids = Annotated[list[int], Field(max_length=65_536, fail_fast=True)]
TokenIds = _Ids | Annotated[list[_Ids], Field(max_length=65_536, fail_fast=True)]
"""Refused, with a better word than that they are no text."""
# Every list of a body has an end and fails with its first fault: a million faults would be collected for a minute


class Adapting(BaseModel):
    """Our own part of a request: prompts of the task, which the answer's adapter is chosen or made for."""

    prompts: Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)] | None = None
    mode: Literal["auto", "reuse", "generate", "base"] = "auto"


class Sampled(BaseModel):
    """What chats and completions have in common."""

    model: Name
    max_tokens: Tokens = None
    temperature: Annotated[float | None, Field(ge=0, le=10), _NUMBER] = None
    top_p: Annotated[float | None, Field(ge=0, le=1), _NUMBER] = None
    top_k: Annotated[int | None, Field(ge=-1, le=2**31), _NUMBER] = None
    min_p: Annotated[float | None, Field(ge=0, le=1), _NUMBER] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=10), _NUMBER] = None
    presence_penalty: Bias = None
    frequency_penalty: Bias = None
    """Both are taken and change nothing: the engine has none."""
    seed: Seed = None
    stop: Stop = None
    n: Annotated[int | None, Field(ge=1, le=MAX_CHOICES), _NUMBER] = None
    stream: Flag = None
    stream_options: StreamOptions | None = None
    dnd: Adapting | None = None


class StreamOptions(BaseModel):
    """Of a stream."""

    include_usage: Flag = None


class Part(BaseModel):
    """Of a message's content."""

    type: str
    text: str | None = None


class Function(BaseModel):
    """Of a call that was made before."""

    name: Name
    arguments: str | dict[str, Any] | None = None


class Call(BaseModel):
    """A call that was made before."""

    id: str | None = None
    type: str = "function"
    function: Function


class Message(BaseModel):
    """One of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(max_length=MAX_INPUTS, fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[Call], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None


class ToolFunction(BaseModel):
    """What a tool is called and takes."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """On offer."""

    type: Literal["function"] = "function"
    function: ToolFunction


class ChosenFunction(BaseModel):
    """By name."""

    name: Name


class ChosenTool(BaseModel):
    """The one tool that is to be called."""

    type: Literal["function"] = "function"
    function: ChosenFunction


class JsonSchema(BaseModel):
    """That an answer is held to."""

    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class ResponseFormat(BaseModel):
    """What an answer looks like."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    max_completion_tokens: Tokens = None
    logprobs: Flag = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS), _NUMBER] = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required", "any"] | ChosenTool | ChosenFunction | None = None
    parallel_tool_calls: Flag = None
    response_format: ResponseFormat | None = None


class CompletionRequest(Sampled):
    """`POST /v1/completions`."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)] | TokenIds
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS), _NUMBER] = None
    echo: Flag = None


class EmbeddingRequest(BaseModel):
    """`POST /v1/embeddings`."""

    model: Name
    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)] | TokenIds
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int | None, Field(ge=1), _NUMBER] = None


def event(data: Mapping[str, Any] | str, name: str | None = None) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {text}\n\n".encode("utf-8", "replace")
