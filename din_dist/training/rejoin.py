"""Takes up training where the job stands, at the start and after ranks came or went."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from din_dist.config import Config, digest_of
from din_dist.distributed.runtime import Runtime
from din_dist.errors import FailedElsewhere, InputError
from din_dist.telemetry.reporter import Reporter
from din_dist.training.checkpoint import CheckpointStore
from din_dist.training.learner import Learner, TrainingData
from din_dist.training.schedules import num_updates
from din_dist.training.undo import agree
from din_dist.training_state import TrainingState


class Standing(NamedTuple):
    """The position of the job, as one rank knows it."""

    state: TrainingState
    saved_step: int = 0  # of the newest checkpoint
    validation_metric: str = "gauc"  # what the best model is chosen by


class Rejoin:
    """Brings all ranks to one update: the last that all have in memory, or that of the last checkpoint.

    Args:
        config: all settings.
        runtime: the ranks.
        learner: what is brought to that update.
        data: what is learned from.
        checkpoints: of the job.
        telemetry: what is found in checkpoints is reported.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        learner: Learner,
        data: TrainingData,
        checkpoints: CheckpointStore,
        telemetry: Reporter,
    ) -> None:
        self._runtime, self._checkpoints, self._telemetry = runtime, checkpoints, telemetry
        self._undo_log, self._variables = learner.undo_log, learner.variables
        self._equal_variables = learner.equal_variables
        self._warm_start = learner.warm_start
        self._digest = digest_of(config, data.store.facts.fingerprint)
        self._examples_per_epoch = data.examples_per_epoch
        self._num_steps = num_updates(config, data.examples_per_epoch)

    def take_up(self, before: Standing) -> tuple[Standing, bool]:
        """Returns where the job stands now, and whether all that was due after the last update is done.

        Args:
            before: where this rank stood.

        Raises:
            InputError: this rank trains something else than the job.
        """
        positions = self._positions()
        holders = [rank for rank, position in enumerate(positions) if position]
        if not holders:
            standing = self._latest_checkpoint(before)
            # Otherwise it was saved by a rank alone, before the end of its epoch.
            return standing, standing.state.examples_seen < self._examples_per_epoch
        step, finished = agree([position for position in positions if position])
        standing = before
        if positions[self._runtime.rank]:
            standing = before._replace(state=self._undo_log.go_back(step, finished=finished))
        if len(holders) < len(positions):
            standing = self._broadcast(standing, holders[0])
        return standing, finished

    def _positions(self) -> list[tuple[int, bool] | None]:
        """Returns step and `finished` of each rank's memory; None if it is empty."""
        step, finished = self._undo_log.newest() or (-1, False)
        rows = self._runtime.gather(np.array([[step, finished, self._digest]], np.int64)).tolist()
        positions = [(step, bool(finished)) if step >= 0 else None for step, finished, _ in rows]
        of_job = next((row[2] for row, position in zip(rows, positions, strict=True) if position), rows[0][2])
        if self._digest != of_job:
            raise InputError(
                "All workers must have the same settings and the same prepared data. Received: others on rank "
                f"{self._runtime.rank} than the job's. Prepare the data anew there, or copy it, and start all workers "
                "by one command."
            )
        return positions

    def _broadcast(self, standing: Standing, root: int) -> Standing:
        """Gives every rank the weights and the standing of rank `root`."""
        self._runtime.broadcast_variables(list(self._variables.values()), root=root)
        known = (standing.state.to_json(), standing.saved_step, standing.validation_metric)
        fields, saved_step, validation_metric = self._runtime.broadcast_object(known, root=root)
        return Standing(TrainingState.from_json(fields), saved_step, validation_metric)

    def _latest_checkpoint(self, before: Standing) -> Standing:
        state = self._checkpoints.restore(self._variables)
        for problem in self._checkpoints.damaged:
            self._telemetry.say(f"{problem} Going on from the checkpoint before it.", level="warning")
        if state is None:
            state = self._first_state()
            self._runtime.broadcast_variables(self._equal_variables)
            if state.parent:  # kept at once: whoever resumes the job does not need the parent again
                self._checkpoints.save(self._variables, state)
            return before._replace(state=state, saved_step=0)
        if state.step >= self._num_steps:
            self._telemetry.say(f"trained to the end already, step {state.step}")
        else:
            self._telemetry.say(
                f"resuming at epoch {state.epoch + 1}, example {state.examples_seen:,} of "
                f"{self._examples_per_epoch:,} (step {state.step})"
            )
        return before._replace(state=state, saved_step=state.step)

    def _first_state(self) -> TrainingState:
        """Returns the state of a new job. The chief gives its variables their first values, if there is a parent.

        Raises:
            InputError: the parent does not fit.
            FailedElsewhere: likewise, on the other ranks.
        """
        if not self._warm_start:
            return TrainingState()
        problem, parent = None, None
        if self._runtime.is_chief:
            try:
                parent, line = self._warm_start.begin()
                self._telemetry.say(line)
            except InputError as error:
                problem = str(error)
        problem, parent = self._runtime.broadcast_object((problem, parent))
        if problem:
            raise InputError(problem) if self._runtime.is_chief else FailedElsewhere
        return TrainingState(parent=parent)
