"""What k8s/overlays render to."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.support.programs import missing
from tests.support.repository import ROOT

OVERLAYS = ["elastic", "gpu", "no-operator", "smoke-cpu"]

Object = dict[str, Any]


def kubectl() -> str:
    """The one that the test dependencies bring, or else the machine's."""
    beside = Path(sys.executable).with_name("kubectl")
    return str(beside) if beside.exists() else shutil.which("kubectl") or missing("kubectl is not installed")


@functools.cache
def render(overlay: str) -> list[Object]:
    """Not to be changed: others get the same."""
    done = subprocess.run([kubectl(), "kustomize", ROOT / "k8s" / "overlays" / overlay], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # what is deprecated
    return list(yaml.safe_load_all(done.stdout))
