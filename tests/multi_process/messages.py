"""What ranks tell each other, each looking at what it hears: to be run by test_messages.py."""

from __future__ import annotations

import math
import os
import sys
import time

import numpy as np
import tensorflow as tf

from din_dist.config import WireDtype
from din_dist.distributed.gradients import GradientExchange
from din_dist.distributed.placement import FEWEST_TO_SUM_AT_OWNERS
from din_dist.distributed.runtime import HorovodRuntime, Runtime, open_runtime
from din_dist.execution import Execution

NUM_MESSAGES = 100
# In float32: up to 16 KiB are summed in other steps than more is.
SUMMED = (1, 2, 7, 1000, 4096, 4097, 100_000)


def main() -> None:
    if "joins_anew" in sys.argv:
        if os.environ["HOROVOD_RANK"] == "0":
            be_alone()
        check_together(open_runtime())
        return
    runtime = open_runtime()
    for number in range(NUM_MESSAGES):
        expected = sum(number + rank for rank in range(runtime.world_size))
        assert runtime.sum(np.array([number + runtime.rank])).tolist() == [expected]
    for size in SUMMED:
        check_sum(runtime, size)
    check_objects(runtime)
    sizes = [200_000 * (2 + rank) for rank in range(runtime.world_size)]  # more bytes than a socket holds
    parts = [np.arange(size, dtype=np.int64) for size in sizes]
    for late in (0, 1):
        if runtime.rank == late:
            time.sleep(0.1)  # the others have sent by then
        gathered = runtime.gather(parts[runtime.rank] + late)
        np.testing.assert_array_equal(gathered, np.concatenate(parts) + late)
    for wire_dtype, error in (
        (WireDtype.FLOAT32, 1e-6),
        (WireDtype.BFLOAT16, 1.01 * 2**-7),
        (WireDtype.FLOAT16, 1.01 * 2**-10),
    ):
        for most_rows in (0, 1, 1000):
            check_rows(runtime, wire_dtype, most_rows, error)
    check_order(runtime)
    runtime.shutdown()


def be_alone() -> None:
    """As a worker was whom others join: has Horovod initialized in this process, and shuts it down again."""
    of_job = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith("HOROVOD_")}
    alone = HorovodRuntime()
    assert alone.world_size == 1
    alone.shutdown()
    os.environ.update(of_job)


def check_together(runtime: Runtime) -> None:
    """Messages that are ready at once: each rank decides by itself which of those it knows travel as one.

    Between two that would go together there is one of another kind, over which ranks may look ahead or not.
    """
    lengths = {"while_others_get_ready": 1 << 18, "one": 1000, "between": 1 << 18, "two": 1000}

    def run(own: tf.Tensor, in_turn: bool) -> list[tf.Tensor]:
        told: list[tf.Tensor] = []
        for place, (name, length) in enumerate(lengths.items()):
            with tf.control_dependencies(told[-1:] if in_turn else []):
                tell = runtime.all_reduce if length == 1000 else runtime.all_gather
                told += tell([tf.fill([length], own + place)], name)
        return [tf.reduce_sum(each) for each in told]

    own = tf.TensorSpec([], tf.float32)
    in_turn, at_once = (tf.function(run, autograph=False).get_concrete_function(own, way) for way in (True, False))
    expected = [(1 + place) * length * runtime.world_size for place, length in enumerate(lengths.values())]
    for way in [in_turn] + 30 * [at_once]:
        assert [float(each) for each in way(tf.constant(1.0))] == expected


def check_order(runtime: Runtime) -> None:
    """What is to come after sums waits for the last that was asked for in its graph, and for none of another."""

    @tf.function(autograph=False)
    def run() -> list[tf.Tensor]:
        one, two, three = (tf.constant([value]) for value in (1.0, 2.0, 3.0))
        with runtime.after_sums():
            first = runtime.all_reduce([one], "first")
        with runtime.after_sums():
            return [*first, *runtime.all_reduce([two, three], "second")]

    assert [value.numpy().tolist() for value in run()] == [[total * runtime.world_size] for total in (1, 2, 3)]
    operations = run.get_concrete_function().graph.get_operations()
    (first,) = (each for each in operations if "Allreduce" in each.type and "first" in each.name)
    assert not first.control_inputs
    seconds = [each for each in operations if "Allreduce" in each.type and "second" in each.name]
    assert seconds
    assert all(first in each.control_inputs for each in seconds)


def check_objects(runtime: Runtime) -> None:
    """From each rank to all, whatever it is that JSON can say."""
    for root in range(runtime.world_size):
        for value in (None, True, 2**64 - 1, 0.1, -math.inf, "ä", [], {"a": [1, None]}, "x" * 100_000):
            told = runtime.broadcast_object(value if runtime.rank == root else "of another", root=root)
            assert told == value
    assert runtime.broadcast_object((1, (2, 3))) == [1, [2, 3]]


def check_rows(runtime: Runtime, wire_dtype: WireDtype, most_rows: int, error: float) -> None:
    """Of a wide and a narrow table: near the sums in float64, and the same to the bit on every rank."""
    exchange = GradientExchange(runtime, wire_dtype, execution=Execution(kernels=True))
    assert exchange.sums_at_owners == (runtime.world_size >= FEWEST_TO_SUM_AT_OWNERS)
    num_rows, widths = 3000, (64, 1)
    expected = [np.zeros((num_rows, width)) for width in widths]
    magnitudes = [np.zeros((num_rows, width)) for width in widths]
    for rank in range(runtime.world_size):
        random = np.random.default_rng([most_rows, rank])
        own = []
        for dense, magnitude in zip(expected, magnitudes, strict=True):
            ids = random.permutation(num_rows)[: most_rows // (1 + rank)].astype(np.int32)
            rows = random.normal(size=(len(ids), dense.shape[1])).astype(np.float32)
            dense[ids] += rows
            magnitude[ids] += np.abs(rows)
            own.append(tf.IndexedSlices(tf.constant(rows), tf.constant(ids), tf.constant(dense.shape)))
        if rank == runtime.rank:
            gradients = own

    @tf.function(autograph=False)
    def run() -> list[tuple[tf.Tensor, tf.Tensor]]:
        summed, _ = exchange(gradients, tf.constant([0.0]), scale=tf.constant(3.0))
        return [(each.row_ids, each.rows) for each in summed]

    for (ids, rows), dense, magnitude in zip(run(), expected, magnitudes, strict=True):
        assert sorted(ids.numpy()) == np.flatnonzero(magnitude.any(axis=1)).tolist()
        assert (np.abs(rows - dense[ids]) <= error * magnitude[ids] + 1e-6).all()  # float16 holds small ones less well
        told = runtime.gather(np.concatenate([ids.numpy(), rows.numpy().view(np.int32).ravel()])[None])
        np.testing.assert_array_equal(told, np.broadcast_to(told[:1], told.shape))


def check_sum(runtime: Runtime, size: int) -> None:
    """Near that in float64, and the same to the bit on every rank."""
    parts = [np.random.default_rng([size, rank]).normal(size=size) for rank in range(runtime.world_size)]
    found = runtime.sum(parts[runtime.rank].astype(np.float32))
    np.testing.assert_allclose(found, sum(parts), rtol=0, atol=1e-5)
    told = runtime.gather(found[None].view(np.int32))
    np.testing.assert_array_equal(told, np.broadcast_to(told[:1], told.shape))


if __name__ == "__main__":
    main()
