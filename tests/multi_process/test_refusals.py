"""What goes wrong on one of two workers: one line and one exit code for the job."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from din_dist.training.output_dir import claim_output_dir
from tests.support.commands import assert_one_line, command, prepare_log
from tests.support.launcher_jobs import environment, launch, launcher, worker_of
from tests.support.patience import PATIENCE


def without_preparation(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """What came after the data was described."""
    done.stderr = done.stderr.partition("prepared in ")[2].partition("\n")[2]
    return done


def test_a_port_that_only_the_second_worker_needs(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = launch(tmp_path, f"--metrics_port={port - 1}")
    line = without_preparation(done)
    line.stderr = line.stderr.replace("[1] ", "")
    assert_one_line(line, f"--metrics_port: each rank of a machine needs a free port on 127.0.0.1. Received: {port}")


def test_two_jobs_in_one_folder(tmp_path: Path) -> None:
    with claim_output_dir(tmp_path / "run"):
        done = launch(tmp_path)
    assert_one_line(without_preparation(done), "--output_dir: one job at a time")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_lost_worker_is_one_line_from_the_other(tmp_path: Path) -> None:
    prepare_log(tmp_path)
    with subprocess.Popen(
        launcher(tmp_path, "--epochs=500"), env=environment(), stderr=subprocess.PIPE, text=True
    ) as job:
        assert job.stderr
        for line in job.stderr:
            if line.startswith("step 10 of "):
                os.kill(worker_of(1, tmp_path), signal.SIGKILL)
                break
        # Steps and epochs that came before it was found. Horovod's own word on the connection stays: it names the peer.
        before = ("step ", "epoch ")
        rest = [line for line in job.stderr if not line.startswith(before) and "Horovod background loop" not in line]
    assert job.returncode == 137
    assert re.fullmatch(
        r"error: rank 0 lost another worker at step \d+ and cannot go on alone. The same command resumes.\n", rest[0]
    )
    assert rest[1].startswith("train.sh: worker 1 was killed (SIGKILL).")
    assert len(rest) == 2


def test_a_card_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    """Where the launcher has it, and another host has not."""
    horovodrun = [str(Path(sys.executable).with_name("horovodrun")), "--gloo", "-np", "2"]
    done = subprocess.run(
        [*horovodrun, "env", "HOROVOD_GLOO_IFACE=eth7", *command("train", tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    said = {line for line in done.stderr.splitlines() if "must reach the other workers" in line}
    assert {re.sub(r"^\[[01]\]<stderr>:error: rank [01]", "", line) for line in said} == {
        " must reach the other workers. Received: ifa != nullptr. Unable to find address for: eth7. See "
        "launch/README.md."
    }, done.stderr
    assert not [line for line in done.stderr.splitlines() if line.startswith("[") and "Traceback" in line]


@pytest.mark.thorough(unless=lambda case: case["host"] == "192.0.2.7")
@pytest.mark.parametrize("host", ["192.0.2.7", "no-such-host.invalid"])
def test_metrics_at_an_address_that_is_not_here(tmp_path: Path, host: str) -> None:
    done = without_preparation(launch(tmp_path, "--metrics_port=0", f"--metrics_host={host}"))
    assert_one_line(done, f"--metrics_host: must be a name or address of this machine. Received: {host}, ")
