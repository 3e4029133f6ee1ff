"""A LangChain agent whose tool is a specialist: both are one resident base, the specialist with an adapter of its own.

The adapter is made from unlabeled prompts of its job. The agent, on the base alone, calls the tool, whose result is its
answer: left to itself a base this small calls again in place of saying what it got. There is no second model in memory,
and no server.
Needs langchain (`pip install "dnd-sdk[langchain]" langchain`).
Run `python examples/langchain_agent.py`, or add `--prompts 40 --questions 2`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from langchain.agents import create_agent
from langchain_core.messages import ToolMessage
from langchain_core.tools import BaseTool, tool

from dnd_sdk import DnD
from dnd_sdk.integrations.langchain import DnDChat

JOB = Path(__file__).parent / "support_tickets"
ANSWER_TOKENS = 12


def read_rows(path: Path) -> list[dict[str, str]]:
    """The objects of a JSONL file."""
    with path.open(encoding="utf-8") as lines:  # only "\n" ends a line here, unlike str.splitlines
        return [json.loads(line) for line in lines]


def specialist(chat: DnDChat, instruction: str) -> BaseTool:
    """The job as a tool: what it is told goes under the instruction that the adapter was made for."""

    @tool(return_direct=True)
    def queue_of(ticket: str) -> str:
        """Find the queue that a support ticket belongs to."""
        return chat.invoke(f"{instruction}\n\n{ticket}").text

    return queue_of


def main(argv: Sequence[str] | None = None) -> int:
    """Adapt, then hand tickets to the agent and print the reference and its answer."""
    parser = argparse.ArgumentParser(description="A LangChain agent with an adapted specialist as its tool.")
    parser.add_argument("--prompts", type=int, default=60, help="unlabeled prompts to adapt to")
    parser.add_argument("--questions", type=int, default=3)
    parser.add_argument("--home", help="folder for weights and adapters (default: DND_HOME or the user data folder)")
    args = parser.parse_args(argv)

    with DnD.load(home=args.home) as dnd:
        result = dnd.adapt([row["prompt"] for row in read_rows(JOB / "prompts.jsonl")[: args.prompts]])
        print(f"{result.decision}: {result.adapter.name if result.adapter else 'the base'}")
        worker = DnDChat(dnd, adapter=result.adapter, max_tokens=ANSWER_TOKENS)
        for row in read_rows(JOB / "questions.jsonl")[: args.questions]:
            instruction, ticket = row["prompt"].split("\n\n", 1)
            agent = create_agent(DnDChat(dnd, adapter=None, max_tokens=100), [specialist(worker, instruction)])
            print(f"\n{ticket}\n  reference: {row['response']!r}")
            asked = f"Which queue does this ticket belong to? Use the tool.\n\n{ticket}"
            answer = agent.invoke({"messages": [("user", asked)]})["messages"][-1]
            print(f"  agent:     {answer.text!r} ({'its specialist' if isinstance(answer, ToolMessage) else 'itself'})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
