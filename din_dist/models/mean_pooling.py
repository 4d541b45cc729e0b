"""The authors' base model: every behaviour weighs the same, whatever the candidate."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from din_dist.execution import Mode
from din_dist.layers.packed import behaviours_of, segment_sum
from din_dist.layers.pairs import Pairs
from din_dist.models.ranking_model import LookedUp, RankingModel


class MeanPooling(RankingModel):
    """DIN without attention: interest = Dense(BN(mean of the history)); the head sees [interest, q, context].

    Source: the authors' base_model/model.py (there an empty history divides by zero; here its mean is zeros).
    """

    def interest(self, items: LookedUp, pairs: Pairs, mode: Mode, history: int = 0) -> tf.Tensor:
        return mode.fused(_mean_pool)(items.behaviours, pairs, items.candidate, items.sides)

    def head_inputs(self, interests: Sequence[tf.Tensor], candidate: tf.Tensor, mode: Mode) -> tf.Tensor:
        interest, *others = interests
        return tf.concat([interest, candidate, *others], axis=1)


def _mean_pool(behaviours: tf.Tensor, pairs: Pairs, candidate: tf.Tensor, sides: tf.Tensor | None) -> tf.Tensor:
    num_candidates, candidate_of = tf.shape(candidate)[0], pairs.candidate_of
    sums = segment_sum(behaviours_of(behaviours, pairs, sides), candidate_of, num_candidates)
    counts = segment_sum(tf.ones_like(candidate_of, tf.float32), candidate_of, num_candidates)
    return sums / tf.maximum(counts, 1.0)[:, None]
