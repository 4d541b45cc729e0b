"""What ranks tell each other, each looking at what it hears: to be run by test_messages.py."""

from __future__ import annotations

import time

import numpy as np

from din_dist.distributed.runtime import Runtime, open_runtime

NUM_MESSAGES = 100
# In float32: up to 16 KiB are summed in other steps than more is.
SUMMED = (1, 2, 7, 1000, 4096, 4097, 100_000)


def main() -> None:
    runtime = open_runtime()
    for number in range(NUM_MESSAGES):
        expected = sum(number + rank for rank in range(runtime.world_size))
        assert runtime.sum(np.array([number + runtime.rank])).tolist() == [expected]
    for size in SUMMED:
        check_sum(runtime, size)
    sizes = [200_000 * (2 + rank) for rank in range(runtime.world_size)]  # more bytes than a socket holds
    parts = [np.arange(size, dtype=np.int64) for size in sizes]
    for late in (0, 1):
        if runtime.rank == late:
            time.sleep(0.1)  # the others have sent by then
        gathered = runtime.gather(parts[runtime.rank] + late)
        np.testing.assert_array_equal(gathered, np.concatenate(parts) + late)
    runtime.shutdown()


def check_sum(runtime: Runtime, size: int) -> None:
    """Near that in float64, and the same to the bit on every rank."""
    parts = [np.random.default_rng([size, rank]).normal(size=size) for rank in range(runtime.world_size)]
    found = runtime.sum(parts[runtime.rank].astype(np.float32))
    np.testing.assert_allclose(found, sum(parts), rtol=0, atol=1e-5)
    told = runtime.gather(found[None].view(np.int32))
    np.testing.assert_array_equal(told, np.broadcast_to(told[:1], told.shape))


if __name__ == "__main__":
    main()
