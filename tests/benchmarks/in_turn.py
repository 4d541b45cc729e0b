"""Times updates of several jobs in one process, in turn, so that they meet the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

ROUNDS, STEPS, WARMUP = 25, 8, 25


def compare(jobs: Mapping[str, Any], first: str) -> dict[str, dict[str, Any]]:
    """Returns the median seconds of an update of each job, and their ratios to those of the job named `first`.

    Args:
        jobs: name -> an `Assembly`.
        first: the name of the job that the others are compared with.

    Returns:
        For `wall` and `cpu`: `seconds`, name -> median; `ratio`, name -> median of the ratios within a round;
        `of_shortest`, name -> ratio of the shortest times, which other processes disturb least.
    """
    from din_dist.benchmark.step import StepBenchmark

    forms = {}
    for name, job in jobs.items():
        forms[name] = StepBenchmark(job.step, job.make_batches(0, 2**40), job.config.job.global_batch_size, None)
        forms[name].run(WARMUP)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for _ in range(ROUNDS):
        for name, form in forms.items():
            started = time.process_time()
            seconds = form.run(STEPS).seconds
            times[name].append((seconds / STEPS, (time.process_time() - started) / STEPS))
    return {kind: _summary(times, first, place) for place, kind in enumerate(("wall", "cpu"))}


def _summary(times: Mapping[str, list[tuple[float, float]]], first: str, place: int) -> dict[str, Any]:
    own = {name: [pair[place] for pair in pairs] for name, pairs in times.items()}
    others = [name for name in own if name != first]
    ratios = {
        name: statistics.median(slow / fast for slow, fast in zip(own[name], own[first], strict=True))
        for name in others
    }
    return {
        "seconds": {name: statistics.median(seconds) for name, seconds in own.items()},
        "ratio": ratios,
        "of_shortest": {name: min(own[name]) / min(own[first]) for name in others},
    }
