"""Models with several interests of a user, by self-attention or by capsules.

Sources: Cen et al. 2020, "Controllable Multi-Interest Framework for Recommendation" (ComiRec), and its code,
src/model.py; Li et al. 2019, "Multi-Interest Network with Dynamic Routing for Recommendation at Tmall" (MIND).
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from din_dist.config import InterestWeights, ModelConfig, PositionVectors
from din_dist.execution import Mode
from din_dist.layers.local_lookup import LocalLookup
from din_dist.layers.packed import places_in, segment_softmax, segment_sum
from din_dist.models.retrieval_model import PackedHistories, RetrievalModel

_HIDDEN_WIDTHS = 4  # the hidden layer of the attention is so many times as wide as an item's vector
_ROUNDS = 3  # of routing
_SMALLEST = 1e-9  # added to a squared length


class ComiRecSA(RetrievalModel):
    """interest k = sum of A[:, k] * H, with A = softmax over the history of Dense(tanh(Dense(H + position))).

    H are the vectors of the history. `--interest_weights=none` leaves the softmax out.

    Args:
        lookup: as of `RetrievalModel`, like the others.
        config: the number of interests, positions, weights.
        training_mode: the mode of training passes.
    """

    def __init__(
        self, lookup: LocalLookup, config: ModelConfig, training_mode: Mode | None = None, **kwargs: Any
    ) -> None:
        super().__init__(lookup, config, training_mode, **kwargs)
        self._weights_by = config.interest_weights
        self.positions = None
        if config.positions is PositionVectors.LEARNED:
            self.positions = self.add_weight(
                shape=(config.num_positions, lookup.width), initializer="glorot_uniform", name="positions"
            )
        self.attention_hidden = keras.layers.Dense(_HIDDEN_WIDTHS * lookup.width, name="attention_hidden")
        has_bias = config.interest_weights is InterestWeights.NONE  # a softmax cancels it
        self.attention_scores = keras.layers.Dense(config.num_interests, use_bias=has_bias, name="attention_scores")
        with keras.name_scope(self.name):
            self.attention_hidden.build((None, lookup.width))

    def interests(self, histories: PackedHistories, mode: Mode) -> tf.Tensor:
        weights = self.weights_of_positions(histories)
        rows = histories.rows()
        return _sums_by_interest(weights, [rows] * weights.shape[1], histories)

    def weights_of_positions(self, histories: PackedHistories) -> tf.Tensor:
        """Returns the weight of each position in each interest, float32 `[N, K]`."""
        # The first layer is affine, so distinct items and positions each go through it once.
        hidden = tf.gather(self.attention_hidden(histories.vectors), histories.item_of)
        if self.positions is not None:
            of_positions = tf.matmul(self.positions.value, self.attention_hidden.kernel.value)
            hidden += tf.gather(of_positions, places_in(histories.lengths, histories.history_of))
        scores = self.attention_scores(tf.tanh(hidden))
        if self._weights_by is InterestWeights.NONE:
            return scores
        return segment_softmax(scores, histories.history_of, histories.num_histories)


class _Capsules(RetrievalModel):
    """Interests by dynamic routing: positions choose among interests by their products with them, for three rounds."""

    def route(self, hats: list[tf.Tensor], logits: tf.Tensor, histories: PackedHistories) -> tf.Tensor:
        """Returns the interests, float32 `[B, K, H]`.

        As in the authors' code, only the last round has a gradient, and none flows through the choices.

        Args:
            hats: float32 `[N, H]` for each of K interests: what each position says of it.
            logits: float32 `[N, K]`, the choices before the first round.
            histories: of the users.
        """
        fixed = [tf.stop_gradient(hat) for hat in hats]
        for _ in range(_ROUNDS - 1):
            capsules = _squashed(_sums_by_interest(tf.nn.softmax(logits, axis=1), fixed, histories))
            of_positions = tf.gather(capsules, histories.history_of)  # [N, K, H]
            agreement = [tf.reduce_sum(hat * of_positions[:, k], axis=1) for k, hat in enumerate(fixed)]
            logits += tf.stack(agreement, axis=1)
        return _squashed(_sums_by_interest(tf.nn.softmax(logits, axis=1), hats, histories))


class ComiRecDR(_Capsules):
    """Interests by dynamic routing; each place of a history has a map of its own for each interest.

    Args:
        lookup: as of `RetrievalModel`, like the others.
        config: the number of interests and of positions.
        training_mode: the mode of training passes.
    """

    def __init__(
        self, lookup: LocalLookup, config: ModelConfig, training_mode: Mode | None = None, **kwargs: Any
    ) -> None:
        super().__init__(lookup, config, training_mode, **kwargs)
        self._num_interests, self._num_positions = config.num_interests, config.num_positions
        self.maps = self.add_weight(
            shape=(config.num_positions, lookup.width, config.num_interests * lookup.width),
            initializer=keras.initializers.RandomNormal(stddev=1.0),
            name="maps",
        )

    def interests(self, histories: PackedHistories, mode: Mode) -> tf.Tensor:
        places = places_in(histories.lengths, histories.history_of)
        order = tf.argsort(places, stable=True)  # all first positions, all second ones, ...
        counts = tf.math.bincount(places, minlength=self._num_positions, maxlength=self._num_positions)
        runs = tf.split(tf.gather(histories.rows(), order), counts, num=self._num_positions)
        products = [tf.matmul(run, self.maps.value[place]) for place, run in enumerate(runs)]
        found = tf.gather(tf.concat(products, axis=0), tf.math.invert_permutation(order))
        logits = tf.zeros([tf.size(places), self._num_interests])
        return self.route(tf.split(found, self._num_interests, axis=1), logits, histories)


class MIND(_Capsules):
    """Interests by dynamic routing with one map for all, followed by a ReLU layer.

    The first choices, which must differ among interests, are fixed random numbers for each place of a history. The
    authors draw them anew for each user and pass, so that their model says something else each time.

    Args:
        lookup: as of `RetrievalModel`, like the others.
        config: the number of interests and of positions.
        training_mode: the mode of training passes.
    """

    def __init__(
        self, lookup: LocalLookup, config: ModelConfig, training_mode: Mode | None = None, **kwargs: Any
    ) -> None:
        super().__init__(lookup, config, training_mode, **kwargs)
        self._num_interests = config.num_interests
        self.map = keras.layers.Dense(lookup.width, use_bias=False, name="map")
        self.choices = self.add_weight(
            shape=(config.num_positions, config.num_interests),
            initializer=keras.initializers.TruncatedNormal(stddev=1.0),
            trainable=False,
            name="choices",
        )
        self.projection = keras.layers.Dense(lookup.width, activation="relu", name="projection")

    def interests(self, histories: PackedHistories, mode: Mode) -> tf.Tensor:
        hat = tf.gather(self.map(histories.vectors), histories.item_of)
        logits = tf.gather(self.choices.value, places_in(histories.lengths, histories.history_of))
        return self.projection(self.route([hat] * self._num_interests, logits, histories))


def _sums_by_interest(weights: tf.Tensor, rows: list[tf.Tensor], histories: PackedHistories) -> tf.Tensor:
    """Returns the weighted sum of each history's rows for each interest, float32 `[B, K, H]`.

    Args:
        weights: float32 `[N, K]`.
        rows: float32 `[N, H]` for each of K interests.
        histories: of the users.
    """
    found = [
        segment_sum(weights[:, k, None] * own, histories.history_of, histories.num_histories)
        for k, own in enumerate(rows)
    ]
    return tf.stack(found, axis=1)


def _squashed(capsules: tf.Tensor) -> tf.Tensor:
    """Returns vectors of the same direction whose length is below 1."""
    squared = tf.reduce_sum(tf.square(capsules), axis=-1, keepdims=True)
    return squared / (1 + squared) / tf.sqrt(squared + _SMALLEST) * capsules
