"""The cores and GPUs that a rank uses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from din_dist.distributed.runtime import Runtime
from din_dist.environment import SEVERAL_ON_A_GPU
from din_dist.errors import InputError


def claim_devices(runtime: Runtime, num_cores: int, gpus: Sequence[Any] | None = None) -> None:
    """Gives this process one GPU and as many threads as cores. Call it before TensorFlow's first operation.

    Raises:
        InputError: there are GPUs, but fewer than processes on this machine, and NCCL was not told to bear that.
    """
    gpus = tf.config.list_physical_devices("GPU") if gpus is None else gpus
    if gpus:
        if runtime.local_size > len(gpus) and os.environ.get(SEVERAL_ON_A_GPU) != "1":
            raise InputError(
                f"Each worker needs a GPU of its own. Received: {runtime.local_size} workers and {len(gpus)} GPU(s) on "
                f"this machine. Start at most {len(gpus)} workers here; to try more, set {SEVERAL_ON_A_GPU}=1."
            )
        mine = gpus[runtime.local_rank % len(gpus)]
        tf.config.set_visible_devices(mine, "GPU")
        tf.config.experimental.set_memory_growth(mine, True)
    tf.config.threading.set_intra_op_parallelism_threads(num_cores)
    tf.config.threading.set_inter_op_parallelism_threads(max(2, num_cores))
