"""The one line on which ranks meet: this rank's gradients in, the global batch's gradients out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import tensorflow as tf

from din_dist import kernels
from din_dist.config import WireDtype
from din_dist.distributed.placement import FEWEST_TO_SUM_AT_OWNERS
from din_dist.distributed.runtime import Collectives
from din_dist.execution import Execution, round_up
from din_dist.layers.packed import padded, segment_sum

NO_ROW = -1  # padding


class RowGradients(NamedTuple):
    """A gradient that is zero but for some rows of a table."""

    row_ids: tf.Tensor  # int32 [R], no id twice
    rows: tf.Tensor  # float32 [R, D]
    num_rows: tf.Tensor | None = None  # int32, of all ranks together, where each has a part of them

    def num_rows_of_all(self) -> tf.Tensor:
        """How many rows any rank has, int32."""
        return tf.size(self.row_ids) if self.num_rows is None else self.num_rows


Gradient: TypeAlias = tf.Tensor | RowGradients


class GradientExchange:
    """Sums gradients over the ranks; each rank's loss must already be divided by the global number of examples.

    Dense gradients, and the numbers that ride along with them, go in one grouped all-reduce, but for those that are
    known early, which go before. Of an embedding table only the touched rows travel. Few ranks gather them all, and
    each sums what several have for one row. Of many ranks each owns a part of the rows: it is sent what the others have
    for these, and tells all the sums. Bytes a step depend on the rows touched, never on the size of the table. Where
    ranks share tables, each gets a part of the rows.

    Source of the sums at owners: the split all-gather of Renggli et al., SparCML: high-performance sparse communication
    for machine learning, SC 2019.
    """

    def __init__(
        self, ranks: Collectives, wire_dtype: WireDtype = WireDtype.FLOAT32, execution: Execution | None = None
    ) -> None:
        self._ranks, self._execution = ranks, execution or Execution()
        self._wire_dtype = wire_dtype if ranks.travels else WireDtype.FLOAT32
        self._tables: Sequence[tf.Variable] = ()  # that ranks share

    def share(self, tables: Sequence[tf.Variable]) -> None:
        """Before the first update: lets ranks that have memory in common update a part of the rows each, for all."""
        if self._execution.kernels and tables and self._ranks.share(tables):
            self._tables = tables

    @property
    def _packs(self) -> bool:
        """Whether rows of all tables travel as one message, and their ids with them."""
        return self._execution.kernels and self._ranks.travels

    @property
    def sums_at_owners(self) -> bool:
        """Whether each row is summed by one rank for all. Changes with the number of ranks; then build a new graph."""
        return self._packs and self._ranks.world_size >= FEWEST_TO_SUM_AT_OWNERS

    def sum_of_parts(self, value: tf.Tensor) -> tf.Tensor:
        """Of a number that each rank has found of its part of the rows, that of all."""
        return self._ranks.all_reduce([value])[0] if self._tables else value

    def finish(self) -> None:
        """After an update: returns when no rank has rows left to update."""
        if self._tables:
            self._ranks.fence(self._tables)

    def __call__(
        self,
        gradients: Sequence[tf.Tensor | tf.IndexedSlices],
        extra: tf.Tensor,
        scale: tf.Tensor,
        early: Sequence[bool] | None = None,
    ) -> tuple[list[Gradient], tf.Tensor]:
        """The summed `gradients`, in their order, and the summed `extra` numbers, float32 `[K]`.

        Args:
            gradients: those of tables as `IndexedSlices` that name no row twice: lookups gather each row once.
            early: which of the dense gradients are known while others are yet to be found, and with them the last
                batch statistics. None: none is.
            scale: about 1 / (size of a gradient): what 16-bit rows are multiplied by on the wire, against underflow.
        """
        kinds = [
            "rows" if isinstance(gradient, tf.IndexedSlices) else "early" if known and self._packs else "late"
            for gradient, known in zip(gradients, early or [False] * len(gradients), strict=True)
        ]
        early, late, rows = (
            [gradient for gradient, its_kind in zip(gradients, kinds, strict=True) if its_kind == kind]
            for kind in ("early", "late", "rows")
        )
        if early:
            # Behind the last batch statistics, for which the backward pass waits, and on its way while the rest runs.
            with self._ranks.after_sums():
                early = self._ranks.all_reduce(early, "dense_early")
        *late, extra = self._ranks.all_reduce([*late, extra], "dense")
        merged = self._gather([_as_rows(gradient) for gradient in rows], scale)
        results = {"early": iter(early), "late": iter(late), "rows": iter(merged)}
        return [next(results[kind]) for kind in kinds], extra

    def _gather(self, gradients: Sequence[RowGradients], scale: tf.Tensor) -> list[RowGradients]:
        if not self._ranks.has_peers or not gradients:
            return list(gradients)
        if self._tables:
            parts = self._ranks.reduce_scatter_rows(
                *zip(*((each.row_ids, each.rows) for each in gradients), strict=True)
            )
            return [RowGradients(*part) for part in zip(*parts, strict=True)]
        if self.sums_at_owners:
            return self._sum_at_owners(gradients, scale)
        if self._packs:
            return [merge_rows(*rows, self._execution) for rows in self._broadcast_rows(gradients, scale, "rows")]
        # A grouped gather takes one dtype: ids and rows travel as two messages, whatever the number of tables. Ids are
        # known from the batch, and so are under way while the gradient is computed.
        row_ids = self._ranks.all_gather([self._padded(each.row_ids, NO_ROW) for each in gradients], "row_ids")
        rows = self._ranks.all_gather([self._pack(self._padded(each.rows), scale) for each in gradients], "rows")
        return [
            merge_rows(some_ids, self._unpack(some_rows, scale), self._execution)
            for some_ids, some_rows in zip(row_ids, rows, strict=True)
        ]

    def _sum_at_owners(self, gradients: Sequence[RowGradients], scale: tf.Tensor) -> list[RowGradients]:
        num_ranks = self._ranks.num_ranks()
        dealt = self._ranks.all_to_all(*self._message(gradients, scale, num_ranks), "send_to_owners")
        own = [merge_rows(*rows, self._execution) for rows in self._rows_of(dealt, gradients, scale)]
        of_sums = scale / tf.cast(num_ranks, tf.float32)  # a sum may be as many times as large
        return [RowGradients(*rows) for rows in self._broadcast_rows(own, of_sums, "sums_of_rows")]

    def _broadcast_rows(
        self, gradients: Sequence[RowGradients], scale: tf.Tensor, name: str
    ) -> list[tuple[tf.Tensor, tf.Tensor]]:
        """All ranks' rows, one after the other: ids `[R]` and rows `[R, D]` of each table."""
        message, _ = self._message(gradients, scale, num_parts=tf.constant(1))
        (told,) = self._ranks.all_gather([message], name)
        return self._rows_of(told, gradients, scale)

    def _message(
        self, gradients: Sequence[RowGradients], scale: tf.Tensor, num_parts: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Rows in a part for each of their owners, int32 `[words]`, and the parts' lengths, int32 `[num_parts]`."""
        rows = [self._pack(each.rows, scale) for each in gradients]
        message, lengths = kernels.library().din_dist_pack_rows(num_parts, [each.row_ids for each in gradients], rows)
        return tf.ensure_shape(message, [None]), tf.ensure_shape(lengths, [None])

    def _rows_of(
        self, message: tf.Tensor, gradients: Sequence[RowGradients], scale: tf.Tensor
    ) -> list[tuple[tf.Tensor, tf.Tensor]]:
        """Ids and rows of the tables that `gradients` are of, from parts of messages, one after the other."""
        widths = [each.rows.shape[1] for each in gradients]
        dtype = tf.float32 if self._wire_dtype is WireDtype.FLOAT32 else tf.uint16
        row_ids, rows = kernels.library().din_dist_unpack_rows(message, N=len(widths), T=dtype, widths=widths)
        return [
            (tf.ensure_shape(some_ids, [None]), self._unpack(tf.ensure_shape(some_rows, [None, width]), scale))
            for some_ids, some_rows, width in zip(row_ids, rows, widths, strict=True)
        ]

    def rows_sent(self, num_rows: tf.Tensor, num_summed: tf.Tensor) -> tf.Tensor:
        """How many rows this rank gives to others for so many that it touched, of `num_summed` that all touched."""
        if self.sums_at_owners:
            return num_rows + num_summed // self._ranks.num_ranks()
        return self._padded_length(num_rows)

    def _padded_length(self, num_rows: tf.Tensor) -> tf.Tensor:
        """A gather whose length changes is negotiated anew, by several rounds. Few lengths are remembered."""
        in_need = self._ranks.travels and not self._packs  # messages see to it themselves
        return round_up(num_rows, steps=16, smallest=64) if in_need else num_rows

    def _padded(self, rows: tf.Tensor, value: float = 0) -> tf.Tensor:
        return padded(rows, self._padded_length(tf.shape(rows)[0]), value) if self._ranks.travels else rows

    def _pack(self, rows: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
        if self._wire_dtype is WireDtype.FLOAT32:
            return rows
        # As plain 16-bit integers: a gather only moves bits, and so need not know the format.
        return tf.bitcast(tf.cast(rows * scale, self._wire_dtype.value), tf.uint16)

    def _unpack(self, rows: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
        if self._wire_dtype is WireDtype.FLOAT32:
            return rows
        return tf.cast(tf.bitcast(rows, self._wire_dtype.value), tf.float32) / scale


def _as_rows(gradient: tf.IndexedSlices) -> RowGradients:
    return RowGradients(tf.cast(gradient.indices, tf.int32), gradient.values)


def merge_rows(row_ids: tf.Tensor, rows: tf.Tensor, execution: Execution | None = None) -> RowGradients:
    """Sums the rows `[R, D]` that share an id, int32 `[R]`, and leaves out those of `NO_ROW`."""
    if execution is not None and execution.kernels:
        ops, num_threads = kernels.library(), kernels.num_threads()
        distinct, merged = ops.din_dist_merge_rows(row_ids, rows, num_threads=num_threads)
        return RowGradients(tf.ensure_shape(distinct, [None]), tf.ensure_shape(merged, [None, rows.shape[1]]))
    real = tf.where(row_ids != NO_ROW)  # [M, 1]
    distinct, places = tf.unique(tf.gather_nd(row_ids, real))
    segments = tf.tensor_scatter_nd_update(tf.fill(tf.shape(row_ids), -1), real, places)
    return RowGradients(distinct, segment_sum(rows, segments, tf.size(distinct)))


class DenseExchange(GradientExchange):
    """All-reduces whole tables, and so updates them whole: what `sparse_as_dense=True` does elsewhere.

    For `cli/benchmark.py` to compare with ours; a step costs as much as the vocabulary is long.
    """

    def share(self, tables: Sequence[tf.Variable]) -> None:
        """Nothing: an update gives a table new memory."""

    def __call__(
        self,
        gradients: Sequence[tf.Tensor | tf.IndexedSlices],
        extra: tf.Tensor,
        scale: tf.Tensor,
        early: Sequence[bool] | None = None,
    ) -> tuple[list[Gradient], tf.Tensor]:
        return super().__call__([tf.convert_to_tensor(gradient) for gradient in gradients], extra, scale)
