"""The scaling model, by numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from din_dist.benchmark.scaling_model import (
    MOST_BYTES_TO_DOUBLE,
    Cluster,
    Measured,
    allgather_bytes,
    allgather_hops,
    allreduce_bytes,
    allreduce_hops,
    predict,
    row_bytes,
)
from din_dist.errors import InputError
from tests.support.benchmark_report import MEASURED, benchmark_report
from tests.support.repository import ROOT

CLUSTER = Cluster(8e6, latency_seconds=0.001, message_overhead_seconds=0.01, payload_share=1.0)  # a megabyte a second


def test_four_workers_by_hand() -> None:
    found = predict(MEASURED, CLUSTER, 4)
    assert found.seconds == pytest.approx(
        {
            "compute": 0.1,
            "all_reduce_bandwidth": 1.8,  # 2 * 3/4 of 1.2 MB
            "row_bandwidth": 1.5,  # 3 parts of 0.5 MB
            "message_latency": 0.05,  # 5 all-reduces of 2 + 6 hops, 2 all-gathers of 2 + 3
            "message_overhead": 0.07,  # 7 messages
            "rows_of_others": 0.052,  # 4 * 3 ms to merge; three times the rows to update, for the tables have no more
        }
    )
    assert found.step_seconds == pytest.approx(3.572)
    assert found.examples_per_second == pytest.approx(400 / 3.572)
    assert found.efficiency == pytest.approx(0.1 / 3.572)
    assert found.dominant_term == "all_reduce_bandwidth"
    assert found.to_json()["dominant_term"] == "all_reduce_bandwidth"


def test_four_workers_whose_rows_are_summed_by_their_owners() -> None:
    found = predict(dataclasses.replace(MEASURED, owners_sum_rows=True), CLUSTER, 4).seconds
    assert found["row_bandwidth"] == pytest.approx(1.5)  # 3/4 of 0.5 MB to owners, and of their sums, the whole tables
    assert found["message_latency"] == pytest.approx(
        0.049
    )  # 5 of 2 + 6 hops, lengths and rows after 2, a gather: 2 + 3
    assert found["message_overhead"] == pytest.approx(0.07)
    # Where fewer would gather in one message, owners still take two.
    packed = dataclasses.replace(MEASURED, owners_sum_rows=True, num_gradient_messages=2, num_gather_messages=1)
    assert predict(packed, CLUSTER, 4).seconds == found
    assert predict(packed, CLUSTER, 3).seconds["message_overhead"] == pytest.approx(0.06)
    assert found["rows_of_others"] == pytest.approx(0.043)  # as many rows to sum as it has; three times to update


def test_of_many_workers_owners_send_much_less() -> None:
    at_owners = dataclasses.replace(MEASURED, owners_sum_rows=True)
    assert predict(at_owners, CLUSTER, 64).seconds["row_bandwidth"] == pytest.approx(2.0 * 63 / 64)
    assert predict(MEASURED, CLUSTER, 64).seconds["row_bandwidth"] == pytest.approx(31.5)
    # With tables so large that no two workers touch a row, about as much.
    assert row_bytes(500, 64 * 500, 64, at_owners=True) == pytest.approx(63 / 64 * 65 * 500)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_few_workers_gather_all_rows(world_size: int) -> None:
    at_owners = dataclasses.replace(MEASURED, owners_sum_rows=True)
    assert predict(at_owners, CLUSTER, world_size) == predict(MEASURED, CLUSTER, world_size)


def test_a_worker_on_its_own_speaks_to_nobody() -> None:
    found = predict(MEASURED, CLUSTER, 1)
    assert found.step_seconds == found.seconds["compute"] == 0.1
    assert (found.examples_per_second, found.efficiency, found.dominant_term) == (1000.0, 1.0, "compute")


def test_small_statistics_double() -> None:
    found = predict(dataclasses.replace(MEASURED, statistics_bytes=4000), CLUSTER, 4).seconds
    assert found["all_reduce_bandwidth"] == pytest.approx(1.508)  # 2 * 3/4 of 1 MB, and 4 times 1000 bytes in 2 steps
    assert found["message_latency"] == pytest.approx(0.034)  # 4 of 2 + 2 hops, one of 2 + 6, 2 all-gathers of 2 + 3


@pytest.mark.parametrize(
    ("world_size", "doubled", "in_a_ring", "gathered"),
    [(1, 0, 0, 0), (2, 300, 30_000, 300), (3, 900, 40_000, 600), (5, 1200, 48_000, 1200)],
)
def test_bytes_on_a_link(world_size: int, doubled: float, in_a_ring: float, gathered: float) -> None:
    assert allreduce_bytes(300, world_size) == doubled
    assert allreduce_bytes(30_000, world_size) == pytest.approx(in_a_ring)
    assert allgather_bytes(300, world_size) == gathered


@pytest.mark.parametrize(
    ("world_size", "doubled", "in_a_ring", "gather_hops"),
    [(1, 0, 0, 0), (2, 2, 3, 2), (3, 6, 7, 5), (4, 4, 8, 5), (6, 8, 14, 9), (1024, 20, 2056, 1033)],
)
def test_hops(world_size: int, doubled: int, in_a_ring: int, gather_hops: int) -> None:
    assert allreduce_hops(MOST_BYTES_TO_DOUBLE, world_size) == doubled
    assert allreduce_hops(MOST_BYTES_TO_DOUBLE + 1, world_size) == in_a_ring
    assert allgather_hops(world_size) == gather_hops


def test_few_bytes_are_what_the_build_takes_for_few() -> None:
    folder = ROOT / "launch" / "horovod" / "files" / "third_party" / "gloo" / "gloo"
    header = folder / "recursive_doubling.h"
    assert f"kMostBytesToDouble = {MOST_BYTES_TO_DOUBLE};" in header.read_text()


def test_what_dominates_follows_the_cluster() -> None:
    quick = Cluster(math.inf, latency_seconds=0.0)
    assert predict(MEASURED, quick, 2).dominant_term == "compute"
    assert predict(MEASURED, dataclasses.replace(quick, latency_seconds=0.1), 8).dominant_term == "message_latency"
    assert (
        predict(MEASURED, dataclasses.replace(quick, message_overhead_seconds=1.0), 8).dominant_term
        == "message_overhead"
    )
    assert predict(MEASURED, Cluster(8e6, 0.0), 8).dominant_term == "row_bandwidth"
    assert predict(MEASURED, quick, 1000).dominant_term == "rows_of_others"


def test_headers_take_their_share_of_the_link() -> None:
    half = dataclasses.replace(CLUSTER, payload_share=0.5)
    assert predict(MEASURED, half, 4).seconds["row_bandwidth"] == pytest.approx(3.0)


def test_without_tables_there_are_no_rows() -> None:
    dense = dataclasses.replace(MEASURED, row_gradient_bytes=0, table_bytes=0, num_gather_messages=0)
    assert predict(dense, CLUSTER, 8).seconds["rows_of_others"] == 0
    assert predict(dataclasses.replace(dense, owners_sum_rows=True), CLUSTER, 8) == predict(dense, CLUSTER, 8)


def test_the_benchmarks_json_is_read() -> None:
    assert Measured.from_report(benchmark_report(), "one.json") == MEASURED


def test_numbers_of_messages_may_be_written_as_fractions() -> None:
    found = Measured.from_report(benchmark_report(num_statistics_messages=4.0, num_gradient_messages=3.0), "one.json")
    assert predict(found, CLUSTER, 4) == predict(MEASURED, CLUSTER, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 2}, "one.json: must come from one worker. Received: world_size 2."),
        ({"table_bytes": None}, "one.json: table_bytes must be a number from 0 up. Received: None."),
        ({"row_gradient_bytes": -1}, "row_gradient_bytes must be a number from 0 up. Received: -1."),
        ({"row_merge_seconds": math.nan}, "row_merge_seconds must be a number from 0 up. Received: nan."),
        ({"update_seconds": "1"}, "update_seconds must be a number from 0 up. Received: '1'."),
        ({"statistics_bytes": True}, "statistics_bytes must be a number from 0 up. Received: True."),
        ({"owners_sum_rows": 1}, "one.json: owners_sum_rows must be true or false. Received: 1. Give the JSON line"),
        ({"step_seconds": 0}, "step_seconds must be above 0. Received: 0."),
        ({"num_gather_messages": 4}, "num_gather_messages cannot exceed num_gradient_messages"),
    ],
)
def test_a_wrong_report_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Measured.from_report(benchmark_report(**changes), "one.json")
