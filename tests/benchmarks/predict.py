"""Speed and memory of batch scoring: `python -m tests.benchmarks.predict --export_dir=DIR --output_dir=JOB`.

Scores rows of (user, candidate), users of the job's prepared data with their whole histories, and then rows of
(history, 100 candidates) of the same users, each by the command as users run it. Prints pairs of a history and a
candidate scored a second, without and with the seconds that the process takes to start, and its peak memory, as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from absl import flags

from din_dist.cli import entry
from din_dist.cli.saved_job import config_of
from din_dist.tables.formats import Format, format_of

EXPORT_DIR = flags.DEFINE_string("export_dir", None, "The export.", required=True)
OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "The job whose data has the users.", required=True)
NUM_ROWS = flags.DEFINE_integer("num_rows", 2_000_000, "Rows of (user, candidate).")
NUM_CANDIDATES = flags.DEFINE_integer("num_candidates", 100, "Candidates of each history.")
SUFFIX = flags.DEFINE_enum("suffix", ".parquet", [".parquet", ".csv", ".jsonl"], "Format of the rows.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "How often each is run; medians are told.")


def main() -> None:
    from din_dist.data.prepared import open_prepared

    store = open_prepared(config_of(Path(OUTPUT_DIR.value)).data)
    random = np.random.default_rng(0)
    users, items = store.vocabulary("users"), store.vocabulary("items")
    candidates = items.take(pa.array(random.integers(len(items), size=NUM_ROWS.value)))
    of_rows = random.integers(len(users), size=NUM_ROWS.value)
    by_user = pa.table({"user_id": users.take(pa.array(of_rows)), "item_id": candidates})

    of_lists = of_rows[: NUM_ROWS.value // NUM_CANDIDATES.value]
    starts, ends = store.history_offsets[of_lists], store.history_offsets[of_lists + 1]
    places = np.concatenate([np.arange(low, high) for low, high in zip(starts, ends, strict=True)])
    histories = _lists(items.take(pa.array(store.history_item_ids[places] - 1)), ends - starts)
    ids = candidates.slice(0, len(of_lists) * NUM_CANDIDATES.value)
    by_history = pa.table(
        {"history": histories, "candidates": _lists(ids, np.full(len(of_lists), NUM_CANDIDATES.value))}
    )
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {
            "user_and_candidate": _median(Path(folder, "rows"), by_user, f"--user_histories={OUTPUT_DIR.value}"),
            "history_and_candidates": _median(Path(folder, "lists"), by_history),
        }
    found["ratio"] = (
        found["history_and_candidates"]["pairs_per_second"] / found["user_and_candidate"]["pairs_per_second"]
    )
    found["mean_history_length"] = float(np.minimum(np.diff(store.history_offsets)[of_rows], 100).mean())
    print(json.dumps(found, indent=1))


def _lists(values: pa.ChunkedArray, lengths: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), values.combine_chunks())


def _write(table: pa.Table, path: Path) -> None:
    match format_of(path):
        case Format.PARQUET:
            pq.write_table(table, path)
        case Format.CSV:
            columns = {
                name: [json.dumps(value) for value in column.to_pylist()] if pa.types.is_list(column.type) else column
                for name, column in zip(table.column_names, table.columns, strict=True)
            }
            pyarrow.csv.write_csv(pa.table(columns), path)
        case _:
            with path.open("w") as file:
                for batch in table.to_batches(10_000):
                    file.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())


def _median(place: Path, table: pa.Table, *words: str) -> dict[str, float]:
    """The round in the middle by speed."""
    place.mkdir()
    source = place / f"rows{SUFFIX.value}"
    _write(table, source)
    rounds = sorted(
        (_run(source, place / str(number), *words) for number in range(ROUNDS.value)),
        key=lambda found: found["pairs_per_second"],
    )
    return rounds[len(rounds) // 2]


def _run(source: Path, out: Path, *words: str) -> dict[str, float]:
    command = [sys.executable, "-m", "din_dist.cli.predict", f"--export_dir={EXPORT_DIR.value}", f"--input={source}"]
    with subprocess.Popen([*command, f"--predictions_dir={out}", *words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        told = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit("it failed")
    found = json.loads(told)
    return {
        "pairs_per_second": found["candidates_per_second"],
        "pairs_per_second_with_start": found["candidates"] / sum(found["seconds"].values()),
        "start_seconds": found["seconds"]["start"],
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_mib": usage.ru_maxrss / 1024,
    }


if __name__ == "__main__":
    entry.run(main)
