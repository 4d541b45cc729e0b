"""The part that all models share: one lookup, packed histories, and the columns of features."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from din_dist.execution import INFERENCE, TRAINING, Mode, round_up
from din_dist.features.encoding import Encoding
from din_dist.layers.feature_columns import FeatureColumns
from din_dist.layers.local_lookup import LocalLookup
from din_dist.layers.packed import padded, segment_ids, split_histories
from din_dist.layers.pairs import Pairs
from din_dist.schema import Batch, NamedHistory, TableSpec


class Sides(NamedTuple):
    """Side information of the behaviours at N history positions."""

    values: Mapping[str, tf.Tensor]  # name -> int32 [T], each combination of values once
    index: tf.Tensor  # int32 [N], the place of each position among those


class BehaviourModel(keras.Model):
    """Scores items by packed behaviour histories; returns logits.

    Args:
        lookup: turns item ids into vectors. The model does not know where the tables lie.
        training_mode: the mode of training passes. None: TensorFlow's operations compute them, without peers.
        example_columns: the columns of the examples' features, those of candidates last. None: there are none.
        num_tasks: T, the labels to predict. Logits have an axis of tasks if there are several.
        histories: S histories, in the order in which batches have them. None: there is one.
        side_columns: the columns of the side information of behaviours. None: there is none.
    """

    has_batch_statistics = False
    reads_graphs = False  # of histories; see `Batch.graph`

    def __init__(
        self,
        lookup: LocalLookup,
        training_mode: Mode | None = None,
        example_columns: FeatureColumns | None = None,
        num_tasks: int = 1,
        histories: Sequence[NamedHistory] | None = None,
        side_columns: FeatureColumns | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.side_columns = side_columns
        self.num_tasks, self.histories = num_tasks, tuple(histories or [NamedHistory("", 0)])
        self.lookup, self.training_mode = lookup, training_mode or TRAINING
        self.example_columns = example_columns

    def build_variables(self) -> None:
        """Makes every variable, by scoring one candidate without a history."""
        nothing = tf.zeros([0], tf.int32)
        one, lengths = tf.zeros([1], tf.int32), tf.zeros([self.num_histories], tf.int32)
        batch = Batch(candidate_item_ids=one, history_item_ids=nothing, history_lengths=lengths)
        if self.example_columns:
            batch = batch._replace(features=self.example_columns.missing(1))
        if self.side_columns:
            batch = batch._replace(sides=self.side_columns.missing(1), side_index=nothing)
        self(batch)

    @property
    def num_histories(self) -> int:
        """S, the histories of an example."""
        return len(self.histories)

    @property
    def encodings(self) -> tuple[Encoding, ...]:
        """The encodings of the user, context and candidate features, in the order of their columns."""
        return self.example_columns.encodings if self.example_columns else ()

    @property
    def side_encodings(self) -> tuple[Encoding, ...]:
        """The encodings of the side information of behaviours, in the order of its columns."""
        return self.side_columns.encodings if self.side_columns else ()

    @property
    def batch_encodings(self) -> tuple[Encoding, ...]:
        """The encodings of all features that batches have values of."""
        return (*self.encodings, *self.side_encodings)

    @property
    def extras(self) -> tuple[str, ...]:
        """The names of `schema.EXTRAS` that batches of evaluation have too."""
        return ("graph",) if self.reads_graphs else ()

    @property
    def side_width(self) -> int:
        """The number of columns of side information."""
        return self.side_columns.width if self.side_columns else 0

    @property
    def _columns(self) -> list[FeatureColumns]:
        return [columns for columns in (self.example_columns, self.side_columns) if columns]

    @property
    def embeddings(self) -> list[tuple[TableSpec, keras.Variable]]:
        """Each embedding table with its sizes: of items, of the examples' features, and of side information."""
        others = (zip(columns.specs, columns.tables, strict=True) for columns in self._columns)
        return [*self.lookup.embeddings, *itertools.chain.from_iterable(others)]

    @property
    def tables(self) -> list[keras.Variable]:
        """The variables of which a batch reads some rows, and whose gradient therefore has only those."""
        return [*self.lookup.variables_by_rows, *(table for columns in self._columns for table in columns.tables)]

    @property
    def specs_of_ids(self) -> list[TableSpec]:
        """The tables of one id an item, an example or a position, in the order of `unknown_ids`."""
        return [*self.lookup.specs_of_ids, *(spec for columns in self._columns for spec in columns.specs_of_ids)]

    def unknown_ids(self, batch: Batch) -> tf.Tensor:
        """Returns the share of the ids of a packed batch that are unknown in each table, float32 `[tables]`.

        Ids of items are those of all candidates and positions.
        """
        places = batch.item_index
        unknown = self.lookup.unknown(batch.distinct_item_ids)
        num_items = tf.shape(unknown)[1]
        times = tf.math.bincount(places, minlength=num_items, maxlength=num_items, dtype=tf.float32)
        num_unknown = tf.linalg.matvec(tf.cast(unknown, tf.float32), times)
        shares = num_unknown / tf.cast(tf.maximum(tf.size(places), 1), tf.float32)
        if self.example_columns and (of_examples := self.example_columns.unknown(batch.features)):
            num_unknown = tf.reduce_sum(tf.cast(of_examples, tf.float32), axis=1)
            num_examples = tf.cast(tf.maximum(tf.size(batch.candidate_item_ids), 1), tf.float32)
            shares = tf.concat([shares, num_unknown / num_examples], axis=0)
        if self.side_columns:
            of_sides = tf.cast(self.side_columns.unknown(batch.sides), tf.float32)
            of_positions = tf.gather(of_sides, batch.side_index, axis=1)
            num_positions = tf.cast(tf.maximum(tf.size(batch.side_index), 1), tf.float32)
            shares = tf.concat([shares, tf.reduce_sum(of_positions, axis=1) / num_positions], axis=0)
        return shares

    @property
    def statistics_widths(self) -> list[int]:
        """Columns of each layer with batch statistics, which the ranks exchange in training."""
        means = [weight for weight in self.non_trainable_weights if weight.path.endswith("moving_mean")]
        return [weight.shape[0] for weight in means] if self.has_batch_statistics else []

    @property
    def late_weights(self) -> list[keras.Variable]:
        """Weights whose gradients are known in the last pass of all, after the last batch statistics."""
        return [*self.lookup.trainable_weights, *(self.side_columns.trainable_weights if self.side_columns else ())]

    def num_computed_positions(self, num_positions: tf.Tensor) -> tf.Tensor:
        """Returns how many positions training computes, padding included, int32.

        XLA compiles for each pair of lengths: few lengths mean 6 % more positions on average.
        """
        return round_up(num_positions, steps=8) if self.pools_compiled(self.training_mode) else num_positions

    def pools_compiled(self, mode: Mode) -> bool:
        """Tells whether `interest` is compiled for each number of pairs anew, so that few numbers are wanted."""
        return mode.training and mode.execution.xla

    def of_task(self, logits: tf.Tensor, task: int) -> tf.Tensor:
        """Returns the logits of one task, `[C]`, of what the model returns."""
        return logits if self.num_tasks == 1 else logits[..., task]

    @abc.abstractmethod
    def call(self, batch: Batch, training: bool = False) -> tf.Tensor:
        """Returns the logits, float32 `[B]` or `[B, T]`, of a packed batch.

        If it lacks its distinct items, they are found here.
        """

    @abc.abstractmethod
    def losses(self, batch: Batch) -> tf.Tensor:
        """Returns the loss of each example in training, float32 `[B]` or `[B, T]`, before weights."""

    def pairs(
        self,
        history_lengths: tf.Tensor,
        behaviour_of: tf.Tensor,
        mode: Mode = INFERENCE,
        side_of: tf.Tensor | None = None,
    ) -> list[Pairs]:
        """Returns the pairs of each history.

        Args:
            history_lengths: int32 `[S * B]`, as of `Batch`.
            behaviour_of: int32 `[N]`, the behaviour at each position.
            mode: of the pass.
            side_of: int32 `[N]`, the side information at each position. None: there is none.
        """
        of_positions = [behaviour_of] if side_of is None else [behaviour_of, side_of]
        histories = split_histories(self.num_histories, history_lengths, *of_positions)
        return [
            Pairs(segment_ids(lengths, mode), own, side_of=sides[0] if sides else None)
            for lengths, own, *sides in histories
        ]

    def _padded(self, pairs: Pairs) -> Pairs:
        num_pairs = tf.size(pairs.behaviour_of)
        behaviour_of = padded(pairs.behaviour_of, self.num_computed_positions(num_pairs))
        length = tf.size(behaviour_of)
        side_of = None if pairs.side_of is None else padded(pairs.side_of, length)
        return Pairs(padded(pairs.candidate_of, length, -1), behaviour_of, num_pairs, side_of)

    def sides(self, values: Mapping[str, Any], mode: Mode = INFERENCE) -> tf.Tensor | None:
        """Returns the columns of T combinations of side information, float32 `[T, S]`; None if the model has none.

        With XLA there are further rows behind them.

        Args:
            values: as of `Batch.sides`.
            mode: of the pass.
        """
        if self.side_columns is None:
            return None
        found = self.side_columns(given_features(values, self.side_encodings), mode=mode)
        return padded(found, round_up(tf.shape(found)[0], steps=4)) if self.pools_compiled(mode) else found

    def context(self, features: Mapping[str, Any] | None, mode: Mode = INFERENCE) -> tf.Tensor | None:
        """Returns the columns of the features of B examples, float32 `[B, columns]`; None if the model has none.

        Args:
            features: as of `Batch.features`.
            mode: of the pass.
        """
        if self.example_columns is None:
            return None
        return self.example_columns(given_features(features, self.encodings), mode=mode)

    def attention_weights(self, batch: Batch) -> tf.Tensor | None:
        """Returns the weight of each history position of a packed batch, `[N]`; None if all weigh the same."""
        return None

    @abc.abstractmethod
    def score_candidates(
        self,
        history_item_ids: tf.Tensor,
        history_lengths: tf.Tensor,
        candidate_item_ids: tf.Tensor,
        candidate_counts: tf.Tensor,
        features: Mapping[str, Any] | None = None,
        sides: Sides | None = None,
    ) -> tf.Tensor:
        """Returns the logits `[C]` or `[C, T]` of many candidates for each history.

        Args:
            history_item_ids: int32 `[N]`, the histories of B users concatenated, as of `Batch`. One with a feature has
                all behaviours, of which each candidate gets its own.
            history_lengths: int32 `[S * B]`.
            candidate_item_ids: int32 `[C]`, the candidates of B users concatenated.
            candidate_counts: int32 `[B]`.
            features: name -> values by form, as in `Batch.features`: B of each user and context feature, one for each
                history, and C of each candidate feature. None: the model has no such features.
            sides: the side information of the behaviours. None: the model reads none.
        """


def given_features(features: Mapping[str, Any] | None, encodings: Sequence[Encoding]) -> Mapping[str, Any]:
    """Returns `features`, of which none of `encodings` may lack."""
    if lacking := [encoding for encoding in encodings if encoding.spec.name not in (features or {})]:
        raise ValueError(f"features: must have values of {names_of(lacking)}. Received: {sorted(features or {})}.")
    return features or {}


def names_of(encodings: Sequence[Encoding]) -> str:
    return ", ".join(encoding.spec.name for encoding in encodings)


def items_of(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the `distinct_items` of a packed batch, which may bring them along."""
    if batch.distinct_item_ids is not None:
        return batch.distinct_item_ids, batch.item_index
    return distinct_items(batch.candidate_item_ids, batch.history_item_ids)


def distinct_items(candidate_item_ids: tf.Tensor, history_item_ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns each item once, `[U]`, and the index in it of the candidates and then the positions, `[C + N]`."""
    return tf.unique(tf.concat([candidate_item_ids, history_item_ids], axis=0))
