"""What one update did and took, as its reporters get it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

PARTS = ("input_wait", "compute", "exchange", "update")


class Moment(NamedTuple):
    """One moment by two clocks, in seconds: that of the graph, which may be set at any time, and one that may not."""

    wall: float
    steady: float

    @classmethod
    def now(cls) -> Self:
        return cls(time.time(), time.perf_counter())

    def seconds_between(self, marks: Sequence[float]) -> list[float]:
        """Returns the seconds from here to the first mark, from each mark to the next, and from the last until now.

        Their sum is right even where the wall clock is set meanwhile; how it is split is not, then.

        Args:
            marks: moments since, in their order, by the wall clock.
        """
        total = time.perf_counter() - self.steady
        parts, reached = [], 0.0
        for mark in marks:
            until = min(max(mark - self.wall, reached), total)
            parts.append(until - reached)
            reached = until
        return [*parts, total - reached]


class StepReport(NamedTuple):
    """Of one update; `seconds` has all of `PARTS`, whose sum is the whole of it.

    `compute` is forward and backward, with the messages of batch statistics; `exchange` what the gradients take beyond
    that; `update`, where ranks share tables, ends when all have changed their rows. They are times of the host: on a
    GPU kernels run behind them.
    """

    loss: float  # mean over the global batch
    gradient_norm: float
    learning_rate: float
    global_examples: int
    examples: int  # of this rank
    positions: int  # of this rank's histories
    padding_ratio: float  # positions added for XLA's few lengths, over all that were computed
    seconds: Mapping[str, float]
    exchanged_bytes: Mapping[str, int]  # kind of message -> what this rank handed over
    unique_rows: Mapping[str, int]  # table -> rows updated, over all ranks
    unknown_ids_ratio: Mapping[str, float]  # table -> share of this rank's candidates and positions without an id in it

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())
