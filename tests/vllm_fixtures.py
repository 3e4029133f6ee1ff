"""Fixtures of the tests of `VllmBackend`: `pytest_plugins = ["vllm_fixtures"]`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stub_vllm import StubVllm, stub_vllm
from vllm_parts import LAYOUT

from dnd_sdk.engine import VllmBackend


@pytest.fixture
def stub() -> Iterator[StubVllm]:
    with stub_vllm() as running:
        yield running


@pytest.fixture
def backend(stub: StubVllm, tmp_path: Path) -> VllmBackend:
    return VllmBackend(stub.url, LAYOUT, tmp_path / "served", max_loaded=3)
