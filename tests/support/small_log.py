"""Writes a small log of synthetic events, and makes the settings of a job on it that takes seconds.

config = small_config(tmp_path, epochs=2, optimizer="sgd")
store = prepare(config.data)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from din_dist.config import Config


def write_log(path: Path, *, num_users: int = 40, num_items: int = 30, labels: bool = False, seed: int = 0) -> None:
    """Writes a Parquet file of users with 1 to 25 events each, in shuffled order, with strings as ids.

    Item i has category i modulo 5. Each user prefers one category, so that there is something to learn.

    Args:
        labels: adds a column of random labels.
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
    """Returns the settings of a small job in `folder`, and writes its log if there is none.

    Args:
        labels: whether a log that is written has labels.
        settings: override the defaults below, by their flag names.
    """
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
