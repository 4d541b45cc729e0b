"""What is said when a page of a mapped file cannot be read: a process whose file is cut under it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from din_dist import kernels
from din_dist.data.event_store import map_array
from tests.support.patience import PATIENCE
from tests.support.programs import missing
from tests.support.repository import ROOT

PAGE = os.sysconf("SC_PAGESIZE")

READER = """
import os, sys, threading
from pathlib import Path
import numpy as np
from absl import flags
from din_dist.cli import entry
from din_dist.config import LogFormat
from din_dist.data import event_store
flags.DEFINE_string("log_format", "text", "")
path, way = Path(sys.argv.pop(1)), sys.argv.pop(1)
def main():
    entry.import_tensorflow()
    arrays = [event_store.map_array(path, {}) for _ in range(3)]
    mapped = np.load(path, mmap_mode="c") if way == "unwatched" else arrays.pop()
    if way == "unmapped":
        del mapped
        arrays.clear()
        mapped = np.load(path, mmap_mode="c")
    os.truncate(path, os.sysconf("SC_PAGESIZE"))
    threads = [threading.Thread(target=lambda: np.asarray(mapped).sum()) for _ in range(3 if way == "threads" else 0)]
    for thread in threads:
        thread.start()
    print(np.asarray(mapped).sum())
entry.run(main)
"""


@pytest.fixture
def array(tmp_path: Path) -> Path:
    if not kernels.PATH.exists():
        missing("the kernels are not compiled: launch/build_kernels.sh")
    np.save(tmp_path / "values.npy", np.arange(4 * PAGE, dtype=np.uint8))
    return tmp_path / "values.npy"


def read(array: Path, way: str, *flags: str, **keywords: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", READER, str(array), way, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        **keywords,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize("way", ["main", "threads"])
def test_a_file_that_is_cut_is_one_line(array: Path, way: str) -> None:
    done = read(array, way)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"error: {array}: must stay as it is while it is in use. Received: a file that ends before byte "
    )
    offset = int(line.partition("before byte ")[2].partition(".")[0])
    assert PAGE <= offset < 5 * PAGE


def test_log_collectors_and_the_agent_learn_it(array: Path) -> None:
    hear, tell = os.pipe()
    environment = {**os.environ, "DIN_DIST_BEATS_FD": str(tell)}
    done = read(array, "main", "--log_format=json", env=environment, pass_fds=[tell])
    os.close(tell)
    line = json.loads(done.stderr)
    assert (line["level"], done.returncode) == ("error", 2)
    assert line["time"] > 1e9
    assert "Received: a file that ends before byte " in line["message"]
    assert os.read(hear, 100) == b"\nends 2\n\ngone\n"
    os.close(hear)


@pytest.mark.parametrize("way", ["unwatched", "unmapped"])
def test_what_is_not_watched_ends_as_the_kernel_has_it(array: Path, way: str) -> None:
    done = read(array, way)
    assert done.returncode == -signal.SIGBUS
    assert "must stay as it is" not in done.stderr


def test_more_files_than_there_are_places_are_mapped_all_the_same(array: Path) -> None:
    kept = [map_array(array, {}) for _ in range(520)]
    assert all(int(values.sum()) == int(kept[0].sum()) for values in kept)
