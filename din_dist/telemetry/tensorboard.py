"""Writes a job's files for TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

PROFILED_STEPS = 20
RETRY_SECONDS = 60.0


class TensorBoard:
    """A writer of scalars, texts, histograms and profiles below `folder`. Only the chief has one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: EventFileWriter | None = None
        self._not_before = 0.0  # monotonic time before which no new writer is tried
        self._profile_until: int | None = None

    def scalars(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self._write(step, *(scalar_pb(f"{kind}/{name}", float(value)) for name, value in numbers.items()))

    def text(self, name: str, step: int, lines: str) -> None:
        """Writes `lines` without formatting."""
        self._write(step, text_pb(name, "".join(f"    {line}\n" for line in lines.splitlines())))  # as code in Markdown

    def histogram(self, name: str, step: int, values: np.ndarray) -> None:
        self._write(step, histogram_pb(name, values))

    def _write(self, step: int, *summaries: Summary) -> None:
        if self._writer is None:
            if time.monotonic() < self._not_before:
                return
            # TensorBoard's own writer, because `tf.summary` runs an operation for each value, 0.4 ms each.
            self._writer = EventFileWriter(str(self._folder))
        together = Summary(value=[value for summary in summaries for value in summary.value])
        try:
            self._writer.add_event(Event(wall_time=time.time(), step=step, summary=together))
            self._writer.flush()
        except (OSError, tf.errors.OpError):  # the writer is unusable after an error
            self._writer, self._not_before = None, time.monotonic() + RETRY_SECONDS
            raise

    def start_profile(self, step: int) -> str | None:
        """Starts a profile of the updates after `step`, and returns the problem, if there is one."""
        if self._profile_until is not None:
            return "a profile is being taken already"
        try:
            tf.profiler.experimental.start(str(self._folder))
        except (tf.errors.OpError, OSError) as error:
            return str(error)
        self._profile_until = step + PROFILED_STEPS
        return None

    def stop_profile_if_due(self, step: int) -> bool:
        """Stops a profile that is due at `step`, and returns true if it did."""
        if self._profile_until is None or step < self._profile_until:
            return False
        self._profile_until = None
        tf.profiler.experimental.stop()
        return True

    def close(self) -> None:
        if self._profile_until is not None:
            self.stop_profile_if_due(self._profile_until)
        if self._writer:
            self._writer.close()
