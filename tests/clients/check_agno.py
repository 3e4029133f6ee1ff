"""agno agents: answers, streams, both ways, structured answers, tools; its OpenAI-like and vLLM models."""

from __future__ import annotations

import asyncio
from typing import Literal

from agno.agent import Agent
from agno.models.openai.like import OpenAILike
from agno.models.vllm import VLLM
from common import KEY, MODEL, QUESTION, SAYS, TEXTS, URL, run_example, says
from pydantic import BaseModel


class Ticket(BaseModel):
    """A structured answer."""

    queue: Literal["billing", "login", "shipping"]
    urgent: bool


def weather(city: str) -> str:
    """Say what the weather is in a city."""
    return f"sunny in {city}"


async def check_async(agent: Agent) -> None:
    assert (await agent.arun(QUESTION)).content == SAYS
    assert "".join([part.content or "" async for part in agent.arun(QUESTION, stream=True)]) == SAYS


if __name__ == "__main__":
    like = OpenAILike(id=MODEL, base_url=URL, api_key=KEY)
    for model in (like, VLLM(id=MODEL, base_url=URL, api_key=KEY)):
        agent = Agent(model=model, telemetry=False)
        answer = agent.run(QUESTION)
        assert answer.content == SAYS and answer.metrics.total_tokens > 0, answer
        assert "".join(part.content or "" for part in agent.run(QUESTION, stream=True)) == SAYS
        told = Agent(model=model, tools=[weather], telemetry=False).run(QUESTION)
        assert told.content == TEXTS["told"] and told.tools[0].result == "sunny in Paris", told
    like.supports_native_structured_outputs = True
    made = Agent(model=like, output_schema=Ticket, telemetry=False).run(QUESTION).content
    assert isinstance(made, Ticket), made
    asyncio.run(check_async(Agent(model=OpenAILike(id=MODEL, base_url=URL, api_key=KEY), telemetry=False)))
    says(run_example("agno/agent.py"), TEXTS["told"])
