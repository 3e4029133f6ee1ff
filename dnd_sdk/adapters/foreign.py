"""Adapter folders as other tools leave them: where the adapter lies in them, and which tool wrote it.

Told by the names of files alone. What lies beside the adapter (configs that are code, optimizer state, checkpoints,
tokenizers) is never opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from dnd_sdk.adapters.peft_config import CONFIG, PeftSettings, some
from dnd_sdk.adapters.peft_folder import Weights, read_peft
from dnd_sdk.config import path_of
from dnd_sdk.errors import AdapterCorruptError, InputError, LayoutMismatchError, brief
from dnd_sdk.files import storage_errors
from dnd_sdk.lora import LoraLayout

LLM_ADAPTER = "llm_adapter"
"""Where XTuner puts the language model's LoRA of a LLaVA model."""
_LLAVA_REST = ("projector", "visual_encoder_adapter")
_TELLTALES = (
    ("xtuner", ("xtuner_config.py", LLM_ADAPTER)),
    ("llama-factory", ("trainer_log.jsonl", "training_args.yaml", "llamaboard_config.yaml")),
    ("axolotl", ("config.json",)),  # the base's own config, which the others do not save beside an adapter
    ("trl", ("training_args.bin",)),  # trl, or any other user of the transformers Trainer
)


def find_adapter(path: str | os.PathLike[str]) -> tuple[Path, str]:
    """The PEFT folder in `path` (itself, or XTuner's `llm_adapter`) and its origin (see `adapter.ORIGINS`).

    Raises `InputError` when `path` is no folder or holds several adapters, `AdapterCorruptError` when the way to the
    adapter leaves it.
    """
    root = path_of("folder", path)
    if not root.is_dir():
        raise InputError(f"{root} is not a folder", fix=f"give the folder that holds {CONFIG}")
    names = _names(root)
    if CONFIG in names or LLM_ADAPTER not in names:
        _refuse_checkpoints(root, names)
        return root, _origin({*names, root.resolve().name})
    folder = root / LLM_ADAPTER
    if not folder.resolve().is_relative_to(root.resolve()):
        raise AdapterCorruptError(f"{folder} is a link that leaves its folder", fix="copy the folder into its place")
    return folder, _origin(names)


def notes_on(folder: Path, settings: PeftSettings, left_out: Iterable[str], named: str | None) -> tuple[str, ...]:
    """What someone who imports the adapter in `folder` should know.

    `left_out` are modules that its config does not target, `named` is what `other_base` says.
    """
    rest = [n for n in _LLAVA_REST if n in _names(folder.parent)] if folder.name == LLM_ADAPTER else []
    notes = [] if named is None else [f"it fits, but {named}"]
    if rest:
        notes.append(f"only the language model's part is taken, not {', '.join(rest)}")
    if names := some(brief(m, 120) for m in left_out):
        notes.append(f"left out, as peft does: weights of modules that its config does not target: {names}")
    return (*notes, *settings.notes)


def read_foreign(folder: Path, layout: LoraLayout, settings: PeftSettings, *, ours: bool, named: str | None) -> Weights:
    """`read_peft` of a folder to import.

    One of `ours` never holds a pickle; `named` (see `other_base`) goes into the error when shapes do not fit.
    """
    try:
        return read_peft(folder, layout, settings, foreign=not ours)
    except LayoutMismatchError as e:
        if named is None:
            raise
        raise LayoutMismatchError(f"{e.message}; {named}", fix=e.fix) from e


def other_base(named: str | None, base_name: str | None) -> str | None:
    """A clause saying that a config names another base than the one loaded; None if it names none or the same.

    Only the last part of each name counts: the same model has another path on every machine.
    """
    if not named or not base_name or _last(named) == _last(base_name):
        return None
    return f"its config names the base {named[:200]!r}, loaded is {base_name!r}"


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].casefold()


def _names(folder: Path) -> set[str]:
    with storage_errors("list", folder):
        return set(os.listdir(folder))


def _origin(names: set[str]) -> str:
    return next((origin for origin, files in _TELLTALES if names.intersection(files)), "peft")


def _refuse_checkpoints(root: Path, names: set[str]) -> None:
    """A run that was cut short left checkpoints only: which one is meant must be said."""
    if CONFIG in names:
        return
    found = (n for n in names if n.startswith("checkpoint-") and (root / n / CONFIG).is_file())
    checkpoints = sorted(found, key=lambda n: (len(n), n))
    if checkpoints:
        raise InputError(
            f"{root} holds no {CONFIG} but {len(checkpoints)} checkpoints", fix=f"give one: {root / checkpoints[-1]}"
        )
