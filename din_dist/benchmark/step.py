"""Measures where the time of an update goes, and compares it with the speed of this machine's matrix products."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from din_dist.benchmark.flops import (
    BatchSizes,
    Product,
    forward_products,
    projection_products,
    retrieval_products,
    training_flops,
)
from din_dist.benchmark.scaling_model import allreduce_bytes, row_bytes
from din_dist.config import Config, Softmax
from din_dist.distributed.gradients import Gradient
from din_dist.distributed.placement import FEWEST_TO_SUM_AT_OWNERS
from din_dist.distributed.row_transports import RowGradients, merge_rows
from din_dist.distributed.runtime import Runtime
from din_dist.execution import Execution
from din_dist.files import read_text
from din_dist.models.behaviour_model import BehaviourModel
from din_dist.schema import Batch
from din_dist.telemetry.step_report import Moment
from din_dist.training.train_step import StepResult, TrainStep, statistics_bytes

LEARNING_RATE = 1e-6  # costs the same work as any other, and never diverges


@dataclasses.dataclass
class UpdateTotals:
    """Counts and times of this rank's updates."""

    steps: int = 0
    examples: int = 0
    positions: int = 0
    items: int = 0
    sides: int = 0
    wait_seconds: float = 0.0
    step_seconds: float = 0.0  # includes `report_seconds`
    report_seconds: float = 0.0

    def add(self, batch: Batch, waited: float, seconds: float, report_seconds: float) -> None:
        self.steps += 1
        self.examples += len(batch.candidate_item_ids)
        self.positions += len(batch.history_item_ids)
        self.items += len(batch.distinct_item_ids)
        self.sides += max((len(ids) for ids in dict(batch.sides).values()), default=0)
        self.wait_seconds += waited
        self.step_seconds += seconds
        self.report_seconds += report_seconds

    @property
    def seconds(self) -> float:
        return self.wait_seconds + self.step_seconds

    def mean_sizes(self) -> BatchSizes:
        """Returns the mean sizes of an update."""
        totals = (self.examples, self.positions, self.items, self.sides)
        return BatchSizes(*(round(total / self.steps) for total in totals))


class StepBenchmark:
    """Times real updates on this rank's share of real batches.

    Args:
        step: the update.
        batches: this rank's batches.
        global_batch_size: examples of an update over all ranks.
        report: called after each update, as in training. Its arguments are the batch, the result, the seconds of
            waiting for input and the start of the update. None: nothing is reported.
    """

    def __init__(
        self,
        step: TrainStep,
        batches: Iterator[Batch],
        global_batch_size: int,
        report: Callable[[Batch, StepResult, float, Moment], None] | None,
    ) -> None:
        self._step, self._batches, self._report = step, batches, report
        self._global_batch_size = global_batch_size
        self._count = 0
        self._rate = tf.constant(LEARNING_RATE, tf.float32)
        self._parts = [
            tf.function(part, autograph=False, reduce_retracing=True)  # shapes vary from batch to batch
            for part in (step.local_gradients, self._exchange, step.update)
        ]

    def _exchange(
        self, gradients: list[Any], loss: tf.Tensor, global_examples: tf.Tensor
    ) -> tuple[list[Any], tf.Tensor]:
        merged, summed = self._step.exchange(gradients, loss[None], global_examples)
        return merged, summed[0]

    def run(self, num_steps: int) -> UpdateTotals:
        """Runs whole updates, as training does, and returns their totals."""
        timed = []
        for _ in range(num_steps):
            started = time.perf_counter()
            batch = next(self._batches)
            fetched = Moment.now()
            self._count += 1
            result = self._step(batch, LEARNING_RATE, self._count, self._global_batch_size)
            float(result.loss)  # training reads it too
            known = time.perf_counter()
            if self._report:
                self._report(batch, result, fetched.steady - started, fetched)
            ended = time.perf_counter()
            timed.append((batch, fetched.steady - started, ended - fetched.steady, ended - known))
        totals = UpdateTotals()
        for entry in timed:  # afterwards, because counting between updates would hide time of the input pipeline
            totals.add(*entry)
        return totals

    def run_in_parts(self, num_steps: int) -> tuple[dict[str, float], list[Any], list[Any]]:
        """Times forward and backward pass, exchange and update separately.

        Returns:
            The median seconds of each part; the gradients of one update on this rank; the same of all ranks.
        """
        seconds = []
        gradients: list[Any] = []
        merged: list[Any] = []
        global_examples = tf.constant(self._global_batch_size, tf.float32)
        local_gradients, exchange, update = self._parts  # medians, because some are compiled for new lengths on the way
        for _ in range(num_steps):
            batch = next(self._batches)
            self._count += 1
            marks = [_now()]
            gradients, loss, _ = local_gradients(batch, global_examples)
            marks.append(_now())
            merged, loss = exchange(gradients, loss, global_examples)
            marks.append(_now())
            update(merged, loss, self._rate, tf.constant(self._count, tf.int64))
            marks.append(_now())
            seconds.append(np.diff(marks))
        names = ("forward_backward", "exchange", "update")
        return dict(zip(names, np.median(seconds, axis=0).tolist(), strict=True)), gradients, merged


def _now() -> float:
    tf.test.experimental.sync_devices()
    return time.perf_counter()


def matrix_seconds(products: Sequence[Product], repeats: int = 5) -> float:
    """Returns the seconds that these products and their two gradients take alone, the best of `repeats` runs each."""
    return sum(sum(_best_seconds(run, repeats) for run in _runs(product)) for product in products)


def _runs(product: Product) -> list[Callable[[], tf.Tensor]]:
    rows, inner, columns = product
    left, right, out = (tf.random.normal(shape) for shape in ((rows, inner), (inner, columns), (rows, columns)))
    return [
        lambda: tf.matmul(left, right),
        lambda: tf.matmul(out, right, transpose_b=True),
        lambda: tf.matmul(left, out, transpose_a=True),
    ]


def _best_seconds(run: Callable[[], Any], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        started = _now()
        run()
        times.append(_now() - started)
    return min(times)


def message_sizes(
    gradients: Sequence[tf.Tensor | tf.IndexedSlices],
    merged: Sequence[Gradient],
    variables: Sequence[tf.Variable],
    statistics_widths: Sequence[int],
    wire_bytes: int,
    packed: bool,
) -> dict[str, int]:
    """Returns the sizes of a rank's messages in an update, in bytes, and how many messages it waits for.

    `summed_row_bytes` counts the rows that any rank has touched. `table_bytes` is the same if every row of every table
    were touched.

    Args:
        gradients: of this rank.
        merged: gradients of all ranks, or this rank's part of them.
        variables: of the gradients, in their order.
        statistics_widths: W of each layer with batch statistics, which sends 2 W + 1 numbers forward and 2 W backward.
        wire_bytes: bytes of one value of a row gradient; each row's id takes 4 bytes.
        packed: rows are packed by our kernels.
    """
    tables = [pair for pair in zip(gradients, variables, strict=True) if isinstance(pair[0], tf.IndexedSlices)]
    dense = [gradient for gradient in gradients if not isinstance(gradient, tf.IndexedSlices)]
    bytes_of_a_row = [4 + wire_bytes * int(np.prod(table.shape[1:])) for _, table in tables]
    touched = [int(gradient.indices.shape[0]) for gradient, _ in tables]
    by_any = [int(each.num_rows_of_all()) for each in merged if isinstance(each, RowGradients)]

    num_gathers = (1 if packed else 2) * bool(tables)  # ids and rows; our kernels put both into one message

    def in_bytes(num_rows: Sequence[int]) -> int:
        return sum(number * size for number, size in zip(num_rows, bytes_of_a_row, strict=True))

    return {
        "dense_gradient_bytes": 4 * sum(int(tf.size(gradient)) for gradient in dense),
        "row_gradient_bytes": in_bytes(touched),
        "summed_row_bytes": in_bytes(by_any),
        "table_bytes": in_bytes([table.shape[0] for _, table in tables]),
        "statistics_bytes": statistics_bytes(statistics_widths),
        "num_gradient_messages": (2 if packed else 1) + num_gathers,  # some dense gradients are sent before the others
        "num_gather_messages": num_gathers,
        "num_statistics_messages": 2 * len(statistics_widths),
    }


def row_merge_seconds(
    gradients: Sequence[tf.Tensor | tf.IndexedSlices], execution: Execution, repeats: int = 5
) -> float:
    """Returns the seconds to sum the repeats among as many rows as one rank sends, the best of `repeats` runs.

    The rows of several ranks are summed by one call, as in an update; the result is the time for one rank's share.

    Args:
        gradients: of this rank.
        execution: with or without our own kernels.
        repeats: the number of runs.
    """
    num_ranks = 8
    tables = [gradient for gradient in gradients if isinstance(gradient, tf.IndexedSlices)]
    row_ids = [tf.tile(tf.cast(table.indices, tf.int32), [num_ranks]) for table in tables]
    rows = [tf.tile(table.values, [num_ranks, 1]) for table in tables]

    @tf.function(autograph=False)
    def merge() -> list[RowGradients]:
        return [merge_rows(*of_table, execution) for of_table in zip(row_ids, rows, strict=True)]

    return _best_seconds(merge, repeats) / num_ranks if tables else 0.0


def bytes_sent(sizes: Mapping[str, int], world_size: int, owners_sum_rows: bool) -> dict[str, int]:
    """Returns the bytes that a rank sends in an update over Horovod (see `benchmark/scaling_model.py`)."""
    at_owners = owners_sum_rows and world_size >= FEWEST_TO_SUM_AT_OWNERS
    rows = row_bytes(sizes["row_gradient_bytes"], sizes["summed_row_bytes"], world_size, at_owners)
    statistics = allreduce_bytes(sizes["statistics_bytes"], world_size, sizes["num_statistics_messages"])
    return {
        "dense": round(allreduce_bytes(sizes["dense_gradient_bytes"], world_size)),
        "statistics": round(statistics),
        "sparse": round(rows),
    }


def seconds_since_process_start() -> float:
    fields = read_text(Path("/proc/self/stat")).rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _products(config: Config, model: BehaviourModel, sizes: BatchSizes) -> list[Product]:
    """Returns all matrix products of a forward pass."""
    columns = model.example_columns
    width = columns.width if columns else 0
    if config.model.model.retrieves:
        is_full = config.model.softmax is Softmax.FULL
        num_sampled = model.lookup.specs[0].num_rows - 1 if is_full else config.model.num_sampled
        products = retrieval_products(config.model, model.lookup.width, sizes, num_sampled)
    else:
        of_model = (width, model.num_tasks, model.num_histories, model.side_width)
        products = forward_products(config.model, model.lookup.width, sizes, *of_model)
    products += projection_products(model.lookup.columns, sizes.items)
    return products + projection_products(columns, sizes.examples)


def report(
    config: Config,
    runtime: Runtime,
    model: BehaviourModel,
    totals: UpdateTotals,
    parts: dict[str, float],
    gradients: Sequence[Any],
    merged: Sequence[Any],
) -> dict[str, Any]:
    """Returns the results of a benchmark: rates summed over the ranks, and all other numbers of the chief.

    All ranks must call it.
    """
    rates = runtime.sum(np.array([totals.examples, totals.positions], np.float64) / totals.seconds)
    products = _products(config, model, totals.mean_sizes())
    flops = training_flops(products)
    runtime.barrier()  # so that all ranks multiply at once, as in training
    alone_seconds = matrix_seconds(products)
    per_step = totals.seconds / totals.steps
    model_variables = [weight.value for weight in model.trainable_weights]
    execution = model.training_mode.execution
    wire_bytes = tf.as_dtype(config.optimizer.wire_dtype.value).size
    sizes = message_sizes(gradients, merged, model_variables, model.statistics_widths, wire_bytes, execution.kernels)
    return {
        "world_size": runtime.world_size,
        "global_batch_size": config.job.global_batch_size,
        "examples_per_second": float(rates[0]),
        "positions_per_second": float(rates[1]),
        "positions_per_step": totals.positions / totals.steps,
        "step_seconds": per_step,
        "report_seconds": totals.report_seconds / totals.steps,
        "input_wait_seconds": totals.wait_seconds / totals.steps,
        **{f"{name}_seconds": value for name, value in parts.items()},
        **sizes,
        "row_merge_seconds": row_merge_seconds(gradients, execution),
        "owners_sum_rows": execution.kernels,
        "bytes_sent_per_step": bytes_sent(sizes, runtime.world_size, owners_sum_rows=execution.kernels),
        "flops_per_example": flops / totals.mean_sizes().examples,
        "matrix_flops_per_second": flops / alone_seconds,
        "achieved_flops_per_second": flops / per_step,
        "share_of_matrix_rate": alone_seconds / per_step,
    }
