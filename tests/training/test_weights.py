"""Weights of events: how they are read, and what they do to the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from din_dist import assembly
from din_dist.config import BatchNorm, Config, OptimizerKind, Split
from din_dist.data.prepared import prepare
from din_dist.data.statistics import describe, measure
from din_dist.distributed.runtime import Runtime
from din_dist.errors import InputError
from tests.support.declared_features import write_table
from tests.support.small_log import small_config

Rows = list[dict[str, Any]]


def log(weights: Sequence[float], labelled: bool = True) -> Rows:
    """One event of each weight, of as many users, after two events of weight 1 that give each user a history."""
    random = np.random.default_rng(0)
    rows: Rows = []
    for user, weight in enumerate(weights):
        for time, weight_of in enumerate((1.0, 1.0, weight)):
            row = {"user_id": f"u{user}", "item_id": f"i{random.integers(9)}", "timestamp": time, "worth": weight_of}
            row["category_id"] = f"c{int(row['item_id'][1:]) % 3}"
            rows.append(row | ({"label": int(random.integers(2)) if time == 2 else 1} if labelled else {}))
    return rows


def config_of(folder: Path, rows: Rows, **settings: Any) -> Config:
    """All events in one batch, without statistics of it, and none held out."""
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "log.parquet")
    defaults = {
        "split": Split.TEMPORAL,
        "validation_from": 10,
        "test_from": 11,
        "global_batch_size": 1000,
        "epochs": 5,
        "batch_norm": BatchNorm.FROZEN,
        "optimizer": OptimizerKind.SGD,
        "learning_rate": 0.5,
        "seed": 3,
    }
    return small_config(folder, **defaults | {"weight_column": "worth"} | settings)


def trained(config: Config) -> dict[str, np.ndarray]:
    """Trains, and returns the weights by their paths."""
    job = assembly.Assembly(config, Runtime(), prepare(config.data))
    before = {weight.path: weight.numpy() for weight in job.model.trainable_weights}
    job.trainer.train()
    after = {weight.path: weight.numpy() for weight in job.model.trainable_weights}
    assert any((after[path] != before[path]).any() for path in before)
    return after


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray], tolerance: float) -> None:
    assert list(one) == list(other)
    for path, value in one.items():
        np.testing.assert_allclose(value, other[path], rtol=0, atol=tolerance, err_msg=path)


@pytest.mark.parametrize("native", [True, False])
def test_weight_2_is_the_example_twice(tmp_path: Path, native: bool) -> None:
    weights = np.random.default_rng(1).integers(1, 4, 20)  # 0 would take items away
    once = log(list(map(float, weights)))
    often = [row | {"worth": 1.0} for row in once for _ in range(int(row["worth"]))]
    found = [trained(config_of(tmp_path / name, rows, native=native)) for name, rows in (("a", once), ("b", often))]
    assert_same(*found, tolerance=2e-6)
    plain = trained(config_of(tmp_path / "c", once, native=native, weight_column=""))
    assert max(np.abs(plain[path] - value).max() for path, value in found[0].items()) > 1e-3


def test_the_size_of_all_weights_changes_nothing(tmp_path: Path) -> None:
    rows = log([0.5, 3.0, 1.0, 0.0])
    larger = [row | {"worth": row["worth"] * 64} for row in rows]
    found = [trained(config_of(tmp_path / name, log)) for name, log in (("a", rows), ("b", larger))]
    assert_same(*found, tolerance=0)
    plain = [row | {"worth": 7.0} for row in rows]
    by_column, without = (trained(config_of(tmp_path / name, plain, weight_column=name)) for name in ("worth", ""))
    assert_same(by_column, without, tolerance=0)


def test_an_example_of_weight_0_teaches_nothing(tmp_path: Path) -> None:
    """Whatever its label: it is each user's last event, so that nobody's history has it."""
    rows = log([0.0, 0.0, 1.0, 2.0, 0.0])
    changed = [row | {"label": 1 - row["label"]} if row["worth"] == 0 else row for row in rows]
    assert changed != rows
    found = [trained(config_of(tmp_path / name, log)) for name, log in (("a", rows), ("b", changed))]
    assert_same(*found, tolerance=0)


def test_batches_are_divided_by_the_mean_of_the_split(tmp_path: Path) -> None:
    """Not by that of the batch, which would depend on how examples fall into batches."""
    rows = log([0.0, 4.0, 1.5], labelled=False)
    config = config_of(tmp_path, rows, negatives_per_positive=2, global_batch_size=4)
    store = prepare(config.data)
    assert store.weights is not None
    job = assembly.Assembly(config, Runtime(), store)
    examples = job.splits["train"]
    mean = store.weights[examples.events()].astype(np.float64).mean()
    per_epoch = -(-examples.num_examples // 4)
    found = {}
    for batch in job.batches(0, per_epoch):
        found |= dict(zip(batch.example_ids.numpy().tolist(), batch.weights.numpy(), strict=True))
    assert sorted(found) == list(range(examples.num_examples))
    for example, weight in found.items():  # a drawn negative has the weight of its event
        event = examples.events()[example // examples.draws_per_row]
        assert weight == pytest.approx(store.weights[event] / mean, rel=1e-6)
    assert np.mean(list(found.values())) == pytest.approx(1)


def test_metrics_count_each_example_once(tmp_path: Path) -> None:
    rows = log([0.0, 4.0, 1.5, 1.0])
    held_out = {"validation_from": 1, "test_from": 2, "epochs": 1}
    tests = [
        assembly.Assembly(config, Runtime(), prepare(config.data)).trainer.test()
        for config in (config_of(tmp_path / name, rows, weight_column=name, **held_out) for name in ("worth", ""))
    ]
    for name in ("auc", "log_loss", "num_examples"):
        assert tests[0][name] == tests[1][name]


def test_the_report_tells_of_weights(tmp_path: Path) -> None:
    store = prepare(config_of(tmp_path, log([0.0, 4.0, 1.5])).data)
    assert measure(store, 10)["weights"] == {"mean": pytest.approx(11.5 / 9), "max": 4.0, "zero": 1}
    assert "weights: mean 1.278, largest 4, 1 events of weight 0" in describe(store, 10)
    assert prepare(config_of(tmp_path, log([0.0, 4.0, 1.5]), weight_column="").data).weights is None


RULE = "every event needs a weight, one number of at least 0"


WRONG = {
    -0.5: f"row 3: {RULE}. Received: worth=-0.5. Correct the row.",
    None: f"row 3: {RULE}. Received: no worth. Correct the row.",
    math.nan: f"row 3: {RULE}. Received: worth=nan. Correct the row.",
    math.inf: "row 3: numbers must be finite and fit float32",
}


@pytest.mark.parametrize(
    ("worth", "words", "form"),
    [
        (worth, words, form)
        for worth, words in WRONG.items()
        for form in ("parquet", "jsonl", "csv")
        if form != "jsonl" or worth in (-0.5, None)  # JSON has no such numbers
    ],
)
def test_wrong_weights(tmp_path: Path, worth: float | None, words: str, form: str) -> None:
    rows = log([1.0, 2.0])
    rows[2] |= {"worth": worth}
    config = config_of(tmp_path, rows)
    path = write_table(tmp_path / f"other.{form}", rows)
    with pytest.raises(InputError) as caught:
        prepare(config.replace(data_path=str(path)).data)
    message = str(caught.value)
    assert words in message or (form == "csv" and words.split("Received")[0] in message)


def test_weights_that_are_lists(tmp_path: Path) -> None:
    rows = [row | {"worth": [1.0]} for row in log([1.0])]
    with pytest.raises(InputError, match=f"row 1: {RULE}. Received: worth="):
        prepare(config_of(tmp_path, rows).data)


def test_weights_that_are_all_0(tmp_path: Path) -> None:
    config = config_of(tmp_path, [row | {"worth": 0} for row in log([1.0])])
    with pytest.raises(InputError) as caught:
        trained(config)
    assert str(caught.value) == (
        "--weight_column: training examples must have a weight above 0. Received: 0 for all 3 of them. Correct the "
        "column, or drop it."
    )


def test_the_column_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="price.*--weight_column"):
        prepare(config_of(tmp_path, log([1.0]), weight_column="price").data)
