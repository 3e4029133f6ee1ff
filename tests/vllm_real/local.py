"""A session whose base vLLM runs in this process: asked in JSON on stdin, by another Python; tells JSON on stdout."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from typing import Any, NamedTuple

from dnd_sdk.errors import BackendError
from dnd_sdk.session import Completion, DnD

N_TOKENS = 24
ARGS = "--enforce-eager --max-model-len 1024"


class Said(NamedTuple):
    """What is compared of an answer."""

    text: str
    prompt_tokens: int
    adapter: str | None
    tokens: list[str]


def said(answer: Completion) -> Said:
    """The same of any session's."""
    return Said(answer.text, answer.usage["prompt_tokens"], answer.adapter, [t.text for t in answer.logprobs or ()])


def main() -> None:
    """Answer, adapt, be killed, be loaded again."""
    asked = json.load(sys.stdin)
    told: list[str] = []
    began = time.monotonic()
    dnd = _load(asked, told)
    out: dict[str, Any] = {"checked": told, "seconds": {"start": round(time.monotonic() - began, 1)}}
    began = time.monotonic()
    out["answers"] = [[said(c) for c in _answers(dnd, asked["prompts"], speaker)] for speaker in asked["speakers"]]
    out["seconds"]["vllm"] = round(time.monotonic() - began, 1)
    again = dnd.adapt(asked["known"])
    out["adapt"] = [again.decision, again.adapter and again.adapter.name]
    seen = [dnd.observe(p).adapter for p in asked["known"]]
    out["observe"] = [a and a.name for a in (seen[0], seen[-1])]
    new = dnd.adapt([p.upper() for p in asked["known"]], mode="generate", name="new-here")
    out["generated"] = [new.decision, dnd.complete("hello", adapter="new-here", max_new_tokens=4).adapter]
    out["killed"] = _killed(dnd)
    del dnd, again, new
    with _load(asked, told) as dnd:
        [first] = _answers(dnd, asked["prompts"][:1], asked["speakers"][1])
        out["killed"].append({"adapter": first.adapter, "equal": said(first) == out["answers"][1][0]})
    json.dump(out, sys.stdout)


def _load(asked: dict[str, Any], told: list[str]) -> DnD:
    return DnD.load(
        asked["base"], home=asked["home"], engine="vllm-local", dtype="float32", vllm_args=ARGS, progress=told.append
    )


def _answers(dnd: DnD, prompts: list[str], speaker: str | None) -> list[Completion]:
    return dnd.complete_batch(prompts, [speaker] * len(prompts), max_new_tokens=N_TOKENS, logprobs=2)


def _killed(dnd: DnD) -> list[Any]:
    """What requests say whose engine's own process is killed in the middle, and after that."""
    stream = dnd.stream("Tell me a long story.", max_new_tokens=900)
    next(stream)
    for child in multiprocessing.active_children():
        child.kill()
    said: list[Any] = []
    for ask in (lambda: list(stream), lambda: dnd.complete("hello", max_new_tokens=2)):
        try:
            ask()
            said.append("nothing was raised")
        except BackendError as e:
            said.append(str(e))
    return said


if __name__ == "__main__":
    main()
