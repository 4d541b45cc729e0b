"""What DIN and its baselines share: everything but how the history becomes an interest."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from din_dist import schema
from din_dist.config import BatchNorm, ModelConfig
from din_dist.layers.hidden import HiddenLayers
from din_dist.layers.local_lookup import LocalLookup
from din_dist.layers.packed import segment_ids
from din_dist.layers.standardize import BatchNormalization, SumOverRanks


class RankingModel(keras.Model):
    """Scores candidates against packed behaviour histories; returns logits.

    Each layer is created once, here, and serves the candidate, the negatives and any number of candidates at once
    (where the authors' code called `tf.layers` again under `reuse=True`).

    Args:
        lookup: turns item ids into vectors; the model does not know where the tables live.
        config: sizes, activations and normalisation.
        sum_over_ranks: for batch statistics of the global batch; the identity when alone.
    """

    def __init__(
        self, lookup: LocalLookup, config: ModelConfig, sum_over_ranks: SumOverRanks = tf.identity, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.lookup = lookup
        frozen = config.batch_norm is BatchNorm.FROZEN
        self.interest_norm = BatchNormalization(frozen, sum_over_ranks, name="interest_norm")
        self.interest_projection = keras.layers.Dense(lookup.width, name="interest_projection")
        self.head_norm = BatchNormalization(frozen, sum_over_ranks, name="head_norm")
        self.head = HiddenLayers(
            config.hidden_units,
            config.activation,
            frozen=frozen,
            sum_over_ranks=sum_over_ranks,
            dropout=config.dropout,
            name="head",
        )

    def build_variables(self) -> None:
        """Makes every variable, by scoring one candidate without a history."""
        nothing = tf.zeros([0], tf.int32)
        one = tf.zeros([1], tf.int32)
        self({schema.CANDIDATE_ITEM_IDS: one, schema.HISTORY_ITEM_IDS: nothing, schema.HISTORY_LENGTHS: one})

    @abc.abstractmethod
    def interest(
        self, candidate: tf.Tensor, keys: tf.Tensor, candidate_of: tf.Tensor, key_of: tf.Tensor, training: bool
    ) -> tf.Tensor:
        """Pools each candidate's history to `[C, H]`, zeros where it is empty. See `LocalActivationUnit.call`."""

    @abc.abstractmethod
    def head_inputs(self, interest: tf.Tensor, candidate: tf.Tensor) -> tf.Tensor:
        """`[C, H]` and `[C, H]` to what the head sees of them."""

    def call(self, batch: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Logits `[B]` of a packed batch (see `schema`)."""
        candidate_of = segment_ids(batch[schema.HISTORY_LENGTHS])
        return self._logits(
            batch[schema.CANDIDATE_ITEM_IDS],
            batch[schema.HISTORY_ITEM_IDS],
            candidate_of,
            position_of=None,
            keys_of_dropout=batch.get(schema.EXAMPLE_KEYS),
            training=training,
        )

    def score_candidates(
        self,
        history_item_ids: tf.Tensor,
        history_lengths: tf.Tensor,
        candidate_item_ids: tf.Tensor,
        candidate_counts: tf.Tensor,
    ) -> tf.Tensor:
        """Logits `[C]` of many candidates for each history, whose items are looked up and projected once.

        Args:
            history_item_ids: int32 `[N]`, B histories end to end; `history_lengths` int32 `[B]`.
            candidate_item_ids: int32 `[C]`, the candidates of B histories end to end; `candidate_counts` int32 `[B]`.
        """
        history_of = segment_ids(candidate_counts)  # [C]
        starts = tf.gather(tf.cumsum(history_lengths, exclusive=True), history_of)
        lengths = tf.gather(history_lengths, history_of)  # [C]
        position_of = tf.ragged.range(starts, starts + lengths).values  # [P]
        return self._logits(
            candidate_item_ids,
            history_item_ids,
            segment_ids(lengths),
            position_of,
            keys_of_dropout=None,
            training=False,
        )

    def _logits(
        self,
        candidate_item_ids: tf.Tensor,
        history_item_ids: tf.Tensor,
        candidate_of: tf.Tensor,
        position_of: tf.Tensor | None,
        keys_of_dropout: tf.Tensor | None,
        training: bool,
    ) -> tf.Tensor:
        """`candidate_of` and `position_of` `[P]` pair candidates with history positions; None: each position once."""
        num_candidates = tf.size(candidate_item_ids)
        vectors, places = self.lookup(tf.concat([candidate_item_ids, history_item_ids], axis=0))
        candidate = tf.gather(vectors, places[:num_candidates])  # [C, H]
        key_of = places[num_candidates:]
        if position_of is not None:
            key_of = tf.gather(key_of, position_of)
        interest = self.interest(candidate, vectors, candidate_of, key_of, training)
        interest = self.interest_projection(self.interest_norm(interest, training=training))
        features = self.head_norm(self.head_inputs(interest, candidate), training=training)
        return self.head(features, keys_of_dropout, training=training) + self.lookup.bias(candidate_item_ids)
