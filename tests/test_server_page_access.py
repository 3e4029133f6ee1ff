"""That everyone can use the page: by keyboard, by ear, in either colour scheme and on any screen."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra server")

from page_parts import CONTRASTS, fill_everything, nameless

pytest_plugins = ["page_fixtures"]


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


def test_every_text_stands_out_in_both_schemes(page: Any) -> None:
    fill_everything(page)
    grounds = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 50
        assert [(scheme, text, round(contrast, 2)) for text, contrast in contrasts if contrast < 4.5] == []
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2


def test_nothing_is_wider_than_the_screen(page: Any) -> None:
    fill_everything(page)
    for width in (320, 390, 700, 860, 1120, 1600):
        page.set_viewport_size({"width": width, "height": 800})
        too_wide = page.evaluate(
            "[...document.querySelectorAll('body *')].filter((node) => node.checkVisibility()"
            " && !node.closest('.visually-hidden, thead') && node.getBoundingClientRect().right > innerWidth + 0.5)"
            ".map((node) => node.id || node.className || node.tagName)"
        )
        assert (width, too_wide) == (width, [])
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
