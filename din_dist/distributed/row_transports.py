"""The ways to send rows of embedding tables between ranks; one is chosen when an update's graph is built."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from din_dist.config import WireDtype
from din_dist.distributed.collectives import Collectives
from din_dist.execution import Execution, round_up
from din_dist.kernels import operations
from din_dist.layers.packed import padded, segment_sum

NO_ROW = -1  # padding


class RowGradients(NamedTuple):
    """A gradient that is zero but for some rows of a table."""

    row_ids: tf.Tensor  # int32 [R], no id twice
    rows: tf.Tensor  # float32 [R, D]
    num_rows: tf.Tensor | None = None  # int32, of all ranks together, if each has a part of them

    def num_rows_of_all(self) -> tf.Tensor:
        """Returns how many rows any rank has, int32."""
        return tf.size(self.row_ids) if self.num_rows is None else self.num_rows


class Wire:
    """The form of a row on its way.

    Args:
        dtype: of the values; 16 bits halve the bytes.
        scale: float32, about 1 / (size of a gradient): 16-bit rows are multiplied by it, against underflow.
    """

    def __init__(self, dtype: WireDtype, scale: tf.Tensor) -> None:
        self._dtype, self._scale = dtype, scale

    @property
    def dtype(self) -> tf.DType:
        """The type of what `pack` returns."""
        return tf.float32 if self._dtype is WireDtype.FLOAT32 else tf.uint16

    def scaled_down(self, count: tf.Tensor) -> Wire:
        """Returns the wire for sums of `count` rows, which may be as many times as large."""
        return Wire(self._dtype, self._scale / tf.cast(count, tf.float32))

    def pack(self, rows: tf.Tensor) -> tf.Tensor:
        """Returns rows `[R, D]` in the form in which they are sent."""
        if self._dtype is WireDtype.FLOAT32:
            return rows
        # As plain 16-bit integers: a gather only moves bits, and so need not know the format.
        return tf.bitcast(tf.cast(rows * self._scale, self._dtype.value), tf.uint16)

    def unpack(self, rows: tf.Tensor) -> tf.Tensor:
        """Returns received rows as float32 `[R, D]`, without the scale."""
        if self._dtype is WireDtype.FLOAT32:
            return rows
        return tf.cast(tf.bitcast(rows, self._dtype.value), tf.float32) / self._scale


class RowTransport(abc.ABC):
    """Sums over the ranks the rows that each has for some tables.

    Args:
        ranks: the other ranks.
        execution: how rows are merged and packed.
    """

    def __init__(self, ranks: Collectives, execution: Execution) -> None:
        self._ranks, self._execution = ranks, execution

    @abc.abstractmethod
    def sum(self, gradients: Sequence[RowGradients], wire: Wire) -> list[RowGradients]:
        """Returns the summed rows of each table, or those that this rank is to update."""

    def rows_sent(self, num_rows: tf.Tensor, num_summed: tf.Tensor) -> tf.Tensor:
        """Returns how many rows this rank gives to others, int32.

        Args:
            num_rows: int32, rows that this rank touched.
            num_summed: int32, rows that all ranks together touched.
        """
        return num_rows


class SharedTables(RowTransport):
    """Ranks with the tables in common memory: each sums, and updates, a part of the rows."""

    def sum(self, gradients: Sequence[RowGradients], wire: Wire) -> list[RowGradients]:
        parts = self._ranks.reduce_scatter_rows(*zip(*((each.row_ids, each.rows) for each in gradients), strict=True))
        return [RowGradients(*part) for part in zip(*parts, strict=True)]


class Gathered(RowTransport):
    """An all-gather of the ids and one of the rows, by TensorFlow's operations; each rank then sums what it got.

    A grouped gather takes one dtype, so ids and rows are two messages whatever the number of tables. Ids are known from
    the batch, and are under way while the gradient is computed.
    """

    def sum(self, gradients: Sequence[RowGradients], wire: Wire) -> list[RowGradients]:
        ids = self._ranks.all_gather([self._padded(each.row_ids, NO_ROW) for each in gradients], "row_ids")
        rows = self._ranks.all_gather([wire.pack(self._padded(each.rows)) for each in gradients], "rows")
        return [
            merge_rows(some_ids, wire.unpack(some_rows), self._execution)
            for some_ids, some_rows in zip(ids, rows, strict=True)
        ]

    def rows_sent(self, num_rows: tf.Tensor, num_summed: tf.Tensor) -> tf.Tensor:
        # A gather whose length changes is negotiated anew, by several rounds. Few lengths are remembered.
        return round_up(num_rows, steps=16, smallest=64) if self._ranks.travels else num_rows

    def _padded(self, rows: tf.Tensor, value: float = 0) -> tf.Tensor:
        if not self._ranks.travels:
            return rows
        num_rows = tf.shape(rows)[0]
        return padded(rows, self.rows_sent(num_rows, num_rows), value)


class Packed(RowTransport):
    """An all-gather of one message with the ids and rows of all tables; each rank then sums what it got."""

    def sum(self, gradients: Sequence[RowGradients], wire: Wire) -> list[RowGradients]:
        return [merge_rows(*rows, self._execution) for rows in self._broadcast_rows(gradients, wire, "rows")]

    def _broadcast_rows(
        self, gradients: Sequence[RowGradients], wire: Wire, name: str
    ) -> list[tuple[tf.Tensor, tf.Tensor]]:
        """Returns the rows of all ranks, concatenated: ids `[R]` and rows `[R, D]` of each table."""
        message, _ = _message(gradients, wire, num_parts=tf.constant(1))
        (gathered,) = self._ranks.all_gather([message], name)
        return _rows_of(gathered, gradients, wire)


class Owners(Packed):
    """Each rank owns a part of the rows. It is sent what the others have for these, and broadcasts the sums.

    Source: the split all-gather of Renggli et al., SparCML: high-performance sparse communication for machine learning,
    SC 2019.
    """

    def sum(self, gradients: Sequence[RowGradients], wire: Wire) -> list[RowGradients]:
        num_ranks = self._ranks.num_ranks()
        received = self._ranks.all_to_all(*_message(gradients, wire, num_ranks), "send_to_owners")
        own = [merge_rows(*rows, self._execution) for rows in _rows_of(received, gradients, wire)]
        sums = self._broadcast_rows(own, wire.scaled_down(num_ranks), "sums_of_rows")
        return [RowGradients(*rows) for rows in sums]

    def rows_sent(self, num_rows: tf.Tensor, num_summed: tf.Tensor) -> tf.Tensor:
        return num_rows + num_summed // self._ranks.num_ranks()


def merge_rows(row_ids: tf.Tensor, rows: tf.Tensor, execution: Execution | None = None) -> RowGradients:
    """Sums the rows `[R, D]` that share an id, int32 `[R]`, and leaves out those of `NO_ROW`."""
    if execution is not None and execution.kernels:
        return RowGradients(*operations.merge_rows(row_ids, rows))
    real = tf.where(row_ids != NO_ROW)  # [M, 1]
    distinct, index = tf.unique(tf.gather_nd(row_ids, real))
    segments = tf.tensor_scatter_nd_update(tf.fill(tf.shape(row_ids), -1), real, index)
    return RowGradients(distinct, segment_sum(rows, segments, tf.size(distinct)))


def _message(gradients: Sequence[RowGradients], wire: Wire, num_parts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the rows in a part for each owner, int32 `[words]`, and the parts' lengths, int32 `[num_parts]`."""
    rows = [wire.pack(each.rows) for each in gradients]
    return operations.pack_rows(num_parts, [each.row_ids for each in gradients], rows)


def _rows_of(message: tf.Tensor, gradients: Sequence[RowGradients], wire: Wire) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """Returns ids and rows of the tables of `gradients`, from concatenated parts of messages."""
    widths = [each.rows.shape[1] for each in gradients]
    ids, rows = operations.unpack_rows(message, widths, wire.dtype)
    return [*zip(ids, map(wire.unpack, rows), strict=True)]
