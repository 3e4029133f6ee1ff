"""smolagents' `OpenAIServerModel`: messages, streams, an agent that writes code and one that calls tools."""

from __future__ import annotations

from common import KEY, MODEL, QUESTION, SAYS, URL, run_example, says
from smolagents import CodeAgent, LogLevel, OpenAIServerModel, ToolCallingAgent, tool
from smolagents.models import ChatMessage, MessageRole


@tool
def weather(city: str) -> str:
    """Say what the weather is in a city.

    Args:
        city: Its name.
    """
    return "sunny"


if __name__ == "__main__":
    model = OpenAIServerModel(model_id=MODEL, api_base=URL, api_key=KEY)
    asked = [ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": QUESTION}])]
    answer = model.generate(asked)
    assert answer.content == SAYS and answer.token_usage.output_tokens > 0, answer
    deltas = list(model.generate_stream(asked))
    assert "".join(d.content or "" for d in deltas) == SAYS and sum(d.token_usage is not None for d in deltas) == 1
    for stream in (False, True):
        quiet = {"verbosity_level": LogLevel.OFF, "max_steps": 3, "stream_outputs": stream}
        # the second insists on a call, so that the base is held to a schema, where it says as little as it can
        for agent, wanted in ((CodeAgent, "It is sunny."), (ToolCallingAgent, "")):
            got = agent(tools=[weather], model=model, **quiet).run(QUESTION)
            assert got == wanted, (agent, stream, got)
    says(run_example("smolagents/agent.py"), "answer: It is sunny.")
