"""Jobs with features: what they learn, what they send, and going on from a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.testing import assert_array_equal

from din_dist import assembly
from din_dist.assembly import Assembly
from din_dist.cli.saved_job import trained_model
from din_dist.config import Activation, OptimizerKind
from din_dist.data.event_store import EventStore
from din_dist.data.prepared import prepare
from din_dist.distributed.row_transports import RowGradients
from din_dist.distributed.runtime import Runtime
from din_dist.errors import InputError
from din_dist.features.encoding import Encoding, StoredFeature
from din_dist.features.spec import FeatureSpec, Kind, Owner
from din_dist.metrics.ranking import auc
from din_dist.training.train_step import MessageSizes
from tests.support.featured_store import with_features
from tests.support.small_log import small_config


def test_a_job_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """With features of every form, as one that was never stopped."""
    ended = {}
    for name, parts in {"whole": [12], "resumed": [5, 12]}.items():
        for max_steps in parts:
            config = small_config(tmp_path, output_dir=str(tmp_path / name), max_steps=max_steps, epochs=100)
            job = Assembly(config, Runtime(), with_features(prepare(config.data)))
            job.trainer.train()
            job.telemetry.close()
        ended[name] = {path: variable.numpy() for path, variable in job.saved_variables.items()}
    assert any(path.startswith("features/user_") for path in ended["whole"])
    for path, value in ended["whole"].items():
        assert_array_equal(ended["resumed"][path], value, err_msg=path)
    model, step = trained_model(config, with_features(prepare(config.data)), step=12)
    assert step == 12
    for weight in model.weights:
        assert_array_equal(weight, ended["whole"][weight.path], err_msg=weight.path)


def numbers_and_vectors(store: EventStore, owner: Owner) -> dict[str, StoredFeature]:
    num_rows = {Owner.USER: store.facts.num_users, Owner.ITEM: store.facts.num_items + 1}[owner]
    vectors = Encoding(FeatureSpec(f"{owner}_vector", owner, Kind.VECTOR, width=3), dimension=100)
    numbers = Encoding(FeatureSpec(f"{owner}_number", owner, Kind.NUMBER))
    return {
        vectors.spec.name: StoredFeature(vectors, np.ones((num_rows, 100), np.float16)),
        numbers.spec.name: StoredFeature(numbers, np.ones(num_rows, np.float32)),
    }


def test_numbers_and_frozen_vectors_are_not_sent(tmp_path: Path) -> None:
    """Of users only the projection is, 101 x 3 + 3, and the head's weights for 3 + 2 more columns."""
    config = small_config(tmp_path)
    plain = prepare(config.data)
    jobs = [
        Assembly(config, Runtime(), store)
        for store in (plain, dataclasses.replace(plain, features=numbers_and_vectors(plain, Owner.USER)))
    ]
    sizes = [MessageSizes(job.model, job.optimizer, 4, has_peers=True) for job in jobs]
    assert sizes[1].table_names == sizes[0].table_names == ["item", "category_id", "item_bias"]
    without, with_them = (each.of([10, 5, 10]) for each in sizes)
    assert with_them["rows"] == without["rows"]
    assert with_them["row_ids"] == without["row_ids"]
    of_head = (3 + 2) * (8 + 2)  # kernel, and scale and offset of the normalization
    assert with_them["dense"] - without["dense"] == 4 * (101 * 3 + 3 + of_head)
    batch = next(jobs[1].batches(0, 1))
    gradients, _, _ = jobs[1].step.local_gradients(batch, 64.0)
    merged, _ = jobs[1].step.exchange(gradients, np.zeros(1, np.float32), 64.0)
    by_rows = [tuple(each.rows.shape[1:]) for each in merged if isinstance(each, RowGradients)]
    assert by_rows == [(6,), (4,), (1,)]
    own = {weight.path for weight in jobs[1].model.weights if "user_" in weight.path}
    assert own == {"features/user_vector/kernel", "features/user_vector/bias"}  # no variable holds the values


def test_tables_of_features_send_their_rows(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    job = Assembly(config, Runtime(), with_features(prepare(config.data)))
    sizes = MessageSizes(job.model, job.optimizer, 4, has_peers=True)
    tables = [f"{owner}_{form}" for owner in ("item", "user", "context") for form in ("category", "mean", "sum")]
    assert {"item", "item_bias", *tables} < set(sizes.table_names)
    assert len(set(sizes.table_names)) == len(sizes.table_names)
    gradients, _, _ = job.step.local_gradients(next(job.batches(0, 1)), 64.0)
    by_rows = {
        name.rpartition("/")[2]
        for name, each in zip(job.optimizer.names, gradients, strict=True)
        if hasattr(each, "indices")
    }
    assert by_rows == set(sizes.table_names)
    for each in gradients:
        if hasattr(each, "indices"):
            assert len(set(each.indices.numpy().tolist())) == len(each.indices)


def test_row_counts_are_those_of_training(tmp_path: Path) -> None:
    """Of users and contexts in the events of training, of items in its positive ones; a list counts each entry."""
    config = small_config(tmp_path, mini_batch_aware_l2=0.1)
    job = Assembly(config, Runtime(), with_features(prepare(config.data)))
    examples = job.splits["train"]
    users = examples.user_of_example()[:: examples.draws_per_row]
    features = job.store.features
    expected = np.bincount(features["user_category"].values[users], minlength=4)
    assert_array_equal(job.row_counts["features/user_category"], expected)
    lists, counts = features["context_mean"], np.zeros(4)
    for event in examples.events():
        for row in lists.values[lists.offsets[event] : lists.offsets[event + 1]]:
            counts[row] += 1
    assert_array_equal(job.row_counts["features/context_mean"], counts)
    items, of_items = features["item_category"].values, np.zeros(4)
    for item in job.store.item_ids[examples.events()]:
        of_items[items[item]] += 1
    first = np.setdiff1d(job.store.user_offsets[:-1], np.concatenate([s.events() for s in job.splits.values()]))
    for item in job.store.item_ids[first]:  # the first event of a user has no history, but counts
        of_items[items[item]] += 1
    assert_array_equal(job.row_counts["lookup/features/item_category"], of_items)


def test_tables_of_features_must_fit_into_memory(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    store = prepare(config.data)
    encoding = Encoding(FeatureSpec("user_id", Owner.USER, Kind.CATEGORY), num_rows=10**12)
    features = {"user_id": StoredFeature(encoding, np.zeros(store.facts.num_users, np.int32))}
    rule, remedy = "tables and optimizer must fit into memory", "Declare feature user_id with rows .hashing., min_count"
    with pytest.raises(InputError, match=f"{rule}.*{remedy}"):
        assembly.require_memory_for_tables(config, store.facts, features)


def planted_store(config_folder: Path, num_users: int, num_events: int) -> tuple[EventStore, np.ndarray]:
    """Returns a log whose label depends on hour x category and on the user's number x hour; and each event's logit."""
    random = np.random.default_rng(0)
    numbers = random.normal(size=num_users).astype(np.float32)
    rows, logits = [], {}
    for user in range(num_users):
        for time in range(num_events):
            item, hour = int(random.integers(40)), int(random.integers(24))
            timestamp = (24 * time + hour) * 3600
            logit = (2.0 if (hour // 6 + item % 4) % 2 else -2.0) + (1.5 if hour < 12 else -1.5) * numbers[user]
            logits[user, timestamp] = logit
            label = int(random.random() < 1 / (1 + np.exp(-logit)))
            rows.append((f"u{user}", f"i{item}", f"c{item % 4}", timestamp, label))
    columns = zip(*rows, strict=True)
    names = ["user_id", "item_id", "category_id", "timestamp", "label"]
    pq.write_table(pa.table(dict(zip(names, map(list, columns), strict=True))), config_folder / "log.parquet")
    store = prepare(small_config(config_folder).data)
    own_users = [int(name[1:]) for name in store.vocabulary("users").to_pylist()]
    of_event = np.repeat(own_users, np.diff(store.user_offsets))
    hours = store.timestamps // 3600 % 24
    hour = Encoding(FeatureSpec("hour", Owner.CONTEXT, Kind.HOUR_OF_DAY), num_rows=25)
    number = Encoding(FeatureSpec("number", Owner.USER, Kind.NUMBER))
    features = {
        "hour": StoredFeature(hour, (1 + hours).astype(np.int32)),
        "number": StoredFeature(number, numbers[own_users]),
    }
    known = [logits[pair] for pair in zip(of_event.tolist(), store.timestamps.tolist(), strict=True)]
    return dataclasses.replace(store, features=features), np.array(known)


def test_what_is_planted_is_learned(tmp_path: Path) -> None:
    """Without the columns nothing can be known; with them nearly all that can be."""
    store, logits = planted_store(tmp_path, num_users=400, num_events=60)
    found = {}
    for name, own in {"with": store, "without": dataclasses.replace(store, features={})}.items():
        config = small_config(
            tmp_path,
            output_dir=str(tmp_path / name),
            epochs=6,
            global_batch_size=256,
            optimizer=OptimizerKind.LAZY_ADAM,
            learning_rate=0.01,
            activation=Activation.DICE,
            hidden_units=(32, 16),
        )
        job = Assembly(config, Runtime(), own)
        job.trainer.train()
        job.telemetry.close()
        found[name] = job.evaluator.evaluate("test", lambda batch, model=job.model: model(batch))["auc"]
    events = job.splits["test"].events()
    best = auc(logits[events], store.labels[events])
    assert found["without"] < 0.55
    assert found["with"] > best - 0.01
