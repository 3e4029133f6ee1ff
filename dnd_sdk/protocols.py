"""Small shared types; no third-party imports."""

from __future__ import annotations

import os
from collections.abc import Callable

PathLike = str | os.PathLike[str]

Progress = Callable[[str, int, int, float], None]
"""Called as progress(stage, steps done, steps in all, value): the stage's loss or score, 0 where it has none."""
