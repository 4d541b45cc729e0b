"""The loop."""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow as tf

from din_dist import progress
from din_dist.config import Config
from din_dist.data.pipeline import num_steps_per_epoch
from din_dist.distributed.elastic import WorkersChanged
from din_dist.distributed.runtime import Runtime
from din_dist.errors import FailedElsewhere, InputError, Interrupted, Left
from din_dist.evaluation.evaluator import Evaluator, logits_of
from din_dist.schema import Batch
from din_dist.telemetry.reporter import Reporter
from din_dist.telemetry.step_report import PARTS, Moment, StepReport
from din_dist.training.checkpoint import CheckpointStore
from din_dist.training.learner import Learner, TrainingData
from din_dist.training.rejoin import Rejoin, Standing
from din_dist.training.schedules import learning_rate, num_updates
from din_dist.training.train_step import Requests, StepResult, checksum_of
from din_dist.training_state import TrainingState

_NAMED_EXAMPLES = 10  # of each rank, in an error
_FURTHER_TRIES = 5  # to save the best weights
_PATIENCE_SECONDS = 5.0  # at the end, with a checkpoint that is still being written
_SAMPLED_ROWS = 10_000  # of a table, for a histogram: a whole one may have billions


class ReceivedSignals(Protocol):
    """Requests to this process, looked at in every step."""

    stop: bool  # the whole job
    leave: bool  # this rank alone


class NoSignals:
    """A process that nobody asks for anything."""

    stop = leave = False


class Update(NamedTuple):
    """An update that was made."""

    batch: Batch  # this rank's share
    result: StepResult
    learning_rate: float
    global_examples: int
    waited: float  # seconds for the batch, until `started`
    started: Moment


class Trainer:
    """Trains a model to the end of its epochs, from wherever the output directory says it stands."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        learner: Learner,
        data: TrainingData,
        evaluator: Evaluator,
        checkpoints: CheckpointStore,
        telemetry: Reporter,
        signals: ReceivedSignals,
    ) -> None:
        self._config, self._runtime, self._signals = config, runtime, signals
        self._model, self._step, self._undo_log = learner.model, learner.step, learner.undo_log
        self._variables, self._message_sizes = learner.variables, learner.message_sizes
        self._make_batches, self._examples_per_epoch = data.make_batches, data.examples_per_epoch
        self._store, self._shards = data.store, learner.shards
        self._rejoin = Rejoin(config, runtime, learner, data, checkpoints, telemetry)
        self._evaluator, self._checkpoints, self._telemetry = evaluator, checkpoints, telemetry
        self._logits_of = logits_of(self._model)
        self._saved_step = 0
        self.state = TrainingState()
        self.validation_metric = "gauc"  # what the best model is chosen by
        self.num_steps = num_updates(config, data.examples_per_epoch)
        # max_steps ends a job early; it does not bend the schedule of the epochs, so that the job can go on later.
        self._steps_of_schedule = config.job.epochs * num_steps_per_epoch(
            data.examples_per_epoch, config.job.global_batch_size
        )
        self.seconds = {"training": 0.0, "validation": 0.0, "checkpoint": 0.0, "test": 0.0}
        self._timed_examples, self._timed_seconds = 0, 0.0

    def _join(self) -> None:
        """Takes up training where the job stands, and does what was due there."""
        standing = Standing(self.state, self._saved_step, self.validation_metric)
        standing, finished = self._rejoin.take_up(standing)
        self.state, self._saved_step, self.validation_metric = standing
        if self._step.can_be_undone:
            self._undo_log.begin(self.state, finished=finished)
        self._telemetry.started(self.state)
        if not finished:
            self._after_update()

    def train(self) -> None:
        """Runs all remaining updates.

        Raises:
            Interrupted: after a checkpoint, when any rank was asked to stop, or all to leave.
            Left: this rank was asked to leave, and the others go on.
            WorkersChanged: ranks come or go.
            FloatingPointError: a loss or gradient that is not finite; the weights are those before that update.
        """
        self._join()
        try:
            self._train_to_the_end()
        except Exception as error:
            error.add_note(f"step {self.state.step + 1}")
            if not self._runtime.elastic or isinstance(error, Left):
                self._checkpoints.finish(_PATIENCE_SECONDS)  # this process is about to end
            raise

    def _train_to_the_end(self) -> None:
        for batch, waited in self._batches():
            started = Moment.now()
            global_examples = self._next_examples()
            rate = learning_rate(self._config.optimizer, self.state.step + 1, self._steps_of_schedule)
            result = self._train_on(batch, rate, global_examples)
            self._count(Update(batch, result, rate, global_examples, waited, started))
            self._after_update()
            self._answer(Requests(*result.requests.numpy().tolist()))
            if self._should_stop_early():
                self._telemetry.say(
                    f"stopping: {self.state.validations_without_gain} validations without a better "
                    f"{self.validation_metric.upper()}"
                )
                break
        self._save_what_is_left()

    def test(self) -> dict[str, Any]:
        """Scores the test split with the best weights by validation, or the last ones where there is no validation."""
        state = self.state
        self._undo_log.clear()
        with self._phase("test"):
            if state.best_step not in (0, state.step):
                if self._checkpoints.has(state.best_step):
                    self._checkpoints.restore(self._variables, state.best_step)
                else:
                    lost = f"the best weights, of step {state.best_step}, could not be saved: testing the last ones"
                    self._telemetry.say(lost, level="warning")
            return self._evaluate("test")

    @property
    def examples_per_second(self) -> float:
        """The speed in examples of the global batch, without validation and the first update of a run (tracing)."""
        return self._timed_examples / self._timed_seconds if self._timed_seconds else 0.0

    def save(self, *, required: bool = False, is_best: bool = False) -> None:
        """Publishes a checkpoint; all ranks are at the same step.

        Unless it is `required`, it is written while training goes on, or before that if every rank writes its shards.
        If it cannot be written, the failure is logged and counted. The best weights are tried for some seconds more.

        Raises:
            InputError, FailedElsewhere: it failed and is `required`; or what it learned from has changed, at any time.
        """
        with self._runtime.together(), progress.at(f"looking at {self._store.folder}"):
            self._store.check_unchanged()
        with self._phase("checkpoint"):
            started = time.perf_counter()
            if not required and not self._checkpoints.needs_all_ranks:
                if self._runtime.is_chief:
                    tries = 1 + (_FURTHER_TRIES if is_best else 0)
                    failed = self._telemetry.checkpoint_failed
                    self._checkpoints.save_later(self._variables, self.state, tries, self._note_saved, failed)
                return
            try:
                num_bytes = self._checkpoints.save(self._variables, self.state)
            except (InputError, FailedElsewhere) as error:
                if required:
                    raise
                if self._runtime.is_chief:
                    self._telemetry.checkpoint_failed(str(error))
                return
            self._saved_step = self.state.step
            self._telemetry.after_checkpoint(self.state, time.perf_counter() - started, num_bytes)

    def _note_saved(self, state: TrainingState, seconds: float, num_bytes: int) -> None:
        self._saved_step = state.step
        self._telemetry.after_checkpoint(state, seconds, num_bytes)

    def _save_what_is_left(self) -> None:
        """Publishes where the job stands, unless that was done; all ranks know the same then.

        Raises:
            InputError, FailedElsewhere: it failed.
        """
        if self._runtime.is_chief:
            with self._phase("checkpoint"):
                self._checkpoints.finish()
        self._saved_step = int(self._runtime.broadcast_object(self._saved_step))
        if self.state.step > self._saved_step:
            self.save(required=True)

    def save_alone(self) -> None:
        """Publishes a checkpoint of where this rank's memory stands, when the others cannot be reached.

        Raises:
            OSError: the checkpoint could not be written.
        """
        position = self._undo_log.newest()
        if position is None or position[0] <= self._saved_step:
            return  # the disk has it, or nothing was learned yet
        self.state = self._undo_log.go_back(position[0], finished=position[1])
        self._checkpoints.save_alone(self._variables, self.state)

    def _batches(self) -> Iterator[tuple[Batch, float]]:
        if self._should_stop_early():
            return
        batches = iter(self._make_batches(self.state.step, self.num_steps))
        while True:
            started = time.perf_counter()
            with progress.at(f"reading data in {self._store.folder}"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch, time.perf_counter() - started

    def _next_examples(self) -> int:
        """Returns the examples of the next update over all ranks; the last of an epoch may have fewer."""
        return min(self._config.job.global_batch_size, self._examples_per_epoch - self.state.examples_seen)

    def _train_on(self, batch: Batch, rate: float, global_examples: int) -> StepResult:
        step = self.state.step + 1
        requests = Requests(self._signals.stop, self._signals.leave, self._runtime.workers_changed())
        result = self._step(batch, rate, self.state.slot_updates + 1, global_examples, requests)
        if not _is_finite(result):
            self._refuse(result, step)
        return result

    def _refuse(self, result: StepResult, step: int) -> None:
        """Forgets an update that did not change the weights, or stops the job."""
        loss, norm = float(result.loss), float(result.gradient_norm)
        self._telemetry.refused_step(loss, norm)
        problem = (
            f"Step {step}: loss and gradient must be finite. Received: loss {loss}, gradient norm {norm}, "
            f"{self._culprits(result)}."
        )
        if self._step.can_be_undone:
            self._undo_log.go_back(self.state.step, finished=True)  # it has moved the averages of batch statistics
        if self.state.skipped_steps < self._config.recovery.skip_nonfinite_steps:
            self.state.skipped_steps += 1
            self._telemetry.say(
                f"{problem} Skipped, {self.state.skipped_steps} of at most "
                f"{self._config.recovery.skip_nonfinite_steps}.",
                level="warning",
            )
            return
        if not self._runtime.is_chief:
            raise FailedElsewhere
        raise FloatingPointError(
            f"{problem} The weights were not updated; the last checkpoint is good. In another --output_dir, try a "
            "lower --learning_rate or --clip_norm=5."
        )

    def _culprits(self, result: StepResult) -> str:
        """Names the examples of all ranks whose own loss is not finite."""
        mine = result.nonfinite_examples.numpy()
        rows = self._runtime.gather(np.stack([np.full_like(mine, self._runtime.rank), mine], axis=1))
        if not len(rows):
            return "though the loss of each example is finite"
        named = "; ".join(
            f"on rank {rank} of examples {', '.join(map(str, rows[rows[:, 0] == rank, 1][:_NAMED_EXAMPLES]))}"
            for rank in np.unique(rows[:, 0])
        )
        return f"the loss of {len(rows)} example(s) by itself: {named}"

    def _count(self, update: Update) -> None:
        report, result = self.report(update), update.result
        if self.seconds["training"]:  # the first update of a run is mostly tracing
            self._timed_examples += update.global_examples
            self._timed_seconds += report.total_seconds
        self.seconds["training"] += report.total_seconds
        loss = report.loss if _is_finite(result) else 0.0
        self.state.advance(update.global_examples, loss, checksum_of(result.checksum.numpy().tolist()))
        self.keep(result)
        self._telemetry.after_step(self.state, report, lambda: self._histograms(update.batch))

    def keep(self, result: StepResult) -> None:
        """Notes how to undo an update, in jobs that may have to."""
        if self._step.can_be_undone:
            self._undo_log.add(self.state, result.values if _is_finite(result) else None, result.replaced)

    def report(self, update: Update) -> StepReport:
        """Returns what an update did, and what it took until now."""
        result = update.result
        observed = [part.numpy() for part in result.observed]
        gradients_ready, exchange_ended, rows_sent, unique_rows, unknown_ids, computed_positions = observed
        ends = [float(gradients_ready), float(exchange_ended)]
        parts = [update.waited, *update.started.seconds_between(ends)]
        positions = update.batch.history_item_ids.shape[0]
        return StepReport(
            loss=float(result.loss),
            gradient_norm=float(result.gradient_norm),
            learning_rate=update.learning_rate,
            global_examples=update.global_examples,
            examples=int(result.num_examples),
            positions=positions,
            padding_ratio=1 - positions / max(int(computed_positions), 1) if positions else 0.0,
            seconds=dict(zip(PARTS, parts, strict=True)),
            exchanged_bytes=self._message_sizes.of(rows_sent.tolist()),
            unique_rows=dict(zip(self._message_sizes.table_names, unique_rows.tolist(), strict=True)),
            unknown_ids_ratio=dict(
                zip((spec.name for spec in self._model.specs_of_ids), unknown_ids.tolist(), strict=True)
            ),
        )

    def _histograms(self, batch: Batch) -> dict[str, np.ndarray]:
        """Returns values of this rank's last batch, and of a sample of each table's rows, for histograms."""
        found = {}
        # With sharded tables a rank reads no rows alone, and the sample is of its own shard.
        if not self._shards and (weights := self._model.attention_weights(batch)) is not None:
            found["attention_weights"] = weights.numpy()
        for spec, table in self._model.embeddings:
            num_rows = table.shape[0]
            rows = np.unique(np.linspace(1, num_rows - 1, _SAMPLED_ROWS, dtype=np.int32))
            rows = rows[rows < num_rows]  # a table may have row 0 alone
            found[f"embedding_norms/{spec.name}"] = np.linalg.norm(tf.gather(table.value, rows).numpy(), axis=1)
        return found

    def _end_epoch(self) -> None:
        record = self.state.end_epoch()
        self._telemetry.after_epoch(self.state, record)
        self.save(is_best=self._validate())

    def _after_update(self) -> None:
        if self.state.examples_seen == self._examples_per_epoch:
            self._end_epoch()
        else:
            self._do_what_is_due()
        if self._step.can_be_undone:
            self._undo_log.finish(self.state)

    def _answer(self, requests: Requests) -> None:
        """Does what ranks have requested; `requests` says how many have each, and is the same on all."""
        if requests.stop or requests.leave == self._runtime.world_size:
            self._stop()
        if requests.leave and self._signals.leave:
            raise Left("on request")
        if requests.leave or requests.change:
            raise WorkersChanged

    def _do_what_is_due(self) -> None:
        """Validates and saves as often as the flags say; the step alone decides, so that every rank does it."""
        config, step = self._config, self.state.step
        improved = _is_due(step, config.evaluation.evaluate_every_steps) and self._validate()
        if improved or _is_due(step, config.recovery.checkpoint_every_steps):
            self.save(is_best=improved)

    def _validate(self) -> bool:
        """Scores the validation split, if there is one. Returns True if the result is the best so far."""
        if not self._evaluator.has_examples("validation"):
            return False
        with self._phase("validation"):
            metrics = self._evaluate("validation")
        self.validation_metric = "auc" if math.isnan(metrics["gauc"]) else "gauc"
        return self.state.note_validation(metrics[self.validation_metric])

    def _evaluate(self, split: str) -> dict[str, float]:
        if not self._evaluator.has_examples(split):
            return {}
        started = time.perf_counter()
        metrics = self._evaluator.evaluate(split, self._logits_of)
        self._telemetry.after_evaluation(split, self.state, metrics, time.perf_counter() - started)
        return metrics

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        with self._telemetry.phase(name):
            yield
        self.seconds[name] += time.perf_counter() - started

    def _should_stop_early(self) -> bool:
        patience = self._config.evaluation.early_stopping_patience
        return bool(patience) and self.state.validations_without_gain >= patience

    def _stop(self) -> None:
        self._save_what_is_left()
        raise Interrupted(
            f"on request, after the checkpoint of step {self.state.step}. The same command goes on from there."
        )


def peak_memory_bytes() -> int:
    """Returns the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _is_finite(result: StepResult) -> bool:
    """Tells whether loss and gradient are finite; the same on all ranks."""
    return math.isfinite(float(result.loss)) and math.isfinite(float(result.gradient_norm))


def _is_due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0
