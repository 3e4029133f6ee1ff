"""A smolagents agent for one job, answering by the base and with an adapter made for the job.

The adapter is made from unlabeled prompts of the job, each put as the agent will put it to its model. The job needs no
tool, and its answers are a word or two: plain text counts as the agent's final answer.
Needs smolagents (`pip install "dnd-sdk[smolagents]"`).
Run `python examples/smolagents_agent.py`, or add `--prompts 40 --questions 2`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from smolagents import LogLevel, ToolCallingAgent
from smolagents.agents import EMPTY_PROMPT_TEMPLATES

from dnd_sdk import DnD
from dnd_sdk.integrations.smolagents import DnDModel

JOB = Path(__file__).parent / "support_tickets"
ANSWER_TOKENS = 16


def read_rows(path: Path) -> list[dict[str, str]]:
    """The objects of a JSONL file."""
    with path.open(encoding="utf-8") as lines:  # only "\n" ends a line here, unlike str.splitlines
        return [json.loads(line) for line in lines]


def as_asked(prompt: str) -> str:
    """A task as smolagents puts it to its model."""
    return f"New task:\n{prompt}"


def agent(model: DnDModel) -> ToolCallingAgent:
    """An agent that answers in one step; smolagents' own long prompts would be most of what the base reads."""
    return ToolCallingAgent(
        tools=[], model=model, prompt_templates=EMPTY_PROMPT_TEMPLATES, max_steps=1, verbosity_level=LogLevel.OFF
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Adapt, then print the reference and both agents' answers."""
    parser = argparse.ArgumentParser(description="A smolagents agent, base against adapted.")
    parser.add_argument("--prompts", type=int, default=60, help="unlabeled prompts to adapt to")
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--home", help="folder for weights and adapters (default: DND_HOME or the user data folder)")
    args = parser.parse_args(argv)
    prompts = [as_asked(row["prompt"]) for row in read_rows(JOB / "prompts.jsonl")[: args.prompts]]

    with DnD.load(home=args.home) as dnd:
        result = dnd.adapt(prompts)
        print(f"{result.decision}: {result.adapter.name if result.adapter else 'the base'}")
        models = [DnDModel(dnd, a, text_is_final=True, max_new_tokens=ANSWER_TOKENS) for a in (None, result.adapter)]
        base, adapted = (agent(model) for model in models)
        for row in read_rows(JOB / "questions.jsonl")[: args.questions]:
            print(f"\n{row['prompt'].splitlines()[-1]}\n  reference: {row['response']!r}")
            print(f"  base:      {str(base.run(row['prompt']))!r}")
            print(f"  adapted:   {str(adapted.run(row['prompt']))!r}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
