"""What a command takes its time with before it works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.patience import PATIENCE
from tests.support.repository import ROOT

IMPORTS = """
from din_dist.cli import entry
entry.import_tensorflow()
for name in ("matplotlib", "pandas"):
    try:
        __import__(name)
    except ZeroDivisionError:  # what is there is found again
        print(name)
"""


def test_libraries_of_keras_that_no_command_needs_are_not_imported(tmp_path: Path) -> None:
    for name in ("matplotlib", "pandas"):
        (tmp_path / f"{name}.py").write_text("1 / 0")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{IMPORTS}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "matplotlib\npandas\n", "")
