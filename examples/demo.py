"""What `make demo` runs: the whole path on the default weights, first by the `dnd` command, then by the library.

1. Fetch the default weights (nothing to do when they are there).
2. `dnd adapt` on unlabeled prompts of a job the generator was not trained on: it must decide to generate.
3. The same adaptation again, by the library in another process: it must reuse.
4. Questions kept apart from those prompts, answered by the base and with the adapter beside the reference.
5. A second job in the same process, where the models are loaded already.

The demo has a home of its own and removes its adapters first, so every run shows the same decisions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIRST, SECOND = "support_tickets", "meeting_deadlines"
DND = Path(sys.executable).with_name("dnd")
ANSWER_TOKENS = 16
SHOWN = 6
"""Answers that are printed side by side; all are counted."""


class DemoError(Exception):
    """A step did not do what the demo promises."""


def read_rows(path: Path) -> list[dict[str, str]]:
    """The objects of a JSONL file."""
    with path.open(encoding="utf-8") as lines:  # only "\n" ends a line here, unlike str.splitlines
        return [json.loads(line) for line in lines]


def files(task: str) -> tuple[Path, Path]:
    """The prompts and the questions of an example task."""
    folder = ROOT / "examples" / task
    return folder / "prompts.jsonl", folder / "questions.jsonl"


def adapter_name(task: str) -> str:
    """What the demo calls its adapter for a task."""
    return f"demo-{task.replace('_', '-')}"


def heading(text: str) -> None:
    """Start a step."""
    print(f"\n=== {text}", flush=True)


def dnd_command(*arguments: str) -> str:
    """Run one `dnd` command, shown first, and return its stdout; its notes go to this terminal's stderr."""
    print(f"$ dnd {' '.join(arguments)}", flush=True)
    done = subprocess.run([str(DND), *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise DemoError(f"`dnd {arguments[0]}` exited with {done.returncode}: {done.stdout.strip()}")
    return done.stdout


def fetch_weights(home: Any) -> None:
    """Fetch what is missing, by the command."""
    from dnd_sdk.models import DEFAULT_BASE, DEFAULT_ENCODER, is_pulled

    wanted = (DEFAULT_BASE, DEFAULT_ENCODER)
    if all(is_pulled(name, home) for name in wanted):
        print(f"  {', '.join(wanted)}: already in {home.models}")
    else:
        print(dnd_command("models", "pull").rstrip())


def remove_adapters(home: Any) -> None:
    """Forget what an earlier run of the demo made."""
    from dnd_sdk import AdapterStore

    store = AdapterStore(home)
    for stored in store.ls():
        if stored.name in (adapter_name(FIRST), adapter_name(SECOND)):
            store.rm(stored.name)


def show_adaptation(result: dict[str, Any], expected: str, wall_s: float | None = None) -> None:
    """Print one adaptation in the shape of `dnd adapt --json`; raise if the decision is not the expected one."""
    adapter = result["adapter"]
    steps = [f"{step} {1000 * s:.0f} ms" for step, s in result["timings_s"].items() if s >= 0.0005]
    print(f"  decision  {result['decision']}" + ("" if result["score"] is None else f"  (score {result['score']:.3f})"))
    print(f"  adapter   {adapter['name']} ({adapter['source']})" if adapter else "  adapter   none, the base serves")
    print(f"  prompts   {result['n_prompts']}")
    print(f"  time      {'  '.join(steps)}")
    if wall_s is not None:
        print(f"  process   {wall_s:.1f} s, loading the models included")
    if result["decision"] != expected:
        raise DemoError(f"expected the decision {expected!r}, got {result['decision']!r}")


def adapt_by_command(task: str, expected: str) -> None:
    """Adapt by the command line, in a process of its own."""
    prompts, _ = files(task)
    heading(f"Adapt to the prompts: {task}")
    started = time.perf_counter()
    name = ("--name", adapter_name(task))
    out = dnd_command("adapt", str(prompts.relative_to(ROOT)), *name, "--mode", "auto", "--json")
    show_adaptation(json.loads(out), expected, time.perf_counter() - started)


def adapt_by_library(dnd: Any, task: str, expected: str, step: str) -> None:
    """Adapt in this process, whose models are loaded."""
    prompts = [row["prompt"] for row in read_rows(files(task)[0])]
    heading(f"{step}: {task}, in a process that is warm")
    show_adaptation(dnd.adapt(prompts, name=adapter_name(task)).to_dict(), expected)


def same(answer: str, reference: str) -> bool:
    """Exact match but for case, surrounding space and a final full stop."""
    return answer.strip().rstrip(".").casefold() == reference.strip().rstrip(".").casefold()


def short(text: str, width: int) -> str:
    """The text on one line, cut to `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def side_by_side(dnd: Any, task: str, n_questions: int) -> None:
    """Answer unseen questions with the base and with the task's adapter."""
    rows = read_rows(files(task)[1])[:n_questions]
    asked = [row["prompt"] for row in rows]
    heading(f"{len(rows)} unseen questions of {task}")
    print(f"  {'reference':20}  {'base':34}  {'with the adapter':26}  question")
    started = time.perf_counter()
    answers = dnd.complete_batch(
        asked * 2, adapters=[None] * len(rows) + [adapter_name(task)] * len(rows), max_new_tokens=ANSWER_TOKENS
    )
    seconds = time.perf_counter() - started
    base, adapted = answers[: len(rows)], answers[len(rows) :]
    for row, plain, ours in list(zip(rows, base, adapted, strict=True))[:SHOWN]:
        question = row["prompt"].split("\n\n", 1)[-1].split(": ", 1)[-1]
        print(
            f"  {short(row['response'], 20):20}  {short(plain.text, 34):34}  {short(ours.text, 26):26}  "
            f"{short(question, 60)}"
        )
    if len(rows) > SHOWN:
        print(f"  ... and {len(rows) - SHOWN} more")
    right = [sum(same(a.text, row["response"]) for a, row in zip(side, rows, strict=True)) for side in (base, adapted)]
    print(f"  right: base {right[0]} of {len(rows)}, with the adapter {right[1]} of {len(rows)}")
    print(f"  {len(answers)} answers in one batch, {seconds:.1f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Run every step; 1 if a decision was not the promised one."""
    parser = argparse.ArgumentParser(description="The whole path on the default weights.")
    parser.add_argument("--home", type=Path, default=ROOT / ".dnd", help="folder for weights and adapters")
    parser.add_argument("--questions", type=int, default=20, help="questions per task, 1 to 20")
    args = parser.parse_args(argv)
    os.environ["DND_HOME"] = str(args.home.absolute())
    try:
        run(args.questions)
    except DemoError as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    return 0


def run(n_questions: int) -> None:
    """The steps in order."""
    from dnd_sdk import DnD, Home

    started = time.perf_counter()
    home = Home.find()
    heading("The default weights")
    fetch_weights(home)
    remove_adapters(home)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(DnD.load)  # beside the command: either is mostly imports, which keep one core busy
        adapt_by_command(FIRST, "generate")
    with loading.result() as dnd:
        adapt_by_library(dnd, FIRST, "reuse", "The same prompts again")
        side_by_side(dnd, FIRST, n_questions)
        adapt_by_library(dnd, SECOND, "generate", "Adapt to the prompts")
        adapt_by_library(dnd, SECOND, "reuse", "The same prompts again")
        side_by_side(dnd, SECOND, n_questions)
    print(f"\nWhole demo: {time.perf_counter() - started:.0f} s. Everything it made is in {os.environ['DND_HOME']}")


if __name__ == "__main__":
    raise SystemExit(main())
