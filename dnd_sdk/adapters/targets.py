"""Which modules a config targets, and their ranks and alphas, by peft's own rules (`check_target_module_exists`).

A file may hold more than its config targets: peft leaves that unused without a word, so whoever applied it would
compute something else than the adapter's maker saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from dnd_sdk.adapters.patterns import FIX, Budget, Pattern
from dnd_sdk.errors import AdapterCorruptError

MAX_PATTERNS = 1024
_HEADS = ("lm_head", "embed_out")
"""Output layers by the names they have: `all-linear` leaves them out."""
_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."
T = TypeVar("T")


class Targets:
    """Whether a config targets a module, by its name in the base."""

    def __init__(self, data: dict[str, Any], path: Path, budget: Budget) -> None:
        """Read the keys that say so; raises `AdapterCorruptError` where peft itself could not."""
        targets = data.get("target_modules")
        self.unsaid = targets is None
        self.named = isinstance(targets, list)
        """Named one by one: then every module of these names must have weights."""
        self._takes = _everything if targets is None else _rule(targets, f"{path}: target_modules", budget)
        excluded = data.get("exclude_modules")
        self._excludes = _rule(excluded, f"{path}: exclude_modules", budget, plain=True) if excluded else None
        self._exact = frozenset(targets) if isinstance(targets, list) else frozenset()
        self._layers = _layers(data, path)
        self._layer_patterns = _layer_patterns(data, path, budget) if self._layers is not None else []

    def take(self, module: str) -> bool:
        """Whether peft would put a LoRA on `module`."""
        if self._excludes is not None and self._excludes(module):
            return False
        if not self._takes(module):
            return False
        # peft's order: a module named in full is taken whatever its layer
        return self._layers is None or module in self._exact or self._layer_of(module) in self._layers

    def _layer_of(self, module: str) -> int | None:
        found = next((m for p in self._layer_patterns if (m := p.match(module))), None)
        # no base has layers of more digits, and Python refuses to read thousands of them
        return None if found is None or len(found["idx"]) > 9 else int(found["idx"])


class ByModule(Generic[T]):
    """peft's `rank_pattern` or `alpha_pattern`: what the first pattern that ends a module's name says of it."""

    def __init__(
        self, key: str, data: dict[str, Any], path: Path, budget: Budget, valid: Callable[[Any], bool]
    ) -> None:
        """Read `data[key]`; raises `AdapterCorruptError` unless it maps patterns to values that are `valid`."""
        values = data.get(key) or {}
        if not isinstance(values, dict) or not all(map(valid, values.values())):
            expected = (
                "patterns with a whole number above 0 each" if key == "rank_pattern" else "patterns with a number each"
            )
            raise AdapterCorruptError(
                f"{path}: {key} is {values!r}, expected {expected}",
                fix=f"correct {key} in {path.name}, or save it again",
            )
        if len(values) > MAX_PATTERNS:
            raise AdapterCorruptError(f"{path}: {key} holds {len(values)} patterns, at most {MAX_PATTERNS}", fix=FIX)
        self._values: dict[str, T] = values
        around, where = r"(.*\.)?(%s)$", f"{path}: {key}"
        self._patterns = [(text, Pattern(text, where, budget, around=around)) for text in values]
        self._found: dict[str, T | None] = {}

    def of(self, module: str, otherwise: T) -> T:
        """The value for `module`."""
        if not self._values:
            return otherwise
        if module not in self._found:
            ends = (text for text, pattern in self._patterns if pattern.match(module))
            self._found[module] = self._values.get(next(ends, module))
        found = self._found[module]
        return otherwise if found is None else found


def _ends(module: str) -> Iterator[str]:
    """`c`, `b.c`, `a.b.c` (most targets are a last part): looked up, a list of any length costs the same."""
    at = len(module)
    while (at := module.rfind(".", 0, at)) >= 0:
        yield module[at + 1 :]
    yield module


def _everything(module: str) -> bool:
    return True


def _rule(targets: object, where: str, budget: Budget, *, plain: bool = False) -> Callable[[str], bool]:
    """The rule of peft for names or a pattern; `plain`: `all-linear` means nothing here."""
    if isinstance(targets, str):
        if targets.lower() == "all-linear" and not plain:
            return lambda module: module.rsplit(".", 1)[-1] not in _HEADS
        pattern = Pattern(targets, where, budget)
        return lambda module: bool(pattern.match(module, whole=True))
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        what = "is not a list of names" if not plain else f"is {str(targets)[:80]}, expected names or one pattern"
        raise AdapterCorruptError(f"{where} {what}", fix=FIX)
    names = frozenset(targets)
    return lambda module: any(end in names for end in _ends(module))


def _layers(data: dict[str, Any], path: Path) -> frozenset[int] | None:
    layers = data.get("layers_to_transform")
    if layers is None or layers == []:
        if data.get("layers_pattern"):
            raise AdapterCorruptError(
                f"{path}: layers_pattern without layers_to_transform", fix="say which layers, or remove layers_pattern"
            )
        return None
    if not isinstance(data.get("target_modules"), list):
        raise AdapterCorruptError(
            f"{path}: layers_to_transform goes with a list of target_modules only",
            fix="list the names in target_modules, or remove layers_to_transform",
        )
    listed = layers if isinstance(layers, list) else [layers]
    if not all(isinstance(n, int) for n in listed):
        raise AdapterCorruptError(
            f"{path}: layers_to_transform is {str(layers)[:80]}, expected whole numbers",
            fix=f"write the layers as numbers in {path.name}",
        )
    return frozenset(listed)


def _layer_patterns(data: dict[str, Any], path: Path, budget: Budget) -> list[Pattern]:
    where, patterns = f"{path}: layers_pattern", data.get("layers_pattern")
    if not patterns:
        return [Pattern(_LAYER, where, budget)]
    listed = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(listed, list) or not all(isinstance(p, str) for p in listed) or len(listed) > MAX_PATTERNS:
        raise AdapterCorruptError(f"{where} is {str(patterns)[:80]}, expected names", fix=FIX)
    return [Pattern(p, where, budget, around=r"(?:^|.*?\.)%s\.(?P<idx>\d+)\.") for p in listed]
