"""The part that DIN and its baselines share: all but the pooling of a history to an interest."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from din_dist.config import BatchNorm, ModelConfig, require
from din_dist.execution import INFERENCE, Mode, round_up
from din_dist.features.spec import Owner
from din_dist.layers.feature_columns import FeatureColumns
from din_dist.layers.hidden import HiddenLayers
from din_dist.layers.local_lookup import LocalLookup
from din_dist.layers.native.dense import run_stages
from din_dist.layers.native.vectors import vectors_and_candidates
from din_dist.layers.packed import padded, rows_at, segment_ids
from din_dist.layers.pairs import Pairs
from din_dist.layers.spans import Positions, spans_of
from din_dist.layers.stages import Stage, activated
from din_dist.layers.standardize import BatchNormalization
from din_dist.layers.task_towers import TaskTowers
from din_dist.models.behaviour_model import BehaviourModel, Sides, distinct_items, given_features, items_of, names_of
from din_dist.schema import Batch, NamedHistory

OF_HISTORY, OF_CANDIDATE = (Owner.USER, Owner.CONTEXT), (Owner.CANDIDATE,)


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


class RankingModel(BehaviourModel):
    """Scores candidates against packed behaviour histories, each candidate by a head of its own; returns logits.

    Each layer is created once, here, and serves the candidate, the negatives and any number of candidates at once.
    The authors' code called `tf.layers` again under `reuse=True`.

    Args:
        lookup: as of `BehaviourModel`, like the others.
        config: sizes, activations and normalization.
        training_mode: the mode of training passes.
        example_columns: the columns of the examples' features.
        num_tasks: T, the labels to predict.
        histories: S histories.
        side_columns: the columns of the side information of behaviours.
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
        super().__init__(lookup, training_mode, example_columns, num_tasks, histories, side_columns, **kwargs)
        frozen = config.batch_norm is BatchNorm.FROZEN
        self.has_batch_statistics = not frozen
        suffixes = suffixes_of(self.histories)
        self.interest_norms = [BatchNormalization(frozen, name=f"interest_norm{suffix}") for suffix in suffixes]
        rule = "must stay where behaviours have features of their own, because it brings interests to the item's width"
        drop = "Drop --nointerest_projection, or those features."
        require(config.interest_projection or not self.side_width, rule, "interest_projection", "no", drop)
        self.interest_projections = [
            keras.layers.Dense(lookup.width, name=f"interest_projection{suffix}")
            for suffix in (suffixes if config.interest_projection else ())
        ]
        self.head_norm = BatchNormalization(frozen, name="head_norm")
        make_head: Callable[..., HiddenLayers | TaskTowers] = HiddenLayers
        if num_tasks > 1:
            tasks = {"num_tasks": num_tasks, **dataclasses.asdict(config.heads)}
            make_head = functools.partial(TaskTowers, **tasks)
        self.head = make_head(
            config.hidden_units, config.activation, frozen=frozen, dropout=config.dropout, name="head"
        )

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

    def losses(self, batch: Batch) -> tf.Tensor:
        """Returns the cross-entropy of each example, and of each label if there are several."""
        logits = self(batch, training=True)
        execution = self.training_mode.execution
        # Beside kernels there are few cheap operations left, and XLA would compile for each number of examples.
        find = _cross_entropy if execution.kernels else execution.fused(_cross_entropy)
        corrected = logits + batch.logit_offsets if "logit_offsets" in batch.extras else logits
        return find(corrected, batch.labels)

    def call(self, batch: Batch, training: bool = False) -> tf.Tensor:
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

    def score_candidates(
        self,
        history_item_ids: tf.Tensor,
        history_lengths: tf.Tensor,
        candidate_item_ids: tf.Tensor,
        candidate_counts: tf.Tensor,
        features: Mapping[str, Any] | None = None,
        sides: Sides | None = None,
    ) -> tf.Tensor:
        """Returns what `BehaviourModel.score_candidates` does.

        The items of a history are looked up and projected once.
        User and context columns go through the head's first layer once a history.
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
        return self.example_columns(given_features(features, wanted), owners=tuple(owners))

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
        interests = [
            self._projected(self.interest(items, pairs, mode, place), place, mode)
            for place, pairs in enumerate(all_pairs)
        ]
        inputs = self.head_inputs(interests, items.candidate, mode)
        if items.history_terms is not None:
            return self._logits_from_terms(inputs, items)
        if self.example_columns is not None:
            if items.context is None:
                raise ValueError(f"context: must be the columns of {names_of(self.encodings)}. Received: None.")
            inputs = tf.concat([inputs, items.context], axis=1)
        if not self.head.built:
            self.head.build(inputs.shape)
        return self.head.combined(self.head.behind(self.head_norm, inputs, seeds, mode) + items.biases)

    def _projected(self, interest: tf.Tensor, history: int, mode: Mode) -> tf.Tensor:
        """Returns what the head sees of the pooled history `[C, H + S]` at a place: `[C, H]`."""
        norm = self.interest_norms[history]
        if not self.interest_projections:
            return activated(norm, interest, mode)
        return run_stages([Stage(norm, self.interest_projections[history])], interest, None, mode)

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


def _cross_entropy(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    return tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits)
