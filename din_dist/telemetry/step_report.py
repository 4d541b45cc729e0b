"""The measurements of one update, for the terminal, metrics.jsonl, TensorBoard and Prometheus."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

PARTS = ("input_wait", "compute", "exchange", "update")


class Moment(NamedTuple):
    """One moment by two clocks, in seconds.

    The graph has only the wall clock, which may be set at any time. The steady clock is never set.
    """

    wall: float
    steady: float

    @classmethod
    def now(cls) -> Self:
        return cls(time.time(), time.perf_counter())

    def seconds_between(self, marks: Sequence[float]) -> list[float]:
        """Returns the seconds from this moment to the first mark, from each mark to the next, and from the last to now.

        If the wall clock is set meanwhile, the sum is still right, but the parts are not.

        Args:
            marks: later moments, in order, by the wall clock.
        """
        total = time.perf_counter() - self.steady
        parts, reached = [], 0.0
        for mark in marks:
            until = min(max(mark - self.wall, reached), total)
            parts.append(until - reached)
            reached = until
        return [*parts, total - reached]


class StepReport(NamedTuple):
    """The measurements of one update. `seconds` has all of `PARTS`, whose sum is the time of the whole update.

    - `input_wait`: waiting for the batch.
    - `compute`: forward and backward pass, including the all-reduces of batch statistics.
    - `exchange`: the exchange of gradients, as far as it does not overlap with `compute`.
    - `update`: the optimizer. Where ranks share tables, it ends when all ranks have changed their rows.

    The times are those of the host. On a GPU, kernels may still run when a part ends.
    """

    loss: float  # mean over the global batch
    gradient_norm: float
    learning_rate: float
    global_examples: int
    examples: int  # of this rank
    positions: int  # of this rank's histories
    padding_ratio: float  # padding for XLA's few lengths, as a share of all computed positions
    seconds: Mapping[str, float]
    exchanged_bytes: Mapping[str, int]  # kind of message -> bytes that this rank passed to the exchange
    unique_rows: Mapping[str, int]  # table -> rows updated, over all ranks
    unknown_ids_ratio: Mapping[str, float]  # table -> share of this rank's candidates and positions without a known id

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())
