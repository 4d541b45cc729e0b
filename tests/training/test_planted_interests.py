"""Interests of a user find the tastes that were planted, by a hard readout; by a soft one where vectors are long."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from din_dist.assembly import Assembly
from din_dist.config import ModelKind, OptimizerKind, PositionVectors, Readout, Softmax
from din_dist.data.event_store import EventStore
from din_dist.data.prepared import prepare
from din_dist.distributed.runtime import Runtime
from din_dist.layers.packed import segment_ids
from din_dist.models.comirec import ComiRecSA
from din_dist.models.retrieval_model import PackedHistories
from tests.support.small_log import small_config

TASTES, ITEMS_OF_TASTE, NUM_EVENTS = 8, 8, 12
SHORT = 0.015  # a penalty on the rows of items that keeps vectors, and so their products, small


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of users with two tastes out of eight. Each event, the last too, is of either at random."""
    folder, random = tmp_path_factory.mktemp("tastes"), np.random.default_rng(0)
    rows = []
    for user in range(400):
        two = random.choice(TASTES, 2, replace=False)
        for time in range(NUM_EVENTS):
            item = int(random.choice(two)) * ITEMS_OF_TASTE + int(random.integers(ITEMS_OF_TASTE))
            rows.append({"user_id": f"u{user}", "item_id": f"i{item}", "timestamp": time})
    pq.write_table(pa.Table.from_pylist(rows), folder / "log.parquet")
    return folder


def trained(folder: Path, readout: Readout, embedding_l2: float, seed: int) -> tuple[float, float]:
    """Trains two interests; returns their `purity`, and the test GAUC."""
    config = small_config(
        folder,
        output_dir=str(folder / f"{readout}-{embedding_l2}-{seed}"),
        item_features=(),
        embedding_dim=(8,),
        max_history_length=NUM_EVENTS,
        model=ModelKind.COMIREC_SA,
        num_interests=2,
        positions=PositionVectors.NONE,
        readout=readout,
        softmax=Softmax.FULL,
        embedding_l2=embedding_l2,
        optimizer=OptimizerKind.LAZY_ADAM,
        learning_rate=0.01,
        global_batch_size=128,
        epochs=10,
        seed=seed,
    )
    store = prepare(config.data)
    job = Assembly(config, Runtime(), store)
    job.trainer.train()
    gauc = job.trainer.test()["gauc"]
    job.telemetry.close()
    assert isinstance(job.model, ComiRecSA)
    return purity(job.model, store), gauc


def purity(model: ComiRecSA, store: EventStore) -> float:
    """Returns the share of its attention that an interest gives to the taste it takes, the mean over users.

    The two interests of a user take one taste each. It is 1 if each sees its own taste alone, and 1/2 if both see the
    same, however clear that is.
    """
    names = store.own_ids("items", np.arange(store.facts.num_items) + 1)
    taste_of = np.array([-1, *(int(name[1:]) // ITEMS_OF_TASTE for name in names)])
    histories = np.reshape(taste_of[store.item_ids], [-1, NUM_EVENTS])
    first = histories == histories.min(axis=1, keepdims=True)
    lengths = tf.fill([len(histories)], NUM_EVENTS)
    vectors, _ = model.lookup(tf.range(store.facts.num_items + 1))
    packed = PackedHistories(vectors, tf.constant(store.item_ids), segment_ids(lengths), lengths)
    weights = model.weights_of_positions(packed).numpy().reshape([*first.shape, 2])
    of_first = (weights * first[:, :, None]).sum(axis=1)[(~first).any(axis=1)]  # of users who show both tastes
    return float((1 + np.abs(of_first[:, 0] - of_first[:, 1])).mean() / 2)


@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_hard_readout_gives_each_interest_a_taste(folder: Path, seed: int) -> None:
    """A soft one weighs interests by products with the target, so what it can tell apart depends on their size."""
    hard, hard_gauc = trained(folder, Readout.HARD, SHORT, seed)
    soft, soft_gauc = trained(folder, Readout.SOFT, SHORT, seed)
    assert hard > 0.9
    assert soft < 0.75
    assert hard_gauc > soft_gauc + 0.05
    # Long vectors make the softmax of the soft readout as sharp as a choice.
    assert trained(folder, Readout.SOFT, 0.0, seed)[0] > 0.9
