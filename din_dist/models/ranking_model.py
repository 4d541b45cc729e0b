"""The part that DIN and its baselines share: all but the pooling of a history to an interest."""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from din_dist.config import BatchNorm, ModelConfig
from din_dist.execution import INFERENCE, TRAINING, Mode, round_up
from din_dist.features.encoding import Encoding
from din_dist.features.spec import Owner
from din_dist.layers.feature_columns import FeatureColumns
from din_dist.layers.hidden import HiddenLayers
from din_dist.layers.local_lookup import LocalLookup
from din_dist.layers.native.dense import run_stages
from din_dist.layers.native.vectors import vectors_and_candidates
from din_dist.layers.packed import padded, rows_at, segment_ids, split_histories
from din_dist.layers.pairs import Pairs
from din_dist.layers.spans import Positions, spans_of
from din_dist.layers.stages import Stage
from din_dist.layers.standardize import BatchNormalization
from din_dist.layers.task_towers import TaskTowers
from din_dist.schema import Batch, NamedHistory, TableSpec

OF_HISTORY, OF_CANDIDATE = (Owner.USER, Owner.CONTEXT), (Owner.CANDIDATE,)


class Sides(NamedTuple):
    """Side information of the behaviours at N history positions."""

    values: Mapping[str, tf.Tensor]  # name -> int32 [T], each combination of values once
    index: tf.Tensor  # int32 [N], the place of each position among those


class LookedUp(NamedTuple):
    """Items that were looked up: C candidates, and K distinct behaviours of their histories."""

    candidate: tf.Tensor  # float32 [C, H]
    biases: tf.Tensor  # float32 [C], or [C, T] of T tasks
    behaviours: tf.Tensor  # float32 [K, H]
    # Float32 [C, columns of the examples' features]: of all of them; with `history_terms`, of the candidate's only, or
    # None without such features.
    context: tf.Tensor | None = None
    # Float32 [C, D], in inference: what `RankingModel.history_terms` gives the history of each candidate.
    history_terms: tf.Tensor | None = None
    sides: tf.Tensor | None = None  # float32 [T, S], of side information; None without any


class SplitHead(NamedTuple):
    """The head's normalization and its first Dense layer as one affine map in inference, its kernel split by rows.

    D is the width of that layer.
    """

    of_items: tf.Tensor  # float32 [W, D], of what `RankingModel.head_inputs` returns
    of_history: tf.Tensor  # float32 [columns of user and context features, D]
    of_candidate: tf.Tensor  # float32 [columns of candidate features, D]
    bias: tf.Tensor  # float32 [D]


class RankingModel(keras.Model):
    """Scores candidates against packed behaviour histories; returns logits.

    Each layer is created once, here, and serves the candidate, the negatives and any number of candidates at once.
    The authors' code called `tf.layers` again under `reuse=True`.

    Args:
        lookup: turns item ids into vectors. The model does not know where the tables lie.
        config: sizes, activations and normalization.
        training_mode: the mode of training passes. None: TensorFlow's operations compute them, without peers.
        example_columns: the columns of the examples' features, those of candidates last. None: there are none.
        num_tasks: T, the labels to predict. Logits have an axis of tasks if there are several.
        histories: S histories, in the order in which batches have them. None: there is one.
        side_columns: the columns of the side information of behaviours. None: there is none.
    """

    def __init__(
        self,
        lookup: LocalLookup,
        config: ModelConfig,
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
        frozen = config.batch_norm is BatchNorm.FROZEN
        self.has_batch_statistics = not frozen
        suffixes = suffixes_of(self.histories)
        self.interest_norms = [BatchNormalization(frozen, name=f"interest_norm{suffix}") for suffix in suffixes]
        self.interest_projections = [
            keras.layers.Dense(lookup.width, name=f"interest_projection{suffix}") for suffix in suffixes
        ]
        self.head_norm = BatchNormalization(frozen, name="head_norm")
        make_head: Callable[..., HiddenLayers | TaskTowers] = HiddenLayers
        if num_tasks > 1:
            tasks = {"num_tasks": num_tasks, **dataclasses.asdict(config.heads)}
            make_head = functools.partial(TaskTowers, **tasks)
        self.head = make_head(
            config.hidden_units, config.activation, frozen=frozen, dropout=config.dropout, name="head"
        )

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
    def interest(self, items: LookedUp, pairs: Pairs, mode: Mode, history: int = 0) -> tf.Tensor:
        """Pools each candidate's history to `[C, H + S]`, zeros if it is empty.

        Args:
            items: candidates, and the behaviours and sides that pairs name.
            pairs: each candidate with the behaviours of its history.
            mode: of the pass.
            history: the place of the history among several.
        """

    @abc.abstractmethod
    def head_inputs(self, interests: Sequence[tf.Tensor], candidate: tf.Tensor, mode: Mode) -> tf.Tensor:
        """Returns what the head sees of the interests in each history and of candidates, `[C, H]` each."""

    def call(self, batch: Batch, training: bool = False) -> tf.Tensor:
        """Returns the logits, float32 `[B]` or `[B, T]`, of a packed batch.

        If it lacks its distinct items, they are found here.
        """
        mode = self.training_mode if training else INFERENCE
        item_ids, index = items_of(batch)
        num_candidates = tf.size(batch.candidate_item_ids)
        side_of = batch.side_index if self.side_columns else None
        all_pairs = self.pairs(batch.history_lengths, index[num_candidates:], mode, side_of)
        few_lengths = self.pools_compiled(mode)
        num_vectors = round_up(tf.size(item_ids), steps=4) if few_lengths else None  # 12 % more items on average
        items = self._look_up(item_ids, index[:num_candidates], num_vectors, mode)
        if few_lengths:
            all_pairs = [self._padded(pairs) for pairs in all_pairs]
        items = items._replace(context=self.context(batch.features, mode), sides=self.sides(batch.sides, mode))
        return self.logits(items, all_pairs, batch.dropout_seeds, mode)

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
        found = self.side_columns(_given(values, self.side_encodings), mode=mode)
        return padded(found, round_up(tf.shape(found)[0], steps=4)) if self.pools_compiled(mode) else found

    def context(self, features: Mapping[str, Any] | None, mode: Mode = INFERENCE) -> tf.Tensor | None:
        """Returns the columns of the features of B examples, float32 `[B, columns]`; None if the model has none.

        Args:
            features: as of `Batch.features`.
            mode: of the pass.
        """
        if self.example_columns is None:
            return None
        return self.example_columns(_given(features, self.encodings), mode=mode)

    def _look_up(
        self, item_ids: tf.Tensor, candidate_index: tf.Tensor, num_vectors: tf.Tensor | None, mode: Mode
    ) -> LookedUp:
        """Looks up distinct items, int32 `[K]`, of which `candidate_index` `[C]` are the candidates.

        With `num_vectors` there are so many behaviours, the rest of them padding.
        """
        if mode.kernels:
            parts, biases = self.lookup.parts(item_ids, mode)
            vectors, candidate = vectors_and_candidates(parts, candidate_index)
        else:
            vectors, biases = self.lookup(item_ids)
        if num_vectors is not None:
            vectors = padded(vectors, num_vectors)
        if not mode.kernels:
            gather = mode.fused(rows_at) if num_vectors is not None else rows_at
            candidate = gather(vectors, candidate_index)
        return LookedUp(candidate, tf.gather(biases, candidate_index), vectors)

    def attention_weights(self, batch: Batch) -> tf.Tensor | None:
        """Returns the weight of each history position of a packed batch, `[N]`; None if all weigh the same."""
        return None

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

        The items of a history are looked up and projected once.
        User and context columns go through the head's first layer once a history.

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
        history_of = segment_ids(candidate_counts)  # [C]
        item_ids, index = distinct_items(candidate_item_ids, history_item_ids)
        num_candidates = tf.size(candidate_item_ids)
        items = self._look_up(item_ids, index[:num_candidates], None, INFERENCE)
        if (terms := self.history_terms(features)) is not None:
            terms = tf.gather(terms, history_of)
        items = items._replace(context=self.candidate_context(features), history_terms=terms)
        if sides is not None:
            items = items._replace(sides=self.sides(sides.values))
        names = {history.feature for history in self.histories if history.feature}
        of_items = {name: self.lookup.feature_of(name, item_ids) for name in names}
        of_candidates = {name: tf.gather(ids, index[:num_candidates]) for name, ids in of_items.items()}
        of_positions = Positions(index[num_candidates:], sides.index if sides else None)
        spans = spans_of(self.histories, history_lengths, of_positions, of_items, history_of, of_candidates)
        return self.logits(items, [span.pairs() for span in spans])

    def split_head(self) -> SplitHead:
        """Returns the head's first layer in inference, for callers that share parts of it among candidates."""
        scale, offset = self.head_norm.affine()
        first, columns = self.head.dense_layers[0], self.example_columns
        widths = [columns.width_of(owners) if columns else 0 for owners in (OF_HISTORY, OF_CANDIDATE)]
        kernel = first.kernel.value
        widths = [kernel.shape[0] - sum(widths), *widths]
        of_items, of_history, of_candidate = tf.split(scale[:, None] * kernel, widths, axis=0)
        bias = tf.squeeze(tf.matmul(offset[None], kernel), axis=0) + first.bias.value
        return SplitHead(of_items, of_history, of_candidate, bias)

    def history_terms(self, features: Mapping[str, Any] | None) -> tf.Tensor | None:
        """Returns the share that user and context columns have in the head's first layer, float32 `[B, D]`.

        None if the model has no such columns.

        Args:
            features: name -> B values of each user and context feature; others are left aside.
        """
        if (columns := self._columns_of(features, OF_HISTORY)) is None:
            return None
        return tf.matmul(columns, self.split_head().of_history)

    def candidate_context(self, features: Mapping[str, Any] | None) -> tf.Tensor | None:
        """Returns the columns of candidate features, float32 `[C, columns]`; None if the model has none.

        Args:
            features: name -> C values of each candidate feature; others are left aside.
        """
        return self._columns_of(features, OF_CANDIDATE)

    def _columns_of(self, features: Mapping[str, Any] | None, owners: Sequence[Owner]) -> tf.Tensor | None:
        """Returns the columns of the features of some owners in inference; None if the model has none."""
        wanted = [encoding for encoding in self.encodings if encoding.spec.owner in owners]
        if not wanted or self.example_columns is None:
            return None
        return self.example_columns(_given(features, wanted), owners=tuple(owners))

    def logits(
        self, items: LookedUp, all_pairs: Sequence[Pairs], seeds: tf.Tensor | None = None, mode: Mode = INFERENCE
    ) -> tf.Tensor:
        """Returns the logits `[C]` or `[C, T]` of items that were looked up before.

        Args:
            items: candidates, and the behaviours that pairs name.
            all_pairs: of each history, each candidate with its behaviours.
            seeds: int64 `[C]`, for dropout.
            mode: of the pass.
        """
        stages = map(Stage, self.interest_norms, self.interest_projections)
        interests = []
        for place, (pairs, stage) in enumerate(zip(all_pairs, stages, strict=True)):
            interest = self.interest(items, pairs, mode, place)
            interests.append(run_stages([stage], interest, None, mode))
        inputs = self.head_inputs(interests, items.candidate, mode)
        if items.history_terms is not None:
            return self._logits_from_terms(inputs, items)
        if self.example_columns is not None:
            if items.context is None:
                raise ValueError(f"context: must be the columns of {_names(self.encodings)}. Received: None.")
            inputs = tf.concat([inputs, items.context], axis=1)
        if not self.head.built:
            self.head.build(inputs.shape)
        return self.head.combined(self.head.behind(self.head_norm, inputs, seeds, mode) + items.biases)

    def _logits_from_terms(self, inputs: tf.Tensor, items: LookedUp) -> tf.Tensor:
        """Returns the logits `[C]` or `[C, T]` in inference; `inputs` `[C, W]` is the result of `head_inputs`."""
        head = self.split_head()
        projected = tf.matmul(inputs, head.of_items) + head.bias + items.history_terms
        if items.context is not None:
            projected += tf.matmul(items.context, head.of_candidate)
        return self.head.combined(self.head.after_first(projected) + items.biases)


def suffixes_of(histories: Sequence[NamedHistory]) -> list[str]:
    """Returns what the names of the layers of each history end with; the first ones are those of a single history."""
    _, *others = histories
    return ["", *(f"_{history.name}" for history in others)]


def _given(features: Mapping[str, Any] | None, encodings: Sequence[Encoding]) -> Mapping[str, Any]:
    """Returns `features`, of which none of `encodings` may lack."""
    if lacking := [encoding for encoding in encodings if encoding.spec.name not in (features or {})]:
        raise ValueError(f"features: must have values of {_names(lacking)}. Received: {sorted(features or {})}.")
    return features or {}


def _names(encodings: Sequence[Encoding]) -> str:
    return ", ".join(encoding.spec.name for encoding in encodings)


def items_of(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the `distinct_items` of a packed batch, which may bring them along."""
    if batch.distinct_item_ids is not None:
        return batch.distinct_item_ids, batch.item_index
    return distinct_items(batch.candidate_item_ids, batch.history_item_ids)


def distinct_items(candidate_item_ids: tf.Tensor, history_item_ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns each item once, `[U]`, and the index in it of the candidates and then the positions, `[C + N]`."""
    return tf.unique(tf.concat([candidate_item_ids, history_item_ids], axis=0))
