"""A step's time on more workers than there are here, from what one worker measured and what the links are.

Arithmetic only. Weak scaling: each worker keeps the batch that was measured, so the global batch grows with the
workers. Parts do not overlap: Horovod works off its messages one after the other, and a step waits for each.

Source of the message counts: Horovod 0.28.1 with Gloo (`horovod/common/controller.cc`, `gloo_controller.cc`,
`response_cache.cc`; gloo's `allreduce.cc`, `allgatherv.cc`, `alltoallv.cc`), as launch/horovod/ changes it:
all-gathers and all-reduces of many bytes are rings; those of few, and by which the workers agree on what is ready,
double; in an all-to-all each speaks to all others at once. How rows travel: `gradients.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from din_dist.distributed.placement import FEWEST_TO_SUM_AT_OWNERS
from din_dist.errors import InputError

MOST_BYTES_TO_DOUBLE = 16384  # as in recursive_doubling.h of launch/horovod/
TCP_PAYLOAD_SHARE = 1448 / 1538  # of Ethernet with an MTU of 1500: the rest is headers and gaps between frames


@dataclasses.dataclass(frozen=True)
class Measured:
    """One worker's step: what it took and what it would send."""

    compute_seconds: float  # the whole step of a worker on its own, waiting for input included
    update_seconds: float  # of that, the optimizer: it grows with the rows that the workers touch together
    row_merge_seconds: float  # to sum the repeats of as many rows as one worker sends
    per_worker_batch_size: int
    dense_gradient_bytes: int
    row_gradient_bytes: int  # a worker's own part: ids and rows, each once, as they travel
    table_bytes: int  # what `row_gradient_bytes` would be, were every row of every table touched
    num_statistics_messages: int  # all-reduces of batch statistics, forward and backward
    statistics_bytes: int  # of all of them together
    num_gradient_messages: int  # all-reduces and all-gathers of gradients
    num_gather_messages: int  # the all-gathers among them
    owners_sum_rows: bool  # or all workers gather all rows, however many they are

    @classmethod
    def from_report(cls, report: Mapping[str, Any], source: str) -> Measured:
        """Reads the JSON line of `cli/benchmark.py`, run with one worker.

        Args:
            source: where the line comes from, for errors.

        Raises:
            InputError: a number is missing or wrong, or more than one worker ran.
        """
        world_size = _number(report, "world_size", source)
        if world_size != 1:
            raise InputError(
                f"{source}: must come from one worker. Received: world_size {world_size:g}. Run the benchmark without "
                "horovodrun, with the batch that each worker is to have."
            )
        names = {"compute_seconds": "step_seconds", "per_worker_batch_size": "global_batch_size"}
        values: dict[str, Any] = {
            field.name: _number(report, names.get(field.name, field.name), source)
            for field in dataclasses.fields(cls)
            if field.name != "owners_sum_rows"
        }
        values["owners_sum_rows"] = report.get("owners_sum_rows")
        if not isinstance(values["owners_sum_rows"], bool):
            raise InputError(
                f"{source}: owners_sum_rows must be true or false. Received: {values['owners_sum_rows']!r}. Give the "
                "JSON line of `python -m din_dist.cli.benchmark`, run with one worker."
            )
        if values["num_gather_messages"] > values["num_gradient_messages"]:
            raise InputError(
                f"{source}: num_gather_messages cannot exceed num_gradient_messages, which counts them too. Received: "
                f"{values['num_gather_messages']:g} and {values['num_gradient_messages']:g}. Run the benchmark again."
            )
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What joins the workers."""

    bandwidth_bits_per_second: float  # of each worker's link, in each direction at once
    latency_seconds: float  # of a small message between two processes, one way, their waking up included
    message_overhead_seconds: float = 0.0  # of software, for each message of a step, whatever the number of workers
    payload_share: float = TCP_PAYLOAD_SHARE


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A step's time with so many workers, by what takes it."""

    world_size: int
    seconds: dict[str, float]  # by term
    examples_per_second: float
    efficiency: float  # examples/s over those of as many workers that need not speak

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def dominant_term(self) -> str:
        return max(self.seconds, key=lambda term: self.seconds[term])

    def to_json(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "step_seconds": self.step_seconds,
            "dominant_term": self.dominant_term,
        }


def doubling_steps(world_size: int) -> int:
    """Of an all-reduce of few bytes (see recursive_doubling.h in launch/horovod/)."""
    steps = world_size.bit_length() - 1
    return steps if world_size == 2**steps else steps + 2  # the ranks above the power of two are heard first, told last


def allreduce_bytes(num_bytes: float, world_size: int, num_messages: float = 1) -> float:
    """What a worker sends, and receives, in so many equal all-reduces of `num_bytes` together.

    Few bytes travel whole in each step; of more each of N parts travels N-1 hops of a ring, twice.

    Source: Patarasu and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009.
    """
    if num_bytes <= num_messages * MOST_BYTES_TO_DOUBLE:
        return doubling_steps(world_size) * num_bytes
    return 2 * (world_size - 1) / world_size * num_bytes


def allgather_bytes(own_bytes: float, world_size: int) -> float:
    """What a worker sends, and receives, in a ring all-gather: everybody's part but one."""
    return (world_size - 1) * own_bytes


def row_bytes(own_bytes: float, summed_bytes: float, world_size: int, at_owners: bool) -> float:
    """What a worker sends, and receives, of row gradients.

    Args:
        summed_bytes: of the rows that all workers have touched, each row once.
        at_owners: each worker sends its rows to their owners, and gathers the owners' sums; else all gather all rows.
    """
    if not at_owners:
        return allgather_bytes(own_bytes, world_size)
    return (world_size - 1) / world_size * (own_bytes + summed_bytes)


def allreduce_hops(num_bytes: float, world_size: int, num_messages: float = 1) -> float:
    """Messages that as many all-reduces wait for, one after the other, from each tensor being ready to its result.

    A step's all-reduces have the same name and shape each time, so that Horovod finds them in its cache: the workers
    agree by one all-reduce of a few bits, then comes the message itself. Our build agrees when a tensor gets ready,
    and the last worker finds the others waiting in the round that it joins.
    """
    agreeing = doubling_steps(world_size)
    doubled = num_bytes <= num_messages * MOST_BYTES_TO_DOUBLE
    return num_messages * (agreeing + (doubling_steps(world_size) if doubled else 2 * (world_size - 1)))


def allgather_hops(world_size: int) -> int:
    """Of one all-gather, likewise: the exchange rounds the lengths that it gathers, so they are in the cache too."""
    return doubling_steps(world_size) + world_size - 1


def row_hops(num_gathers: float, world_size: int, at_owners: bool) -> float:
    """Of the messages by which rows travel, likewise; `num_gathers` of them where all gather all rows."""
    if not at_owners:
        return num_gathers * allgather_hops(world_size)
    alltoall_hops = doubling_steps(world_size) + 2  # how much goes to whom is told before
    return alltoall_hops + allgather_hops(world_size)


def predict(measured: Measured, cluster: Cluster, world_size: int) -> Prediction:
    """The step of `world_size` workers, each on a link of its own and with the batch that was measured."""
    num_gathers = measured.num_gather_messages
    at_owners = measured.owners_sum_rows and num_gathers > 0 and world_size >= FEWEST_TO_SUM_AT_OWNERS
    reduced = (  # bytes and messages
        (measured.dense_gradient_bytes, measured.num_gradient_messages - num_gathers),
        (measured.statistics_bytes, measured.num_statistics_messages),
    )
    hops = sum(allreduce_hops(size, world_size, number) for size, number in reduced)
    hops += row_hops(num_gathers, world_size, at_owners)
    reduced_bytes = sum(allreduce_bytes(size, world_size, number) for size, number in reduced)
    # Where owners sum, rows take one message to them and one from them.
    num_gradient_messages = measured.num_gradient_messages + (2 - num_gathers if at_owners else 0)
    messages = measured.num_statistics_messages + num_gradient_messages if world_size > 1 else 0
    summed_bytes = _touched_rows_ratio(measured, world_size) * measured.row_gradient_bytes
    bytes_per_second = cluster.bandwidth_bits_per_second / 8 * cluster.payload_share
    seconds = {
        "compute": measured.compute_seconds,
        "all_reduce_bandwidth": reduced_bytes / bytes_per_second,
        "row_bandwidth": row_bytes(measured.row_gradient_bytes, summed_bytes, world_size, at_owners) / bytes_per_second,
        "message_latency": hops * cluster.latency_seconds,
        "message_overhead": messages * cluster.message_overhead_seconds,
        "rows_of_others": _seconds_for_rows_of_others(measured, world_size, at_owners),
    }
    global_batch_size = world_size * measured.per_worker_batch_size
    step_seconds = sum(seconds.values())
    return Prediction(
        world_size, seconds, global_batch_size / step_seconds, efficiency=measured.compute_seconds / step_seconds
    )


def _seconds_for_rows_of_others(measured: Measured, world_size: int, at_owners: bool) -> float:
    """To sum rows that other workers have touched too, and to update those that this one did not touch itself."""
    if world_size == 1 or not measured.row_gradient_bytes:
        return 0.0
    times_merged = 1 if at_owners else world_size  # an owner is sent about as many rows as it sends
    more_updated = _touched_rows_ratio(measured, world_size) - 1
    return times_merged * measured.row_merge_seconds + more_updated * measured.update_seconds


def _touched_rows_ratio(measured: Measured, world_size: int) -> float:
    """The rows that all workers touch, each once, over those of one worker.

    An upper bound: no two workers touch the same row until all rows of the tables are touched.
    """
    if not measured.row_gradient_bytes:
        return 1.0
    return min(world_size, max(1.0, measured.table_bytes / measured.row_gradient_bytes))


def _number(report: Mapping[str, Any], name: str, source: str) -> float:
    value = report.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise InputError(
            f"{source}: {name} must be a number from 0 up. Received: {value!r}. Give the JSON line of "
            "`python -m din_dist.cli.benchmark`, run with one worker."
        )
    if name in ("step_seconds", "global_batch_size") and not value:
        raise InputError(f"{source}: {name} must be above 0. Received: {value!r}. Run the benchmark again.")
    return value
