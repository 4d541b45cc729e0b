"""Scores together what arrives together: a bounded queue before a model that does one thing at a time.

Everything but the model's call happens on the event loop's thread, so there is nothing to lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import numpy as np

from din_dist.serving.http.metrics import ServingMetrics
from din_dist.serving.http.parse import Instance, Predict
from din_dist.serving.http.settings import ServeConfig

Score = Callable[[Sequence[Instance]], list[np.ndarray]]


class QueueFull(Exception):
    """The request was not taken on."""


@dataclasses.dataclass(slots=True, eq=False)
class _Waiting:
    request: Predict
    num_candidates: int
    num_positions: int
    arrived: float
    logits: asyncio.Future[list[np.ndarray]]


class Batcher:
    """Must be made where an event loop runs; `run` does the work, until it is cancelled.

    Args:
        score: logits `[C]` of each instance; is called in `executor`.
    """

    def __init__(self, score: Score, executor: Executor, limits: ServeConfig, metrics: ServingMetrics) -> None:
        self._score, self._executor, self._limits, self._metrics = score, executor, limits, metrics
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Waiting] = deque()
        self._num_candidates = self._num_positions = 0  # in the queue
        self._arrived, self._enough = asyncio.Event(), asyncio.Event()
        metrics.queue_requests.set_function(lambda: len(self._queue))
        metrics.queue_positions.set_function(lambda: self._num_positions)

    @property
    def is_full(self) -> bool:
        """Whether even the smallest request would be refused."""
        limits = self._limits
        return len(self._queue) >= limits.max_queue_requests or self._num_positions >= limits.max_queue_positions

    async def score(self, request: Predict) -> list[np.ndarray]:
        """Logits `[C]` of each instance. A caller that is cancelled leaves the queue.

        Raises:
            QueueFull: too much waits already.
        """
        waiting = _Waiting(
            request, request.num_candidates, request.num_positions, self._loop.time(), self._loop.create_future()
        )
        if self.is_full or self._num_positions + waiting.num_positions > self._limits.max_queue_positions:
            raise QueueFull
        self._queue.append(waiting)
        self._count(waiting, 1)
        self._arrived.set()
        if self._num_candidates >= self._limits.max_batch_examples or (
            self._num_positions >= self._limits.max_batch_positions
        ):
            self._enough.set()
        try:
            return await waiting.logits
        finally:
            if waiting.logits.cancelled():
                self._forget(waiting)

    async def run(self) -> None:
        while True:
            await self._arrived.wait()
            if self._queue and self._limits.batch_timeout_ms:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(self._queue[0].arrived + self._limits.batch_timeout_ms / 1000):
                        await self._enough.wait()
            if batch := self._take():
                await self._answer(batch)

    def _take(self) -> list[_Waiting]:
        """The oldest that fit into one call, and in any case the first."""
        batch: list[_Waiting] = []
        num_candidates = num_positions = 0
        while self._queue:
            first = self._queue[0]
            num_candidates += first.num_candidates
            num_positions += first.num_positions
            if batch and (
                num_candidates > self._limits.max_batch_examples or num_positions > self._limits.max_batch_positions
            ):
                break
            batch.append(self._queue.popleft())
            self._count(first, -1)
        if not self._queue:
            self._arrived.clear()
        self._enough.clear()
        return batch

    async def _answer(self, batch: list[_Waiting]) -> None:
        instances = [instance for waiting in batch for instance in waiting.request.instances]
        started = self._loop.time()
        try:
            logits = iter(await self._loop.run_in_executor(self._executor, self._score, instances))
        except Exception as error:
            if len(batch) > 1:  # what one of them broke the others shall not suffer from
                for waiting in batch:
                    await self._answer([waiting])
            elif not batch[0].logits.done():
                batch[0].logits.set_exception(error)
            return
        self._metrics.after_batch(
            seconds=self._loop.time() - started,
            num_requests=len(batch),
            num_candidates=sum(waiting.num_candidates for waiting in batch),
            num_positions=sum(waiting.num_positions for waiting in batch),
        )
        for waiting in batch:
            found = [next(logits) for _ in waiting.request.instances]
            if not waiting.logits.done():
                waiting.logits.set_result(found)

    def _forget(self, waiting: _Waiting) -> None:
        """Of those that nobody waits for any more, so that they neither fill the queue nor keep the model busy."""
        with contextlib.suppress(ValueError):  # it is being scored
            self._queue.remove(waiting)
            self._count(waiting, -1)
            if not self._queue:
                self._arrived.clear()

    def _count(self, waiting: _Waiting, sign: int) -> None:
        self._num_candidates += sign * waiting.num_candidates
        self._num_positions += sign * waiting.num_positions
