"""The page in a real browser: what it shows, what it does, and what it never lets happen."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra server")

from page_parts import CONTRASTS, Watched, browser, listening, nameless
from page_stub import stub

HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>"\'><b>bold</b>'
KEY = "sesame-1234"

Open = Callable[..., Watched]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as chromium:
        yield chromium


@pytest.fixture
def url() -> Iterator[str]:
    with listening(stub()) as url:
        yield url


@pytest.fixture
def locked_url() -> Iterator[str]:
    with listening(stub(KEY)) as url:
        yield url


@pytest.fixture
def opened(chromium: Any, url: str) -> Iterator[Open]:
    """Opens the page; whatever it complains of fails the test."""
    contexts, pages = [], []

    def open_page(at: str = url, before: Callable[[Any], None] | None = None, **context: Any) -> Watched:
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
def page(opened: Open) -> Any:
    page = opened().page
    page.wait_for_selector("#adapters-rows tr")
    return page


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
    return page.locator("#adapters-rows tr").filter(has=page.locator("th .name", has_text=re.compile(f"^{name}$")))


def answer_with(page: Any, pattern: str, body: Any) -> None:
    """Have the browser answer requests itself, as a server would that says `body`."""
    page.route(re.compile(pattern), lambda route: route.fulfill(json=body))


# what it asks for


def test_the_first_paint_asks_nobody_but_the_server(opened: Open, url: str) -> None:
    watched = opened()
    watched.page.wait_for_selector("#adapters-rows tr")
    watched.page.wait_for_load_state("load")
    assert len(watched.requests) > 15
    assert [request for request in watched.requests if not request.startswith(url)] == []


def test_nothing_is_asked_while_updates_are_paused(opened: Open) -> None:
    watched = opened()
    watched.page.wait_for_selector("#adapters-rows tr")
    pause = watched.page.get_by_role("button", name="Pause updates")
    pause.click()
    assert pause.get_attribute("aria-pressed") == "true"
    watched.page.wait_for_timeout(300)
    n = len(watched.requests)
    watched.page.wait_for_timeout(2500)
    assert len(watched.requests) == n
    with watched.page.expect_request("**/dnd/status"):
        pause.click()


# adapters


def test_adapters_are_shown_with_what_is_known_of_them(page: Any) -> None:
    upper = row(page, "upper").inner_text()
    for text in ("generated from", "resident", "Compare", "Pin", "Delete"):
        assert text in upper
    assert re.search(r"\d (B|kB|MB)", upper)
    assert page.locator("#adapters-count").inner_text() == "2"


def test_pinning_holds_and_is_taken_back(page: Any) -> None:
    row(page, "upper").get_by_role("button", name="Pin upper").click()
    see(page, "#notices", "upper stays in its slot")
    unpin = row(page, "upper").get_by_role("button", name="Unpin upper")
    unpin.wait_for()
    assert row(page, "upper").locator(".pinned").is_visible()
    unpin.click()
    row(page, "upper").get_by_role("button", name="Pin upper", exact=True).wait_for()


def test_an_adapter_is_deleted_only_after_a_yes(page: Any) -> None:
    delete = row(page, "lower").get_by_role("button", name="Delete lower")
    delete.click()
    dialog = page.get_by_role("dialog", name="Delete this adapter?")
    assert "lower" in dialog.inner_text()
    assert page.evaluate("document.activeElement.textContent") == "Cancel"
    page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    assert page.evaluate("document.activeElement.ariaLabel") == "Delete lower"
    delete.click()
    dialog.get_by_role("button", name="Cancel").click()
    delete.click()
    with page.expect_request(lambda request: request.method == "DELETE"):
        dialog.get_by_role("button", name="Delete").click()
    row(page, "lower").wait_for(state="detached")
    see(page, "#notices", "lower is deleted")
    assert page.evaluate("document.activeElement.id") == "adapters-title"


def test_an_adapter_is_imported_from_its_two_files(page: Any, tmp_path: Path) -> None:
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config.write_text("{}")
    weights.write_bytes(b"x")
    page.get_by_role("button", name="Import").click()
    dialog = page.get_by_role("dialog", name="Import an adapter")
    page.set_input_files("#import-config", config)
    page.set_input_files("#import-weights", weights)
    page.fill("#import-name", "guest")
    dialog.get_by_role("button", name="Import").click()
    dialog.wait_for(state="hidden")
    row(page, "guest").wait_for()


def test_a_refused_import_says_why_and_keeps_the_dialog(page: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("not json")
    answer_with_status(page, r"/dnd/adapters$", 422, "adapter_config.json is no JSON", fix="save it again with peft")
    page.get_by_role("button", name="Import").click()
    for field in ("#import-config", "#import-weights"):
        page.set_input_files(field, tmp_path / "adapter_config.json")
    page.locator("#import-send").click()
    see(page, "#import-error", "adapter_config.json is no JSON\nsave it again with peft")
    assert page.locator("#import").is_visible()


def answer_with_status(page: Any, pattern: str, status: int, message: str, **more: Any) -> None:
    """Refuse what is posted there, as the server would."""
    error = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None, **more}}

    def refuse(route: Any) -> None:
        if route.request.method == "GET":
            route.fallback()
        else:
            route.fulfill(status=status, json=error)

    page.route(re.compile(pattern), refuse)


# adapting


def see_adapted(page: Any, name: str) -> None:
    see(page, "#adapt-outcome .headline", name)
    row(page, name).wait_for()
    states = page.locator("#adapt-steps li").all_inner_texts()
    assert len(states) >= 6 and any(": done" in state for state in states)
    assert not any("at work" in state or "to come" in state for state in states)


def test_pasted_prompts_become_an_adapter_step_by_step(page: Any) -> None:
    page.fill("#adapt-text", "0 + 1 = ?\n\n  0 + 2 = ?  \n")
    see(page, "#adapt-n", "2 prompts")
    page.fill("#adapt-name", "digits")
    page.fill("#adapt-role", "You add.") if page.locator("#adapt-role").is_visible() else None
    with page.expect_request("**/dnd/adapt") as asked:
        page.locator("#adapt-start").click()
    assert json.loads(asked.value.post_data) == {
        "prompts": ["0 + 1 = ?", "0 + 2 = ?"],
        "name": "digits",
        "mode": "auto",
    }
    assert asked.value.headers["accept"] == "text/event-stream"
    see_adapted(page, "digits")
    page.get_by_role("button", name="Compare with the base").click()
    assert page.locator("#model-right").input_value() == "dnd:digits"
    assert page.evaluate("document.activeElement.id") == "compare-prompt"


def test_a_prompt_file_is_picked_or_taken_away_again(page: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("ask\n0 + 1 = ?\n0 + 2 = ?\n")
    page.set_input_files("#adapt-file", file)
    see(page, "#adapt-file-name", "prompts.csv, 24 B")
    assert not page.locator("#adapt-text").is_visible()
    page.get_by_role("button", name="Remove file").click()
    assert page.locator("#adapt-text").is_visible()
    page.set_input_files("#adapt-file", file)
    page.get_by_label("Column of the prompts").fill("ask")
    page.fill("#adapt-name", "digits")
    page.locator("#adapt-start").click()
    see_adapted(page, "digits")


def test_a_dropped_file_is_adapted_to(page: Any) -> None:
    transfer = page.evaluate_handle(
        "() => { const t = new DataTransfer(); t.items.add(new File(['0 + 1 = ?\\n0 + 2 = ?'], 'p.txt')); return t; }"
    )
    page.dispatch_event("#adapters", "dragover", {"dataTransfer": transfer})
    assert page.locator("#adapt-zone.over").count() == 1
    page.dispatch_event("#adapters", "drop", {"dataTransfer": transfer})
    see(page, "#adapt-file-name", "p.txt")
    assert page.locator("#adapt-zone.over").count() == 0
    page.fill("#adapt-name", "digits")
    page.locator("#adapt-start").click()
    see_adapted(page, "digits")


def test_a_failed_adaptation_says_what_the_server_said(page: Any) -> None:
    error = {"error": {"message": "the store is full", "fix": "delete an adapter"}}
    body = f"event: step\ndata: {json.dumps({'step': 'encode'})}\n\nevent: error\ndata: {json.dumps(error)}\n\n"
    page.route("**/dnd/adapt", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.fill("#adapt-text", "x")
    page.locator("#adapt-start").click()
    see(page, "#adapt-outcome .problem", "the store is full\ndelete an adapter")
    assert page.locator("#adapt-steps li").first.text_content() == "encode: failed"


# comparing


def test_both_answers_are_streamed_with_their_figures(page: Any) -> None:
    row(page, "upper").get_by_role("button", name="Compare upper").click()
    page.keyboard.type("HELLO THERE")
    page.keyboard.press("Control+Enter")
    see(page, "#side-left .answer", re.compile("base.*HELLO THERE"))
    see(page, "#side-right .answer", re.compile("upper.*HELLO THERE"))
    for side in ("#side-left", "#side-right"):
        see(page, f"{side} .figures", re.compile(r"\d m?s to first token.*\d \+ \d+ tokens"))
        assert page.locator(f"{side} .answer").get_attribute("aria-busy") == "false"
    see(page, "#compare-status", re.compile(r"base: \d+ tokens, the first after .*upper: \d+ tokens"))


def test_an_answer_that_fails_leaves_the_other_alone(page: Any) -> None:
    def refuse(route: Any) -> None:
        if route.request.post_data_json["model"] == "dnd:base":
            route.fallback()
        else:
            broken = (
                'data: {"choices":[{"delta":{"content":"half "}}]}\n\ndata: {"error":{"message":"out of memory"}}\n\n'
            )
            route.fulfill(content_type="text/event-stream", body=broken)

    page.route("**/v1/chat/completions", refuse)
    page.fill("#compare-prompt", "hi")
    page.get_by_role("button", name="Answer with both").click()
    see(page, "#side-left .answer", "hi")
    see(page, "#side-right .answer", re.compile("half.*out of memory", re.DOTALL))


# routing


def test_a_text_is_routed_and_the_decision_is_explained(page: Any) -> None:
    page.fill("#route-text", "QUESTION 3 ABOUT THE ORDER")
    page.locator("#route-send").click()
    see(page, "#route-outcome .headline", re.compile("reuse.*upper"))
    assert page.locator("#route-outcome .neighbours li").count() == 2
    assert page.locator("#route-outcome .reason").inner_text()


def test_lines_are_routed_as_prompts_of_one_job(page: Any) -> None:
    page.fill("#route-text", "A\nB\n\n")
    page.get_by_label("Each line is a prompt of one job").check()
    with page.expect_request("**/dnd/route") as asked:
        page.locator("#route-send").click()
    assert asked.value.post_data_json == {"prompts": ["A", "B"]}


def test_the_log_grows_and_what_is_unfolded_stays_so(page: Any) -> None:
    page.fill("#adapt-text", "0 + 1 = ?")
    page.locator("#adapt-start").click()
    entries = page.locator("#log-rows > li")
    entries.first.wait_for()
    n = entries.count()
    last = entries.last
    last.locator("summary").click()
    assert last.locator(".details .facts").is_visible()
    page.fill("#adapt-text", "0 + 2 = ?")
    page.locator("#adapt-start").click()
    until(page, lambda: entries.count() > n)
    assert last.locator(".details .facts").is_visible()


# the server itself


def test_status_and_counters_are_shown_and_grow(page: Any) -> None:
    see(page, "#slots-text", re.compile(r"\d of \d+ slots hold an adapter"))
    assert page.locator("#slots i").count() > 0
    see(page, "#status-facts", "Encoder")
    counters = page.locator("#counters-rows > div")
    counters.first.wait_for()
    see(page, "#counters-rows .note", re.compile(r"\d/s"))


def test_a_server_that_is_gone_is_told_and_found_again(opened: Open) -> None:
    watched = opened()
    watched.page.wait_for_selector("#adapters-rows tr")
    watched.page.route("**/dnd/status", lambda route: route.abort())
    see(watched.page, "#connection.lost", "The server does not answer.")
    watched.page.unroute("**/dnd/status")
    see(watched.page, "#connection:not(.lost)", "connected")


# keys


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
    until(page, lambda: page.input_value("#key-input") == "")
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


# texts of strangers


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
    return {
        "kind": HOSTILE, "prompts": "p", "n_prompts": 1, "decision": HOSTILE, "adapter": HOSTILE, "score": 0.5, "time": HOSTILE,
        "neighbours": [[HOSTILE, 0.5]], "support": None, "thresholds": {}, "rule": HOSTILE, "mode": HOSTILE, "by": HOSTILE, "reason": HOSTILE,
    }  # fmt: skip


def test_no_text_of_a_stranger_becomes_markup(opened: Open) -> None:
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

    page = opened(before=hostile).page
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


def test_the_browser_itself_refuses_markup_in_texts(opened: Open) -> None:
    watched = opened()
    tried = "() => { try { document.body.innerHTML = '<b>x</b>'; return 'done'; } catch (e) { return e.name; } }"
    assert watched.page.evaluate(tried) == "TypeError"
    [told] = watched.complaints
    assert "TrustedHTML" in told
    watched.complaints.clear()


# everyone can use it


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


def test_every_control_and_landmark_has_a_name(page: Any) -> None:
    fill_everything(page)
    tree = page.locator("body").aria_snapshot()
    assert not nameless(tree)
    for role in ("banner", "main", "table"):
        assert f"- {role}" in tree
    assert [line for line in tree.splitlines() if "heading" in line and "[level=1]" in line]
    for opener, dialog in (("#import-open", "#import"), ("#adapters-rows .danger", "#confirm")):
        page.locator(opener).first.click()
        assert not nameless(page.locator(dialog).aria_snapshot())
        page.keyboard.press("Escape")


def test_the_whole_page_can_be_walked_by_keyboard(page: Any) -> None:
    fill_everything(page)
    wanted = page.evaluate(
        "[...document.querySelectorAll('a, button, input, select, textarea, summary, [tabindex=\"0\"]')]"
        ".filter((node) => node.checkVisibility()).length"
    )
    seen = []
    page.locator(".skip").focus()
    for key in ("Tab", "Shift+Tab"):  # a focus that comes by key is shown
        page.keyboard.press(key)
    for _ in range(wanted + 10):
        step = page.evaluate(
            "(() => { const node = document.activeElement; if (node === document.body) return null;"
            " const zone = node.matches('#adapt-file') ? node.parentElement : node;"
            " return [node.id || node.ariaLabel || node.textContent, getComputedStyle(zone).outlineStyle]; })()"
        )
        if step is None:
            break
        seen.append(step)
        page.keyboard.press("Tab")
    assert len(seen) >= wanted
    assert [name for name, outline in seen if outline == "none"] == []


def test_a_keyboard_reaches_the_content_first(page: Any) -> None:
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_in_both_schemes(opened: Open, scheme: str) -> None:
    page = opened(color_scheme=scheme).page
    page.wait_for_selector("#adapters-rows tr")
    fill_everything(page)
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 50
    assert [(text, round(contrast, 2)) for text, contrast in contrasts if contrast < 4.5] == []


@pytest.mark.parametrize("width", [320, 390, 700, 860, 1120, 1600])
def test_nothing_is_wider_than_the_screen(opened: Open, width: int) -> None:
    page = opened(viewport={"width": width, "height": 800}).page
    page.wait_for_selector("#adapters-rows tr")
    fill_everything(page)
    too_wide = page.evaluate(
        "[...document.querySelectorAll('body *')].filter((node) => node.checkVisibility()"
        " && !node.closest('.visually-hidden, thead') && node.getBoundingClientRect().right > innerWidth + 0.5)"
        ".map((node) => node.id || node.className || node.tagName)"
    )
    assert too_wide == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


# modules of their own


def test_events_are_read_however_the_stream_is_cut(page: Any) -> None:
    text = ': hello\r\nevent: step\r\ndata: {"a":1}\r\n\r\ndata: one\ndata:two ö\n\ndata\n\nid: 3\revent: x\rdata: y\r\rdata: cut'
    code = """async ([text, size]) => {
      const { events } = await import('/page/sse.js');
      const bytes = new TextEncoder().encode(text);
      const stream = new ReadableStream({ start(controller) {
        for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
        controller.close();
      }});
      const found = [];
      for await (const { event, data } of events(stream)) found.push([event, data]);
      return found;
    }"""
    expected = [["step", '{"a":1}'], ["message", "one\ntwo ö"], ["message", ""], ["x", "y"]]
    for size in (1, 2, 3, 7, 1000):
        assert page.evaluate(code, [text, size]) == expected


def test_counters_are_read_as_prometheus_writes_them(page: Any) -> None:
    text = (
        '# HELP a_total A \\"b\\".\n# TYPE a_total counter\na_total{x="1 }",y="q\\"\\n"} 2\na_total{x="2",y=""} 3.5e1\n'
        "# HELP a_created A.\n# TYPE a_created gauge\na_created 1e9\n"
        '# HELP s Seconds\n# TYPE s histogram\ns_bucket{le="0.1"} 1\ns_bucket{le="+Inf"} 4\ns_count 4\ns_sum 2\n'
        "# HELP python_info P\n# TYPE python_info gauge\npython_info 1\n"
    )
    code = """async (text) => {
      const { families, total } = await import('/page/metrics.js');
      return families(text).map((f) => [f.name, f.type, f.samples[0].labels, total(f)]);
    }"""
    assert page.evaluate(code, text) == [
        ["a_total", "counter", {"x": "1 }", "y": 'q"\n'}, {"value": 37}],
        ["s", "histogram", {"le": "0.1"}, {"value": 4, "mean": 0.5}],
    ]
