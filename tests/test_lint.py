"""Lint, format and types, as tests: launch/test.sh is the one command that says whether a change is sound."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.repository import ROOT


def lint(root: Path, *flags: str, environment: str = sys.prefix) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "DIN_DIST_VENV": environment}
    return subprocess.run([root / "launch" / "lint.sh", *flags], env=variables, capture_output=True, text=True)


def test_nothing_to_complain_about() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of few files that all tools accept."""
    for name in (".ci/run", "launch/lint.sh", "launch/common.sh", "docker/Dockerfile", "pyproject.toml", "setup.cfg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "din_dist").mkdir()
    (tmp_path / "din_dist" / "__init__.py").touch()
    return tmp_path


def test_each_tool_is_heard(checkout: Path) -> None:
    (checkout / "din_dist" / "wrong.py").write_text('import os\n\n\ndef one() -> int:\n    return  "1"\n')
    (checkout / "docker" / "wrong.sh").write_text("#!/bin/bash\ncp $1 $2\n")
    (checkout / "docker" / "Dockerfile").write_text("FROM debian\n")
    done = lint(checkout)
    assert done.returncode == 1
    for said in ("F401", "1 file would be reformatted", "[return-value]", "SC2086", "DL3006"):
        assert said in done.stdout


def test_fix(checkout: Path) -> None:
    wrong = checkout / "din_dist" / "wrong.py"
    wrong.write_text("import os\n\n\ndef one() -> int:\n    return  1\n")
    done = lint(checkout, "--fix")
    assert done.returncode == 0, done.stdout + done.stderr
    assert wrong.read_text() == "def one() -> int:\n    return 1\n"


def test_mistakes_of_the_user(checkout: Path) -> None:
    done = lint(checkout, "--format")
    assert (done.returncode, done.stderr) == (2, "lint.sh: flags: must be --fix or none. Received: '--format'.\n")
    nowhere = str(checkout / "no environment")
    done = lint(checkout, environment=nowhere)
    expected = f"lint.sh: there must be ruff in {nowhere}/bin. Run launch/setup.sh --test.\n"
    assert (done.returncode, done.stderr) == (2, expected)
