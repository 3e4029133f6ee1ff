"""A browser and a server for tests of the page: headless Chromium on a server of this process."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Any

import pytest

from dnd_sdk.server import Listening, ServerSettings, serve
from dnd_sdk.session import DnD

Open = Callable[..., "Watched"]

ROLES = ("button", "checkbox", "combobox", "link", "searchbox", "spinbutton", "textbox", "table", "dialog", "region")
"""What a screen reader has to have a name for."""


@contextmanager
def browser() -> Iterator[Any]:
    """The system's Chromium; the test is skipped where it or playwright is missing."""
    sync = pytest.importorskip("playwright.sync_api", reason="needs the extra page-tests")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("needs Chromium")
    with sync.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def listening(dnd: DnD, **settings: Any) -> Iterator[str]:
    """The address of a server of this session, which is closed with it."""
    told: Queue[Listening] = Queue()
    given = ServerSettings(port=0, **settings)
    thread = threading.Thread(target=lambda: serve(lambda: dnd, given, listening=told.put), name="served")
    thread.start()
    server = told.get(timeout=30)
    try:
        yield f"{server.url}/"
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


class Watched:
    """What one page asks for and complains about."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._heard)
        page.on("dialog", self._opened)
        page.on("response", self._answered)

    def _heard(self, message: Any) -> None:
        # the browser notes each refusal as well; whether one may be is for the page to know, but for its own files
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)

    def _answered(self, response: Any) -> None:
        if response.status >= 400 and not re.search(r"/(dnd|v1|metrics)\b", response.url):
            self.complaints.append(f"{response.url}: {response.status}")

    def _opened(self, dialog: Any) -> None:
        self.complaints.append(f"a script opened a dialog: {dialog.message}")
        dialog.dismiss()


def nameless(snapshot: str) -> list[str]:
    """The lines of an accessibility tree that are controls or landmarks without a name."""
    return re.findall(rf"^\s*- (?:{'|'.join(ROLES)})(?! \").*$", snapshot, re.MULTILINE)


def see(page: Any, selector: str, text: str | re.Pattern[str]) -> None:
    """Wait until an element says `text`."""
    page.locator(selector).filter(has_text=text).first.wait_for()


def until(page: Any, holds: Callable[[], bool]) -> None:
    """Wait for it, 10 s at most. The browser cannot: the page's policy has it run no text."""
    for _ in range(200):
        if holds():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it never held")


def row(page: Any, name: str) -> Any:
    """An adapter's row in the table."""
    return page.locator("#adapters-rows tr").filter(has=page.locator("th .name", has_text=re.compile(f"^{name}$")))


def answer_with(page: Any, pattern: str, body: Any) -> None:
    """Have the browser answer requests itself, as a server would that says `body`."""
    page.route(re.compile(pattern), lambda route: route.fulfill(json=body))


def see_adapted(page: Any, name: str) -> None:
    """Wait until an adaptation has come to an adapter of that name, every step done or left out."""
    see(page, "#adapt-outcome .headline", name)
    row(page, name).wait_for()
    states = page.locator("#adapt-steps li").all_inner_texts()
    assert len(states) >= 6 and any(": done" in state for state in states)
    assert not any("at work" in state or "to come" in state for state in states)


def fill_everything(page: Any) -> None:
    """Have every part of the page show something."""
    page.fill("#adapt-text", "0 + 1 = ?")
    page.locator("#adapt-start").click()
    page.fill("#route-text", "QUESTION 3 ABOUT THE ORDER")
    page.locator("#route-send").click()
    page.fill("#compare-prompt", "HELLO")
    page.get_by_role("button", name="Answer with both").click()
    for place in ("#adapt-outcome .chip", "#route-outcome .chip", "#side-left .chip", "#log-rows li"):
        page.wait_for_selector(place)
    page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")


CONTRASTS = """() => {
  const channels = (color) => {
    const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
    canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255);
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((v, i) => v * a + below[i] * (1 - a));
  const ground = (node) => {
    if (!node) return [1, 1, 1];
    const [r, g, b, a] = channels(getComputedStyle(node).backgroundColor);
    if (a === 0) return ground(node.parentElement);
    return over([r / 1, g, b, a], a === 1 ? [0, 0, 0] : ground(node.parentElement));
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const holder = node.parentElement;
    if (!node.data.trim() || !holder.checkVisibility({visibilityProperty: true, opacityProperty: true})) continue;
    const below = ground(holder);
    const [a, b] = [light(below), light(over(channels(getComputedStyle(holder).color), below))];
    found.push([node.data.trim().slice(0, 30), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return found;
}"""
"""Each visible text and its contrast with what lies behind it."""
