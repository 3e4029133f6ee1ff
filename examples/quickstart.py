"""The library in a few lines: adapt to unlabeled prompts, then answer questions of the same job.

Run `python examples/quickstart.py`, or add `--task meeting_deadlines --questions 10`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from dnd_sdk import DnD, Home

HERE = Path(__file__).parent
TASKS = ("support_tickets", "meeting_deadlines")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The objects of a JSONL file."""
    with path.open(encoding="utf-8") as lines:  # only "\n" ends a line here, unlike str.splitlines
        return [json.loads(line) for line in lines]


def main(argv: Sequence[str] | None = None) -> int:
    """Adapt, then print reference, base and adapted answers."""
    parser = argparse.ArgumentParser(description="Adapt to the prompts of an example task and answer its questions.")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0])
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--home", help="folder for weights and adapters (default: DND_HOME or the user data folder)")
    args = parser.parse_args(argv)
    prompts = [row["prompt"] for row in read_rows(HERE / args.task / "prompts.jsonl")]

    with DnD.load(home=Home.find(args.home)) as dnd:
        result = dnd.adapt(prompts)
        name = result.adapter.name if result.adapter else "the base model"
        print(f"{result.decision}: {name} for {result.n_prompts} prompts")
        print("  ".join(f"{step} {1000 * s:.1f} ms" for step, s in result.timings_s.items()))
        for row in read_rows(HERE / args.task / "questions.jsonl")[: args.questions]:
            started = time.perf_counter()
            base = dnd.complete(row["prompt"], adapter=None, max_new_tokens=16)
            adapted = dnd.complete(row["prompt"], adapter=result.adapter, max_new_tokens=16)
            print(f"\n{row['prompt'].splitlines()[-1]}")
            print(f"  base:      {base.text!r}\n  adapted:   {adapted.text!r}\n  reference: {row['response']!r}")
            print(f"  both answers in {time.perf_counter() - started:.2f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
