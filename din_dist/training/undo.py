"""The last updates, kept so that they can be undone: after a loss, workers agree on where they stand."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import tensorflow as tf

from din_dist.distributed.row_transports import RowGradients
from din_dist.training_state import TrainingState

# Each update ends in an exchange that needs every rank, so no rank is more than one ahead of another.
_KEPT = 2


@dataclasses.dataclass
class _Position:
    """The state of training after an update."""

    reached: TrainingState  # before what was due then: validation, checkpoint, end of an epoch
    finished: TrainingState | None  # after it, once it is done
    values: Sequence[tf.Tensor]  # of the small variables
    replaced: Sequence[RowGradients]  # by this update, of the large ones


class UndoLog:
    """Undoes updates in memory, at next to no cost.

    A copy of the weights would walk whole tables. But an update reads the rows that it replaces: to put them aside
    takes little. And a variable that is assigned gets new memory: to hold on to the old one takes nothing.

    Args:
        tables: variables that change by rows; of each update the rows before it are kept.
        others: variables that are kept whole.
    """

    def __init__(self, tables: Sequence[tf.Variable], others: Sequence[tf.Variable]) -> None:
        self.tables, self.others = list(tables), list(others)
        self._positions: collections.deque[_Position] = collections.deque(maxlen=_KEPT)

    def clear(self) -> None:
        """Forgets all updates, because the variables are about to get values from elsewhere."""
        self._positions.clear()

    def begin(self, state: TrainingState, *, finished: bool) -> None:
        """Starts anew from `state`: nothing before can be undone; `finished`: what was due after it is done."""
        self.clear()
        self._positions.append(_Position(state.copy(), state.copy() if finished else None, self._read(), []))

    def add(self, state: TrainingState, values: Sequence[tf.Tensor] | None, replaced: Sequence[RowGradients]) -> None:
        """Keeps what undoes an update.

        Args:
            state: after the update.
            values: of the `others` after the update, if it returned them; otherwise they are read.
            replaced: rows of each of the `tables` before the update.
        """
        self._positions.append(_Position(state.copy(), None, values or self._read(), replaced))

    def _read(self) -> list[tf.Tensor]:
        return [tf.identity(variable) for variable in self.others]

    def finish(self, state: TrainingState) -> None:
        """Notes that what was due after the newest update is done."""
        self._positions[-1].finished = state.copy()

    def newest(self) -> tuple[int, bool] | None:
        """Returns the newest update, and whether what was due after it is done; None if no update is kept."""
        if not self._positions:
            return None
        return self._positions[-1].reached.step, self._positions[-1].finished is not None

    def go_back(self, step: int, *, finished: bool) -> TrainingState:
        """Makes all variables what they were after the update `step`, and returns the state then."""
        kept = [position.reached.step for position in self._positions]
        if step not in kept:
            raise RuntimeError(f"Update {step} is not kept: only {kept} are.")
        while self._positions[-1].reached.step > step:
            undone = self._positions.pop()
            for table, rows in zip(self.tables, undone.replaced, strict=True):
                table.scatter_update(tf.IndexedSlices(rows.rows, rows.row_ids))
        position = self._positions[-1]
        # Always, because an interrupted update has moved the averages of batch statistics.
        for variable, value in zip(self.others, position.values, strict=True):
            variable.assign(value)
        if not finished:
            position.finished = None
        return (position.finished or position.reached).copy()


def agree(positions: Sequence[tuple[int, bool]]) -> tuple[int, bool]:
    """Returns the last update that all ranks have made, and whether what was due after it is done.

    Args:
        positions: `UndoLog.newest` of each rank.
    """
    step = min(reached for reached, _ in positions)
    return step, all(finished for reached, finished in positions if reached == step)
