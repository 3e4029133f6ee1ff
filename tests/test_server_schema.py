"""The OpenAPI document says what the server does: schemathesis asks all of it, sensibly and not, and finds nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from server_parts import serving
from tiny_world import make_world, prompts_of

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, Phase, settings  # noqa: E402

LEFT_OUT: list[Any] = []


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    dnd = make_world(tmp_path_factory.mktemp("world")).elsewhere()
    dnd.adapt(prompts_of("upper"), name="upper")
    with serving(dnd) as served:
        yield schemathesis.openapi.from_url(f"{served.now.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_the_document_is_true(case: Any) -> None:
    case.call_and_validate(excluded_checks=LEFT_OUT)
