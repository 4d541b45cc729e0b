"""Series of benchmarks: `python -m din_dist.cli.benchmark --sweep=workers|batch|rows|history`.

Every point is a process of its own (or, for workers, a `horovodrun`), so that none profits from another's memory or
caches. The points take turns for several rounds, because a machine's speed drifts.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from din_dist.config import require
from din_dist.errors import InputError
from din_dist.versions import require_horovod

HISTORY_EVENTS = 2_000_000  # in total, whatever the length of the histories


class Sweep(NamedTuple):
    """One quantity that a series varies."""

    label: str
    default: tuple[int, ...]
    smallest: int


SWEEPS = {
    "workers": Sweep("workers, each with the same batch and cores", (1, 2), 1),
    "batch": Sweep("global batch size", (256, 512, 1024, 2048, 4096, 8192), 1),
    "rows": Sweep("rows of the item table", (12_000, 100_000, 1_000_000, 10_000_000), 2),
    "history": Sweep("longest history, events", (10, 100, 1_000, 10_000), 1),
}


def run(
    kind: str,
    values: Sequence[str],
    rounds: int,
    folder: Path,
    settings: Sequence[str],
    flags: Sequence[str],
    batch_size: int,
    say: Callable[[str], None],
) -> None:
    """Runs a series and writes `KIND.csv` and `KIND.svg` in `folder`.

    Args:
        kind: a key of `SWEEPS`.
        values: the points; empty: the default of `SWEEPS`.
        rounds: how often each point is measured.
        folder: for the results.
        settings: the trainer's flags.
        flags: the benchmark's own flags, without those of the sweep.
        batch_size: the global batch of the flags; in a sweep over workers, the batch of each worker.
        say: prints a line of progress.

    Raises:
        InputError: a setting is wrong, or a benchmark failed.
    """
    points = _points(kind, values)
    try:
        plotting = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise InputError(
            "--sweep draws a plot, which needs matplotlib. Received: none installed. Run: pip install matplotlib."
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    for point in points if kind == "history" else []:
        say(f"preparing {point:,} {SWEEPS[kind].label}")
        _run([sys.executable, "-m", "din_dist.cli.prepare_data", *settings, *_overrides(kind, point, batch_size)])
    results = []
    for number in range(rounds):
        for point in points:
            found = _measure(kind, point, [*settings, *flags], batch_size, most=max(points))
            results.append({"round": number + 1, kind: point, **_flat(found)})
            _write_csv(folder / f"{kind}.csv", results)  # after each: a long series may be stopped
            say(
                f"round {number + 1}, {kind} {point:,}: {found['examples_per_second']:,.0f} examples/s, "
                f"{found['step_seconds'] * 1e3:.1f} ms a step"
            )
    medians = {
        point: {
            name: statistics.median(result[name] for result in results if result[kind] == point)
            for name in ("examples_per_second", "step_seconds", "positions_per_step")
        }
        for point in points
    }
    _plot(plotting, kind, medians, folder / f"{kind}.svg")
    for point, found in medians.items():
        say(f"{point:12,} {kind}: {_against(medians[points[0]], found)}")
    print(json.dumps({"sweep": kind, "medians": medians}), flush=True)


def _points(kind: str, values: Sequence[str]) -> list[int]:
    require(kind in SWEEPS, f"must be of {', '.join(SWEEPS)}", "sweep", kind, "For example batch.")
    sweep = SWEEPS[kind]
    for value in values:
        require(
            value.isdecimal() and int(value) >= sweep.smallest,
            f"must be whole numbers from {sweep.smallest}",
            "sweep_values",
            value,
            f"For example {','.join(map(str, sweep.default))}.",
        )
    points = sorted({int(value) for value in values}) or list(sweep.default)
    cores = len(os.sched_getaffinity(0))
    require(
        kind != "workers" or max(points) <= cores,
        f"needs a core for each worker, and this machine has {cores}",
        "sweep_values",
        str(max(points)),
        "Give fewer workers.",
    )
    return points


def _overrides(kind: str, point: int, batch_size: int) -> list[str]:
    match kind:
        case "workers":
            return [f"--global_batch_size={batch_size * point}"]
        case "batch":
            return [f"--global_batch_size={point}"]
        case "rows":
            return [f"--benchmark_item_rows={point}"]
        case _:
            return [
                "--dataset=synthetic",
                "--data_path=",
                f"--max_history_length={point}",
                f"--synthetic_events_per_user={2 * point}",  # so that a window is full half of the time
                f"--synthetic_num_users={max(16, HISTORY_EVENTS // (2 * point))}",
            ]


def _measure(kind: str, point: int, flags: Sequence[str], batch_size: int, most: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "din_dist.cli.benchmark", *flags, *_overrides(kind, point, batch_size)]
    cores = sorted(os.sched_getaffinity(0))
    if kind == "workers":
        cores = cores[: len(cores) // most * point]
        if point > 1:
            require_horovod()
            horovodrun = str(Path(sys.executable).with_name("horovodrun"))
            command = [horovodrun, "--gloo", "-np", str(point), *command]
    last = _run(command, cores).strip().splitlines()[-1]
    return json.loads(last.removeprefix("[0]<stdout>:"))


def _run(command: Sequence[str], cores: Sequence[int] = ()) -> str:
    confine = (lambda: os.sched_setaffinity(0, cores)) if cores else None
    done = subprocess.run(command, capture_output=True, encoding="utf-8", preexec_fn=confine)
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if "error:" in line] or done.stderr.splitlines()
        raise InputError(
            f"Each point must run by itself. Received: exit code {done.returncode} from {' '.join(command)}: "
            f"{' '.join(reason[-1:]).rpartition('error: ')[2]}"
        )
    return done.stdout


def _flat(found: Mapping[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in found.items() if not isinstance(value, dict)}
    flat |= {f"{name}_bytes_sent": value for name, value in found["bytes_sent_per_step"].items()}
    return flat


def _write_csv(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(results[0]))
        writer.writeheader()
        writer.writerows(results)


def _against(first: Mapping[str, float], found: Mapping[str, float]) -> str:
    positions = found["positions_per_step"] / first["positions_per_step"]
    return (
        f"{found['examples_per_second']:,.0f} examples/s, {found['step_seconds'] * 1e3:.1f} ms a step: "
        f"{found['examples_per_second'] / first['examples_per_second']:.2f} times the examples/s and "
        f"{found['step_seconds'] / first['step_seconds']:.2f} times the step of the first, with {positions:.2f} times "
        "its positions"
    )


def _plot(plotting: Any, kind: str, medians: Mapping[int, Mapping[str, float]], path: Path) -> None:
    figure = plotting.Figure(figsize=(9, 4), layout="constrained")
    for axes, name, label in zip(
        figure.subplots(1, 2),
        ("examples_per_second", "step_seconds"),
        ("examples/s", "seconds a step"),
        strict=True,
    ):
        axes.plot(list(medians), [found[name] for found in medians.values()], marker="o")
        axes.set(xlabel=SWEEPS[kind].label, ylabel=label, ylim=(0, None))
        if kind != "workers":
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
    figure.savefig(path)
