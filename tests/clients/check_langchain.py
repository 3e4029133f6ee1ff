"""LangChain's `ChatOpenAI`: answers, streams, structured answers, tools, embeddings; agents made by LangGraph."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from common import ENCODER, KEY, MODEL, QUESTION, SAYS, TEXTS, URL, WIDTH, run_example, says
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from pydantic import BaseModel


class Ticket(BaseModel):
    """A structured answer."""

    queue: Literal["billing", "login", "shipping"]
    urgent: bool


@tool
def weather(city: str) -> str:
    """Say what the weather is in a city."""
    return f"sunny in {city}"


def chat(**more: Any) -> ChatOpenAI:
    return ChatOpenAI(model=MODEL, base_url=URL, api_key=KEY, **more)


def check_graph(llm: ChatOpenAI) -> None:
    """A graph written out: the model calls a tool, reads its result and answers."""
    bound = llm.bind_tools([weather])
    graph = StateGraph(MessagesState)
    graph.add_node("model", lambda state: {"messages": [bound.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode([weather]))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition)
    graph.add_edge("tools", "model")
    done = graph.compile().invoke({"messages": [("user", QUESTION)]})["messages"]
    assert [m.type for m in done] == ["human", "ai", "tool", "ai"] and done[-1].content == TEXTS["told"], done
    assert done[2].content == "sunny in Paris", done


async def check_async(llm: ChatOpenAI) -> None:
    assert (await llm.ainvoke(QUESTION)).content == SAYS
    assert "".join([part.content async for part in llm.astream(QUESTION)]) == SAYS
    agent = create_agent(llm, [weather])
    parts = [m async for m, _ in agent.astream({"messages": [("user", QUESTION)]}, stream_mode="messages")]
    assert "".join(m.content for m in parts if m.type.startswith("AIMessage")) == TEXTS["told"], parts


if __name__ == "__main__":
    llm = chat()
    answer = llm.invoke(QUESTION)
    assert answer.content == SAYS, answer
    parts = list(chat(stream_usage=True).stream(QUESTION))
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    assert whole.content == SAYS and whole.usage_metadata == answer.usage_metadata, (whole, answer)
    assert isinstance(llm.with_structured_output(Ticket, method="json_schema").invoke(QUESTION), Ticket)
    assert OpenAI(model=MODEL, base_url=URL, api_key=KEY).invoke("The weather") == SAYS
    vectors = OpenAIEmbeddings(model=ENCODER, base_url=URL, api_key=KEY, check_embedding_ctx_length=False)
    assert [len(v) for v in vectors.embed_documents(["one", "two"])] == [WIDTH] * 2
    check_graph(llm)
    asyncio.run(check_async(llm))
    says(run_example("langchain/agent.py"), f"answer: {SAYS}", f"stream: {SAYS}", "tool: sunny in Paris", TEXTS["told"])
