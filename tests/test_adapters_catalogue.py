"""What is known of the store without listing it: never other than what its folders say, and cheap to keep so."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from adapter_folders import TINY, everything, listed, store_one
from helpers import random_flat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from routing_parts import ENCODER, task_vectors
from session_parts import Interrupt

from dnd_sdk.adapters import Adapter, AdapterStore, catalogue
from dnd_sdk.adapters.adapter import read_manifest
from dnd_sdk.config import Home
from dnd_sdk.errors import StorageError

ENCODED = {"encoder": "mini", "encoder_fingerprint": ENCODER}


def truth(root: Path) -> dict[str, Adapter]:
    """Every manifest read anew."""
    folders = [p for p in root.iterdir() if not p.name.startswith(".")] if root.exists() else []
    return {p.name: read_manifest(p) for p in folders if (p / "dnd.json").exists()}


class Follower:
    """Knows the store by its changes alone."""

    def __init__(self, home: Home) -> None:
        self.store = AdapterStore(home)
        self._now = 0
        self._known: dict[str, Adapter] = {}

    def known(self) -> dict[str, Adapter]:
        changes = self.store.changes(self._now)
        self._now = changes.now
        merged = ({} if changes.everything else self._known) | changes.adapters
        self._known = {n: a for n, a in merged.items() if a is not None}
        return self._known


NAMES = ("a", "b", "c", "d")
OPS = ("put", "put", "rm", "set", "rename", "copy", "delete", "restart", "ask", "harm journal")


def act(op: str, stores: list[Follower], which: int, name: str, other: str, seed: int, home: Home) -> None:
    store = stores[which].store
    root = store.root
    there = (root / name).exists()
    if op == "put" and not there:
        store_one(
            store, random_flat(TINY, seed=seed), name=name, prompt_hash=f"p{seed % 3}", exemplars=task_vectors(seed)
        )
    elif op == "rm" and there:
        store.rm(name)
    elif op == "set" and there:
        store.set_exemplars(store.get(name), task_vectors(seed, 4))
    elif op == "rename" and there and not (root / other).exists():
        os.rename(root / name, root / other)
    elif op == "copy" and there and not (root / other).exists():
        shutil.copytree(root / name, root / other)
    elif op == "delete" and there:
        shutil.rmtree(root / name)
    elif op == "restart":
        stores[which] = Follower(home)
    elif op == "harm journal" and (journal := root / ".store" / "journal.jsonl").exists():
        data = journal.read_bytes()
        journal.write_bytes((data[: seed % (len(data) + 1)], b"", data + b'{"root": "x"}\n', b"\n" + data)[seed % 4])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(OPS), st.integers(0, 2), st.sampled_from(NAMES), st.sampled_from(NAMES), st.integers(0, 40)
        ),
        max_size=40,
    )
)
def test_whatever_happens_everybody_knows_what_the_folders_say(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, str, str, int]]
) -> None:
    """Property: three processes and a user's own hands at work on one store, the journal damaged in between."""
    home = Home(tmp_path_factory.mktemp("home"))
    stores = [Follower(home) for _ in range(3)]
    for op, which, name, other, seed in steps:
        act(op, stores, which, name, other, seed, home)
        expected = truth(home.adapters)
        assert stores[which].known() == expected
        for prompts in ("p0", "p1"):
            made = [a for n, a in sorted(expected.items()) if a.prompt_hash == prompts]
            assert stores[which].store.made_for(prompts) == made
    expected = truth(home.adapters)
    for follower in stores:
        assert follower.known() == expected == {a.name: a for a in follower.store.ls()}
        for adapter in expected.values():
            assert adapter in follower.store.with_id(adapter.id)


@contextmanager
def calls_to(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[list[str]]:
    """Which adapter folders a function of `os` is called for."""
    seen: list[str] = []
    real = getattr(os, name)

    def counted(path: object = ".", *args: object, **more: object) -> object:
        seen.append(str(path))
        return real(path, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, counted)
        yield seen


@pytest.mark.parametrize("n", [3, 60])
def test_growth_costs_what_is_touched(home: Home, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """However many adapters there are, one more, one less and one other is the same work for everybody."""
    store, other = AdapterStore(home), AdapterStore(home)
    for i in range(n):
        store_one(store, random_flat(TINY, seed=i), name=f"a{i}", exemplars=task_vectors(i), **ENCODED)
    now, reads = max(s.changes(0).now for s in (store, other)), []
    real = catalogue.read_manifest
    monkeypatch.setattr(catalogue, "read_manifest", lambda folder: reads.append(folder) or real(folder))
    with calls_to(monkeypatch, "listdir") as lists, calls_to(monkeypatch, "stat") as stats:
        added = store_one(store, random_flat(TINY, seed=999), name="new", exemplars=task_vectors(9), **ENCODED)
        assert other.changes(now).adapters == {"new": added}
        store.rm("a0")
        refined = store.set_exemplars(store.get("a1"), task_vectors(8))
        changes = other.changes(now)
        assert changes.adapters == {"new": added, "a0": None, "a1": refined} and not changes.everything
        assert store.made_for("none") == [] and other.with_id(added.id) == [added]
    assert reads == [] and str(store.root) not in lists
    assert not {Path(path).parent.name for path in stats} & {f"a{i}" for i in range(2, n)}


def test_what_came_and_went_is_told(home: Home, store: AdapterStore) -> None:
    other = AdapterStore(home)
    store_one(store, name="kept")
    now = other.changes(0).now
    store_one(store, random_flat(TINY, seed=1), name="passing")
    store.rm("passing")
    assert other.changes(now).adapters == {"passing": None}, "an index may have vectors of it"


def test_a_new_process_reads_one_file(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(20):
        store_one(AdapterStore(home), random_flat(TINY, seed=i), name=f"a{i}")
    opened: list[str] = []
    real = builtins.open

    def counting(file: object, *args: object, **more: object) -> object:
        opened.append(str(file))
        return real(file, *args, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(builtins, "open", counting)
    monkeypatch.setattr("dnd_sdk.adapters.catalogue.read_manifest", lambda folder: pytest.fail(f"{folder} is read"))
    assert len(AdapterStore(home).ls()) == 20
    assert opened == [str(home.adapters / ".store" / "journal.jsonl")]


def test_the_journal_is_folded(store: AdapterStore) -> None:
    store_one(store, name="kept")
    for _ in range(400):
        store_one(store, random_flat(TINY, seed=1), name="passing")
        store.rm("passing")
    journal = store.root / ".store" / "journal.jsonl"
    assert len(journal.read_text().splitlines()) < 300 and listed(store.root) == ["kept"]


@pytest.mark.parametrize(
    "harm",
    [
        lambda j: j.unlink(),
        lambda j: j.write_bytes(b""),
        lambda j: j.write_bytes(b"\xff\xfe\n"),
        lambda j: j.write_bytes(j.read_bytes()[:-5]),
        lambda j: j.write_text(j.read_text() + "[]\n"),
        lambda j: j.write_text(j.read_text() + "[" * 100_000 + "\n"),
        lambda j: j.write_text(j.read_text() + '{"name": "../../etc", "root": 1}\n'),
        lambda j: j.write_text(j.read_text() + '{"name": "ghost", "root": 1, "adapter": {}, "file": [1, 2, 3]}\n'),
        lambda j: j.write_text(j.read_text().replace("generated", "imported")),
        lambda j: j.write_text('{"format_version": 99}\n'),
        lambda j: j.write_text(j.read_text() + '{"root": Infinity}\n'),
        lambda j: (j.unlink(), os.mkfifo(j)),
    ],
)
def test_a_damaged_journal_is_written_again(home: Home, store: AdapterStore, harm: Callable[[Path], object]) -> None:
    kept = [store_one(store, random_flat(TINY, seed=i), name=f"a{i}") for i in range(3)]
    journal = store.root / ".store" / "journal.jsonl"
    lines = len(journal.read_text().splitlines())
    harm(journal)
    for each in (store, AdapterStore(home)):
        assert set(each.changes(0).adapters) == {"a0", "a1", "a2"} == {a.name for a in each.ls()}
    assert [store.get(a.name) for a in kept] == kept, "the folders are the truth"
    assert 0 < len(journal.read_text().splitlines()) <= lines + 3


def test_a_store_that_cannot_be_written_to_is_read(home: Home, store: AdapterStore) -> None:
    adapter = store_one(store, name="one")
    shutil.rmtree(store.root / ".store")
    store.root.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        other = AdapterStore(home)
        assert other.ls() == [adapter] and other.changes(0).adapters == {"one": adapter}
        assert other.verify() == []
    finally:
        store.root.chmod(stat.S_IRWXU)


def test_a_fold_that_was_killed_leaves_nothing(home: Home, store: AdapterStore) -> None:
    store_one(store, name="one")
    left = store.root / ".store" / f".journal.jsonl.{'0' * 32}"
    left.write_bytes(b"half")
    assert [a.name for a in AdapterStore(home).ls()] == ["one"] and listed(store.root) == ["one"] and not left.exists()


def test_adapters_of_an_earlier_version_have_no_journal(home: Home, store: AdapterStore) -> None:
    adapter = store_one(store, name="one")
    shutil.rmtree(store.root / ".store")
    assert AdapterStore(home).changes(0).adapters == {"one": adapter}
    lines = [json.loads(line) for line in (store.root / ".store" / "journal.jsonl").read_text().splitlines()]
    assert [line.get("name") for line in lines] == [None, "one", None]


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_what_is_swept_is_never_followed(home: Home, store: AdapterStore, kind: str) -> None:
    store_one(store, name="one")
    elsewhere, left = home.root / "elsewhere", store.root / ".store" / f"set-{'a' * 32}-one"
    elsewhere.mkdir()
    (elsewhere / "mine.txt").write_text("mine")
    if kind == "link":
        left.symlink_to(elsewhere)
    elif kind == "file":
        left.write_text("x")
    else:
        shutil.copytree(elsewhere, left)
    os.utime(left, (1, 1), follow_symlinks=False)
    before = everything(home.adapters / "one")
    assert [a.name for a in AdapterStore(home).ls()] == ["one"] and listed(store.root) == ["one"]
    assert everything(home.adapters / "one") == before and listed(elsewhere) == ["mine.txt"]


def another_by_hand(store: AdapterStore) -> None:
    shutil.copytree(store.root / "one", store.root / "two")


@pytest.mark.parametrize(
    ("step", "what"),
    [
        ("folder_names", another_by_hand),
        ("read_manifest", another_by_hand),
        ("_signature", lambda store: store.rm("one")),
        ("_signature", lambda store: store_one(store, random_flat(TINY, seed=2), name="two")),
    ],
)
def test_after_ctrl_c_in_the_middle_everything_is_looked_at_again(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch, step: str, what: Callable[[AdapterStore], object]
) -> None:
    store_one(store, name="one")
    since = store.changes(0).now
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(catalogue, step, Interrupt(getattr(catalogue, step), KeyboardInterrupt(), after=False))
        what(store)
        store.changes(since)
    changes = store.changes(since)
    assert changes.everything and changes.adapters == truth(store.root)


def test_what_the_disk_refused_once_is_looked_at_again(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store_one(store, name="one")
    since = store.changes(0).now
    another_by_hand(store)
    with monkeypatch.context() as patched:
        refused = Interrupt(None, StorageError("cannot read: Too many open files"), after=False)
        patched.setattr(catalogue, "read_manifest", refused)
        assert store.changes(since).adapters == {}
    assert store.changes(since).adapters.keys() == {"two"}


def test_a_state_folder_that_cannot_be_listed(home: Home, store: AdapterStore) -> None:
    store_one(store, name="one")
    shutil.rmtree(store.root / ".store")
    (store.root / ".store").symlink_to(".store")
    again = AdapterStore(home)
    assert [a.name for a in again.ls()] == ["one"] and again.verify() == []
    with pytest.raises(StorageError, match="store an adapter"):
        store_one(again, random_flat(TINY, seed=2), name="two")


@pytest.mark.parametrize("reached", ["everybody", "machine"])
def test_what_another_machine_hid_is_seen_at_the_next_full_look(
    store: AdapterStore, home: Home, monkeypatch: pytest.MonkeyPatch, reached: str
) -> None:
    now = [0.0]
    monkeypatch.setattr(catalogue.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(catalogue, "reach", lambda folder: reached)
    store_one(store, name="one")
    running = AdapterStore(home)
    assert set(running.changes(0).adapters) == {"one"}
    shutil.copytree(store.root / "one", store.root / "two")
    marked = os.stat(store.root).st_mtime_ns  # as if its writer were killed, and another had marked the root since
    running._folders.catalogue._journal._root_time = marked
    assert set(running.changes(0).adapters) == {"one"}
    now[0] += catalogue.LOOK_S + 1
    assert set(running.changes(0).adapters) == ({"one"} if reached == "everybody" else {"one", "two"})


def test_a_process_whose_view_of_the_disk_lags_sees_all_once_it_catches_up(home: Home, store: AdapterStore) -> None:
    store_one(store, name="one")
    lagging = AdapterStore(home)
    assert set(lagging.changes(0).adapters) == {"one"}
    journal = lagging._folders.catalogue._journal
    end, root_time = journal._lines._end(), journal._time()  # as a mount shows them that keeps attributes for a while
    journal._lines._end, journal._time = lambda: end, lambda: root_time  # type: ignore[method-assign]
    store_one(store, random_flat(TINY, seed=1), name="two")
    assert set(lagging.changes(0).adapters) == {"one"}
    store_one(lagging, random_flat(TINY, seed=2), name="three")
    del journal._lines._end, journal._time
    for one in (lagging, store, AdapterStore(home)):
        assert set(one.changes(0).adapters) == {"one", "two", "three"}
