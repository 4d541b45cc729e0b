"""Attention units turn scores of pairs into weights, by which they pool each candidate's behaviours."""

from __future__ import annotations

import abc
from typing import Any

import keras
import tensorflow as tf

from din_dist.config import AttentionNormalization
from din_dist.execution import INFERENCE, Mode
from din_dist.layers.packed import pool, rows_of, segment_softmax
from din_dist.layers.pairs import Pairs


class AttentionUnit(keras.layers.Layer):
    """Pools packed behaviours by scores of (candidate, behaviour) pairs.

    Args:
        normalization: with `softmax` the scores are divided by `scale` and normalized over the candidate's history;
            with `none` they are the weights themselves.
        side_width: S, the width of side information, which is pooled beside the behaviour.
    """

    def __init__(self, normalization: AttentionNormalization, side_width: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.normalization, self.side_width = AttentionNormalization(normalization), side_width

    @abc.abstractmethod
    def scale(self, width: int) -> float:
        """Returns what scores are divided by before a softmax; `width` is H."""

    @abc.abstractmethod
    def scores(
        self, candidate: tf.Tensor, behaviours: tf.Tensor, pairs: Pairs, mode: Mode, sides: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Returns the attention scores `[P]` before normalization; arguments as of `call`."""

    @property
    def last_known(self) -> list[keras.Variable]:
        """The weights whose gradients are known after the last batch statistics."""
        return []

    def runs_by_kernels(self, mode: Mode) -> bool:
        """Tells whether our kernels compute `call`."""
        return False

    def is_compiled(self, mode: Mode) -> bool:
        """Tells whether `call` is compiled for each number of pairs anew, so that few numbers are wanted."""
        return mode.training and mode.execution.xla and not self.runs_by_kernels(mode)

    def call(
        self,
        candidate: tf.Tensor,
        behaviours: tf.Tensor,
        pairs: Pairs,
        mode: Mode = INFERENCE,
        sides: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Returns the interest that each candidate finds in its history, float32 `[C, H + S]`; zeros if that is empty.

        Args:
            candidate: float32 `[C, H]`.
            behaviours: float32 `[K, H]`, distinct: what several pairs share is projected once.
            pairs: each candidate with the behaviours of its history.
            mode: of the pass.
            sides: float32 `[T, S]`, the side information that pairs name. None: there is none.
        """
        scores = self.scores(candidate, behaviours, pairs, mode, sides)
        if self.normalization is AttentionNormalization.SOFTMAX:
            scores = scores / self.scale(candidate.shape[-1])
            return mode.fused(_softmax_pool)(scores, behaviours, pairs, candidate, sides)
        return mode.fused(pool)(scores, behaviours, pairs, candidate, sides)

    def weights_of_pairs(
        self, candidate: tf.Tensor, behaviours: tf.Tensor, pairs: Pairs, sides: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Returns the attention weights `[P]` with which `call` pools in inference.

        With `softmax` those of a candidate sum to 1. With `none` they may be of any size, and negative.
        """
        scores = self.scores(candidate, behaviours, pairs, INFERENCE, sides)
        if self.normalization is AttentionNormalization.SOFTMAX:
            scores = scores / self.scale(candidate.shape[-1])
            return segment_softmax(scores, pairs.candidate_of, tf.shape(candidate)[0])
        return scores


def products(candidate: tf.Tensor, behaviours: tf.Tensor, pairs: Pairs) -> tf.Tensor:
    """Returns the candidate times the behaviour of each pair, element by element, float32 `[P, H]`."""
    return rows_of(candidate, pairs.candidate_of) * tf.gather(behaviours, pairs.behaviour_of)


def _softmax_pool(
    scores: tf.Tensor, behaviours: tf.Tensor, pairs: Pairs, candidate: tf.Tensor, sides: tf.Tensor | None
) -> tf.Tensor:
    weights = segment_softmax(scores, pairs.candidate_of, tf.shape(candidate)[0])
    return pool(weights, behaviours, pairs, candidate, sides)
