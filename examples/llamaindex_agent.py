"""An agent with a mixed inbox: it is told nothing about its jobs and gets an adapter for each of them on the way.

Prompts of two jobs arrive interleaved; `DnDLLM(observe=True)` sorts them by themselves, and makes an adapter for a job
when it has seen enough of it. Then unseen questions are answered by the base and by the agent.
Run `python examples/llamaindex_agent.py`, or add `--prompts 40 --questions 2`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from llama_index.core.llms import LLM, CompletionResponse

from dnd_sdk.integrations.llamaindex import DnDLLM

HERE = Path(__file__).parent
JOBS = ("support_tickets", "meeting_deadlines")
ANSWER_TOKENS = 12


def read_rows(path: Path) -> list[dict[str, str]]:
    """The objects of a JSONL file."""
    with path.open(encoding="utf-8") as lines:  # only "\n" ends a line here, unlike str.splitlines
        return [json.loads(line) for line in lines]


def adapter_of(answer: CompletionResponse) -> str | None:
    """Who answered; None is the base."""
    return (answer.raw or {})["dnd"]["adapter"]


async def work_off(llm: LLM, inbox: Sequence[str]) -> None:
    """Answer what arrives, and say when another adapter answers for the first time."""
    known = {None}
    for n, prompt in enumerate(inbox, start=1):
        answer = await llm.acomplete(prompt, max_tokens=ANSWER_TOKENS)
        adapter = adapter_of(answer)
        if adapter not in known:
            known.add(adapter)
            print(f"prompt {n:3}: {adapter} answers {' '.join(answer.text.split())!r}")


async def compare(llm: LLM, job: str, n_questions: int) -> None:
    """Answer unseen questions of a job by the base and by the agent, both at once."""
    print(f"\n{job}")
    for row in read_rows(HERE / job / "questions.jsonl")[:n_questions]:
        base, ours = await asyncio.gather(
            llm.acomplete(row["prompt"], max_tokens=ANSWER_TOKENS, adapter=None),
            llm.acomplete(row["prompt"], max_tokens=ANSWER_TOKENS),
        )
        print(f"  {row['prompt'].splitlines()[-1]}\n    reference: {row['response']!r}")
        print(f"    base:      {base.text!r}\n    adapted:   {ours.text!r}  ({adapter_of(ours)})")


async def run(llm: LLM, n_prompts: int, n_questions: int) -> None:
    """The inbox, then the questions."""
    both = [[row["prompt"] for row in read_rows(HERE / job / "prompts.jsonl")[:n_prompts]] for job in JOBS]
    await work_off(llm, [prompt for pair in zip(*both, strict=False) for prompt in pair])
    for job in JOBS:
        await compare(llm, job, n_questions)


def main(argv: Sequence[str] | None = None) -> int:
    """Work off the inbox, then print the reference and both answers."""
    parser = argparse.ArgumentParser(description="A mixed stream of jobs, each adapted to on the fly.")
    parser.add_argument("--prompts", type=int, default=60, help="prompts of each job in the inbox")
    parser.add_argument("--questions", type=int, default=3, help="questions per job")
    parser.add_argument("--home", help="folder for weights and adapters (default: DND_HOME or the user data folder)")
    args = parser.parse_args(argv)
    asyncio.run(run(DnDLLM(home=args.home, observe=True), args.prompts, args.questions))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
