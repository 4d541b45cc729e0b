"""The tutorial notebook runs from its first cell to its last, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.patience import PATIENCE
from tests.support.repository import ROOT

NOTEBOOK = ROOT / "din_dist" / "api" / "tutorial.ipynb"


def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_is_kept_without_outputs() -> None:
    """Each cell has an id of its own, as the format wants since 4.5."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in cells()}) == len(cells())
    for cell in cells():
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_the_notebook_runs(tmp_path: Path) -> None:
    """Its code is plain Python without IPython's magic, so its cells are one program."""
    program = "\n\n".join("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code")
    path = tmp_path / "tutorial.py"
    path.write_text(program, encoding="utf-8")
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test AUC: " in done.stdout
    assert "test GAUC after 100 updates: " in done.stdout
