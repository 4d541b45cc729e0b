"""Batches requests: a bounded queue in front of a model that runs one call at a time.

Everything except the model's call runs on the event loop's thread, so no locks are needed.
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
    """The queue has no room for the request."""


@dataclasses.dataclass(slots=True, eq=False)
class _QueuedRequest:
    request: Predict
    score: Score
    num_candidates: int
    num_positions: int
    arrived: float
    logits: asyncio.Future[list[np.ndarray]]


class Batcher:
    """A queue of requests, which `run` scores in batches until it is cancelled.

    The constructor needs a running event loop.

    Args:
        executor: with a single thread, in which models score.
        limits: of the queue and of a batch.
        metrics: to update.
    """

    def __init__(self, executor: Executor, limits: ServeConfig, metrics: ServingMetrics) -> None:
        self._executor, self._limits, self._metrics = executor, limits, metrics
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_QueuedRequest] = deque()
        self._num_candidates = self._num_positions = 0  # in the queue
        self._has_requests, self._has_full_batch = asyncio.Event(), asyncio.Event()
        metrics.queue_requests.set_function(lambda: len(self._queue))
        metrics.queue_positions.set_function(lambda: self._num_positions)

    @property
    def is_full(self) -> bool:
        """True if even the smallest request would be refused."""
        limits = self._limits
        return len(self._queue) >= limits.max_queue_requests or self._num_positions >= limits.max_queue_positions

    async def score(self, request: Predict, score: Score) -> list[np.ndarray]:
        """Returns the logits `[C]` of each instance. If the caller is cancelled, its request leaves the queue.

        Args:
            request: what to score.
            score: the model's function, which is called in `executor`. Only requests with the same share a call.

        Raises:
            QueueFull: the queue has no room for the request.
        """
        waiting = _QueuedRequest(
            request, score, request.num_candidates, request.num_positions, self._loop.time(), self._loop.create_future()
        )
        if self.is_full or self._num_positions + waiting.num_positions > self._limits.max_queue_positions:
            raise QueueFull
        self._queue.append(waiting)
        self._count(waiting, 1)
        self._has_requests.set()
        if self._num_candidates >= self._limits.max_batch_examples or (
            self._num_positions >= self._limits.max_batch_positions
        ):
            self._has_full_batch.set()
        try:
            return await waiting.logits
        finally:
            if waiting.logits.cancelled():
                self._forget(waiting)

    async def run(self) -> None:
        """Scores requests until it is cancelled."""
        while True:
            await self._has_requests.wait()
            if self._queue and self._limits.batch_timeout_ms:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(self._queue[0].arrived + self._limits.batch_timeout_ms / 1000):
                        await self._has_full_batch.wait()
            batch = self._take()
            if batch:
                await self._answer(batch)
            del batch  # while it waits for the next, nothing may hold the model of the last

    def _take(self) -> list[_QueuedRequest]:
        """Removes the oldest requests that fit into one call, and at least one, and returns them."""
        batch: list[_QueuedRequest] = []
        num_candidates = num_positions = 0
        while self._queue:
            first = self._queue[0]
            num_candidates += first.num_candidates
            num_positions += first.num_positions
            if batch and (
                num_candidates > self._limits.max_batch_examples
                or num_positions > self._limits.max_batch_positions
                or first.score != batch[0].score
            ):
                break
            batch.append(self._queue.popleft())
            self._count(first, -1)
        if not self._queue:
            self._has_requests.clear()
        self._has_full_batch.clear()
        return batch

    async def _answer(self, batch: list[_QueuedRequest]) -> None:
        instances = [instance for waiting in batch for instance in waiting.request.instances]
        started = self._loop.time()
        try:
            logits = iter(await self._loop.run_in_executor(self._executor, batch[0].score, instances))
        except Exception as error:
            if len(batch) > 1:  # one by one, so that one failing request does not fail the others
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

    def _forget(self, waiting: _QueuedRequest) -> None:
        """Removes a request that nobody waits for any more, so that it does not use the queue and the model."""
        with contextlib.suppress(ValueError):  # it is being scored
            self._queue.remove(waiting)
            self._count(waiting, -1)
            if not self._queue:
                self._has_requests.clear()

    def _count(self, waiting: _QueuedRequest, sign: int) -> None:
        self._num_candidates += sign * waiting.num_candidates
        self._num_positions += sign * waiting.num_positions
