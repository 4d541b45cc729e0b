"""One update of the weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from din_dist.config import OptimizerConfig
from din_dist.data.hashing import hash64
from din_dist.data.pipeline import batch_signature
from din_dist.distributed.gradients import Gradient, GradientExchange, OwnGradient
from din_dist.distributed.row_transports import RowGradients
from din_dist.distributed.sharded_lookup import RoutedGradient
from din_dist.execution import on_host
from din_dist.models.behaviour_model import BehaviourModel
from din_dist.schema import Batch
from din_dist.training.optimizers import Optimizer
from din_dist.training.regularization import Regularization, clip
from din_dist.training.undo import UndoLog


class Observed(NamedTuple):
    """Facts of an update on this rank, for reporters."""

    gradients_ready: tf.Tensor  # float64, seconds of the wall clock
    exchange_ended: tf.Tensor  # likewise
    rows_sent: tf.Tensor  # int32 [S], of each table, padding included, also by a rank that has nobody to send to
    unique_rows: tf.Tensor  # int32 [S], over all ranks
    unknown_ids: tf.Tensor  # float32 [T], as from `BehaviourModel.unknown_ids`
    computed_positions: tf.Tensor  # int32, padding included


class StepResult(NamedTuple):
    """The results of an update; all until `checksum` are equal on all ranks."""

    loss: tf.Tensor  # mean over the global batch
    gradient_norm: tf.Tensor
    requests: tf.Tensor  # float32 [3], how many ranks have each request of `Requests`
    checksum: tf.Tensor  # float32 [8], the sums of the bytes of the ranks' checksums (see `checksum_of`)
    num_examples: tf.Tensor  # of this rank
    nonfinite_examples: tf.Tensor  # int64, those of this rank whose loss is not finite
    observed: Observed
    values: list[tf.Tensor]  # of the undo log's `others`, after the update
    replaced: list[RowGradients]  # rows of its `tables`, before it


class Requests(NamedTuple):
    """Requests of one rank to all, which arrive at all of them with the same update."""

    stop: bool = False  # the whole job
    leave: bool = False  # this rank alone
    change: bool = False  # workers are to be taken in or let go


NO_REQUESTS = Requests()
NUM_CHECKSUM_PARTS = 8


class TrainStep:
    """One update of the weights, the same on every rank.

    Args:
        undo_log: keeps what undoes an update; None: no update is ever undone.
    """

    def __init__(
        self,
        model: BehaviourModel,
        optimizer: Optimizer,
        exchange: GradientExchange,
        regularization: Regularization,
        config: OptimizerConfig,
        undo_log: UndoLog | None = None,
    ) -> None:
        self._undo_log = undo_log
        self._model, self._optimizer, self._exchange = model, optimizer, exchange
        self._regularization, self._clip_norm = regularization, config.clip_norm
        self._task_weights = tf.constant(config.task_weights or [1.0] * model.num_tasks)
        self._begun = functools.cache(self._begin)

    @property
    def can_be_undone(self) -> bool:
        return self._undo_log is not None

    def __call__(
        self, batch: Batch, rate: float, step: int, global_examples: int, requests: Requests = NO_REQUESTS
    ) -> StepResult:
        """Trains on this rank's share `batch` of a global batch of `global_examples`.

        `step` counts the updates of the optimizer's slots from 1, those of the jobs before a warm start included.
        """
        # One tensor, for to make and hand over each takes a hundredth of a small update.
        numbers = tf.constant([rate, step, global_examples, *requests], tf.float64)
        return self._begun(self._exchange.sums_at_owners, batch.extras)(batch, numbers)

    def _begin(self, sums_at_owners: bool, extras: tuple[str, ...]) -> Callable[..., StepResult]:
        """Returns the function that runs an update, made once for each form of the exchange and of batches."""
        if self._optimizer.updates_in_place:
            self._exchange.share(self._optimizer.changing_by_rows)
        batches = batch_signature(self._model.batch_encodings, extras, self._model.num_tasks)
        signature = [batches, tf.TensorSpec([3 + len(Requests._fields)], tf.float64)]
        self._run = tf.function(self._step, input_signature=signature, autograph=False)
        return self._run.get_concrete_function()

    def _step(self, batch: Batch, numbers: tf.Tensor) -> StepResult:
        """Runs one update; `numbers` are rate, step, global examples and requests, float64."""
        with on_host():
            in_float32, step = tf.cast(numbers, tf.float32), tf.cast(numbers[1], tf.int64)
            rate, global_examples, requests = in_float32[0], in_float32[2], in_float32[3:]
        own, loss, losses = self.local_gradients(batch, global_examples)
        with on_host():
            others = tf.concat([requests, _as_bytes(tf.reduce_sum(hash64(batch.example_ids)))], axis=0)
        ready, told = _time_after(own), tf.concat([loss[None], others], axis=0)
        with tf.control_dependencies([ready]):  # else a worker of one core may look at the clock after the exchange
            # Not the concatenation itself: TensorFlow's optimizer merges it into the next one, which does not wait.
            told = tf.identity(told)
        gradients, extra = self.exchange(own, told, global_examples)
        loss = extra[0]
        with on_host():
            heard, checksum = tf.split(extra[1:], [len(Requests._fields), NUM_CHECKSUM_PARTS])
        norm, replaced = self.update(gradients, loss, rate, step)
        return StepResult(
            loss,
            norm,
            requests=heard,
            checksum=checksum,
            num_examples=tf.size(batch.candidate_item_ids),
            nonfinite_examples=tf.boolean_mask(batch.example_ids, ~tf.math.is_finite(losses)),
            observed=self.observe(batch, ready, own, gradients),
            values=[variable.read_value() for variable in self._undo_log.others] if self._undo_log else [],
            replaced=replaced,
        )

    def observe(
        self,
        batch: Batch,
        gradients_ready: tf.Tensor,
        own: Sequence[OwnGradient],
        merged: Sequence[Gradient],
    ) -> Observed:
        """Returns what the update did, from this rank's gradients and those of the global batch."""
        by_rows = [gradient for gradient in own if isinstance(gradient, tf.IndexedSlices | RoutedGradient)]
        touched = [tf.size(gradient.indices) for gradient in by_rows]
        rows = [gradient for gradient in merged if isinstance(gradient, RowGradients)]
        num_rows = [each.num_rows_of_all() for each in rows]
        with on_host():
            transport = self._exchange.rows
            sent = [
                tf.size(gradient.indices) if isinstance(gradient, RoutedGradient) else transport.rows_sent(*numbers)
                for gradient, *numbers in zip(by_rows, touched, num_rows or touched, strict=True)
            ]
            return Observed(
                gradients_ready,
                _time_after(merged),
                tf.stack(sent),
                tf.convert_to_tensor(num_rows or [0]),
                self._model.unknown_ids(batch),
                self._model.num_computed_positions(tf.size(batch.history_item_ids)),
            )

    def local_gradients(
        self, batch: Batch, global_examples: tf.Tensor
    ) -> tuple[list[OwnGradient], tf.Tensor, tf.Tensor]:
        """Returns this rank's part of the gradient and of the loss, and the loss of each of its examples."""
        shards = self._exchange.shards
        with tf.GradientTape() as tape, shards.watched_by(tape) if shards else contextlib.nullcontext():
            losses = self._model.losses(batch)
            if self._model.num_tasks > 1:
                losses = tf.linalg.matvec(losses, self._task_weights)
            weighted = losses * batch.weights if "weights" in batch.extras else losses
            loss = tf.reduce_sum(weighted) / global_examples  # a rank without examples contributes 0
        variables = self._optimizer.variables
        if shards:
            return shards.gradients(tape, loss, variables), loss, losses
        return tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO), loss, losses

    def exchange(
        self, gradients: Sequence[OwnGradient], extra: tf.Tensor, global_examples: tf.Tensor
    ) -> tuple[list[Gradient], tf.Tensor]:
        """Returns the gradients of the global batch and the sums of `extra`.

        If ranks share the rows of a table out, it is the gradient of those rows that this rank updates.
        """
        late_weights = {id(weight.value) for weight in self._model.late_weights}
        early = [id(variable) not in late_weights for variable in self._optimizer.variables]
        return self._exchange(gradients, extra, scale=global_examples, early=early)

    def update(
        self, gradients: Sequence[Gradient], loss: tf.Tensor, rate: tf.Tensor, step: tf.Tensor
    ) -> tuple[tf.Tensor, list[RowGradients]]:
        """Changes the weights, unless loss or gradient is not finite; returns the gradient's norm and replaced rows."""
        keep = self._undo_log is not None and any(isinstance(gradient, RowGradients) for gradient in gradients)
        values = self._optimizer.values_of(gradients)
        gradients, norm = self._regularization(gradients, values, self._optimizer.names, self._exchange.sum_of_parts)
        if self._clip_norm:
            gradients = clip(gradients, norm, self._clip_norm)

        def apply() -> list[RowGradients]:
            return self._optimizer.apply(gradients, values, rate, step, keep)

        def refuse() -> list[RowGradients]:
            shapes = [[0, *variable.shape[1:]] for variable in self._optimizer.changing_by_rows if keep]
            return [RowGradients(tf.zeros([0], tf.int32), tf.zeros(shape)) for shape in shapes]

        # Loss and norm are those of the global batch: every rank takes the same branch. Nor does any of them begin
        # before all of the exchange is done, so that an update whose exchange fails has changed no weights.
        replaced = tf.cond(tf.math.is_finite(loss) & tf.math.is_finite(norm), apply, refuse)
        self._exchange.finish()
        return norm, replaced


class UnobservedTrainStep(TrainStep):
    """Tells reporters nothing: for `cli/benchmark.py`, to find what telling costs."""

    def observe(
        self,
        batch: Batch,
        gradients_ready: tf.Tensor,
        own: Sequence[OwnGradient],
        merged: Sequence[Gradient],
    ) -> Observed:
        return Observed(*(tf.constant(0) for _ in Observed._fields))


def checksum_of(sums: Sequence[float]) -> int:
    """Returns the sum modulo 2**64 of the ranks' checksums, given the `sums` of each byte, the lowest first."""
    return sum(int(value) << (8 * place) for place, value in enumerate(sums)) % 2**64


def _as_bytes(checksum: tf.Tensor) -> tf.Tensor:
    """Splits a uint64 into 8 float32, which add up exactly over 65,000 ranks in the message of dense gradients."""
    places = tf.constant([8 * place for place in range(NUM_CHECKSUM_PARTS)], tf.uint64)
    return tf.cast(tf.bitwise.right_shift(checksum, places) & tf.constant(255, tf.uint64), tf.float32)


class MessageSizes:
    """Bytes that a rank gives to the exchange in an update, by kind of message.

    Args:
        wire_bytes: of one value of a row gradient.
    """

    def __init__(self, model: BehaviourModel, optimizer: Optimizer, wire_bytes: int, has_peers: bool) -> None:
        self._alone = not has_peers
        tables = {weight.path for weight in model.tables}
        named = dict(zip(optimizer.names, optimizer.variables, strict=True))
        self.table_names = [name.rpartition("/")[2] for name in named if name in tables]
        self._row_bytes = [wire_bytes * named[name].shape[1] for name in named if name in tables]
        self._dense = 4 * sum(int(tf.size(variable)) for name, variable in named.items() if name not in tables)
        self._statistics = statistics_bytes(model.statistics_widths)

    def of(self, rows_sent: Sequence[int]) -> dict[str, int]:
        """Returns the bytes of an update that sent so many rows of each table."""
        if self._alone:
            return {}
        rows = sum(count * size for count, size in zip(rows_sent, self._row_bytes, strict=True))
        return {"dense": self._dense, "statistics": self._statistics, "row_ids": 4 * sum(rows_sent), "rows": rows}


def statistics_bytes(widths: Sequence[int]) -> int:
    """Returns the bytes of batch statistics of layers with so many columns: 2 W + 1 numbers forward, 2 W backward."""
    return 4 * sum(4 * width + 1 for width in widths)


def _time_after(gradients: Sequence[Gradient | OwnGradient]) -> tf.Tensor:
    """Reads the wall clock when all `gradients` are known."""
    parts = [part for part in tf.nest.flatten(gradients, expand_composites=True) if part is not None]
    with on_host(), tf.control_dependencies(parts):
        return tf.timestamp()
