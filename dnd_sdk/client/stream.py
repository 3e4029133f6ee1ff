"""A chat as a server is asked it, and its answer piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dnd_sdk.client.answers import Answer, read_usage
from dnd_sdk.client.call import Call, cut_off
from dnd_sdk.config import MODEL_PREFIX, SamplingOptions
from dnd_sdk.errors import ConfigError

if TYPE_CHECKING:
    from dnd_sdk.chat import Prompt
    from dnd_sdk.prompts import Role


class AnswerStream:
    """Iterator over pieces of text, as `session.CompletionStream`; also a context manager that hangs up."""

    def __init__(self, call: Call) -> None:
        self._call, self._pieces = call, self._read()
        self._said = ""
        self._last: dict[str, Any] = {}
        """What the last chunks say: `finish_reason`, `usage`, `dnd`."""

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def result(self) -> Answer:
        """The whole answer; reads the rest of it first."""
        for _ in self._pieces:
            pass
        route = self._last.get("dnd") or {}
        return Answer(
            self._said,
            read_usage(self._last.get("usage")),
            route.get("adapter"),
            str(route.get("decision")),
            str(self._last.get("finish_reason")),
        )

    def close(self) -> None:
        """Hang up and forget the rest; harmless at the end."""
        self._call.close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> Iterator[str]:
        for _, chunk in self._call.events():
            if chunk is None:
                return
            choices = [*(chunk.get("choices") or ()), {}]
            self._last |= {name: told for name in ("usage", "dnd") if (told := chunk.get(name))}
            if reason := choices[0].get("finish_reason"):
                self._last["finish_reason"] = reason
            if text := (choices[0].get("delta") or {}).get("content"):
                self._said += text
                yield text
        raise cut_off(self._call.url)


def chat_body(prompt: Prompt, adapter: str | None, role: Role | None, options: SamplingOptions) -> dict[str, Any]:
    """What `/v1/chat/completions` is asked; raises `ConfigError` for log-probabilities, which are not read here."""
    if options.logprobs is not None:
        raise ConfigError("logprobs are not read from a server", fix="leave logprobs out")
    if role is not None:
        from dnd_sdk.chat import with_role

        prompt = with_role(prompt, role, None)
    body: dict[str, Any] = {
        "model": f"{MODEL_PREFIX}{adapter or 'base'}",
        "messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt),
        "stream": True,
        "max_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "min_p": options.min_p,
        "repetition_penalty": options.repetition_penalty,
        "seed": options.seed,
        "stop": list(options.stop),
    }
    if options.schema is not None:
        held = {"name": "answer", "schema": json.loads(options.schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": held}
    return body
