"""An agno agent with a tool, on a running `dnd serve`."""

import os

from agno.agent import Agent
from agno.models.openai.like import OpenAILike


def weather(city: str) -> str:
    """Say what the weather is in a city."""
    return f"sunny in {city}"


model = OpenAILike(
    id="dnd:auto",
    base_url=os.environ.get("DND_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("DND_API_KEY", "none"),
)
agent = Agent(model=model, tools=[weather], telemetry=False)
print(agent.run("What is the weather in Paris?").content)
