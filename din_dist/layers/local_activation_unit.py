"""The local activation unit: it weighs each past behaviour by its relevance to a candidate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from din_dist.config import Activation, AttentionNormalization
from din_dist.execution import INFERENCE, Mode
from din_dist.layers.attention_unit import AttentionUnit, products
from din_dist.layers.hidden import HiddenLayers
from din_dist.layers.native.attention import has_kernels, pool_by_kernels
from din_dist.layers.packed import rows_of
from din_dist.layers.pairs import Pairs


@keras.saving.register_keras_serializable("din_dist")
class LocalActivationUnit(AttentionUnit):
    """Pools packed behaviours by their relevance to a candidate.

    The score of a (candidate q, behaviour k) pair is MLP([q, k, q - k, q * k]). With `softmax` the scores are divided
    by sqrt(H) and normalised over the candidate's history; with `none` they are the weights themselves.
    Source: the authors' din/model.py, `attention` (softmax); the paper's equation 3 of section 4.3 (none).

    The first layer is applied in factored form. Its kernel W = [Wq; Wk; Wd; Wp] is one `[4H, units]` weight, as if the
    four inputs were concatenated, but W·[q, k, q-k, q*k] = (Wq+Wd)·q + (Wk-Wd)·k + Wp·(q*k): the first term is computed
    once a candidate, the second once a distinct behaviour, and only the third once a pair.

    Side information s of a behaviour (its action, its age) stands beside k: the scorer gets [q, k, q - k, q * k, s] and
    W has S rows more, whose term is computed once for each of T distinct sides. What is pooled is [k, s].

    Args:
        hidden_units: width of each hidden layer of the scorer.
        activation: of the hidden layers, a key of `hidden.ACTIVATIONS`.
        normalization: of the scores over a history.
        frozen: batch statistics of the activations are never updated.
        side_width: S, the width of side information.
    """

    def __init__(
        self,
        hidden_units: Sequence[int] = (80, 40),
        activation: str = Activation.SIGMOID,
        normalization: AttentionNormalization = AttentionNormalization.SOFTMAX,
        *,
        frozen: bool = False,
        side_width: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(normalization, side_width, **kwargs)
        self.scorer = HiddenLayers(hidden_units, activation, frozen=frozen, name="scorer")
        self._settings = {
            "hidden_units": list(hidden_units),
            "activation": str(activation),
            "normalization": str(self.normalization),
            "frozen": frozen,
            **({"side_width": side_width} if side_width else {}),
        }

    def build(self, candidate_shape: tuple) -> None:
        self.scorer.build((None, 4 * candidate_shape[-1] + self.side_width))

    def scale(self, width: int) -> float:
        return math.sqrt(width)

    @property
    def last_known(self) -> list[keras.Variable]:
        return self.scorer.dense_layers[0].trainable_weights

    def runs_by_kernels(self, mode: Mode) -> bool:
        return mode.kernels and has_kernels(self)

    def call(
        self,
        candidate: tf.Tensor,
        behaviours: tf.Tensor,
        pairs: Pairs,
        mode: Mode = INFERENCE,
        sides: tf.Tensor | None = None,
    ) -> tf.Tensor:
        if self.runs_by_kernels(mode):
            return pool_by_kernels(self, candidate, behaviours, pairs, mode, sides)
        return super().call(candidate, behaviours, pairs, mode, sides)

    def scores(
        self, candidate: tf.Tensor, behaviours: tf.Tensor, pairs: Pairs, mode: Mode, sides: tf.Tensor | None = None
    ) -> tf.Tensor:
        of_candidate, of_behaviour, of_product, bias = self.first_terms()
        by_candidate, by_behaviour = tf.matmul(candidate, of_candidate) + bias, tf.matmul(behaviours, of_behaviour)
        of_pairs = mode.fused(products)(candidate, behaviours, pairs)  # [P, H]
        by_pair = tf.matmul(of_pairs, of_product)  # [P, units]
        by_side = None if sides is None else tf.matmul(sides, self.side_kernel())
        projected = mode.fused(_plus_rows)(by_pair, by_candidate, by_behaviour, pairs, by_side)
        return self.scorer.after_first(projected, mode=mode, num_rows=pairs.num_real)

    def get_config(self) -> dict:
        return {**super().get_config(), **self._settings}

    def first_terms(self) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns the first layer's kernels of q, of k and of q * k, `[H, units]` each, and its bias `[units]`."""
        first = self.scorer.dense_layers[0]
        kernel = first.kernel.value[: -self.side_width] if self.side_width else first.kernel.value
        of_candidate, of_behaviour, of_difference, of_product = tf.split(kernel, 4, axis=0)
        return of_candidate + of_difference, of_behaviour - of_difference, of_product, first.bias.value

    def side_kernel(self) -> tf.Tensor:
        """Returns the first layer's kernel of side information, `[S, units]`."""
        kernel = self.scorer.dense_layers[0].kernel.value
        return kernel[tf.shape(kernel)[0] - self.side_width :]


def _plus_rows(
    by_pair: tf.Tensor, by_candidate: tf.Tensor, by_behaviour: tf.Tensor, pairs: Pairs, by_side: tf.Tensor | None
) -> tf.Tensor:
    found = by_pair + rows_of(by_candidate, pairs.candidate_of) + tf.gather(by_behaviour, pairs.behaviour_of)
    return found if by_side is None else found + tf.gather(by_side, pairs.side_of)
