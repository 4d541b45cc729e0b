"""The models that rank candidates, for Keras: DIN and mean pooling."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from din_dist.api.arguments import check
from din_dist.api.model import KerasBehaviourModel
from din_dist.config import ModelKind
from din_dist.features.spec import Owner
from din_dist.schema import Batch

_OF_HEAD = ("hidden_units", "activation", "batch_norm", "dropout")


class _KerasRankingModel(KerasBehaviourModel):
    """A model whose loss is the cross-entropy of a label, 0 or 1, with its logit."""

    def _check_features(self) -> None:
        sides = [name for name, stored in self._features.items() if stored.encoding.spec.owner is Owner.HISTORY]
        check(not sides, "features", "those of behaviours are for din_dist.train", sides, "Leave them out.")

    def _loss_or_own(self, loss: Any) -> Any:
        return keras.losses.BinaryCrossentropy(from_logits=True) if loss is None else loss

    def call(self, batch: Batch, training: bool = False) -> tf.Tensor:
        if training and self.config.dropout and batch.dropout_seeds is None:
            seeds = tf.random.uniform(tf.shape(batch.candidate_item_ids), -(2**63), 2**63 - 1, tf.int64)
            batch = batch._replace(dropout_seeds=seeds)
        logits = self.core(batch, training=training)
        # The loss sees corrected logits, as in the trainer. Predictions mean the same however negatives are drawn.
        return logits + batch.logit_offsets if training and "logit_offsets" in batch.extras else logits


@keras.saving.register_keras_serializable("din_dist", name="DIN")
class KerasDIN(_KerasRankingModel):
    """The Deep Interest Network; see `KerasBehaviourModel` and `models.din.DIN`.

    The settings are hidden_units, activation, batch_norm, dropout, attention_hidden_units, attention_normalization and
    attention.
    """

    KIND = ModelKind.DIN
    SETTINGS = (*_OF_HEAD, "attention_hidden_units", "attention_normalization", "attention")

    def attention_weights(self, inputs: Any) -> tf.RaggedTensor:
        """Returns the weight of each behaviour of each history, float32 `[B, None]`, oldest first."""
        batch = self.inputs_of_examples.batch(inputs)
        return tf.RaggedTensor.from_row_lengths(self.core.attention_weights(batch), batch.history_lengths)


@keras.saving.register_keras_serializable("din_dist", name="MeanPooling")
class KerasMeanPooling(_KerasRankingModel):
    """DIN without attention; see `KerasBehaviourModel` and `models.mean_pooling.MeanPooling`.

    The settings are hidden_units, activation, batch_norm and dropout.
    """

    KIND = ModelKind.MEAN_POOLING
    SETTINGS = _OF_HEAD
