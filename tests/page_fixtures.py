"""Fixtures of the page's tests: `pytest_plugins = ["page_fixtures"]`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from page_parts import Open, Watched, browser, listening
from tiny_world import World, prompts_of

from dnd_sdk.session import DnD


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The system's Chromium, for one module: playwright's loop must not run beside those of other tests."""
    with browser() as chromium:
        yield chromium


@pytest.fixture
def dnd(world: World) -> DnD:
    """A session without a model, which says "NAME: " and what it was asked, and has two adapters."""
    session = world.elsewhere()
    for name in ("upper", "lower"):
        session.adapt(prompts_of(name), name=name, calibrate=False)
    return session


@pytest.fixture
def url(dnd: DnD) -> Iterator[str]:
    """The address of its server."""
    with listening(dnd) as url:
        yield url


@pytest.fixture
def opened(chromium: Any) -> Iterator[Open]:
    """Opens the page; whatever it complains of fails the test."""
    contexts, pages = [], []

    def open_page(at: str, before: Callable[[Any], None] | None = None, **context: Any) -> Watched:
        contexts.append(chromium.new_context(**{"reduced_motion": "reduce", **context}))
        watched = Watched(contexts[-1].new_page())
        pages.append(watched)
        watched.page.set_default_timeout(10_000)
        if before is not None:
            before(watched.page)
        watched.page.goto(at)
        return watched

    yield open_page
    complaints = [complaint for watched in pages for complaint in watched.complaints]
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture
def page(opened: Open, url: str) -> Any:
    """The page of that server, with what it has read."""
    page = opened(url).page
    page.wait_for_selector("#adapters-rows tr")
    return page
