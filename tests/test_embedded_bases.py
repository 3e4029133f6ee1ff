"""The two embedded bases on their real weights, each with its own generator, in one home."""

from __future__ import annotations

import pytest
from tiny_world import prompts_of

from dnd_sdk.config import Home
from dnd_sdk.errors import LayoutMismatchError
from dnd_sdk.models import DEFAULT_BASE, SMALL_BASE
from dnd_sdk.session import DnD

UPPER = prompts_of("upper")


@pytest.mark.real
def test_the_embedded_bases_share_a_home(warm_home: Home) -> None:
    with DnD.load(SMALL_BASE, home=warm_home) as session:
        small = session.adapt(UPPER, name="tickets", calibrate=False).adapter
        assert small is not None
    told: list[str] = []
    with DnD.load(DEFAULT_BASE, home=warm_home, progress=told.append) as session:
        with pytest.raises(LayoutMismatchError, match="'tickets' was made for another base model, smollm2-135m"):
            session.complete("hi", adapter="tickets")
        assert told == ["this home has 1 adapter for smollm2-135m: --base smollm2-135m uses it"]
        assert session.adapt(UPPER, calibrate=False).decision in ("generate", "base")
        assert small.name not in dict(session.route(UPPER).neighbours)
    with DnD.load(SMALL_BASE, home=warm_home) as session:
        assert session.adapt(UPPER).adapter == small
