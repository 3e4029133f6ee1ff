"""What `dnd eval paper` trains for one held-out set: a generator on the other sets, and LoRAs on the set's own rows.

* Each part has its own folder and goes on from its checkpoint; a finished part is read back.
* All parts are trained with the same settings on the same base, so that their seconds can be compared.
* No row of the held-out set reaches the generator, nor does a row of another set that repeats one of its test rows.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from dnd_sdk.adaptation import LabelCalibration
from dnd_sdk.config import Home
from dnd_sdk.engine import Engine
from dnd_sdk.errors import ConfigError
from dnd_sdk.evaluation.drawing import unseen_rows
from dnd_sdk.evaluation.parts import Parts, numerics_of
from dnd_sdk.evaluation.zoo import Zoo
from dnd_sdk.files import storage_errors, write_atomic
from dnd_sdk.generator import Generator
from dnd_sdk.lora import LoraLayout
from dnd_sdk.models import Encoder, load_base
from dnd_sdk.protocols import Progress
from dnd_sdk.tasks import Task, data_hash

if TYPE_CHECKING:
    from torch import Tensor

    from dnd_sdk.training import PerTaskSettings, TrainingParts, TrainSettings

OWN = ("few-shot", "full-shot")
"""Methods that train on labelled rows of the held-out set."""
GENERATOR = "generator"
"""The part (and its folder) that is trained on the other sets."""
_SENTENCE_WORDS = 7
"""Sentences of at least so many words tell which problem a prompt is about."""
_INSTRUCTION = 3
"""A sentence in this many test prompts belongs to the wording of the set, not to one of its rows."""


@dataclass(frozen=True)
class HeldOut:
    """A set that is left out, the sets trained on instead of it, and the folder of everything made for it."""

    task: Task
    others: tuple[Task, ...]
    folder: Path

    @property
    def file(self) -> Path:
        """Where its seconds are kept."""
        return self.folder / "seconds.jsonl"


class Seconds:
    """Durations by key, kept in a file; a training step that is run again counts once."""

    def __init__(self, path: Path) -> None:
        """Read what `path` holds; a torn line is passed over."""
        self._path = path
        self.known: dict[tuple[str | int, ...], float] = {}
        for line in path.read_bytes().split(b"\n") if path.exists() else ():
            try:
                *key, seconds = json.loads(line)
            except (ValueError, TypeError):
                continue
            self.known[tuple(key)] = seconds

    def put(self, *key: str | int, seconds: float) -> None:
        """Keep `seconds` under `key`."""
        self.known[key] = seconds
        with storage_errors("write", self._path), self._path.open("ab") as file:
            file.write(b"\n" + json.dumps([*key, seconds]).encode())  # the line end first: it ends a torn line

    def total(self, *prefix: str | int) -> float:
        """The sum over all keys that start so."""
        return sum(s for key, s in self.known.items() if key[: len(prefix)] == prefix)

    def steps(self, part: str, progress: Progress) -> Progress:
        """A progress that keeps the time from one step to the next, counted from now."""
        last = time.monotonic()

        def tell(stage: str, done: int, total: int, value: float) -> None:
            nonlocal last
            now = time.monotonic()
            self.put(part, stage, total, done, seconds=now - last)
            last = now
            progress(stage, done, total, value)

        return tell


class PaperTrainer:
    """The training code of `dnd train`, pointed at held-out sets; one base and encoder answer for all of them."""

    def __init__(self, settings: TrainSettings, home: Home, progress: Progress) -> None:
        """Raise `ConfigError` for settings that go on from a generator: it may have seen what is held out here."""
        if settings.start is not None:
            raise ConfigError(
                f"start = {settings.start!r}: a finished generator may have seen the held-out sets",
                fix="drop start from the recipe",
            )
        self.settings, self._home, self._progress = settings, home, progress

    def load(self) -> None:
        """Load the base that answers, and the encoder."""
        self.base = load_base(self.settings.base, self._home, device=self.settings.run.device)
        self.layout = LoraLayout.from_model(self.base.model, **self.settings.lora.model_dump())
        self.encoder = Encoder.load(self.settings.encoder, self._home, device=str(self.base.model.device))
        engine = Engine(self.base, self.layout, n_slots=2)
        self._parts = Parts(
            engine=engine,
            tokenizer=self.base.tokenizer,
            base_name=self.base.name,
            base_fingerprint=self.base.fingerprint,
            encoder=self.encoder,
            label_calibration=LabelCalibration(engine),
            numerics=numerics_of(self.base),
        )

    def parts(self, run: Path | None = None) -> Parts:
        """What answers, with the generator of a run folder if one is named."""
        if run is None:
            return self._parts
        made = Generator.from_pretrained(run / GENERATOR, self.layout)
        return replace(self._parts, generator=made.to(self.base.model.device).eval())

    def zoo(self, run: Path) -> Zoo:
        """The training LoRAs of a run folder."""
        return Zoo(run, self.layout, self.base.fingerprint, self.encoder.fingerprint)

    def claim(self, held: HeldOut) -> None:
        """Raise `ConfigError` if the set's folder holds what other settings, data or another base made."""
        from dnd_sdk.training import RunDir

        manifest = {
            "settings": self.settings.model_dump(mode="json", exclude={"run": {"checkpoint_every_s"}}),
            "base_fingerprint": self.base.fingerprint,
            "encoder_fingerprint": self.encoder.fingerprint,
            "data": {t.name: data_hash(t) for t in (held.task, *held.others)},
        }
        RunDir(held.folder, manifest)

    def generator(self, held: HeldOut) -> Path:
        """Train (or continue) LoRAs of the other sets and a generator on them; the run folder of the generator."""
        from dnd_sdk.training import prepare, train_generator, train_shared, train_tasks

        out, zoo = held.folder / GENERATOR, held.folder / "zoo"
        if (out / GENERATOR).exists():  # put there whole, as the last thing
            return out
        tasks = write_tasks(held.folder / "others", [apart(t, held.task) for t in held.others])
        tell = Seconds(held.file).steps(GENERATOR, self._named(held))
        settings = self._with_data(role=None)
        if not (zoo / "importance.safetensors").exists():  # the last thing of a zoo
            parts = prepare(tasks, settings, self._home, tell)
            train_tasks(parts, settings.per_task, train_shared(parts, settings.shared, zoo), zoo)
            del parts  # one training base at a time
        train_generator(tasks, settings, out, zoo=zoo, home=self._home, progress=tell)
        return out

    def own(self, held: HeldOut, name: str) -> Tensor:
        """A LoRA `(P,)` trained from scratch (A as it starts, B from zero) on the set's own rows; `name` of `OWN`."""
        from dnd_sdk.training import initial_adapter, train_tasks

        out = held.folder / name
        made = out / "tasks" / f"{held.task.name}.safetensors"
        if not made.exists():
            parts, stage = self._own_parts(held, name)
            tell = Seconds(held.file).steps(name, self._named(held))  # from here on: the base was loaded before
            first = initial_adapter(parts.base.layout, parts.curriculum.seed)
            train_tasks(replace(parts, progress=tell), stage, first, out)
        return load_file(made)["mean"]

    def _own_parts(self, held: HeldOut, name: str) -> tuple[TrainingParts, PerTaskSettings]:
        from dnd_sdk.training import PerTaskSettings, TokenTask, prepare

        task = replace(held.task, train=unseen_rows(held.task))
        tasks = write_tasks(held.folder / "own", [task])
        # four times, because of a set of long rows only a quarter of so many is taken
        settings = self._with_data(role=None, max_rows=4 * len(task.train))
        parts = prepare(tasks, settings, self._home, self._progress)
        chosen = self.settings.few_shot if name == "few-shot" else self.settings.full_shot
        if name == "few-shot":
            curriculum, k = parts.curriculum, self.settings.few_shot.examples
            rows = curriculum.tasks[task.name].rows
            drawn = random.Random(f"{curriculum.seed}/few-shot/{task.name}").sample(rows, min(k, len(rows)))
            few = replace(curriculum, tasks={task.name: TokenTask(task.name, tuple(drawn))})
            parts = replace(parts, curriculum=few, manifest={**parts.manifest, "examples": k})
        stage = PerTaskSettings(steps=chosen.steps, rows=chosen.rows, lr=chosen.lr, tasks=1, checkpoints=1)
        return parts, stage

    def _with_data(self, **changes: Any) -> TrainSettings:
        return self.settings.model_copy(update={"data": self.settings.data.model_copy(update=changes)})

    def _named(self, held: HeldOut) -> Progress:
        return lambda stage, *rest: self._progress(f"{held.task.name}: {stage}", *rest)


def apart(task: Task, held: Task) -> Task:
    """`task` without the train rows that repeat a test row of `held`: its prompt, or a long sentence of it.

    Sentences that many test prompts share are the set's instructions and do not count.
    """
    said = Counter(s for r in held.test for s in _sentences(r.prompt))
    telling = {s for s, n in said.items() if n < _INSTRUCTION}
    prompts = {r.prompt for r in held.test}
    rows = (r for r in task.train if r.prompt not in prompts and not telling & _sentences(r.prompt))
    return replace(task, train=tuple(rows))


def _sentences(prompt: str) -> set[str]:
    plain = (" ".join(re.findall(r"\w+", part.casefold())) for part in re.split(r"[.?!\n]+", prompt))
    return {s for s in plain if s.count(" ") >= _SENTENCE_WORDS - 1}


def write_tasks(folder: Path, tasks: Sequence[Task]) -> Path:
    """The train rows of `tasks` as a tasks folder, for the training code to read; no test row."""
    for task in tasks:
        rows = ({k: v for k, v in r._asdict().items() if v is not None} for r in task.train)
        write_atomic(folder / f"{task.name}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    described = ("name", "family", "answer_type", "labels", "metric", "licence")
    index = [{k: getattr(t, k) for k in described} for t in tasks]
    write_atomic(folder / "index.json", json.dumps(index))
    return folder
