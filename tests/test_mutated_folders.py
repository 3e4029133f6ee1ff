"""Whatever a folder holds: an adapter or a short error of ours, in bounded time, and the engine is what it was."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
from helpers import tiny_model
from mutated_folders import MUTATIONS, PICKLED, WEIGHTS, mutated_folders
from safetensors.torch import load_file
from tiny_world import World, prompts_of

from dnd_sdk.errors import DndError
from dnd_sdk.session import DnD

N = 540
CPU_S, WAIT_S = 5.0, 60.0
"""Working longer than that is a hang, and so is waiting (on a pipe) that long on the busiest machine."""
IDS = torch.tensor([[5, 9, 40, 77, 130, 200]])


@contextmanager
def no_hang(what: str) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"{what}: not done after {CPU_S} s of work or {WAIT_S} s")

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, CPU_S), (signal.ITIMER_REAL, signal.SIGALRM, WAIT_S))
    before = [signal.signal(number, stop) for _, number, _ in timers]
    try:
        for timer, _, seconds in timers:
            signal.setitimer(timer, seconds)
        yield
    finally:
        for (timer, number, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def sources(dnd: DnD, root: Path) -> list[Path]:
    """What gets mutated: a folder of peft, the same with a pickle, and one this store exported."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny_model(), config).save_pretrained(root / "peft")
    peft.get_peft_model(tiny_model(), config).save_pretrained(root / "pickle")
    torch.save(load_file(root / "pickle" / WEIGHTS), root / "pickle" / PICKLED)
    (root / "pickle" / WEIGHTS).unlink()
    dnd.adapt(prompts_of("upper"), name="upper")
    dnd.store.export("upper", root / "exported")
    for folder in root.iterdir():
        (folder / "README.md").unlink(missing_ok=True)  # nobody reads it
    return [root / "peft", root / "pickle", root / "exported"]


def logits(dnd: DnD, adapter_id: str | None) -> torch.Tensor:
    with torch.no_grad(), dnd.engine.running([adapter_id]):
        return dnd.base.model(input_ids=IDS).logits.clone()


def try_import(dnd: DnD, folder: Path) -> str:
    """Import, use and remove; the outcome as one word."""
    notes: list[str] = []
    try:
        adapter = dnd.import_adapter(folder, name="mutated", note=notes.append)
    except DndError as e:
        assert e.message and len(str(e).encode()) < 2000, str(e)[:4000]
        return type(e).__name__
    assert all(len(note.encode()) < 2000 for note in notes)
    dnd.make_resident(adapter)
    assert torch.isfinite(logits(dnd, adapter.id)).all()
    dnd.store.rm("mutated")
    return "imported"


def test_no_folder_does_harm(world: World, tmp_path: Path) -> None:
    dnd = world.session()
    (tmp_path / "in").mkdir()
    folders = sources(dnd, tmp_path / "in")
    upper = dnd.store.get("upper")
    dnd.make_resident(upper)
    before = logits(dnd, None), logits(dnd, upper.id)
    outcomes: Counter[str] = Counter()
    for kind, folder in mutated_folders(folders, tmp_path, N):
        try:
            with no_hang(kind):
                outcomes[try_import(dnd, folder)] += 1
        except Exception as e:
            raise AssertionError(f"{kind}: {type(e).__name__}: {str(e)[:1000]}") from e
    dnd.make_resident(upper)
    assert all(map(torch.equal, before, (logits(dnd, None), logits(dnd, upper.id))))
    assert [a.name for a in dnd.store.ls()] == ["upper"] and dnd.store.verify() == []
    assert sum(outcomes.values()) == N >= 500 and len(MUTATIONS) * 3 <= N, "every kind of every source"
    assert outcomes["imported"] > N // 20 and outcomes["AdapterCorruptError"] > N // 3, outcomes
    assert not outcomes["StorageError"], "a damaged file is no fault of the disk"
