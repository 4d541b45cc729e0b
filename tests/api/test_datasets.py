"""Logs as data sets: the trainer's own examples, in every form, and a fit on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas
import pytest
import tensorflow as tf
from numpy.testing import assert_array_equal

import din_dist
from din_dist.assembly import Assembly
from din_dist.config import Config
from din_dist.data.prepared import prepare
from din_dist.distributed.runtime import Runtime
from tests.support.small_log import small_config, write_log

SETTINGS = {"split": "leave_two_out", "max_history_length": 8, "negatives_per_positive": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    write_log(folder / "log.parquet")
    return folder


@pytest.fixture(scope="module")
def log(folder: Path) -> pandas.DataFrame:
    return pandas.read_parquet(folder / "log.parquet")


@pytest.fixture(scope="module")
def data(log: pandas.DataFrame) -> Any:
    return din_dist.datasets.from_pandas(log, **SETTINGS)


def job(folder: Path, **values: Any) -> Assembly:
    config: Config = small_config(folder, **(SETTINGS | {"native": False, "output_dir": str(folder / "run")} | values))
    return Assembly(config, Runtime(), prepare(config.data))


def test_the_examples_are_those_of_the_trainer(folder: Path, data: Any) -> None:
    """Two epochs in the trainer's order, from a table and from a file."""
    trained = job(folder)
    steps = 2 * data.steps_per_epoch(64)
    from_file = din_dist.datasets.from_parquet(folder / "log.parquet", data_dir=folder / "own", **SETTINGS)
    of_table, of_file = data.train(64, epochs=2), from_file.train(64, epochs=2)
    batches = list(zip(trained.batches(0, steps), of_table, of_file, strict=True))
    assert len(batches) == steps
    for batch, *found in batches:
        for inputs, labels in found:
            assert inputs.keys() == {"candidate_item_ids", "history_item_ids", "history_lengths"}
            for name, values in inputs.items():
                assert_array_equal(values, getattr(batch, name), err_msg=name)
            assert_array_equal(labels, batch.labels)


def test_the_examples_are_those_of_the_log(log: pandas.DataFrame, data: Any) -> None:
    """A positive is an event, with what its user did before; a negative is an item that the user never had."""
    rows = log.sort_values("timestamp", kind="stable").groupby("user_id")["item_id"].agg(list)
    # A user's first event has no history. The last two are held out.
    events = [(items[n], tuple(items[max(0, n - 8) : n])) for items in rows for n in range(1, len(items) - 2)]
    positives, num_negatives = [], 0
    for inputs, labels in data.train(64):
        histories = tf.RaggedTensor.from_row_lengths(inputs["history_item_ids"], inputs["history_lengths"])
        candidates = data.ids_of(inputs["candidate_item_ids"])
        for candidate, history, label in zip(candidates, histories.to_list(), labels, strict=True):
            own = tuple(data.ids_of(history))
            if label:
                positives.append((candidate, own))
            else:
                num_negatives += 1
                assert candidate not in own
    assert num_negatives == 2 * len(positives) == data.num_examples() * 2 // 3
    assert sorted(positives) == sorted(events)


def test_every_form_has_the_same_examples(data: Any) -> None:
    for packed, ragged, padded in zip(
        *(data.evaluation("test", 64, form) for form in din_dist.datasets.FORMS), strict=True
    ):
        expected = tf.RaggedTensor.from_row_lengths(packed[0]["history_item_ids"], packed[0]["history_lengths"])
        assert ragged[0]["history_item_ids"].to_list() == expected.to_list()
        mask = padded[0]["history_mask"]
        assert_array_equal(tf.boolean_mask(padded[0]["history_item_ids"], mask), packed[0]["history_item_ids"])
        assert_array_equal(tf.reduce_sum(tf.cast(mask, tf.int32), axis=1), packed[0]["history_lengths"])


@pytest.mark.parametrize("form", ["packed", "ragged", "padded"])
def test_a_fit_learns(form: str, data: Any) -> None:
    """The trainer's own sizes; each user prefers a category."""
    model = din_dist.DIN(data.num_items, data.item_features, 8, hidden_units=[8], attention_hidden_units=[8])
    model.compile(din_dist.LazyAdam(0.01), metrics=[keras.metrics.AUC(from_logits=True, name="auc")])
    history = model.fit(data.train(64, form=form), validation_data=data.evaluation("validation"), epochs=6, verbose=0)
    assert history.history["val_auc"][-1] > 0.65


def test_a_model_that_finds_items_is_given_targets(data: Any) -> None:
    labels = [inputs["candidate_item_ids"] for inputs in data.targets(64)]
    assert sum(map(len, labels)) == data.num_examples() // 3
    model = din_dist.ComiRecSA(data.num_items, data.item_features, 8, item_counts=data.item_counts, num_sampled=16)
    model.compile(din_dist.LazyAdam(0.02))
    losses = model.fit(data.targets(64), epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_labels_and_weights_of_a_log(tmp_path: Path, log: pandas.DataFrame) -> None:
    random = np.random.default_rng(0)
    labelled = log.assign(label=random.integers(0, 2, len(log)), weight=random.uniform(0.5, 2, len(log)))
    found = din_dist.datasets.from_pandas(labelled, split="temporal", weight_column="weight", data_dir=tmp_path)
    total, num_examples = 0.0, 0
    for _, labels, weights in found.train(64):
        assert set(labels.numpy()) <= {0.0, 1.0}
        total, num_examples = total + float(tf.reduce_sum(weights)), num_examples + len(labels)
    assert total == pytest.approx(num_examples, rel=1e-5), "1 on average"
    model = din_dist.YouTubeDNN(found.num_items, embedding_dim=4)
    model.compile()
    assert np.isfinite(model.fit(found.targets(64), verbose=0).history["loss"]).all()
    again = din_dist.datasets.from_pandas(labelled, split="temporal", weight_column="weight", data_dir=tmp_path)
    assert again.store.folder == found.store.folder
    assert len(list(tmp_path.glob("*.parquet"))) == 1


def test_features_of_examples(tmp_path: Path, log: pandas.DataFrame) -> None:
    random = np.random.default_rng(0)
    hours = log.assign(hour=random.integers(0, 24, len(log)), price=random.normal(size=len(log)))
    (tmp_path / "features.toml").write_text(
        '[hour]\nof = "context"\nkind = "category"\n\n[price]\nof = "context"\nkind = "number"\n'
    )
    found = din_dist.datasets.from_pandas(hours, features=tmp_path / "features.toml", data_dir=tmp_path / "data")
    model = din_dist.DIN(found.num_items, found.item_features, 4, found.features)
    model.compile()
    model.fit(found.train(64), verbose=0)
    inputs, _ = next(iter(found.evaluation(batch_size=64)))
    assert inputs["features"].keys() == {"hour", "price"}
    model.save(tmp_path / "model.keras")
    assert_array_equal(din_dist.load_model(tmp_path / "model.keras")(inputs), model(inputs))


def test_ids_and_numbers(data: Any, log: pandas.DataFrame) -> None:
    ids = sorted(set(log["item_id"]))
    numbers = data.numbers_of([*ids, "never"])
    assert sorted(numbers[:-1]) == [*range(1, data.num_items + 1)]
    assert numbers[-1] == 0
    assert data.ids_of(numbers) == [*ids, None]


def test_mistakes_get_one_line(log: pandas.DataFrame, data: Any) -> None:
    make = din_dist.datasets.from_pandas
    for wrong, message in (
        (lambda: make([1]), "log: must be a pandas.DataFrame. Received: 'list'."),
        (lambda: make(log, epochs=2), "settings: must be settings of the data. Received: ['epochs']."),
        (lambda: make(log, histories=["all:5"]), "settings: must be those of one label and one history."),
        (lambda: make(log.drop(columns="user_id")), ""),
        (lambda: data.train(0), "batch_size: must be at least 1. Received: 0."),
        (lambda: data.train(form="sparse"), "form: must be a form of histories. Received: 'sparse'."),
        (lambda: data.evaluation("dev"), "split: must be a split. Received: 'dev'."),
        (lambda: make(log).evaluation("validation"), "split: must have examples. Received: 'validation'."),
    ):
        with pytest.raises(din_dist.InputError) as error:
            wrong()
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)
