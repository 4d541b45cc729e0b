"""Runs a job from its log to its export by our commands.

folder = finish(commands, folder, "--epochs=2", "--learning_rate=0.02")
"""

from __future__ import annotations

from pathlib import Path

from tests.support.commands import command
from tests.support.preloaded import Preloaded


def finish(commands: Preloaded, folder: Path, *flags: str, export: bool = True) -> Path:
    """Prepares FOLDER/log.parquet, trains to FOLDER/run and exports to FOLDER/export; returns the folder.

    Args:
        commands: runs them.
        folder: of the log; its small job is that of `command`.
        flags: of prepare_data and train.
        export: whether the job is exported.
    """
    settings = command("train", folder, *flags)[3:]
    for name in ("prepare_data", "train"):
        run(commands, name, *settings)
    if export:
        run(commands, "export", f"--output_dir={folder / 'run'}", f"--export_dir={folder / 'export'}")
    return folder


def run(commands: Preloaded, name: str, *flags: str) -> None:
    """Runs a command, which must succeed."""
    done = commands.run(name, *flags)
    assert done.returncode == 0, done.stderr
