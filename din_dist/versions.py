"""The versions that a job runs on, and the packages that it cannot do without."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from din_dist import __version__
from din_dist.errors import InputError


def require_tensorflow() -> None:
    """Checks that TensorFlow is installed; an extra of the package chooses the one for CPUs or for GPUs.

    Raises:
        InputError: it is not.
    """
    _require(
        "TensorFlow: must be installed, by an extra of din_dist. Received: none. Install din_dist[cpu], or "
        "din_dist[gpu] where there are GPUs: pip install 'WHEEL[cpu]'.",
        "tensorflow",
    )


def require_horovod() -> None:
    """Checks that Horovod is installed, which only several workers need.

    Raises:
        InputError: it is not.
    """
    _require(
        "Horovod: must be installed where there are several workers. Received: none. Install "
        "din_dist[distributed] (with GPUs din_dist[distributed-gpu]), or use one worker.",
        "horovod",
    )


def _require(otherwise: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(otherwise)


@functools.cache
def build_info() -> dict[str, str]:
    """Returns versions by name, and the commit where it is known."""
    packages = {name: _version(name) for name in ("keras", "horovod", "tensorflow-datasets")}
    import tensorflow as tf  # its package goes by two names

    versions = {"python": platform.python_version(), "tensorflow": tf.__version__, **packages}
    named = {name.replace("-", "_"): version for name, version in versions.items()}
    return {"version": __version__, "commit": commit(), **named}


def _version(name: str) -> str:
    """Returns the version of an installed package, otherwise `none`: one worker needs no Horovod."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def commit() -> str:
    """Returns the commit of the checkout that this runs from; images give it by DIN_DIST_COMMIT."""
    if told := os.environ.get("DIN_DIST_COMMIT"):
        return told
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return "unknown"
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
