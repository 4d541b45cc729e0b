"""The versions that a job runs on."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from din_dist import __version__


@functools.cache
def build_info() -> dict[str, str]:
    """Returns versions by name, and the commit where it is known."""
    packages = {name: metadata.version(name) for name in ("keras", "horovod", "tensorflow-datasets")}
    import tensorflow as tf  # its package goes by two names

    versions = {"python": platform.python_version(), "tensorflow": tf.__version__, **packages}
    named = {name.replace("-", "_"): version for name, version in versions.items()}
    return {"version": __version__, "commit": commit(), **named}


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
