"""Jobs with `--tracker`: what a tracker has afterwards, read back by its own library."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from din_dist import assembly
from din_dist.config import Config, TrackerKind
from din_dist.data.prepared import prepare
from din_dist.distributed.runtime import Runtime
from din_dist.errors import InputError
from din_dist.telemetry import reporter
from din_dist.tracking import run as runs
from din_dist.tracking import tracked_job
from din_dist.tracking.run import TrackedRun, kept_run, require_installed, run_of
from din_dist.tracking.tracked_job import add_to_run, open_study_run, parameters_of
from tests.support.patience import PATIENCE
from tests.support.programs import imported
from tests.support.repository import ROOT
from tests.support.small_log import small_config


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine takes longer to open a tracker than a job waits for one that does not answer."""
    monkeypatch.setattr(reporter, "PATIENCE_SECONDS", PATIENCE)
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def train(config: Config) -> assembly.Assembly:
    """Trains as the command does, and writes a summary."""
    job = assembly.Assembly(config, Runtime(), prepare(config.data))
    with job.telemetry.until_the_end(job.trainer):
        job.telemetry.show_flags("--epochs=1\n")
        job.trainer.train()
        job.telemetry.show_summary('{"steps": 1}')
    return job


def failures(job: assembly.Assembly) -> float:
    return job.telemetry.prometheus_metrics.values()["din_dist_tracker_failures_total"]


def run_in(folder: Path) -> TrackedRun:
    run = kept_run(folder)
    assert run
    return run


@pytest.mark.parametrize("store", ["default", "folder"])
def test_mlflow_has_settings_curves_and_files_of_a_resumed_job_in_one_run(store: str, tmp_path: Path) -> None:
    mlflow: Any = imported("mlflow", "mlflow-skinny")
    where = {"tracker_uri": str(tmp_path / "mlruns")} if store == "folder" else {}
    settings = {"tracker": TrackerKind.MLFLOW, "log_every_steps": 5, "split": "leave_two_out", **where}
    config = small_config(tmp_path, max_steps=10, **settings)
    first = train(config)
    assert failures(first) == 0
    before = run_in(tmp_path / "run")
    assert train(small_config(tmp_path, max_steps=15, metrics_host="127.0.0.2", **settings)).trainer.state.step == 15
    run = run_in(tmp_path / "run")
    assert run.id == before.id
    assert (store == "default") == (tmp_path / "mlflow.db").exists()
    client = mlflow.MlflowClient(tracking_uri=run.uri)
    (found,) = client.search_runs([client.get_experiment_by_name("din_dist").experiment_id])
    assert (found.info.run_id, found.info.status, found.info.run_name) == (run.id, "FINISHED", "run")
    given = parameters_of(config)
    assert {name: found.data.params[name] for name in given} == given
    assert (given["hidden_units"], found.data.tags["resumed_with.metrics_host"]) == ("8,4", "127.0.0.2")
    assert [point.step for point in client.get_metric_history(run.id, "train/loss")] == [5, 10, 15]
    assert client.get_metric_history(run.id, "validation/gauc")
    assert {file.path for file in client.list_artifacts(run.id)} == {"flags.txt", "summary.json"}
    page = tmp_path / "report.html"
    page.write_text("<html>")
    add_to_run(tmp_path / "run", page, pytest.fail)
    assert "report.html" in {file.path for file in client.list_artifacts(run.id)}
    assert client.get_run(run.id).info.status == "FINISHED"


def test_runs_of_trials_belong_to_that_of_the_study(tmp_path: Path) -> None:
    mlflow: Any = imported("mlflow", "mlflow-skinny")
    config = small_config(tmp_path, tracker=TrackerKind.MLFLOW)
    study = open_study_run(config, tmp_path / "study", pytest.fail)
    assert study and study.id
    assert open_study_run(config, tmp_path / "study", pytest.fail) == study  # the same, when it goes on
    train(config.replace(tracker_uri=study.uri, tracker_parent=study.id, max_steps=2))
    client = mlflow.MlflowClient(tracking_uri=study.uri)
    trial = client.get_run(run_in(tmp_path / "run").id)
    assert trial.data.tags["mlflow.parentRunId"] == study.id
    assert client.get_run(study.id).data.params["epochs"] == trial.data.params["epochs"]


def test_tensorboard_has_the_settings_as_hyperparameters(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    config = small_config(tmp_path, tracker=TrackerKind.TENSORBOARD_HPARAMS, learning_rate=0.02, max_steps=3)
    job = train(config)
    assert failures(job) == 0
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    found = read.summary_metadata
    parts = {}
    for tag in (metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG):
        parts[tag] = HParamsPluginData.FromString(found[tag].plugin_data.content)
    start = parts[metadata.SESSION_START_INFO_TAG].session_start_info
    assert start.hparams["learning_rate"].number_value == pytest.approx(0.02)
    assert start.hparams["hidden_units"].string_value == "8,4"
    assert start.hparams["xla"].bool_value is False
    assert start.group_name == run_in(tmp_path / "run").id
    assert parts[metadata.SESSION_END_INFO_TAG].session_end_info.status == 1  # success
    assert "train/loss" in read.Tags()["tensors"] or job.trainer.state.step < config.telemetry.log_every_steps


def test_wandb_offline_has_settings_curves_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported("wandb", "wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = small_config(tmp_path, tracker=TrackerKind.WANDB, log_every_steps=5, max_steps=10)
    assert failures(train(config)) == 0
    run = run_in(tmp_path / "run")
    assert failures(train(config.replace(max_steps=15))) == 0
    assert run_in(tmp_path / "run") == run
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(run.id) for folder in folders)  # `wandb sync` joins them
    files = {path.name for path in folders[0].rglob("*")}
    assert {"flags.txt", "summary.json"} <= files
    written = b"".join(path.read_bytes() for path in folders[0].glob("*.wandb"))
    assert b"train/loss" in written and b"learning_rate" in written


class Broken:
    """A tracker that cannot do anything but be opened."""

    run_id = "7"

    def __getattr__(self, name: str) -> Any:
        def fail(*_: object) -> None:
            raise RuntimeError("no room\nleft")

        return fail


@pytest.mark.parametrize("moment", ["opening", "writing"])
def test_a_tracker_that_fails_is_counted_and_stops_nothing(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def open_broken(run: TrackedRun, folder: Path) -> Broken:
        if moment == "opening":
            raise ConnectionError("the server is away")
        return Broken()

    monkeypatch.setattr(tracked_job, "open_tracker", open_broken)
    job = train(small_config(tmp_path, tracker=TrackerKind.MLFLOW, log_every_steps=1, max_steps=5))
    assert job.trainer.state.step == 5
    assert failures(job) >= 5
    said = capsys.readouterr().err
    problem = "ConnectionError: the server is away" if moment == "opening" else "RuntimeError: no room left"
    assert said.count(f"--tracker=mlflow has failed, and training goes on without: {problem}") == 1


def test_a_tracker_that_does_not_answer_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reporter, "PATIENCE_SECONDS", 0.5)
    ends = threading.Event()
    monkeypatch.setattr(tracked_job, "open_tracker", lambda *_: ends.wait())
    try:
        job = train(small_config(tmp_path, tracker=TrackerKind.MLFLOW, max_steps=2))
    finally:
        ends.set()
    assert failures(job) >= 1
    assert "--tracker=mlflow has failed, and training goes on without: it does not answer" in capsys.readouterr().err


def test_only_the_chief_has_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Mapping[str, object]] = []
    monkeypatch.setattr(reporter, "TrackedJob", lambda *arguments: opened.append(arguments))
    config = small_config(tmp_path, tracker=TrackerKind.MLFLOW)

    class Second(Runtime):
        rank = 1
        is_chief = False

    metrics = reporter.PrometheusMetrics(config, Runtime())
    reporter.Reporter(config, Second(), metrics, 1)
    assert not opened
    reporter.Reporter(config, Runtime(), metrics, 1)
    assert len(opened) == 1


def test_another_tracker_or_store_begins_another_run(tmp_path: Path) -> None:
    config = small_config(tmp_path, tracker=TrackerKind.MLFLOW)
    run = run_of(config.telemetry, tmp_path / "run")
    assert run and run.uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    runs.keep_run(TrackedRun(run.tracker, run.uri, run.experiment, run.name, id="5"), tmp_path / "run")
    again = run_of(config.telemetry, tmp_path / "run")
    assert again and again.id == "5"
    other = run_of(config.replace(tracker_experiment="other").telemetry, tmp_path / "run")
    assert other and not other.id
    (tmp_path / "run" / runs.FILE).write_text("[]")
    assert kept_run(tmp_path / "run") is None


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as raised:
        require_installed(TrackerKind.MLFLOW)
    assert str(raised.value) == (
        "--tracker: mlflow needs its package. Received: no module named 'mlflow'. Run: pip install -c "
        "launch/constraints.txt mlflow-skinny sqlalchemy alembic."
    )
    require_installed(TrackerKind.TENSORBOARD_HPARAMS)
    require_installed(TrackerKind.NONE)


def test_the_packages_that_it_names_are_those_of_the_extra() -> None:
    extra = (ROOT / "setup.cfg").read_text().partition("mlflow =\n")[2].split("wandb =")[0].split()
    assert sorted(extra) == sorted(runs.PACKAGES[TrackerKind.MLFLOW][1].split())


def test_a_password_in_the_address_is_refused() -> None:
    with pytest.raises(InputError, match="--tracker_uri: must be without user and password. Received: ") as raised:
        Config().replace(tracker_uri="http://me:secret@host:5000")
    assert "secret" not in str(raised.value)
