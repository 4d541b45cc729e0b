"""Renders the overlays of k8s/overlays to the objects that `kubectl apply` would send."""

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

JOBS = ["elastic", "gpu", "no-operator", "smoke-cpu", "trainjob"]  # of a launcher and workers
TRAINING = ["daily", *JOBS]
OVERLAYS = sorted([*TRAINING, "serve"])
KUBERNETES_VERSIONS = ["1.35", "1.36", "1.37"]

Object = dict[str, Any]


def kubectl() -> str:
    """Returns the path of kubectl: that of the test dependencies, otherwise the machine's."""
    beside = Path(sys.executable).with_name("kubectl")
    return str(beside) if beside.exists() else shutil.which("kubectl") or missing("kubectl is not installed")


@functools.cache
def render(overlay: str) -> list[Object]:
    """Returns the objects of an overlay. They are shared between tests, which must not change them."""
    done = subprocess.run([kubectl(), "kustomize", ROOT / "k8s" / "overlays" / overlay], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # what is deprecated
    return list(yaml.safe_load_all(done.stdout))


def one(objects: list[Object], kind: str) -> Object:
    """Returns the only object of a kind."""
    (found,) = (each for each in objects if each["kind"] == kind)
    return found
