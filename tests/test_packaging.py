"""What a wheel and an sdist hold, and that the version is the same everywhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import dnd_sdk
from dnd_sdk.models import EMBEDDED

ROOT = Path(dnd_sdk.__file__).parents[1]
TREES = {"dnd_sdk": "dnd_sdk", "cli": "dnd_sdk/cli", "integrations": "dnd_sdk/integrations"}
SHIPPED = (".py", ".pyi", ".json", ".md", ".toml", ".safetensors", ".html", ".css", ".js", ".svg")
NOT_SHIPPED = ("__pycache__", "*.pyc", "*.egg-info")


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources() -> set[str]:
    """Where each file of the three source trees belongs in a wheel."""
    return {
        f"{target}/{path.relative_to(ROOT / tree).as_posix()}"
        for tree, target in TREES.items()
        for path in (ROOT / tree).rglob("*")
        if path.suffix in SHIPPED or path.name == "py.typed"
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in: an in-tree build would leave `build/`, whose stale files end up in the next wheel."""
    copy = tmp_path_factory.mktemp("checkout")
    for tree in (*TREES, "tests", "examples"):
        shutil.copytree(ROOT / tree, copy / tree, ignore=shutil.ignore_patterns(*NOT_SHIPPED))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    """The wheel, built offline with the setuptools of this environment."""
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *offline, "-w", "out", ".", cwd=checkout)
    [path] = (checkout / "out").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def members(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_one_package_and_its_metadata(members: set[str]) -> None:
    tops = {name.split("/")[0] for name in members}
    assert tops == {"dnd_sdk", f"dnd_sdk-{dnd_sdk.__version__}.dist-info"}


def test_the_wheel_holds_every_source_and_data_file(members: set[str]) -> None:
    ours = {name for name in members if name.startswith("dnd_sdk/")}
    assert ours == sources()
    assert {"dnd_sdk/cli/main.py", "dnd_sdk/integrations/__init__.py", "dnd_sdk/py.typed"} <= ours


def test_the_wheel_holds_a_generator_for_every_embedded_base(members: set[str]) -> None:
    folders = {name.removesuffix("router.json") for name in members if name.endswith("/router.json")}
    assert {folder.split("/")[-2] for folder in folders} == {n for n, m in EMBEDDED.items() if m.kind == "base"}
    for folder in folders:
        inside = {name.removeprefix(folder) for name in members if name.startswith(folder)}
        assert {"README.md", "config.json", "model.safetensors", "support.safetensors"} <= inside


def test_the_wheel_holds_licence_and_script(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" in name]
        texts = {name.split("/", 1)[1]: archive.read(name).decode() for name in names}
    assert "dnd = dnd_sdk.cli.main:main" in texts["entry_points.txt"]
    assert "License-Expression: Apache-2.0" in texts["METADATA"]
    assert texts["licenses/LICENSE"] == (ROOT / "LICENSE").read_text()


def test_the_unpacked_wheel_runs_on_its_own(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys, importlib.util as u; sys.path.insert(0, 'site'); import dnd_sdk.cli.main, dnd_sdk.integrations;"
        "print(dnd_sdk.__file__, dnd_sdk.cli.main.__file__, u.find_spec('cli'), u.find_spec('integrations'))"
    )
    package, command, *others = run(sys.executable, "-P", "-c", code, cwd=tmp_path).split()
    assert package.endswith("site/dnd_sdk/__init__.py") and command.endswith("site/dnd_sdk/cli/main.py")
    assert others == ["None", "None"]


def test_the_sdist_can_be_built_from(checkout: Path) -> None:
    code = "from setuptools.build_meta import build_sdist; print(build_sdist('out'))"
    name = run(sys.executable, "-c", code, cwd=checkout).split()[-1]
    with tarfile.open(checkout / "out" / name) as archive:
        inside = {member.split("/", 1)[-1] for member in archive.getnames()}
    needed = {"setup.py", "pyproject.toml", "LICENSE", "README.md", "cli/main.py", "integrations/__init__.py"}
    assert needed | {"tests/conftest.py", "examples/demo.py", "constraints.txt"} <= inside
    assert not any("__pycache__" in m for m in inside)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_one_version_everywhere() -> None:
    [top, *_] = re.findall(r"^## \[([^\]]+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert top == dnd_sdk.__version__ == project()["version"]


def test_constraints_pin_every_direct_dependency_exactly() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pinned = {line.split("==")[0] for line in lines if re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line)}
    assert len(pinned) == len(lines)
    extras = project()["optional-dependencies"]
    own = {f"dnd-sdk[{name}]": wanted for name, wanted in extras.items()}
    dev = [w for entry in extras["dev"] for w in own.get(entry, [entry])]
    wanted = [*project()["dependencies"], *dev]
    assert {re.split(r"[^A-Za-z0-9-]", w)[0] for w in wanted} <= pinned


def test_the_source_names_no_package_index_and_no_home_folder() -> None:
    """Whoever installs keeps their own pip configuration; nobody's machine leaks into the files."""
    banned = re.compile(r"(--index-url|--extra-index-url|download\.pytorch\.org|/home/\w|/root/|/Users/)")
    for name in ("pyproject.toml", "constraints.txt", "Makefile", "README.md", "CONTRIBUTING.md", ".ci/run"):
        assert not banned.search((ROOT / name).read_text("utf-8")), name
