"""Predicts the step time with more workers than this machine has, from one worker's measurements and the links.

Arithmetic only. Scaling is weak: each worker keeps the measured batch, so the global batch grows with the workers.
The parts do not overlap, because Horovod handles its messages one after the other and a step waits for each.

Source of the message counts: Horovod 0.28.1 with Gloo (`horovod/common/controller.cc`, `gloo_controller.cc`,
`response_cache.cc`; gloo's `allreduce.cc`, `allgatherv.cc`, `alltoallv.cc`), as launch/horovod/ changes it:

- All-gathers, and all-reduces of many bytes, run on a ring.
- All-reduces of few bytes use recursive doubling, as does the negotiation of which tensors are ready.
- In an all-to-all each worker sends to all others at once.

`gradients.py` describes how rows are sent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from din_dist.distributed.placement import FEWEST_TO_SUM_AT_OWNERS
from din_dist.errors import InputError

MOST_BYTES_TO_DOUBLE = 16384  # as in recursive_doubling.h of launch/horovod/
TCP_PAYLOAD_SHARE = 1448 / 1538  # for Ethernet with an MTU of 1500: the rest is headers and gaps between frames


@dataclasses.dataclass(frozen=True)
class Measured:
    """One worker's step: its times and the bytes that it would send."""

    compute_seconds: float  # the whole step of a single worker, including the wait for input
    update_seconds: float  # the optimizer's part of it, which grows with the rows that all workers touch
    row_merge_seconds: float  # summing the repeats among as many rows as one worker sends
    per_worker_batch_size: int
    dense_gradient_bytes: int
    row_gradient_bytes: int  # one worker's ids and rows, each once, as sent
    table_bytes: int  # `row_gradient_bytes` if every row of every table were touched
    num_statistics_messages: int  # all-reduces of batch statistics, forward and backward
    statistics_bytes: int  # all of these all-reduces together
    num_gradient_messages: int  # all-reduces and all-gathers of gradients
    num_gather_messages: int  # the all-gathers among them
    owners_sum_rows: bool  # False: all workers gather all rows, whatever the number of workers

    @classmethod
    def from_report(cls, report: Mapping[str, Any], source: str) -> Measured:
        """Reads the JSON line that `cli/benchmark.py` prints with one worker.

        Args:
            report: the line, parsed.
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
    """The network between the workers."""

    bandwidth_bits_per_second: float  # each worker's link, in each direction at once
    latency_seconds: float  # one way, for a small message between two processes, including their wake-up
    message_overhead_seconds: float = 0.0  # software time per message of a step, whatever the number of workers
    payload_share: float = TCP_PAYLOAD_SHARE


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The predicted step time with `world_size` workers, split into terms."""

    world_size: int
    seconds: dict[str, float]  # by term
    examples_per_second: float
    efficiency: float  # examples/s relative to as many workers that do not communicate

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
    """Returns the steps of an all-reduce of few bytes (see recursive_doubling.h in launch/horovod/)."""
    steps = world_size.bit_length() - 1
    return steps if world_size == 2**steps else steps + 2  # ranks above the power of two send first and receive last


def allreduce_bytes(num_bytes: float, world_size: int, num_messages: float = 1) -> float:
    """Returns the bytes that a worker sends in all-reduces of equal size. It receives as many.

    A small message is sent whole in each step. A large one is cut into N parts, each of which travels N-1 hops of a
    ring, twice.

    Source: Patarasu and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009.

    Args:
        num_bytes: the bytes of all messages together.
        world_size: N.
        num_messages: the number of all-reduces.
    """
    if num_bytes <= num_messages * MOST_BYTES_TO_DOUBLE:
        return doubling_steps(world_size) * num_bytes
    return 2 * (world_size - 1) / world_size * num_bytes


def allgather_bytes(own_bytes: float, world_size: int) -> float:
    """Returns the bytes that a worker sends in a ring all-gather: all parts but one. It receives as many."""
    return (world_size - 1) * own_bytes


def row_bytes(own_bytes: float, summed_bytes: float, world_size: int, at_owners: bool) -> float:
    """Returns the bytes of row gradients that a worker sends. It receives as many.

    Args:
        own_bytes: the rows that one worker has touched.
        summed_bytes: the rows that any worker has touched, each once.
        world_size: the number of workers.
        at_owners: each worker sends its rows to their owners and gathers the owners' sums. False: all workers gather
            all rows.
    """
    if not at_owners:
        return allgather_bytes(own_bytes, world_size)
    return (world_size - 1) / world_size * (own_bytes + summed_bytes)


def allreduce_hops(num_bytes: float, world_size: int, num_messages: float = 1) -> float:
    """Returns the hops that all-reduces wait for, one after the other, between each tensor being ready and its result.

    A step's all-reduces have the same names and shapes each time, so Horovod finds them in its response cache. The
    workers negotiate with one all-reduce of a few bits; then the message itself follows. Our build negotiates as soon
    as a tensor is ready, and the last worker joins the round in which the others already wait.

    Args:
        num_bytes: of all the messages together.
        world_size: the number of workers.
        num_messages: the number of all-reduces.
    """
    negotiation = doubling_steps(world_size)
    doubled = num_bytes <= num_messages * MOST_BYTES_TO_DOUBLE
    return num_messages * (negotiation + (doubling_steps(world_size) if doubled else 2 * (world_size - 1)))


def allgather_hops(world_size: int) -> int:
    """Returns the hops that one all-gather waits for.

    The exchange rounds the lengths that it gathers, so all-gathers are in the response cache too.
    """
    return doubling_steps(world_size) + world_size - 1


def row_hops(num_gathers: float, world_size: int, at_owners: bool) -> float:
    """Returns the hops that the messages with row gradients wait for.

    Args:
        num_gathers: all-gathers of a step, if all workers gather all rows.
        world_size: the number of workers.
        at_owners: as in `row_bytes`.
    """
    if not at_owners:
        return num_gathers * allgather_hops(world_size)
    alltoall_hops = doubling_steps(world_size) + 2  # the sizes are exchanged before the rows
    return alltoall_hops + allgather_hops(world_size)


def predict(measured: Measured, cluster: Cluster, world_size: int) -> Prediction:
    """Predicts the step of `world_size` workers, each with its own link and the measured batch."""
    num_gathers = measured.num_gather_messages
    at_owners = measured.owners_sum_rows and num_gathers > 0 and world_size >= FEWEST_TO_SUM_AT_OWNERS
    reduced = (  # bytes and messages
        (measured.dense_gradient_bytes, measured.num_gradient_messages - num_gathers),
        (measured.statistics_bytes, measured.num_statistics_messages),
    )
    hops = sum(allreduce_hops(size, world_size, number) for size, number in reduced)
    hops += row_hops(num_gathers, world_size, at_owners)
    reduced_bytes = sum(allreduce_bytes(size, world_size, number) for size, number in reduced)
    # Where owners sum the rows, one message goes to them and one comes back.
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
    """Returns the time to sum rows that several workers touched and to update rows that only others touched."""
    if world_size == 1 or not measured.row_gradient_bytes:
        return 0.0
    times_merged = 1 if at_owners else world_size  # an owner receives about as many rows as it sends
    more_updated = _touched_rows_ratio(measured, world_size) - 1
    return times_merged * measured.row_merge_seconds + more_updated * measured.update_seconds


def _touched_rows_ratio(measured: Measured, world_size: int) -> float:
    """Returns the number of rows that any worker touches, relative to those of one worker.

    The result is an upper bound: it assumes that no two workers touch the same row before all rows are touched.
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
