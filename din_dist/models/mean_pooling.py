"""The authors' base model: every behaviour counts the same, whatever the candidate."""

from __future__ import annotations

import tensorflow as tf

from din_dist.layers.packed import segment_sum
from din_dist.layers.xla import fused
from din_dist.models.ranking_model import RankingModel


class MeanPooling(RankingModel):
    """DIN without attention: interest = Dense(BN(mean of the history)); the head sees [interest, q].

    Source: the authors' base_model/model.py (there an empty history divides by zero; here its mean is zeros).
    """

    def interest(
        self,
        candidate: tf.Tensor,
        keys: tf.Tensor,
        candidate_of: tf.Tensor,
        key_of: tf.Tensor,
        training: bool,
        num_pairs: tf.Tensor | None,
    ) -> tf.Tensor:
        return _mean_pool(keys, candidate_of, key_of, candidate, compiled=self.compiled and training)

    def head_inputs(self, interest: tf.Tensor, candidate: tf.Tensor, native: bool = False) -> tf.Tensor:
        return tf.concat([interest, candidate], axis=1)


@fused
def _mean_pool(keys: tf.Tensor, candidate_of: tf.Tensor, key_of: tf.Tensor, candidate: tf.Tensor) -> tf.Tensor:
    num_candidates = tf.shape(candidate)[0]
    sums = segment_sum(tf.gather(keys, key_of), candidate_of, num_candidates)
    counts = segment_sum(tf.ones_like(candidate_of, tf.float32), candidate_of, num_candidates)
    return sums / tf.maximum(counts, 1.0)[:, None]
