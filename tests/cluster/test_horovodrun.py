"""launch/horovodrun.sh on two hosts, which are real but for the machine that they share."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.support import host_lab
from tests.support.launcher_jobs import environment
from tests.support.programs import missing
from tests.support.repository import ROOT

FLAGS = (
    *host_lab.SMALL_JOB,
    "--global_batch_size=512",
    "--epochs=1",
    "--noxla",
)


def test_two_hosts(tmp_path: Path) -> None:
    # Reaches the workers, as every other variable: the log of each says at this level that Horovod has started.
    variables = {**environment(), "HOROVOD_LOG_LEVEL": "info"}
    try:
        with host_lab.hosts(2) as (first, second):
            flags = [
                f"--hosts={first.address},{second.address}",
                "--network_interface=eth0",
                "--wait_for_hosts_seconds=30",
            ]
            flags += [f"--log_dir={tmp_path}/logs", f"--data_dir={tmp_path}/data", f"--output_dir={tmp_path}/output"]
            done = subprocess.run(
                first.command([str(ROOT / "launch" / "horovodrun.sh"), *flags, *FLAGS]),
                env=variables,
                capture_output=True,
                text=True,
                check=False,
                timeout=240,
            )
    except host_lab.LabError as error:
        missing(str(error))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["world_size"] == 2
    for rank in (0, 1):
        assert f"[{rank}]: Horovod initialized" in (tmp_path / "logs" / f"rank-{rank}.log").read_text()
