"""Layers of DIN for models of one's own.

Letters of shapes: B examples, T positions of a padded history, H width of a vector, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from din_dist.api.arguments import check
from din_dist.config import Activation, AttentionNormalization
from din_dist.execution import INFERENCE, TRAINING, Mode
from din_dist.layers.dice import Dice
from din_dist.layers.local_activation_unit import LocalActivationUnit
from din_dist.layers.packed import segment_ids
from din_dist.layers.pairs import Pairs


def _mode(training: bool | None) -> Mode:
    return TRAINING if training else INFERENCE


@keras.saving.register_keras_serializable("din_dist", name="KerasDice")
class KerasDice(keras.layers.Layer):
    """Dice, the activation of the DIN paper, over the last axis; see `layers.dice.Dice`.

    In training it takes the statistics of the batch, and otherwise their moving averages.

    Args:
        frozen: the moving averages stay as they are, and training uses them.
    """

    def __init__(self, frozen: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dice = Dice(frozen, name="dice")

    def build(self, input_shape: Sequence[int | None]) -> None:
        self.dice.build((None, input_shape[-1]))

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Returns the activations, float32 `[..., W]`, of inputs of this shape."""
        rows = tf.reshape(inputs, [-1, inputs.shape[-1]])
        found = tf.reshape(self.dice(rows, mode=_mode(training)), tf.shape(inputs))
        found.set_shape(inputs.shape)
        return found

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Sequence[int | None]:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "frozen": self.dice.standardize.frozen}


@keras.saving.register_keras_serializable("din_dist", name="KerasLocalActivationUnit")
class KerasLocalActivationUnit(keras.layers.Layer):
    """Pools histories by their relevance to candidates; see `layers.local_activation_unit.LocalActivationUnit`.

    Args:
        hidden_units: the width of each hidden layer of the scorer.
        activation: of the hidden layers: sigmoid, dice, prelu or relu.
        normalization: softmax over the history (the authors' code), or none (the paper).
        frozen: batch statistics of Dice are never updated.
    """

    def __init__(
        self,
        hidden_units: Sequence[int] = (80, 40),
        activation: str = Activation.SIGMOID,
        normalization: str = AttentionNormalization.SOFTMAX,
        frozen: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value, choices in (
            ("activation", activation, Activation),
            ("normalization", normalization, AttentionNormalization),
        ):
            allowed = [str(choice) for choice in choices]
            check(value in allowed, name, "must be a choice it knows", value, f"Choose among {', '.join(allowed)}.")
        self.unit = LocalActivationUnit(
            hidden_units, activation, AttentionNormalization(normalization), frozen=frozen, name="unit"
        )
        self._settings = {
            "hidden_units": list(hidden_units),
            "activation": str(activation),
            "normalization": str(normalization),
            "frozen": frozen,
        }

    def build(self, candidate_shape: Sequence[int | None], history_shape: Any = None) -> None:
        self.unit.build(tuple(candidate_shape))

    def call(
        self,
        candidate: tf.Tensor,
        history: tf.Tensor | tf.RaggedTensor,
        history_mask: tf.Tensor | None = None,
        training: bool = False,
    ) -> tf.Tensor:
        """Returns the interest that each candidate finds in its history, float32 `[B, H]`; zeros if that is empty.

        Args:
            candidate: float32 `[B, H]`.
            history: float32 `[B, T, H]`, padded on whichever side, or ragged `[B, None, H]`.
            history_mask: bool `[B, T]`, true at behaviours. None: the mask that an embedding with `mask_zero` gives;
                without one, all positions are behaviours.
            training: Dice takes the statistics of the batch.

        Raises:
            InputError: the shapes do not fit.
        """
        rows, lengths = _packed_rows(candidate, history, history_mask)
        pairs = Pairs(segment_ids(lengths), tf.range(tf.shape(rows)[0]))
        return self.unit(candidate, rows, pairs, mode=_mode(training))

    def compute_output_shape(
        self, candidate_shape: Sequence[int | None], history_shape: Any = None
    ) -> Sequence[int | None]:
        return candidate_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._settings}


def _packed_rows(candidate: tf.Tensor, history: tf.Tensor | tf.RaggedTensor, mask: tf.Tensor | None) -> tf.Tensor:
    """Returns the vectors of all behaviours, float32 `[N, H]`, and the length of each history, int32 `[B]`."""
    shapes = f"{list(candidate.shape)} and {list(history.shape)}"
    fits = candidate.shape.rank == 2 and history.shape.rank == 3 and candidate.shape[-1] == history.shape[-1]
    rule = "must be [B, H] and [B, T, H]"
    check(fits, "candidate, history", rule, shapes, "Look both up in embeddings of one width.")
    if isinstance(history, tf.RaggedTensor):
        check(mask is None, "history_mask", "belongs to a padded history", shapes, "Leave it out.")
        return history.values, tf.cast(history.row_lengths(), tf.int32)
    mask = tf.ones(tf.shape(history)[:2], tf.bool) if mask is None else tf.cast(mask, tf.bool)
    fits = mask.shape.is_compatible_with(history.shape[:2])
    check(fits, "history_mask", "must be [B, T]", f"{list(mask.shape)} for {shapes}", "Make it so.")
    return tf.boolean_mask(history, mask), tf.reduce_sum(tf.cast(mask, tf.int32), axis=1)
