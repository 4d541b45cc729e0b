"""Prepares a synthetic log by way of files and in memory: events a second, peak memory, bytes on disk.

    python -m tests.benchmarks.beyond_memory --events=100000000 --memory_limit=1GiB --folder=/tmp/FOLDER [--ways files]
    python -m tests.benchmarks.beyond_memory --ids=5000000

The log has integer ids, N / 50 users, N / 100 items (at most two million), a category, a label and a time. Its rows
are in no order of users. Each preparation is a process of its own; its imports count in the peaks, and not in the
seconds. Peak memory is the largest of all moments; what the kernel may take back at once (pages of files) counts in the
first number and not in the second. The folder is deleted at the end.

The second command tells how much memory different ids take while they are read.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

EVENTS_PER_FILE, ROWS_PER_GROUP = 10_000_000, 1_000_000
PREPARE = """
import json, sys, time
from din_dist.config import DataConfig, Split
from din_dist.data.prepared import prepare
log, data_dir, limit = sys.argv[1:]
started = time.perf_counter()
store = prepare(
    DataConfig(dataset="event_log", data_path=log, data_dir=data_dir, memory_limit=limit), tell=lambda line: print(line)
)
print(json.dumps({"seconds": time.perf_counter() - started, "events": store.facts.num_events}))
"""


IDS = """
import resource, sys
import numpy as np
import pyarrow as pa
from din_dist.tables.columns import IdColumn, Rows

form, number = sys.argv[1], int(sys.argv[2])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
column, before = IdColumn("id", Rows()), peak()
for first in range(0, number, 1 << 18):
    ids = np.arange(first, min(first + (1 << 18), number))
    column.add(pa.array(ids if form == "integers" else [f"{value:020d}" for value in ids]))
    column.drain(at_end=False)
column.drain(at_end=True)
print((peak() - before) / number)
"""


def write_log(folder: Path, num_events: int) -> None:
    """Writes the log."""
    folder.mkdir(parents=True)
    num_users, num_items = max(1, num_events // 50), max(1, min(2_000_000, num_events // 100))
    for number, first in enumerate(range(0, num_events, EVENTS_PER_FILE)):
        random = np.random.default_rng(number)
        with pq.ParquetWriter(folder / f"{number:05d}.parquet", _schema()) as writer:
            for begin in range(first, min(first + EVENTS_PER_FILE, num_events), ROWS_PER_GROUP):
                size = min(ROWS_PER_GROUP, num_events - begin)
                items = (num_items * random.random(size) ** 3).astype(np.int64)
                writer.write_table(
                    pa.table(
                        {
                            "user_id": random.integers(num_users, size=size),
                            "item_id": items * 7919,
                            "category_id": items % 1000,
                            "label": random.integers(2, size=size).astype(np.int8),
                            "timestamp": 1_600_000_000 + (begin + np.arange(size)) // 100,
                        },
                        _schema(),
                    )
                )


def _schema() -> pa.Schema:
    names = ("user_id", "item_id", "category_id")
    return pa.schema([*((name, pa.int64()) for name in names), ("label", pa.int8()), ("timestamp", pa.int64())])


def measured(log: Path, data_dir: Path, limit: str) -> dict[str, float]:
    """Prepares the log in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(log), str(data_dir), limit],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    peaks, disk = {"VmHWM": 0, "RssAnon": 0}, 0
    ticks = 0
    while process.poll() is None:
        time.sleep(0.1)
        ticks += 1
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]))
        if ticks % 10 == 0:
            disk = max(disk, size_of(data_dir))
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"prepare failed: {output}")
    print(output.splitlines()[0] if len(output.splitlines()) > 1 else "in memory")
    told = json.loads(output.splitlines()[-1])
    return {
        "million events": told["events"] / 1e6,
        "seconds": told["seconds"],
        "events/s": told["events"] / told["seconds"],
        "peak memory MiB": peaks["VmHWM"] / 1024,
        "without pages of files MiB": peaks["RssAnon"] / 1024,
        "most bytes on disk an event": disk / told["events"],
        "prepared bytes an event": size_of(data_dir) / told["events"],
    }


def size_of(folder: Path) -> int:
    """The bytes of all files that are there."""
    found = 0
    for path in folder.rglob("*"):
        try:
            found += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue  # it has just been deleted
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--memory_limit", default="100MiB")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--ids", type=int, default=0)
    parser.add_argument("--ways", nargs="+", choices=("files", "memory"), default=["files", "memory"])
    given = parser.parse_args()
    for form in ("integers", "texts of 20 characters") if given.ids else ():
        output = subprocess.run(
            [sys.executable, "-c", IDS, form, str(given.ids)], capture_output=True, text=True, check=True
        )
        print(f"{given.ids:,} {form}: {float(output.stdout):.0f} bytes each")
    if given.ids:
        return
    if not given.folder:
        parser.error("--folder: give a new folder on a disk with room. Received: none.")
    given.folder.mkdir()
    try:
        write_log(given.folder / "log", given.events)
        print(f"log: {size_of(given.folder / 'log') / given.events:.1f} bytes an event")
        for way in given.ways:
            limit = given.memory_limit if way == "files" else "1000GiB"
            found = measured(given.folder / "log", given.folder / way, limit)
            print(f"{way}: {', '.join(f'{name} {value:,.1f}' for name, value in found.items())}", flush=True)
            shutil.rmtree(given.folder / way)
    finally:
        shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
