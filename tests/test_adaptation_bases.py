"""Adapters of two bases in one home: none is offered to the other base, and whoever asks is told whose it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_runner import dnd, dnd_json
from session_parts import state
from tiny_world import prompts_of
from two_bases import install_bases

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, GeneratorError, LayoutMismatchError, StorageError
from dnd_sdk.generator import Generator
from dnd_sdk.models import DEFAULT_BASE, SMALL_BASE
from dnd_sdk.session import DnD

UPPER, LOWER = prompts_of("upper"), prompts_of("lower")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        yield install_bases(tmp_path_factory.mktemp("bases"), patch).models


@pytest.fixture
def home(models: Path, home: Home) -> Home:
    """A home of this test's own with both bases; `DND_HOME` is this one, too."""
    home.root.mkdir()
    home.models.symlink_to(models, target_is_directory=True)
    return home


@pytest.fixture
def old(home: Home) -> Home:
    """As the release before left it: `tickets` and `cats`, of what was the default base then."""
    with DnD.load(SMALL_BASE, home=home) as session:
        session.adapt(UPPER, name="tickets")
        session.adapt(LOWER, name="cats")
    return home


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(UPPER))
    return path


def refused(call: Callable[[], Any]) -> None:
    """`call` says in a line what `tickets` was made for, and in one how to use it."""
    with pytest.raises(LayoutMismatchError, match="'tickets' was made for another base model, smollm2-135m: ") as error:
        call()
    assert error.value.fix == "load the base it was made for, --base smollm2-135m; or adapt again on this one"


def test_the_same_prompts_have_an_adapter_for_each_base(home: Home) -> None:
    made = {}
    for base in (SMALL_BASE, DEFAULT_BASE, SMALL_BASE, DEFAULT_BASE):
        with DnD.load(base, home=home) as session:
            result = session.adapt(UPPER)
            assert result.decision == ("reuse" if base in made else "generate")
            assert made.setdefault(base, result.adapter) == result.adapter
            routed = session.route(UPPER)
            assert [name for name, _ in routed.neighbours] == [result.adapter.name]
            assert session.adapt(UPPER, mode="merge").adapter == result.adapter  # nothing else to merge with
            assert session.adapt(UPPER, mode="reuse").adapter == result.adapter
    small, large = made.values()
    # the tiny generators give both the same weights: not even these are shared
    assert small.base_fingerprint != large.base_fingerprint and small.name != large.name and small.id == large.id
    assert len(list(home.index.glob("*/"))) == 2 and [a.name for a in session.store.ls()] == sorted(
        (small.name, large.name)
    )


def test_an_adapter_of_the_other_base_is_refused_by_every_call(old: Home) -> None:
    with DnD.load(home=old) as session:
        assert session.base.name == DEFAULT_BASE
        own, tickets = session.adapt(["one", "two"], name="own").adapter, session.store.get("tickets")
        session.engine.forget(own.id)
        before = state(session)
        refused(lambda: session.complete("hi", adapter="tickets"))
        refused(lambda: session.complete("hi", adapter=tickets))
        refused(lambda: session.complete_batch(["hi", "hi"], ["own", "tickets"]))
        refused(lambda: session.stream("hi", adapter="tickets"))
        refused(lambda: session.make_resident(tickets))
        refused(lambda: session.store.load(tickets, session.layout, base_fingerprint=session.base.fingerprint))
        assert state(session) == before and session.engine.bank.resident() == []
        assert session.complete("hi", adapter="own", max_new_tokens=2).adapter == "own"


def test_llamaindex_refuses_it_too_and_takes_the_base_by_name(old: Home) -> None:
    llamaindex = pytest.importorskip("dnd_sdk.integrations.llamaindex")
    refused(lambda: llamaindex.DnDLLM(max_new_tokens=2).complete("hi", adapter="tickets"))
    small = llamaindex.DnDLLM(base=SMALL_BASE, max_new_tokens=2)
    assert small.complete("hi", adapter="tickets").raw["dnd"]["adapter"] == "tickets"


def test_the_same_weights_of_another_base_are_not_taken_for_ones_own(home: Home) -> None:
    with DnD.load(SMALL_BASE, home=home) as session:
        flat, layout = session.generator.mean(), session.layout
    with DnD.load(home=home) as session:
        made = [
            session.store.put(flat, layout, base_name=base, base_fingerprint=f, source="trained")
            for base, f in ((DEFAULT_BASE, session.base.fingerprint), (SMALL_BASE, "other"))
        ]
        assert made[0].id == made[1].id and made[1].name.startswith(f"{made[0].name}-")
        session.make_resident(made[0])
        for call in (session.make_resident, lambda adapter: session.complete("hi", adapter=adapter.name)):
            with pytest.raises(LayoutMismatchError, match="another base model, smollm2-135m"):
                call(made[1])


def test_a_name_of_the_other_base_is_said_to_be_taken_before_anything_is_made(
    old: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = r"named 'tickets' with another base, smollm2-135m, exists\n  fix: choose another --name, use that one with "
    with DnD.load(home=old) as session:
        session.adapt(UPPER, name="own")
        before = state(session)
        session.store.export("own", tmp_path / "out")
        with pytest.raises(ConfigError, match=taken):
            session.import_adapter(tmp_path / "out", name="tickets")
        monkeypatch.setattr(Generator, "generate", lambda *_: pytest.fail("made for nothing"))
        for mode in ("auto", "generate"):
            with pytest.raises(ConfigError, match=taken + "--base smollm2-135m or `dnd adapters rm tickets`"):
                session.adapt(["another", "job"], name="tickets", mode=mode)
        assert session.adapt(UPPER, name="tickets").adapter.name == "own", "nothing is made, the name is not needed"
        assert state(session) == before


def test_an_exported_adapter_of_the_other_base_is_not_imported(old: Home, tmp_path: Path) -> None:
    with DnD.load(home=old) as session:
        session.store.export("tickets", tmp_path / "tickets")
        refused(lambda: session.import_adapter(tmp_path / "tickets", name="mine"))
        assert [a.name for a in session.store.ls()] == ["cats", "tickets"]


# ---- a home of the release before ------------------------------------------------------------------------------------

NOTE = "this home has 2 adapters for smollm2-135m: --base smollm2-135m uses them"
ONE = "this home has 1 adapter for smollm2-135m: --base smollm2-135m uses it"


def test_an_old_home_keeps_its_adapters_and_says_how_to_use_them(old: Home, prompts: Path) -> None:
    assert dnd("adapters", "ls", "-q").stdout == "cats\ntickets\n"
    routed = dnd("route", UPPER[0])
    assert routed.stdout == "base\n" and routed.stderr.count(f"{NOTE}\n") == 1
    assert f"{NOTE}\n" in dnd("run", UPPER[0], "--max-new-tokens", 2).stderr
    assert NOTE not in dnd("route", UPPER[0], "-q").stderr
    made = dnd("adapt", prompts, "--name", "own")
    assert made.stderr.count(f"{NOTE}\n") == 1 and "decision: generate" in made.stdout
    for command in (["route", UPPER[0]], ["adapt", prompts]):  # it has its own now
        assert NOTE not in dnd(*command).stderr
    small = dnd("adapt", prompts, "--base", SMALL_BASE)
    assert "adapter:  tickets" in small.stdout and NOTE not in small.stderr
    assert dnd("adapters", "verify").stdout == "3 adapters are whole\n"


def told_on_loading(home: Home) -> list[str]:
    told: list[str] = []
    DnD.load(home=home, progress=told.append).close()
    return told


def test_a_program_is_told_on_loading(old: Home, caplog: pytest.LogCaptureFixture) -> None:
    assert told_on_loading(old) == [NOTE] and NOTE not in caplog.messages
    DnD.load(home=old).close()
    assert caplog.messages.count(NOTE) == 1
    caplog.clear()
    DnD.load(SMALL_BASE, home=old).close()
    assert NOTE not in caplog.messages


def test_one_is_told_of_as_one_and_a_base_that_is_not_embedded_not_at_all(old: Home) -> None:
    with DnD.load(home=old) as session:
        session.store.rm("cats")
        assert told_on_loading(old) == [ONE]
        flat = session.generator.mean()
        session.store.rm("tickets")
        session.store.put(flat, session.layout, base_name="mine", base_fingerprint="f", source="trained", name="cats")
        assert told_on_loading(old) == []


def test_a_store_that_cannot_be_listed_does_not_keep_a_session_from_loading(
    old: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise StorageError("the disk is gone")

    monkeypatch.setattr(AdapterStore, "changes", failing)
    assert told_on_loading(old) == []


def test_run_says_whose_a_named_adapter_is_before_it_loads_anything(old: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DnD, "load", lambda *_, **__: pytest.fail("loaded for nothing"))
    for command in (["run", "hi"], ["chat"]):
        error = dnd_json(*command, "-a", "tickets", code=1)["error"]
        assert error["type"] == "LayoutMismatchError" and "another base model, smollm2-135m:" in error["message"]
        assert "--base smollm2-135m" in error["fix"]


def test_chat_does_not_switch_to_it(old: Home) -> None:
    said = dnd("chat", "--max-new-tokens", 2, stdin="/adapter tickets\nhi\n")
    assert said.stderr.count("another base model, smollm2-135m") == 1 and f"{NOTE}\n" in said.stderr
    assert dnd_json("chat", "--max-new-tokens", 2, stdin="/adapter tickets\nhi\n")["adapter"] is None
    switched = dnd_json("chat", "--base", SMALL_BASE, "--max-new-tokens", 2, stdin="/adapter tickets\nhi\n")
    assert switched["adapter"] == "tickets"


def test_ls_shows_the_base_and_lists_those_of_one(old: Home, tmp_path: Path) -> None:
    assert "smollm2-135m" in dnd("adapters", "ls").stdout
    with DnD.load(home=old) as session:
        session.adapt(UPPER, name="own")
    listed = {a["name"]: a["base"] for a in dnd_json("adapters", "ls")["adapters"]}
    assert listed == {"cats": SMALL_BASE, "own": DEFAULT_BASE, "tickets": SMALL_BASE}
    assert dnd("adapters", "ls", "-q", "--base", SMALL_BASE).stdout == "cats\ntickets\n"
    assert [a["name"] for a in dnd_json("adapters", "ls", "--base", DEFAULT_BASE)["adapters"]] == ["own"]
    assert dnd_json("adapters", "show", "own")["adapter"]["base"] == DEFAULT_BASE
    none = dnd("adapters", "ls", "--base", "nobodys")
    assert none.exit_code == 0 and none.stdout == (
        "no adapters for nobodys; there are adapters for qwen2.5-coder-0.5b, smollm2-135m; "
        "make one with: dnd adapt PROMPTS --base nobodys\n"
    )
    assert dnd_json("adapters", "ls", "--base", "nobodys")["adapters"] == []


def test_ls_knows_a_base_by_its_weights_whatever_it_was_called(old: Home, models: Path) -> None:
    with DnD.load(str(models / SMALL_BASE), home=old) as session:  # an embedded one by its folder
        session.adapt(["one", "two"], name="by-path")
    with DnD.load(home=old) as session:  # the same base under two names
        for name, base in (("a", "./mine"), ("b", "/abs/mine")):
            flat = session.generator.mean() * (1.0 + len(base))
            session.store.put(flat, session.layout, base_name=base, base_fingerprint="f", source="trained", name=name)
    assert dnd("adapters", "ls", "-q", "--base", SMALL_BASE).stdout == "by-path\ncats\ntickets\n"
    for base in ("./mine", "/abs/mine"):
        assert dnd("adapters", "ls", "-q", "--base", base).stdout == "a\nb\n"
    (old.adapters / "a" / "adapter_config.json").write_text("[]")
    assert {a["name"]: a["base"] for a in dnd_json("adapters", "ls")["adapters"]}["a"] is None


# ---- how a base is named ---------------------------------------------------------------------------------------------


def test_every_way_to_name_a_base_reaches_it(old: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DnD.load(SMALL_BASE) as session:
        assert session.base.name == SMALL_BASE and session.generator.config.base_name == SMALL_BASE
    asked = ("run", "hi", "-a", "tickets", "--max-new-tokens", 2)
    assert dnd_json(*asked, "--base", SMALL_BASE)["adapter"] == "tickets"
    with monkeypatch.context() as patch:
        patch.setenv("DND_BASE", SMALL_BASE)
        assert dnd_json(*asked)["adapter"] == "tickets"
    monkeypatch.chdir(tmp_path)
    Path("dnd.toml").write_text(f'base = "{SMALL_BASE}"\n')
    assert dnd_json(*asked)["adapter"] == "tickets"
    assert dnd_json(*asked, "--base", DEFAULT_BASE, code=1)["error"]["type"] == "LayoutMismatchError"


def test_a_base_without_a_generator_says_what_can_be_done(
    home: Home, models: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dnd_sdk.generator import finding

    own = finding.SHIPPED / SMALL_BASE
    monkeypatch.setattr(finding, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "one").symlink_to(own, target_is_directory=True)
    ways = (
        "train one with `dnd train generator` and give its folder as --generator, import an adapter with "
        "`dnd adapters import`, or use a --base that has one: smollm2-135m"
    )
    with DnD.load(encoder=str(models.parent.parent / "encoder"), home=home) as session:
        assert session.generator is None and session.route(UPPER).adapter is None
        with pytest.raises(GeneratorError, match=r"no generator for qwen2\.5-coder-0\.5b") as error:
            session.adapt(UPPER, mode="generate")
        assert error.value.fix == ways
        result = session.adapt(UPPER)
        assert (result.decision, result.notes) == ("base", (f"to have an adapter: {ways}",))
        assert session.adapt(UPPER, mode="reuse").notes == ()
    said = dnd("adapt", prompts, "--encoder", models.parent.parent / "encoder")
    assert said.exit_code == 0 and f"note: to have an adapter: {ways}\n" in said.stderr
