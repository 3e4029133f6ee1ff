"""Agents call tools on the embedded base: the base by itself, with an adapter at hand, and under one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.tools import FunctionTool
from smolagents import LogLevel, ToolCallingAgent, tool
from smolagents.agents import EMPTY_PROMPT_TEMPLATES, FinalAnswerPromptTemplate
from test_examples import EXAMPLES

from dnd_sdk.config import Home
from dnd_sdk.integrations.llamaindex import DnDFunctionCallingLLM
from dnd_sdk.integrations.smolagents import DnDModel
from dnd_sdk.models import DEFAULT_BASE, DEFAULT_ENCODER, pull
from dnd_sdk.session import DnD

pytestmark = pytest.mark.real
ADAPTER = "tickets"
JOB = "Route this support ticket to one queue: billing, login, shipping. Answer with the queue alone.\n\nTicket: "
WHO = pytest.mark.parametrize("adapter", [None, "auto", ADAPTER])
TEMPLATES = {
    **EMPTY_PROMPT_TEMPLATES,
    "final_answer": FinalAnswerPromptTemplate(pre_messages="", post_messages="Answer in one sentence: {{task}}"),
}
"""smolagents' own are some thousand tokens to read."""


@pytest.fixture(scope="module")
def dnd(real_home: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DnD]:
    """The embedded base with one adapter of a job."""
    for name in (DEFAULT_BASE, DEFAULT_ENCODER):
        pull(name, real_home)
    home = Home(tmp_path_factory.mktemp("agents"))
    home.models.symlink_to(real_home.models, target_is_directory=True)
    with (EXAMPLES / "support_tickets" / "prompts.jsonl").open(encoding="utf-8") as lines:
        prompts = [json.loads(line)["prompt"] for line in lines]
    with DnD.load(home=home, device="cpu") as session:
        session.adapt(prompts, "generate", ADAPTER, calibrate=False)
        yield session


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def test_a_job_reaches_its_adapter_by_auto_unless_tools_are_on_offer(dnd: DnD) -> None:
    schema = FunctionTool.from_defaults(add).metadata.to_openai_tool()
    ticket = JOB + "I was charged twice for my October subscription."
    assert dnd.complete(ticket, "auto", max_new_tokens=1).adapter == ADAPTER
    assert dnd.complete(ticket, "auto", tools=[schema], max_new_tokens=1).adapter is None


@WHO
def test_a_function_agent_calls_its_tool_and_answers_with_what_it_returned(dnd: DnD, adapter: str | None) -> None:
    used: list[tuple[int, int]] = []

    def add(a: int, b: int) -> int:
        """Add two numbers."""
        used.append((a, b))
        return a + b

    llm = DnDFunctionCallingLLM(dnd, adapter=adapter, max_new_tokens=48)
    agent = FunctionAgent(tools=[FunctionTool.from_defaults(add, return_direct=True)], llm=llm)

    async def run() -> str:
        return str(await agent.run("What is 17 plus 25?"))

    assert asyncio.run(run()) == "42" and used == [(17, 25)]


def test_a_function_agent_says_what_needs_no_tool(dnd: DnD) -> None:
    llm = DnDFunctionCallingLLM(dnd, max_new_tokens=32)

    async def run() -> str:
        agent = FunctionAgent(tools=[FunctionTool.from_defaults(add)], llm=llm)
        return str(await agent.run("Thank you, that was all."))

    said = asyncio.run(run())
    assert "welcome" in said and "{" not in said, said


@WHO
def test_a_tool_calling_agent_calls_its_tool(dnd: DnD, adapter: str | None) -> None:
    used: list[str] = []

    @tool
    def get_order_status(order_id: str) -> str:
        """Look up where an order is.

        Args:
            order_id: Its number.
        """
        used.append(order_id)
        return "It arrives on Thursday."

    model = DnDModel(dnd, adapter, max_new_tokens=48)
    agent = ToolCallingAgent(
        [get_order_status], model, prompt_templates=TEMPLATES, max_steps=1, verbosity_level=LogLevel.OFF
    )
    said = str(agent.run("Where is my order A-1042?"))
    assert used == ["A-1042"], agent.memory.get_full_steps()
    if adapter != ADAPTER:  # under an adapter the last word is in the form of its job
        assert "Thursday" in said and "{" not in said, said
