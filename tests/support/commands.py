"""Runs our commands as users do: real processes on the synthetic log of `small_log`.

prepare_log(tmp_path)
done = run("train", tmp_path, "--epochs=1")
assert_one_line(run("train", tmp_path, "--dropout=2"), "--dropout: must be in [0, 1)")
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from din_dist.config import DataConfig
from tests.support.patience import PATIENCE
from tests.support.preloaded import Preloaded
from tests.support.repository import ROOT
from tests.support.small_log import write_log


def prepare_log(folder: Path) -> None:
    """Prepares the log of the small job in `folder` as `prepare_data` does, but in this process, which takes less time.

    For tests of other commands: those of `prepare_data` itself start it by `run`.
    """
    from din_dist.data.prepared import prepare  # here, as it takes seconds

    prepare(DataConfig(dataset="event_log", data_path=str(_log(folder)), data_dir=str(folder / "prepared")))


def _log(folder: Path) -> Path:
    log = folder / "log.parquet"
    if not log.exists():
        write_log(log, num_users=200)
    return log


def command(name: str, folder: Path, *flags: str) -> list[str]:
    """Returns the words that start `din_dist.cli.<name>` on a small job in `folder`; writes its log if there is none.

    The log is `folder`/log.parquet, the prepared data `folder`/prepared and the output `folder`/run. A flag in `flags`
    overrides the same flag of the small job.
    """
    return [
        *(sys.executable, "-m", f"din_dist.cli.{name}", "--dataset=event_log", f"--data_path={_log(folder)}"),
        *(f"--data_dir={folder / 'prepared'}", f"--output_dir={folder / 'run'}", "--metrics_port=-1"),
        *("--embedding_dim=8", "--hidden_units=8", "--attention_hidden_units=8", "--global_batch_size=64"),
        *("--max_history_length=10", "--log_every_steps=1", "--noxla", *flags),
    ]


def run(name: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Runs `command(...)` to its end, whatever its exit code."""
    return subprocess.run(
        command(name, folder, *flags), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def run_at_once(commands: Preloaded, name: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Does what `run` does, in a process that has its imports: for what a test needs beside its subject."""
    return commands.run(name, *command(name, folder, *flags)[3:])


def assert_one_line(done: subprocess.CompletedProcess[str], message: str, code: int = 2) -> None:
    """Asserts that a command ended with `code` and one line on stderr: an error that contains `message`."""
    assert done.returncode == code, done.stderr
    # Horovod's library may remark on a rank that is gone before the others are.
    lines = [line for line in done.stderr.strip().splitlines() if "/horovod/common/" not in line]
    assert len(lines) == 1, done.stderr
    (line,) = lines
    assert line.startswith("error: ")
    assert message in line
