"""Collective operations within a graph; here for a rank without peers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import tensorflow as tf


def after(last: tf.Tensor | None) -> contextlib.AbstractContextManager[None]:
    """Lets the operations of a block wait for `last`, if that is of the same graph."""
    known = last is not None and not tf.executing_eagerly() and last.graph is tf.compat.v1.get_default_graph()
    return tf.control_dependencies([last] if known else [])


class Collectives:
    """Collective operations within a graph; all ranks must call them in one order. Here: a rank without peers."""

    travels = True  # messages go through Horovod: saving bytes is worth work, and few lengths are worth padding
    world_size = 1

    @property
    def has_peers(self) -> bool:
        """True if there are other ranks, or may be later."""
        return False

    def all_reduce(self, tensors: Sequence[tf.Tensor], name: str | None = None) -> list[tf.Tensor]:
        """Sums each tensor over the ranks, in one message. Without a name, that of the tensor in its graph serves."""
        return list(tensors)

    def all_gather(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        """Joins each tensor's rows from all ranks, in the order of the ranks; lengths may differ."""
        return list(tensors)

    def after_sums(self) -> contextlib.AbstractContextManager[None]:
        """Starts the operations of a block after all sums that were begun before in the same graph."""
        return contextlib.nullcontext()

    def num_ranks(self) -> tf.Tensor:
        """Returns the number of ranks, int32. Where it may change, the operation looks it up whenever it runs."""
        return tf.constant(self.world_size)

    def all_to_all(self, message: tf.Tensor, lengths: tf.Tensor, name: str) -> tf.Tensor:
        """Gives each rank a part of this rank's `message`; joins what all ranks give this one, in their order.

        Args:
            lengths: int32 `[ranks]`, of the parts, one after the other; what is left at the end is given to nobody.
        """
        return self.all_to_all_parts(message, lengths, name)[0]

    def all_to_all_parts(self, message: tf.Tensor, lengths: tf.Tensor, name: str) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns what `all_to_all` does, and the length of each rank's part in it, int32 `[ranks]`."""
        return message[: lengths[0]], lengths

    def share(self, variables: Sequence[tf.Variable]) -> bool:
        """Keeps one copy of `variables`, which are equal on all ranks, in memory that the ranks share, if any.

        Then all ranks see what one writes, and each updates those rows that `reduce_scatter_rows` gives it.
        """
        return False

    def reduce_scatter_rows(
        self, row_ids: Sequence[tf.Tensor], rows: Sequence[tf.Tensor]
    ) -> tuple[list[tf.Tensor], list[tf.Tensor], list[tf.Tensor]]:
        """Sums the rows that ranks have for tables that they share, each row on the rank that is to update it.

        Args:
            row_ids: int32 `[R]` of each table, none twice.
            rows: float32 `[R, D]` of each.

        Returns:
            The ids of this rank's rows, the sums, and how many rows all ranks together have (int32), of each table.
        """
        return list(row_ids), list(rows), [tf.size(ids) for ids in row_ids]

    def fence(self, variables: Sequence[tf.Variable]) -> None:
        """Waits until all ranks have updated their rows of `variables`, which they share."""
