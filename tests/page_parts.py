"""A browser and a server for tests of the page: headless Chromium on a server of this process."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

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
def listening(app: FastAPI) -> Iterator[str]:
    """The address of a server in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(10)


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
