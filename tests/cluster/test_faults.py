"""Each kind of fault once, on real hosts. Hundreds of them, at random: `tests/cluster/long_run.py`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.laboratory import FAULTS_OF_JOBS, FAULTS_OF_WORKERS, Job, Laboratory, check, seconds_to_go_on
from tests.cluster_lab import LabError
from tests.programs import missing

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif("DIN_DIST_FAULTS" not in os.environ, reason="takes ten minutes: set DIN_DIST_FAULTS=1"),
]
SEED = 20181


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Iterator[Laboratory]:
    folder = tmp_path_factory.mktemp("laboratory")
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(Laboratory(folder, shared_data / "amazon_beauty.parquet", SEED, epochs=5))
        except LabError as error:
            missing(str(error))
        yield found


@pytest.fixture(scope="module")
def undisturbed(laboratory: Laboratory) -> dict[str, Any]:
    return laboratory.undisturbed()


def inject(job: Job, faults: Mapping[str, Callable[[Job], None]]) -> None:
    for name, fault in faults.items():
        job.wait_for_updates()
        assert job.running, "the job is too short for all these faults"
        started = time.time()
        fault(job)
        job.wait_for_updates()
        print(f"{name}: {seconds_to_go_on(job, started):.1f} s until training went on, at step {job.step()}")


def test_workers_that_are_lost_and_hosts_that_misbehave(laboratory: Laboratory, undisturbed: dict[str, Any]) -> None:
    print(f"seed {SEED}")
    with laboratory.job("workers") as job:
        inject(job, FAULTS_OF_WORKERS)
        summary = job.finish()
    check(summary, undisturbed)
    assert summary["metrics"]["din_dist_checkpoint_failures_total"] >= 1


def test_a_job_whose_launcher_is_lost_goes_on_when_started_again(
    laboratory: Laboratory, undisturbed: dict[str, Any]
) -> None:
    with laboratory.job("launcher") as job:
        inject(job, FAULTS_OF_JOBS)
        check(job.finish(), undisturbed)
