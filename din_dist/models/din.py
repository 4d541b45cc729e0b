"""The Deep Interest Network (Zhou et al. 2018, arXiv:1706.06978)."""

from __future__ import annotations

import functools
from typing import Any

import keras
import tensorflow as tf

from din_dist.config import BatchNorm, ModelConfig
from din_dist.layers.local_activation_unit import LocalActivationUnit
from din_dist.layers.local_lookup import LocalLookup
from din_dist.layers.native.attention import NativeActivationUnit
from din_dist.layers.native.vectors import beside_product
from din_dist.layers.packed import segment_ids
from din_dist.layers.standardize import SumOverRanks
from din_dist.models.ranking_model import RankingModel, items_of
from din_dist.schema import Batch


class DIN(RankingModel):
    """Weighs each past behaviour by its relevance to the candidate.

    interest = Dense(BN(attention(q, history))); logit = head(BN([interest, q, interest * q])) + bias[item].
    Source: the authors' din/model.py.
    """

    def __init__(
        self,
        lookup: LocalLookup,
        config: ModelConfig,
        sum_over_ranks: SumOverRanks = tf.identity,
        compiled: bool = False,
        native: bool = False,
        in_bfloat16: bool = False,
        attention: type[LocalActivationUnit] | None = None,
        **kwargs: Any,
    ) -> None:
        """`attention`: another form of it, for comparison."""
        super().__init__(lookup, config, sum_over_ranks, compiled, native, in_bfloat16, **kwargs)
        of_kernels = functools.partial(NativeActivationUnit, in_bfloat16=in_bfloat16)
        make = attention or (of_kernels if native else LocalActivationUnit)
        self.attention = make(
            config.attention_hidden_units,
            config.activation,
            config.attention_normalization,
            frozen=config.batch_norm is BatchNorm.FROZEN,
            sum_over_ranks=sum_over_ranks,
            compiled=compiled,
            name="attention",
        )

    @property
    def needs_few_lengths(self) -> bool:
        return self.attention.needs_few_lengths

    @property
    def late_weights(self) -> list[keras.Variable]:
        return [*super().late_weights, *self.attention.scorer.dense_layers[0].trainable_weights]

    def interest(
        self,
        candidate: tf.Tensor,
        keys: tf.Tensor,
        candidate_of: tf.Tensor,
        key_of: tf.Tensor,
        training: bool,
        num_pairs: tf.Tensor | None,
    ) -> tf.Tensor:
        return self.attention(candidate, keys, candidate_of, key_of, training=training, num_pairs=num_pairs)

    def head_inputs(self, interest: tf.Tensor, candidate: tf.Tensor, native: bool = False) -> tf.Tensor:
        if native:
            return beside_product(interest, candidate)
        return tf.concat([interest, candidate, interest * candidate], axis=1)

    def attention_weights(self, batch: Batch) -> tf.Tensor:
        distinct, places = items_of(batch)
        num_candidates = tf.size(batch.candidate_item_ids)
        vectors, _ = self.lookup(distinct)
        candidate = tf.gather(vectors, places[:num_candidates])
        candidate_of = segment_ids(batch.history_lengths)
        return self.attention.weights_of_pairs(candidate, vectors, candidate_of, places[num_candidates:])
