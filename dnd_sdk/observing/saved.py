"""The saved state of a `PromptStream`: a JSON file of clusters and a safetensors file of their sums and embeddings.

* The tensors' file is named by its hash and written first; the JSON file that names it is replaced last. A crash in
  between leaves the state that was there before.
* Processes that share a home take turns by a lock on its folder; the last to write wins whole.
* State that is damaged or of another encoder is moved aside, not overwritten: it holds someone's prompts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch  # noqa: TID253 - row 4 shares torch
from safetensors.torch import save
from torch import Tensor  # noqa: TID253

from dnd_sdk.errors import DndError, StorageError
from dnd_sdk.files import locked, open_safetensors, read_json, storage_errors, write_atomic
from dnd_sdk.observing.prompt_stream import Choice, Cluster, PromptStream, StreamSettings
from dnd_sdk.routing import check_vectors

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
STATE_FILE = "stream.json"
TENSORS = "stream-{}.safetensors"
MAX_BYTES = 512 * 2**20
"""Of either file; far above what the default bounds allow."""
LOCK_TIMEOUT_S = 10.0
_COUNTS = ("id", "n", "used", "chosen_at")
_DECISIONS = ("reuse", "generate", "base")


def save_stream(stream: PromptStream, folder: Path, *, encoder: str) -> None:
    """Write the state; `encoder` is the fingerprint its embeddings come from. Raises `StorageError`."""
    with stream.lock:
        vectors = [v for c in stream.clusters for v in c.vectors]
        tensors = {} if stream.sums is None or not vectors else {"sums": stream.sums, "vectors": torch.stack(vectors)}
        data = save({name: t.contiguous() for name, t in tensors.items()})
        digest = hashlib.sha256(data).hexdigest()
        state = {
            "format_version": FORMAT_VERSION,
            "encoder": encoder,
            "sha256": digest,
            "next_id": stream.next_id,
            "seen": stream.seen,
            "clusters": [_record(c) for c in stream.clusters],
        }
        text = json.dumps(state)
    with storage_errors("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
        _replace_saved(folder, text, data, TENSORS.format(digest[:16]))


def _replace_saved(folder: Path, state: str, data: bytes, data_name: str) -> None:
    with locked(folder, wait=LOCK_TIMEOUT_S):
        write_atomic(folder / data_name, data)
        write_atomic(folder / STATE_FILE, state)
        for old in folder.glob(TENSORS.format("*")):
            if old.name != data_name:
                old.unlink(missing_ok=True)


def load_stream(folder: Path, settings: StreamSettings | None = None, *, encoder: str) -> PromptStream:
    """The saved stream; a new one when there is none, or it is unusable: then that is moved aside with a warning."""
    try:
        with storage_errors("read", folder), locked(folder, wait=LOCK_TIMEOUT_S):
            if not (folder / STATE_FILE).exists():
                return PromptStream(settings)
            try:
                return _read(folder, settings, encoder)
            except (DndError, ValueError, KeyError, TypeError, AttributeError) as e:
                if isinstance(e, StorageError):
                    raise
                aside = _set_aside(folder)
                log.warning("the saved prompt stream is not usable (%s); kept in %s, starting anew", _short(e), aside)
    except StorageError as e:
        log.warning("the saved prompt stream cannot be read (%s), starting anew", _short(e))
    return PromptStream(settings)


def _record(c: Cluster) -> dict[str, Any]:
    choice = None if c.choice is None else c.choice._asdict()
    return {**{name: getattr(c, name) for name in _COUNTS}, "prompts": c.prompts, "choice": choice}


def _read(folder: Path, settings: StreamSettings | None, encoder: str) -> PromptStream:
    state = read_json(folder, STATE_FILE, MAX_BYTES)
    if (state["format_version"], state["encoder"]) != (FORMAT_VERSION, encoder):
        raise ValueError("it is of another encoder or version")
    digest = str(state["sha256"])
    if len(digest) != 64 or not digest.isalnum():
        raise ValueError("its sha256 is not one")
    sums, vectors = _tensors(folder, TENSORS.format(digest[:16]), digest)
    stream = PromptStream(settings)
    stream.next_id, stream.seen = _count(state["next_id"]), _count(state["seen"])
    rows = list(vectors)
    for record in state["clusters"]:
        prompts = record["prompts"]
        own, rows = rows[: len(prompts)], rows[len(prompts) :]
        stream.clusters.append(_cluster(record, own, stream))
    if rows or len({c.id for c in stream.clusters}) != len(sums) or len(stream.clusters) != len(sums):
        raise ValueError("its clusters and tensors do not match")
    stream.sums = sums if len(sums) else None
    _fit(stream)
    return stream


def _tensors(folder: Path, name: str, digest: str) -> tuple[Tensor, Tensor]:
    """Sums `(clusters, C)` and embeddings `(prompts, C)`, checked; both empty for an empty stream."""
    with storage_errors("read", folder / name), open_safetensors(folder, name, MAX_BYTES) as f:
        kinds = {key: (info.dtype, len(info.shape)) for key, info in f.header.items()}
        if kinds not in ({}, {"sums": ("F32", 2), "vectors": ("F32", 2)}):
            raise ValueError(f"its tensors are {str(kinds)[:100]}")
        tensors = {key: torch.from_numpy(f.array(key)) for key in f.header}
        found = f.sha256()
    if found != digest:
        raise ValueError("its two files do not belong together")
    if not tensors:
        return torch.empty(0, 0), torch.empty(0, 0)
    if not torch.isfinite(tensors["sums"]).all():
        raise ValueError("its sums hold NaN or inf")
    return tensors["sums"], check_vectors(tensors["vectors"], tensors["sums"].shape[1])


def _cluster(record: dict[str, Any], vectors: list[Tensor], stream: PromptStream) -> Cluster:
    counts = {name: _count(record[name]) for name in _COUNTS}
    prompts, choice = record["prompts"], record["choice"]
    if not prompts or len(vectors) != len(prompts) or not all(isinstance(p, str) for p in prompts):
        raise ValueError("a cluster's prompts and embeddings do not match")
    if counts["n"] < len(prompts) or counts["id"] >= stream.next_id or counts["used"] > stream.seen:
        raise ValueError(f"cluster {counts['id']} contradicts itself")
    # clones: rows of one tensor would keep all of it in memory
    return Cluster(**counts, prompts=prompts, vectors=[v.clone() for v in vectors], choice=_choice(choice))


def _choice(record: dict[str, Any] | None) -> Choice | None:
    if record is None:
        return None
    choice = Choice(**record)
    named = isinstance(choice.adapter_id, str)
    if choice.decision not in _DECISIONS or named != (choice.decision != "base") or not isinstance(choice.final, bool):
        raise ValueError("a cluster's choice is not one")
    return choice


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{str(value)[:20]!r} is not a count")
    return value


def _fit(stream: PromptStream) -> None:
    """Keep within settings that may be smaller than those it was saved under."""
    kept = stream.settings.max_prompts
    for c in stream.clusters:
        del c.prompts[kept:], c.vectors[kept:]
    stream.evict()


def _set_aside(folder: Path) -> Path:
    aside = folder.with_name(f"{folder.name}.unusable")
    with storage_errors("move", folder):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        # the folder itself stays, others wait for its lock; the state's file goes first: a crash leaves no half of it
        for file in sorted(folder.iterdir(), reverse=True):
            os.replace(file, aside / file.name)
    return aside


def _short(error: Exception) -> str:
    return str(error)[:200]
