"""The Deep Interest Network (Zhou et al. 2018, arXiv:1706.06978)."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from din_dist.config import BatchNorm, ModelConfig
from din_dist.execution import Mode
from din_dist.layers.feature_columns import FeatureColumns
from din_dist.layers.local_activation_unit import LocalActivationUnit
from din_dist.layers.local_lookup import LocalLookup
from din_dist.layers.native.vectors import beside_product
from din_dist.layers.packed import segment_ids
from din_dist.layers.pairs import Pairs
from din_dist.models.ranking_model import RankingModel, items_of
from din_dist.schema import Batch


class DIN(RankingModel):
    """Weighs each past behaviour by its relevance to the candidate.

    interest = Dense(BN(attention(q, history))); logit = head(BN([interest, q, interest * q, context])) + bias[item].
    The context is the columns of user, context and candidate features, if there are any.
    Source: the authors' din/model.py.

    Args:
        lookup: turns item ids into vectors.
        config: sizes, activations and normalization.
        training_mode: of a pass in training.
        example_columns: of the context.
        num_tasks: the labels to predict.
        attention: another form of the local activation unit, for comparison.
    """

    def __init__(
        self,
        lookup: LocalLookup,
        config: ModelConfig,
        training_mode: Mode | None = None,
        example_columns: FeatureColumns | None = None,
        num_tasks: int = 1,
        attention: type[LocalActivationUnit] = LocalActivationUnit,
        **kwargs: Any,
    ) -> None:
        super().__init__(lookup, config, training_mode, example_columns, num_tasks, **kwargs)
        self.attention = attention(
            config.attention_hidden_units,
            config.activation,
            config.attention_normalization,
            frozen=config.batch_norm is BatchNorm.FROZEN,
            name="attention",
        )

    def pools_compiled(self, mode: Mode) -> bool:
        return self.attention.is_compiled(mode)

    @property
    def late_weights(self) -> list[keras.Variable]:
        return [*super().late_weights, *self.attention.scorer.dense_layers[0].trainable_weights]

    def interest(self, candidate: tf.Tensor, behaviours: tf.Tensor, pairs: Pairs, mode: Mode) -> tf.Tensor:
        return self.attention(candidate, behaviours, pairs, mode=mode)

    def head_inputs(self, interest: tf.Tensor, candidate: tf.Tensor, mode: Mode) -> tf.Tensor:
        if mode.kernels:
            return beside_product(interest, candidate)
        return tf.concat([interest, candidate, interest * candidate], axis=1)

    def attention_weights(self, batch: Batch) -> tf.Tensor:
        item_ids, index = items_of(batch)
        num_candidates = tf.size(batch.candidate_item_ids)
        vectors, _ = self.lookup(item_ids)
        pairs = Pairs(segment_ids(batch.history_lengths), index[num_candidates:])
        return self.attention.weights_of_pairs(tf.gather(vectors, index[:num_candidates]), vectors, pairs)
