"""Scores all items of the catalogue for each history: the same logits as the model's, with far less arithmetic.

Letters of shapes: I items, C of them at once, H the width of their vectors, K distinct items of the histories
(behaviours), D the width of a perceptron's first layer. All histories have the same candidates. Three savings follow:

- The attention score of a (candidate, behaviour) pair does not depend on the rest of the history. It is computed once,
  however many histories have the behaviour: Amazon Beauty's 200,000 positions have 12,000 distinct ones.
- For one behaviour, the first attention layer over all candidates is a product with a kernel of its own:
  (Wq + Wd)·q + Wp·(q * k) = (Wq + Wd + Wp·diag(k))·q. No array of q * k is made.
- Outside training, everything between a pooled history and the head's first layer is affine, except for the product
  with the candidate. It is applied to each behaviour, and the results are pooled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from din_dist.config import AttentionNormalization
from din_dist.features.gathering import missing_values, signature_of
from din_dist.layers.attention_unit import AttentionUnit
from din_dist.layers.local_activation_unit import LocalActivationUnit
from din_dist.models.behaviour_model import BehaviourModel
from din_dist.models.din import DIN
from din_dist.models.mean_pooling import MeanPooling
from din_dist.models.ranking_model import OF_HISTORY, RankingModel
from din_dist.models.retrieval_model import RetrievalModel

PAIRS_AT_ONCE = 16_384  # pairs of a candidate with a behaviour or a history that are computed at once
ITEMS_AT_ONCE = 65_536  # items whose vectors are looked up at once
_MAX_HISTORIES = 1024  # histories at once, where there are few candidates
SCORES_BYTES = 256 * 2**20  # memory for the attention scores [K, C]


class Catalogue(Protocol):
    """Scores all items for each history."""

    def logits(
        self,
        history_item_ids: np.ndarray,
        history_lengths: np.ndarray,
        tick: Callable[[float], None] = lambda share: None,
        features: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """Returns the logits of all items for B histories: float32 `[B, I]`. Column i belongs to item i + 1.

        Args:
            history_item_ids: int `[N]`, B histories concatenated.
            history_lengths: int `[B]`.
            tick: called often with the share of the work that is done.
            features: B values of each user and context feature, as of `BehaviourModel.score_candidates`.
        """


def catalogue_of(model: BehaviourModel, num_items: int, task: int = 0) -> Catalogue | None:
    """Returns what scores all items of a model at once; None if its formulas are not known.

    Args:
        model: with the weights that it has now.
        num_items: I, of the catalogue.
        task: the one whose logits are returned.
    """
    if isinstance(model, RetrievalModel):
        return VectorCatalogue(model, num_items)
    if isinstance(model, (DIN, MeanPooling)) and model.num_histories == 1 and not model.side_encodings:
        return CatalogueScorer(model, num_items, task)
    return None


class VectorCatalogue:
    """Logits of the items 1 to `num_items` by one matrix product with their vectors.

    Args:
        model: the model.
        num_items: of the catalogue.
    """

    def __init__(self, model: RetrievalModel, num_items: int) -> None:
        self._model, self._num_items = model, num_items
        firsts = range(1, num_items + 1, ITEMS_AT_ONCE)
        blocks = [model.items(tf.range(first, min(first + ITEMS_AT_ONCE, num_items + 1))) for first in firsts]
        self._vectors = tf.concat(blocks, axis=0)
        ids = tf.TensorSpec([None], tf.int32)
        given = [ids, ids, signature_of(model.encodings) or {}]
        self._users = tf.function(model.users_of, input_signature=given, autograph=False)
        matrix = tf.TensorSpec([None, None, None], tf.float32)
        self._products = tf.function(self._logits_of, input_signature=[matrix], autograph=False)

    def logits(
        self,
        history_item_ids: np.ndarray,
        history_lengths: np.ndarray,
        tick: Callable[[float], None] = lambda share: None,
        features: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        given = {encoding.spec.name: (features or {})[encoding.spec.name] for encoding in self._model.encodings}
        users = self._users(tf.constant(history_item_ids, tf.int32), tf.constant(history_lengths, tf.int32), given)
        found = np.empty((len(history_lengths), self._num_items), np.float32)
        at_once = max(1, SCORES_BYTES // (4 * self._num_items * users.shape[1]))
        for first in range(0, len(found), at_once):
            found[first : first + at_once] = self._products(users[first : first + at_once]).numpy()
            tick(min(1.0, (first + at_once) / len(found)))
        return found

    def _logits_of(self, users: tf.Tensor) -> tf.Tensor:
        """Returns the logits of all items `[B, I]`, given the users' vectors `[B, K, H]`."""
        return self._model.best(tf.einsum("bkh,ih->bik", users, self._vectors))


class CatalogueScorer:
    """Logits of the items 1 to `num_items` for any histories, with the weights that the model has at construction.

    Args:
        model: the model.
        num_items: of the catalogue.
        task: the one whose logits are returned.
    """

    def __init__(self, model: RankingModel, num_items: int, task: int = 0) -> None:
        self._lookup, self._num_items, self._task = model.lookup, num_items, task
        width = model.lookup.width
        (norm,) = model.interest_norms
        scale, offset = norm.affine()
        self._of_behaviour = tf.linalg.diag(scale)  # [H, H]
        self._empty_interest = offset[None]  # the interest of a history without behaviours, `[1, H]`
        for projection in model.interest_projections:
            self._of_behaviour = tf.matmul(self._of_behaviour, projection.kernel.value)
            self._empty_interest = tf.matmul(self._empty_interest, projection.kernel.value) + projection.bias.value

        self._model, self._head, head = model, model.head, model.split_head()
        self._head_bias = head.bias[None]  # [1, D]
        # Candidates of the catalogue were not shown, so they have no features of their own.
        columns = model.example_columns
        none = missing_values(columns.encodings, 1) if columns else None
        if (missing := model.candidate_context(none)) is not None:
            self._head_bias += tf.matmul(missing, head.of_candidate)
        parts = tf.split(head.of_items, head.of_items.shape[0] // width, axis=0)
        self._of_interest, self._of_candidate, *of_product = parts  # [H, D] each
        self._attention: AttentionUnit | None = None
        self._of_product: tf.Tensor | None = None
        match model:
            case DIN():
                self._attention, (self._of_product,) = model.attention, of_product
            case MeanPooling():
                pass
            case _:
                raise TypeError(f"{type(model).__name__}: not known how it scores all items at once")
        matrix = tf.TensorSpec([None, None], tf.float32)
        biases = matrix if model.num_tasks > 1 else tf.TensorSpec([None], tf.float32)
        self._relevance = tf.function(self._relevance_of, input_signature=[matrix, matrix], autograph=False)
        self._score = tf.function(
            self._logits_of,
            input_signature=[matrix, matrix, tf.TensorSpec([None, None], tf.int32), matrix, matrix, matrix, biases],
            autograph=False,
        )

    def logits(
        self,
        history_item_ids: np.ndarray,
        history_lengths: np.ndarray,
        tick: Callable[[float], None] = lambda share: None,
        features: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """Returns what `Catalogue.logits` does."""
        terms = self._model.history_terms(features)  # [B, D]
        behaviour_ids, index = np.unique(history_item_ids, return_inverse=True)
        behaviours, _ = self._lookup(tf.constant(behaviour_ids, tf.int32))  # [K, H]
        by_behaviour = self._by_behaviour(behaviours)
        logits = np.empty((len(history_lengths), self._num_items), np.float32)
        num_candidates = max(1, min(PAIRS_AT_ONCE, SCORES_BYTES // (4 * max(len(behaviour_ids), 1))))
        at_once = min(_MAX_HISTORIES, max(1, PAIRS_AT_ONCE // min(num_candidates, self._num_items)))
        groups = list(_groups_of_similar_length(index.reshape(-1), history_lengths, at_once))
        firsts = range(0, self._num_items, num_candidates)
        for number, first in enumerate(firsts):
            end = min(first + num_candidates, self._num_items)
            candidates, biases = self._lookup(tf.range(first + 1, end + 1))  # [C, H], [C]

            def scored(share: float, blocks_done: int = number) -> None:
                tick((blocks_done + share / 2) / len(firsts))

            scores = self._scores(behaviours, candidates, scored)
            by_candidate = self._by_candidate(candidates)
            for group, (histories, rectangle) in enumerate(groups):
                own_terms = tf.zeros([0, 0]) if terms is None else tf.gather(terms, histories)
                found = self._score(scores, by_behaviour, rectangle, own_terms, candidates, by_candidate, biases)
                logits[histories, first:end] = found.numpy()
                tick((number + 1 / 2 + (group + 1) / (2 * len(groups))) / len(firsts))
        return logits

    def _by_behaviour(self, behaviours: tf.Tensor) -> tf.Tensor:
        """Returns the vector of each behaviour that is pooled, `[K, D]` or `[K, D + H]`.

        It holds the behaviour's share of the head's first layer, which no candidate changes. Where the head multiplies
        interest and candidate, the behaviour's share of the interest follows.
        """
        interests = tf.matmul(behaviours, self._of_behaviour)
        by_behaviour = tf.matmul(interests, self._of_interest)
        return by_behaviour if self._of_product is None else tf.concat([by_behaviour, interests], axis=1)

    def _by_candidate(self, candidates: tf.Tensor) -> tf.Tensor:
        """Returns each candidate's share of the head's first layer, which no history changes: `[C, D]`."""
        empty = self._empty_interest
        by_candidate = tf.matmul(candidates, self._of_candidate) + self._head_bias + tf.matmul(empty, self._of_interest)
        if self._of_product is not None:
            by_candidate += tf.matmul(empty * candidates, self._of_product)
        return by_candidate

    def _scores(self, behaviours: tf.Tensor, candidates: tf.Tensor, tick: Callable[[float], None]) -> tf.Tensor:
        """Returns the attention scores `[K, C]`, or an empty tensor if the model has no attention.

        Args:
            behaviours: float32 `[K, H]`.
            candidates: float32 `[C, H]`.
            tick: called with the share of the scores that is done.
        """
        if self._attention is None:
            return tf.zeros([0, 0])
        chunks = [tf.zeros([0, candidates.shape[0]])]
        each = max(1, PAIRS_AT_ONCE // candidates.shape[0])
        for first in range(0, behaviours.shape[0], each):
            chunks.append(self._relevance(behaviours[first : first + each], candidates))
            tick(min(1.0, (first + each) / behaviours.shape[0]))
        return tf.concat(chunks, axis=0)

    def _relevance_of(self, behaviours: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
        if not isinstance(self._attention, LocalActivationUnit):
            return tf.matmul(behaviours, candidates, transpose_b=True)
        scorer = self._attention.scorer
        first = scorer.dense_layers[0]
        of_candidate, of_behaviour, of_difference, of_product = tf.split(first.kernel.value, 4, axis=0)
        kernels = (of_candidate + of_difference)[None] + behaviours[:, :, None] * of_product[None]  # [K, H, D]
        by_behaviour = tf.matmul(behaviours, of_behaviour - of_difference) + first.bias.value  # [K, D]
        projected = tf.matmul(candidates[None], kernels) + by_behaviour[:, None, :]  # [K, C, D]
        scores = scorer.after_first(tf.reshape(projected, [-1, first.units]))
        return tf.reshape(scores, [tf.shape(behaviours)[0], tf.shape(candidates)[0]])

    def _logits_of(
        self,
        scores: tf.Tensor,
        by_behaviour: tf.Tensor,
        rectangle: tf.Tensor,
        terms: tf.Tensor,
        candidates: tf.Tensor,
        by_candidate: tf.Tensor,
        biases: tf.Tensor,
    ) -> tf.Tensor:
        """Returns the logits of a group of G histories, `[G, C]`.

        Args:
            scores: float32 `[K, C]`, as from `_scores`.
            by_behaviour: float32 `[K, D]` or `[K, D + H]`.
            rectangle: int32 `[G, T]`, indices of behaviours, padded by -1.
            terms: float32 `[G, D]`, the share of user and context features; `[0, 0]` without such features.
            candidates: float32 `[C, H]`.
            by_candidate: float32 `[C, D]`.
            biases: float32 `[C]`, or `[C, T]` of T tasks.
        """
        real = rectangle[:, :, None] >= 0  # [G, T, 1]
        index = tf.maximum(rectangle, 0)
        if self._attention is None:
            lengths = tf.reduce_sum(tf.cast(real, tf.float32), axis=1, keepdims=True)
            weights = tf.cast(real, tf.float32) / tf.maximum(lengths, 1.0)  # [G, T, 1]
        else:
            weights = tf.gather(scores, index)  # [G, T, C]
            if self._attention.normalization is AttentionNormalization.SOFTMAX:
                scaled = weights / self._attention.scale(self._lookup.width)
                weights = tf.nn.softmax(tf.where(real, scaled, scaled.dtype.min), axis=1)
            weights = tf.where(real, weights, 0.0)
        pooled = tf.matmul(weights, tf.gather(by_behaviour, index), transpose_a=True)  # [G, C or 1, D or D + H]
        units = self._head_bias.shape[1]
        projected = pooled[:, :, :units] + by_candidate
        if any(encoding.spec.owner in OF_HISTORY for encoding in self._model.encodings):
            projected += terms[:, None]
        if self._of_product is not None:
            projected += tf.matmul(pooled[:, :, units:] * candidates, self._of_product)
        outputs = self._head.after_first(tf.reshape(projected, [-1, units]))
        shape = tf.concat([[tf.shape(rectangle)[0]], tf.shape(biases)], axis=0)
        with_biases = tf.reshape(outputs, shape) + biases
        combined = self._head.combined(tf.reshape(with_biases, tf.shape(outputs)))
        return tf.reshape(self._model.of_task(combined, self._task), shape[:2])


def _groups_of_similar_length(
    index: np.ndarray, lengths: np.ndarray, at_once: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields groups of histories by ascending length, so that rectangles need little padding.

    Each group is a pair: the numbers of its histories, int `[G]`, and their behaviours, int32 `[G, T]`, padded by -1.
    """
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(lengths, kind="stable")
    for first in range(0, len(order), at_once):
        histories = order[first : first + at_once]
        columns = np.arange(lengths[histories].max(initial=0))
        real = columns < lengths[histories, None]
        rectangle = np.full(real.shape, -1, np.int32)
        rectangle[real] = index[(starts[histories, None] + columns)[real]]
        yield histories, rectangle
