"""Decides which rank sums or holds which rows of a table. Integers only, so that it is tested without ranks.

A rank that holds a part of a table has its rows in the order of their ids, in a smaller table: its shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from din_dist.schema import TableSpec

# From so many ranks on, the owner of a row sums it for all. If few ranks touch each row, an all-gather of all rows then
# takes more bytes, and far more if many ranks do. Each rank also sums fewer rows.
FEWEST_TO_SUM_AT_OWNERS = 4

_FLOAT_BYTES = _ID_BYTES = 4


class RowShard(NamedTuple):
    """The rows that one rank holds of a table whose rows are dealt out to the ranks in turn.

    Preparation numbers ids by their first event or their text, and popular ones stand together. Neighbours therefore
    go to different ranks. Rows and places are integers, or arrays or tensors of them.
    """

    num_rows: int  # of the whole table
    rank: int
    num_ranks: int

    def owner(self, row: Any) -> Any:
        """Returns the rank that holds a row of the whole table."""
        return row % self.num_ranks

    def local(self, row: Any) -> Any:
        """Returns where a row of the whole table stands in its owner's shard."""
        return row // self.num_ranks

    def row(self, local: Any) -> Any:
        """Returns the row of the whole table that stands at `local` in this shard."""
        return local * self.num_ranks + self.rank

    @property
    def size(self) -> int:
        """The number of rows in this shard."""
        return len(range(self.rank, self.num_rows, self.num_ranks))

    @property
    def of_rank(self) -> slice:
        """The rows of this shard, as a slice of the whole table."""
        return slice(self.rank, None, self.num_ranks)


def is_sharded(num_rows: int, sharded_from_rows: int, num_ranks: int) -> bool:
    """Tells whether a table is dealt out to the ranks. A rank alone, and a small table, have nothing to deal out."""
    return num_ranks > 1 and num_rows >= max(sharded_from_rows, num_ranks)


def table_bytes(specs: Sequence[TableSpec], num_slots: int, num_ranks: int = 1, sharded_from_rows: int = 0) -> int:
    """Returns the bytes of tables and their slot variables on the rank with the most of them.

    Args:
        specs: the tables.
        num_slots: slot variables of the shape of the weights.
        num_ranks: of the job. 1: all tables are whole.
        sharded_from_rows: the smallest table that is dealt out.
    """
    rows = [
        RowShard(spec.num_rows, 0, num_ranks).size
        if is_sharded(spec.num_rows, sharded_from_rows, num_ranks)
        else spec.num_rows
        for spec in specs
    ]
    return _FLOAT_BYTES * (1 + num_slots) * sum(count * spec.width for count, spec in zip(rows, specs, strict=True))


class ShardTraffic(NamedTuple):
    """The traffic of one sharded table in an update, on one rank."""

    ids: int  # bytes of ids that it sends to owners
    rows: int  # bytes of rows that it sends as an owner
    gradients: int  # bytes of row gradients that it sends to owners
    messages: int


def shard_traffic(num_read: int, num_asked: int, width: int, wire_bytes: int = _FLOAT_BYTES) -> ShardTraffic:
    """Returns what an update sends of a sharded table. The part that a rank sends to itself counts as well.

    Args:
        num_read: distinct rows that this rank's batch reads.
        num_asked: rows that all ranks have asked this one for.
        width: of a row.
        wire_bytes: of a value of a gradient.
    """
    return ShardTraffic(
        _ID_BYTES * num_read, _FLOAT_BYTES * num_asked * width, wire_bytes * num_read * width, messages=3
    )
