"""Writes a log of users who visit several shops at once: sessions that overlap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def write_visits(path: Path, *, labels: bool, num_users: int = 30, num_items: int = 40) -> None:
    """Writes a Parquet file of users with visits to two shops at once, in shuffled rows.

    Sessions are those of `visit`: they overlap, and users share their ids. Times go from 0 to 119, and may be equal.
    Within a visit items are of one category, mostly, so that there is something to learn.

    Args:
        path: of the file.
        labels: adds a column of random labels.
        num_users: who have 1 to 24 events each.
        num_items: item i has category i modulo 5.
    """
    random = np.random.default_rng(3)
    rows = []
    for user in range(num_users):
        for _ in range(int(random.integers(1, 25))):
            time, item = int(random.integers(120)), int(random.integers(num_items))
            visit = int(time // 30 * 2 + random.integers(2))
            if random.random() < 0.8:
                item = item // 5 * 5 + (user + visit) % 5
            row = {
                "user_id": f"u{user}",
                "item_id": f"i{item}",
                "timestamp": time,
                "visit": visit,
                "action": str(random.choice(["view", "buy"])),
            }
            rows.append(row | ({"label": int(random.random() < 0.6)} if labels else {}))
    table = pa.Table.from_pylist(rows)
    categories = [f"c{int(item[1:]) % 5}" for item in table["item_id"].to_pylist()]
    pq.write_table(table.append_column("category_id", pa.array(categories)), path)
