"""Tables whose rows are dealt out to the ranks: each rank holds its shard, and asks the owners for the other rows.

Forward, the distinct ids of a batch go to the owners, and rows come back: two all-to-alls. Backward, the row gradients
go to the owners: one more, with the lengths that are known by then. An owner sums what it gets in the order of the
ranks, as ranks with whole tables do, so the sums are the same to the bit. It then updates its shard, as if that were a
smaller table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from din_dist.distributed.collectives import Collectives
from din_dist.distributed.placement import RowShard, is_sharded
from din_dist.distributed.row_transports import RowGradients, Wire, merge_rows
from din_dist.execution import Execution, on_host
from din_dist.layers.table_holder import FirstValues, TableHolder

VALUES_AT_ONCE = 1 << 22  # of first values
_VALUES_A_COUNT = 4  # values that TensorFlow's generator makes for each count of its counter
_MOST_OF_COUNTER = 2**64
_PHILOX = 1  # TensorFlow's number of that generator


class Route(NamedTuple):
    """The way of some rows between this rank and their owners."""

    row_ids: tf.Tensor  # int32 [R], the rows of the whole table that this rank reads
    order: tf.Tensor  # int32 [R], sorts them by owner
    lengths: tf.Tensor  # int32 [ranks], how many each owner has of them
    asked: tf.Tensor  # int32 [A], rows of this rank's shard that the ranks read, in the order of the ranks
    asked_lengths: tf.Tensor  # int32 [ranks], how many each rank reads


class RoutedGradient(NamedTuple):
    """A rank's gradient of a sharded table."""

    route: Route
    rows: tf.Tensor  # float32 [R, D], of `route.row_ids`

    @property
    def indices(self) -> tf.Tensor:
        """The rows of the whole table, int32 `[R]`."""
        return self.route.row_ids


class _RowsRead(NamedTuple):
    """Rows that a forward pass has read."""

    variable: tf.Variable
    route: Route
    rows: tf.Tensor


class ShardedTables(TableHolder):
    """Holds this rank's shard of each large table; small tables stay whole.

    All ranks must read rows together, as often and in the same order: in training, in evaluation and elsewhere.

    Args:
        ranks: the other ranks. Messages go through Horovod.
        rank: of this process.
        sharded_from_rows: the rows of the smallest table that is dealt out.
        execution: how rows are merged.
    """

    def __init__(self, ranks: Collectives, rank: int, sharded_from_rows: int, execution: Execution) -> None:
        self._ranks, self._rank, self._execution = ranks, rank, execution
        self._from_rows = sharded_from_rows
        self._shards: dict[int, tuple[tf.Variable, RowShard]] = {}  # by the variable's identity
        self._tape: tf.GradientTape | None = None
        self._reads: list[_RowsRead] = []
        self._last: tuple[tf.Tensor, RowShard, Route] | None = None
        self.shards: dict[str, RowShard] = {}  # by the path of the variable

    def shard_of(self, variable: tf.Variable) -> RowShard | None:
        """Returns this rank's shard of a table; None if the table is whole."""
        return self._shards.get(id(variable), (None, None))[1]

    def add_table(
        self, layer: keras.layers.Layer, name: str, shape: tuple[int, int], first: FirstValues
    ) -> keras.Variable:
        num_rows, width = shape
        if not is_sharded(num_rows, self._from_rows, self._ranks.world_size):
            return super().add_table(layer, name, shape, first)
        shard = RowShard(num_rows, self._rank, self._ranks.world_size)
        if callable(first):
            whole, first = first, lambda _, dtype: first_values(whole, shard, width, dtype)
        table = super().add_table(layer, name, (shard.size, width), first)
        self._shards[id(table.value)] = table.value, shard
        self.shards[table.path] = shard
        return table

    def rows(self, table: keras.Variable, row_ids: tf.Tensor) -> tf.Tensor:
        variable, shard = table.value, self.shard_of(table.value)
        if shard is None:
            return super().rows(table, row_ids)
        route = self._route(shard, row_ids, table.path)
        asked = tf.gather(variable, route.asked)
        received, _ = self._ranks.all_to_all_parts(asked, route.asked_lengths, _name(table.path, "rows"))
        place_of = tf.math.invert_permutation(route.order)
        rows = tf.stop_gradient(tf.ensure_shape(tf.gather(received, place_of), [None, variable.shape[1]]))
        if self._tape:
            self._tape.watch(rows)
            self._reads.append(_RowsRead(variable, route, rows))
        return rows

    def _route(self, shard: RowShard, row_ids: tf.Tensor, path: str) -> Route:
        """Sends the ids to the owners of their rows, unless another table has just been asked for the same ids."""
        if self._last is not None and self._last[0] is row_ids and self._last[1] == shard:
            return self._last[2]
        with on_host():
            owners = shard.owner(row_ids)
            order = tf.argsort(owners, stable=True)
            lengths = tf.math.bincount(owners, minlength=shard.num_ranks, maxlength=shard.num_ranks)
            ids, asked_lengths = self._ranks.all_to_all_parts(tf.gather(row_ids, order), lengths, _name(path, "ids"))
            route = Route(row_ids, order, lengths, shard.local(ids), asked_lengths)
        self._last = row_ids, shard, route
        return route

    @contextlib.contextmanager
    def watched_by(self, tape: tf.GradientTape) -> Iterator[None]:
        """Lets `tape` watch the rows that a forward pass reads in this block; then `gradients_of` finds them."""
        self._tape, self._reads = tape, []
        try:
            yield
        finally:
            self._tape = None

    def gradients(
        self, tape: tf.GradientTape, loss: tf.Tensor, variables: Sequence[tf.Variable]
    ) -> list[tf.Tensor | tf.IndexedSlices | RoutedGradient]:
        """Returns the gradient of `loss` with respect to each of `variables`, after `watched_by`.

        Raises:
            RuntimeError: a pass has read a sharded table twice, or not at all.
        """
        reads = {id(read.variable): read for read in self._reads}
        sharded = [id(variable) for variable in variables if self.shard_of(variable)]
        if len(reads) != len(self._reads) or {*sharded} != {*reads}:
            raise RuntimeError("A pass of training reads each sharded table once.")
        sources = [reads[id(variable)].rows if id(variable) in reads else variable for variable in variables]
        found = tape.gradient(loss, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        self._reads = []
        return [
            RoutedGradient(reads[id(variable)].route, tf.convert_to_tensor(gradient))
            if id(variable) in reads
            else gradient
            for variable, gradient in zip(variables, found, strict=True)
        ]

    def sum(self, gradients: Sequence[RoutedGradient], wire: Wire) -> list[RowGradients]:
        """Returns the summed gradients of the rows of this rank's shards, by their place in the shard."""
        merged = []
        for place, (route, rows) in enumerate(gradients):
            message = wire.pack(tf.gather(rows, route.order))
            received, _ = self._ranks.all_to_all_parts(message, route.lengths, f"gradients_of_shard_{place}")
            merged.append(merge_rows(route.asked, wire.unpack(received), self._execution))
        if not merged:
            return []
        with on_host():
            counts = tf.stack([tf.size(each.row_ids) for each in merged])
            (counts,) = self._ranks.all_reduce([counts], "rows_of_shards")
            return [each._replace(num_rows=count) for each, count in zip(merged, tf.unstack(counts), strict=True)]


def first_values(first: Callable[..., Any], shard: RowShard, width: int, dtype: Any) -> tf.Tensor:
    """Returns the rows of a shard of what `first` makes for the whole table, which is never held whole.

    Keras' uniform values come from a generator that can begin anywhere, so they are made block by block.
    """
    shape = (shard.num_rows, width)
    if not isinstance(first, keras.initializers.GlorotUniform):
        return tf.convert_to_tensor(first(shape, dtype))[shard.of_rank]
    limit = tf.constant(np.sqrt(3.0 * (1.0 / max(1.0, (shard.num_rows + width) / 2.0))), dtype)
    at_once = max(1, VALUES_AT_ONCE // width // _VALUES_A_COUNT) * _VALUES_A_COUNT
    found = np.empty((shard.size, width), tf.as_dtype(dtype).as_numpy_dtype)
    with tf.device("CPU:0"):
        key, counter = tf.raw_ops.StatelessRandomGetKeyCounter(seed=_seed_of(first.seed))
        for begin in range(0, shard.num_rows, at_once):
            end = min(begin + at_once, shard.num_rows)
            skipped = (int(counter[0]) + begin * width // _VALUES_A_COUNT) % _MOST_OF_COUNTER
            values = tf.raw_ops.StatelessRandomUniformV2(
                shape=[end - begin, width],
                key=key,
                counter=tf.stack([tf.constant(skipped, tf.uint64), counter[1]]),
                alg=_PHILOX,
            )
            values = tf.add(values * (limit - -limit), -limit).numpy()
            local = -(-(begin - shard.rank) // shard.num_ranks) if begin > shard.rank else 0
            own = values[shard.row(local) - begin :: shard.num_ranks]
            found[local : local + len(own)] = own
    return tf.constant(found)


def _seed_of(seed: int) -> tf.Tensor:
    """Returns the seed that Keras makes of a number; see `keras.random`."""
    dtype = keras.src.backend.random_seed_dtype()
    drawn = keras.src.random.seed_generator.draw_seed(seed)
    return drawn if dtype == "int32" else tf.cast(tf.math.floormod(drawn, tf.int32.max - 1), tf.int32)


def _name(path: str, what: str) -> str:
    """Returns a name of a message; within a graph no other has it, and all ranks build the same graphs."""
    name = f"{path}/{what}".replace("/", "_")
    return name if tf.executing_eagerly() else tf.compat.v1.get_default_graph().unique_name(name)
