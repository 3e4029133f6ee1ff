"""LlamaIndex's `OpenAILike`: chats, completions, streams, both ways, structured answers, function calls and agents."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from common import KEY, MODEL, QUESTION, SAYS, TEXTS, URL, run_example, says
from llama_index.core.agent.workflow import FunctionAgent, ReActAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Ticket(BaseModel):
    """A structured answer."""

    queue: Literal["billing", "login", "shipping"]
    urgent: bool


def weather(city: str) -> str:
    """Say what the weather is in a city."""
    return "sunny"


def like(**more: Any) -> OpenAILike:
    return OpenAILike(model=MODEL, api_base=URL, api_key=KEY, context_window=32_000, **more)


async def check_async(llm: OpenAILike) -> None:
    asked = [ChatMessage(role="user", content=QUESTION)]
    assert (await llm.achat(asked)).message.content == SAYS
    assert "".join([part.delta or "" async for part in await llm.astream_chat(asked)]) == SAYS
    tools = [FunctionTool.from_defaults(weather)]
    agent = FunctionAgent(tools=tools, llm=like(is_chat_model=True, is_function_calling_model=True))
    assert str(await agent.run(QUESTION)) == TEXTS["told"]
    assert str(await ReActAgent(tools=tools, llm=llm).run(QUESTION)) == "It is sunny."


if __name__ == "__main__":
    llm = like(is_chat_model=True)
    asked = [ChatMessage(role="user", content=QUESTION)]
    answer = llm.chat(asked)
    assert answer.message.content == SAYS and answer.raw.usage.total_tokens > 0, answer
    assert "".join(part.delta or "" for part in llm.stream_chat(asked)) == SAYS
    assert llm.complete(QUESTION).text == SAYS
    text = like(is_chat_model=False)  # the default, by /v1/completions
    assert text.complete(QUESTION).text == SAYS
    assert [part.text for part in text.stream_complete(QUESTION)][-1] == SAYS
    strict = like(is_chat_model=True, should_use_structured_outputs=True)
    assert isinstance(strict.structured_predict(Ticket, PromptTemplate("{q}"), q=QUESTION), Ticket)
    asyncio.run(check_async(llm))
    says(run_example("llamaindex/chat.py"), f"chat: {SAYS}", f"stream: {SAYS}", f"completion: {SAYS}")
