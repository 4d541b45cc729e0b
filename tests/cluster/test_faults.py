"""Faults on real hosts, each once; all of them with `--thorough`. Hundreds at random: `tests/cluster/long_run.py`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from tests.support.fault_lab import FAULTS, Laboratory, check, end_after_this_epoch, seconds_to_go_on
from tests.support.faulty_disk import NoFaultyDisk
from tests.support.host_lab import LabError
from tests.support.programs import missing
from tests.support.small_log import write_log

pytestmark = pytest.mark.timeout(2400)
SEED = 20181
DELAY_MS = 4
ONE_OF_EACH_KIND = (  # and SIGTERM of the launcher, with which the test ends the job
    "SIGKILL of the chief",
    "SIGTERM of a worker",
    "a host freezes",
    "a host is reset",
    "bytes change on a cable",
    "the output disk sticks",
    "a host's data disk sticks",
    "disk full",
)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    folder = tmp_path_factory.mktemp("laboratory")
    log = folder / "log.parquet"
    write_log(log, num_users=13_000, num_items=12_000)  # an epoch of 256 updates
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(
                Laboratory(folder, log, SEED, stall_timeout_seconds=8, disturbance_seconds=3, delay_ms=DELAY_MS)
            )
        except (LabError, NoFaultyDisk) as error:
            missing(str(error))
        yield found


@pytest.mark.thorough(unless=lambda case: case["names"] == ONE_OF_EACH_KIND)
@pytest.mark.parametrize("names", [ONE_OF_EACH_KIND, tuple(FAULTS)], ids=["one of each kind", "all"])
def test_a_job_goes_on_after_each_fault_and_loses_no_example(laboratory: Laboratory, names: tuple[str, ...]) -> None:
    print(f"seed {SEED}")
    with laboratory.job("job") as job:
        for name in names:
            job.wait_for_updates()
            assert job.running, f"{name} is still to come"
            started = time.time()
            FAULTS[name](job)
            job.wait_for_updates(1)
            print(f"{name}: {seconds_to_go_on(job, started):.1f} s until training went on, at step {job.step()}")
        assert job.counter("din_dist_checkpoint_failures_total") >= 1, "of the full disk, the last fault"
        end_after_this_epoch(job)
        summary = job.finish()
    check(job, summary, laboratory.undisturbed(job.epochs))
