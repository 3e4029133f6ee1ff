"""Why an answer ended, as callers are told."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tiny_world import make_world

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
