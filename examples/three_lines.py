"""A LlamaIndex script, and the three lines (marked +) that let it answer with an adapter made for its job.

Without them it would use whatever LLM the settings name; nothing else in it changes.
Run `python examples/three_lines.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

from llama_index.core import Settings

from dnd_sdk.integrations.llamaindex import DnDLLM  # +

JOB = Path(__file__).parent / "support_tickets"


def read_prompts(file: str) -> list[str]:
    """The prompts of a JSONL file of the job."""
    with (JOB / file).open(encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line in lines]


def main(n_questions: int = 5) -> None:
    """Answer the first questions of the job."""
    Settings.llm = llm = DnDLLM(max_new_tokens=16)  # +
    llm.dnd.adapt(read_prompts("prompts.jsonl"))  # +
    for question in read_prompts("questions.jsonl")[:n_questions]:
        answer = Settings.llm.complete(question)
        print(f"{question.splitlines()[-1]}\n  {answer.text!r}  {answer.raw['dnd']}")


if __name__ == "__main__":
    main()
