"""What the page never lets happen: a key that leaves its tab, a stranger's text that becomes markup."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra server")

from page_parts import Open, answer_with, listening, row, see, see_adapted

from dnd_sdk.session import DnD

pytest_plugins = ["page_fixtures"]

HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>"\'><b>bold</b>'
KEY = "sesame-1234"


@pytest.fixture
def locked_url(dnd: DnD) -> Iterator[str]:
    with listening(dnd, api_keys=[KEY]) as url:
        yield url


def test_a_key_is_asked_for_and_kept_in_this_tab_only(opened: Open, locked_url: str) -> None:
    watched = opened(locked_url)
    page = watched.page
    see(page, "#key-message", re.compile("key", re.IGNORECASE))
    assert not page.locator("#main").is_visible()
    assert page.evaluate("document.activeElement.id") == "key-input"
    page.keyboard.type("a key")
    page.keyboard.press("Enter")
    see(page, "#key-message", "no spaces")
    page.fill("#key-input", "not-the-key")
    page.keyboard.press("Enter")
    see(page, "#key-message", "This key is refused")
    assert page.input_value("#key-input") == "" and page.evaluate("sessionStorage.length") == 0
    assert not page.locator("#main").is_visible()
    page.fill("#key-input", KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#adapters-rows tr")
    assert not page.locator("#key-form").is_visible()
    kept = page.evaluate(
        "[JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie, location.href]"
    )
    assert KEY in kept[0] and not any(KEY in text for text in kept[1:])
    assert not any(KEY in request for request in watched.requests)
    page.reload()
    page.wait_for_selector("#adapters-rows tr")
    other = page.context.new_page()
    other.goto(locked_url)
    other.wait_for_selector("#key-form:not([hidden])")


def hostile_adapter() -> dict[str, Any]:
    known = {
        "id": "1",
        "created": "2026-01-01T00:00:00+00:00",
        "encoder": HOSTILE,
        "n_prompts": 1,
        "bytes": 1,
        "hits": 1,
    }
    states = {"resident": True, "pinned": False, "last_used": HOSTILE}
    return {"name": HOSTILE, "source": HOSTILE, "origin": HOSTILE, "role": HOSTILE, **known, **states}


def hostile_decision() -> dict[str, Any]:
    texts = dict.fromkeys(("kind", "decision", "adapter", "time", "rule", "mode", "by", "reason"), HOSTILE)
    return {**texts, "prompts": "p", "n_prompts": 1, "score": 0.5, "neighbours": [[HOSTILE, 0.5]], "thresholds": {}}


def test_no_text_of_a_stranger_becomes_markup(opened: Open, url: str) -> None:
    def hostile(page: Any) -> None:
        answer_with(page, r"/dnd/adapters$", {"data": [hostile_adapter()]})
        answer_with(page, r"/dnd/log", {"data": [hostile_decision()]})
        answer_with(page, r"/dnd/route$", hostile_decision())
        page.route("**/metrics", lambda route: route.fulfill(body=f"# HELP x {HOSTILE}\n# TYPE x gauge\nx 1\n"))
        said = json.dumps(
            {"choices": [{"delta": {"content": HOSTILE}}], "dnd": {"adapter": HOSTILE, "decision": HOSTILE}}
        )
        page.route("**/v1/chat/completions", lambda r: r.fulfill(body=f"data: {said}\n\ndata: [DONE]\n\n"))
        done = json.dumps({**hostile_decision(), "adapter": {"name": HOSTILE}, "notes": [HOSTILE], "timings_s": {}})
        steps = f"event: step\ndata: {json.dumps({'step': HOSTILE})}\n\nevent: result\ndata: {done}\n\n"
        page.route("**/dnd/adapt", lambda r: r.fulfill(body=steps))

    page = opened(url, before=hostile).page
    page.wait_for_selector("#adapters-rows tr")
    page.fill("#route-text", HOSTILE)
    page.locator("#route-send").click()
    page.fill("#compare-prompt", HOSTILE)
    page.get_by_role("button", name="Answer with both").click()
    page.fill("#adapt-text", HOSTILE)
    page.locator("#adapt-start").click()
    places = ("#adapters-rows th", "#log-rows", "#route-outcome", "#side-right .answer", "#side-right .figures")
    for place in (*places, "#adapt-outcome", "#adapt-steps", "#counters-rows"):
        see(page, place, HOSTILE)
    page.locator("#adapters-rows").get_by_role("button", name="Delete").click()
    see(page, "#confirm-text", HOSTILE)
    page.keyboard.press("Escape")
    page.wait_for_timeout(200)
    assert page.evaluate("[...document.images].map((image) => image.getAttribute('src'))") == ["page/favicon.svg"]
    assert page.evaluate("document.querySelectorAll('b b, main script').length") == 0
    assert page.title().startswith("dnd")


def test_a_role_and_an_answer_of_the_server_stay_text(page: Any) -> None:
    page.fill("#adapt-text", "0 + 1 = ?")
    page.fill("#adapt-name", "digits")
    page.locator("#adapt summary").click()
    page.fill("#adapt-role", HOSTILE)
    page.locator("#adapt-start").click()
    see_adapted(page, "digits")
    assert row(page, "digits").locator(".about").last.inner_text() == HOSTILE
    page.fill("#compare-prompt", HOSTILE)
    page.get_by_role("button", name="Answer with both").click()
    see(page, "#side-left .answer", f"base: {HOSTILE}")
    assert page.locator("b b, main img").count() == 0


def test_the_browser_itself_refuses_markup_in_texts(opened: Open, url: str) -> None:
    watched = opened(url)
    tried = "() => { try { document.body.innerHTML = '<b>x</b>'; return 'done'; } catch (e) { return e.name; } }"
    assert watched.page.evaluate(tried) == "TypeError"
    [told] = watched.complaints
    assert "TrustedHTML" in told
    watched.complaints.clear()
