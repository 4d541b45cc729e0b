"""This process' share of the machine's cores. Imports nothing that starts threads, for it must come before them."""

from __future__ import annotations

import os


def claim_cores() -> list[int]:
    """Confines a worker that `horovodrun` started to its share of the cores, and returns that.

    To be called before TensorFlow is imported and Horovod started: their thread pools are as wide as what they find
    then, and pools of the full width in every worker would fight over the cores. A process alone keeps all cores; of
    more workers than cores each names one, but is not held to it.
    """
    local_rank = int(os.environ.get("HOROVOD_LOCAL_RANK", "0"))
    local_size = int(os.environ.get("HOROVOD_LOCAL_SIZE", "1"))
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < local_size:
        return cores[local_rank % len(cores) :][:1]
    share = cores[len(cores) * local_rank // local_size : len(cores) * (local_rank + 1) // local_size]
    if local_size > 1:
        os.sched_setaffinity(0, share)
    return share
