"""litellm: answers, streams, both ways, structured answers, tools, embeddings and its mapping of errors."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import litellm
from common import ENCODER, KEY, MESSAGES, SAYS, TEXTS, URL, WEATHER, WIDTH, run_example, says
from pydantic import BaseModel

SERVER: dict[str, Any] = {"api_base": URL, "api_key": KEY}


class Ticket(BaseModel):
    """A structured answer."""

    queue: Literal["billing", "login", "shipping"]
    urgent: bool


async def check_async() -> None:
    answer = await litellm.acompletion(model="openai/dnd:auto", messages=MESSAGES, **SERVER)
    assert answer.choices[0].message.content == SAYS
    stream = await litellm.acompletion(model="openai/dnd:auto", messages=MESSAGES, stream=True, **SERVER)
    assert "".join([c.choices[0].delta.content or "" async for c in stream if c.choices]) == SAYS


if __name__ == "__main__":
    for model in ("openai/dnd:auto", "hosted_vllm/dnd:auto", "openai/dnd:upper"):
        answer = litellm.completion(model=model, messages=MESSAGES, temperature=0.2, **SERVER)
        assert answer.choices[0].message.content == SAYS and answer.usage.total_tokens > 0, answer
        stream = litellm.completion(
            model=model, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **SERVER
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == SAYS, chunks
        assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens, chunks[-1]
    made = litellm.completion(model="openai/dnd:auto", messages=MESSAGES, response_format=Ticket, **SERVER)
    Ticket.model_validate_json(made.choices[0].message.content)
    called = litellm.completion(model="openai/dnd:auto", messages=MESSAGES, tools=[WEATHER], **SERVER)
    message = called.choices[0].message
    assert message.tool_calls[0].function.arguments == '{"city": "Paris"}', called
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    told = litellm.completion(model="openai/dnd:auto", messages=[*MESSAGES, message, result], tools=[WEATHER], **SERVER)
    assert told.choices[0].message.content == TEXTS["told"], told
    vectors = litellm.embedding(model=f"openai/{ENCODER}", input=["one", "two"], **SERVER)
    assert [len(row["embedding"]) for row in vectors.data] == [WIDTH] * 2
    text = litellm.text_completion(model="text-completion-openai/dnd:auto", prompt="The weather", **SERVER)
    assert text.choices[0].text == SAYS, text
    for kind, model, key in (
        (litellm.NotFoundError, "openai/nobody", KEY),
        (litellm.AuthenticationError, "openai/dnd:auto", "wrong-key-here"),
    ):
        try:
            litellm.completion(model=model, messages=MESSAGES, api_base=URL, api_key=key)
        except kind:
            continue
        raise AssertionError(f"{model} raised no {kind.__name__}")
    asyncio.run(check_async())
    says(run_example("litellm/chat.py"), f"answer: {SAYS}", f"stream: {SAYS}", f"embedding: {WIDTH}")
