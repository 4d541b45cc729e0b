"""Any number of ranks reads the shards that any number has written."""

from pathlib import Path

import numpy as np
import pytest

from din_dist.distributed.placement import RowShard
from din_dist.training import checkpoint_arrays
from din_dist.training.checkpoint_arrays import is_entry, read_variable, write_array

TABLE = np.random.default_rng(0).normal(size=(101, 3)).astype(np.float32)


def written(folder: Path, num_ranks: int) -> dict:
    """Writes `TABLE` as so many ranks do; 1: as a whole table."""
    if num_ranks == 1:
        return write_array(folder / "whole.npy", TABLE)
    shards = [write_array(folder / f"{rank}.npy", TABLE[rank::num_ranks]) for rank in range(num_ranks)]
    return {"num_rows": len(TABLE), "shards": shards}


@pytest.mark.parametrize("writers", [1, 2, 3, 5])
@pytest.mark.parametrize("readers", [1, 2, 3, 4])
def test_any_number_reads_any(writers: int, readers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_arrays, "BLOCK_BYTES", 50)  # 4 rows
    entry = written(tmp_path, writers)
    assert is_entry(entry)
    for rank in range(readers):
        shard = RowShard(len(TABLE), rank, readers)
        found = read_variable(tmp_path, entry, TABLE.shape, TABLE.dtype, shard)
        assert np.array_equal(found, TABLE[rank::readers])
    assert np.array_equal(read_variable(tmp_path, entry), TABLE)


def test_a_changed_shard_is_found_by_some_reader(tmp_path: Path) -> None:
    entry = written(tmp_path, 3)
    changed = bytearray((tmp_path / "1.npy").read_bytes())
    changed[-1] ^= 1
    (tmp_path / "1.npy").write_bytes(changed)
    read_variable(tmp_path, entry, TABLE.shape, TABLE.dtype, RowShard(101, 0, 2))
    with pytest.raises(ValueError, match="its content changed"):
        read_variable(tmp_path, entry, TABLE.shape, TABLE.dtype, RowShard(101, 1, 2))
    with pytest.raises(ValueError, match="its content changed"):
        read_variable(tmp_path, entry)


def test_tables_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a table of 101 rows for one of 99"):
        read_variable(tmp_path, written(tmp_path, 2), (99, 3), TABLE.dtype)


def test_entries_stay_inside_the_folder() -> None:
    good = {"file": "a.npy", "digest": "0"}
    assert is_entry({"num_rows": 3, "shards": [good, good]})
    for bad in (
        {"num_rows": 3, "shards": []},
        {"shards": [good]},
        {"num_rows": 3, "shards": [{**good, "file": "../a.npy"}]},
    ):
        assert not is_entry(bad)
