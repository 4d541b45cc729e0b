"""Synthetic impressions: their rules, their probabilities, and what a model can learn of them."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from din_dist import assembly
from din_dist.config import Config, Split
from din_dist.data.builders.synthetic import SyntheticConfig
from din_dist.data.builders.synthetic_impressions import ITEMS_PER_PAGE, LABELS, Impressions, Truth, write_impressions
from din_dist.data.event_store import EventStore
from din_dist.data.prepared import prepare
from din_dist.distributed.runtime import Runtime
from din_dist.features.declarations import read_declarations
from din_dist.features.spec import to_text
from din_dist.metrics.ranking import auc
from tests.support.small_log import small_config

SIZE = {"num_users": 1200, "num_items": 60, "num_categories": 6, "events_per_user": 60, "seed": 3}


def config_of(folder: Path, **settings: Any) -> Config:
    """A job on impressions of `SIZE`."""
    folder.mkdir(exist_ok=True)
    defaults = {
        "dataset": "synthetic_impressions",
        "data_path": "",
        "item_features": ("category_id",),
        "max_history_length": 40,
        "embedding_dim": (8,),
        "request_column": "page_id",
        "label_time_column": "clicked_at",
        "split": Split.TEMPORAL,
        "global_batch_size": 256,
        **{f"synthetic_{name}": value for name, value in SIZE.items()},
    }
    return small_config(folder, **defaults | settings)


@pytest.fixture(scope="module")
def truth() -> Truth:
    impressions, num_users = Impressions(SyntheticConfig.sized(**SIZE)), SIZE["num_users"]
    parts = [impressions.of_users(first, min(first + 1000, num_users)) for first in range(0, num_users, 1000)]
    return Truth({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def test_labels_have_their_probabilities(truth: Truth) -> None:
    """Of each position and each category, within 4.5 standard errors; and each label supposes the one before it."""
    for name in LABELS:
        probability, label = truth[f"p_{name}"], truth[name]
        for part in (truth["position"], truth["category_id"], np.digitize(probability, [0.05, 0.1, 0.2, 0.4])):
            for value in np.unique(part):
                chosen = part == value
                variance = (probability[chosen] * (1 - probability[chosen])).sum()
                assert abs(label[chosen].sum() - probability[chosen].sum()) < 4.5 * np.sqrt(variance)
    assert (truth["buy"] <= truth["cart"]).all()
    assert (truth["cart"] <= truth["click"]).all()
    assert 0.1 < truth["click"].mean() < 0.4


def test_pages(truth: Truth) -> None:
    """A page is a user's, at one time, of positions 1 to 8; a user's pages follow each other."""
    pages = truth["page_id"].reshape(-1, ITEMS_PER_PAGE)
    assert (pages == pages[:, :1]).all()
    assert (truth["position"].reshape(pages.shape) == np.arange(1, ITEMS_PER_PAGE + 1)).all()
    times, users = (truth[name].reshape(pages.shape)[:, 0] for name in ("timestamp", "user_id"))
    assert (truth["timestamp"].reshape(pages.shape) == times[:, None]).all()
    assert (np.diff(users) >= 0).all()
    assert (np.diff(times)[np.diff(users) == 0] > 0).all()
    assert (np.bincount(users) >= 2).all()
    assert (truth["item_id"] // 10 == truth["category_id"]).all()
    assert (truth["clicked_at"] >= truth["timestamp"]).all()


def test_the_same_numbers_make_the_same_log(truth: Truth) -> None:
    """NumPy promises it; a change here is another data set, and wants another version."""
    digest = hashlib.blake2b(digest_size=8)
    for name in ("item_id", "timestamp", "position", *LABELS):
        digest.update(truth[name].astype("<i8").tobytes())
    assert digest.hexdigest() == "9ce1a77f4f4ed31e"
    other = Impressions(SyntheticConfig.sized(**SIZE | {"seed": 4})).of_users(0, 1000)
    assert (other["item_id"][:1000] != truth["item_id"][:1000]).any()


def test_the_log_has_no_probabilities(tmp_path: Path, truth: Truth) -> None:
    write_impressions(tmp_path / "log.parquet", SyntheticConfig.sized(**SIZE))
    table = pq.read_table(tmp_path / "log.parquet")
    assert not [name for name in table.column_names if name.startswith("p_")]
    assert set(LABELS) <= {*table.column_names}
    np.testing.assert_array_equal(table["item_id"], truth["item_id"])
    assert table["clicked_at"].null_count == table["dwell"].null_count == (truth["click"] == 0).sum()


def same_events(store: EventStore, truth: Truth) -> None:
    own_items = store.vocabulary("items").to_numpy()
    np.testing.assert_array_equal(own_items[store.item_ids - 1], truth["item_id"])
    np.testing.assert_array_equal(store.timestamps, truth["timestamp"])


@pytest.mark.parametrize(("settings", "label"), [({}, "click"), ({"label_column": "buy"}, "buy")])
def test_prepared_events_are_in_the_order_of_the_truth(
    tmp_path: Path, truth: Truth, settings: dict, label: str
) -> None:
    settings |= {"label_column_required": True} if settings else {}
    store = prepare(config_of(tmp_path, **settings).data)
    same_events(store, truth)
    np.testing.assert_array_equal(store.labels, truth[label])


def test_every_column_can_be_declared(tmp_path: Path, truth: Truth) -> None:
    declared = tmp_path / "features.toml"
    declared.write_text(
        '[position]\nof = "candidate"\nkind = "category"\n[price]\nof = "item"\nkind = "number"\nencode = "log"\n'
    )
    config = config_of(
        tmp_path, feature_declarations=to_text(read_declarations(declared)), label_columns=("click", "buy")
    )
    store = prepare(config.data)
    same_events(store, truth)
    ids = store.feature_vocabulary("position").to_pylist()
    rows = np.asarray(store.features["position"].values)
    np.testing.assert_array_equal(np.array([0, *ids])[rows], truth["position"])


def test_a_model_learns_towards_the_best_that_is_possible(tmp_path: Path, truth: Truth) -> None:
    """The chain ranks and rates purchases well among all items; a model of clicks alone does not.

    It is biased where it has seen no clicks: it does not know that items that are rarely clicked are rarely bought.
    """
    settings = {"learning_rate": 0.005, "epochs": 3, "native": True}
    chain = config_of(tmp_path, label_columns=("click", "buy"), task_head="esmm", **settings)
    job = assembly.Assembly(chain, Runtime(), prepare(chain.data))
    same_events(job.store, truth)
    job.trainer.train()
    events = job.splits["test"].events()
    found = 1 / (1 + np.exp(-job.evaluator.scores("test", job.model).astype(np.float64)))
    for place, name in enumerate(("click", "buy")):
        labels, best = truth[name][events], truth[f"p_{name}"][events]
        ours, most = auc(found[:, place], labels), auc(best, labels)
        assert 0.62 < ours < most + 0.01
        by_item = np.argsort(np.argsort(best)) * 5 // len(best)  # fifths by the true probability
        assert abs(found[:, place].mean() - best.mean()) < 0.03
        rates = [found[by_item == part, place].mean() for part in range(5)]
        assert (np.diff(rates) > 0).all()

    # The same log, whose weights leave only clicks to learn from.
    clicks = config_of(tmp_path / "clicks", label_column="buy", label_column_required=True, **settings)
    store = prepare(clicks.data)
    store = dataclasses.replace(store, weights=truth["click"].astype(np.float32))
    only = assembly.Assembly(clicks, Runtime(), store)
    only.trainer.train()
    conversion = 1 / (1 + np.exp(-only.evaluator.scores("test", only.model).astype(np.float64)))
    assert abs(conversion.mean() - truth["p_buy"][events].mean()) > 0.2
    assert auc(conversion, truth["buy"][events]) < auc(found[:, 1], truth["buy"][events]) - 0.02
