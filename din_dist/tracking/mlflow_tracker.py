"""Writes to MLflow: to a server, a SQLite file, or a folder."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

from din_dist.tracking.run import TrackedRun

_PARENT = "mlflow.parentRunId"
_STATUS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_LONGEST_VALUE = 5000  # characters of a parameter; MLflow refuses more than 6000
_PARAMETERS_AT_ONCE = 100  # as many as a server takes


class MlflowTracker:
    """A run of MLflow.

    Args:
        run: `uri` is a tracking URI of MLflow's; empty: MLflow's default.
    """

    def __init__(self, run: TrackedRun) -> None:
        _prepare_environment(run.uri)
        import mlflow
        from mlflow.entities import Metric, Param

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._metric, self._parameter = Metric, Param
        self._client = mlflow.MlflowClient(tracking_uri=run.uri or None)
        self.run_id = run.id or self._new(run)

    def _new(self, run: TrackedRun) -> str:
        found = self._client.get_experiment_by_name(run.experiment)
        experiment = found.experiment_id if found else self._new_experiment(run)
        tags = {_PARENT: run.parent} if run.parent else {}
        return str(self._client.create_run(experiment, tags=tags, run_name=run.name).info.run_id)

    def _new_experiment(self, run: TrackedRun) -> str:
        place = None
        if run.uri.startswith("sqlite:///"):  # by default files go to the current folder
            place = (Path(run.uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()
        try:
            return str(self._client.create_experiment(run.experiment, artifact_location=place))
        except Exception:  # another job has made it meanwhile
            found = self._client.get_experiment_by_name(run.experiment)
            if found is None:
                raise
            return str(found.experiment_id)

    def parameters(self, values: Mapping[str, str]) -> None:
        self._client.update_run(self.run_id, status="RUNNING")  # also of a job that goes on
        before = self._client.get_run(self.run_id).data.params
        cut = {name: value[:_LONGEST_VALUE] for name, value in values.items()}
        new = [self._parameter(name, value) for name, value in cut.items() if name not in before]
        for first in range(0, len(new), _PARAMETERS_AT_ONCE):
            self._client.log_batch(self.run_id, params=new[first : first + _PARAMETERS_AT_ONCE])
        for name, value in cut.items():
            if before.get(name, value) != value:  # MLflow keeps the first value of a parameter
                self._client.set_tag(self.run_id, f"resumed_with.{name}", value)

    def curves(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        points = [self._metric(name, value, now, step) for name, value in values.items() if math.isfinite(value)]
        self._client.log_batch(self.run_id, metrics=points)

    def artefact(self, path: Path) -> None:
        self._client.log_artifact(self.run_id, str(path))

    def end(self, outcome: str) -> None:
        self._client.set_terminated(self.run_id, status=_STATUS.get(outcome, "FINISHED"))

    def close(self) -> None:
        pass


def _prepare_environment(uri: str) -> None:
    """Sets what MLflow reads when it is imported, unless the user has."""
    if uri and ("://" not in uri or uri.startswith("file:")):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # it refuses folders otherwise, since 3.7
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its default waits for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
