"""Training in this process: the weights, the summary and the files are those of the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from numpy.testing import assert_allclose, assert_array_equal

import din_dist
from din_dist.config import Config, DataConfig, JobConfig, ModelConfig, TelemetryConfig
from din_dist.data.prepared import open_prepared
from tests.support.commands import prepare_log, run

SMALL = {
    "dataset": "event_log",
    "metrics_port": -1,
    "embedding_dim": 8,
    "hidden_units": [8],
    "attention_hidden_units": [8],
    "global_batch_size": 64,
    "max_history_length": 10,
    "log_every_steps": 1,
    "xla": False,
    "native": False,
    "split": "leave_two_out",
    "epochs": 2,
}


def small(folder: Path, **values: object) -> Config:
    where = {"data_path": folder / "log.parquet", "data_dir": folder / "prepared", "output_dir": folder / "here"}
    return din_dist.settings(**(SMALL | where | values))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    prepare_log(folder)
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> din_dist.Result:
    return din_dist.train(small(folder))


@pytest.fixture(scope="module")
def of_command(folder: Path) -> din_dist.Result:
    done = run("train", folder, "--nonative", "--split=leave_two_out", "--epochs=2")
    assert done.returncode == 0, done.stderr
    return din_dist.Result.of(folder / "run")


def test_the_command_learns_the_same_weights(result: din_dist.Result, of_command: din_dist.Result) -> None:
    for name in ("test_gauc", "test_auc", "test_log_loss", "steps", "num_parameters"):
        assert result.summary[name] == pytest.approx(of_command.summary[name], rel=1e-5), name
    assert result.summary["test_floors"] == of_command.summary["test_floors"]
    for one, other in zip(result.model.weights, of_command.model.weights, strict=True):
        assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_the_folder_is_that_of_the_command(result: din_dist.Result, of_command: din_dist.Result) -> None:
    """Apart from where the job lies."""
    texts = [(each.output_dir / "flags.txt").read_text() for each in (result, of_command)]
    assert texts[0].replace("/here", "/run") == texts[1]
    files = [{path.name for path in each.output_dir.iterdir()} for each in (result, of_command)]
    assert files[0] == files[1]
    assert din_dist.Result.of(result.output_dir).summary == json.loads(json.dumps(result.summary))


def test_the_result_is_a_model_of_keras(tmp_path: Path, folder: Path, result: din_dist.Result) -> None:
    store = open_prepared(result.config.data)
    assert result.model.num_items == store.facts.num_items
    inputs = {"candidate_item_ids": np.array([1, 2, 3]), "history_item_ids": np.array([[4, 5], [6, 0], [0, 0]])}
    result.model.save(tmp_path / "model.keras")
    assert_array_equal(din_dist.load_model(tmp_path / "model.keras")(inputs), result.model(inputs))


def test_a_job_that_is_done_is_resumed_at_its_end(folder: Path, result: din_dist.Result) -> None:
    again = din_dist.train(result.config)
    assert again.summary["steps"] == result.summary["steps"]
    assert again.summary["test_gauc"] == result.summary["test_gauc"]


def test_settings_are_those_of_the_command_line(folder: Path) -> None:
    before = flags.FLAGS.flag_values_dict()
    config = din_dist.settings("recommended", data_path="clicks.parquet", epochs=7)
    assert (config.job.epochs, config.data.data_path) == (7, str(Path("clicks.parquet")))
    assert config.data.dataset == "event_log"
    assert flags.FLAGS.flag_values_dict() == before, "the flags of the program are left alone"


def test_settings_may_be_built_from_their_classes(tmp_path: Path) -> None:
    config = Config(
        data=DataConfig("synthetic", data_dir=str(tmp_path / "data"), synthetic_num_users=100, synthetic_num_items=50),
        model=ModelConfig(embedding_dim=(4,)),
        job=JobConfig(max_steps=2, output_dir=str(tmp_path / "run")),
        telemetry=TelemetryConfig(metrics_port=-1),
    )
    config = dataclasses.replace(config, execution=dataclasses.replace(config.execution, native=False, xla=False))
    result = din_dist.train(config)
    assert result.summary["steps"] == 2
    assert result.output_dir == tmp_path / "run"
    assert din_dist.Result.of(tmp_path / "run").config == config


def test_mistakes_get_one_line_and_free_the_folder(folder: Path) -> None:
    for values, message in (
        ({"epoch": 3}, "Unknown command line flag 'epoch'"),
        ({"epochs": "many"}, "flag --epochs=many: "),
        ({"dropout": 2}, "--dropout: must be below 1. Received: 2.0."),
        ({"dataset": "nothing"}, "--dataset: unknown data set. Received: 'nothing'."),
    ):
        with pytest.raises(din_dist.InputError) as error:
            small(folder, **values)
        assert str(error.value).startswith(message)
    wrong = small(folder, embedding_dim=[1, 2, 3, 4], output_dir=folder / "wrong")
    with pytest.raises(din_dist.InputError, match="must be one width, or one for each of") as kept:
        din_dist.train(wrong)
    right = wrong.replace(embedding_dim=(4,), max_steps=1)
    assert din_dist.train(right).summary["steps"] == 1, kept
    with pytest.raises(din_dist.InputError, match="^output_dir: must have a finished job"):
        din_dist.Result.of(folder / "nowhere")
