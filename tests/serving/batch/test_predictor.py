"""How a batch of rows is put to the model, by itself: numbers checked by hand, and a model that is easy to foretell."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from din_dist.serving.batch import predictor as predict
from din_dist.serving.batch.histories import GivenHistories, newest
from din_dist.serving.batch.parts import PartsFolder
from din_dist.serving.batch.predictor import Predictor, RowColumns, Stopped, calls, top_indices
from din_dist.tables.ids import Field

COLUMNS = RowColumns(Field("history", True, True), Field("candidates", True, True))


class Sums:
    """As `Bundle`; a logit is a thousandth of the history's sum and the candidate."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def rank_histories(self, items: Any, lengths: np.ndarray, candidates: Any, counts: np.ndarray) -> np.ndarray:
        histories = np.split(items.numpy(), np.cumsum(lengths)[:-1])
        assert counts.sum() == len(candidates)
        assert lengths.sum() == len(items)
        self.sizes.append(int((lengths * counts).sum()))
        sums = np.repeat([history.sum() for history in histories], counts)
        return ((sums + candidates.numpy()) / 1000).astype(np.float32)


def predictor(folder: PartsFolder, model: Any, columns: RowColumns = COLUMNS, **more: Any) -> Predictor:
    return Predictor(model, GivenHistories(3), columns, folder, **more)


@pytest.fixture
def out(tmp_path: Path) -> PartsFolder:
    (tmp_path / "out").mkdir()
    return PartsFolder(tmp_path / "out")


def rows(num_rows: int, seed: int = 0) -> dict[str, list[list[int]]]:
    random = np.random.default_rng(seed)
    return {
        name: [random.integers(1, 100, random.integers(7)).tolist() for _ in range(num_rows)]
        for name in ("history", "candidates")
    }


def test_newest_values_of_runs() -> None:
    places, lengths = newest(np.array([0, 2, 2, 9]), np.array([2, 2, 7, 10]), 3)
    assert places.tolist() == [0, 1, 4, 5, 6, 9]
    assert lengths.tolist() == [2, 0, 3, 1]


def test_best_of_runs() -> None:
    logits = np.array([1, 3, 2, 5, 5, 0, 7], np.float32)
    places, offsets = top_indices(logits, np.array([0, 3, 3, 6, 7]), 2)
    assert places.tolist() == [1, 2, 3, 4, 6]  # of equal ones the first
    assert offsets.tolist() == [0, 2, 2, 4, 5]


def test_a_batch_is_divided_among_calls() -> None:
    lengths, counts = np.array([2, 0, 5]), np.array([3, 0, 4])
    cost = [2 + 8] * 3 + [5 + 8] * 4  # 82 in all
    (whole,) = calls(lengths, counts, sum(cost))
    assert (whole.first_row, whole.end_row, whole.counts.tolist()) == (0, 3, [3, 0, 4])
    first, second = calls(lengths, counts, 60)  # in two of about 41
    assert (first.first_candidate, first.end_candidate, first.first_row, first.end_row) == (0, 4, 0, 3)
    assert first.counts.tolist() == [3, 0, 1]
    assert (second.first_row, second.end_row, second.counts.tolist()) == (2, 3, [3])
    assert [call.counts.tolist() for call in calls(lengths, counts, 1)] == [[1]] * 7  # a candidate at least
    assert not list(calls(lengths, 0 * counts, 10))


@pytest.mark.parametrize("most_pairs", [1, 30, 1 << 20])
def test_any_division_gives_the_same(
    tmp_path: Path, out: PartsFolder, monkeypatch: pytest.MonkeyPatch, most_pairs: int
) -> None:
    monkeypatch.setattr(predict, "PAIRS_PER_CALL", most_pairs)
    table = rows(50)
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    model = Sums()
    work = predictor(out, model)
    plan = out.begin([tmp_path / "rows.parquet"], 20, {}, overwrite=False)
    work.run(plan)
    found = pa.concat_tables(pq.read_table(path) for path in sorted((tmp_path / "out").glob("part-*")))
    assert found["candidates"].to_pylist() == table["candidates"]
    for history, candidates, logits, probabilities in zip(*found.to_pydict().values(), strict=True):
        expected = (sum(history[-3:]) + np.array(candidates)) / 1000
        np.testing.assert_allclose(logits, expected, rtol=1e-6)
        np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-expected)), rtol=1e-6)
    assert work.counts.candidates == sum(map(len, table["candidates"]))
    assert max(model.sizes) <= most_pairs or most_pairs == 1
    assert (work.counts.rows, work.counts.parts) == (50, 3)


def test_a_row_with_more_than_a_call_takes(tmp_path: Path, out: PartsFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "PAIRS_PER_CALL", 5000)
    candidates = np.random.default_rng(0).permutation(100_000).tolist()
    pq.write_table(pa.table({"history": [[1] * 50_000], "candidates": [candidates]}), tmp_path / "rows.parquet")
    work = predictor(out, Sums(), columns=RowColumns(*[COLUMNS.history, COLUMNS.candidates], top_k=2))
    work.run(out.begin([tmp_path / "rows.parquet"], 20, {}, overwrite=False))
    found = pq.read_table(next((tmp_path / "out").glob("part-*"))).to_pydict()
    assert found["top_items"] == [[99_999, 99_998]]
    np.testing.assert_allclose(found["logit"], [[100.002, 100.001]], rtol=1e-6)


def test_a_logit_that_is_no_number_is_not_published(tmp_path: Path, out: PartsFolder) -> None:
    class Broken(Sums):
        def rank_histories(self, *inputs: Any) -> np.ndarray:
            return super().rank_histories(*inputs) * np.float32("nan")

    pq.write_table(pa.table(rows(5)), tmp_path / "rows.parquet")
    work = predictor(out, Broken())
    with pytest.raises(FloatingPointError, match="not finite"):
        work.run(out.begin([tmp_path / "rows.parquet"], 20, {}, overwrite=False))
    assert not list((tmp_path / "out").glob("*part-*"))


def test_a_request_to_stop_is_heard_by_all(tmp_path: Path, out: PartsFolder) -> None:
    pq.write_table(pa.table(rows(50)), tmp_path / "rows.parquet")
    asked = threading.Event()
    work = predictor(out, Sums(), stop_requested=asked.is_set)
    plan = out.begin([tmp_path / "rows.parquet"], 20, {}, overwrite=False)
    asked.set()
    with pytest.raises(Stopped):
        work.run(plan)
    other = Predictor(Sums(), GivenHistories(3), COLUMNS, PartsFolder(tmp_path / "out"))  # type: ignore[arg-type]
    with pytest.raises(Stopped):
        other.run(plan, rank=1, world_size=2)
    assert not list((tmp_path / "out").glob("part-*"))


def test_what_is_made_ahead() -> None:
    made, num_threads = [], threading.active_count()

    def values() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            yield number
        raise ValueError("at the end")

    seen = []
    with pytest.raises(ValueError, match="at the end"):
        for number in predict.ahead(values()):
            seen.append(number)
    assert seen == list(range(5))
    made.clear()
    running = predict.ahead(values())
    assert next(running) == 0
    time.sleep(0.05)
    running.close()
    assert len(made) <= 4  # it does not run away
    assert threading.active_count() <= num_threads


def test_progress_counts_the_parts_of_others(
    tmp_path: Path, out: PartsFolder, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(predict, "SHOW_SECONDS", 0.0)
    pq.write_table(pa.table(rows(50)), tmp_path / "rows.parquet")
    work = predictor(out, Sums())
    plan = out.begin([tmp_path / "rows.parquet"], 20, {}, overwrite=False)
    last = tmp_path / "out" / plan.parts()[-1].name  # as if another process had just published it
    shown = predict.RowProgress(plan, out, predict.LogFormat.TEXT, 2, silent=False)
    last.write_text("")
    work.counts.rows, work.counts.candidates = 5, 9
    shown.show(work.counts)
    shown.close()
    assert capsys.readouterr().err.startswith("row 10 of 50: ")
