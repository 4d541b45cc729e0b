"""Draws the items that sampled softmax compares an update's targets with.

An update draws them once, from a hash of the seed and the number of the update, so all ranks have the same ones, and
the result does not depend on the number of workers. They are drawn with replacement from whole weights: how often an
item is expected among them is exact.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from din_dist.config import ModelConfig, Sampler, Softmax
from din_dist.data.event_store import EventStore
from din_dist.data.hashing import hash64
from din_dist.data.splits import Examples, item_counts
from din_dist.data.trained_items import TrainedItems
from din_dist.errors import InputError
from din_dist.schema import UNKNOWN_ID

_STREAM = 6  # of random numbers; `data/pipeline.py` and `evaluation/retrieval.py` have others
_WEIGHT_BITS = 44  # of the total of log-uniform weights: enough for 100 million items, and a hash modulo it is even


class SampledItems:
    """The items that each update's targets are compared with.

    Args:
        weights: int64 `[num_items + 1]`, how often each is drawn in proportion; 0: never.
        num_sampled: S, the items that an update draws. None: all that have a weight, each once.
        seed: of the draws.
    """

    def __init__(self, weights: np.ndarray, num_sampled: int | None, seed: int) -> None:
        self.num_sampled, self._seed = num_sampled, seed
        drawn = np.flatnonzero(weights)
        self._total = int(weights.sum())
        self._items, self._ends = tf.constant(drawn, tf.int32), tf.constant(np.cumsum(weights[drawn]), tf.int64)
        self._offsets = tf.constant(self._offsets_of(weights))

    def _offsets_of(self, weights: np.ndarray) -> np.ndarray:
        offsets = np.zeros(len(weights), np.float32)
        if self.num_sampled is not None:
            drawn = weights > 0
            offsets[drawn] = -np.log(self.num_sampled * (weights[drawn] / self._total))
        return offsets

    def of_update(self, step: tf.Tensor) -> tf.Tensor:
        """Returns the items of an update, int32 `[S]`; some may stand there more than once.

        Args:
            step: int64, the number of the update.
        """
        if self.num_sampled is None:
            return self._items
        numbers = hash64(self._seed, _STREAM, step, tf.range(self.num_sampled, dtype=tf.int64))
        places = tf.cast(tf.math.floormod(numbers, tf.constant(self._total, tf.uint64)), tf.int64)
        return tf.gather(self._items, tf.searchsorted(self._ends, places, side="right"))

    def offsets(self, items: tf.Tensor) -> tf.Tensor:
        """Returns the correction of each item's logit, float32 `[M]`: -log of its expected number among those drawn.

        Source: Bengio and Senecal 2008, "Adaptive importance sampling to accelerate training of a neural probabilistic
        language model". It is 0 if the softmax is over all items.

        Args:
            items: int32 `[M]`; -id for an item whose own id is hidden.
        """
        return tf.gather(self._offsets, tf.abs(items))


def sampled_items(
    store: EventStore,
    config: ModelConfig,
    splits: Mapping[str, Examples],
    trained: TrainedItems | None,
    seed: int,
) -> SampledItems | None:
    """Returns what draws the items of sampled softmax; None for models that do not find items.

    Args:
        store: the events.
        config: of the model.
        splits: of the events. Ranks and frequencies are those of training.
        trained: the items that training sees; only they are drawn. None: all candidates are.
        seed: of the draws.

    Raises:
        InputError: fewer than two items can be drawn.
    """
    if not config.model.retrieves:
        return None
    counts = item_counts(store, splits)
    may_be_drawn = np.arange(len(counts)) <= store.facts.num_candidates
    if trained is not None:
        may_be_drawn &= trained.occur
    may_be_drawn[UNKNOWN_ID] = False
    if may_be_drawn.sum() < 2:
        raise InputError(
            f"--model={config.model}: must have two items or more to choose among. Received: {may_be_drawn.sum()}. "
            "Use more data."
        )
    sampler = Sampler.UNIFORM if config.softmax is Softmax.FULL else config.sampler
    weights = np.zeros(len(counts), np.int64)
    items = np.flatnonzero(may_be_drawn)
    weights[items] = weights_of(counts[items], sampler)
    return SampledItems(weights, None if config.softmax is Softmax.FULL else config.num_sampled, seed)


def weights_of(counts: np.ndarray, sampler: Sampler) -> np.ndarray:
    """Returns the weight of each of M items, int64 `[M]`: at least 1.

    Args:
        counts: int64 `[M]`, how often training has each item.
        sampler: `LOG_UNIFORM` gives the item of frequency rank r (from 0) log((r + 2) / (r + 1)).
    """
    if sampler is Sampler.UNIFORM:
        return np.ones(len(counts), np.int64)
    if sampler is Sampler.POPULARITY:
        return np.maximum(counts, 1)
    ranks = np.arange(len(counts))
    shares = np.log((ranks + 2) / (ranks + 1)) / np.log(len(counts) + 1)
    weights = np.empty(len(counts), np.int64)
    weights[np.argsort(-counts, kind="stable")] = np.maximum(1, np.round(shares * 2**_WEIGHT_BITS)).astype(np.int64)
    return weights
