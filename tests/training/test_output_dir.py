"""One job a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from din_dist.errors import InputError
from din_dist.training.output_dir import claim_output_dir


def test_a_second_job_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    first = claim_output_dir(folder)
    with pytest.raises(InputError, match=r"--output_dir: one job at a time\. Received: .*run, where another"):
        claim_output_dir(folder)
    first.close()
    claim_output_dir(folder).close()


def test_a_killed_job_holds_nothing(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, sys; from din_dist.training.output_dir import claim_output_dir; "
        "lock = claim_output_dir(pathlib.Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert done.returncode == -9
    claim_output_dir(tmp_path).close()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", Path("/proc/run")):
        with pytest.raises(InputError, match=r"--output_dir: must be a folder that can be written\. Received: "):
            claim_output_dir(folder)


def test_another_process_of_the_same_job_takes_the_folder_over(tmp_path: Path) -> None:
    lost = claim_output_dir(tmp_path, "job one")
    with pytest.raises(InputError, match="one job at a time"):
        claim_output_dir(tmp_path, "job two")
    with pytest.raises(InputError, match="one job at a time"):
        claim_output_dir(tmp_path)
    successor = claim_output_dir(tmp_path, "job one")
    lost.close()  # the lost one dies at last: nothing is free by that
    with pytest.raises(InputError, match="one job at a time"):
        claim_output_dir(tmp_path, "job two")
    successor.close()
    claim_output_dir(tmp_path, "job two").close()


def test_jobs_without_a_name_are_not_the_same_job(tmp_path: Path) -> None:
    with claim_output_dir(tmp_path), pytest.raises(InputError, match="one job at a time"):
        claim_output_dir(tmp_path)
