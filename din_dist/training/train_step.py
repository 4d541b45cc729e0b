"""One update of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import tensorflow as tf

from din_dist import schema
from din_dist.config import OptimizerConfig
from din_dist.data.hashing import hash64
from din_dist.data.pipeline import BATCH_SIGNATURE
from din_dist.distributed.gradients import Gradient, GradientExchange, RowGradients, message_rows
from din_dist.models.ranking_model import RankingModel
from din_dist.training.optimizers import Optimizer
from din_dist.training.regularization import Regularization, clip, global_norm

Batch = Mapping[str, tf.Tensor]


class Observed(NamedTuple):
    """What reporters ask of an update, on this rank."""

    gradients_ready: tf.Tensor  # float64, seconds of the wall clock
    exchange_ended: tf.Tensor  # likewise
    rows_sent: tf.Tensor  # int32 [S], of each table, padding included; what a rank that is alone would send
    unique_rows: tf.Tensor  # int32 [S], over all ranks
    unknown_ids: tf.Tensor  # float32 [T], share of the candidates and positions that have no id in a table
    computed_positions: tf.Tensor  # int32, padding included


class StepResult(NamedTuple):
    """Of one update; the first three are equal on all ranks."""

    loss: tf.Tensor  # mean over the global batch
    gradient_norm: tf.Tensor
    stop_requests: tf.Tensor  # ranks that were asked to stop
    num_examples: tf.Tensor  # of this rank
    checksum: tf.Tensor  # uint64, of this rank's examples
    observed: Observed


class TrainStep:
    """One update of the weights, the same on every rank."""

    def __init__(
        self,
        model: RankingModel,
        optimizer: Optimizer,
        exchange: GradientExchange,
        regularization: Regularization,
        config: OptimizerConfig,
    ) -> None:
        self._model, self._optimizer, self._exchange = model, optimizer, exchange
        self._regularization, self._clip_norm = regularization, config.clip_norm
        scalars = [tf.TensorSpec([], dtype) for dtype in (tf.float32, tf.int64, tf.float32, tf.float32)]
        self._run = tf.function(self._step, input_signature=[BATCH_SIGNATURE, *scalars], autograph=False)

    def __call__(self, batch: Batch, rate: float, step: int, global_examples: int, stop: bool) -> StepResult:
        """Trains on this rank's share `batch` of a global batch of `global_examples`; `step` counts from 1."""
        return self._run(
            batch,
            tf.constant(rate, tf.float32),
            tf.constant(step, tf.int64),
            tf.constant(global_examples, tf.float32),
            tf.constant(stop, tf.float32),
        )

    def _step(
        self, batch: Batch, rate: tf.Tensor, step: tf.Tensor, global_examples: tf.Tensor, stop: tf.Tensor
    ) -> StepResult:
        own, loss = self.local_gradients(batch, global_examples)
        gradients, (loss, stops) = self.exchange(own, [loss, stop], global_examples)
        norm = self.update(gradients, loss, rate, step)
        checksum = tf.reduce_sum(hash64(batch[schema.EXAMPLE_IDS]))
        observed = self.observe(batch, own, gradients)
        return StepResult(loss, norm, stops, tf.size(batch[schema.LABELS]), checksum, observed)

    def observe(
        self, batch: Batch, own: Sequence[tf.Tensor | tf.IndexedSlices], merged: Sequence[Gradient]
    ) -> Observed:
        """What the update did, from this rank's gradients and those of the global batch."""
        tables = [gradient for gradient in own if isinstance(gradient, tf.IndexedSlices)]
        rows = [gradient.row_ids for gradient in merged if isinstance(gradient, RowGradients)]
        places = batch[schema.ITEM_PLACES]
        unknown = tf.gather(self._model.lookup.unknown(batch[schema.DISTINCT_ITEM_IDS]), places, axis=1)
        num_unknown = tf.reduce_sum(tf.cast(unknown, tf.float32), axis=1)
        return Observed(
            _time_after(own),
            _time_after(merged),
            tf.stack([message_rows(tf.size(gradient.indices)) for gradient in tables]),
            tf.convert_to_tensor([tf.size(row_ids) for row_ids in rows] or [0]),
            num_unknown / tf.cast(tf.maximum(tf.size(places), 1), tf.float32),
            self._model.num_computed_positions(tf.size(batch[schema.HISTORY_ITEM_IDS])),
        )

    def local_gradients(
        self, batch: Batch, global_examples: tf.Tensor
    ) -> tuple[list[tf.Tensor | tf.IndexedSlices], tf.Tensor]:
        """This rank's part of the gradient and of the loss."""
        with tf.GradientTape() as tape:
            logits = self._model(batch, training=True)
            losses = tf.nn.sigmoid_cross_entropy_with_logits(labels=batch[schema.LABELS], logits=logits)
            loss = tf.reduce_sum(losses) / global_examples  # a rank without examples contributes 0
        variables = self._optimizer.variables
        return tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO), loss

    def exchange(
        self, gradients: Sequence[tf.Tensor | tf.IndexedSlices], extra: Sequence[tf.Tensor], global_examples: tf.Tensor
    ) -> tuple[list[Gradient], list[tf.Tensor]]:
        """The gradient of the global batch, on every rank."""
        return self._exchange(gradients, extra, scale=global_examples)

    def update(self, gradients: Sequence[Gradient], loss: tf.Tensor, rate: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        """Changes the weights, unless loss or gradient is not finite; returns the gradient's norm."""
        gradients = self._regularization(gradients, self._optimizer.variables, self._optimizer.names)
        norm = global_norm(gradients)
        if self._clip_norm:
            gradients = clip(gradients, norm, self._clip_norm)

        def apply() -> tf.Tensor:
            self._optimizer.apply(gradients, rate, step)
            return tf.constant(True)

        # Loss and norm are those of the global batch: every rank takes the same branch.
        tf.cond(tf.math.is_finite(loss) & tf.math.is_finite(norm), apply, lambda: tf.constant(False))
        return norm


class UnobservedTrainStep(TrainStep):
    """Tells reporters nothing: for `cli/benchmark.py`, to find what telling costs."""

    def observe(
        self, batch: Batch, own: Sequence[tf.Tensor | tf.IndexedSlices], merged: Sequence[Gradient]
    ) -> Observed:
        return Observed(*(tf.constant(0) for _ in Observed._fields))


class MessageSizes:
    """What a rank hands to the exchange in an update, in bytes by kind of message."""

    def __init__(self, model: RankingModel, optimizer: Optimizer, wire_bytes: int, world_size: int) -> None:
        """`wire_bytes`: of one value of a row gradient."""
        self._alone = world_size == 1
        tables = {weight.path for weight in model.lookup.trainable_weights}
        named = dict(zip(optimizer.names, optimizer.variables, strict=True))
        self.table_names = [name.rpartition("/")[2] for name in named if name in tables]
        self._row_bytes = [wire_bytes * named[name].shape[1] for name in named if name in tables]
        self._dense = 4 * sum(int(tf.size(variable)) for name, variable in named.items() if name not in tables)
        self._statistics = statistics_bytes(model.statistics_widths)

    def of(self, rows_sent: Sequence[int]) -> dict[str, int]:
        """With `rows_sent` of each table."""
        if self._alone:
            return {}
        rows = sum(count * size for count, size in zip(rows_sent, self._row_bytes, strict=True))
        return {"dense": self._dense, "statistics": self._statistics, "row_ids": 4 * sum(rows_sent), "rows": rows}


def statistics_bytes(widths: Sequence[int]) -> int:
    """Of the batch statistics of layers so many columns wide: 2 W + 1 numbers forward and 2 W backward."""
    return 4 * sum(4 * width + 1 for width in widths)


def _time_after(gradients: Sequence[Gradient | tf.IndexedSlices]) -> tf.Tensor:
    """The wall clock, when all of them are known."""
    parts = [part for part in tf.nest.flatten(gradients, expand_composites=True) if part is not None]
    with tf.control_dependencies(parts):
        return tf.timestamp()
