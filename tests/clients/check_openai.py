"""The openai client, synchronous and not: chats, streams, structured answers, tools, embeddings, errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import openai
from common import BASE, ENCODER, KEY, MESSAGES, MODEL, SAYS, TEXTS, URL, WEATHER, WIDTH, run_example, says
from pydantic import BaseModel


class Ticket(BaseModel):
    """A structured answer."""

    queue: Literal["billing", "login", "shipping"]
    urgent: bool
    tags: list[str]


def check_chat(client: openai.OpenAI) -> None:
    ask = client.chat.completions.create
    for model in (MODEL, BASE, "dnd:base", "dnd:upper", "upper"):
        answer = ask(model=model, messages=MESSAGES)
        choice = answer.choices[0]
        assert (choice.message.content, choice.finish_reason, answer.model) == (SAYS, "stop", model), answer
    assert answer.usage is not None and answer.usage.total_tokens > answer.usage.completion_tokens > 0
    short = ask(model=MODEL, messages=MESSAGES, max_completion_tokens=2, n=2, seed=1, temperature=0.7, top_p=0.9)
    assert [c.finish_reason for c in short.choices] == ["length"] * 2, short
    assert SAYS.startswith(short.choices[0].message.content or "?"), short
    assert ask(model=MODEL, messages=MESSAGES, stop=[" in"]).choices[0].message.content == "It is sunny"
    probable = ask(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert probable and "".join(t.token for t in probable.content).startswith(SAYS)
    assert all(len(t.top_logprobs) == 2 and t.logprob <= 0 for t in probable.content)
    raw = client.chat.completions.with_raw_response.create(model="upper", messages=MESSAGES)
    assert raw.headers["x-dnd-adapter"] == "upper" and raw.headers["x-dnd-decision"]


def check_stream(client: openai.OpenAI) -> None:
    ask = client.chat.completions.create
    for options in ({}, {"stream_options": {"include_usage": True}}):
        chunks = list(ask(model=MODEL, messages=MESSAGES, stream=True, **options))
        deltas = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        assert "".join(deltas) == SAYS and sum(map(bool, deltas)) > 2, chunks
        assert sum(c.usage is not None for c in chunks) == 1 and chunks[-1].usage, "usage comes once, last"
    with ask(model=MODEL, messages=MESSAGES, stream=True) as left:
        next(iter(left))
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES) as stream:
        assert stream.get_final_completion().choices[0].message.content == SAYS


def check_structured(client: openai.OpenAI) -> None:
    made = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Ticket)
    assert isinstance(made.choices[0].message.parsed, Ticket), made
    free = client.chat.completions.create(model=MODEL, messages=MESSAGES, response_format={"type": "json_object"})
    assert (free.choices[0].message.content or "").startswith("{"), free


def check_tools(client: openai.OpenAI) -> None:
    ask = client.chat.completions.create
    called = ask(model=MODEL, messages=MESSAGES, tools=[WEATHER])
    message = called.choices[0].message
    assert called.choices[0].finish_reason == "tool_calls" and message.tool_calls, called
    call = message.tool_calls[0]
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Paris"}'), call
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    told = ask(model=MODEL, messages=[*MESSAGES, message, result], tools=[WEATHER])
    assert told.choices[0].message.content == TEXTS["told"], told
    assert ask(model=MODEL, messages=MESSAGES, tools=[WEATHER], tool_choice="none").choices[0].message.content == SAYS
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        made = ask(model=MODEL, messages=MESSAGES, tools=[WEATHER], tool_choice=choice).choices[0].message.tool_calls
        assert made and made[0].function.name == "weather", made
        assert json.loads(made[0].function.arguments).keys() == {"city"}, made
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, tools=[WEATHER]) as stream:
        final = stream.get_final_completion().choices[0].message
    assert final.tool_calls and final.tool_calls[0].function.arguments == '{"city": "Paris"}', final


def check_the_rest(client: openai.OpenAI) -> None:
    ids = [model.id for model in client.models.list()]
    assert {BASE, MODEL, "dnd:upper", ENCODER} <= set(ids), ids
    assert client.models.retrieve("dnd:upper").id == "dnd:upper"
    assert client.completions.create(model=MODEL, prompt="The weather").choices[0].text == SAYS
    assert "".join(c.choices[0].text for c in client.completions.create(model=MODEL, prompt="A", stream=True)) == SAYS
    packed = client.embeddings.create(model=ENCODER, input=["one", "two"])  # in base64 unless told otherwise
    plain = client.embeddings.create(model=ENCODER, input=["one", "two"], encoding_format="float")
    assert [len(d.embedding) for d in packed.data] == [WIDTH] * 2
    for a, b in zip(packed.data, plain.data, strict=True):
        assert max(abs(x - y) for x, y in zip(a.embedding, b.embedding, strict=True)) < 1e-6


def check_errors(client: openai.OpenAI) -> None:
    def fails(kind: type[openai.APIStatusError], by: openai.OpenAI = client, **body: Any) -> openai.APIStatusError:
        try:
            by.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **body})
        except kind as error:
            return error
        raise AssertionError(f"{body} raised no {kind.__name__}")

    unknown = fails(openai.NotFoundError, model="nobody")
    assert (unknown.code, unknown.param, unknown.type) == ("model_not_found", "model", "invalid_request_error"), unknown
    assert fails(openai.BadRequestError, temperature=-1).param == "temperature"
    assert fails(openai.BadRequestError, max_tokens=10**6).code == "context_length_exceeded"
    stranger = openai.OpenAI(base_url=URL, api_key="wrong-key-here", max_retries=0)
    assert fails(openai.AuthenticationError, stranger).code == "invalid_api_key"


async def check_async() -> None:
    async with openai.AsyncOpenAI(base_url=URL, api_key=KEY) as client:
        ask = client.chat.completions.create
        several = await asyncio.gather(*(ask(model=m, messages=MESSAGES) for m in (MODEL, BASE, "upper", "digits")))
        assert [a.choices[0].message.content for a in several] == [SAYS] * 4
        stream = await ask(model=MODEL, messages=MESSAGES, stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in stream if c.choices]) == SAYS
        made = await client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Ticket)
        assert isinstance(made.choices[0].message.parsed, Ticket)


if __name__ == "__main__":
    sync = openai.OpenAI(base_url=URL, api_key=KEY)
    for check in (check_chat, check_stream, check_structured, check_tools, check_the_rest, check_errors):
        check(sync)
    asyncio.run(check_async())
    said = (f"{how}: {SAYS}" for how in ("answer", "stream", "adapted"))
    says(run_example("openai/chat.py"), "dnd:upper", *said, "'adapter': 'dnd-")
