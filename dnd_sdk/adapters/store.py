"""`AdapterStore`: content-addressed adapters under one home, shared by any number of threads and processes.

* The id is a hash of the weights: storing the same weights twice, even from two processes at once, gives one adapter.
* Folders are data anyone may have touched: every read checks them, and listing steps over damaged ones.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from dnd_sdk.adapters.adapter import (
    SOURCES,
    About,
    Adapter,
    Problem,
    check_name,
    default_name,
    is_name,
    read_layout,
    read_manifest,
)
from dnd_sdk.adapters.catalogue import Changes
from dnd_sdk.adapters.checks import check_base, check_folder, check_not_replaced, check_read_hash, check_same
from dnd_sdk.adapters.edge import array_of, tensor_of
from dnd_sdk.adapters.exemplars import check_exemplars, exemplars_hash, read_exemplars
from dnd_sdk.adapters.exporting import copy_out
from dnd_sdk.adapters.folders import AdapterFolders
from dnd_sdk.adapters.incoming import read_incoming
from dnd_sdk.adapters.peft_folder import adapter_id, check_flat, read_weights
from dnd_sdk.adapters.refining import refined_files, with_more
from dnd_sdk.adapters.writing import exemplars_file, write_folder
from dnd_sdk.config import Home, callable_of, path_of
from dnd_sdk.errors import AdapterCorruptError, AdapterNotFoundError, ConfigError, DndError, shown
from dnd_sdk.files import FloatArray
from dnd_sdk.lora import LoraLayout

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

Refine = Callable[[Path, Adapter], tuple[Adapter, dict[str, bytes]]]


class AdapterStore:
    """Adapters under `home.adapters`; every method may be called from any thread."""

    def __init__(self, home: Home) -> None:
        self.root = home.adapters
        self._folders = AdapterFolders(home.adapters)
        self._layouts: dict[str, LoraLayout] = {}  # stored ones that are not a session's own, by digest

    def put(
        self,
        flat: Tensor,
        layout: LoraLayout,
        *,
        base_name: str,
        base_fingerprint: str,
        source: str,
        name: str | None = None,
        exemplars: Tensor | None = None,
        **about: Unpack[About],
    ) -> Adapter:
        """Store a flat vector; the same weights again (under the same or no name) give the adapter already there.

        Args:
            flat: `(layout.n_parameters,)`, any float dtype and device; stored as fp32.
            layout: What `flat` was made for.
            base_name: Written as PEFT's `base_model_name_or_path`.
            base_fingerprint: Only a base with this fingerprint will load it.
            source: One of `SOURCES`.
            name: None names it after its content.
            exemplars: `(k, C)` normalised prompt embeddings for the router; None leaves it out of routing.
            about: What else is known of it (`About`): `prompt_hash`, `n_prompts`, `generator`, `encoder`,
                `encoder_fingerprint`, `scores`, `origin`, `parents`, `role`.

        Raises:
            ConfigError: The name is not allowed, or taken by other weights or the same under another role or base.
            AdapterCorruptError: NaN or inf in the weights, or the folder of that name is damaged.
            LayoutMismatchError: The vector has another size.
            StorageError: The disk is full or read-only; nothing is left behind.
        """
        if source not in SOURCES:
            raise ConfigError(f"source must be one of {SOURCES}, got {source!r}")
        if name is not None:
            check_name(name)
        weights = check_flat(flat, layout).numpy()
        kept = None if exemplars is None else exemplars_file(array_of(exemplars), about)
        weights_id, role = adapter_id(weights, layout), about.get("role")
        chosen = name or self._automatic_name(weights_id, role, base_fingerprint)
        about["scores"], about["parents"] = dict(about.get("scores") or {}), dict(about.get("parents") or {})
        adapter = Adapter(
            name=chosen,
            id=weights_id,
            path=self.root / chosen,
            source=source,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            base_fingerprint=base_fingerprint,
            layout_digest=layout.digest,
            exemplars_sha256=exemplars_hash(kept),
            **about,
        )
        return self._commit(adapter, lambda folder: write_folder(folder, adapter, weights, layout, base_name, kept))

    def get(self, name_or_id: str) -> Adapter:
        """The adapter of that name or full id. Raises `AdapterNotFoundError`, or `AdapterCorruptError` if damaged."""
        adapter = self._folders.read(self.find(name_or_id), read_manifest)
        if adapter is None:
            raise self._not_found(name_or_id)
        return adapter

    def find(self, name_or_id: str) -> str:
        """The name behind a name or full id, damaged or not. Raises `AdapterNotFoundError`."""
        if is_name(name_or_id) and self._folders.has(name_or_id):
            return name_or_id
        if not isinstance(name_or_id, str):
            raise ConfigError(f"an adapter's name must be text, got {shown(name_or_id)}")
        found = self.with_id(name_or_id)
        if not found:
            raise self._not_found(name_or_id)
        return found[0].name

    def load(self, adapter: Adapter, layout: LoraLayout, *, base_fingerprint: str | None = None) -> Tensor:
        """The adapter's weights as a flat fp32 vector of `layout`, everything checked.

        A smaller rank is padded with zeros. `base_fingerprint` None skips the comparison with the adapter's own.
        Raises `LayoutMismatchError`, `AdapterCorruptError`, `AdapterNotFoundError` (removed or replaced meanwhile) or
        `StorageError`.
        """

        def reader(folder: Path) -> FloatArray:
            check_not_replaced(read_manifest(folder), adapter)
            check_base(adapter, base_fingerprint)
            flat = read_weights(folder, layout)
            check_read_hash(folder, adapter, flat, layout)
            return flat

        flat = self._folders.read(adapter.name, reader)
        if flat is None:
            raise self._not_found(adapter.name)
        return tensor_of(flat)

    def load_by_id(self, adapter_id: str, layout: LoraLayout, *, base_fingerprint: str | None = None) -> Tensor:
        """`load` of a stored adapter with that id, whatever it is called by now: of several the first that can be."""
        failed: DndError | None = None
        for adapter in self.with_id(adapter_id):
            try:
                return self.load(adapter, layout, base_fingerprint=base_fingerprint)
            except DndError as e:
                failed = failed or e
        raise failed or self._not_found(adapter_id)

    def fits(self, adapter: Adapter, layout: LoraLayout) -> bool:
        """Whether `load` can make a vector of `layout` of an adapter; each layout stored is looked at once."""
        digest = adapter.layout_digest
        if digest == layout.digest:
            return True
        if digest not in self._layouts:
            try:
                stored = self._folders.read(adapter.name, read_layout)
            except DndError:
                return False
            if stored is None or stored.digest != digest:
                return False
            self._layouts[digest] = stored
        return layout.can_hold(self._layouts[digest])

    def exemplars(self, adapter: Adapter) -> Tensor | None:
        """The adapter's exemplars (k, C), None if it has none. Raises `AdapterCorruptError` when they are damaged."""

        def reader(folder: Path) -> tuple[FloatArray | None]:
            return (read_exemplars(folder, read_manifest(folder).exemplars_sha256),)

        found = self._folders.read(adapter.name, reader)
        if found is None:
            raise self._not_found(adapter.name)
        return None if found[0] is None else tensor_of(found[0])

    def set_exemplars(self, adapter: Adapter, exemplars: Tensor) -> Adapter:
        """Replace an adapter's exemplars by others of the same encoder, `(k, C)`; its weights stay as they are.

        Raises `InputError` for unusable exemplars, `AdapterNotFoundError` if it was removed or replaced meanwhile, or
        `StorageError`.
        """
        checked = check_exemplars(array_of(exemplars))
        return self._refine(adapter, lambda folder, stored: refined_files(folder, stored, checked))

    def ls(self) -> list[Adapter]:
        """Every sound adapter by name; damaged folders are skipped with a warning, once each."""
        return self._folders.catalogue.adapters()

    def changes(self, since: int) -> Changes:
        """What any process added, removed, renamed or refined after the question answered with `now=since`.

        0 asks for everything. Costs what changed, not what is stored.
        """
        return self._folders.catalogue.changes(since)

    def made_for(self, prompt_hash: str) -> list[Adapter]:
        """The adapters made for exactly this prompt set, by name."""
        return self._folders.catalogue.made_for(prompt_hash)

    def rm(self, name_or_id: str) -> None:
        """Remove an adapter, damaged or not. Raises `AdapterNotFoundError` or `StorageError`."""
        name = self.find(name_or_id)
        if not self._folders.remove(name):
            raise self._not_found(name)

    def verify(self, name: str | None = None) -> list[Problem]:
        """Read and hash one adapter (None: all of them) and report what is wrong, instead of raising.

        Raises `AdapterNotFoundError` for an unknown name.
        """
        names = self._folders.names() if name is None else [self.find(name)]
        return [problem for n in names if (problem := self._problem(n)) is not None]

    def import_folder(
        self,
        path: str | os.PathLike[str],
        layout: LoraLayout,
        *,
        base_fingerprint: str,
        base_name: str | None = None,
        name: str | None = None,
        exemplars: Tensor | None = None,
        encoder: str | None = None,
        encoder_fingerprint: str | None = None,
        least_r: int | None = None,
        note: Callable[[str], None] | None = None,
    ) -> Adapter:
        """Copy a PEFT folder into the store after checking all of it; an exported adapter brings its exemplars along.

        Folders as XTuner, LLaMA-Factory, trl and Axolotl write them are found and named as the origin (see `foreign`);
        an `adapter_model.bin` becomes safetensors in the store. `base_name` names the base where the folder does not.
        It is stored at its own rank or at `least_r`, whichever is larger; None: at the layout's.
        What is stored already gets the exemplars added that it lacks. `note` is told, once it is stored, what someone
        who imports it should know (what was left out, what was not understood); None: the log is warned.
        Raises `InputError` when `path` is no folder, otherwise like `load` and `put`; nothing is stored then.
        """
        if name is not None:
            check_name(name)
        callable_of("note", note)
        new = read_incoming(path, layout, base_fingerprint, base_name, least_r)
        if exemplars is None:
            exemplars = None if new.exemplars is None else tensor_of(new.exemplars)
            encoder, encoder_fingerprint = new.encoder, new.encoder_fingerprint
        stored = self.put(
            tensor_of(new.flat),
            new.layout,
            base_name=new.base_name or base_name or "unknown",
            base_fingerprint=base_fingerprint,
            source="imported",
            name=name,
            exemplars=exemplars,
            encoder=encoder,
            encoder_fingerprint=encoder_fingerprint,
            origin=new.origin,
            **new.kept,
        )
        if exemplars is not None:
            checked = check_exemplars(array_of(exemplars))
            stored = self._refine(stored, lambda folder, a: with_more(folder, a, checked, encoder, encoder_fingerprint))
        for line in new.notes:
            (note or _log_note)(line)
        return stored

    def export(self, name: str, out_dir: str | os.PathLike[str]) -> Path:
        """Copy a sound adapter to a new folder `out_dir`, which plain peft loads; returns the folder.

        Raises `ConfigError` when `out_dir` exists and is not an empty folder, otherwise like `get` and `load`.
        """
        adapter = self.get(name)
        problem = self._problem(adapter.name)
        if problem is not None:
            raise AdapterCorruptError(problem.what, fix=problem.fix)
        return copy_out(adapter, path_of("out_dir", out_dir).absolute())

    def with_id(self, adapter_id: str) -> list[Adapter]:
        """The adapters of these weights, by name: one for each name and role they were stored under."""
        return self._folders.catalogue.with_id(adapter_id)

    def has_id(self, adapter_id: str, *, base_fingerprint: str) -> bool:
        """Whether these weights are stored as an adapter of that base; raises `StorageError`."""
        return any(adapter.base_fingerprint == base_fingerprint for adapter in self.with_id(adapter_id))

    def _commit(self, adapter: Adapter, fill: Callable[[Path], None]) -> Adapter:
        """Publish what `fill` writes, or return the same adapter that is there already."""
        while True:  # a commit fails only when another process took the name first: then its folder decides
            stored = self._existing(adapter)
            if stored is not None:
                return stored
            if self._folders.commit(adapter, fill):
                return adapter

    def _refine(self, adapter: Adapter, refine: Refine) -> Adapter:
        """Replace files of a stored adapter by what `refine` makes of it, as it is once nobody else changes it."""

        def make(folder: Path) -> tuple[Adapter, dict[str, bytes]]:
            stored = read_manifest(folder)
            check_not_replaced(stored, adapter)
            return refine(folder, stored)

        refined = self._folders.replace_files(adapter.name, make)
        if refined is None:
            raise self._not_found(adapter.name)
        return refined

    def _existing(self, adapter: Adapter) -> Adapter | None:
        """The stored adapter of the same name, if its weights are the same; raises when they are not."""
        try:
            stored = self._folders.read(adapter.name, read_manifest)
        except AdapterCorruptError as e:
            raise AdapterCorruptError(e.message, fix=f"remove it with `dnd adapters rm {adapter.name}`") from e
        if stored is not None:
            check_same(stored, adapter)
        return stored

    def _automatic_name(self, weights_id: str, role: str | None, base_fingerprint: str) -> str:
        """That of the same adapter if it is stored, else one after its content."""
        alike = self.with_id(weights_id)
        same = next((a.name for a in alike if (a.role, a.base_fingerprint) == (role, base_fingerprint)), None)
        name = default_name(weights_id, role)
        taken = any(a.name == name for a in alike)
        return same or (default_name(weights_id, role, base_fingerprint) if taken else name)

    def _problem(self, name: str) -> Problem | None:
        try:
            self._folders.read(name, check_folder)
        except DndError as e:
            return Problem(name, e.message, e.fix or f"remove it with `dnd adapters rm {name}` and make it again")
        return None

    def _not_found(self, name: str) -> AdapterNotFoundError:
        near = difflib.get_close_matches(str(name), self._folders.names(), n=1)
        fix = f"did you mean {near[0]!r}?" if near else "`dnd adapters ls` lists the adapters there are"
        return AdapterNotFoundError(f"no adapter {shown(name)} in {self.root}", fix=fix)


def _log_note(line: str) -> None:
    log.warning("imported: %s", line)
