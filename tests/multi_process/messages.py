"""What two ranks tell each other, each looking at the other's numbers: to be run by test_messages.py."""

from __future__ import annotations

import time

import numpy as np

from din_dist.distributed.runtime import open_runtime

NUM_MESSAGES = 100


def main() -> None:
    runtime = open_runtime()
    for number in range(NUM_MESSAGES):
        assert runtime.sum(np.array([number + runtime.rank])).tolist() == [2 * number + 1]
    parts = [np.arange(size, dtype=np.int64) for size in (500_000, 700_000)]  # of more bytes than a socket holds
    for late in (0, 1):
        if runtime.rank == late:
            time.sleep(0.1)  # the other has sent by then
        gathered = runtime.gather(parts[runtime.rank] + late)
        np.testing.assert_array_equal(gathered, np.concatenate(parts) + late)
    runtime.shutdown()


if __name__ == "__main__":
    main()
