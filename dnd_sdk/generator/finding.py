"""Which generator belongs to a base: the folders that ship with the package, each named by its own `config.json`.

Finding one loads no torch; `loading` makes a generator of what is found.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

from dnd_sdk.config import path_of
from dnd_sdk.errors import GeneratorError
from dnd_sdk.models import EMBEDDED

SHIPPED = Path(__file__).parent / "shipped"
"""One folder a generator."""


def shipped_folder(**made_for: str) -> Path | None:
    """The shipped generator whose settings have these values; None: there is none.

    Such as `base_name="smollm2-135m"`, `base_fingerprint=...` or `encoder_name=...`; see `GeneratorConfig`.
    """
    for config in sorted(SHIPPED.glob("*/config.json")):
        settings = json.loads(config.read_text("utf-8")).get("generator", {})
        if all(settings.get(name) == value for name, value in made_for.items()):
            return config.parent
    return None


def generator_folder(base: str, generator: str | PathLike[str] | None) -> Path | None:
    """The generator's folder: the named one, else the one shipped for the base of that name, else None."""
    if generator is None:
        return shipped_folder(base_name=base)
    folder = path_of("generator", generator)
    if not folder.is_dir():
        raise GeneratorError(f"no generator folder {folder}", fix="give the folder that dnd train generator made")
    return folder


def bases_with_generator() -> list[str]:
    """The embedded bases that a generator ships for, by name."""
    return [name for name in EMBEDDED if shipped_folder(base_name=name) is not None]


def without_generator() -> str:
    """What can be done for a base without a generator, as an error's fix."""
    return (
        "train one with `dnd train generator` and give its folder as --generator, import an adapter with "
        f"`dnd adapters import`, or use a --base that has one: {', '.join(bases_with_generator())}"
    )


def measured_matches(folder: Path) -> dict[str, float] | None:
    """What a shipped generator was measured to be worth, from its `evaluation.json`; None: it has none.

    The share of answers that match exactly, 0 to 1, as a mean over its tasks: of the `base` alone and `generated`.
    """
    try:
        methods = json.loads((folder / "evaluation.json").read_text("utf-8"))["methods"]
    except FileNotFoundError:
        return None
    return {name: methods[name]["mean"]["exact_match"] for name in ("base", "generated")}
