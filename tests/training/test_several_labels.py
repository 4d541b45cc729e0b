"""Several labels of one log: how they are read, what they do to the loss, and what they cost in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from din_dist import assembly
from din_dist.config import BatchNorm, Config, OptimizerKind, Split
from din_dist.data.event_store import open_store
from din_dist.data.prepared import prepare, prepared_folder
from din_dist.data.statistics import describe
from din_dist.distributed.runtime import Runtime
from din_dist.errors import InputError
from din_dist.evaluation.retrieval import queries_of
from tests.support.declared_features import write_table
from tests.support.small_log import small_config
from tests.support.task_log import TASKS, task_config, write_task_log

ROWS = [  # user, item, time, click, buy
    ("u", "a", 0, 1, 0),
    ("u", "b", 1, 1, 1),
    ("u", "c", 2, 0, 0),
    ("u", "d", 3, 1, 1),
    ("v", "a", 1, 0, 0),
    ("v", "b", 2, 1, 1),
]


def write(path: Path, rows: list[tuple] = ROWS) -> Path:
    names = ("user_id", "item_id", "timestamp", "click", "buy")
    pq.write_table(pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows]), path)
    return path


def config_of(folder: Path, rows: list[tuple] = ROWS, **settings: Any) -> Config:
    folder.mkdir(exist_ok=True)
    write(folder / "log.parquet", rows)
    defaults = {
        "split": Split.TEMPORAL,
        "validation_from": 10,
        "test_from": 11,
        "item_features": (),
        "embedding_dim": (6,),
    }
    return small_config(folder, **{"label_columns": TASKS} | defaults | settings)


@pytest.mark.parametrize(("makes_histories", "expected"), [("", "aabbad"), ("buy", "bbd")])
def test_labels_of_each_task_by_hand(tmp_path: Path, makes_histories: str, expected: str) -> None:
    config = config_of(tmp_path, history_label=makes_histories)
    store = prepare(config.data)
    assert store.facts.tasks == TASKS
    events = np.arange(6)
    np.testing.assert_array_equal(store.labels_of(events, 0), [1, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(store.labels_of(events, 1), [0, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(store.labels, store.labels_of(events, 1 if makes_histories else 0))
    own = store.own_ids("items", store.history_item_ids)
    assert sorted(own) == sorted("bdb" if makes_histories else "abdb")
    lines = describe(store, 10)
    assert "labels to predict: click 66.67% positive, buy 50.00% positive" in lines
    maker = assembly.Assembly(config, Runtime(), store)
    (batch,) = maker.batches(0, 1)
    found = {
        int(example): tuple(labels) for example, labels in zip(batch.example_ids, batch.labels.numpy(), strict=True)
    }
    assert found == dict(enumerate([(1, 0), (1, 1), (0, 0), (1, 1), (0, 0), (1, 1)]))


def test_queries_are_the_positives_of_the_task(tmp_path: Path) -> None:
    config = config_of(tmp_path, validation_from=1, test_from=2)
    store = prepare(config.data)
    examples = assembly.Assembly(config, Runtime(), store).splits["test"]
    assert queries_of(store, examples, 5, 100, 0).events.tolist() == [3, 5]
    assert queries_of(store, examples, 5, 100, 1).events.tolist() == [3, 5]
    rows = [(*row[:4], 0) if row[1] == "d" else row for row in ROWS]
    store = prepare(config_of(tmp_path / "other", rows, validation_from=1, test_from=2).data)
    assert queries_of(store, examples, 5, 100, 0).events.tolist() == [3, 5]
    assert queries_of(store, examples, 5, 100, 1).events.tolist() == [5]


def trained(config: Config) -> dict[str, np.ndarray]:
    job = assembly.Assembly(config, Runtime(), prepare(config.data))
    job.trainer.train()
    return {weight.path: weight.numpy() for weight in job.model.trainable_weights}


FIXED = {"optimizer": OptimizerKind.SGD, "batch_norm": BatchNorm.FROZEN, "learning_rate": 0.3, "epochs": 3}


@pytest.mark.parametrize("native", [True, False])
def test_a_task_of_weight_0_teaches_nothing(tmp_path: Path, native: bool) -> None:
    settings = {"task_weights": (1.0, 0.0), "native": native, **FIXED}
    flipped = [(*row[:4], 1 - row[4]) for row in ROWS]
    one, other = (trained(config_of(tmp_path / name, rows, **settings)) for name, rows in (("a", ROWS), ("b", flipped)))
    for path, value in one.items():
        np.testing.assert_array_equal(value, other[path], err_msg=path)
    counted = trained(config_of(tmp_path / "c", flipped, **settings | {"task_weights": (1.0, 1.0)}))
    assert max(np.abs(counted[path] - value).max() for path, value in one.items()) > 1e-3


def test_two_tasks_of_one_label_learn_what_one_does(tmp_path: Path) -> None:
    """In one update of half the weight each, from towers that begin alike: the rest is as of one label."""
    rows = [(*row[:4], row[3]) for row in ROWS]
    settings = {**FIXED, "hidden_units": (4,), "epochs": 1}
    two_config = config_of(tmp_path / "two", rows, task_weights=(0.5, 0.5), **settings)
    one_config = config_of(
        tmp_path / "one", rows, label_columns=(), label_column="click", label_column_required=True, **settings
    )
    two, one = (assembly.Assembly(config, Runtime(), prepare(config.data)) for config in (two_config, one_config))
    weights = {weight.path: weight for weight in one.model.weights}
    for weight in two.model.weights:
        path = weight.path
        if path.startswith("model/head/"):
            path = path.replace("task_0_output", "output").replace("task_1_output", "output")
            value = weights[path].numpy()
            weight.assign(np.concatenate([value, value], axis=-1) if "dense_0" in path else value)
        elif path in weights and path != "lookup/item_bias":
            weight.assign(weights[path].numpy())
    before = {path: weight.numpy() for path, weight in weights.items()}
    for job in (one, two):
        job.trainer.train()
    changed = [np.abs(weight.numpy() - before[weight.path]).max() > 1e-6 for weight in one.model.trainable_weights]
    assert sum(changed) > len(changed) / 2
    for weight in two.model.trainable_weights:
        if weight.path in weights and not weight.path.startswith("model/head/"):
            expected, value = weights[weight.path].numpy(), weight.numpy()
            if weight.path == "lookup/item_bias":  # each learned half of it: together they are the label's
                value = value.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7, err_msg=weight.path)


def test_prepared_labels_take_one_byte_an_event(tmp_path: Path) -> None:
    config = task_config(tmp_path)
    store = prepare(config.data)
    assert store.task_labels is not None and store.task_labels.nbytes == store.facts.num_events
    again = open_store(prepared_folder(config.data), [])
    np.testing.assert_array_equal(again.task_labels, store.task_labels)


def test_the_rate_of_purchases_is_recovered(tmp_path: Path) -> None:
    """Planted: each item has rates of its own. The chain's mean probabilities are those of the log, of both labels."""
    folder = tmp_path
    write_task_log(folder / "log.parquet", num_users=600, num_items=6, seed=1)
    config = task_config(folder, task_head="esmm", learning_rate=0.01, epochs=12, attention_hidden_units=(4,), seed=2)
    store = prepare(config.data)
    job = assembly.Assembly(config, Runtime(), store)
    job.trainer.train()
    logits = job.evaluator.scores("test", job.model)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    events = job.splits["test"].events()
    for place in range(2):
        labels = store.labels_of(events, place)
        for item in range(1, 7):
            chosen = store.item_ids[events] == item
            error = 4 * np.sqrt(labels[chosen].mean() * (1 - labels[chosen].mean()) / chosen.sum())
            assert abs(probabilities[chosen, place].mean() - labels[chosen].mean()) < error + 0.05
    assert (probabilities[:, 1] <= probabilities[:, 0]).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"label_columns": ("click",)}, "--label_columns: names several columns; --label_column names one. Received: "),
        ({"label_columns": ("click", "click")}, "--label_columns: each column may be named once."),
        (
            {"label_columns": ("click", "b-u")},
            "--label_columns: their names are parts of others: letters of ASCII, digits",
        ),
        ({"label_columns": tuple("abcdefghi")}, "--label_columns: takes at most 8 columns."),
        (
            {"history_label": "like"},
            "--history_label: must be one of --label_columns. Received: 'like'. Choose among click",
        ),
        ({"validation_task": "like"}, "--validation_task: must be one of --label_columns. Received: 'like'."),
        (
            {"task_weights": (1.0,)},
            "--task_weights: must have one number for each of --label_columns. Received: '1.0'.",
        ),
        ({"task_weights": (0.0, 0.0)}, "--task_weights: must be numbers of at least 0, not all 0."),
        ({"task_weights": (1.0, -1.0)}, "--task_weights: must be numbers of at least 0, not all 0."),
        (
            {"task_head": "mmoe"},
            "--task_head: must be shared, esmm or mmoe:EXPERTS, with 2 to 64 experts. Received: 'mmoe'.",
        ),
        ({"task_head": "mmoe:1"}, "--task_head: must be shared, esmm or mmoe:EXPERTS"),
        ({"task_head": "mmoe:x"}, "--task_head: must be shared, esmm or mmoe:EXPERTS"),
        ({"task_head": "shared:2"}, "--task_head: must be shared, esmm or mmoe:EXPERTS"),
        ({"label_columns": (), "task_head": "esmm"}, "--task_head: is for several labels. Received: 'esmm'."),
        ({"label_columns": (), "validation_task": "buy"}, "--validation_task: must be one of --label_columns."),
        ({"label_columns": (), "history_label": "buy"}, "--history_label: must be one of --label_columns."),
        ({"label_columns": (), "task_weights": (1.0, 1.0)}, "--task_weights: must have one number for each of"),
        ({"label_column_required": True}, "--label_column: --label_columns takes its place. Received: 'label'."),
        ({"dataset": "synthetic", "data_path": ""}, "--label_columns: --dataset=synthetic has no such column."),
        ({"weight_column": "click"}, "--item_features: a column can have one role. Received: 'click'."),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, settings: dict, words: str) -> None:
    with pytest.raises(InputError) as caught:
        config_of(tmp_path, **settings)
    assert words in str(caught.value)


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"like.*--label_columns"):
        prepare(config_of(tmp_path, label_columns=("click", "like")).data)


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize(("column", "value"), [("buy", 2), ("click", None), ("buy", "yes!")])
def test_labels_that_are_wrong(tmp_path: Path, column: str, value: Any, form: str) -> None:
    rows = [dict(zip(("user_id", "item_id", "timestamp", "click", "buy"), row, strict=True)) for row in ROWS]
    rows[3][column] = value
    if form == "parquet" and isinstance(value, str):
        rows = [row | {column: str(row[column])} for row in rows]
    path = write_table(tmp_path / f"log.{form}", rows)
    config = config_of(tmp_path / "job").replace(data_path=str(path))
    with pytest.raises(InputError) as caught:
        prepare(config.data)
    assert "row 4" in str(caught.value)
    rule = "all values of buy must be numbers" if (form, value) == ("jsonl", "yes!") else "a label must be 0 or 1"
    assert rule in str(caught.value)
    assert column in str(caught.value)
    assert (value is None) is ("Fill it in, or drop the row." in str(caught.value))


def test_a_purchase_without_a_click(tmp_path: Path) -> None:
    rows = [*ROWS, ("v", "c", 3, 0, 1)]
    shared = config_of(tmp_path, rows)
    assembly.Assembly(shared, Runtime(), prepare(shared.data))
    config = config_of(tmp_path, rows, task_head="esmm")
    with pytest.raises(InputError) as caught:
        assembly.Assembly(config, Runtime(), prepare(config.data))
    assert str(caught.value) == (
        "--task_head: esmm takes labels of which each supposes the one before it, as buy must suppose click. Received: "
        "'1 events with buy but without click'. Order --label_columns by time, correct the log, or use "
        "--task_head=shared."
    )


def test_other_labels_are_other_data(tmp_path: Path) -> None:
    plain = config_of(tmp_path, label_columns=(), label_column="click", label_column_required=True)
    several = config_of(tmp_path)
    assert prepared_folder(plain.data) != prepared_folder(several.data)
    assert prepare(plain.data).facts.fingerprint != prepare(several.data).facts.fingerprint
    assert "tasks" not in prepare(plain.data).facts.to_json()
