"""Sums and gathers of ranks, each on a GPU if there is one, against numbers worked out by hand.

horovodrun --gloo -np 2 .venv/bin/python -m tests.gpu.messages
"""

from __future__ import annotations

import time

import numpy as np
import tensorflow as tf

from din_dist.distributed.devices import claim_devices
from din_dist.distributed.runtime import HorovodRuntime

ROUNDS = 200


def main() -> None:
    runtime = HorovodRuntime()
    claim_devices(runtime, num_cores=1)
    rank, size = runtime.rank, runtime.world_size

    @tf.function
    def tell(numbers: tf.Tensor, rows: tf.Tensor) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        return runtime.all_reduce([numbers, 2 * numbers], "sums"), runtime.all_gather([rows, rows + 1], "rows")

    own = tf.fill([1000], rank + 1.0), tf.fill([rank + 2, 3], float(rank))
    expected = np.concatenate([np.full([other + 2, 3], other) for other in range(size)])
    (once, twice), (rows, more) = tell(*own)
    assert (once.numpy() == size * (size + 1) / 2).all() and (twice.numpy() == size * (size + 1)).all()
    assert (rows.numpy() == expected).all() and (more.numpy() == expected + 1).all()
    started = time.perf_counter()
    for _ in range(ROUNDS):
        (once, _), _ = tell(*own)
    once.numpy()
    milliseconds = 1000 * (time.perf_counter() - started) / ROUNDS
    print(f"rank {rank} of {size} on {once.device.rpartition('device:')[2]}: right, {milliseconds:.2f} ms", flush=True)
    runtime.shutdown()


if __name__ == "__main__":
    main()
