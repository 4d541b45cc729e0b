"""Writes settings for TensorBoard's tab HPARAMS, beside the curves that a job has in TensorBoard anyway."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from din_dist.tracking.run import TrackedRun

_FAILED = ("failed", "stopped")


class HparamsTracker:
    """A session of TensorBoard's plugin for hyperparameters.

    Curves and files are left out: the job's own are in the same folder, and TensorBoard keeps no files.

    Args:
        run: its id is that of the session's group, the same for a resumed job.
        folder: of the job.
    """

    def __init__(self, run: TrackedRun, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder / "tensorboard"), filename_suffix=".hparams")
        self.run_id = run.id or str(folder.absolute())

    def parameters(self, values: Mapping[str, str]) -> None:
        from tensorboard.plugins.hparams import summary_v2

        self._write(summary_v2.hparams_pb({name: _value(text) for name, text in values.items()}, self.run_id))

    def curves(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def artefact(self, path: Path) -> None:
        pass

    def end(self, outcome: str) -> None:
        from tensorboard.plugins.hparams import api_pb2, summary

        failed = outcome in _FAILED
        self._write(summary.session_end_pb(api_pb2.STATUS_FAILURE if failed else api_pb2.STATUS_SUCCESS))
        self.close()

    def close(self) -> None:
        self._writer.close()

    def _write(self, content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        own = Summary.FromString(content.SerializeToString())  # the plugin makes TensorFlow's
        self._writer.add_event(Event(wall_time=time.time(), step=0, summary=own))
        self._writer.flush()


def _value(text: str) -> bool | float | str:
    """Returns a setting as TensorBoard sorts it: a switch or a number where it is one."""
    if text in ("True", "False"):
        return text == "True"
    try:
        return float(text)
    except ValueError:
        return text
