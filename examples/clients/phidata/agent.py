"""A phidata agent on a running `dnd serve`: an answer and a stream."""

import os

from phi.agent import Agent
from phi.model.openai.like import OpenAILike

model = OpenAILike(
    id="dnd:auto",
    base_url=os.environ.get("DND_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("DND_API_KEY", "none"),
)
agent = Agent(model=model, telemetry=False, monitoring=False)
print("answer:", agent.run("My card was charged twice.").content)

print("stream: ", end="")
for part in agent.run("My card was charged twice.", stream=True):
    print(part.content, end="", flush=True)
print()
