"""Small frozen settings that several rows share; no torch, no environment except `DND_HOME` in `Home.find`."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

from dnd_sdk.errors import ConfigError


@dataclass(frozen=True)
class Home:
    """The folder that holds everything the SDK keeps: adapters are data, the index and models can be made again."""

    root: Path

    @classmethod
    def find(cls, path: str | os.PathLike[str] | None = None) -> Home:
        """`path`, else `DND_HOME`, else the platform's user data folder. Creates nothing."""
        chosen = path or os.environ.get("DND_HOME")
        if chosen:
            return cls(Path(chosen).expanduser().absolute())
        from platformdirs import user_data_path

        return cls(user_data_path("dnd"))

    @property
    def adapters(self) -> Path:
        """One PEFT folder per adapter, named by the adapter."""
        return self.root / "adapters"

    @property
    def index(self) -> Path:
        """The FAISS index: a cache, rebuilt from the adapters' exemplars."""
        return self.root / "index"

    @property
    def logs(self) -> Path:
        """What was decided, for people and for `dnd logs --replay`."""
        return self.root / "logs"

    @property
    def streams(self) -> Path:
        """What `observe` has seen, one folder per base and encoder; holds prompts."""
        return self.root / "streams"

    @property
    def models(self) -> Path:
        """Embedded default weights, fetched and converted once."""
        return self.root / "models"


@dataclass(frozen=True)
class SamplingOptions:
    """How text is completed."""

    max_new_tokens: int = 128
    """Upper bound on generated tokens per completion."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus mass, used when temperature > 0."""
    top_k: int = 0
    """0 keeps every token."""
    seed: int | None = None
    """None draws fresh randomness."""
    stop: tuple[str, ...] = ()
    """Text is cut before the first of these."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0.0 <= self.temperature <= 10.0:
            raise ConfigError(f"temperature must be within 0..10, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p must be within (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be 0 or more, got {self.top_k}")
        if any(not s for s in self.stop):
            raise ConfigError("stop strings must not be empty")


SAMPLING = tuple(f.name for f in fields(SamplingOptions))
"""The names of the sampling options."""
