"""Pictures of the page of `dnd serve`: `python docs/screenshots.py` writes page-light.png and page-dark.png here.

The server is a real one in an empty home that shares nothing but the weights (`--weights`); the browser is the system's
Chromium. The page does what a reader would do: adapts to the two example jobs, then routes and compares.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

from playwright.sync_api import Page, sync_playwright

from dnd_sdk import DnD
from dnd_sdk.server import Listening, ServerSettings, serve

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
JOBS = {"tickets": "support_tickets", "deadlines": "meeting_deadlines"}
"""Names of the adapters, and the examples they are made of."""
QUESTION = 2
"""Which of the tickets' test questions is routed and answered."""
WIDTH, HEIGHT, SCALE = 1280, 1056, 1.4
MAX_BYTES = 300_000
SCHEMES = ("light", "dark")


@contextmanager
def listening(load: Callable[[], DnD]) -> Iterator[str]:
    """The address of a server that runs inside."""
    told: Queue[Listening] = Queue()
    thread = threading.Thread(target=lambda: serve(load, ServerSettings(port=0), listening=told.put))
    thread.start()
    server = told.get(timeout=600)
    try:
        yield server.url
    finally:
        server.stop()
        thread.join()


def question() -> str:
    """A ticket that no adapter was made of."""
    lines = (EXAMPLES / JOBS["tickets"] / "questions.jsonl").read_text("utf-8").splitlines()
    return json.loads(lines[QUESTION])["prompt"]


def use(page: Page) -> None:
    """Fill the page as its reader would."""
    page.wait_for_selector("#connection:text('connected')")
    for name in (*JOBS, "tickets"):  # the second time it is found again
        page.set_input_files("#adapt-file", EXAMPLES / JOBS[name] / "prompts.jsonl")
        page.fill("#adapt-name", name)
        with page.expect_response("**/dnd/adapt"):
            page.click("#adapt-start")
        page.wait_for_selector("#adapt-start:not([aria-disabled])", timeout=600_000)
    page.fill("#compare-prompt", question())
    for model in ("dnd:auto", "dnd:tickets"):
        page.select_option("#model-right", model)
        page.click("#compare-form .main")
        page.wait_for_selector("#side-right .chip")
        page.wait_for_selector("#compare-stop", state="hidden")
    page.fill("#route-text", question())
    page.click("#route-send")
    page.wait_for_selector("#route-outcome .chip")


def take(page: Page, path: Path, scheme: Any) -> None:
    """One picture of the page's first screen."""
    page.emulate_media(color_scheme=scheme)
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.wait_for_timeout(2500)  # a round of its updates, so that the counters move
    page.screenshot(path=path)
    if path.stat().st_size > MAX_BYTES:
        raise SystemExit(f"{path} has {path.stat().st_size} bytes, at most {MAX_BYTES} are wanted")
    print(f"{path}: {path.stat().st_size} bytes")


def main(argv: Sequence[str] | None = None) -> int:
    """Write both pictures."""
    parser = argparse.ArgumentParser(description="Take pictures of the server's page.")
    parser.add_argument("--weights", type=Path, default=ROOT / ".dnd", help="a home that holds the weights")
    parser.add_argument("--base", default="qwen2.5-coder-0.5b", help="an embedded base")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for the pictures")
    args = parser.parse_args(argv)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        (Path(folder) / "models").symlink_to((args.weights / "models").resolve(), target_is_directory=True)
        with listening(lambda: DnD.load(args.base, home=folder)) as url:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=SCALE)
            page.goto(url)
            use(page)
            for scheme in SCHEMES:
                take(page, args.out / f"page-{scheme}.png", scheme)
            browser.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
