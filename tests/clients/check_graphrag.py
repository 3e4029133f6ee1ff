"""GraphRAG's own commands with the example's settings: a graph is made of a text, and questions about it answered."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
from common import EXAMPLES, SAYS, WIDTH

TEXT = "Acme makes anvils. Acme is in Paris. Paris is a city in France.\n"


def graphrag(folder: Path, *words: str) -> str:
    program = Path(sys.executable).with_name("graphrag")
    done = subprocess.run([program, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).strip()
    return done.stdout


def main(folder: Path) -> None:
    (folder / "input").mkdir()
    (folder / "input" / "acme.txt").write_text(TEXT, "utf-8")
    shutil.copy(EXAMPLES / "graphrag" / "settings.yaml", folder)
    assert f"vector_size: {WIDTH}" in (folder / "settings.yaml").read_text("utf-8")
    graphrag(folder, "index", "--skip-validation")
    made = folder / "output"
    assert set(pd.read_parquet(made / "entities.parquet")["title"]) == {"ACME", "PARIS"}
    assert len(pd.read_parquet(made / "relationships.parquet")) == 1
    assert len(pd.read_parquet(made / "community_reports.parquet")) == 1
    assert SAYS in graphrag(folder, "query", "Who makes anvils?", "--method", "local")
    assert "given the provided data" in graphrag(folder, "query", "What is this about?", "--method", "global")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(made))
