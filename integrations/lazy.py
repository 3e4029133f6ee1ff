"""Faces of integrations: names that resolve on first use, and the extra to install where a framework is missing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str], extra: str | None = None, needs: tuple[str, ...] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names live in modules of its own, by `homes`.

    The first use of one raises `MissingExtraError`, naming the `extra`, where an import of a package in `needs` fails.
    """

    def getattr_(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        except ImportError as e:  # also of one that is there and lacks what is needed of it
            if str(e.name).split(".")[0] not in needs:
                raise
            from dnd_sdk.errors import MissingExtraError

            told = f"{e.name} is not installed".replace("_", "-") if isinstance(e, ModuleNotFoundError) else str(e)
            raise MissingExtraError(told, fix=f'pip install "dnd-sdk[{extra}]"') from e

    return getattr_, lambda: sorted({*vars(sys.modules[package]), *homes})
