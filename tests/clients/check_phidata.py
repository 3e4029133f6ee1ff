"""phidata agents: answers, streams, tools."""

from __future__ import annotations

from common import KEY, MODEL, QUESTION, SAYS, TEXTS, URL, run_example, says
from phi.agent import Agent
from phi.model.openai.like import OpenAILike


def weather(city: str) -> str:
    """Say what the weather is in a city."""
    return f"sunny in {city}"


def agent(**more: object) -> Agent:
    model = OpenAILike(id=MODEL, base_url=URL, api_key=KEY)
    return Agent(model=model, telemetry=False, monitoring=False, **more)


if __name__ == "__main__":
    answer = agent().run(QUESTION)
    assert answer.content == SAYS and sum(answer.metrics["total_tokens"]) > 0, answer
    assert "".join(part.content or "" for part in agent().run(QUESTION, stream=True)) == SAYS
    assert agent(tools=[weather]).run(QUESTION).content.endswith(TEXTS["told"])
    says(run_example("phidata/agent.py"), f"answer: {SAYS}", f"stream: {SAYS}")
