"""All settings of `dnd train` in one TOML file; unknown keys are refused, every default is a working value."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)

from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.lora import ALL_LINEAR
from dnd_sdk.models import DEFAULT_BASE, DEFAULT_ENCODER
from dnd_sdk.training.augment import VIEWS

ObjectiveName = Literal["reconstruction", "end-to-end"]
"""What a stage may train for; a class of `dnd_sdk.training.objectives` each."""
Precision = Literal["exact", "bfloat16", "int8"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraSettings(_Section):
    """Shape of every adapter."""

    r: int = 8
    lora_alpha: float = 16.0
    target_modules: tuple[str, ...] = ALL_LINEAR


class DataSettings(_Section):
    """Which rows are trained on."""

    role: str | None = "train"
    """Only tasks with this role in index.json; null for every task."""
    max_tokens: int = 128
    """Longest row, chat template and answer included."""
    max_rows: int = 400
    """Rows kept per task."""
    balance: Literal["task", "family"] = "task"
    """What a pass over the data shows once: every task, or one task of every family (so that large families do not
    drown small ones)."""
    held_out: int = Field(0, ge=0)
    """Tasks kept out of all training, each of another family where there are enough: `[check]` judges by them."""
    views: tuple[str, ...] = ()
    """Views (`dnd_sdk.training.augment`) of every task trained on that are trained on as tasks of their own, too."""

    @field_validator("views")
    @classmethod
    def _are_known(cls, views: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [v for v in views if v not in VIEWS]:
            raise ValueError(f"unknown views {unknown}, expected some of {', '.join(VIEWS)}")
        return tuple(dict.fromkeys(views))

    @model_serializer(mode="wrap")
    def _as_before_views(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without views what is written is what it was before there were any: older run folders go on."""
        data: dict[str, Any] = write(self)
        return data if self.views else {k: v for k, v in data.items() if k != "views"}


class SharedSettings(_Section):
    """The shared adapter: one LoRA (A and B) on all tasks; the zoo starts from it and the generator adds to it."""

    steps: int = Field(400, ge=0)
    rows: int = Field(12, ge=1)
    """Rows per step, each from another task."""
    lr: float = 1e-3


class PerTaskSettings(_Section):
    """One adapter per task, A frozen at the shared one."""

    steps: int = Field(12, ge=1)
    tasks: int = Field(4, ge=1)
    """Tasks trained side by side in one batch."""
    rows: int = Field(4, ge=1)
    """Rows per task and step."""
    lr: float = 1e-3
    checkpoints: int = Field(3, ge=1)
    """Snapshots kept of the last steps of each task."""


class FewShotSettings(_Section):
    """`few-shot` of `dnd eval paper`: one LoRA from scratch on a few labelled rows of the held-out set."""

    examples: int = Field(64, ge=1)
    """Labelled rows it is trained on."""
    steps: int = Field(40, ge=1)
    rows: int = Field(12, ge=1)
    """Rows per step."""
    lr: float = 1e-3


class FullShotSettings(_Section):
    """`full-shot` of `dnd eval paper`: the same on the whole train split."""

    steps: int = Field(300, ge=1)
    rows: int = Field(12, ge=1)
    """Rows per step."""
    lr: float = 1e-3


class GeneratorSettings(_Section):
    """Size of the hyper-conv decoder; its shapes are derived from the layout."""

    n_prompts: int = Field(16, ge=1)
    state_tokens: int = Field(64, ge=4)
    width: int = Field(128, ge=1)
    """Channels before the last layer."""
    kernel_size: int = 3
    pool: int = Field(64, ge=1)
    """Train prompts per task from which conditions are drawn."""
    parts: tuple[Literal["lora_A", "lora_B"], ...] = ("lora_B",)
    """Which matrices are generated; the others stay the shared adapter's."""
    fresh: bool = False
    """Whether the decoder begins anew, of any size, and only the shared adapter goes on from `start`."""


class Stage(_Section):
    """One stage of generator training."""

    objective: ObjectiveName
    steps: int = Field(ge=1)
    tasks: int = Field(6, ge=1)
    """Tasks per step."""
    rows: int = Field(2, ge=1)
    """Rows per task and step (end-to-end)."""
    lr: float = 6e-4
    bare: float = Field(0, ge=0, le=1)
    """Share of the rows asked without what all prompts of their task share (end-to-end; `dnd_sdk.tasks.bare`): there
    only the condition tells the task. Conditions are always whole prompts."""
    condition_noise: float = 1e-4
    target_noise: float = 1e-5
    train_shared: bool = False
    """Whether the shared B moves too (end-to-end)."""
    first_gain: float = Field(0, ge=0)
    """Where the learned scale of what the decoder adds begins, in an end-to-end stage that no other came before: 0
    begins at the shared adapter exactly, 0.3 with a decoder that is heard from the first step on."""


class CheckSettings(_Section):
    """How end-to-end training is judged on the tasks held out (`data.held_out`); without such tasks it is not."""

    every: int = Field(25, ge=1)
    """Steps between two checks."""
    rows: int = Field(8, ge=1)
    """Rows per held-out task."""
    patience: int | None = Field(None, ge=1)
    """Checks without a better loss after which a stage ends; null: never. The best generator is kept either way."""


class RunSettings(_Section):
    """How training runs."""

    seed: int = 0
    checkpoint_every_s: float = 60.0
    micro_tokens: int = 1024
    """Padded tokens per micro-batch."""
    base_precision: Precision = "exact"
    """How the frozen base computes while training. bfloat16: all of it (CPUs with AMX or AVX512-BF16; CUDA does so
    anyway). int8: its products (CPUs with VNNI). exact: as it serves."""
    device: str = "auto"


class TrainSettings(_Section):
    """The whole file."""

    base: str = DEFAULT_BASE
    encoder: str = DEFAULT_ENCODER
    start: str | None = None
    """Generator folder to go on from (its shared adapter, its decoder); null starts from the base alone."""
    lora: LoraSettings = LoraSettings()
    data: DataSettings = DataSettings()
    shared: SharedSettings = SharedSettings()
    per_task: PerTaskSettings = PerTaskSettings()
    few_shot: FewShotSettings = FewShotSettings()
    full_shot: FullShotSettings = FullShotSettings()
    generator: GeneratorSettings = GeneratorSettings()
    stages: tuple[Stage, ...] = (
        Stage(objective="reconstruction", steps=100),
        Stage(objective="end-to-end", steps=200, train_shared=True),
    )
    check: CheckSettings = CheckSettings()
    run: RunSettings = RunSettings()


def read_settings(path: Path | None) -> TrainSettings:
    """Settings of a TOML file; None gives the defaults. Raises `ConfigError` naming every bad key."""
    if path is None:
        return TrainSettings()
    try:
        return TrainSettings.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as e:
        raise InputError(f"cannot read {path}: {e}", fix="pass an existing TOML file") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not valid TOML: {e}") from e
    except ValidationError as e:
        bad = "; ".join(f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors())
        raise ConfigError(f"{path}: {bad}", fix="see the keys in dnd_sdk/training/settings.py") from e
