"""Writes a small log with a feature of every owner and kind, their declarations, and the settings of a job on it.

config = featured_config(tmp_path)
store = prepare(config.data)
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from din_dist.config import Config
from din_dist.features.declarations import read_declarations
from din_dist.features.spec import Owner, to_text
from tests.support.owners import OWNERS
from tests.support.small_log import small_config

DECLARATIONS = """
[age]
of = "user"
kind = "category"
width = 3
[who]
of = "user"
kind = "category"
column = "user_id"
rows = 50
[income]
of = "user"
kind = "number"
encode = "standard"
[interests]
of = "user"
kind = "categories"
pool = "weighted"
weights = "interest_weights"
min_count = 3
[taste]
of = "user"
kind = "vector"
[style]
of = "user"
kind = "vector"
column = "taste"
trained = true
[device]
of = "context"
kind = "category"
column = "device id"
["page größe"]
of = "context"
kind = "number"
column = "page"
encode = "log"
width = 3
[hour]
of = "context"
from = "timestamp"
kind = "hour_of_day"
[weekday]
of = "context"
from = "timestamp"
kind = "day_of_week"
[price]
of = "candidate"
kind = "number"
encode = "quantiles:4"
[rank]
of = "candidate"
kind = "number"
encode = "periodic:3,0.5"
[badges]
of = "candidate"
kind = "categories"
rows = 20
[discount]
of = "candidate"
kind = "number"
by = ["device id"]
[perks]
of = "candidate"
kind = "categories"
by = ["device id"]
[brand]
of = "item"
kind = "category"
[weight]
of = "item"
kind = "number"
encode = "none"
[tags]
of = "item"
kind = "categories"
[picture]
of = "item"
kind = "vector"
[text]
of = "item"
kind = "vector"
trained = true
"""
TIMEZONE = "America/New_York"


def write_featured_log(path: Path, *, labels: bool = True, num_users: int = 40, num_items: int = 30) -> None:
    """Writes a Parquet file of events; about one value in ten is missing. The table of offers lies beside it.

    Each row also has what the table says of its item, which preparation does not read there.
    """
    random = np.random.default_rng(0)
    users = [_user(random, number) for number in range(num_users)]
    items = [_item(random, number) for number in range(num_items)]
    rows = []
    for user in users:
        for _ in range(int(random.integers(2, 20))):
            item = items[int(random.integers(num_items))]
            rows.append({**user, **item, **_event(random)})
    offers = _offers(np.random.default_rng(1), num_items)
    rows = [{**row, **offers.get((row["item_id"], row["device id"]), _NO_OFFER)} for row in rows]
    named = [{"item_id": item, "device id": device, **values} for (item, device), values in offers.items()]
    pq.write_table(pa.Table.from_pylist(named), path.with_name("offers.parquet"))
    table = pa.Table.from_pylist(rows, _SCHEMA)
    pq.write_table(table if labels else table.drop_columns("label"), path)


def featured_config(
    folder: Path, owners: Collection[Owner] = OWNERS, *, labels: bool = True, **settings: object
) -> Config:
    """Returns the settings of a small job in `folder` with the features of some owners, and writes its log.

    Args:
        folder: of the job.
        owners: of the features among `DECLARATIONS`.
        labels: whether the log has labels.
        settings: of the job.
    """
    log, declared = folder / "log.parquet", folder / "features.toml"
    if not log.exists():
        write_featured_log(log, labels=labels)
    declared.write_text(DECLARATIONS)
    specs = [spec for spec in read_declarations(declared) if spec.owner in owners]
    if not labels:  # a drawn negative has no value of its event
        specs = [spec for spec in specs if spec.owner is not Owner.CANDIDATE or spec.by]
    given: dict[str, object] = {"timezone": TIMEZONE, "embedding_dim": (6,), "feature_declarations": to_text(specs)}
    if any(spec.by for spec in specs):
        given["offers_path"] = str(folder / "offers.parquet")
    return small_config(folder, **given | settings)  # type: ignore[arg-type]


_SCHEMA = pa.schema(
    {
        "user_id": pa.string(),
        "item_id": pa.int64(),
        "timestamp": pa.int64(),
        "label": pa.int64(),
        "age": pa.string(),
        "income": pa.float64(),
        "interests": pa.list_(pa.string()),
        "interest_weights": pa.list_(pa.float64()),
        "taste": pa.list_(pa.float32()),
        "device id": pa.int64(),
        "page": pa.float32(),
        "price": pa.float64(),
        "rank": pa.int64(),
        "badges": pa.list_(pa.int64()),
        "discount": pa.float64(),
        "perks": pa.list_(pa.string()),
        "maker": pa.string(),
        "brand": pa.string(),
        "weight": pa.float32(),
        "tags": pa.list_(pa.string()),
        "picture": pa.list_(pa.float32()),
        "text": pa.list_(pa.float32()),
    }
)


_NO_OFFER: dict[str, object] = {"discount": None, "perks": []}


def _offers(random: np.random.Generator, num_items: int) -> dict[tuple[int, int], dict[str, object]]:
    """Returns the offers by item and device, of two thirds of all pairs."""
    pairs = [(100 + item, device) for item in range(num_items) for device in range(4) if random.random() < 2 / 3]
    return {
        pair: {
            "discount": _maybe(random, float(random.integers(1, 90))),
            "perks": [f"p{int(one)}" for one in random.integers(5, size=random.integers(3))],
        }
        for pair in pairs
    }


def _user(random: np.random.Generator, number: int) -> dict:
    interests = [f"t{int(one)}" for one in random.integers(12, size=random.integers(4))]
    return {
        "user_id": f"u{number}",
        "age": _maybe(random, f"{10 * int(random.integers(2, 6))}-ish"),
        "income": _maybe(random, float(random.normal(30_000, 9_000))),
        "interests": interests,
        "interest_weights": random.random(len(interests)).tolist(),
        "taste": _maybe(random, random.normal(size=3).tolist()),
    }


def _item(random: np.random.Generator, number: int) -> dict:
    return {
        "item_id": 100 + number,
        "maker": f"m{number % 3}",
        "brand": _maybe(random, f"b{int(random.integers(5))}"),
        "weight": _maybe(random, float(random.normal())),
        "tags": [f"g{int(one)}" for one in random.integers(6, size=random.integers(4))],
        "picture": _maybe(random, random.normal(size=4).tolist()),
        "text": _maybe(random, random.normal(size=5).tolist()),
    }


def _event(random: np.random.Generator) -> dict:
    return {
        "timestamp": 1_700_000_000 + int(random.integers(10**7)),
        "label": int(random.integers(2)),
        "device id": _maybe(random, int(random.integers(4))),
        "page": _maybe(random, float(random.normal(0, 100))),
        "price": _maybe(random, float(random.integers(1, 50))),
        "rank": _maybe(random, int(random.integers(20))),
        "badges": random.integers(40, size=random.integers(3)).tolist(),
    }


def _maybe(random: np.random.Generator, value: object) -> object:
    return None if random.random() < 0.1 else value
