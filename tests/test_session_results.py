"""Why an answer ended, as callers are told."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tiny_world import make_world

from dnd_sdk.errors import InputError
from dnd_sdk.session import DnD


@pytest.fixture(scope="module")
def dnd(tmp_path_factory: pytest.TempPathFactory) -> DnD:
    folder: Path = tmp_path_factory.mktemp("world")
    return make_world(folder).session()


def test_a_completion_says_why_it_ended(dnd: DnD) -> None:
    whole = dnd.complete("hi", max_new_tokens=8)
    assert whole.finish_reason == "length" and whole.text
    cut = dnd.complete("hi", max_new_tokens=8, stop=(whole.text[0],))
    assert cut.finish_reason == "stop" and cut.text == ""


def test_a_cancelled_stream_says_so(dnd: DnD) -> None:
    cancel = threading.Event()
    stream = dnd.stream("hi", max_new_tokens=200, cancel=cancel)
    next(stream)
    cancel.set()
    assert stream.result.finish_reason == "cancelled"


def test_one_stop_string_is_no_list_of_letters(dnd: DnD) -> None:
    plain = dnd.complete("hi", max_new_tokens=8)
    assert dnd.complete("hi", max_new_tokens=8, stop=plain.text[:2] + "\0").text == plain.text


def test_half_a_surrogate_pair_and_a_giant_answer_are_refused(dnd: DnD) -> None:
    for call in (dnd.complete, dnd.stream):
        with pytest.raises(InputError, match="the text holds half of a surrogate pair"):
            call("hi\ud800")
        with pytest.raises(InputError, match="kept for the answer, at most"):
            call("hi", max_new_tokens=10**9)


def test_arguments_of_another_kind_are_named(dnd: DnD) -> None:
    for call in (dnd.complete, dnd.stream):
        with pytest.raises(InputError, match="adapter must be"):
            call("hi", 5)
        with pytest.raises(InputError, match="tools must be"):
            call("hi", tools=5)
        for prompt in (None, 5, {"role": "user"}):
            with pytest.raises(InputError, match="messages"):
                call(prompt)
    with pytest.raises(InputError, match="prompts must be a list"):
        dnd.complete_batch(None)
