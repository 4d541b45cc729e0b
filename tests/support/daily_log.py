"""Writes a log with a file for each day, on which a model can learn something.

write_days(tmp_path / "log", 3)                 # 2026-11-01.parquet to 2026-11-03.parquet
write_days(tmp_path / "log", 4, turned=(3,))    # on the last day, users want what they never wanted before
"""

from __future__ import annotations

import datetime
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FIRST = datetime.date(2026, 11, 1)
_SECONDS = 86_400
_NUM_CATEGORIES = 5
_NOISE = 0.1  # of events, whose items are any


def write_days(folder: Path, num_days: int, turned: Collection[int] = (), num_users: int = 50) -> None:
    """Writes Parquet files whose times are seconds since 1970.

    Each user wants the items of one category. Each day has five users and five items more than the one before.

    Args:
        folder: of the files, which is made.
        num_days: from `FIRST` on.
        turned: places of days, from 0, on which all users want another category.
        num_users: on the first day, with six events each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for day in range(num_days):
        random = np.random.default_rng(day)
        begin = (FIRST - datetime.date(1970, 1, 1)).days * _SECONDS + day * _SECONDS
        users = np.repeat(np.arange(num_users + 5 * day), 6)
        per_category = 6 + day
        wanted = (users + (2 if day in turned else 0)) % _NUM_CATEGORIES
        category = np.where(
            random.random(len(users)) < _NOISE, random.integers(_NUM_CATEGORIES, size=len(users)), wanted
        )
        item = random.integers(per_category, size=len(users)) * _NUM_CATEGORIES + category
        rows = {
            "user_id": [f"u{user}" for user in users],
            "item_id": [f"i{number}" for number in item],
            "category_id": [f"c{number}" for number in category],
            "timestamp": begin + np.sort(random.integers(_SECONDS, size=len(users))),
        }
        pq.write_table(pa.table(rows).take(random.permutation(len(users))), folder / f"{date(day)}.parquet")


def date(day: int) -> str:
    """Returns the date of a day by its place, from 0."""
    return str(FIRST + datetime.timedelta(days=day))
