"""Attention by the product of candidate and behaviour, without weights of its own."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from din_dist.config import AttentionNormalization
from din_dist.execution import Mode
from din_dist.layers.attention_unit import AttentionUnit, products
from din_dist.layers.pairs import Pairs


@keras.saving.register_keras_serializable("din_dist")
class DotProductAttention(AttentionUnit):
    """Weighs behaviours by softmax(q . k) over the candidate's history.

    It is `keras.layers.Attention` on padded arrays with a mask. Side information does not change the weights.

    Args:
        side_width: S, the width of side information, which is pooled beside the behaviour.
    """

    def __init__(self, side_width: int = 0, **kwargs: Any) -> None:
        super().__init__(AttentionNormalization.SOFTMAX, side_width, **kwargs)

    def scale(self, width: int) -> float:
        return 1.0

    def scores(
        self, candidate: tf.Tensor, behaviours: tf.Tensor, pairs: Pairs, mode: Mode, sides: tf.Tensor | None = None
    ) -> tf.Tensor:
        return mode.fused(_dots)(candidate, behaviours, pairs)

    def get_config(self) -> dict:
        return {**super().get_config(), "side_width": self.side_width}


def _dots(candidate: tf.Tensor, behaviours: tf.Tensor, pairs: Pairs) -> tf.Tensor:
    return tf.reduce_sum(products(candidate, behaviours, pairs), axis=1)
