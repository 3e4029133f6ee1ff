"""LangChain's `ChatOpenAI` with a running `dnd serve`: an answer, a stream, and an agent (a LangGraph) with a tool."""

import os

from langchain.agents import create_agent
from langchain_openai import ChatOpenAI

llm = ChatOpenAI(
    model="dnd:auto",
    base_url=os.environ.get("DND_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("DND_API_KEY", "none"),
)


def weather(city: str) -> str:
    """Say what the weather is in a city."""
    return f"sunny in {city}"


print("answer:", llm.invoke("My card was charged twice.").content)

print("stream: ", end="")
for part in llm.stream("My card was charged twice."):
    print(part.content, end="", flush=True)
print()

agent = create_agent(llm, [weather])
done = agent.invoke({"messages": [{"role": "user", "content": "What is the weather in Paris?"}]})
for message in done["messages"]:
    print(f"{message.type}:", message.content or message.tool_calls)
