"""Hundreds of faults at random, and a table of them: `python -m tests.cluster.long_run DATA [--minutes 60] ...`.

One elastic job after another trains on DATA (Amazon Beauty as Parquet) on hosts that are network namespaces; at random
moments a random fault is injected. Each job must end, with every example seen once in each epoch and the GAUC of an
undisturbed run. As root, on Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support.fault_lab import (
    FAULTS,
    FAULTS_OF_JOBS,
    Job,
    Laboratory,
    check,
    gauc_difference,
    seconds_to_go_on,
    wrong_epochs,
)

_RARE = 0.25  # the chance, against the others, of faults that the job has to be started again for
_EPOCHS = 14
_LAST_STEPS = 30  # of a job: none is begun then


class Tally:
    """Of one kind of fault."""

    def __init__(self) -> None:
        self.injected = self.survived = 0
        self.seconds: list[float] = []


def torment(job: Job, until: float) -> list[tuple[str, float]]:
    """Injects faults as long as the job runs; their names and after how many seconds it went on."""
    found: list[tuple[str, float]] = []
    names = list(FAULTS)
    weights = [_RARE if name in FAULTS_OF_JOBS else 1.0 for name in names]
    last = job.laboratory.num_steps - _LAST_STEPS
    while True:
        job.wait_for_updates()
        time.sleep(job.random.uniform(0, 4))
        if not job.running or job.step() > last or time.time() > until:
            return found
        (name,) = job.random.choices(names, weights)
        step, started = job.step(), time.time()
        found.append((name, float("nan")))
        FAULTS[name](job)
        job.wait_for_updates(1)
        found[-1] = (name, seconds_to_go_on(job, started))
        print(f"  step {step}: {name}, went on after {found[-1][1]:.1f} s", flush=True)


def table(tallies: dict[str, Tally], doubled: int) -> str:
    lines = [
        "| fault | injected | survived | seconds until training went on: median | worst |",
        "|---|---|---|---|---|",
    ]
    for name, tally in tallies.items():
        if tally.injected:
            seconds = tally.seconds or [float("nan")]
            lines.append(
                f"| {name} | {tally.injected} | {tally.survived} | {statistics.median(seconds):.1f} "
                f"| {max(seconds):.1f} |"
            )
    every = [seconds for tally in tallies.values() for seconds in tally.seconds] or [float("nan")]
    lines.append(
        f"| all | {sum(tally.injected for tally in tallies.values())} "
        f"| {sum(tally.survived for tally in tallies.values())} | {statistics.median(every):.1f} | {max(every):.1f} |"
    )
    return "\n".join([*lines, "", f"epochs with examples lost or doubled: {doubled}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--stall_timeout_seconds", type=float, default=8)
    parser.add_argument("--disturbance_seconds", type=float, default=3, help="how long a bad cable stays bad")
    arguments = parser.parse_args()
    tallies = {name: Tally() for name in FAULTS}
    jobs, differences, failures, doubled = 0, [], 0, 0
    print(f"seed {arguments.seed}", flush=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        Laboratory(
            Path(folder, "laboratory"),
            arguments.data.absolute(),
            arguments.seed,
            stall_timeout_seconds=arguments.stall_timeout_seconds,
            disturbance_seconds=arguments.disturbance_seconds,
        ) as laboratory,
    ):
        undisturbed: dict[str, Any] = laboratory.undisturbed(_EPOCHS)
        until = time.time() + 60 * arguments.minutes
        while time.time() < until:
            jobs += 1
            print(f"job {jobs}, {(until - time.time()) / 60:.0f} minutes left", flush=True)
            with laboratory.job(f"job-{jobs}", _EPOCHS) as job:
                found: list[tuple[str, float]] = []
                problem = None
                try:
                    found = torment(job, until)
                    summary = job.finish()
                    differences.append(gauc_difference(job, summary, undisturbed))
                    doubled += len(wrong_epochs(summary, undisturbed))
                    check(job, summary, undisturbed)
                except Exception as error:
                    problem = error
                    failures += 1
                    log = Path(tempfile.gettempdir(), f"long_run-{arguments.seed}-{jobs}.log")
                    log.write_text("".join(job.log))
                    print(f"job {jobs} FAILED, see {log}: {error}", flush=True)
                for name, seconds in found:
                    tallies[name].injected += 1
                    tallies[name].survived += problem is None
                    if seconds == seconds:
                        tallies[name].seconds.append(seconds)
    print(table(tallies, doubled))
    with contextlib.suppress(ValueError):
        print(f"jobs: {jobs}, of which {failures} did not end well; largest difference of GAUC: {max(differences):.5f}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
