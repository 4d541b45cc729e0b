"""The local activation unit: how much each past behaviour matters for this candidate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from din_dist.config import Activation, AttentionNormalization
from din_dist.layers.hidden import HiddenLayers
from din_dist.layers.packed import segment_softmax, segment_sum
from din_dist.layers.standardize import SumOverRanks


class LocalActivationUnit(keras.layers.Layer):
    """Pools packed behaviours by their relevance to a candidate.

    The score of a (candidate q, behaviour k) pair is MLP([q, k, q - k, q * k]). With `softmax` the scores are divided
    by sqrt(H) and normalised over the candidate's history; with `none` they are the weights themselves.
    Source: the authors' din/model.py, `attention` (softmax); the paper's equation 3 of section 4.3 (none).

    The first layer is applied in factored form. Its kernel W = [Wq; Wk; Wd; Wp] is one `[4H, units]` weight, as if the
    four inputs were concatenated, but W·[q, k, q-k, q*k] = (Wq+Wd)·q + (Wk-Wd)·k + Wp·(q*k): the first term is computed
    once a candidate, the second once a distinct behaviour, and only the third once a pair.
    """

    def __init__(
        self,
        hidden_units: Sequence[int] = (80, 40),
        activation: Activation = Activation.SIGMOID,
        normalization: AttentionNormalization = AttentionNormalization.SOFTMAX,
        *,
        frozen: bool = False,
        sum_over_ranks: SumOverRanks = tf.identity,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.normalization = normalization
        self.scorer = HiddenLayers(
            hidden_units, activation, frozen=frozen, sum_over_ranks=sum_over_ranks, name="scorer"
        )

    def build(self, candidate_shape: tuple) -> None:
        self.scorer.build((None, 4 * candidate_shape[-1]))

    def call(
        self,
        candidate: tf.Tensor,
        keys: tf.Tensor,
        candidate_of: tf.Tensor,
        key_of: tf.Tensor,
        training: bool = False,
    ) -> tf.Tensor:
        """The interest `[C, H]` that each candidate finds in its history; zeros where the history is empty.

        Args:
            candidate: `[C, H]`.
            keys: `[K, H]`, distinct behaviours: those that several pairs share are projected once.
            candidate_of, key_of: int32 `[P]`, the candidate and the key of each pair; `candidate_of` ascends.
        """
        num_candidates = tf.shape(candidate)[0]
        pair_keys = tf.gather(keys, key_of)  # [P, H]
        scores = self.scores(candidate, keys, pair_keys, candidate_of, key_of, training)
        if self.normalization is AttentionNormalization.SOFTMAX:
            weights = segment_softmax(scores / math.sqrt(candidate.shape[-1]), candidate_of, num_candidates)
        else:
            weights = scores
        return segment_sum(weights[:, None] * pair_keys, candidate_of, num_candidates)

    def scores(
        self,
        candidate: tf.Tensor,
        keys: tf.Tensor,
        pair_keys: tf.Tensor,
        candidate_of: tf.Tensor,
        key_of: tf.Tensor,
        training: bool,
    ) -> tf.Tensor:
        """The unnormalised attention scores `[P]`."""
        first = self.scorer.dense_layers[0]
        of_candidate, of_key, of_difference, of_product = tf.split(first.kernel.value, 4, axis=0)
        by_candidate = tf.matmul(candidate, of_candidate + of_difference) + first.bias.value  # [C, units]
        by_key = tf.matmul(keys, of_key - of_difference)  # [K, units]
        by_pair = tf.matmul(tf.gather(candidate, candidate_of) * pair_keys, of_product)  # [P, units]
        projected = by_pair + tf.gather(by_candidate, candidate_of) + tf.gather(by_key, key_of)
        return self.scorer.after_first(projected, training=training)
