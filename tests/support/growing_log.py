"""Writes parts of a log with all kinds of columns and features, and compares what is prepared of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from din_dist.config import DataConfig, Split
from din_dist.features.declarations import read_declarations
from din_dist.features.spec import to_text

DECLARATIONS = """
[age]
of = "user"
kind = "category"
[interests]
of = "user"
kind = "categories"
weights = "interest_weights"
pool = "weighted"
[taste]
of = "user"
kind = "vector"
[device]
of = "context"
kind = "category"
[pages]
of = "context"
kind = "categories"
[speed]
of = "context"
kind = "number"
encode = "standard"
[price]
of = "item"
kind = "number"
encode = "quantiles:3"
[tags]
of = "item"
kind = "categories"
[picture]
of = "item"
kind = "vector"
[dwell]
of = "history"
kind = "number"
encode = "quantiles:3"
[ago]
of = "history"
kind = "time_since"
from = "timestamp"
"""
LABELS = {
    "label_columns": ("click", "buy"),
    "label_time_column": "acted_at",
    "weight_column": "weight",
    "request_column": "page",
    "split": Split.TEMPORAL,
    "validation_from": 24,
    "test_from": 28,
}
ACTIONS = {"action_column": "action", "histories": ("view:5", "all:9")}
VISITS = {"session_column": "visit"}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "labels": LABELS,
    "actions": ACTIONS,
    "visits": VISITS,
    "labels and visits": LABELS | VISITS,
}


def rows_of(seed: int, part: str, num_rows: int, times: tuple[int, int], most: int) -> list[dict[str, Any]]:
    """Rows of one part of a log. What an owner is like follows from its number, and about a third is missing."""
    random = np.random.default_rng(seed)

    def some(value: Any) -> Any:
        return value if random.random() < 0.7 else None

    rows = []
    for _ in range(num_rows):
        user, item = (int(number) for number in random.integers(most, size=2))
        time, clicked = int(random.integers(*times)), int(random.integers(2))
        interests = some([f"t{user % 3}", f"t{user % 5}"])
        rows.append(
            {
                "user_id": f"u{user}",
                "item_id": item,
                "timestamp": time,
                "category_id": some(f"c{item % 7}"),
                "click": clicked,
                "buy": int(random.integers(2)),
                "acted_at": time + int(random.integers(4)),
                "weight": float(random.integers(3)),
                "page": f"{part}{time // 3}",
                "visit": f"{part}{int(random.integers(3))}",
                "action": some(str(random.choice(["view", "buy", part]))),
                "age": some(f"{user % 4}0s"),
                "interests": interests,
                "interest_weights": interests and [1.0, 2.0],
                "taste": some([user / 2, 1.0]),
                "device": some(f"{part}{int(random.integers(3))}" if random.random() < 0.3 else "phone"),
                "pages": some([int(number) for number in random.integers(9, size=2)]),
                "speed": some(float(random.normal())),
                "price": some(item / 4),
                "tags": some([item % 3, item % 8]),
                "picture": some([1.0, item / 2]),
                "dwell": some(float(random.integers(5))),
            }
        )
    return rows


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.Table.from_pylist(rows_of(0, "x", 60, (0, 9), 9)).schema
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{name}.parquet")
    return folder


def config_of(folder: Path, data: Path, *, declared: bool = True, **given: Any) -> DataConfig:
    if declared:
        path = folder / "features.toml"
        path.write_text(DECLARATIONS)
        given["feature_declarations"] = to_text(read_declarations(path))
    return DataConfig(dataset="event_log", data_path=str(data), data_dir=str(folder / "prepared"), **given)


def assert_same_files(left: Path, right: Path) -> None:
    """All that is prepared is the same to the byte, but the facts and what TFDS says about the folder."""
    names = [
        {without_fingerprint(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        for folder in (left, right)
    ]
    told = {"facts.json", "dataset_info.json"}
    assert names[0].keys() == names[1].keys()
    for name in names[0].keys() - told:
        assert names[0][name].read_bytes() == names[1][name].read_bytes(), name


def without_fingerprint(path: Path) -> str:
    """The name of a file. Folders of histories are named by the fingerprint, which tells of the files read."""
    return re.sub(r"^(packed/(rows|sets|histories[a-z-]*)-)[0-9a-f]{16}/", r"\1/", path.as_posix())
