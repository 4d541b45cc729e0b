"""Each kind of fault once, on real hosts. Hundreds of them, at random: `tests/cluster/long_run.py`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.fault_lab import FAULTS, Laboratory, check, seconds_to_go_on
from tests.support.faulty_disk import NoFaultyDisk
from tests.support.host_lab import LabError
from tests.support.programs import missing
from tests.support.small_log import write_log

pytestmark = pytest.mark.timeout(2400)
SEED = 20181


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    folder = tmp_path_factory.mktemp("laboratory")
    log = folder / "log.parquet"
    write_log(log, num_users=13_000, num_items=12_000)  # an epoch of 256 updates, as many as Amazon Beauty has
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(Laboratory(folder, log, SEED, stall_timeout_seconds=8, disturbance_seconds=3))
        except (LabError, NoFaultyDisk) as error:
            missing(str(error))
        yield found


@pytest.fixture(scope="module")
def undisturbed(laboratory: Laboratory) -> dict[str, Any]:
    return laboratory.undisturbed()


def test_a_job_goes_on_after_each_fault_and_loses_no_example(
    laboratory: Laboratory, undisturbed: dict[str, Any]
) -> None:
    print(f"seed {SEED}")
    with laboratory.job("job") as job:
        for name, fault in FAULTS.items():
            job.wait_for_updates()
            assert job.running, f"the job is too short for all faults: {name} is still to come"
            started = time.time()
            fault(job)
            job.wait_for_updates(1)
            print(f"{name}: {seconds_to_go_on(job, started):.1f} s until training went on, at step {job.step()}")
        summary = job.finish()
    check(summary, undisturbed)
    assert summary["metrics"]["din_dist_checkpoint_failures_total"] >= 1, "of the full disk, the last fault"
