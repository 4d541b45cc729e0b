"""Shards begin with the values of the whole table; with real ranks they are trained in tests/multi_process."""

import keras
import numpy as np
import pytest

from din_dist.distributed import sharded_lookup
from din_dist.distributed.placement import RowShard
from din_dist.distributed.sharded_lookup import first_values


@pytest.mark.parametrize("seed", [5, 2**31 + 7, 2**32 - 3])
@pytest.mark.parametrize(("num_rows", "width"), [(1001, 7), (40, 3), (5, 16)])
def test_a_shard_begins_as_in_the_whole_table(
    num_rows: int, width: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded_lookup, "VALUES_AT_ONCE", 64)  # many blocks
    initializer = keras.initializers.GlorotUniform(seed)
    whole = initializer((num_rows, width)).numpy()
    for num_ranks in (1, 2, 3, 4):
        for rank in range(num_ranks):
            found = first_values(initializer, RowShard(num_rows, rank, num_ranks), width, "float32")
            assert np.array_equal(found.numpy(), whole[rank::num_ranks])


def test_vectors_that_a_table_begins_with_are_dealt_out() -> None:
    start = np.arange(15, dtype=np.float32).reshape(5, 3)
    found = first_values(lambda shape, dtype: start.astype(dtype).reshape(shape), RowShard(5, 1, 2), 3, "float32")
    assert np.array_equal(found.numpy(), start[1::2])
