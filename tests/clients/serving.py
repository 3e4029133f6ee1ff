"""`dnd serve` on the scripted base, for real clients: `python tests/clients/serving.py FOLDER [OPTION ...]`.

The base and a small encoder stand under the default names; two adapters are made before it listens.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
from common import WIDTH
from scripted_base import scripted_base
from stand_in import install
from tiny_world import prompts_of

from dnd_sdk.cli.main import app
from dnd_sdk.session import DnD


def main(folder: Path, options: list[str]) -> None:
    """Make the home in `folder` and serve until told to stop."""
    with pytest.MonkeyPatch.context() as patch:
        home = install(folder, patch, scripted_base(), encoder_width=WIDTH)
        with DnD.load(home=home) as dnd:
            for name in ("upper", "digits"):
                dnd.adapt(prompts_of(name), name=name)
        app(["serve", "--home", str(home.root), "--port", "0", "--json", *options])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
