"""How near prompts are to what a generator was trained on, so that gibberish gets the base model and not an adapter.

* Nearness to training tasks alone cannot tell: a sound job of a new kind is as far from them as random letters are.
  What tells is whether the prompts are nearer to some training task or to noise, so centres of both are kept.
* The noise is made here, from character ranges: no data set is needed and every run makes the same.
"""

from __future__ import annotations

import base64
import random
import string
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dnd_sdk.routing.similarity import check_vectors

NOISE_CENTRES = 48
_SCRIPTS = {
    "cyrillic": (0x430, 0x44F),
    "greek": (0x3B1, 0x3C9),
    "hebrew": (0x5D0, 0x5EA),
    "arabic": (0x627, 0x64A),
    "devanagari": (0x905, 0x939),
    "thai": (0xE01, 0xE2E),
    "kana": (0x3042, 0x3093),
    "chinese": (0x4E00, 0x9FA5),
    "hangul": (0xAC00, 0xD7A3),
}
NOISE_KINDS = ("letters", "keyboard", "symbols", "hex", "base64", *_SCRIPTS)
"""Kinds of `noise_prompts`, in the order in which it lists them."""


@dataclass(frozen=True)
class Support:
    """Centres of a generator's training tasks and of noise."""

    tasks: Tensor
    """`(s, C)` normalised fp32: a few centres per training task."""
    noise: Tensor | None = None
    """`(m, C)` the same of noise prompts; None: nearness to the tasks alone counts."""

    def __post_init__(self) -> None:
        """Raises `InputError` for vectors that are not finite, not normalised or of two widths."""
        object.__setattr__(self, "tasks", check_vectors(self.tasks))
        if self.noise is not None:
            object.__setattr__(self, "noise", check_vectors(self.noise, self.tasks.shape[1]))

    def score(self, vectors: Tensor) -> float:
        """Of prompts `(n, C)`: mean cosine to the nearest task centre, less that to the nearest noise centre."""
        vectors = check_vectors(vectors, self.tasks.shape[1])
        near = (vectors @ self.tasks.T).max(dim=1).values
        if self.noise is not None:
            near = near - (vectors @ self.noise.T).max(dim=1).values
        return near.mean().item()


def centres_of(vectors: Tensor, k: int, *, n_rounds: int = 10) -> Tensor:
    """Up to `k` normalised centres `(<= k, C)` of `(n, C)` vectors: spherical k-means from mutually far starts."""
    chosen = [int((vectors @ vectors.mean(dim=0)).argmax())]
    nearest = vectors @ vectors[chosen[0]]
    while len(chosen) < min(k, len(vectors)):
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, vectors @ vectors[chosen[-1]])
    centres = vectors[chosen]
    for _ in range(n_rounds):
        owner = (vectors @ centres.T).argmax(dim=1)
        sums = torch.zeros_like(centres).index_add(0, owner, vectors)
        norms = sums.norm(dim=1, keepdim=True)
        centres = torch.where(norms > 1e-6, sums / norms.clamp_min(1e-6), centres)
    return centres


def noise_prompts(n_per_kind: int = 24, *, seed: int = 0) -> list[str]:
    """Prompts that ask for nothing: random letters, keyboard runs, symbols, encoded bytes, letters of other scripts."""
    rng = random.Random(seed)
    kinds: list[Callable[[random.Random], str]] = [_letters, _keyboard, _symbols, _hex, _base64]
    prompts = [kind(rng) for kind in kinds for _ in range(n_per_kind)]
    for first, last in _SCRIPTS.values():
        prompts += [_words([chr(c) for c in range(first, last + 1)], rng) for _ in range(n_per_kind)]
    return prompts


def _words(alphabet: list[str], rng: random.Random) -> str:
    return " ".join("".join(rng.choices(alphabet, k=rng.randint(2, 9))) for _ in range(rng.randint(3, 12)))


def _letters(rng: random.Random) -> str:
    return _words(list(string.ascii_lowercase), rng)


def _keyboard(rng: random.Random) -> str:
    rows = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
    starts = ((rng.choice(rows), rng.randint(0, 5)) for _ in range(rng.randint(2, 6)))
    return rng.choice(("", " ")).join(row[at : at + rng.randint(3, 6)] * rng.randint(1, 3) for row, at in starts)


def _symbols(rng: random.Random) -> str:
    return "".join(rng.choices(string.punctuation + string.digits, k=rng.randint(15, 50)))


def _hex(rng: random.Random) -> str:
    return rng.randbytes(rng.randint(12, 40)).hex()


def _base64(rng: random.Random) -> str:
    return base64.b64encode(rng.randbytes(rng.randint(15, 50))).decode()
