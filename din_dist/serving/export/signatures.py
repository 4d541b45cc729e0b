"""The signatures of a SavedModel: functions from the log's own ids to logits.

Letters of shapes, in addition to those of `schema`: C candidates of all histories; T positions of one history; M items
of a request, U distinct ones among them.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import tensorflow as tf

from din_dist import schema
from din_dist.features.encoding import StoredFeature
from din_dist.features.spec import Form, Owner
from din_dist.layers.packed import segment_ids
from din_dist.models.behaviour_model import BehaviourModel
from din_dist.schema import NamedHistory
from din_dist.serving.calibrator import Calibrate, Calibrator
from din_dist.serving.export.columns import ExportedColumns
from din_dist.serving.export.features import Declared, ExampleInputs, encoder_of, input_names
from din_dist.serving.export.items import ItemLookup
from din_dist.serving.given_behaviours import NAMES
from din_dist.serving.predictions import Predictions

Outputs = dict[str, tf.Tensor]

HISTORY, LENGTHS, CANDIDATES = "history_item_ids", "history_lengths", "candidate_item_ids"
COUNTS = "candidate_counts"
# The inputs of a request for items, besides users.
ASKED = {"k": tf.TensorSpec([], tf.int64), "exclude_history": tf.TensorSpec([], tf.bool)}
Function = tuple[Callable[..., Outputs], dict[str, tf.TensorSpec]]  # with its inputs


class Signatures(abc.ABC):
    """Functions of a trained model that take the log's own ids.

    Args:
        model: the trained model.
        item_ids: the log's ids of all items, in the order of the dense ids.
        feature_ids: name of an item feature -> the ids of its values, in the order of the dense ids.
        histories: those that the model reads; "" names the only one.
        folder: for the files of the vocabularies, which are needed until the SavedModel is written.
        declared: the declared features by name. None: there are none.
        predictions: the labels that are predicted. None: a click, whose probability is the sigmoid of its logit.
    """

    def __init__(
        self,
        model: BehaviourModel,
        item_ids: pa.ChunkedArray,
        feature_ids: Mapping[str, pa.ChunkedArray],
        histories: Sequence[NamedHistory],
        folder: Path,
        declared: Mapping[str, Declared] | None = None,
        predictions: Predictions | None = None,
    ) -> None:
        self._predictions = predictions or Predictions()
        self._model, self._histories = model, tuple(histories)
        declared = declared or {}
        self._items = ItemLookup(model.lookup, item_ids, feature_ids, declared, folder)
        self._names = names_of_inputs(list(feature_ids), declared)
        columns = model.example_columns
        self._columns = ExportedColumns(columns) if columns else None
        self._examples = ExampleInputs(
            [
                encoder_of(declared[encoding.spec.name], folder / f"own_{number}.txt")
                for number, encoding in enumerate(model.encodings)
            ],
            self._names,
        )
        self._sides = ExampleInputs(
            [
                encoder_of(declared[encoding.spec.name], folder / f"side_{number}.txt")
                for number, encoding in enumerate(model.side_encodings)
            ],
            self._names,
        )

    def save(self, folder: Path) -> None:
        """Writes the SavedModel to `folder`."""
        root = tf.Module()  # tracks what the functions use: of the model only the weights
        model = self._model
        apart = self._items.weights_apart
        if self._columns and model.example_columns:
            apart |= {id(weight) for weight in model.example_columns.weights}
            root.columns = self._columns.variables
        root.weights = [weight.value for weight in model.weights if id(weight) not in apart]
        root.items, root.examples, root.sides = self._items.resources, self._examples, self._sides
        root.more = self._more_resources()
        functions = self._functions() | self._more_functions()
        traced = {name: _traced(function, inputs) for name, (function, inputs) in functions.items()}
        signatures = {tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY: traced["score"], **traced}
        tf.saved_model.save(root, str(folder), signatures=signatures)

    @property
    def saved_variables(self) -> dict[str, str]:
        """The path of each weight of the model -> its key in the SavedModel's file of variables, after `save`."""
        model, columns = self._model, self._model.lookup.columns
        apart = self._items.weights_apart
        groups = {"items": [*model.lookup.tables, *(columns.weights if columns else [])]}
        if self._columns and model.example_columns:
            groups["columns"] = model.example_columns.weights
            apart |= {id(weight) for weight in groups["columns"]}
        groups["weights"] = [weight for weight in model.weights if id(weight) not in apart]
        return {
            weight.path: f"{group}/{place}/.ATTRIBUTES/VARIABLE_VALUE"
            for group, weights in groups.items()
            for place, weight in enumerate(weights)
        }

    def _more_functions(self) -> dict[str, Function]:
        """Returns the functions of a kind of models alone, by name."""
        return {}

    def _more_resources(self) -> list:
        """Returns what these functions use besides the model, which a SavedModel must track."""
        return []

    @property
    def _histories_inputs(self) -> dict[str, tf.TensorSpec]:
        """The inputs of B histories, without features of examples."""
        flat, lengths = tf.TensorSpec([None], self._items.ids.dtype), tf.TensorSpec([None], tf.int64)
        return {HISTORY: flat, LENGTHS: lengths, **self._of_positions}

    @property
    def _users_inputs(self) -> dict[str, tf.TensorSpec]:
        """The inputs of B users, with their features, but without candidates."""
        return {**self._histories_inputs, **self._examples.specs_of(Owner.USER, Owner.CONTEXT)}

    @property
    def _of_positions(self) -> dict[str, tf.TensorSpec]:
        """The inputs that have a value for each behaviour besides its item."""
        named = {NAMES: tf.TensorSpec([None], tf.string)} if self._has_names else {}
        return named | self._sides.specs

    def _functions(self) -> dict[str, Function]:
        flat, lengths = tf.TensorSpec([None], self._items.ids.dtype), tf.TensorSpec([None], tf.int64)
        named = self._of_positions
        packed = {**self._histories_inputs, CANDIDATES: flat, **self._examples.specs}
        one_history = {
            HISTORY: flat,
            CANDIDATES: flat,
            "k": tf.TensorSpec([], tf.int64),
            **named,
            **self._examples.specs,
        }
        padded = {name: tf.TensorSpec([None, None], spec.dtype) for name, spec in {HISTORY: flat, **named}.items()}
        features = {
            f"{side}_{self._names[feature]}": tf.TensorSpec([None], dtype)
            for feature, dtype in self._items.given_types.items()
            for side in ("history", "candidate")
        }
        functions: dict[str, Function] = {
            "score": (self.score, packed),
            "score_padded": (self.score_padded, packed | padded),
            "rank": (self.rank, one_history),
            "rank_histories": (self.rank_histories, packed | {COUNTS: lengths}),
            "embed_items": (self.embed_items, {"item_ids": flat}),
        }
        if features:
            functions["score_with_features"] = (self.score, packed | features)
            functions["rank_with_features"] = (self.rank, one_history | features)
        return functions

    @abc.abstractmethod
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
            features: those of items; none: all are looked up by the item id. And those of the B examples, see
                `ExampleInputs`. Of several histories also `history_names`, `[N]`, the name of each behaviour's history,
                and of features of behaviours `history_NAME`, `[N]`.
        """

    def score_padded(
        self,
        history_item_ids: tf.Tensor,
        history_lengths: tf.Tensor,
        candidate_item_ids: tf.Tensor,
        **features: tf.Tensor,
    ) -> Outputs:
        """Returns the logits `[B]` of one candidate for each of B padded histories.

        Args:
            history_item_ids: `[B, T]`.
            history_lengths: int64 `[B]`, the real part of each row.
            candidate_item_ids: `[B]`.
            features: those of the B examples, see `ExampleInputs`.
        """
        shape = tf.shape(history_item_ids, tf.int64)
        fits = tf.equal(shape[0], tf.size(history_lengths, tf.int64)) & tf.reduce_all(
            (history_lengths >= 0) & (history_lengths <= shape[1])
        )
        rule = "history_lengths must be one a row of history_item_ids, from 0 to its width. Received:"
        with tf.control_dependencies([tf.Assert(fits, [rule, history_lengths, "for the shape", shape])]):
            real = tf.sequence_mask(history_lengths, shape[1])
        flat = tf.boolean_mask(history_item_ids, real)
        of_positions = [name for name in (NAMES, *self._sides.specs) if name in features]
        features = features | {name: tf.boolean_mask(features[name], real) for name in of_positions}
        return self.score(flat, history_lengths, candidate_item_ids, **features)

    def rank(
        self, history_item_ids: tf.Tensor, candidate_item_ids: tf.Tensor, k: tf.Tensor, **features: tf.Tensor
    ) -> Outputs:
        """Returns the best of C candidates for one history, best first: `[min(k, C)]`.

        Args:
            history_item_ids: `[T]`.
            candidate_item_ids: `[C]`.
            k: int64 scalar, the most candidates to return.
            features: as of `score`, one of the user and of the context, C of candidates.
        """
        num_candidates = tf.size(candidate_item_ids, tf.int64)
        with tf.control_dependencies([tf.Assert(k >= 0, ["k must be 0 or more. Received:", k])]):
            wanted = tf.cast(tf.minimum(k, num_candidates), tf.int32)
        logits = self._rank(
            history_item_ids,
            tf.size(history_item_ids, tf.int64)[None],
            candidate_item_ids,
            num_candidates[None],
            features,
        )
        _, index = tf.math.top_k(self._predictions.ranking(logits), wanted)  # ties keep their order
        outputs = self._with_probability(tf.gather(logits, index))
        return {"item_ids": tf.gather(candidate_item_ids, index), "places": tf.cast(index, tf.int64), **outputs}

    def rank_histories(
        self,
        history_item_ids: tf.Tensor,
        history_lengths: tf.Tensor,
        candidate_item_ids: tf.Tensor,
        candidate_counts: tf.Tensor,
        **features: tf.Tensor,
    ) -> Outputs:
        """Returns the logits `[C]` of any number of candidates for each of B histories.

        Args:
            history_item_ids: `[N]`, the histories concatenated.
            history_lengths: int64 `[B]`.
            candidate_item_ids: `[C]`, the candidates of all histories concatenated.
            candidate_counts: int64 `[B]`, the number of each history's candidates.
            features: see `ExampleInputs`, B of users and contexts, C of candidates.
        """
        history_lengths = of_same_size(history_lengths, candidate_counts, LENGTHS, COUNTS)
        return self._with_probability(
            self._rank(history_item_ids, history_lengths, candidate_item_ids, candidate_counts, features)
        )

    def embed_items(self, item_ids: tf.Tensor) -> Outputs:
        """Returns the vectors `[M, H]` of items `[M]`, and `known` `[M]`, true for items of the vocabulary."""
        items = self._items.find(item_ids, ())
        known = tf.not_equal(self._items.ids.dense_ids(item_ids), schema.UNKNOWN_ID)
        return {"embeddings": tf.gather(items.vectors, items.index), "known": known}

    @abc.abstractmethod
    def _rank(
        self,
        history_item_ids: tf.Tensor,
        history_lengths: tf.Tensor,
        candidate_item_ids: tf.Tensor,
        candidate_counts: tf.Tensor,
        features: Mapping[str, tf.Tensor],
    ) -> tf.Tensor:
        """Returns the logits, `[C]` or `[C, T]`, of any number of candidates for each history; see `rank_histories`."""

    def _with_probability(self, logits: tf.Tensor) -> Outputs:
        outputs: Outputs = {}
        for label, own in self._predictions.columns(logits):
            outputs |= {label.logits: own, label.probability: tf.sigmoid(calibrated(own, label.calibrator))}
        return outputs

    @property
    def _has_names(self) -> bool:
        """True if behaviours have the names of their histories."""
        return len(self._histories) > 1

    def _newest(
        self, history_item_ids: tf.Tensor, history_lengths: tf.Tensor, names: tf.Tensor | None
    ) -> tuple[Callable[[tf.Tensor], tf.Tensor], tf.Tensor]:
        """Cuts histories to the newest behaviours, as many as the model reads.

        Args:
            history_item_ids: `[N]`.
            history_lengths: int64 `[B]`.
            names: string `[N]`, of each behaviour's history; None if there is one.

        Returns:
            A function that keeps, of values `[N]`, those of the newest positions, history after history; their number,
            int32 `[S * B]`.
        """
        lengths = checked_lengths(history_lengths, history_item_ids, LENGTHS, HISTORY)
        if names is not None:
            return self._newest_of_each(lengths, of_same_size(names, history_item_ids, NAMES, HISTORY))
        (history,) = self._histories
        kept = tf.minimum(lengths, history.longest)
        ends = tf.cumsum(lengths)
        all_short = tf.reduce_all(tf.equal(kept, lengths))

        def window(values: tf.Tensor) -> tf.Tensor:
            return tf.cond(
                all_short,
                lambda: values,
                lambda: tf.gather(values, tf.ragged.range(ends - kept, ends).values),
            )

        return window, kept

    def _newest_of_each(
        self, lengths: tf.Tensor, names: tf.Tensor
    ) -> tuple[Callable[[tf.Tensor], tf.Tensor], tf.Tensor]:
        """Does what `_newest` does, of several histories."""
        is_of = tf.equal(names[:, None], tf.constant([history.name for history in self._histories]))  # [N, S]
        rule = f"{NAMES} must be of {', '.join(history.name for history in self._histories)}. Received:"
        with tf.control_dependencies([tf.Assert(tf.reduce_all(tf.reduce_any(is_of, axis=1)), [rule, names])]):
            place = tf.argmax(is_of, axis=1, output_type=tf.int32)
        num_users = tf.size(lengths)
        history_of = place * num_users + segment_ids(lengths)
        order = tf.argsort(history_of, stable=True)
        num_histories = len(self._histories) * num_users
        own_lengths = tf.math.bincount(history_of, minlength=num_histories, maxlength=num_histories)
        # Of a history with a feature each candidate gets the newest of its own.
        longest = [tf.int32.max if history.feature else history.longest for history in self._histories]
        kept = tf.minimum(own_lengths, tf.repeat(tf.constant(longest), num_users))
        ends = tf.cumsum(own_lengths)
        places = tf.gather(order, tf.ragged.range(ends - kept, ends).values)
        return lambda values: tf.gather(values, places), kept

    def _given(
        self, features: Mapping[str, tf.Tensor], history_item_ids: tf.Tensor, candidate_item_ids: tf.Tensor
    ) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """Returns the given features of histories and of candidates, in the order of the tables; empty if none are."""
        features_of_items = list(self._items.given_types)
        if not any(f"history_{self._names[feature]}" in features for feature in features_of_items):
            return [], []

        def of(side: str, ids: tf.Tensor) -> list[tf.Tensor]:
            names = [f"{side}_{self._names[feature]}" for feature in features_of_items]
            return [of_same_size(features[name], ids, name, f"{side}_item_ids") for name in names]

        return of("history", history_item_ids), of("candidate", candidate_item_ids)

    def _columns_of(
        self, features: Mapping[str, tf.Tensor], owners: Collection[Owner], num_rows: tf.Tensor, whose: str
    ) -> tf.Tensor | None:
        """Returns the columns `[num_rows, columns]` of the features of some owners; None if there are none."""
        if self._columns is None:
            return None
        values = self._examples.encode(features, owners, num_rows, whose)
        return self._columns.of(values, owners) if values else None


def calibrated(logits: tf.Tensor, calibrator: Calibrator) -> tf.Tensor:
    """Returns the calibrated logits in the graph, float32 `[C]`, as `Calibrator.of_logits` does."""
    match calibrator.kind:
        case Calibrate.PLATT:
            logits = calibrator.slope * logits + calibrator.intercept
        case Calibrate.ISOTONIC:
            logits = _interpolated(logits, calibrator.logits, calibrator.calibrated)
    return logits if calibrator.negative_rate == 1 else logits + math.log(calibrator.negative_rate)


def _interpolated(values: tf.Tensor, knots: Sequence[float], heights: Sequence[float]) -> tf.Tensor:
    """Interpolates linearly between knots, and constantly outside, in float64."""
    inputs = tf.clip_by_value(tf.cast(values, tf.float64), knots[0], knots[-1])
    at, height = tf.constant(knots, tf.float64), tf.constant(heights, tf.float64)
    if len(knots) == 1:
        return tf.fill(tf.shape(values), tf.constant(heights[0], tf.float32))
    right = tf.clip_by_value(tf.searchsorted(at, inputs, side="right"), 1, len(knots) - 1)
    left = right - 1
    width = tf.gather(at, right) - tf.gather(at, left)
    share = tf.math.divide_no_nan(inputs - tf.gather(at, left), width)
    rise = tf.gather(height, right) - tf.gather(height, left)
    return tf.cast(tf.gather(height, left) + share * rise, tf.float32)


def names_of_inputs(item_features: Sequence[str], declared: Mapping[str, Declared | StoredFeature]) -> dict[str, str]:
    """Returns, for each feature, the NAME in the names of its inputs; see `input_names`."""
    stored = {name: feature.stored if isinstance(feature, Declared) else feature for name, feature in declared.items()}
    lists = [name for name, feature in stored.items() if feature.encoding.form is Form.LISTS]
    return input_names([*item_features, *declared], lists)


def checked_lengths(lengths: tf.Tensor, values: tf.Tensor, lengths_name: str, values_name: str) -> tf.Tensor:
    """Returns the lengths as int32, and asserts that they add up to the number of `values`."""
    num_values = tf.size(values, tf.int64)
    fits = tf.reduce_all((lengths >= 0) & (lengths <= num_values)) & tf.equal(tf.reduce_sum(lengths), num_values)
    rule = f"{lengths_name} must not be negative and must add up to the number of {values_name}. Received:"
    with tf.control_dependencies([tf.Assert(fits, [rule, lengths, "for", num_values])]):
        return tf.cast(lengths, tf.int32)


def of_same_size(values: tf.Tensor, ids: tf.Tensor, name: str, ids_name: str) -> tf.Tensor:
    fits = tf.equal(tf.size(values), tf.size(ids))
    rule = f"{name} and {ids_name} must be as many. Received:"
    with tf.control_dependencies([tf.Assert(fits, [rule, tf.size(values), tf.size(ids)])]):
        return tf.identity(values)


def _traced(function: Callable[..., Outputs], inputs: Mapping[str, tf.TensorSpec]) -> Callable:
    specs = {name: tf.TensorSpec(spec.shape, spec.dtype, name) for name, spec in inputs.items()}
    return tf.function(functools.partial(function), autograph=False).get_concrete_function(**specs)
