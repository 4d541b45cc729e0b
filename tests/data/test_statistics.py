"""Numbers about a prepared data set, against NumPy on small ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from din_dist.data import statistics
from din_dist.data.statistics import describe, measure
from tests.support.event_stores import store_of


def rows_of(lengths: list[int], labels: list[int] | None = None) -> list[dict]:
    users = [user for user, length in enumerate(lengths) for _ in range(length)]
    rows: list[dict] = [
        {"user_id": user, "item_id": n % 3, "category_id": n % 3, "timestamp": n} for n, user in enumerate(users)
    ]
    for row, label in zip(rows, labels or [], strict=bool(labels)):
        row["label"] = label
    return rows


def nearest_rank(values: list[int], percent: int) -> int:
    return int(np.percentile(values, percent, method="inverted_cdf"))


def expected_summary(values: list[int]) -> dict:
    ranks = {f"p{percent}": nearest_rank(values, percent) for percent in (50, 90, 99)}
    return {"mean": pytest.approx(np.mean(values)), **ranks, "max": max(values)}


def test_without_labels(tmp_path: Path) -> None:
    lengths = [1, 5, 2, 9, 30, 1]
    found = measure(store_of(rows_of(lengths), tmp_path / "s", 7), max_history_length=6)
    histories = [before for length in lengths for before in range(1, length)]
    assert found["users"] == 6 and found["items"] == 3 and found["events"] == 48
    assert found["item_features"] == {"category_id": 3}
    assert (found["first_timestamp"], found["last_timestamp"]) == (0, 47)
    assert found["label_rate"] is None
    assert found["events_per_user"] == expected_summary(lengths)
    assert found["history_length"] == expected_summary(histories)
    assert found["capped_history_length"] == expected_summary([min(length, 6) for length in histories])


@pytest.mark.parametrize("users_at_once", [1, 2, 100])
def test_with_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, users_at_once: int) -> None:
    monkeypatch.setattr(statistics, "USERS_AT_ONCE", users_at_once)
    lengths = [3, 8, 1, 4]
    labels = [*(1, 0, 1), *(1, 1, 0, 1, 1, 0, 0, 1), 0, *(0, 0, 1, 0)]
    found = measure(store_of(rows_of(lengths, labels), tmp_path / "s", 7), max_history_length=3)
    histories = [*(0, 1, 1), *(0, 1, 2, 2, 3, 4, 4, 4), 0, *(0, 0, 0, 1)]
    assert found["label_rate"] == 8 / 16
    assert found["history_length"] == expected_summary(histories)
    assert found["capped_history_length"] == expected_summary([min(length, 3) for length in histories])


def test_no_example_at_all(tmp_path: Path) -> None:
    found = measure(store_of(rows_of([1, 1]), tmp_path / "s", 7), max_history_length=10)
    assert found["history_length"] == {"mean": 0.0, "p50": 0, "p90": 0, "p99": 0, "max": 0}
    assert found["capped_history_length"] == found["history_length"]


def test_lines_to_print(tmp_path: Path) -> None:
    assert describe(store_of(rows_of([1, 3]), tmp_path / "a", 7), max_history_length=1) == [
        "users: 2",
        "items: 3",
        "item features: category_id 3",
        "events: 4, timestamps 0 to 3",
        "labels: none, every event is a positive",
        "events that share their user's time with another: 0 (0.0%)",
        "histories end before the event, in the order of the log (--history_ends=before_event)",
        "events per user: mean 2.0, 50% up to 1, 90% 3, 99% 3, longest 3",
        "history lengths: mean 1.5, 50% up to 1, 90% 2, 99% 2, longest 2",
        "history lengths up to 1: mean 1.0, 50% up to 1, 90% 1, 99% 1, longest 1",
    ]
    labelled = describe(store_of(rows_of([2], [1, 0]), tmp_path / "b", 7), max_history_length=1)
    assert labelled[4] == "labels: 50.00% positive"


@pytest.mark.parametrize("users_at_once", [1, 2, 100])
@pytest.mark.parametrize("labelled", [False, True])
def test_events_at_a_shared_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, users_at_once: int, labelled: bool
) -> None:
    """Two users at one time share nothing: each looks at its own events."""
    monkeypatch.setattr(statistics, "USERS_AT_ONCE", users_at_once)
    times = {"a": [1, 1, 1, 2], "b": [2, 3, 3], "c": [3], "d": [4, 5]}
    rows = [
        {"user_id": user, "item_id": n, "category_id": n, "timestamp": time} | ({"label": n % 2} if labelled else {})
        for user, of_user in times.items()
        for n, time in enumerate(of_user)
    ]
    store = store_of(rows, tmp_path / "s", 3)
    assert measure(store, max_history_length=9)["events_at_a_shared_time"] == 5
    (line,) = (line for line in describe(store, 9) if line.startswith("events that share"))
    assert line == "events that share their user's time with another: 5 (50.0%); " + (
        "none of them is in the history of another"
        if labelled
        else "they count one after the other, in the order of the files"
    )
