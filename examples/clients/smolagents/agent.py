"""smolagents' `OpenAIServerModel` with a running `dnd serve`: an agent that writes code.

In the same process as the base, `dnd_sdk.integrations.smolagents.DnDModel` needs no server.
"""

import os

from smolagents import CodeAgent, OpenAIServerModel

model = OpenAIServerModel(
    model_id="dnd:auto",
    api_base=os.environ.get("DND_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("DND_API_KEY", "none"),
)
agent = CodeAgent(tools=[], model=model, max_steps=3)
print("answer:", agent.run("What is the weather in Paris?"))
