"""Predicts training speed on more workers: `python -m din_dist.cli.predict_scaling --measured=one_worker.json ...`.

`--measured` names a file with the last line on stdout of `python -m din_dist.cli.benchmark`, run with one worker. The
command prints a table to stderr and, as the last line on stdout, the same numbers as JSON. The model is in
`din_dist/benchmark/scaling_model.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from absl import flags

from din_dist.benchmark.scaling_model import Cluster, Measured, Prediction, predict
from din_dist.cli import entry
from din_dist.cli.flags import define_path
from din_dist.cli.help import theme
from din_dist.config import require
from din_dist.errors import InputError
from din_dist.files import read_text

with theme("measurement"):
    define_path("measured", "", "File with the JSON line of the benchmark, run with one worker. Required.")
with theme("cluster"):
    flags.DEFINE_float(
        "bandwidth_gbits", None, "Bandwidth of each worker's link in each direction, in Gbit/s. Required."
    )
    flags.DEFINE_float(
        "latency_us",
        None,
        "Time that a small message takes from one worker's process to another's, in microseconds: half a round trip "
        "over TCP, not the data sheet of the switch. Required.",
    )
    flags.DEFINE_float(
        "overhead_us",
        0.0,
        "Time of software for each message of a step, in microseconds, as `python -m tests.benchmarks.network` "
        "measures it.",
    )
    flags.DEFINE_list("workers", [str(2**power) for power in range(3, 11)], "Numbers of workers to predict for.")


def main() -> None:
    """Predicts the speed for each number of workers and prints a table."""
    values = flags.FLAGS
    _require_number("bandwidth_gbits", values.bandwidth_gbits, "Give Gbit/s, for example 25.", zero=False)
    _require_number("latency_us", values.latency_us, "Give microseconds, for example 50.")
    _require_number("overhead_us", values.overhead_us, "Give microseconds, or drop it for none.")
    world_sizes = [_world_size(text) for text in values.workers]
    require(bool(world_sizes), "must name at least one number", "workers", values.workers, "For example 8,16,32.")
    measured = read_measured(values.measured)
    cluster = Cluster(values.bandwidth_gbits * 1e9, values.latency_us / 1e6, values.overhead_us / 1e6)
    predictions = [predict(measured, cluster, world_size) for world_size in world_sizes]
    entry.say(_table(measured, cluster, predictions))
    found: dict[str, Any] = {
        "kind": "prediction",  # so that nobody takes it for a measurement
        "measured": dataclasses.asdict(measured),
        "cluster": dataclasses.asdict(cluster),
        "predictions": [prediction.to_json() for prediction in predictions],
    }
    print(json.dumps(found), flush=True)


def read_measured(path: str) -> Measured:
    """Reads the measurements of one worker from the last line of a file.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    remedy = "Save the last line on stdout of `python -m din_dist.cli.benchmark`, run with one worker."
    require(bool(path), "must name a file", "measured", path, remedy)
    try:
        lines = read_text(Path(path)).strip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        rule = "must be a file that can be read"
        raise InputError(f"--measured: {rule}. Received: {path!r}: {reason}. {remedy}") from None
    last = lines[-1] if lines else ""
    try:
        report = json.loads(last)
    except ValueError:
        report = None
    if not isinstance(report, dict):
        raise InputError(f"{path}: must end in a line of JSON. Received: {last[:60]!r}. {remedy}")
    return Measured.from_report(report, path)


def _require_number(name: str, value: float | None, remedy: str, zero: bool = True) -> None:
    holds = value is not None and math.isfinite(value) and (value > 0 or (zero and value == 0))
    require(holds, f"must be a number {'from 0 up' if zero else 'above 0'}", name, value, remedy)


def _world_size(text: str) -> int:
    require(
        text.isascii() and text.isdigit() and int(text) >= 1,
        "must be whole numbers from 1 up",
        "workers",
        text,
        "For example 8,16,32.",
    )
    return int(text)


def _table(measured: Measured, cluster: Cluster, predictions: list[Prediction]) -> str:
    terms = list(predictions[0].seconds)
    head = ["workers", "examples/s", "efficiency", "ms a step", *(term.replace("_", " ") for term in terms)]
    widths = [max(len(name), 10) for name in head]
    lines = [
        "PREDICTION, not a measurement: "
        f"{cluster.bandwidth_bits_per_second / 1e9:g} Gbit/s a worker, {cluster.latency_seconds * 1e6:g} us latency, "
        f"{cluster.message_overhead_seconds * 1e6:g} us of software a message.",
        f"One worker was measured: batch {measured.per_worker_batch_size:,} in {measured.compute_seconds * 1e3:.2f} ms."
        " Each worker keeps that batch (weak scaling). Terms in ms:",
        "  ".join(name.rjust(width) for name, width in zip(head, widths, strict=True)) + "  dominant term",
    ]
    for prediction in predictions:
        cells = [
            f"{prediction.world_size:,}",
            f"{prediction.examples_per_second:,.0f}",
            f"{prediction.efficiency:.1%}",
            *(f"{seconds * 1e3:,.2f}" for seconds in (prediction.step_seconds, *prediction.seconds.values())),
        ]
        row = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{row}  {prediction.dominant_term.replace('_', ' ')}")
    return "\n".join(lines)


if __name__ == "__main__":
    entry.run(main)
