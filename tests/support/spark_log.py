"""A log of every kind of column that Spark prepares, and the bytes that are prepared of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import tensorflow as tf

from din_dist.config import DataConfig


def log(num_rows: int = 400, *, integers: bool = False) -> pa.Table:
    """Events of 30 users in shuffled order, with ties of time, missing values and each kind of column."""
    random = np.random.default_rng(1)
    users, items = random.integers(30, size=num_rows), random.integers(20, size=num_rows)

    def some(values: np.ndarray) -> pa.Array:
        return pa.array(values, mask=random.random(num_rows) < 0.2)

    times, click = random.integers(100, 120, num_rows), random.integers(2, size=num_rows)
    ids = {"user_id": users + 7, "item_id": items * 3}
    return pa.table(
        {
            **{
                name: pa.array(values if integers else [f"n{value}" for value in values])
                for name, values in ids.items()
            },
            "timestamp": times,
            "category_id": some(np.array([f"c{item % 4}" for item in items])),
            "label": click,
            "click": click,
            "buy": click * random.integers(2, size=num_rows),
            "clicked_at": times + random.integers(5, size=num_rows),
            "page": [f"p{value}" for value in random.integers(9, size=num_rows)],
            "visit": random.integers(4, size=num_rows),
            "worth": random.random(num_rows),
            "action": some(np.array(["view", "cart"])[random.integers(2, size=num_rows)]),
            "age": some(np.array([f"a{user % 5}" for user in users])),
            "price": some(items / 3),
            "device": some(random.integers(3, size=num_rows)),
            "shown_price": some(random.random(num_rows)),
            "dwell": some(random.random(num_rows)),
        }
    )


def write_files(folder: Path, table: pa.Table, form: str = "parquet", files: int = 2) -> Path:
    folder.mkdir()
    size = -(-len(table) // files)
    for number in range(files):
        part, path = table.slice(number * size, size), folder / f"{number}.{form}"
        if form == "parquet":
            pq.write_table(part, path, row_group_size=64)
        elif form == "csv":
            pa.csv.write_csv(part, path)
        else:
            rows = ({name: value for name, value in row.items() if value is not None} for row in part.to_pylist())
            path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def settings(source: Path, **values: Any) -> DataConfig:
    return DataConfig(dataset="event_log", data_path=str(source), **values)


def content(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of each file by its path. Records have their fields in order, which protobuf leaves open."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: _ordered(path) if "tfrecord" in name else path.read_bytes() for name, path in files.items()}


def _ordered(path: Path) -> bytes:
    records = (record.numpy() for record in tf.data.TFRecordDataset(str(path)))
    return b"".join(tf.train.Example.FromString(record).SerializeToString(deterministic=True) for record in records)
