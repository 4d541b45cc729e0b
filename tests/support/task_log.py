"""Writes a log of shown items that users click and buy, with planted rates, and makes the settings of a job on it.

config = task_config(tmp_path, task_head="esmm")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from din_dist.config import Config, Split
from tests.support.small_log import small_config

TASKS = ("click", "buy")


def write_task_log(path: Path, *, num_users: int = 60, num_items: int = 30, seed: int = 0) -> None:
    """Writes a Parquet file of users with 10 to 25 shown items each. A purchase supposes a click."""
    random = np.random.default_rng(seed)
    clicks, buys = random.uniform(0.1, 0.9, num_items), random.uniform(0.1, 0.9, num_items)
    rows: list[dict[str, Any]] = []
    for user in range(num_users):
        for time in range(random.integers(10, 26)):
            item = int(random.integers(num_items))
            click = bool(random.random() < clicks[item])
            buy = click and bool(random.random() < buys[item])
            row = {"user_id": f"u{user}", "item_id": f"i{item}", "category_id": f"c{item % 5}", "timestamp": time}
            rows.append(row | {"click": int(click), "buy": int(buy)})
    pq.write_table(pa.Table.from_pylist(rows), path)


def task_config(folder: Path, **settings: object) -> Config:
    """Returns the settings of a small job in `folder` that predicts both labels. Writes its log if there is none."""
    log = folder / "log.parquet"
    if not log.exists():
        write_task_log(log)
    defaults: dict[str, object] = {
        "label_columns": TASKS,
        "split": Split.TEMPORAL,
        "validation_from": 12,
        "test_from": 16,
        "epochs": 2,
    }
    return small_config(folder, **defaults | settings)
