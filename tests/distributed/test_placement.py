"""Which rank holds which rows: integers alone, for as many ranks as no test can start."""

import numpy as np
import pytest

from din_dist.distributed.placement import RowShard, is_sharded, shard_traffic, table_bytes
from din_dist.schema import TableSpec


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 1024])
@pytest.mark.parametrize("num_rows", [1024, 1025, 40_000])
def test_each_row_has_one_place(num_rows: int, num_ranks: int) -> None:
    rows = np.arange(num_rows)
    shards = [RowShard(num_rows, rank, num_ranks) for rank in range(num_ranks)]
    held = [rows[shard.of_rank] for shard in shards]
    assert np.array_equal(np.sort(np.concatenate(held)), rows)
    for shard, own in zip(shards, held, strict=True):
        assert shard.size == len(own)
        assert (shard.owner(own) == shard.rank).all()
        assert np.array_equal(shard.local(own), np.arange(shard.size))
        assert np.array_equal(shard.row(shard.local(own)), own)


def test_popular_ids_are_spread_over_1024_ranks() -> None:
    """Each rank has as many of the distinct rows of a global batch in the mean, within 5 %."""
    num_rows, num_positions = 4_000_000, 1_000_000
    shares = 1 / np.arange(1, num_rows + 1) ** 0.9
    shares /= shares.sum()
    owners = RowShard(num_rows, 0, 1024).owner(np.arange(num_rows))
    distinct = np.bincount(owners, 1 - np.exp(-num_positions * shares), minlength=1024)
    assert 0.95 < distinct.min() / distinct.mean() < distinct.max() / distinct.mean() < 1.05


def test_small_tables_and_a_rank_alone_deal_out_nothing() -> None:
    assert not is_sharded(10**9, 1, num_ranks=1)
    assert not is_sharded(99, 100, num_ranks=4)
    assert is_sharded(100, 100, num_ranks=4)
    assert not is_sharded(3, 1, num_ranks=4)  # a rank would have no row


def test_memory_of_a_worker() -> None:
    specs = [TableSpec("item", 1001, 8), TableSpec("brand", 10, 4)]
    assert table_bytes(specs, num_slots=2) == 4 * 3 * (1001 * 8 + 10 * 4)
    assert table_bytes(specs, 2, num_ranks=4, sharded_from_rows=100) == 4 * 3 * (251 * 8 + 10 * 4)


def test_traffic_of_an_update() -> None:
    """A rank reads 100 rows and is asked for 80, of width 16, with 16-bit gradients."""
    assert shard_traffic(100, 80, 16, wire_bytes=2) == (400, 80 * 64, 100 * 32, 3)
