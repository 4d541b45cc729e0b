"""Runs several ranks in one process: threads that wait for each other where real ranks do an all-reduce.

ranks = ThreadedRanks(2)
results = ranks.run(lambda rank: small_model(sum_over_ranks=ranks.sum_over_ranks(rank))(shares[rank], training=True))
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import tensorflow as tf

from tests.support.patience import PATIENCE

Result = TypeVar("Result")


class ThreadedRanks:
    """Makes `sum_over_ranks` functions whose gradients are summed over the ranks as well, as Horovod's are."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=PATIENCE)
        self._tensors: list[tf.Tensor] = [None] * world_size

    def sum_over_ranks(self, rank: int) -> Callable[[tf.Tensor], tf.Tensor]:
        @tf.custom_gradient
        def total(tensor: tf.Tensor):
            return self._sum(rank, tensor), lambda upstream: self._sum(rank, upstream)

        return total

    def run(self, work: Callable[[int], Result]) -> list[Result]:
        """Calls `work(rank)` for every rank at the same time; returns the results in the order of ranks."""

        def guarded(rank: int) -> Result:
            try:
                return work(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(guarded, range(self.world_size)))

    def _sum(self, rank: int, tensor: tf.Tensor) -> tf.Tensor:
        self._tensors[rank] = tensor
        self._barrier.wait()
        total = tf.add_n(self._tensors)
        self._barrier.wait()
        return total
