"""The parts of a job that learn, and what they learn from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import tensorflow as tf

from din_dist.data.event_store import EventStore
from din_dist.distributed.placement import RowShard
from din_dist.models.behaviour_model import BehaviourModel
from din_dist.schema import Batch
from din_dist.training.train_step import MessageSizes, TrainStep
from din_dist.training.undo import UndoLog
from din_dist.training.warm_start import WarmStart


@dataclasses.dataclass(frozen=True)
class Learner:
    """A model, what updates it, and what undoes an update.

    Attributes:
        model: the model.
        step: one update of the model, the same on every rank.
        undo_log: the last updates.
        variables: all that a checkpoint keeps, by name.
        message_sizes: the bytes that an update sends to other ranks.
        warm_start: gives the variables their first values; None: they keep those that they were made with.
        shards: this rank's shard of each of the `variables` whose rows are dealt out, by name.
    """

    model: BehaviourModel
    step: TrainStep
    undo_log: UndoLog
    variables: Mapping[str, tf.Variable]
    message_sizes: MessageSizes
    warm_start: WarmStart | None = None
    shards: Mapping[str, RowShard] = dataclasses.field(default_factory=dict)

    @property
    def equal_variables(self) -> list[tf.Variable]:
        """The variables of which every rank has a copy."""
        return [variable for name, variable in self.variables.items() if name not in self.shards]


class TrainingData(NamedTuple):
    """The examples that a job learns from."""

    store: EventStore
    examples_per_epoch: int
    make_batches: Callable[[int, int], Iterator[Batch]]  # this rank's share of updates first to last - 1
