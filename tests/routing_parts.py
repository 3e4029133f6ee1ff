"""Shared by the routing tests: embeddings of made-up tasks, and a store that lives in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dnd_sdk.adapters import Adapter, Changes

BASE, ENCODER, WIDTH = "b" * 64, "e" * 64, 48


def task_vectors(task: int, n: int = 32, *, seed: int = 0, spread: float = 0.6, width: int = WIDTH) -> Tensor:
    """`n` unit vectors around the direction of `task`; a larger `spread` makes a task whose prompts differ more."""
    centre = torch.randn(width, generator=torch.Generator().manual_seed(1000 + task))
    noise = torch.randn(n, width, generator=torch.Generator().manual_seed(100 * seed + task))
    return unit(unit(centre) + spread * noise / width**0.5)


def unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


def adapter(name: str, *, created: str = "2026-01-01T00:00:00+00:00", **more: str | None) -> Adapter:
    fields = {"base_fingerprint": BASE, "encoder_fingerprint": ENCODER, "prompt_hash": None} | more
    return Adapter(
        name=name,
        id=f"id-{name}",
        path=Path("adapters") / name,
        source="generated",
        created=created,
        layout_digest="l",
        **fields,  # type: ignore[arg-type]
    )


@dataclass
class FakeStore:
    """The methods routing uses; counts how many adapters' exemplars were read."""

    kept: dict[str, tuple[Adapter, Tensor | None]] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    reads: int = 0

    def put(self, a: Adapter, exemplars: Tensor | None) -> Adapter:
        self.kept[a.name] = (a, exemplars)
        self.changed.append(a.name)
        return a

    def rm(self, name: str) -> None:
        del self.kept[name]
        self.changed.append(name)

    def changes(self, since: int) -> Changes:
        names, now = set(self.changed[since:]) if since else set(self.kept), len(self.changed)
        return Changes(now, {n: self.kept[n][0] if n in self.kept else None for n in names}, since == 0)

    def made_for(self, prompt_hash: str) -> list[Adapter]:
        return [a for a, _ in self.kept.values() if a.prompt_hash == prompt_hash]

    def with_id(self, adapter_id: str) -> list[Adapter]:
        return [a for a, _ in self.kept.values() if a.id == adapter_id]

    def exemplars(self, a: Adapter) -> Tensor | None:
        self.reads += 1
        return self.kept[a.name][1]
