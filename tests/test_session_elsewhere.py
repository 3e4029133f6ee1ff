"""A session whose base a vLLM server (a stub) runs: adapting, routing and storing are here, answers come from there."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import FakeVllm
from helpers import tiny_tokenizer
from stub_vllm import StubVllm, stub_vllm
from tiny_world import World, prompts_of, save_base

from dnd_sdk.adaptation import made_elsewhere
from dnd_sdk.engine import VllmBackend
from dnd_sdk.errors import BackendError, ConfigError, DndError, LayoutMismatchError, MissingExtraError
from dnd_sdk.models import BaseCard
from dnd_sdk.session import DnD, elsewhere


@pytest.fixture
def stub(world: World) -> Iterator[StubVllm]:
    with stub_vllm(root=str(world.base)) as running:
        yield running


def load_local(world: World, **more: Any) -> DnD:
    given = {"generator": world.generator, "home": world.home, "engine": "vllm-local"}
    return DnD.load(str(world.base), **{**given, **more})


def load(world: World, at: str, **more: Any) -> DnD:
    given = {"generator": world.generator, "home": world.home, "engine": "vllm", "url": at}
    return DnD.load(str(world.base), **{**given, **more})


@pytest.fixture(params=["vllm", "vllm-local"])
def dnd(world: World, stub: StubVllm, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[DnD]:
    """A server, or one in this process that a stand-in has."""
    FakeVllm(stub).install(monkeypatch)
    with load(world, stub.url) if request.param == "vllm" else load_local(world) as session:
        yield session


def test_the_whole_session(dnd: DnD, stub: StubVllm, world: World) -> None:
    assert isinstance(dnd.base, BaseCard) and dnd.base.name == str(world.base) and dnd.engine.local is None
    made = dnd.adapt(prompts_of("upper"), name="upper")
    assert made.decision == "generate" and made.adapter is not None
    assert any("not tried on the base" in note for note in made.notes)
    said = dnd.complete("hi you", adapter="upper")
    assert (said.text, said.adapter, said.decision) == (f"{made.adapter.id[:20]}: hi you", "upper", "reuse")
    assert said.usage == {"prompt_tokens": 5, "completion_tokens": 4} and said.finish_reason == "stop"
    assert dnd.complete("hi").text == "base: hi"
    again = dnd.adapt(prompts_of("upper"))
    assert again.decision == "reuse" and again.adapter == made.adapter
    lower = dnd.adapt(prompts_of("lower")).adapter
    assert lower is not None
    both = dnd.complete_batch(["a", "b", "c"], [made.adapter, None, lower])
    assert [c.text for c in both] == [f"{made.adapter.id[:20]}: a", "base: b", f"{lower.id[:20]}: c"]
    with dnd.stream("one two three", adapter=lower) as stream:
        pieces = list(stream)
        assert len(pieces) > 2 and "".join(pieces) == stream.result.text == f"{lower.id[:20]}: one two three"
    assert dnd.submit("x", "upper").completion(10).adapter == "upper"
    auto = dnd.complete(prompts_of("upper")[0], adapter="auto")
    assert auto.adapter is None and auto.score is not None  # routed; these parts come without thresholds
    dnd.close()
    assert stub.loaded == {} and dnd.complete("hi", adapter="upper").adapter == "upper"


def test_it_observes(dnd: DnD) -> None:
    seen = [dnd.observe(p) for p in prompts_of("digits", 40)]
    made = next(s.adapted for s in seen if s.adapted is not None)
    assert made.adapter is not None
    assert dnd.complete("1 + 1", adapter=seen[-1].adapter).text.startswith(made.adapter.id[:20])


def test_another_process_finds_what_was_stored(dnd: DnD, stub: StubVllm, world: World) -> None:
    made = dnd.adapt(prompts_of("upper"), name="upper").adapter
    assert made is not None
    embedded = world.session()
    assert embedded.adapt(prompts_of("upper")).adapter == made
    stub.restart()
    with load(world, stub.url) as other:
        assert other.complete("hi", adapter="upper").text.startswith(made.id[:20])


@pytest.mark.parametrize("dnd", ["vllm"], indirect=True)
def test_a_kill_is_told_and_the_next_request_succeeds(dnd: DnD, stub: StubVllm) -> None:
    made = dnd.adapt(prompts_of("upper"), name="upper").adapter
    assert made is not None
    stub.gate = threading.Event()
    stream = dnd.stream("hi you there", adapter="upper")
    next(stream)
    stub.stop()
    with pytest.raises(BackendError, match="does not answer to the end"):
        list(stream)
    with pytest.raises(BackendError, match="cannot be reached"):
        dnd.complete("hi", adapter="upper")
    stub.gate = None
    stub.start()
    assert dnd.complete("hi", adapter="upper").text == f"{made.id[:20]}: hi"


def test_an_adaptation_that_the_server_refuses_leaves_nothing(dnd: DnD, stub: StubVllm) -> None:
    stub.max_rank = 1
    with pytest.raises(LayoutMismatchError, match="max_lora_rank"):
        dnd.adapt(prompts_of("upper"))
    assert dnd.store.ls() == [] and dnd.engine.resident() == []
    stub.stop()
    with pytest.raises(BackendError):
        dnd.adapt(prompts_of("upper"))
    assert dnd.store.ls() == []


def test_few_adapters_at_a_time(world: World, stub: StubVllm) -> None:
    with load(world, stub.url, n_slots=1) as dnd:
        made = [dnd.adapt(prompts_of(t), name=t).adapter for t in ("upper", "lower", "digits")]
        assert len(stub.loaded) == 1
        answers = dnd.complete_batch(["a", "b", "c", "d"], ["upper", "lower", "digits", "upper"])
        ids = [m.id[:20] for m in (*made, made[0]) if m is not None]
        assert [c.text.split(":")[0] for c in answers] == ids


def test_folders_of_adapters_that_are_gone_are_removed(world: World, stub: StubVllm) -> None:
    with load(world, stub.url) as dnd:
        for task in ("upper", "lower"):
            dnd.adapt(prompts_of(task), name=task)
    assert len(list(world.home.served.iterdir())) == 2
    dnd.store.rm("upper")
    with load(world, stub.url) as dnd:
        [left] = world.home.served.iterdir()
        assert left.name == f"dnd-{dnd.store.get('lower').id[:16]}"


def test_what_was_compared_is_said(world: World, stub: StubVllm, tmp_path: Path) -> None:
    def told() -> str:
        lines: list[str] = []
        load(world, stub.url, progress=lines.append)
        return next(line for line in lines if "vLLM" in line)

    assert "vLLM 0.stub" in told() and "from the folder that holds" in told()
    stub.root = "somewhere/else"
    assert "does not tell how it splits a text" in told()
    stub.tokens = lambda text: list(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])
    assert "splits a text as" in told() and "weights cannot be seen" in told()
    stub.tokens = lambda text: [1, 2, 3]
    with pytest.raises(LayoutMismatchError, match="serves another base"):
        told()


def test_a_folder_of_the_home_is_known_where_the_server_sees_it(world: World, stub: StubVllm) -> None:
    shutil.copytree(world.base, world.home.models / "mine")
    card = BaseCard(str(world.home.models / "mine"), "f")
    with load(world, stub.url) as dnd:
        for root, same in (("/mnt/dnd/models/mine", True), ("/mnt/dnd/models/other", False), (card.name, False)):
            stub.root = root
            engine = VllmBackend(stub.url, dnd.layout, world.home.served)
            words = elsewhere.check_served(engine, card, world.home, "/mnt/dnd")
            assert ("from the folder that holds" in words) == same


def test_one_in_this_process_gets_the_bases_folder_and_what_was_asked(
    world: World, stub: StubVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, told = FakeVllm(stub), list[str]()
    fake.install(monkeypatch)
    more = {"dtype": "bfloat16", "n_slots": 5, "vllm_args": "--max-model-len 99", "progress": told.append}
    with load_local(world, **more) as dnd:
        [options] = fake.options
        assert (options.model, options.dtype, options.max_model_len) == (str(world.base), "bfloat16", 99)
        assert options.max_cpu_loras == 5 and dnd.engine.local is None
    assert any("starting vLLM" in line for line in told) and any("from the folder that holds" in line for line in told)


def test_nothing_to_compare_with(world: World, stub: StubVllm) -> None:
    stub.root = "somewhere/else"
    with load(world, stub.url, progress=print) as dnd:
        words = elsewhere.check_served(dnd.engine, BaseCard("owner/model", "f"), world.home)  # type: ignore[arg-type]
    assert "was not checked: none of its files are here" in words


def test_without_a_generator_the_base_is_read_once(world: World, stub: StubVllm) -> None:
    made = world.session().adapt(prompts_of("upper"), name="upper").adapter
    assert made is not None
    told: list[str] = []
    with load(world, stub.url, generator=None, r=4, progress=told.append) as dnd:
        assert dnd.generator is None and dnd.base.fingerprint == made.base_fingerprint
        assert dnd.complete("hi", adapter="upper").text.startswith(made.id[:20])
        assert dnd.adapt(prompts_of("lower")).decision == "base"
    assert any("once" in line for line in told)


def test_a_generator_of_another_base_is_refused(world: World, stub: StubVllm, tmp_path: Path) -> None:
    with pytest.raises(LayoutMismatchError, match="made for another base than 'smollm2-135m'"):
        DnD.load("smollm2-135m", world.generator, home=world.home, engine="vllm", url=stub.url)
    other = save_base(tmp_path / "other", seed=5)
    with load(world, stub.url) as dnd:
        assert made_elsewhere(dnd.store, dnd.base) is None and other.is_dir()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"engine": "magic"}, "engine must be one of embedded, vllm, vllm-local"),
        ({"engine": "vllm", "url": None}, "needs the url"),
        ({"engine": "vllm", "url": "nowhere"}, "url must be like"),
        ({"engine": "embedded"}, "url is for the engine vllm"),
        ({"dtype": "float32"}, "dtype is up to the vLLM server"),
        ({"deterministic": True}, "deterministic is for the embedded engine"),
        ({"engine": "vllm-local"}, "url is for the engine vllm"),
        ({"vllm_args": "--x"}, "vllm_args is for the engine vllm-local"),
        ({"engine": "vllm-local", "url": None, "vllm_args": ""}, "vllm_args must be"),
        ({"engine": "vllm-local", "url": None, "deterministic": True}, "deterministic is for the embedded engine"),
        ({"n_slots": 0}, "n_slots must be 1 or more"),
        ({"key": 5}, "key must be"),
        ({"shared": ""}, "shared must be a path"),
    ],
)
def test_options_that_contradict_each_other(world: World, stub: StubVllm, given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(world, stub.url, **given)


def test_without_vllm_nothing_is_fetched_for_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(elsewhere, "load_base", lambda *_, **__: pytest.fail("the base was read"))
    with pytest.raises(MissingExtraError, match="needs vLLM"):
        load_local(world, generator=None)
    with pytest.raises(MissingExtraError, match="needs vLLM"):
        DnD.load("qwen2.5-coder-0.5b", home=world.home, engine="vllm-local")
    assert not world.home.models.exists()


def test_a_server_that_is_not_there(world: World) -> None:
    with pytest.raises(DndError, match="cannot be reached"):
        load(world, "http://127.0.0.1:9")
