"""The local activation unit as others compute it, with the same weights: for `cli/benchmark.py` to compare."""

from __future__ import annotations

import math

import tensorflow as tf

from din_dist.config import AttentionNormalization
from din_dist.layers.local_activation_unit import LocalActivationUnit


class UnfactoredActivationUnit(LocalActivationUnit):
    """Packed, but the four inputs of each pair are written side by side, `[P, 4H]`, and multiplied as one."""

    def scores(
        self,
        candidate: tf.Tensor,
        keys: tf.Tensor,
        candidate_of: tf.Tensor,
        key_of: tf.Tensor,
        training: bool,
        num_pairs: tf.Tensor | None,
    ) -> tf.Tensor:
        pairs = side_by_side(tf.gather(candidate, candidate_of), tf.gather(keys, key_of))
        return self.scorer(pairs, training=training)


class PaddedActivationUnit(LocalActivationUnit):
    """A rectangle `[C, T]`, T the longest history of the batch, with a mask: the form of the published codes.

    With Dice its batch statistics count the padding, as theirs do; every other setting gives our function.
    """

    def call(
        self,
        candidate: tf.Tensor,
        keys: tf.Tensor,
        candidate_of: tf.Tensor,
        key_of: tf.Tensor,
        training: bool = False,
        num_pairs: tf.Tensor | None = None,
    ) -> tf.Tensor:
        num_candidates, width = tf.shape(candidate)[0], candidate.shape[-1]
        histories = tf.RaggedTensor.from_value_rowids(tf.gather(keys, key_of), candidate_of, num_candidates)
        padded = histories.to_tensor(shape=[None, None, width])  # [C, T, H]
        longest = tf.shape(padded)[1]
        mask = tf.sequence_mask(histories.row_lengths(), longest)
        repeated = tf.repeat(candidate, longest, axis=0)
        scores = self.scorer(side_by_side(repeated, tf.reshape(padded, [-1, width])), training=training)
        scores = tf.reshape(scores, [num_candidates, longest])
        if self.normalization is AttentionNormalization.SOFTMAX:
            scores = tf.where(mask, scores / math.sqrt(width), -(2.0**31))
            weights = tf.where(mask, tf.nn.softmax(scores), 0.0)
        else:
            weights = tf.where(mask, scores, 0.0)
        return tf.squeeze(tf.matmul(weights[:, None, :], padded), axis=1)


def side_by_side(candidate: tf.Tensor, keys: tf.Tensor) -> tf.Tensor:
    """[q, k, q - k, q * k]: twice `[P, H]` to `[P, 4H]`."""
    return tf.concat([candidate, keys, candidate - keys, candidate * keys], axis=1)
