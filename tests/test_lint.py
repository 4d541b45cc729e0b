"""Lint, format and types, as tests: launch/test.sh is the one command that says whether a change is sound."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("launch/**/*.sh"), *ROOT.glob(".ci/run"), *ROOT.glob("docker/*.sh")]
)


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check"],
        ["ruff", "format", "--check"],
        ["mypy"],
        ["hadolint", "docker/Dockerfile"],
        ["shellcheck", "--external-sources", *SCRIPTS],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_nothing_to_complain_about(command: list[str]) -> None:
    tool = Path(sys.executable).parent / command[0]
    done = subprocess.run([tool, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
