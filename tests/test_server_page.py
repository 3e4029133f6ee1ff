"""The page in a real browser: what it shows and what it does."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra server")

from adapter_folders import peft_folder, peft_tensors
from page_parts import Open, listening, row, see, see_adapted, until
from tiny_world import World

from dnd_sdk.engine import CompletionRequest, FakeBackend
from dnd_sdk.session import DnD

pytest_plugins = ["page_fixtures"]

# what it asks for


def test_the_first_paint_asks_nobody_but_the_server(opened: Open, url: str) -> None:
    watched = opened(url)
    watched.page.wait_for_selector("#adapters-rows tr")
    watched.page.wait_for_load_state("load")
    assert len(watched.requests) > 15
    assert [request for request in watched.requests if not request.startswith(url)] == []


def test_nothing_is_asked_while_updates_are_paused(opened: Open, url: str) -> None:
    watched = opened(url)
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


def test_an_adapter_is_imported_from_its_two_files(page: Any, dnd: DnD, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "guest", peft_tensors(dnd.layout), dnd.layout)
    page.get_by_role("button", name="Import").click()
    dialog = page.get_by_role("dialog", name="Import an adapter")
    page.set_input_files("#import-config", folder / "adapter_config.json")
    page.set_input_files("#import-weights", folder / "adapter_model.safetensors")
    page.fill("#import-name", "guest")
    dialog.get_by_role("button", name="Import").click()
    dialog.wait_for(state="hidden")
    row(page, "guest").wait_for()


def test_a_refused_import_says_why_and_keeps_the_dialog(page: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("not json")
    page.get_by_role("button", name="Import").click()
    for field in ("#import-config", "#import-weights"):
        page.set_input_files(field, tmp_path / "adapter_config.json")
    page.locator("#import-send").click()
    see(page, "#import-error", "adapter_config.json")
    assert page.locator("#import").is_visible()


# adapting


def test_pasted_prompts_become_an_adapter_step_by_step(page: Any) -> None:
    page.fill("#adapt-text", "0 + 1 = ?\n\n  0 + 2 = ?  \n")
    see(page, "#adapt-n", "2 prompts")
    page.fill("#adapt-name", "digits")
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


def test_without_prompts_nothing_is_sent(page: Any) -> None:
    page.locator("#adapt-start").click()
    assert page.evaluate("document.activeElement.id") == "adapt-text"
    assert not page.locator("#adapt-steps").is_visible()


def test_a_prompt_file_is_picked_or_taken_away_again(page: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("ask\n0 + 1 = ?\n0 + 2 = ?\n")
    page.set_input_files("#adapt-file", file)
    see(page, "#adapt-file-name", "prompts.csv, 24 B")
    assert not page.locator("#adapt-text").is_visible()
    page.get_by_role("button", name="Remove file").click()
    assert page.locator("#adapt-text").is_visible()
    page.set_input_files("#adapt-file", file)
    page.get_by_text("More", exact=True).click()
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


class Drawl:
    """Says one word, waits until it is told to go on, and goes on for ever."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def __call__(self, request: CompletionRequest) -> Iterator[str]:
        yield "well"
        self.go_on.wait(30)
        while True:
            yield " er"
            time.sleep(0.01)


def test_an_answer_is_shown_while_it_is_made_and_can_be_stopped(opened: Open, dnd: DnD) -> None:
    drawl = Drawl()
    engine = FakeBackend(dnd.layout, drawl)
    with listening(DnD(replace(dnd.parts, engine=engine))) as url:
        page = opened(url).page
        page.fill("#compare-prompt", "hi")
        page.get_by_role("button", name="Answer with both").click()
        see(page, "#side-left .answer", re.compile("^well$"))
        assert page.locator("#side-left .answer").get_attribute("aria-busy") == "true"
        see(page, "#side-left .figures", "to first token")
        drawl.go_on.set()
        see(page, "#side-right .answer", re.compile("well er er"))
        page.get_by_role("button", name="Stop").click()
        for side in ("#side-left", "#side-right"):
            see(page, f"{side} .figures", "stopped")
            assert page.locator(f"{side} .answer").get_attribute("aria-busy") == "false"
        until(page, lambda: engine.n_running == 0)
        assert not page.locator("#compare-stop").is_visible()


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
    entries = page.locator("#log-rows > li")
    until(page, lambda: entries.count() == 2)
    entries.last.locator("summary").click()
    assert entries.last.locator(".details .facts").is_visible()
    page.fill("#adapt-text", "0 + 1 = ?")
    page.locator("#adapt-start").click()
    until(page, lambda: entries.count() == 3)
    assert entries.last.locator(".details .facts").is_visible()
    assert not entries.first.locator(".details .facts").is_visible()


# the server itself


def test_status_and_counters_are_shown_and_grow(page: Any) -> None:
    see(page, "#slots-text", "2 adapters resident")
    see(page, "#load-text", "0 answering, 0 waiting")
    see(page, "#status-facts", re.compile("Base.*elsewhere.*Context.*4,096 tokens.*In slots.*upper"))
    page.get_by_text("Settings", exact=True).click()
    see(page, "#status-settings", re.compile("needs_key.*false"))
    see(page, "#counters-rows > div", re.compile(r"Requests answered.*\d/s"))


def test_slots_are_shown_where_the_base_is_here(opened: Open, adapted: World) -> None:
    dnd = adapted.session(n_slots=3)
    dnd.complete("HI", adapter="upper")
    with listening(dnd) as url:
        page = opened(url).page
        see(page, "#slots-text", "1 of 3 slots hold an adapter")
        see(page, "#status-facts", "cpu, float32")
        assert page.locator("#slots i").count() == 3
        [filled] = page.locator("#slots i.filled").all()
        assert filled.get_attribute("title") == "upper"
        assert not row(page, "lower").locator(".resident").is_visible()
        row(page, "lower").get_by_role("button", name="Pin lower").click()
        see(page, "#slots-text", "2 of 3 slots hold an adapter")


def test_a_server_that_is_gone_is_told_and_found_again(opened: Open, url: str) -> None:
    watched = opened(url)
    watched.page.wait_for_selector("#adapters-rows tr")
    watched.page.route("**/dnd/status", lambda route: route.abort())
    see(watched.page, "#connection.lost", "The server does not answer.")
    watched.page.unroute("**/dnd/status")
    see(watched.page, "#connection:not(.lost)", "connected")
