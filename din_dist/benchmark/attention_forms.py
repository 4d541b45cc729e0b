"""The local activation unit as others compute it, with the same weights, for `cli/benchmark.py` to compare."""

from __future__ import annotations

import math

import tensorflow as tf

from din_dist.config import AttentionNormalization
from din_dist.execution import INFERENCE, Mode
from din_dist.layers.local_activation_unit import LocalActivationUnit
from din_dist.layers.packed import behaviours_of
from din_dist.layers.pairs import Pairs


class UnfactoredActivationUnit(LocalActivationUnit):
    """The packed form whose four inputs of each pair are concatenated to `[P, 4H]` and multiplied as one."""

    def runs_by_kernels(self, mode: Mode) -> bool:
        return False

    def scores(
        self, candidate: tf.Tensor, behaviours: tf.Tensor, pairs: Pairs, mode: Mode, sides: tf.Tensor | None = None
    ) -> tf.Tensor:
        inputs = concatenated(tf.gather(candidate, pairs.candidate_of), tf.gather(behaviours, pairs.behaviour_of))
        if sides is not None:
            inputs = tf.concat([inputs, tf.gather(sides, pairs.side_of)], axis=1)
        return self.scorer(inputs, mode=mode)


class PaddedActivationUnit(LocalActivationUnit):
    """A rectangle `[C, T]`, T the longest history of the batch, with a mask: the form of the published codes.

    With Dice its batch statistics count the padding, as theirs do; every other setting gives our function.
    """

    def runs_by_kernels(self, mode: Mode) -> bool:
        return False

    def call(
        self,
        candidate: tf.Tensor,
        behaviours: tf.Tensor,
        pairs: Pairs,
        mode: Mode = INFERENCE,
        sides: tf.Tensor | None = None,
    ) -> tf.Tensor:
        num_candidates, width = tf.shape(candidate)[0], candidate.shape[-1]
        rows = behaviours_of(behaviours, pairs, sides)
        histories = tf.RaggedTensor.from_value_rowids(rows, pairs.candidate_of, num_candidates)
        padded = histories.to_tensor(shape=[None, None, width + self.side_width])  # [C, T, H + S]
        longest = tf.shape(padded)[1]
        mask = tf.sequence_mask(histories.row_lengths(), longest)
        repeated = tf.repeat(candidate, longest, axis=0)
        flat = tf.reshape(padded, [-1, width + self.side_width])
        inputs = tf.concat([concatenated(repeated, flat[:, :width]), flat[:, width:]], axis=1)
        scores = self.scorer(inputs, mode=mode)
        scores = tf.reshape(scores, [num_candidates, longest])
        if self.normalization is AttentionNormalization.SOFTMAX:
            scores = tf.where(mask, scores / math.sqrt(width), -(2.0**31))
            weights = tf.where(mask, tf.nn.softmax(scores), 0.0)
        else:
            weights = tf.where(mask, scores, 0.0)
        return tf.squeeze(tf.matmul(weights[:, None, :], padded), axis=1)


def concatenated(candidate: tf.Tensor, behaviours: tf.Tensor) -> tf.Tensor:
    """Returns [q, k, q - k, q * k] of twice `[P, H]`, `[P, 4H]`."""
    return tf.concat([candidate, behaviours, candidate - behaviours, candidate * behaviours], axis=1)
