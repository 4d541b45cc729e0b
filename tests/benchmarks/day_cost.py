"""Processor seconds of preparing the same new day behind logs of several sizes, by phase.

    PYTHONPATH=. .venv/bin/python -m tests.benchmarks.day_cost [--events=1000000] [--sizes=1,4,16] [--day=100000]

The log is synthetic: users with 50 events each, and items that are drawn by a power law. A day has five events each of
users that the log knows. Processor time is told, because it does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from din_dist.config import DataConfig
from din_dist.data import event_store, prepared
from din_dist.data.builders import event_log
from din_dist.data.extension import Extension

_PER_USER, _PER_USER_AND_DAY, _NUM_ITEMS = 50, 5, 100_000


def write_log(path: Path, users: np.ndarray, begin: int, seed: int) -> None:
    """Writes one event for each entry of `users`."""
    random = np.random.default_rng(seed)
    items = (_NUM_ITEMS * random.random(len(users)) ** 3).astype(np.int64)
    times = begin + random.integers(86_400, size=len(users))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), path)


class Clock:
    """Adds up processor seconds by phase; a phase within another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Counts the time of a function as a phase."""
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def timed(*given: Any, **named: Any) -> Any:
            before, inner = time.process_time(), self.seconds.total()
            found = function(*given, **named)
            self.seconds[phase] += time.process_time() - before - (self.seconds.total() - inner)
            return found

        setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000, help="events of the smallest log")
    parser.add_argument("--sizes", default="1,4,16", help="how many times as many the logs have")
    parser.add_argument("--day", type=int, default=100_000, help="events of the day")
    given = parser.parse_args()
    tf.io.gfile.exists("/")  # what TensorFlow does once is no part of a day
    clock = Clock()
    clock.watch(event_log, "read_log", "read and sort the day")
    clock.watch(event_log, "fingerprint_files", "read and sort the day")
    clock.watch(Extension, "open", "check the old files")
    clock.watch(event_log, "facts_of_parent", "digests of old vocabularies")
    clock.watch(event_log, "extended", "find places")
    clock.watch(prepared, "build", "join, and write records")
    clock.watch(event_store, "pack", "read records, and write arrays")
    clock.watch(event_store, "open_store", "check the new files")
    with tempfile.TemporaryDirectory() as name:
        for size in map(int, given.sizes.split(",")):
            folder = Path(name) / str(size)
            num_users = given.events * size // _PER_USER
            random = np.random.default_rng(1)
            users = np.repeat(random.permutation(num_users), _PER_USER)
            write_log(folder / "old" / "log.parquet", users, 0, 1)
            touched = random.choice(num_users, given.day // _PER_USER_AND_DAY, replace=False)
            write_log(folder / "new" / "log.parquet", np.repeat(touched, _PER_USER_AND_DAY), 86_400, 2)
            config = DataConfig(dataset="event_log", data_path=str(folder / "old"), data_dir=str(folder / "prepared"))
            before = prepared.prepare(config).folder
            clock.seconds.clear()
            start, wall = time.process_time(), time.perf_counter()
            new = {"data_path": str(folder / "new"), "extend": str(before)}
            prepared.prepare(DataConfig(dataset="event_log", data_dir=str(folder / "prepared"), **new))
            print(
                json.dumps(
                    {
                        "old_events": given.events * size,
                        "processor_seconds": round(time.process_time() - start, 2),
                        "wall_seconds": round(time.perf_counter() - wall, 2),
                        "phases": {phase: round(seconds, 2) for phase, seconds in clock.seconds.items()},
                    }
                ),
                flush=True,
            )
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
