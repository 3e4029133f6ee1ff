"""What an evaluation needs of the rest of the SDK, as small protocols, so that any engine can be judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from dnd_sdk.evaluation.units import Made
from dnd_sdk.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

    from dnd_sdk.engine import CompletionRequest
    from dnd_sdk.models import Base
    from dnd_sdk.session import DnD

Messages = list[dict[str, str]]


class AdapterBank(Protocol):
    """Adapters in slots."""

    def load(self, adapter_id: str, flat: Tensor) -> Any:
        """Make `flat` usable under `adapter_id`."""

    def evict(self, adapter_id: str) -> Any:
        """Forget `adapter_id`."""


class CompletionEngine(Protocol):
    """The resident base with named adapters."""

    @property
    def bank(self) -> AdapterBank:
        """Where its adapters are."""

    def complete(self, requests: Sequence[CompletionRequest]) -> Sequence[Any]:
        """One completion with a `.text` per request."""

    def option_logprobs(
        self, messages_list: Sequence[Messages], adapter_ids: Sequence[str | None], options: Sequence[str]
    ) -> Tensor:
        """Summed log-likelihood of each option after each row, `(n_rows, n_options)`."""

    def prompt_ids(self, messages: Messages, n_new: int) -> Sequence[int]:
        """Tokens of a chat; raises `InputError` unless `n_new` more fit the context."""


class PromptEncoder(Protocol):
    """The text encoder of `dnd_sdk.models.encoder`."""

    def encode(self, prompts: Sequence[str], *, state_tokens: int = 64, with_states: bool = True) -> Any:
        """Prompts -> `.states` and `.pooled`."""


class LoraGenerator(Protocol):
    """The generator of `dnd_sdk.generator.generator`."""

    @property
    def id(self) -> str:
        """What names its weights."""

    @property
    def state_tokens(self) -> int:
        """Token states per prompt it takes."""

    def generate(self, states: Tensor) -> Tensor:
        """Token states -> flat LoRA vector."""

    def mean(self) -> Tensor:
        """The flat LoRA vector of a zeroed condition."""


class Calibrator(Protocol):
    """The calibration of `dnd_sdk.adaptation.label_calibration`."""

    def calibrate(self, flat: Tensor, prompts: Sequence[str], chats: Sequence[Any]) -> Any:
        """Flat LoRA vector -> `.flat` calibrated on these prompts."""


class AdapterZoo(Protocol):
    """Trained adapters, and the multi-task LoRA they came from."""

    def nearest(self, pooled: Tensor) -> Tensor:
        """Pooled prompt vectors `(n, C)` -> flat LoRA vector of the best match."""

    def merge(self, pooled: Tensor, k: int) -> Tensor:
        """The `k` best matches, weighted by similarity."""

    def mean(self) -> Tensor:
        """All adapters, averaged; raises `ConfigError` where an average means nothing."""

    def multitask(self) -> Tensor | None:
        """The shared LoRA; None when the zoo does not hold it."""


class LoraTrainer(Protocol):
    """Trains a LoRA on a task's own labelled rows."""

    def train(self, task: Task, seed: int, start: Tensor | None = None, steps: int | None = None) -> Tensor:
        """The trained flat vector; `start` None: from the base, `steps` None: as many as the zoo's."""


@dataclass(frozen=True)
class Parts:
    """One base on one engine, and what makes adapters for it."""

    engine: CompletionEngine
    tokenizer: Any
    base_name: str
    base_fingerprint: str
    generator: LoraGenerator | None = None
    encoder: PromptEncoder | None = None
    label_calibration: Calibrator | None = None
    numerics: str = "cpu/float32"
    """Device and dtype of the base: the same weights answer differently in another precision."""

    @property
    def made(self) -> Made:
        """What answers of these parts are made with."""
        return Made(self.base_name, None if self.generator is None else self.generator.id)

    @classmethod
    def of(cls, dnd: DnD) -> Parts:
        """The parts of a session; raises `ConfigError` unless its base runs in this process."""
        from dnd_sdk.adaptation import LabelCalibration
        from dnd_sdk.engine import local_engine

        engine = local_engine(dnd.engine, "an evaluation")
        base = engine.base
        return cls(
            engine=engine,
            tokenizer=base.tokenizer,
            base_name=base.name,
            base_fingerprint=base.fingerprint,
            generator=dnd.generator,
            encoder=dnd.encoder,
            label_calibration=LabelCalibration(engine),
            numerics=numerics_of(base),
        )


def numerics_of(base: Base) -> str:
    """Device and dtype of a base, as `Parts.numerics` has them."""
    return f"{base.model.device.type}/{str(base.model.dtype).removeprefix('torch.')}"
