"""The signatures of models that rank given candidates.

Letters of shapes, in addition to those of `schema`: C candidates of all histories; R items that are retrieved for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from din_dist.features.sides import distinct_sides
from din_dist.features.spec import Owner
from din_dist.layers.packed import segment_ids
from din_dist.layers.spans import Positions, Span, spans_of
from din_dist.models.behaviour_model import Sides
from din_dist.models.ranking_model import OF_CANDIDATE, OF_HISTORY, LookedUp, RankingModel
from din_dist.serving.asked import NEAREST, RECOMMEND
from din_dist.serving.export.retriever import Retriever
from din_dist.serving.export.signatures import (
    ASKED,
    CANDIDATES,
    COUNTS,
    LENGTHS,
    Function,
    Outputs,
    Signatures,
    calibrated,
    checked_lengths,
    of_same_size,
)
from din_dist.serving.given_behaviours import NAMES

PAIRS_AT_ONCE = 1 << 18  # (candidate, history position) pairs of `rank`: about 0.5 GB at width 128
_CANDIDATE_COST = 8  # a candidate takes the memory of this many pairs, in addition to those with its history


class RankingSignatures(Signatures):
    """Functions of a model that ranks given candidates.

    Args:
        model: the trained model.
        arguments: the others, as of `Signatures`.
        retriever: finds the candidates of `recommend`. None: there is no such function.
    """

    _model: RankingModel

    def __init__(self, model: RankingModel, *arguments: Any, retriever: Retriever | None = None) -> None:
        super().__init__(model, *arguments)
        self._retriever = retriever

    def _more_functions(self) -> dict[str, Function]:
        if self._retriever is None:
            return {}
        asking = self._users_inputs | ASKED
        return {
            NEAREST: (self.nearest, asking),
            RECOMMEND: (self.recommend, {**asking, "num_retrieved": tf.TensorSpec([], tf.int64)}),
        }

    def _more_resources(self) -> list:
        return [self._retriever] if self._retriever else []

    def score(
        self,
        history_item_ids: tf.Tensor,
        history_lengths: tf.Tensor,
        candidate_item_ids: tf.Tensor,
        **features: tf.Tensor,
    ) -> Outputs:
        """Returns what `Signatures.score` does, from one pass over all pairs."""
        given_of_history, given_of_candidate = self._given(features, history_item_ids, candidate_item_ids)
        history_lengths = of_same_size(history_lengths, candidate_item_ids, LENGTHS, CANDIDATES)
        window, lengths = self._newest(history_item_ids, history_lengths, features.get(NAMES))
        num_candidates = tf.size(candidate_item_ids)
        items = self._items.find(
            tf.concat([candidate_item_ids, window(history_item_ids)], axis=0),
            [
                tf.concat([candidate, window(history)], axis=0)
                for candidate, history in zip(given_of_candidate, given_of_history, strict=True)
            ],
        )
        candidate_index = items.index[:num_candidates]
        looked_up = LookedUp(
            tf.gather(items.vectors, candidate_index),
            tf.gather(items.biases, candidate_index),
            items.vectors,
            context=self._columns_of(features, tuple(Owner), num_candidates, "candidate"),
        )
        side_of = None
        if (sides := self._sides_of(features, tf.size(history_item_ids), window)) is not None:
            looked_up, side_of = looked_up._replace(sides=self._model.sides(sides.values)), sides.index
        if not any(history.feature for history in self._histories):
            all_pairs = self._model.pairs(lengths, items.index[num_candidates:], side_of=side_of)
        else:
            of_candidates = {name: tf.gather(ids, candidate_index) for name, ids in items.features.items()}
            users = tf.range(num_candidates)
            positions = Positions(items.index[num_candidates:], side_of)
            spans = spans_of(self._histories, lengths, positions, items.features, users, of_candidates)
            all_pairs = [span.pairs() for span in spans]
        return self._with_probability(self._model.logits(looked_up, all_pairs))

    def nearest(
        self,
        history_item_ids: tf.Tensor,
        history_lengths: tf.Tensor,
        k: tf.Tensor,
        exclude_history: tf.Tensor,
        **features: tf.Tensor,
    ) -> Outputs:
        """Returns what the retriever finds, in its order; see `RetrievalSignatures.nearest`."""
        assert self._retriever is not None
        return self._retriever.nearest(history_item_ids, history_lengths, k, exclude_history, features)

    def recommend(
        self,
        history_item_ids: tf.Tensor,
        history_lengths: tf.Tensor,
        k: tf.Tensor,
        num_retrieved: tf.Tensor,
        exclude_history: tf.Tensor,
        **features: tf.Tensor,
    ) -> Outputs:
        """Returns the best items for each of B users, best first, of those that the retriever finds.

        The outputs are those of `score`, `[B, min(k, R)]`, with `item_ids`. `counts` `[B]` tells how many there are of
        each user; the rest of a row is filled up with "", or the smallest int64, logits of minus infinity and
        probabilities of 0. Features of candidates are missing.

        Args:
            history_item_ids: `[N]`, the histories concatenated.
            history_lengths: int64 `[B]`.
            k: int64 scalar, the most items to return.
            num_retrieved: int64 scalar, R, the items to retrieve and rank.
            exclude_history: bool scalar; leave out the items of the history that the retriever reads.
            features: as of `score`, without those of candidates.
        """
        assert self._retriever is not None
        found = self._retriever.nearest(history_item_ids, history_lengths, num_retrieved, exclude_history, features)
        with tf.control_dependencies([tf.Assert(k >= 0, ["k must be 0 or more. Received:", k])]):
            wanted = tf.cast(tf.minimum(k, tf.shape(found["item_ids"], tf.int64)[1]), tf.int32)
        real = tf.sequence_mask(found["counts"], tf.shape(found["item_ids"])[1])
        candidates = tf.boolean_mask(found["item_ids"], real)
        own = features | self._examples.missing(Owner.CANDIDATE, tf.size(candidates))
        logits = self._rank(history_item_ids, history_lengths, candidates, found["counts"], own)
        positions = tf.where(real)  # [C, 2]

        def in_rows(values: tf.Tensor, missing: float) -> tf.Tensor:
            rows = tf.fill(tf.shape(real), tf.constant(missing, values.dtype))
            return tf.tensor_scatter_nd_update(rows, positions, values)

        _, places = tf.math.top_k(in_rows(self._predictions.ranking(logits), -np.inf), wanted)
        outputs = {"item_ids": tf.gather(found["item_ids"], places, batch_dims=1)}
        for label, own_logits in self._predictions.columns(logits):
            probabilities = tf.sigmoid(calibrated(own_logits, label.calibrator))
            outputs[label.logits] = tf.gather(in_rows(own_logits, -np.inf), places, batch_dims=1)
            outputs[label.probability] = tf.gather(in_rows(probabilities, 0.0), places, batch_dims=1)
        return outputs | {"counts": tf.minimum(found["counts"], tf.cast(wanted, tf.int64))}

    def _rank(
        self,
        history_item_ids: tf.Tensor,
        history_lengths: tf.Tensor,
        candidate_item_ids: tf.Tensor,
        candidate_counts: tf.Tensor,
        features: Mapping[str, tf.Tensor],
    ) -> tf.Tensor:
        """Returns the logits, `[C]` or `[C, T]`, computed in parts of the candidates, so that memory stays bounded.

        A part reads only its own histories, and projects each of their distinct behaviours once. User and context
        columns go through the head's first layer once a history.
        """
        given_of_history, given_of_candidate = self._given(features, history_item_ids, candidate_item_ids)
        counts = checked_lengths(candidate_counts, candidate_item_ids, COUNTS, CANDIDATES)
        window, lengths = self._newest(history_item_ids, history_lengths, features.get(NAMES))
        behaviours = self._items.find(window(history_item_ids), [window(feature) for feature in given_of_history])
        candidates = self._items.find(candidate_item_ids, given_of_candidate)
        terms = self._columns_of(features, OF_HISTORY, tf.size(counts), "history")
        if terms is not None:
            terms = tf.matmul(terms, self._model.split_head().of_history)
        context = self._columns_of(features, OF_CANDIDATE, tf.size(candidate_item_ids), "candidate")
        history_of = segment_ids(counts)  # [C]
        of_candidates = {name: tf.gather(ids, candidates.index) for name, ids in candidates.features.items()}
        sides = self._sides_of(features, tf.size(history_item_ids), window)
        side_rows = None if sides is None else self._model.sides(sides.values)
        positions = Positions(behaviours.index, None if sides is None else sides.index)
        spans = spans_of(self._histories, lengths, positions, behaviours.features, history_of, of_candidates)
        num_parts, bounds = _parts_of(spans)

        def score_part(part: tf.Tensor, logits: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
            low, high = bounds[part], bounds[part + 1]
            own_spans = [span.part(low, high) for span in spans]
            own = [span.positions.behaviour_of for span in own_spans]
            distinct, index = tf.unique(tf.concat(own, axis=0))
            candidate_index = candidates.index[low:high]
            looked_up = LookedUp(
                tf.gather(candidates.vectors, candidate_index),
                tf.gather(candidates.biases, candidate_index),
                tf.gather(behaviours.vectors, distinct),
                context=None if context is None else context[low:high],
                history_terms=None if terms is None else tf.gather(terms, history_of[low:high]),
                sides=side_rows,
            )
            all_pairs, before = [], tf.constant(0)
            for span in own_spans:
                behind = before + tf.size(span.positions.behaviour_of)
                again = span.positions._replace(behaviour_of=index[before:behind])
                all_pairs.append(span._replace(positions=again).pairs())
                before = behind
            found = self._model.logits(looked_up, all_pairs)
            return part + 1, logits.write(tf.cast(part, tf.int32), found)

        shape = [None, self._model.num_tasks] if self._model.num_tasks > 1 else [None]
        logits = tf.TensorArray(tf.float32, tf.cast(num_parts, tf.int32), element_shape=shape, infer_shape=False)
        none_yet = tf.constant(0, tf.int64)
        _, logits = tf.while_loop(
            lambda part, _: part < num_parts, score_part, [none_yet, logits], parallel_iterations=1
        )
        return logits.concat()

    def _sides_of(
        self, features: Mapping[str, tf.Tensor], num_positions: tf.Tensor, window: Callable[[tf.Tensor], tf.Tensor]
    ) -> Sides | None:
        """Returns the side information of the behaviours that are read; None if the model reads none.

        Args:
            features: the inputs.
            num_positions: int32, of the behaviours that are given.
            window: as of `_newest`.
        """
        if not self._sides.specs:
            return None
        found = self._sides.encode(features, (Owner.HISTORY,), num_positions, "behaviour")
        return Sides(*distinct_sides({name: window(rows) for name, rows in found.items()}))


def _parts_of(spans: Sequence[Span]) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns how many parts the candidates are scored in, and where each begins, int64 `[parts + 1]`."""
    num_positions = tf.add_n([span.ends - span.starts for span in spans])
    costs = tf.cumsum(tf.cast(num_positions + _CANDIDATE_COST, tf.int64))
    num_parts = tf.reduce_max(tf.concat([costs, [1]], axis=0) - 1) // PAIRS_AT_ONCE + 1
    return num_parts, tf.searchsorted((costs - 1) // PAIRS_AT_ONCE, tf.range(num_parts + 1))
