"""Users' histories out of prepared data, against the log itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from din_dist.config import DataConfig
from din_dist.data.prepared import prepare
from din_dist.errors import InputError
from din_dist.serving.batch.histories import UserHistories, check_item_types
from din_dist.tables.ids import Ids
from din_dist.tables.reader import open_table

LONGEST = 4


def prepared(folder: Path, *, labels: bool, integers: bool) -> tuple[UserHistories, list[dict[str, Any]]]:
    """Histories, and the log's rows; many events have the same time."""
    random = np.random.default_rng(0)
    kind = int if integers else (lambda number: f"n{number}")
    events = [
        {"user_id": kind(user), "item_id": kind(int(random.integers(9))), "timestamp": int(time)}
        | ({"label": int(random.integers(2))} if labels else {})
        for user in range(12)
        for time in random.integers(8, size=random.integers(1, 12))
    ]
    pq.write_table(pa.Table.from_pylist(events), folder / "log.parquet")
    data = DataConfig(dataset="event_log", data_path=str(folder / "log.parquet"), data_dir=str(folder / "data"))
    return UserHistories(prepare(data), LONGEST), events


def own(found: tuple[Any, np.ndarray]) -> list[list[Any]]:
    items, lengths = found
    flat = [item.decode() if isinstance(item, bytes) else int(item) for item in items.part(0, lengths.sum()).numpy()]
    return [part.tolist() for part in np.split(np.array(flat, object), np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("integers", [False, True])
def test_histories_are_those_of_the_log(tmp_path: Path, labels: bool, integers: bool) -> None:
    histories, events = prepared(tmp_path, labels=labels, integers=integers)
    stranger = 99 if integers else "stranger"
    users = [event["user_id"] for event in events[::3]] + [stranger]
    before = np.arange(len(users)) % 10 - 1

    def expected(user: Any, end: float) -> list[Any]:
        mine = sorted((event for event in events if event["user_id"] == user), key=lambda event: event["timestamp"])
        return [event["item_id"] for event in mine if event.get("label", 1) and event["timestamp"] < end][-LONGEST:]

    ids = Ids(pa.array(users))
    assert own(histories.of(ids)) == [expected(user, np.inf) for user in users]
    assert histories.num_unknown == 1
    found = own(histories.of(ids, before))
    assert found == [expected(user, end) for user, end in zip(users, before, strict=True)]
    assert any(found)


@pytest.mark.parametrize("time", [1_700_000_000, -1_700_000_000, 500 * 25 + 1])
def test_times_of_another_unit(tmp_path: Path, time: int) -> None:
    """The log's own go up to 25 at most."""
    histories, events = prepared(tmp_path, labels=False, integers=False)
    last = max(event["timestamp"] for event in events)
    users = Ids(pa.array([events[0]["user_id"]] * 2))
    with pytest.raises(InputError, match=rf"which as prepared go from \d+ to {last}\. Received: {time}\."):
        histories.of(users, np.array([1, time]))
    histories.of(users, np.array([0, 500 * last]))


def test_the_items_of_another_type(tmp_path: Path) -> None:
    histories, _ = prepared(tmp_path, labels=False, integers=True)
    assert histories.users_are_integers
    check_item_types(histories, True, "run")
    with pytest.raises(InputError, match="same type as the export's, strings. Received: run with integers"):
        check_item_types(histories, False, "run")


def test_times_in_each_format(tmp_path: Path) -> None:
    """Dates are microseconds, as in prepared data."""
    (tmp_path / "t.csv").write_text("time,date\n7,1970-01-01T00:00:01\n8,1970-01-02\n")
    (tmp_path / "t.jsonl").write_text('{"time": 7, "date": "1970-01-01T00:00:01"}\n{"time": 8, "date": "1970-01-02"}\n')
    dates = pa.array([1, 86_400], pa.timestamp("s"))
    pq.write_table(pa.table({"time": pa.array([7, 8], pa.int32()), "date": dates}), tmp_path / "t.parquet")
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        table = open_table(tmp_path / name)
        (rows,) = table.read(0, 2, 2)
        assert table.times(rows, 0, "time").tolist() == [7, 8]
        assert table.times(rows, 0, "date").tolist() == [1_000_000, 86_400_000_000]
    (tmp_path / "t.csv").write_text("time\n7\n\nx\n")
    table = open_table(tmp_path / "t.csv")
    (rows,) = table.read(1, 1, 2)
    with pytest.raises(InputError, match="row 2: a timestamp must be an integer .* Received: time='x'"):
        table.times(rows, 1, "time")
