"""The OpenAPI document says what the server does: schemathesis asks all of it, sensibly and not, and finds nothing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from server_parts import serving
from tiny_world import World, prompts_of

LEFT_OUT = {
    "positive_data_acceptance": "no schema says what fits the context, or what the file of an adapter holds",
}
KEY = "a-long-secret"


@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="needs schemathesis")
def test_the_document_is_true(world: World, tmp_path: Path) -> None:
    dnd = world.elsewhere()
    dnd.adapt(prompts_of("upper"), name="upper")
    with serving(dnd, api_keys=[KEY], answer_tokens=20) as served:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.now.url}/openapi.json", "--no-color"]
        command += [
            "--header",
            f"Authorization: Bearer {KEY}",
            "--exclude-checks",
            ",".join(LEFT_OUT),
            "--warnings",
            "off",
        ]
        command += ["--phases", "examples,coverage,fuzzing", "--max-examples", "3", "--seed", "1", "--no-shrink"]
        command += ["--generation-database", "none", "--continue-on-failure"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=tmp_path)
        assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
        assert served.http.get("/health").status_code == 200


def test_the_document_says_where_a_key_is_needed(world: World) -> None:
    for keys in ([], [KEY]):
        with serving(world.elsewhere(), api_keys=keys) as served:
            paths = served.http.get("/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json()["paths"]
            asked = {path for path, methods in paths.items() for m in methods.values() if m.get("security")}
            assert asked == (set(paths) - {"/health", "/ready"} if keys else set())
            answers = paths["/v1/chat/completions"]["post"]["responses"]
            assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
            assert answers["400"]["content"]["application/json"]["schema"]["required"] == ["error"]


def test_a_method_that_is_not_there_is_told_which_are(world: World) -> None:
    with serving(world.elsewhere()) as served:
        for path, methods in (
            ("/dnd/adapters", "GET, POST"),
            ("/dnd/adapters/a/pin", "DELETE, PUT"),
            ("/", "GET, HEAD"),
        ):
            assert set(served.http.patch(path).headers["allow"].split(", ")) == set(methods.split(", "))
