"""The part that models share which find items among all: users and items have vectors, and their product ranks.

Letters of shapes: B histories, N positions in all of them, U distinct items, K vectors of a user, H their width, S the
items that a softmax compares the targets with.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from din_dist.config import EvaluateWith, ModelConfig, Readout
from din_dist.execution import INFERENCE, Mode
from din_dist.layers.feature_columns import FeatureColumns
from din_dist.layers.local_lookup import LocalLookup
from din_dist.layers.packed import segment_ids
from din_dist.models.behaviour_model import BehaviourModel, Sides, distinct_items, items_of
from din_dist.schema import Batch, SessionGraph


class PackedHistories(NamedTuple):
    """The histories of B users, one after the other."""

    vectors: tf.Tensor  # float32 [U, H], of the distinct items
    item_of: tf.Tensor  # int32 [N], the row in `vectors` of each position, each history oldest first
    history_of: tf.Tensor  # int32 [N], ascending
    lengths: tf.Tensor  # int32 [B]
    context: tf.Tensor | None = None  # float32 [B, C], the columns of user and context features; None without any
    ages: tf.Tensor | None = None  # float32 [B], as of `Batch.example_ages`; None: users are asked now
    graph: SessionGraph | None = None  # None: it is yet to be found, or not wanted

    @property
    def num_histories(self) -> tf.Tensor:
        """B, int32."""
        return tf.size(self.lengths)

    def rows(self) -> tf.Tensor:
        """Returns the vector at each position, float32 `[N, H]`."""
        return tf.gather(self.vectors, self.item_of)

    def last(self, rows: tf.Tensor, row_of: tf.Tensor) -> tf.Tensor:
        """Returns the row at the newest position of each history, `[B, H]`; zeros if it is empty.

        Args:
            rows: float32 `[R, H]`.
            row_of: int32 `[N]`, the row of each position.
        """
        beyond = tf.shape(rows)[0]
        ends = tf.cumsum(self.lengths)
        of_newest = tf.gather(tf.concat([[beyond], row_of], axis=0), ends)  # one place on, which saves a subtraction
        with_zeros = tf.concat([rows, tf.zeros([1, rows.shape[1]])], axis=0)
        return tf.gather(with_zeros, tf.where(self.lengths > 0, of_newest, beyond))


class RetrievalModel(BehaviourModel):
    """Gives each user K vectors, and each item one. An item's logit is the largest product with the user's vectors.

    Args:
        lookup: turns item ids into vectors. Items have no biases, so that an index of vectors finds the best ones.
        config: sizes, readout and temperature.
        training_mode: the mode of training passes.
        example_columns: the columns of user and context features.
    """

    def __init__(
        self,
        lookup: LocalLookup,
        config: ModelConfig,
        training_mode: Mode | None = None,
        example_columns: FeatureColumns | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(lookup, training_mode, example_columns, **kwargs)
        self._normalizes, self.temperature = config.normalize_vectors, config.temperature
        self._readout, self._evaluate_with = config.readout, config.evaluate_with
        self.reads_graphs = config.model.reads_graphs

    @abc.abstractmethod
    def interests(self, histories: PackedHistories, mode: Mode) -> tf.Tensor:
        """Returns the vectors of each user, float32 `[B, K, H]`, before they are normalized.

        Args:
            histories: of the users.
            mode: of the pass.
        """

    def pools_compiled(self, mode: Mode) -> bool:
        return False

    def items(self, item_ids: tf.Tensor) -> tf.Tensor:
        """Returns the vectors of items, float32 `[U, H]`.

        Args:
            item_ids: int32 `[U]`, distinct.
        """
        return self.normalized(self.lookup(item_ids)[0])

    def users(self, batch: Batch) -> tf.Tensor:
        """Returns the vectors of the users of a packed batch in inference, float32 `[B, K, H]`.

        Args:
            batch: its candidates are left aside.
        """
        item_ids, index = items_of(batch)
        vectors, _ = self.lookup(item_ids)
        return self._users_of(vectors, index[tf.size(batch.candidate_item_ids) :], batch)

    def users_of(
        self,
        history_item_ids: tf.Tensor,
        history_lengths: tf.Tensor,
        features: Mapping[str, Any] | None = None,
    ) -> tf.Tensor:
        """Returns the vectors of users by their histories in inference, float32 `[B, K, H]`.

        Args:
            history_item_ids: int32 `[N]`, the histories concatenated.
            history_lengths: int32 `[B]`.
            features: name -> B values by form, as in `Batch.features`. None: the model has no such features.
        """
        nothing = tf.zeros([0], tf.int32)
        return self.users(Batch(nothing, history_item_ids, history_lengths, features=features or ()))

    def _users_of(self, vectors: tf.Tensor, index: tf.Tensor, batch: Batch) -> tf.Tensor:
        """Returns what `users` does, given the vectors `[U, H]` and where those of the positions stand, `[N, ...]`."""
        return self.vectors_of(self._histories(vectors, index, batch, INFERENCE))

    def vectors_of(self, histories: PackedHistories) -> tf.Tensor:
        """Returns the vectors of users in inference, float32 `[B, K, H]`."""
        interests = self.normalized(self.interests(histories, INFERENCE))
        if self._evaluate_with is EvaluateWith.INTERESTS:
            return interests
        newest = histories.last(histories.vectors, histories.item_of)
        return self.normalized(self.read_out(interests, self.normalized(newest)))[:, None]

    def _histories(self, vectors: tf.Tensor, index: tf.Tensor, batch: Batch, mode: Mode) -> PackedHistories:
        lengths = batch.history_lengths
        num_positions = tf.size(batch.history_item_ids)
        context = self.context(batch.features, mode)
        ages = batch.example_ages if mode.training and "example_ages" in batch.extras else None
        history_of = segment_ids(lengths, mode)
        return PackedHistories(vectors, index[:num_positions], history_of, lengths, context, ages, batch.graph or None)

    def read_out(self, interests: tf.Tensor, query: tf.Tensor) -> tf.Tensor:
        """Returns one vector of each user, float32 `[B, H]`.

        Args:
            interests: float32 `[B, K, H]`.
            query: float32 `[B, H]`, the target's vector, or the newest item's.
        """
        products = tf.linalg.matvec(interests, query)  # [B, K]
        if self._readout is Readout.HARD:
            return tf.gather(interests, tf.argmax(products, axis=1), batch_dims=1)
        return tf.linalg.matvec(interests, tf.nn.softmax(products, axis=1), transpose_a=True)

    def call(self, batch: Batch, training: bool = False) -> tf.Tensor:
        item_ids, index = items_of(batch)
        num_candidates = tf.size(batch.candidate_item_ids)
        vectors, _ = self.lookup(item_ids)
        users = self._users_of(vectors, index[num_candidates:], batch)
        candidates = self.normalized(tf.gather(vectors, index[:num_candidates]))
        return self.best(tf.linalg.matvec(users, candidates))

    def best(self, products: tf.Tensor) -> tf.Tensor:
        """Returns the logits, given the products with each of a user's vectors, float32 `[..., K]`."""
        return tf.reduce_max(products, axis=-1) / self.temperature

    def losses(self, batch: Batch) -> tf.Tensor:
        """Returns the cross-entropy of each target among itself and the batch's sampled items, float32 `[B]`.

        A sampled item that is the target does not count.
        """
        mode = self.training_mode
        item_ids, index = items_of(batch)
        num_targets, num_sampled = tf.size(batch.candidate_item_ids), tf.size(batch.sampled_item_ids)
        vectors, _ = self.lookup(item_ids)
        histories = self._histories(vectors, index[num_targets:], batch, mode)
        targets = self.normalized(tf.gather(vectors, index[:num_targets]))
        sampled = self.normalized(tf.gather(vectors, index[tf.size(index) - num_sampled :]))
        users = self.read_out(self.normalized(self.interests(histories, mode)), targets)
        of_targets = tf.reduce_sum(users * targets, axis=1) / self.temperature + batch.logit_offsets
        logits = tf.matmul(users, sampled, transpose_b=True) / self.temperature + batch.sampled_offsets
        hits = tf.abs(batch.candidate_item_ids)[:, None] == batch.sampled_item_ids
        logits = tf.where(hits, logits.dtype.min, logits)
        return tf.reduce_logsumexp(tf.concat([of_targets[:, None], logits], axis=1), axis=1) - of_targets

    def score_candidates(
        self,
        history_item_ids: tf.Tensor,
        history_lengths: tf.Tensor,
        candidate_item_ids: tf.Tensor,
        candidate_counts: tf.Tensor,
        features: Mapping[str, Any] | None = None,
        sides: Sides | None = None,
    ) -> tf.Tensor:
        """Returns what `BehaviourModel.score_candidates` does; `sides` must be None."""
        item_ids, index = distinct_items(candidate_item_ids, history_item_ids)
        vectors, _ = self.lookup(item_ids)
        num_candidates = tf.size(candidate_item_ids)
        batch = Batch(candidate_item_ids, history_item_ids, history_lengths, features=features or ())
        users = self._users_of(vectors, index[num_candidates:], batch)
        candidates = self.normalized(tf.gather(vectors, index[:num_candidates]))
        return self.best(tf.linalg.matvec(tf.gather(users, segment_ids(candidate_counts)), candidates))

    def normalized(self, vectors: tf.Tensor) -> tf.Tensor:
        """Returns vectors `[..., H]` divided by their length if the model compares directions, otherwise unchanged."""
        return tf.math.l2_normalize(vectors, axis=-1) if self._normalizes else vectors
