"""A small log of made-up events, prepared for real: what tests of the pipeline and the trainer run on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from din_dist.config import Config


def write_log(path: Path, *, num_users: int = 40, num_items: int = 30, labels: bool = False, seed: int = 0) -> None:
    """Users with 1 to 25 events in shuffled order, ids as strings; item i is of category i modulo 5.

    Users like one category, so that there is something to learn.
    """
    random = np.random.default_rng(seed)
    rows: list[dict] = []
    for user in range(num_users):
        for time in random.permutation(random.integers(1, 26)):
            item = int(random.integers(num_items))
            if random.random() < 0.7:
                item = min(item // 5 * 5 + user % 5, num_items - 1)
            row = {"user_id": f"u{user}", "item_id": f"i{item}", "category_id": f"c{item % 5}", "timestamp": int(time)}
            rows.append(row | ({"label": int(random.integers(2))} if labels else {}))
    pq.write_table(pa.Table.from_pylist(rows), path)


def small_config(folder: Path, *, labels: bool = False, **settings: object) -> Config:
    """A job on `write_log`'s events that takes seconds; `settings` by their flag names."""
    log = folder / "log.parquet"
    if not log.exists():
        write_log(log, labels=labels)
    defaults: dict[str, object] = {
        "dataset": "event_log",
        "data_path": str(log),
        "data_dir": str(folder / "prepared"),
        "max_history_length": 8,
        "embedding_dim": (6, 4),
        "attention_hidden_units": (8, 4),
        "hidden_units": (8, 4),
        "global_batch_size": 64,
        "output_dir": str(folder / "run"),
        "metrics_port": -1,
        "xla": False,  # compiling would take longer than the job
    }
    return Config().replace(**defaults | settings)
