"""The signatures of a SavedModel: functions from the log's own ids to logits.

Letters of shapes, in addition to those of `schema`: C candidates of all histories; T positions of one history; M items
of a request, U distinct ones among them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import tensorflow as tf

from din_dist import schema
from din_dist.layers.packed import segment_ids
from din_dist.layers.pairs import Pairs
from din_dist.models.ranking_model import LookedUp, RankingModel
from din_dist.serving.export.vocabulary import IdTable

Outputs = dict[str, tf.Tensor]

HISTORY, LENGTHS, CANDIDATES = "history_item_ids", "history_lengths", "candidate_item_ids"
COUNTS = "candidate_counts"
BY_ITEM_ID = {tf.string: "", tf.int64: tf.int64.min}  # a feature with this value is looked up by the item id

PAIRS_AT_ONCE = 1 << 18  # (candidate, history position) pairs of `rank`: about 0.5 GB at width 128
_CANDIDATE_COST = 8  # a candidate takes the memory of this many pairs, in addition to those with its history


class Items(NamedTuple):
    """The items of a request, each distinct one looked up once."""

    vectors: tf.Tensor  # [U, H]
    biases: tf.Tensor  # [U]
    index: tf.Tensor  # int32 [M], the index of each of the request's items among the distinct ones


class Signatures:
    """Functions of a trained model that take the log's own ids.

    Args:
        model: the trained model.
        item_ids: the log's ids of all items, in the order of the dense ids.
        feature_ids: name of an item feature -> the ids of its values, in the order of the dense ids.
        max_history_length: the number of newest behaviours that the model reads.
        folder: for the files of the vocabularies, which are needed until the SavedModel is written.
    """

    def __init__(
        self,
        model: RankingModel,
        item_ids: pa.ChunkedArray,
        feature_ids: Mapping[str, pa.ChunkedArray],
        max_history_length: int,
        folder: Path,
    ) -> None:
        self._model, self._max_history_length = model, max_history_length
        self._items = IdTable(item_ids, folder / "item_ids.txt")
        self._features = {
            name: IdTable(ids, folder / f"feature_{number}.txt")
            for number, (name, ids) in enumerate(feature_ids.items())
        }
        lookup = model.lookup
        self._tables = [_named_to_save(table.value) for table in lookup.tables]
        # Variables, because constants would be part of the graph, which is limited to 2 GB.
        self._feature_of_item = [_variable(lookup.item_features[name]) for name in feature_ids]
        self._row_of_item = None if lookup.row_of_item is None else _variable(lookup.row_of_item)

    def save(self, folder: Path) -> None:
        """Writes the SavedModel to `folder`."""
        root = tf.Module()  # tracks what the functions use: of the model only the weights
        tables = {id(table) for table in self._model.lookup.tables}
        root.weights = [weight.value for weight in self._model.weights if id(weight) not in tables]
        root.tables = self._tables
        root.feature_of_item, root.row_of_item = self._feature_of_item, self._row_of_item
        root.vocabularies = [self._items, *self._features.values()]
        tf.saved_model.save(root, str(folder), signatures=self._functions())

    def _functions(self) -> dict[str, Callable]:
        ids = self._items.dtype
        flat, lengths = tf.TensorSpec([None], ids), tf.TensorSpec([None], tf.int64)
        packed = {HISTORY: flat, LENGTHS: lengths, CANDIDATES: flat}
        one_history = {HISTORY: flat, CANDIDATES: flat, "k": tf.TensorSpec([], tf.int64)}
        features = {
            f"{side}_{name}": tf.TensorSpec([None], self._features[feature].dtype)
            for feature, name in input_names(list(self._features)).items()
            for side in ("history", "candidate")
        }
        functions: dict[str, tuple[Callable[..., Outputs], dict[str, tf.TensorSpec]]] = {
            "score": (self.score, packed),
            "score_padded": (self.score_padded, packed | {HISTORY: tf.TensorSpec([None, None], ids)}),
            "rank": (self.rank, one_history),
            "rank_histories": (self.rank_histories, packed | {COUNTS: lengths}),
            "embed_items": (self.embed_items, {"item_ids": flat}),
        }
        if features:
            functions["score_with_features"] = (self.score, packed | features)
            functions["rank_with_features"] = (self.rank, one_history | features)
        traced = {name: _traced(function, inputs) for name, (function, inputs) in functions.items()}
        return {tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY: traced["score"], **traced}

    def score(
        self,
        history_item_ids: tf.Tensor,
        history_lengths: tf.Tensor,
        candidate_item_ids: tf.Tensor,
        **features: tf.Tensor,
    ) -> Outputs:
        """Returns the logits `[B]` of one candidate for each of B histories.

        Args:
            history_item_ids: `[N]`, the histories concatenated.
            history_lengths: int64 `[B]`.
            candidate_item_ids: `[B]`.
            features: inputs of `input_names`; none: all features are looked up by the item id.
        """
        given_of_history, given_of_candidate = self._given(features, history_item_ids, candidate_item_ids)
        history_lengths = _of_same_size(history_lengths, candidate_item_ids, LENGTHS, CANDIDATES)
        window, lengths = self._newest(history_item_ids, history_lengths)
        num_candidates = tf.size(candidate_item_ids)
        items = self._find(
            tf.concat([candidate_item_ids, window(history_item_ids)], axis=0),
            [
                tf.concat([candidate, window(history)], axis=0)
                for candidate, history in zip(given_of_candidate, given_of_history, strict=True)
            ],
        )
        candidate_index = items.index[:num_candidates]
        looked_up = LookedUp(
            tf.gather(items.vectors, candidate_index), tf.gather(items.biases, candidate_index), items.vectors
        )
        pairs = Pairs(segment_ids(lengths), items.index[num_candidates:])
        return _with_probability(self._model.logits(looked_up, pairs))

    def score_padded(
        self, history_item_ids: tf.Tensor, history_lengths: tf.Tensor, candidate_item_ids: tf.Tensor
    ) -> Outputs:
        """Returns the logits `[B]` of one candidate for each of B padded histories.

        Args:
            history_item_ids: `[B, T]`.
            history_lengths: int64 `[B]`, the real part of each row.
            candidate_item_ids: `[B]`.
        """
        shape = tf.shape(history_item_ids, tf.int64)
        fits = tf.equal(shape[0], tf.size(history_lengths, tf.int64)) & tf.reduce_all(
            (history_lengths >= 0) & (history_lengths <= shape[1])
        )
        rule = "history_lengths must be one a row of history_item_ids, from 0 to its width. Received:"
        with tf.control_dependencies([tf.Assert(fits, [rule, history_lengths, "for the shape", shape])]):
            real = tf.sequence_mask(history_lengths, shape[1])
        return self.score(tf.boolean_mask(history_item_ids, real), history_lengths, candidate_item_ids)

    def rank(
        self, history_item_ids: tf.Tensor, candidate_item_ids: tf.Tensor, k: tf.Tensor, **features: tf.Tensor
    ) -> Outputs:
        """Returns the best of C candidates for one history, best first: `[min(k, C)]`.

        Args:
            history_item_ids: `[T]`.
            candidate_item_ids: `[C]`.
            k: int64 scalar, the most candidates to return.
            features: inputs of `input_names`; none: all features are looked up by the item id.
        """
        num_candidates = tf.size(candidate_item_ids, tf.int64)
        with tf.control_dependencies([tf.Assert(k >= 0, ["k must be 0 or more. Received:", k])]):
            wanted = tf.cast(tf.minimum(k, num_candidates), tf.int32)
        logits = self._rank(
            history_item_ids,
            tf.size(history_item_ids, tf.int64)[None],
            candidate_item_ids,
            num_candidates[None],
            *self._given(features, history_item_ids, candidate_item_ids),
        )
        best, index = tf.math.top_k(logits, wanted)  # ties keep their order
        outputs = _with_probability(best)
        return {"item_ids": tf.gather(candidate_item_ids, index), "places": tf.cast(index, tf.int64), **outputs}

    def rank_histories(
        self,
        history_item_ids: tf.Tensor,
        history_lengths: tf.Tensor,
        candidate_item_ids: tf.Tensor,
        candidate_counts: tf.Tensor,
    ) -> Outputs:
        """Returns the logits `[C]` of any number of candidates for each of B histories.

        Args:
            history_item_ids: `[N]`, the histories concatenated.
            history_lengths: int64 `[B]`.
            candidate_item_ids: `[C]`, the candidates of all histories concatenated.
            candidate_counts: int64 `[B]`, the number of each history's candidates.
        """
        history_lengths = _of_same_size(history_lengths, candidate_counts, LENGTHS, COUNTS)
        return _with_probability(
            self._rank(history_item_ids, history_lengths, candidate_item_ids, candidate_counts, (), ())
        )

    def embed_items(self, item_ids: tf.Tensor) -> Outputs:
        """Returns the vectors `[M, H]` of items `[M]`, and `known` `[M]`, true for items of the vocabulary."""
        items = self._find(item_ids, ())
        known = tf.not_equal(self._items.dense_ids(item_ids), schema.UNKNOWN_ID)
        return {"embeddings": tf.gather(items.vectors, items.index), "known": known}

    def _rank(
        self,
        history_item_ids: tf.Tensor,
        history_lengths: tf.Tensor,
        candidate_item_ids: tf.Tensor,
        candidate_counts: tf.Tensor,
        given_of_history: Sequence[tf.Tensor],
        given_of_candidate: Sequence[tf.Tensor],
    ) -> tf.Tensor:
        """Returns the logits `[C]`, computed in parts of the candidates, so that memory stays bounded.

        A part reads only its own histories, and projects each of their distinct behaviours once.
        """
        counts = _checked_lengths(candidate_counts, candidate_item_ids, COUNTS, CANDIDATES)
        window, lengths = self._newest(history_item_ids, history_lengths)
        behaviours = self._find(window(history_item_ids), [window(feature) for feature in given_of_history])
        candidates = self._find(candidate_item_ids, given_of_candidate)
        history_of = segment_ids(counts)  # [C]
        starts = tf.gather(tf.cumsum(lengths, exclusive=True), history_of)
        ends = starts + tf.gather(lengths, history_of)
        costs = tf.cumsum(tf.cast(ends - starts + _CANDIDATE_COST, tf.int64))
        num_parts = tf.reduce_max(tf.concat([costs, [1]], axis=0) - 1) // PAIRS_AT_ONCE + 1
        bounds = tf.searchsorted((costs - 1) // PAIRS_AT_ONCE, tf.range(num_parts + 1))
        positions_from, positions_to = tf.concat([starts, [0]], axis=0), tf.concat([[0], ends], axis=0)

        def score_part(part: tf.Tensor, logits: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
            low, high = bounds[part], bounds[part + 1]
            first_position = positions_from[low]
            distinct, index = tf.unique(behaviours.index[first_position : positions_to[high]])
            firsts, ends_of_part = starts[low:high] - first_position, ends[low:high] - first_position
            candidate_index = candidates.index[low:high]
            looked_up = LookedUp(
                tf.gather(candidates.vectors, candidate_index),
                tf.gather(candidates.biases, candidate_index),
                tf.gather(behaviours.vectors, distinct),
            )
            behaviour_of = tf.gather(index, tf.ragged.range(firsts, ends_of_part).values)
            found = self._model.logits(looked_up, Pairs(segment_ids(ends_of_part - firsts), behaviour_of))
            return part + 1, logits.write(tf.cast(part, tf.int32), found)

        logits = tf.TensorArray(tf.float32, tf.cast(num_parts, tf.int32), element_shape=[None], infer_shape=False)
        none_yet = tf.constant(0, tf.int64)
        _, logits = tf.while_loop(
            lambda part, _: part < num_parts, score_part, [none_yet, logits], parallel_iterations=1
        )
        return logits.concat()

    def _find(self, ids: tf.Tensor, given: Sequence[tf.Tensor]) -> Items:
        """Looks items up by their ids alone, or also by given features.

        Args:
            ids: `[M]`, the log's own.
            given: the value of each item feature, `[M]` each, or nothing.
        """
        dense_ids = self._items.dense_ids(ids)
        if not given:
            distinct, index = tf.unique(dense_ids)
            features = [tf.gather(of_item, distinct) for of_item in self._feature_of_item]
            return self._look_up(self._rows(distinct), features, index)
        rows = self._rows(dense_ids)
        features = [
            tf.where(
                tf.equal(values, BY_ITEM_ID[vocabulary.dtype]),
                tf.gather(of_item, dense_ids),
                vocabulary.dense_ids(values),
            )
            for values, vocabulary, of_item in zip(given, self._features.values(), self._feature_of_item, strict=True)
        ]
        _, index = tf.unique(rows)
        for table, feature in zip(self._tables[1:], features, strict=True):
            combined = tf.cast(index, tf.int64) * table.shape[0] + tf.cast(feature, tf.int64)
            _, index = tf.unique(combined)
        num_distinct = tf.reduce_max(tf.concat([index, [-1]], axis=0)) + 1
        firsts = tf.math.unsorted_segment_min(tf.range(tf.size(index)), index, num_distinct)
        return self._look_up(tf.gather(rows, firsts), [tf.gather(feature, firsts) for feature in features], index)

    def _look_up(self, rows: tf.Tensor, features: Sequence[tf.Tensor], index: tf.Tensor) -> Items:
        """Looks up distinct items as `LocalLookup` does, but without its provisions for gradients.

        Args:
            rows: int32 `[U]`, rows of the item table.
            features: int32 `[U]` each, rows of the tables of the item features.
            index: int32 `[M]`, the index of each of the request's items among the distinct ones.
        """
        parts = [tf.gather(table, ids) for table, ids in zip(self._tables, [rows, *features], strict=True)]
        biases = tf.squeeze(tf.gather(self._model.lookup.item_bias.value, rows), axis=1)
        return Items(tf.concat(parts, axis=1), biases, index)

    def _rows(self, dense_ids: tf.Tensor) -> tf.Tensor:
        """Returns the row of the item table of each dense id."""
        return dense_ids if self._row_of_item is None else tf.gather(self._row_of_item, dense_ids)

    def _newest(
        self, history_item_ids: tf.Tensor, history_lengths: tf.Tensor
    ) -> tuple[Callable[[tf.Tensor], tf.Tensor], tf.Tensor]:
        """Cuts histories to the newest behaviours, as many as the model reads.

        Returns:
            A function that keeps, of values `[N]`, those of the newest positions; their number, int32 `[B]`.
        """
        lengths = _checked_lengths(history_lengths, history_item_ids, LENGTHS, HISTORY)
        kept = tf.minimum(lengths, self._max_history_length)
        ends = tf.cumsum(lengths)
        all_short = tf.reduce_all(tf.equal(kept, lengths))

        def window(values: tf.Tensor) -> tf.Tensor:
            return tf.cond(
                all_short,
                lambda: values,
                lambda: tf.gather(values, tf.ragged.range(ends - kept, ends).values),
            )

        return window, kept

    def _given(
        self, features: Mapping[str, tf.Tensor], history_item_ids: tf.Tensor, candidate_item_ids: tf.Tensor
    ) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """Returns the given features of histories and of candidates, in the order of the tables; empty if none are."""
        if not features:
            return [], []

        def of(side: str, ids: tf.Tensor) -> list[tf.Tensor]:
            names = [f"{side}_{name}" for name in input_names(list(self._features)).values()]
            return [_of_same_size(features[name], ids, name, f"{side}_item_ids") for name in names]

        return of("history", history_item_ids), of("candidate", candidate_item_ids)


def input_names(features: Sequence[str]) -> dict[str, str]:
    """Returns, for each item feature, the NAME in the names of its inputs, such as `history_NAME`.

    It is the feature's own name if TensorFlow allows it and no other input has it; otherwise a number is used.
    """
    taken = {"item_ids", "lengths", "counts"}
    names = {}
    for feature in features:
        if re.fullmatch("[A-Za-z0-9_]+", feature) and feature.lower() not in taken:  # TensorFlow's rules
            taken.add(feature.lower())
            names[feature] = feature
    for number, feature in enumerate(features):
        if feature not in names:
            name = f"feature_{number}"
            while name in taken:
                name += "_"
            taken.add(name)
            names[feature] = name
    return {feature: names[feature] for feature in features}


def _checked_lengths(lengths: tf.Tensor, values: tf.Tensor, lengths_name: str, values_name: str) -> tf.Tensor:
    """Returns the lengths as int32, and asserts that they add up to the number of `values`."""
    num_values = tf.size(values, tf.int64)
    fits = tf.reduce_all((lengths >= 0) & (lengths <= num_values)) & tf.equal(tf.reduce_sum(lengths), num_values)
    rule = f"{lengths_name} must not be negative and must add up to the number of {values_name}. Received:"
    with tf.control_dependencies([tf.Assert(fits, [rule, lengths, "for", num_values])]):
        return tf.cast(lengths, tf.int32)


def _of_same_size(values: tf.Tensor, ids: tf.Tensor, name: str, ids_name: str) -> tf.Tensor:
    fits = tf.equal(tf.size(values), tf.size(ids))
    rule = f"{name} and {ids_name} must be as many. Received:"
    with tf.control_dependencies([tf.Assert(fits, [rule, tf.size(values), tf.size(ids)])]):
        return tf.identity(values)


def _with_probability(logits: tf.Tensor) -> Outputs:
    return {"logits": logits, "click_probability": tf.sigmoid(logits)}


def _named_to_save(table: tf.Variable) -> tf.Variable:
    """Returns the table, or a copy with another name if TensorFlow cannot save its name.

    A table is named after its item feature, in any language, but TensorFlow saves plain names only.
    """
    return table if re.fullmatch(r"[A-Za-z0-9.][A-Za-z0-9_./-]*(:0)?", table.name) else _variable(table)


def _variable(values: tf.Tensor) -> tf.Variable:
    return tf.Variable(values, trainable=False)


def _traced(function: Callable[..., Outputs], inputs: Mapping[str, tf.TensorSpec]) -> Callable:
    specs = {name: tf.TensorSpec(spec.shape, spec.dtype, name) for name, spec in inputs.items()}
    return tf.function(functools.partial(function), autograph=False).get_concrete_function(**specs)
