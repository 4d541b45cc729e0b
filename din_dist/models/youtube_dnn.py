"""YouTube's retrieval model (Covington et al. 2016, "Deep Neural Networks for YouTube Recommendations")."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from din_dist.config import ModelConfig
from din_dist.execution import Mode
from din_dist.layers.feature_columns import FeatureColumns
from din_dist.layers.local_lookup import LocalLookup
from din_dist.layers.packed import segment_sum
from din_dist.models.retrieval_model import PackedHistories, RetrievalModel


class YouTubeDNN(RetrievalModel):
    """user = Dense(ReLU layers([mean of the history, user and context features, age of the example])).

    Without hidden layers it is the `DNN` of ComiRec's code (src/model.py). The age x of an example is told as x, x^2
    and sqrt(x), as the paper feeds numbers. It is 0 where users are asked now.

    Args:
        lookup: as of `RetrievalModel`, like the others.
        config: widths of the hidden layers, and if ages are told.
        training_mode: the mode of training passes.
        example_columns: the columns of user and context features.
    """

    def __init__(
        self,
        lookup: LocalLookup,
        config: ModelConfig,
        training_mode: Mode | None = None,
        example_columns: FeatureColumns | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(lookup, config, training_mode, example_columns, **kwargs)
        self.tower = [
            keras.layers.Dense(width, activation="relu", name=f"tower_{place}")
            for place, width in enumerate(config.tower_units)
        ]
        self._reads_ages = config.example_age
        self.tower.append(keras.layers.Dense(lookup.width, name="tower_output"))

    def interests(self, histories: PackedHistories, mode: Mode) -> tf.Tensor:
        sums = segment_sum(histories.rows(), histories.history_of, histories.num_histories)
        found = sums / tf.cast(tf.maximum(histories.lengths, 1), tf.float32)[:, None]
        if histories.context is not None:
            found = tf.concat([found, histories.context], axis=1)
        if self._reads_ages:
            ages = tf.zeros_like(found[:, 0]) if histories.ages is None else histories.ages
            found = tf.concat([found, tf.stack([ages, ages**2, tf.sqrt(ages)], axis=1)], axis=1)
        for layer in self.tower:
            found = layer(found)
        return found[:, None]
