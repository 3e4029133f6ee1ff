"""Whatever a caller passes to a public call: a result of the right kind, or a `DndError` of a readable length."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from llama_index.core.base.llms.types import ChatResponse, CompletionResponse
from tiny_world import World, prompts_of

from dnd_sdk.adaptation import AdaptResult
from dnd_sdk.adapters import Adapter
from dnd_sdk.config import SAMPLING, Home
from dnd_sdk.errors import DndError
from dnd_sdk.integrations.llamaindex import DnDLLM
from dnd_sdk.integrations.smolagents import DnDModel
from dnd_sdk.observing import ObserveResult
from dnd_sdk.routing import RouteDecision
from dnd_sdk.session import Completion, DnD

HALF = "half \ud83e of a pair"
TEXT = st.one_of(
    st.text(st.characters(), max_size=12), st.sampled_from([HALF, "", " ", "\0", "x" * 5_000, "auto", "a"])
)
NUMBERS = st.one_of(st.integers(), st.floats(), st.booleans(), st.sampled_from([10**400, -(10**400), 5e-324, 1e-40]))
ODD = st.builds(object) | st.sampled_from([int, len, np.float32("nan"), np.array([1, 2]), np.array("x"), 1j, range(3)])
LEAF = st.one_of(st.none(), NUMBERS, TEXT, st.binary(max_size=4), ODD)
CHAT = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "name"]), LEAF, max_size=3), max_size=2
)
ANYTHING = st.one_of(
    LEAF,
    CHAT,
    st.lists(LEAF, max_size=3),
    st.lists(TEXT, max_size=3).map(tuple),
    st.dictionaries(TEXT, LEAF, max_size=2),
    st.sets(st.integers(), max_size=2),
    st.lists(LEAF, max_size=3).map(iter),
    st.lists(st.lists(LEAF, max_size=2), max_size=2),
)

Calls = dict[str, tuple[Callable[..., Any], dict[str, Any], type]]
LIMIT = 2_000
"""Characters of a message."""


@pytest.fixture(scope="module")
def dnd(tiny_folders: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DnD]:
    session = tiny_folders._replace(home=Home(tmp_path_factory.mktemp("options"))).session()
    session.adapt(prompts_of("lower"), name="a")
    session.store.export("a", tmp_path_factory.mktemp("out") / "a")
    yield session
    session.close()


def answered(dnd: DnD, **how: Any) -> Completion:
    with dnd.stream(**how) as stream:
        return stream.result


ASKED = {"prompt": "hi", "adapter": None, "role": None, "tools": None, **dict.fromkeys(SAMPLING)} | {
    "max_new_tokens": 2,
    "temperature": 1.0,
    "top_p": 0.9,
    "top_k": 3,
    "stop": (),
}
BATCH = {"prompts": ["hi", "there"], "adapters": None, "role": None, "tools": None, "max_new_tokens": 1}
ADAPT = {"prompts": ["hi"], "mode": "reuse", "name": None, "role": None, "top_k": 3, "calibrate": None}
CALLS: Calls = {
    "complete": (DnD.complete, ASKED, Completion),
    "stream": (answered, ASKED | {"cancel": None}, Completion),
    "batch": (DnD.complete_batch, BATCH, list),
    "adapt": (DnD.adapt, ADAPT, AdaptResult),
    "route": (DnD.route, {"prompts": ["hi"], "role": None}, RouteDecision),
    "observe": (DnD.observe, {"prompt": "hi"}, ObserveResult),
    "import": (DnD.import_adapter, {"folder": "nowhere", "name": None, "prompts": None}, Adapter),
    "get": (lambda dnd, **how: dnd.store.get(**how), {"name_or_id": "a"}, Adapter),
    "verify": (lambda dnd, **how: dnd.store.verify(**how), {"name": "a"}, list),
    "export": (lambda dnd, **how: dnd.store.export(**how), {"name": "nothing", "out_dir": "nowhere"}, Path),
}
ARGUMENTS = [(call, name) for call, (_, how, _) in CALLS.items() for name in how]
MANY = settings(
    max_examples=60,
    deadline=20_000,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def right_or_refused(call: Callable[..., Any], how: dict[str, Any], kind: type) -> None:
    try:
        assert isinstance(call(**how), kind)
    except DndError as e:
        assert len(str(e)) < LIMIT and str(e).encode()


@pytest.mark.parametrize(("call", "argument"), ARGUMENTS, ids=lambda p: p)
@MANY
@given(value=ANYTHING)
@example(value=5)
@example(value=HALF)
@example(value=[HALF])
@example(value="x" * 100_000)
@example(value=["x" * 100_000])
@example(value=[{"role": "user", "content": HALF}])
@example(value=10**400)
def test_any_argument_gives_a_right_result_or_an_error_of_ours(
    dnd: DnD, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str, argument: str, value: object
) -> None:
    monkeypatch.chdir(tmp_path)
    made, how, kind = CALLS[call]
    right_or_refused(lambda **given: made(dnd, **given), how | {argument: value}, kind)


LOAD = {"n_slots": 2, "generator": None, "encoder": None, "device": "cpu", "dtype": "auto", "progress": None}
WRONG = [5, 2.5, True, None, b"x", [], ["cpu"], {}, object(), "", "\0", HALF, "x" * 5_000, 0, -1, 10**400]


@pytest.mark.parametrize("argument", [*LOAD, "base", "home", "calibrate"])
def test_any_argument_of_load(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, argument: str) -> None:
    monkeypatch.chdir(tmp_path)
    how = LOAD | {
        "base": str(world.base),
        "encoder": str(world.encoder),
        "home": world.home,
        "generator": world.generator,
    }
    for value in WRONG:
        right_or_refused(DnD.load, how | {argument: value}, DnD)


@MANY
@given(name=st.sampled_from([*SAMPLING, "adapter"]), value=ANYTHING)
def test_integrations_refuse_as_the_library_does(dnd: DnD, name: str, value: object) -> None:
    right_or_refused(lambda: DnDLLM(dnd, **{"adapter": None, name: value}), {}, DnDLLM)
    right_or_refused(lambda: DnDModel(dnd, **{"adapter": None, name: value}), {}, DnDModel)
    llm = DnDLLM(dnd, adapter=None, max_new_tokens=1)
    right_or_refused(lambda: llm.complete("hi", **{name: value}), {}, CompletionResponse)
    model = DnDModel(dnd, None)
    said = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    right_or_refused(lambda: model.generate(said, **{"max_new_tokens": 1, name: value}), {}, object)


def test_integrations_refuse_half_a_surrogate_pair(dnd: DnD) -> None:
    llm = DnDLLM(dnd, adapter=None, max_new_tokens=1)
    for ask in (llm.complete, lambda p: list(llm.stream_complete(p)), lambda p: dnd.complete(p, adapter="auto")):
        with pytest.raises(DndError, match="surrogate"):
            ask(HALF)
    assert ChatResponse is not None


@pytest.mark.parametrize("name", ["END", ("END",), ["END"]])
def test_one_stop_string_is_one_stop_string(dnd: DnD, name: Any) -> None:
    free = dnd.complete("hi", max_new_tokens=20)
    assert dnd.complete("hi", max_new_tokens=20, stop=name).text == free.text.partition("END")[0]


def test_a_cancel_is_an_event(dnd: DnD) -> None:
    with pytest.raises(DndError, match="cancel must be a threading.Event"):
        dnd.stream("hi", cancel=5)
    done = threading.Event()
    done.set()
    assert dnd.stream("hi", cancel=done, max_new_tokens=400).result.finish_reason == "cancelled"
