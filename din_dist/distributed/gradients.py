"""The one line on which ranks meet: this rank's gradients in, the global batch's gradients out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import tensorflow as tf

from din_dist.config import WireDtype
from din_dist.distributed.collectives import Collectives
from din_dist.distributed.placement import FEWEST_TO_SUM_AT_OWNERS
from din_dist.distributed.row_transports import Gathered, Owners, Packed, RowGradients, RowTransport, SharedTables, Wire
from din_dist.distributed.sharded_lookup import RoutedGradient, ShardedTables
from din_dist.execution import Execution

Gradient: TypeAlias = tf.Tensor | RowGradients
OwnGradient: TypeAlias = tf.Tensor | tf.IndexedSlices | RoutedGradient  # of one rank

_KIND_OF = {tf.IndexedSlices: "rows", RoutedGradient: "routed"}


class GradientExchange:
    """Sums gradients over the ranks; each rank's loss must already be divided by the global number of examples.

    One grouped all-reduce sums the dense gradients and the numbers that are sent with them. Early gradients have one
    of their own before it. A `RowTransport` sends only the touched rows of an embedding table. The bytes of an update
    therefore depend on the rows touched, never on the size of the table.

    Args:
        ranks: the other ranks.
        wire_dtype: the type of rows that are sent through Horovod. Elsewhere rows stay float32.
        execution: how rows are merged and packed. Ranks that share tables need our kernels.
        shards: holds the tables whose rows are dealt out. None: all tables are whole.
    """

    def __init__(
        self,
        ranks: Collectives,
        wire_dtype: WireDtype = WireDtype.FLOAT32,
        execution: Execution | None = None,
        shards: ShardedTables | None = None,
    ) -> None:
        self._ranks, self._execution, self.shards = ranks, execution or Execution(), shards
        self._wire_dtype = wire_dtype if ranks.travels else WireDtype.FLOAT32
        self._tables: Sequence[tf.Variable] = ()  # that ranks share

    def share(self, tables: Sequence[tf.Variable]) -> None:
        """Lets ranks with memory in common update a part of the rows each, for all. Call it before the first update."""
        if self._execution.kernels and tables and self._ranks.share(tables):
            self._tables = tables

    @property
    def _packs(self) -> bool:
        """True if rows and ids of all tables are sent as one message."""
        return self._execution.kernels and self._ranks.travels

    @property
    def sums_at_owners(self) -> bool:
        """True if one rank sums a row for all. It changes with the number of ranks; then build a new graph."""
        return self._packs and self._ranks.world_size >= FEWEST_TO_SUM_AT_OWNERS

    @property
    def rows(self) -> RowTransport:
        """The transport that sends the rows of tables now."""
        kinds = (SharedTables, self._tables), (Owners, self.sums_at_owners), (Packed, self._packs), (Gathered, True)
        kind = next(kind for kind, fits in kinds if fits)
        return kind(self._ranks, self._execution)

    def sum_of_parts(self, value: tf.Tensor) -> tf.Tensor:
        """Sums over all ranks a number that each computed from its own part of the rows."""
        return self._ranks.all_reduce([value], "sum_of_parts")[0] if self._tables or self.shards else value

    def finish(self) -> None:
        """Ends an update: waits until no rank has rows left to update."""
        if self._tables:
            self._ranks.fence(self._tables)

    def __call__(
        self,
        gradients: Sequence[OwnGradient],
        extra: tf.Tensor,
        scale: tf.Tensor,
        early: Sequence[bool] | None = None,
    ) -> tuple[list[Gradient], tf.Tensor]:
        """Returns the summed `gradients`, in their order, and the summed `extra` numbers.

        Args:
            gradients: of this rank. Those of tables are `IndexedSlices` that name no row twice: lookups gather each row
                once. Those of sharded tables are `RoutedGradient`s.
            extra: float32 `[K]`.
            scale: as of `Wire`.
            early: whether each dense gradient is known while others are yet to be found, and with them the last batch
                statistics. None: no gradient is.
        """
        kinds = [
            _KIND_OF.get(type(gradient), "early" if known and self._packs else "late")
            for gradient, known in zip(gradients, early or [False] * len(gradients), strict=True)
        ]
        first, late, by_rows, routed = (
            [gradient for gradient, its_kind in zip(gradients, kinds, strict=True) if its_kind == kind]
            for kind in ("early", "late", "rows", "routed")
        )
        if first:
            # Behind the last batch statistics, for which the backward pass waits, and on its way while the rest runs.
            with self._ranks.after_sums():
                first = self._ranks.all_reduce(first, "dense_early")
        *late, extra = self._ranks.all_reduce([*late, extra], "dense")
        summed = self._sum_rows([_as_rows(gradient) for gradient in by_rows], scale)
        of_shards = self.shards.sum(routed, Wire(self._wire_dtype, scale)) if self.shards else []
        results = {"early": iter(first), "late": iter(late), "rows": iter(summed), "routed": iter(of_shards)}
        return [next(results[kind]) for kind in kinds], extra

    def _sum_rows(self, gradients: Sequence[RowGradients], scale: tf.Tensor) -> list[RowGradients]:
        if not self._ranks.has_peers or not gradients:
            return list(gradients)
        return self.rows.sum(gradients, Wire(self._wire_dtype, scale))


def _as_rows(gradient: tf.IndexedSlices) -> RowGradients:
    return RowGradients(tf.cast(gradient.indices, tf.int32), gradient.values)


class DenseExchange(GradientExchange):
    """All-reduces whole tables, and so updates them whole: what `sparse_as_dense=True` does elsewhere.

    For `cli/benchmark.py` to compare with ours; an update costs as much as the vocabulary is long.
    """

    def share(self, tables: Sequence[tf.Variable]) -> None:
        """Shares nothing: an update gives a table new memory."""

    def __call__(
        self,
        gradients: Sequence[tf.Tensor | tf.IndexedSlices],
        extra: tf.Tensor,
        scale: tf.Tensor,
        early: Sequence[bool] | None = None,
    ) -> tuple[list[Gradient], tf.Tensor]:
        return super().__call__([tf.convert_to_tensor(gradient) for gradient in gradients], extra, scale)
