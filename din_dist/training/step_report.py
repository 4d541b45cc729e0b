"""What one update did and took, as its reporters get it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

PARTS = ("input_wait", "compute", "exchange", "update")


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
