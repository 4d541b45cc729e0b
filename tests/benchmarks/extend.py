"""Seconds and peak memory of extending prepared data by its newest events, against preparing all files together.

    python -m tests.benchmarks.extend [--share=0.05] [--rounds=3]

The log is the Complete Journey, 1.5 million events with text ids, as Parquet. Each preparation is a process of its own:
imports count, and are told apart. Both give the same arrays, which is checked.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

from tests.benchmarks.prepare_data import export

PREPARE = """
import sys
import tensorflow
from din_dist.config import DataConfig
from din_dist.data.prepared import prepare
source, folder, extend = sys.argv[1:]
if source:
    print(prepare(DataConfig(dataset="event_log", data_path=source, data_dir=folder, extend=extend)).folder)
"""


def timed(*words: str) -> tuple[str, float, float]:
    """Runs a preparation; returns what it printed, seconds and GiB."""
    start = time.perf_counter()
    worker = subprocess.Popen([sys.executable, "-c", PREPARE, *words], stdout=subprocess.PIPE, text=True)
    assert worker.stdout
    printed = worker.stdout.read().strip()
    _, status, usage = os.wait4(worker.pid, 0)
    if status:
        sys.exit("a preparation failed")
    return printed, time.perf_counter() - start, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.05, help="share of the events that are newer")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = pq.read_table(export(folder, "parquet"))
        cut = int(len(table) * (1 - given.share))
        for part, rows in (
            ("all/a", table[:cut]),
            ("all/b", table[cut:]),
            ("old/a", table[:cut]),
            ("new/b", table[cut:]),
        ):
            (folder / part).parent.mkdir(exist_ok=True)
            pq.write_table(rows, folder / f"{part}.parquet")
        _, imports, _ = timed("", "", "")
        print(f"{len(table):,} events, {len(table) - cut:,} of them newer; imports {imports:.1f} s")
        for number in range(given.rounds):
            into = folder / f"prepared{number}"
            whole, all_seconds, all_memory = timed(str(folder / "all"), str(into), "")
            old, _, _ = timed(str(folder / "old"), str(into), "")
            extended, seconds, memory = timed(str(folder / "new"), str(into), old)
            for path in Path(whole, "packed").glob("*.npy"):
                assert path.read_bytes() == Path(extended, "packed", path.name).read_bytes(), path
            ratio = (all_seconds - imports) / (seconds - imports)
            print(
                f"all files {all_seconds:.1f} s, {all_memory:.2f} GiB; extending {seconds:.1f} s, {memory:.2f} GiB; "
                f"without imports {ratio:.1f} times as fast",
                flush=True,
            )
            shutil.rmtree(into)


if __name__ == "__main__":
    main()
