"""The parts of a job that learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import tensorflow as tf

from din_dist.models.ranking_model import RankingModel
from din_dist.training.train_step import MessageSizes, TrainStep
from din_dist.training.undo import UndoLog


@dataclasses.dataclass(frozen=True)
class Learner:
    """A model, what updates it, and what undoes an update.

    Attributes:
        model: the model.
        step: one update of the model, the same on every rank.
        undo_log: the last updates.
        variables: all that a checkpoint keeps, by name.
        message_sizes: of what an update sends to other ranks.
    """

    model: RankingModel
    step: TrainStep
    undo_log: UndoLog
    variables: Mapping[str, tf.Variable]
    message_sizes: MessageSizes
