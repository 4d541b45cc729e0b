"""The interface of every tracker, and the file by which a job finds its run again."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from din_dist.config import TelemetryConfig, TrackerKind
from din_dist.errors import InputError
from din_dist.files import make_folder, read_record, write_text
from din_dist.text import parse_json, to_json

FILE = "tracker.json"  # in the folder of a job or a study
PACKAGES = {TrackerKind.MLFLOW: ("mlflow", "mlflow-skinny sqlalchemy alembic"), TrackerKind.WANDB: ("wandb", "wandb")}


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """A run of a tracker.

    Attributes:
        tracker: its kind.
        uri: where it keeps its runs; empty: its own default.
        experiment: the name under which it groups runs.
        name: of the run.
        parent: the id of the run that this one belongs to; empty: none.
        id: of the run; empty: it is not made yet.
    """

    tracker: TrackerKind
    uri: str
    experiment: str
    name: str
    parent: str = ""
    id: str = ""


class Tracker(Protocol):
    """Sends what a job does to a run. Each call may raise any exception."""

    @property
    def run_id(self) -> str:
        """The id by which the run is found again."""

    def parameters(self, values: Mapping[str, str]) -> None:
        """Keeps settings by their names. A resumed job gives them again, some of them changed."""

    def curves(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve, by its name."""

    def artefact(self, path: Path) -> None:
        """Keeps a copy of a file."""

    def end(self, outcome: str) -> None:
        """Says how the run ended: done, stopped or failed. It may be continued."""

    def close(self) -> None:
        """Sends what is left. The run is not ended."""


def run_of(settings: TelemetryConfig, folder: Path) -> TrackedRun | None:
    """Returns the run of the job in a folder: that of before, if it was one of the same tracker; None without one."""
    if settings.tracker is TrackerKind.NONE:
        return None
    uri = settings.tracker_uri
    if not uri and settings.tracker is TrackerKind.MLFLOW:
        uri = _default_store(folder)
    new = TrackedRun(settings.tracker, uri, settings.tracker_experiment, folder.name, settings.tracker_parent)
    before = kept_run(folder)
    same = before and (before.tracker, before.uri, before.experiment) == (new.tracker, new.uri, new.experiment)
    return before if same else new


def _default_store(folder: Path) -> str:
    """Returns what MLFLOW_TRACKING_URI says by itself, or a SQLite file that neighbouring jobs share."""
    return "" if os.environ.get("MLFLOW_TRACKING_URI") else f"sqlite:///{folder.absolute().parent / 'mlflow.db'}"


def kept_run(folder: Path) -> TrackedRun | None:
    """Returns the run that a job or a study in a folder has; None if it has none, or its file cannot be read."""
    try:
        fields = parse_json(read_record(folder / FILE))
        return TrackedRun(**{**fields, "tracker": TrackerKind(fields["tracker"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def keep_run(run: TrackedRun, folder: Path) -> None:
    """Writes down the run of a job or a study."""
    make_folder(folder)
    write_text(folder / FILE, to_json(dataclasses.asdict(run)) + "\n")


def open_tracker(run: TrackedRun, folder: Path) -> Tracker:
    """Opens a run, or makes it. It may take long, and may raise any exception.

    Args:
        run: as it was kept, or without an id.
        folder: of the job.
    """
    match run.tracker:
        case TrackerKind.MLFLOW:
            from din_dist.tracking.mlflow_tracker import MlflowTracker

            return MlflowTracker(run)
        case TrackerKind.WANDB:
            from din_dist.tracking.wandb_tracker import WandbTracker

            return WandbTracker(run, folder)
        case _:
            from din_dist.tracking.hparams_tracker import HparamsTracker

            return HparamsTracker(run, folder)


def require_installed(tracker: TrackerKind) -> None:
    """Checks that a tracker's package is there, without the seconds of importing it.

    Raises:
        InputError: it is not.
    """
    module, packages = PACKAGES.get(tracker, ("", ""))
    if module and importlib.util.find_spec(module) is None:
        raise InputError(
            f"--tracker: {tracker} needs its package. Received: no module named {module!r}. Run: pip install -c "
            f"launch/constraints.txt {packages}."
        )
