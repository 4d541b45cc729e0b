"""The signatures of models that find items among all.

Letters of shapes, in addition to those of `schema`: I items that may be found, K vectors of a user, H their width, M
items of a request, k items to return.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from din_dist import schema
from din_dist.features.spec import Owner
from din_dist.layers.packed import segment_ids
from din_dist.models.retrieval_model import PackedHistories, RetrievalModel
from din_dist.serving.asked import NEAREST
from din_dist.serving.export.features import MISSING
from din_dist.serving.export.signatures import (
    ASKED,
    CANDIDATES,
    COUNTS,
    LENGTHS,
    Function,
    Outputs,
    Signatures,
    checked_lengths,
    of_same_size,
)

PRODUCTS_AT_ONCE = 1 << 24  # of users' vectors and items in `nearest`: 64 MiB
MOST_ITEMS_AT_ONCE = 1 << 17
_FEWEST_ITEMS_AT_ONCE = 1 << 10
_ITEMS_LOOKED_UP = 65_536  # at once, when the export is made
_IDS = 1 << 32  # more than there are dense ids


class RetrievalSignatures(Signatures):
    """Functions of a model that finds items among all.

    Args:
        model: the trained model.
        item_ids: the log's ids of all items, in the order of the dense ids.
        num_candidates: I. Items with higher dense ids occur in histories only.
        arguments: the others, as of `Signatures`.
    """

    _model: RetrievalModel

    def __init__(self, model: RetrievalModel, item_ids: Any, *arguments: Any, num_candidates: int) -> None:
        super().__init__(model, item_ids, *arguments)
        # Variables, because constants would be part of the graph, which is limited to 2 GB.
        self._vectors = tf.Variable(vectors_of_items(model, num_candidates), trainable=False, name="item_vectors")
        own_ids = item_ids.combine_chunks()[:num_candidates].to_numpy(zero_copy_only=False)
        self._own_ids = tf.Variable(tf.constant(own_ids, self._items.ids.dtype), trainable=False, name="own_item_ids")

    def _more_functions(self) -> dict[str, Function]:
        users = self._users_inputs
        return {"embed_users": (self.embed_users, users), NEAREST: (self.nearest, users | ASKED)}

    def _more_resources(self) -> list:
        return [self._vectors, self._own_ids]

    def score(
        self,
        history_item_ids: tf.Tensor,
        history_lengths: tf.Tensor,
        candidate_item_ids: tf.Tensor,
        **features: tf.Tensor,
    ) -> Outputs:
        """Returns what `Signatures.score` does: the largest product of the candidate with the user's vectors."""
        history_lengths = of_same_size(history_lengths, candidate_item_ids, LENGTHS, CANDIDATES)
        return self._with_probability(
            self._rank(history_item_ids, history_lengths, candidate_item_ids, tf.ones_like(history_lengths), features)
        )

    def embed_items(self, item_ids: tf.Tensor) -> Outputs:
        """Returns what `Signatures.embed_items` does; products with the vectors of users rank the items."""
        found = super().embed_items(item_ids)
        return found | {"embeddings": self._model.normalized(found["embeddings"])}

    def embed_users(self, history_item_ids: tf.Tensor, history_lengths: tf.Tensor, **features: tf.Tensor) -> Outputs:
        """Returns the vectors `[B, K, H]` of users.

        Args:
            history_item_ids: `[N]`, the histories concatenated.
            history_lengths: int64 `[B]`.
            features: those of users and contexts, see `ExampleInputs`.
        """
        window, lengths = self._newest(history_item_ids, history_lengths, None)
        items = self._items.find(window(history_item_ids), ())
        return {"embeddings": self._users(items.vectors, items.index, lengths, features)}

    def nearest(
        self,
        history_item_ids: tf.Tensor,
        history_lengths: tf.Tensor,
        k: tf.Tensor,
        exclude_history: tf.Tensor,
        **features: tf.Tensor,
    ) -> Outputs:
        """Returns the best of all items for each of B users, exactly: `item_ids` and `logits` `[B, min(k, I)]`.

        Ties are in the order of the log's first appearance. `counts` `[B]` tells how many there are of each user; the
        rest of a row is filled up with "", or the smallest int64, and logits of minus infinity.

        Args:
            history_item_ids: `[N]`, the histories concatenated.
            history_lengths: int64 `[B]`.
            k: int64 scalar.
            exclude_history: bool scalar; leave out all items of the user's history.
            features: those of users and contexts, see `ExampleInputs`.
        """
        users = self.embed_users(history_item_ids, history_lengths, **features)["embeddings"]
        num_items = tf.constant(self._vectors.shape[0], tf.int64)
        with tf.control_dependencies([tf.Assert(k >= 0, ["k must be 0 or more. Received:", k])]):
            wanted = tf.minimum(k, num_items)
        most_seen = tf.reduce_max(tf.concat([history_lengths, [0]], axis=0))
        more = tf.where(exclude_history, most_seen, tf.zeros([], tf.int64))
        logits, items = self._best(users, tf.cast(tf.minimum(wanted + more, num_items), tf.int32))
        seen = _seen(self._items.ids.dense_ids(history_item_ids), history_lengths, items)
        logits = tf.where(exclude_history & seen, -np.inf, logits)
        logits, places = tf.math.top_k(logits, tf.cast(wanted, tf.int32))  # ties keep their order
        real = logits > -np.inf
        own_ids = tf.gather(self._own_ids, tf.gather(items, places, batch_dims=1) - 1)
        return {
            "item_ids": tf.where(real, own_ids, MISSING[own_ids.dtype]),
            "logits": logits,
            "counts": tf.reduce_sum(tf.cast(real, tf.int64), axis=1),
        }

    def _best(self, users: tf.Tensor, most: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the logits and the dense ids `[B, most]` of the best items, best first, from blocks of items.

        Args:
            users: float32 `[B, K, H]`.
            most: int32 scalar, at most I.
        """
        num_users, num_items = tf.shape(users)[0], self._vectors.shape[0]
        flat = tf.reshape(users, [-1, users.shape[2]])
        at_once = PRODUCTS_AT_ONCE // tf.maximum(tf.shape(flat)[0], 1)
        at_once = tf.clip_by_value(at_once, _FEWEST_ITEMS_AT_ONCE, MOST_ITEMS_AT_ONCE)

        def better(first: tf.Tensor, logits: tf.Tensor, items: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            end = tf.minimum(first + at_once, num_items)
            products = tf.matmul(flat, self._vectors[first:end], transpose_b=True)  # [B * K, block]
            products = tf.reshape(products, [num_users, users.shape[1], end - first])
            of_block = self._model.best(tf.transpose(products, [0, 2, 1]))
            ids = tf.tile(tf.range(first + 1, end + 1)[None], [num_users, 1])
            both = tf.concat([logits, of_block], axis=1)
            found, places = tf.math.top_k(both, most)
            return end, found, tf.gather(tf.concat([items, ids], axis=1), places, batch_dims=1)

        none = [tf.fill([num_users, most], -np.inf), tf.ones([num_users, most], tf.int32)]
        shapes = [tf.TensorShape([]), tf.TensorShape([None, None]), tf.TensorShape([None, None])]
        start: list[tf.Tensor] = [tf.constant(0), *none]
        _, logits, items = tf.while_loop(
            lambda first, *_: first < num_items, better, start, shape_invariants=shapes, parallel_iterations=1
        )
        return logits, items

    def _rank(
        self,
        history_item_ids: tf.Tensor,
        history_lengths: tf.Tensor,
        candidate_item_ids: tf.Tensor,
        candidate_counts: tf.Tensor,
        features: Mapping[str, tf.Tensor],
    ) -> tf.Tensor:
        given_of_history, given_of_candidate = self._given(features, history_item_ids, candidate_item_ids)
        counts = checked_lengths(candidate_counts, candidate_item_ids, COUNTS, CANDIDATES)
        window, lengths = self._newest(history_item_ids, history_lengths, None)
        behaviours = self._items.find(window(history_item_ids), [window(feature) for feature in given_of_history])
        candidates = self._items.find(candidate_item_ids, given_of_candidate)
        users = self._users(behaviours.vectors, behaviours.index, lengths, features)
        own = tf.gather(self._model.normalized(candidates.vectors), candidates.index)
        return self._model.best(tf.linalg.matvec(tf.gather(users, segment_ids(counts)), own))

    def _users(
        self, vectors: tf.Tensor, index: tf.Tensor, lengths: tf.Tensor, features: Mapping[str, tf.Tensor]
    ) -> tf.Tensor:
        """Returns the vectors of users, `[B, K, H]`.

        Args:
            vectors: float32 `[U, H]`, of distinct behaviours.
            index: int32 `[N]`, the behaviour at each position.
            lengths: int32 `[B]`.
            features: the inputs of features.
        """
        context = self._columns_of(features, tuple(Owner), tf.size(lengths), "history")
        return self._model.vectors_of(PackedHistories(vectors, index, segment_ids(lengths), lengths, context))


def vectors_of_items(model: RetrievalModel, num_items: int) -> np.ndarray:
    """Returns the vectors of the items with dense ids 1 to I, float32 `[I, H]`."""
    found = np.empty((num_items, model.lookup.width), np.float32)
    for first in range(0, num_items, _ITEMS_LOOKED_UP):
        end = min(first + _ITEMS_LOOKED_UP, num_items)
        found[first:end] = model.items(tf.range(first + 1, end + 1))
    return found


def _seen(history: tf.Tensor, lengths: tf.Tensor, items: tf.Tensor) -> tf.Tensor:
    """Tells which items are in the history of their user, bool `[B, M]`.

    Args:
        history: int32 `[N]`, dense ids, histories concatenated; unknown items are those of no user.
        lengths: int64 `[B]`.
        items: int32 `[B, M]`, dense ids.
    """
    users = tf.cast(segment_ids(tf.cast(lengths, tf.int32)), tf.int64)
    known = tf.not_equal(history, schema.UNKNOWN_ID)
    keys = tf.sort(tf.boolean_mask(users * _IDS + tf.cast(history, tf.int64), known))
    keys = tf.concat([keys, [tf.int64.max]], axis=0)
    wanted = (tf.range(tf.size(lengths, tf.int64)) * _IDS)[:, None] + tf.cast(items, tf.int64)
    places = tf.searchsorted(keys, tf.reshape(wanted, [-1]))
    return tf.equal(tf.gather(keys, tf.reshape(places, tf.shape(items))), wanted)
