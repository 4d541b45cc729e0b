"""A power cut at the moment a command has ended: what it says that it published is on the disk, whole.

The commands write to a small ext4 file system in a file. When one has ended, that file is copied as it is, without what
the kernel still keeps in memory, and the copy is mounted.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import command
from tests.support.preloaded import Preloaded, preloaded
from tests.support.programs import missing, program

IMAGE_BYTES = 64 << 20
COMMIT_SECONDS = 300  # of ext4's journal: what is not asked for is not on the disk before
_DETACH = 2  # of umount2
NOT_PUBLISHED = ("lost+found", ".lock", "locks", "tensorboard")


@contextlib.contextmanager
def mounted(image: Path, folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-o", f"loop,{options}", image, folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        missing(f"an ext4 file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        if ctypes.CDLL(None).umount2(os.fsencode(folder), 0) != 0:
            ctypes.CDLL(None).umount2(os.fsencode(folder), _DETACH)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    subprocess.run([program("mkfs.ext4"), "-q", "-F", image], check=True)
    with mounted(image, tmp_path / "disk", f"commit={COMMIT_SECONDS}") as folder:
        yield folder


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Preloaded]:
    with preloaded(tmp_path / "printed") as found:
        yield found


def digests(folder: Path) -> dict[str, str]:
    """What is published there: the path of each file, and what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not set(parts) & set(NOT_PUBLISHED):
            found["/".join(parts)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def after_power_cut(disk: Path, name: str) -> dict[str, str]:
    """The same on a copy of the file system as it is on the disk now."""
    image, copy = disk.with_name("image"), disk.with_name(f"image-{name}")
    subprocess.run(["cp", "--sparse=always", image, copy], check=True)
    with mounted(copy, disk.with_name(f"copy-{name}"), "noatime") as folder:
        return digests(folder)


def test_what_is_published_outlives_a_power_cut(tmp_path: Path, disk: Path, commands: Preloaded) -> None:
    output, export, log = disk / "run", disk / "export", tmp_path / "log.parquet"
    where = f"--output_dir={output}"

    def run(name: str, *words: str) -> None:
        done = commands.run(name, *words)
        now = after_power_cut(disk, name)  # at once
        assert done.returncode == 0, done.stderr
        expected = digests(disk)
        assert expected
        assert now == expected, name

    settings = [*command("train", tmp_path, "--epochs=2")[3:], f"--data_dir={disk / 'prepared'}", where]
    run("prepare_data", *settings)
    run("train", *settings)
    assert json.loads((output / "summary.json").read_text())["steps"] > 100
    run("export", where, f"--export_dir={export}")
    asked = (f"--input={log}", f"--user_histories={output}", f"--predictions_dir={disk / 'predictions'}")
    run("predict", f"--export_dir={export}", *asked)
    run("evaluate", where, f"--evaluation_path={disk / 'evaluation.json'}")
    run("report", where)
    assert {"summary.json", "metrics.jsonl", "report.html"} <= {path.name for path in output.iterdir()}
