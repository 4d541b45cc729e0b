"""All items of the catalogue as candidates of each history: the same logits, from far less arithmetic.

Letters: I items, C of them at once, H the width of their vectors, K distinct items of the histories (keys), D the width
of a perceptron's first layer. Three things follow from the candidates being the same for all histories:

- The attention score of a (candidate, key) pair knows nothing of the history. It is computed once, however many
  histories have the key: Amazon Beauty's 200,000 positions have 12,000 different ones.
- For one key, the first attention layer over all candidates is a product with a kernel of its own:
  (Wq + Wd)·q + Wp·(q * k) = (Wq + Wd + Wp·diag(k))·q. No array of q * k is made.
- Out of training, everything between a pooled history and the head's first layer is affine but for the product with
  the candidate. It is applied to the keys, and what is pooled are its results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from din_dist.config import AttentionNormalization
from din_dist.layers.local_activation_unit import LocalActivationUnit
from din_dist.models.din import DIN
from din_dist.models.mean_pooling import MeanPooling
from din_dist.models.ranking_model import RankingModel

_ROWS = 16_384  # pairs of a candidate with a key or a history that are computed at once
_MAX_HISTORIES = 1024  # likewise, where there are few candidates
_SCORES_BYTES = 256 * 2**20  # of the attention scores [K, C]


class CatalogueScorer:
    """Logits of the items 1 to `num_items` for any histories, by the weights that the model has when this is made."""

    def __init__(self, model: RankingModel, num_items: int) -> None:
        self._lookup, self._num_items = model.lookup, num_items
        width = model.lookup.width
        scale, offset = model.interest_norm.affine()
        projection = model.interest_projection
        self._of_key = scale[:, None] * projection.kernel.value  # [H, H]
        # The interest of a history without behaviours, `[1, H]`.
        self._interest_of_nothing = tf.matmul(offset[None], projection.kernel.value) + projection.bias.value

        scale, offset = model.head_norm.affine()
        self._head, first = model.head, model.head.dense_layers[0]
        self._head_bias = tf.matmul(offset[None], first.kernel.value) + first.bias.value  # [1, D]
        parts = tf.split(scale[:, None] * first.kernel.value, first.kernel.shape[0] // width, axis=0)
        self._of_interest, self._of_candidate, *of_product = parts  # [H, D] each
        self._attention: LocalActivationUnit | None = None
        self._of_product: tf.Tensor | None = None
        match model:
            case DIN():
                self._attention, (self._of_product,) = model.attention, of_product
            case MeanPooling():
                pass
            case _:
                raise TypeError(f"{type(model).__name__}: not known how it scores all items at once")
        matrix, vector = tf.TensorSpec([None, None], tf.float32), tf.TensorSpec([None], tf.float32)
        self._relevance = tf.function(self._relevance_of, input_signature=[matrix, matrix], autograph=False)
        self._score = tf.function(
            self._logits_of,
            input_signature=[matrix, matrix, tf.TensorSpec([None, None], tf.int32), matrix, matrix, vector],
            autograph=False,
        )

    def logits(
        self,
        history_item_ids: np.ndarray,
        history_lengths: np.ndarray,
        tick: Callable[[float], None] = lambda share: None,
    ) -> np.ndarray:
        """`[B, I]` float32; column i belongs to item i + 1.

        Args:
            history_item_ids: `[N]`, B histories end to end; `history_lengths` `[B]`.
            tick: told often which share of the work is done.
        """
        key_ids, places = np.unique(history_item_ids, return_inverse=True)
        keys, _ = self._lookup(tf.constant(key_ids, tf.int32))  # [K, H]
        by_key = self._by_key(keys)
        logits = np.empty((len(history_lengths), self._num_items), np.float32)
        num_candidates = max(1, min(_ROWS, _SCORES_BYTES // (4 * max(len(key_ids), 1))))
        at_once = min(_MAX_HISTORIES, max(1, _ROWS // min(num_candidates, self._num_items)))
        groups = list(_of_like_length(places.reshape(-1), history_lengths, at_once))
        firsts = range(0, self._num_items, num_candidates)
        for number, first in enumerate(firsts):
            end = min(first + num_candidates, self._num_items)
            candidates, biases = self._lookup(tf.range(first + 1, end + 1))  # [C, H], [C]

            def scored(share: float, blocks_done: int = number) -> None:
                tick((blocks_done + share / 2) / len(firsts))

            scores = self._scores(keys, candidates, scored)
            by_candidate = self._by_candidate(candidates)
            for place, (histories, rectangle) in enumerate(groups):
                found = self._score(scores, by_key, rectangle, candidates, by_candidate, biases)
                logits[histories, first:end] = found.numpy()
                tick((number + 1 / 2 + (place + 1) / (2 * len(groups))) / len(firsts))
        return logits

    def _by_key(self, keys: tf.Tensor) -> tf.Tensor:
        """What is pooled of each key, `[K, D]` or `[K, D + H]`: its part of the head's first layer, whatever the
        candidate, and its part of the interest, where that meets the candidate."""
        interests = tf.matmul(keys, self._of_key)
        by_key = tf.matmul(interests, self._of_interest)
        return by_key if self._of_product is None else tf.concat([by_key, interests], axis=1)

    def _by_candidate(self, candidates: tf.Tensor) -> tf.Tensor:
        """What the head's first layer gets of each candidate, whatever the history: `[C, D]`."""
        nothing = self._interest_of_nothing
        by_candidate = (
            tf.matmul(candidates, self._of_candidate) + self._head_bias + tf.matmul(nothing, self._of_interest)
        )
        if self._of_product is not None:
            by_candidate += tf.matmul(nothing * candidates, self._of_product)
        return by_candidate

    def _scores(self, keys: tf.Tensor, candidates: tf.Tensor, tick: Callable[[float], None]) -> tf.Tensor:
        """Attention scores `[K, C]` of keys `[K, H]` and candidates `[C, H]`; nothing where there is no attention."""
        if self._attention is None:
            return tf.zeros([0, 0])
        chunks = [tf.zeros([0, candidates.shape[0]])]
        each = max(1, _ROWS // candidates.shape[0])
        for first in range(0, keys.shape[0], each):
            chunks.append(self._relevance(keys[first : first + each], candidates))
            tick(min(1.0, (first + each) / keys.shape[0]))
        return tf.concat(chunks, axis=0)

    def _relevance_of(self, keys: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
        assert self._attention is not None
        scorer = self._attention.scorer
        first = scorer.dense_layers[0]
        of_candidate, of_key, of_difference, of_product = tf.split(first.kernel.value, 4, axis=0)
        kernels = (of_candidate + of_difference)[None] + keys[:, :, None] * of_product[None]  # [K, H, D]
        by_key = tf.matmul(keys, of_key - of_difference) + first.bias.value  # [K, D]
        projected = tf.matmul(candidates[None], kernels) + by_key[:, None, :]  # [K, C, D]
        scores = scorer.after_first(tf.reshape(projected, [-1, first.units]))
        return tf.reshape(scores, [tf.shape(keys)[0], tf.shape(candidates)[0]])

    def _logits_of(
        self,
        scores: tf.Tensor,
        by_key: tf.Tensor,
        rectangle: tf.Tensor,
        candidates: tf.Tensor,
        by_candidate: tf.Tensor,
        biases: tf.Tensor,
    ) -> tf.Tensor:
        """`[G, C]`, of G histories: `rectangle` `[G, T]` holds places among the keys, or -1."""
        real = rectangle[:, :, None] >= 0  # [G, T, 1]
        places = tf.maximum(rectangle, 0)
        if self._attention is None:
            lengths = tf.reduce_sum(tf.cast(real, tf.float32), axis=1, keepdims=True)
            weights = tf.cast(real, tf.float32) / tf.maximum(lengths, 1.0)  # [G, T, 1]
        else:
            weights = tf.gather(scores, places)  # [G, T, C]
            if self._attention.normalization is AttentionNormalization.SOFTMAX:
                scaled = weights / math.sqrt(self._lookup.width)
                weights = tf.nn.softmax(tf.where(real, scaled, scaled.dtype.min), axis=1)
            weights = tf.where(real, weights, 0.0)
        pooled = tf.matmul(weights, tf.gather(by_key, places), transpose_a=True)  # [G, C or 1, D or D + H]
        units = self._head_bias.shape[1]
        projected = pooled[:, :, :units] + by_candidate
        if self._of_product is not None:
            projected += tf.matmul(pooled[:, :, units:] * candidates, self._of_product)
        logits = self._head.after_first(tf.reshape(projected, [-1, units]))
        return tf.reshape(logits, [tf.shape(rectangle)[0], -1]) + biases


def _of_like_length(places: np.ndarray, lengths: np.ndarray, at_once: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Groups of histories by ascending length, so that rectangles `[G, T]` int32 need little padding, by -1.

    With each group, which of the histories it holds.
    """
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(lengths, kind="stable")
    for first in range(0, len(order), at_once):
        histories = order[first : first + at_once]
        columns = np.arange(lengths[histories].max(initial=0))
        real = columns < lengths[histories, None]
        rectangle = np.full(real.shape, -1, np.int32)
        rectangle[real] = places[(starts[histories, None] + columns)[real]]
        yield histories, rectangle
