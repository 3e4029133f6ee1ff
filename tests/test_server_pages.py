"""How the page's files are served, and what must not stand in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra server")

from fastapi.testclient import TestClient
from tiny_world import World

import dnd_sdk
from dnd_sdk.config import Home
from dnd_sdk.server import create_app
from dnd_sdk.server.pages import CONTENT_TYPES, page_files

FOLDER = Path(dnd_sdk.__file__).parent / "server" / "page"
SINKS = (
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|srcdoc|setHTML"
    r"|eval\(|new Function"
)


@pytest.fixture(scope="module")
def client(tiny_folders: World, tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    world = tiny_folders._replace(home=Home(tmp_path_factory.mktemp("home")))
    return TestClient(create_app(world.elsewhere()), base_url="http://127.0.0.1")


def test_the_page_and_each_of_its_files_are_served_under_their_types(client: TestClient) -> None:
    assert client.get("/").text == (FOLDER / "index.html").read_text("utf-8")
    for path in FOLDER.iterdir():
        answer = client.get(f"/page/{path.name}")
        assert answer.content == path.read_bytes()
        assert answer.headers["content-type"] == CONTENT_TYPES[path.suffix]


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/page/page.css"])
def test_a_file_is_asked_for_each_time_and_sent_when_it_is_new(client: TestClient, path: str) -> None:
    first = client.get(path)
    assert first.headers["cache-control"] == "no-cache"
    again = client.get(path, headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert again.status_code == 304 and not again.content and again.headers["etag"] == first.headers["etag"]
    assert client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
    head = client.head(path)
    assert head.status_code == 200 and not head.content


@pytest.mark.parametrize("path", ["/", "/page/main.js"])
def test_a_browser_is_told_to_take_nothing_from_elsewhere(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    policy = headers["content-security-policy"].split("; ")
    assert {"default-src 'self'", "style-src 'self'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy)
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page/none.js",
        "/page/../pages.py",
        "/page/%2e%2e/pages.py",
        "/page/..%2fpages.py",
        "/page/%2e%2e%2f%2e%2e%2ferrors.py",
        "/page//etc/passwd",
        "/page/%2fetc%2fpasswd",
        "/page/main.js%00.css",
        "/page/..\\pages.py",
    ],
)
def test_no_path_leads_out_of_the_folder(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_files_of_other_types_are_not_served() -> None:
    assert {Path(name).suffix for name in page_files()} <= set(CONTENT_TYPES)
    assert set(page_files()) == {path.name for path in FOLDER.iterdir()}


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_a_file_holds_nothing_that_reads_markup_runs_text_or_comes_from_elsewhere(path: Path) -> None:
    text = path.read_text("utf-8")
    assert not re.findall(SINKS, text)
    assert not re.findall(r"""\sstyle=|<style|\son\w+=["']|javascript:|@import|url\(""", text)
    assert not [url for url in re.findall(r"https?://[^\s\"'>]+", text) if url != "http://www.w3.org/2000/svg"]
    assert len(text.splitlines()) <= 350
    assert max(map(len, text.splitlines())) <= 120


def test_what_the_files_name_is_there() -> None:
    index = (FOLDER / "index.html").read_text("utf-8")
    named = re.findall(r'(?:src|href)="page/([^"]+)"', index)
    for path in FOLDER.glob("*.js"):
        named += re.findall(r'from "\./([^"]+)"', path.read_text("utf-8"))
    assert set(named) | {"index.html"} == set(page_files())


def test_the_ids_that_the_modules_look_up_are_in_the_page() -> None:
    index = (FOLDER / "index.html").read_text("utf-8")
    ids = re.findall(r'\sid="([^"]+)"', index)
    assert len(ids) == len(set(ids))
    for path in FOLDER.glob("*.js"):
        assert set(re.findall(r'byId\("([^"]+)"\)', path.read_text("utf-8"))) <= set(ids)
    assert set(re.findall(r'(?:for|aria-labelledby|aria-describedby)="([^"]+)"', index)) <= set(ids)
