"""The loop."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from din_dist import schema
from din_dist.config import Config, OptimizerConfig
from din_dist.data.hashing import hash64
from din_dist.data.pipeline import BATCH_SIGNATURE, num_steps_per_epoch
from din_dist.distributed.gradients import Gradient, GradientExchange
from din_dist.distributed.runtime import Runtime
from din_dist.errors import FailedElsewhere, Interrupted
from din_dist.models.ranking_model import RankingModel
from din_dist.training.checkpoint import CheckpointStore
from din_dist.training.evaluator import Evaluator
from din_dist.training.optimizers import Optimizer
from din_dist.training.regularization import Regularization, clip, global_norm
from din_dist.training.schedules import learning_rate
from din_dist.training.state import TrainingState, add_checksums
from din_dist.training.telemetry import Telemetry

Batch = Mapping[str, tf.Tensor]
MakeBatches = Callable[[int, int], Iterator[Batch]]  # updates first to last - 1, this rank's share of each


class StepResult(NamedTuple):
    """Of one update; all but the last two are equal on all ranks."""

    loss: tf.Tensor  # mean over the global batch
    gradient_norm: tf.Tensor
    stop_requests: tf.Tensor  # ranks that were asked to stop
    num_examples: tf.Tensor  # of this rank
    checksum: tf.Tensor  # uint64, of this rank's examples


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
        gradients, loss = self.local_gradients(batch, global_examples)
        gradients, (loss, stops) = self.exchange(gradients, [loss, stop], global_examples)
        norm = self.update(gradients, loss, rate, step)
        checksum = tf.reduce_sum(hash64(batch[schema.EXAMPLE_IDS]))
        return StepResult(loss, norm, stops, tf.size(batch[schema.LABELS]), checksum)

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


class Trainer:
    """Trains a model to the end of its epochs, from wherever the output directory says it stands."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        model: RankingModel,
        step: TrainStep,
        variables: Mapping[str, tf.Variable],
        make_batches: MakeBatches,
        examples_per_epoch: int,
        evaluator: Evaluator,
        checkpoints: CheckpointStore,
        telemetry: Telemetry,
        stop_requested: Callable[[], bool],
    ) -> None:
        """`variables`: by name, all that a checkpoint keeps. `stop_requested`: of this process, asked at every step."""
        self._config, self._runtime, self._step, self._variables = config, runtime, step, variables
        self._make_batches, self._examples_per_epoch = make_batches, examples_per_epoch
        self._evaluator, self._checkpoints, self._telemetry = evaluator, checkpoints, telemetry
        self._stop_requested = stop_requested
        self._logits_of = tf.function(
            lambda batch: model(batch, training=False), input_signature=[BATCH_SIGNATURE], autograph=False
        )
        self._local_checksum = 0  # of this rank's examples since the ranks last added up
        self._saved_step = 0
        self.state = TrainingState()
        self.validation_metric = "gauc"  # what the best model is chosen by
        self.num_steps = num_updates(config, examples_per_epoch)
        # max_steps ends a job early; it does not bend the schedule of the epochs, so that the job can go on later.
        self._steps_of_schedule = config.job.epochs * num_steps_per_epoch(
            examples_per_epoch, config.job.global_batch_size
        )
        self.seconds = {"training": 0.0, "validation": 0.0, "checkpoint": 0.0, "test": 0.0}
        self._timed_examples, self._timed_seconds = 0, 0.0

    def train(self) -> None:
        """Every update that is left.

        Raises:
            Interrupted: after a checkpoint, when any rank was asked to stop.
            FloatingPointError: a loss or gradient that is not finite; the weights are those before that update.
        """
        self._restore_latest()
        for batch, waited in self._batches():
            started = time.perf_counter()
            global_examples = self._next_examples()
            result = self._train_on(batch, global_examples)
            self._count(result, global_examples, waited, time.perf_counter() - started)
            if self.state.examples_seen == self._examples_per_epoch:
                self._end_epoch()
            else:
                self._do_what_is_due()
            if float(result.stop_requests):
                self._stop()
            if self._should_stop_early():
                self._telemetry.say(
                    f"stopping: {self.state.validations_without_gain} validations without a better "
                    f"{self.validation_metric.upper()}"
                )
                break
        if self.state.step > self._saved_step:
            self.save()

    def test(self) -> dict[str, Any]:
        """Metrics of the test split with the best weights by validation, or the last ones where there is none."""
        started = time.perf_counter()
        state = self.state
        if state.best_step not in (0, state.step):
            self._checkpoints.restore(self._variables, state.best_step)
        metrics = self._evaluator.evaluate("test", self._logits_of) if self._evaluator.has_examples("test") else {}
        if metrics:
            self._telemetry.after_evaluation("test", state, metrics)
        self.seconds["test"] += time.perf_counter() - started
        return metrics

    @property
    def examples_per_second(self) -> float:
        """Of the global batch, over training time only; the first update of a run (tracing) is left out."""
        return self._timed_examples / self._timed_seconds if self._timed_seconds else 0.0

    def save(self) -> None:
        """Publishes a checkpoint; all ranks are at the same step."""
        started = time.perf_counter()
        self._merge_checksums()
        self._checkpoints.save(self._variables, self.state)
        self._saved_step = self.state.step
        self.seconds["checkpoint"] += time.perf_counter() - started
        self._telemetry.pause()

    def _restore_latest(self) -> None:
        state = self._checkpoints.restore(self._variables)
        if state is None:
            self._runtime.broadcast_variables(list(self._variables.values()))
            return
        self.state = state
        self._saved_step = state.step
        self._telemetry.resumed(state)
        if state.step >= self.num_steps:
            self._telemetry.say(f"trained to the end already, step {state.step}")
            return
        self._telemetry.say(
            f"resuming at epoch {state.epoch + 1}, example {state.examples_seen:,} of "
            f"{self._examples_per_epoch:,} (step {state.step})"
        )

    def _batches(self) -> Iterator[tuple[Batch, float]]:
        if self._should_stop_early():
            return
        batches = iter(self._make_batches(self.state.step, self.num_steps))
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch, time.perf_counter() - started

    def _next_examples(self) -> int:
        """How many examples the next update has over all ranks; the last of an epoch may have fewer."""
        return min(self._config.job.global_batch_size, self._examples_per_epoch - self.state.examples_seen)

    def _train_on(self, batch: Batch, global_examples: int) -> StepResult:
        step = self.state.step + 1
        rate = learning_rate(self._config.optimizer, step, self._steps_of_schedule)
        result = self._step(batch, rate, step, global_examples, self._stop_requested())
        loss, norm = float(result.loss), float(result.gradient_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            if not self._runtime.is_chief:
                raise FailedElsewhere
            raise FloatingPointError(
                f"Step {step}: loss and gradient must be finite. Received: loss {loss}, gradient norm {norm}. The "
                "weights were not updated; the last checkpoint is good. Try a lower --learning_rate or --clip_norm=5."
            )
        return result

    def _count(self, result: StepResult, global_examples: int, waited: float, seconds: float) -> None:
        state, loss = self.state, float(result.loss)
        if self.seconds["training"]:  # the first update of a run is mostly tracing
            self._timed_examples += global_examples
            self._timed_seconds += waited + seconds
        self.seconds["training"] += waited + seconds
        state.advance(global_examples, loss)
        self._local_checksum = add_checksums(self._local_checksum, int(result.checksum))
        self._telemetry.after_step(state, loss, int(result.num_examples), global_examples, seconds, waited)

    def _end_epoch(self) -> None:
        self._merge_checksums()
        record = self.state.end_epoch()
        self._telemetry.after_epoch(self.state, record)
        self._validate()
        self.save()

    def _do_what_is_due(self) -> None:
        """Within an epoch, as often as the flags say; due by the step alone, so on every rank."""
        job, step = self._config.job, self.state.step
        improved = _is_due(step, job.evaluate_every_steps) and self._validate()
        if improved or _is_due(step, job.checkpoint_every_steps):
            self.save()

    def _validate(self) -> bool:
        """Scores the validation split, if there is one; says whether it is the best so far."""
        if not self._evaluator.has_examples("validation"):
            return False
        started = time.perf_counter()
        metrics = self._evaluator.evaluate("validation", self._logits_of)
        self.seconds["validation"] += time.perf_counter() - started
        self._telemetry.after_evaluation("validation", self.state, metrics)
        self._telemetry.pause()
        self.validation_metric = "auc" if math.isnan(metrics["gauc"]) else "gauc"
        return self.state.note_validation(metrics[self.validation_metric])

    def _should_stop_early(self) -> bool:
        patience = self._config.job.early_stopping_patience
        return bool(patience) and self.state.validations_without_gain >= patience

    def _stop(self) -> None:
        if self.state.step > self._saved_step:
            self.save()
        raise Interrupted(
            f"on request, after the checkpoint of step {self.state.step}. The same command goes on from there."
        )

    def _merge_checksums(self) -> None:
        parts = self._runtime.gather(np.array([self._local_checksum], np.uint64).view(np.int64)).view(np.uint64)
        self.state.example_checksum = add_checksums(self.state.example_checksum, *map(int, parts))
        self._local_checksum = 0


def num_updates(config: Config, examples_per_epoch: int) -> int:
    """Updates of the whole job."""
    steps = config.job.epochs * num_steps_per_epoch(examples_per_epoch, config.job.global_batch_size)
    return min(steps, config.job.max_steps) if config.job.max_steps else steps


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _is_due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0
