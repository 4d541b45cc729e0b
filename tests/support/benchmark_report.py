"""A benchmark report of one worker with round numbers, so that predictions from it can be worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

from din_dist.benchmark.scaling_model import Measured

MEASURED = Measured(
    compute_seconds=0.1,
    update_seconds=0.02,
    row_merge_seconds=0.003,
    per_worker_batch_size=100,
    dense_gradient_bytes=1_000_000,
    row_gradient_bytes=500_000,
    table_bytes=1_500_000,
    num_statistics_messages=4,
    statistics_bytes=200_000,
    num_gradient_messages=3,
    num_gather_messages=2,
    owners_sum_rows=False,
)


def benchmark_report(**changes: Any) -> dict[str, Any]:
    """Returns the JSON object that the benchmark would print for `MEASURED`, with `changes` to its fields."""
    found = dataclasses.asdict(MEASURED)
    found["step_seconds"] = found.pop("compute_seconds")
    found["global_batch_size"] = found.pop("per_worker_batch_size")
    return {**found, "world_size": 1, "examples_per_second": 1000.0, **changes}
