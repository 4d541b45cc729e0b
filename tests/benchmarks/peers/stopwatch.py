"""The same clock for every system: how its training steps are timed, and when it stops to be evaluated.

Each runner imports this in its own environment, so it needs nothing but Python and NumPy.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import numpy as np


class Finished(Exception):
    """Everything is measured: raised out of the training loop, which every library lets through."""


def start() -> tuple[dict[str, Any], TextIO]:
    """The job of this process (its one argument, JSON) and the channel on which it answers.

    The channel is the process' stdout; what the libraries print goes to stderr instead.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return json.loads(sys.argv[1]), channel


def leave() -> None:
    """Ends the process at once: DeepCTR asks a server for news in a thread that may wait for minutes."""
    sys.stderr.flush()
    os._exit(0)


class Stopwatch:
    """Counts the steps of a job and says when it is over.

    Mode `speed`: `warmup_steps`, then steps for `seconds`. Mode `quality`: steps until whoever started this process has
    seen scores good enough, or for `max_seconds`; the clock stands still during evaluation. All times contain what lies
    between two steps: the input pipeline, the start of an epoch.
    """

    def __init__(self, job: dict[str, Any], channel: TextIO, scores: Callable[[], Any], packages: str) -> None:
        """`scores`: what `save` takes. `packages`: whose versions are reported, comma-separated."""
        self._job, self._channel, self._scores = job, channel, scores
        self._versions = {name: metadata.version(name) for name in packages.split(",")}
        self._steps = self._examples = 0
        self._seconds = 0.0
        self._resumed = time.perf_counter()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around the training loop; returns when the job is over."""
        self._resumed = time.perf_counter()
        with contextlib.suppress(Finished):
            yield

    def after_step(self, num_examples: int) -> None:
        """Raises `Finished` when that was the last step."""
        self._steps += 1
        self._examples += num_examples
        seconds = self._seconds + time.perf_counter() - self._resumed
        if self._job["mode"] == "quality":
            if self._steps % self._job["evaluate_every_steps"] == 0 or seconds >= self._job["max_seconds"]:
                self._evaluate(seconds)
        elif self._steps == self._job["warmup_steps"]:
            self._examples, self._resumed = 0, time.perf_counter()
        elif self._steps > self._job["warmup_steps"] and seconds >= self._job["seconds"]:
            self._say(examples_per_second=self._examples / seconds, peak_memory_bytes=peak_memory_bytes())
            raise Finished

    def _evaluate(self, seconds: float) -> None:
        self._seconds = seconds
        self.save(self._scores())
        self._say(seconds=seconds, examples=self._examples)
        if sys.stdin.readline().strip() != "go on":
            raise Finished
        self._resumed = time.perf_counter()

    def save(self, scores: Any) -> None:
        """Writes what is judged: one number a test example, in order."""
        np.save(self._job["scores"], np.asarray(scores, np.float64).reshape(-1))

    def _say(self, **found: Any) -> None:
        print(json.dumps({**found, "versions": self._versions}), file=self._channel, flush=True)


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far (VmHWM)."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
