"""The local activation unit: how much each past behaviour matters for this candidate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from din_dist.config import Activation, AttentionNormalization
from din_dist.layers.hidden import HiddenLayers
from din_dist.layers.packed import pool, rows_of, segment_softmax
from din_dist.layers.standardize import SumOverRanks
from din_dist.layers.xla import fused


class LocalActivationUnit(keras.layers.Layer):
    """Pools packed behaviours by their relevance to a candidate.

    The score of a (candidate q, behaviour k) pair is MLP([q, k, q - k, q * k]). With `softmax` the scores are divided
    by sqrt(H) and normalised over the candidate's history; with `none` they are the weights themselves.
    Source: the authors' din/model.py, `attention` (softmax); the paper's equation 3 of section 4.3 (none).

    The first layer is applied in factored form. Its kernel W = [Wq; Wk; Wd; Wp] is one `[4H, units]` weight, as if the
    four inputs were concatenated, but W·[q, k, q-k, q*k] = (Wq+Wd)·q + (Wk-Wd)·k + Wp·(q*k): the first term is computed
    once a candidate, the second once a distinct behaviour, and only the third once a pair.
    """

    needs_few_lengths = True  # compiled, for XLA compiles anew for each number of pairs

    def __init__(
        self,
        hidden_units: Sequence[int] = (80, 40),
        activation: Activation = Activation.SIGMOID,
        normalization: AttentionNormalization = AttentionNormalization.SOFTMAX,
        *,
        frozen: bool = False,
        sum_over_ranks: SumOverRanks = tf.identity,
        compiled: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.normalization, self.compiled = normalization, compiled
        self.scorer = HiddenLayers(
            hidden_units, activation, frozen=frozen, sum_over_ranks=sum_over_ranks, compiled=compiled, name="scorer"
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
        num_pairs: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """The interest `[C, H]` that each candidate finds in its history; zeros where the history is empty.

        Args:
            candidate: `[C, H]`.
            keys: `[K, H]`, distinct behaviours: those that several pairs share are projected once.
            candidate_of, key_of: int32 `[P]`, the candidate and the key of each pair; `candidate_of` ascends.
            num_pairs: how many of the P pairs are real; the rest is padding, of candidate -1. None: all.
        """
        compiled = self.compiled and training
        scores = self.scores(candidate, keys, candidate_of, key_of, training, num_pairs)
        if self.normalization is AttentionNormalization.SOFTMAX:
            scores = scores / math.sqrt(candidate.shape[-1])
            return _softmax_pool(scores, keys, candidate_of, key_of, candidate, compiled=compiled)
        return pool(scores, keys, candidate_of, key_of, candidate, compiled=compiled)

    def weights_of_pairs(
        self, candidate: tf.Tensor, keys: tf.Tensor, candidate_of: tf.Tensor, key_of: tf.Tensor
    ) -> tf.Tensor:
        """The attention weights `[P]` with which `call` pools outside training, for people to look at.

        With `softmax` those of a candidate sum to 1; with `none` they may be of any size, and negative.
        """
        scores = self.scores(candidate, keys, candidate_of, key_of, training=False, num_pairs=None)
        if self.normalization is AttentionNormalization.SOFTMAX:
            return segment_softmax(scores / math.sqrt(candidate.shape[-1]), candidate_of, tf.shape(candidate)[0])
        return scores

    def scores(
        self,
        candidate: tf.Tensor,
        keys: tf.Tensor,
        candidate_of: tf.Tensor,
        key_of: tf.Tensor,
        training: bool,
        num_pairs: tf.Tensor | None,
    ) -> tf.Tensor:
        """The unnormalised attention scores `[P]`."""
        compiled = self.compiled and training
        of_candidate, of_key, of_product, bias = self.first_terms()
        by_candidate, by_key = tf.matmul(candidate, of_candidate) + bias, tf.matmul(keys, of_key)
        products = _products(candidate, keys, candidate_of, key_of, compiled=compiled)  # [P, H]
        by_pair = tf.matmul(products, of_product)  # [P, units]
        projected = _plus_rows(by_pair, by_candidate, by_key, candidate_of, key_of, compiled=compiled)
        return self.scorer.after_first(projected, training=training, num_rows=num_pairs)

    def first_terms(self) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Of the first layer: the kernels of q, of k and of q * k, `[H, units]` each, and the bias `[units]`."""
        first = self.scorer.dense_layers[0]
        of_candidate, of_key, of_difference, of_product = tf.split(first.kernel.value, 4, axis=0)
        return of_candidate + of_difference, of_key - of_difference, of_product, first.bias.value


@fused
def _products(candidate: tf.Tensor, keys: tf.Tensor, candidate_of: tf.Tensor, key_of: tf.Tensor) -> tf.Tensor:
    return rows_of(candidate, candidate_of) * tf.gather(keys, key_of)


@fused
def _plus_rows(
    by_pair: tf.Tensor, by_candidate: tf.Tensor, by_key: tf.Tensor, candidate_of: tf.Tensor, key_of: tf.Tensor
) -> tf.Tensor:
    return by_pair + rows_of(by_candidate, candidate_of) + tf.gather(by_key, key_of)


@fused
def _softmax_pool(
    scores: tf.Tensor, keys: tf.Tensor, candidate_of: tf.Tensor, key_of: tf.Tensor, candidate: tf.Tensor
) -> tf.Tensor:
    weights = segment_softmax(scores, candidate_of, tf.shape(candidate)[0])
    return pool(weights, keys, candidate_of, key_of, candidate)
