"""What is known of a base whose weights are elsewhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BaseCard:
    """A base that another process runs."""

    name: str
    fingerprint: str
    """Of its weights, as `Base.fingerprint`: adapters made for others are refused."""
