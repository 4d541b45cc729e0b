"""The commands as users run them: real processes, real signals, exit codes and last lines."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.commands import assert_one_line, command, run, run_at_once
from tests.support.patience import PATIENCE
from tests.support.preloaded import Preloaded
from tests.support.repository import ROOT
from tests.support.small_log import write_log


def test_prepare_data_prints_what_it_found(tmp_path: Path) -> None:
    done = run("prepare_data", tmp_path, "--split=leave_two_out", "--unknown_item=features")
    assert done.returncode == 0, done.stderr
    for words in (
        "users: 200",
        "items: 30",
        "category_id 5",
        "events: ",
        "history lengths",
        "labels: none",
        "validation ",
        "items that training never sees: 0 of 30",
    ):
        assert words in done.stdout, words
    assert not done.stderr


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, commands: Preloaded) -> Path:
    """A folder whose log is prepared; jobs on it take an `--output_dir` of their own."""
    folder = tmp_path_factory.mktemp("prepared")
    done = run_at_once(commands, "prepare_data", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_train_ends_with_its_summary(commands: Preloaded, tmp_path: Path) -> None:
    assert run_at_once(commands, "prepare_data", tmp_path).returncode == 0
    done = run("train", tmp_path, "--epochs=1")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    wanted = {
        "test_gauc",
        "test_auc",
        "test_log_loss",
        "test_pairwise_gauc",
        "examples_per_second",
        "epochs",
        "world_size",
    }
    assert wanted | {"seconds", "versions", "peak_memory_bytes", "test_floors"} <= summary.keys()
    assert summary["epochs"] == summary["world_size"] == 1
    assert "--global_batch_size=64" in (tmp_path / "run" / "flags.txt").read_text()
    for name in ("popularity", "user_repeat", "category_id_repeat"):
        assert 0 <= summary["test_floors"][name]["gauc"] <= 1
        assert name in done.stderr
    again = run_at_once(commands, "train", tmp_path, "--epochs=1")  # complete: only tested again
    repeated = json.loads(again.stdout)
    assert repeated == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert repeated["test_gauc"] == pytest.approx(summary["test_gauc"], abs=1e-6)
    for name in (
        "examples_per_second",
        "seconds",
        "world_size",
        "peak_memory_bytes",
        "metrics",
    ):  # of the run that trained
        assert repeated[name] == summary[name], name
    assert repeated["seconds"]["training"] > 0
    damaged = {**repeated, "seconds": [1]}  # then nobody knows: not a speed of 0
    (tmp_path / "run" / "summary.json").write_text(json.dumps(damaged))
    assert json.loads(run_at_once(commands, "train", tmp_path, "--epochs=1").stdout)["examples_per_second"] is None
    other = run_at_once(commands, "prepare_data", tmp_path, "--epochs=1", "--learning_rate=0.5")
    assert_one_line(
        other, "a checkpoint is resumed with the settings it was made with. Received: --learning_rate: 0.001"
    )


@pytest.mark.parametrize("refused_for", ["settings", "widths", "data"])
def test_data_that_a_job_was_trained_on_is_not_replaced_by_what_it_cannot_go_on_with(
    commands: Preloaded, tmp_path: Path, refused_for: str
) -> None:
    assert run_at_once(commands, "prepare_data", tmp_path).returncode == 0
    assert run_at_once(commands, "train", tmp_path, "--epochs=1").returncode == 0
    (facts,) = (tmp_path / "prepared").rglob("facts.json")
    before = facts.read_bytes(), facts.stat().st_ino
    flags = {"settings": ["--learning_rate=0.5"], "widths": ["--embedding_dim=8,4,2"], "data": []}[refused_for]
    if refused_for != "settings":
        write_log(tmp_path / "log.parquet", num_users=210)
    done = run_at_once(commands, "prepare_data", tmp_path, "--overwrite_prepared", *flags)
    message = {
        "settings": "a checkpoint is resumed with the settings it was made with. Received: --learning_rate: 0.001",
        "widths": "Received: --embedding_dim: [8], now [8, 4, 2]",
        "data": "a checkpoint is resumed on the data it was made with. Received: data that was prepared anew",
    }[refused_for]
    assert_one_line(done, message)
    assert (facts.read_bytes(), facts.stat().st_ino) == before
    assert not list(facts.parent.parent.glob("*.incomplete"))


STOPPED = ("--epochs=2", "--checkpoint_every_steps=7", "--dropout=0.2", "--resample_negatives", "--activation=dice")
STOPPED += ("--unknown_item=features",)


@pytest.fixture(scope="module")
def straight(prepared: Path, commands: Preloaded) -> Path:
    """The output of a job that nobody stopped."""
    output = prepared / "straight"
    done = run_at_once(commands, "train", prepared, *STOPPED, f"--output_dir={output}")
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.thorough(unless=lambda case: case["number"] != signal.SIGHUP)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_goes_on_and_ends_like_one_that_was_not(
    commands: Preloaded, tmp_path: Path, prepared: Path, straight: Path, number: signal.Signals
) -> None:
    """SIGKILL between two checkpoints; the others after their own checkpoint, with the code for a retry."""
    flags = (*STOPPED, f"--output_dir={tmp_path / 'run'}")
    with subprocess.Popen(command("train", prepared, *flags), cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if line.startswith("step 10 of "):
                while number == signal.SIGKILL and not list(tmp_path.glob("run/checkpoints/step-*")):
                    time.sleep(0.01)  # it is written beside the updates
                process.send_signal(number)
                break
        rest = process.stderr.read()
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 75
        assert "stopped: on request, after the checkpoint of step" in rest
    resumed = run_at_once(commands, "train", prepared, *flags)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at epoch 1" in resumed.stderr
    expected, found = json.loads((straight / "summary.json").read_text()), json.loads(resumed.stdout.splitlines()[-1])
    for before, after in zip(expected["epoch_records"], found["epoch_records"], strict=True):
        assert after["examples"] == before["examples"]
        assert after["example_checksum"] == before["example_checksum"]
    for saved in (straight / "checkpoints").glob("*/*.npy"):
        other = tmp_path / "run" / saved.relative_to(straight)
        np.testing.assert_allclose(np.load(other), np.load(saved), atol=2e-3, err_msg=saved.name)


def test_wrong_flags_are_answered_before_tensorflow_loads(tmp_path: Path) -> None:
    started = time.perf_counter()
    for name in ("train", "prepare_data"):
        assert_one_line(run(name, tmp_path, "--no_such_flag=1"), "Unknown command line flag 'no_such_flag'")
        assert_one_line(run(name, tmp_path, "--dropout=2"), "--dropout: must be below 1. Received: 2.0")
        assert_one_line(run(name, tmp_path, "--optimizer=adam"), "--optimizer: must be one of sgd, adagrad, lazy_adam")
        assert_one_line(run(name, tmp_path, "folder"), "Every setting is a --flag. Received: 'folder'")
    assert time.perf_counter() - started < 60


def test_train_does_not_prepare(tmp_path: Path) -> None:
    assert_one_line(run("train", tmp_path), "Run: python -m din_dist.cli.prepare_data --dataset=event_log")


def test_tables_must_fit_into_memory(tmp_path: Path, commands: Preloaded) -> None:
    message = "--embedding_dim: tables and optimizer must fit into memory: 37 rows take "
    for name in ("prepare_data", "train"):
        done = run_at_once(commands, name, tmp_path, "--embedding_dim=2000000000")
        assert_one_line(done, message)
        assert "Give narrower embeddings, or an optimizer that keeps less (--optimizer=sgd)." in done.stderr
        if name == "prepare_data":
            assert run_at_once(commands, name, tmp_path).returncode == 0


def test_widths_must_fit_the_features(tmp_path: Path, commands: Preloaded) -> None:
    done = run_at_once(commands, "prepare_data", tmp_path, "--embedding_dim=8,4,2")
    assert_one_line(done, "--embedding_dim: must be one width, or one for each of item, category_id. Received: '8,4,2'")


def test_a_source_that_changed_is_noticed_by_both_commands(tmp_path: Path, commands: Preloaded) -> None:
    assert run_at_once(commands, "prepare_data", tmp_path).returncode == 0
    write_log(tmp_path / "log.parquet", num_users=201)
    for name in ("prepare_data", "train"):
        done = run_at_once(commands, name, tmp_path)
        assert_one_line(done, "log.parquet")
        assert "--overwrite_prepared" in done.stderr
    assert run_at_once(commands, "prepare_data", tmp_path, "--overwrite_prepared").returncode == 0


@pytest.mark.parametrize("name", ["train", "prepare_data"])
def test_help_names_every_setting(tmp_path: Path, name: str) -> None:
    done = run(name, tmp_path, "--help")
    assert done.returncode == 0
    for word in ("--dataset", "--negatives_per_positive", "--batch_norm", "--keep_checkpoints", "--metrics_port"):
        assert word in done.stdout.replace("--[no]", "--")


def test_preparing_takes_no_notice_of_the_default_folder(tmp_path: Path) -> None:
    """It may hold an unrelated job; one that is named is checked."""
    assert run("prepare_data", tmp_path).returncode == 0
    checkpoint = tmp_path / "runs" / "latest" / "checkpoints" / "step-000000000001"
    checkpoint.mkdir(parents=True)
    manifest = {"state": {}, "config": {}, "data_fingerprint": "of another", "variables": {}}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    words = [word for word in command("prepare_data", tmp_path) if not word.startswith("--output_dir")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for named, code in (((), 0), (("--output_dir=runs/latest",), 2)):
        done = subprocess.run(
            [*words, *named],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == code, done.stderr


def test_a_second_ctrl_c_ends_at_once() -> None:
    program = (
        "import time; from din_dist.cli import entry; "
        "entry.run(lambda: (entry.Signals(), print('ready', flush=True), time.sleep(60)))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert first.startswith("stopping after this step and a checkpoint")
    assert (process.returncode, rest) == (130, "")


ALL_FORMS = (
    "padded",
    "unfactored",
    "dense_allreduce",
    "without_native",
    "without_xla",
    "without_shared_memory",
    "undoable",
    "without_group_negatives",
)


@pytest.mark.thorough(unless=lambda case: case["forms"] != ALL_FORMS)
@pytest.mark.parametrize("forms", [("padded", "without_native"), ALL_FORMS], ids=["two", "all"])
def test_benchmark_reports_where_the_time_goes(tmp_path: Path, prepared: Path, forms: tuple[str, ...]) -> None:
    short = ("--benchmark_steps=10", "--benchmark_warmup_steps=2")
    output = f"--output_dir={tmp_path / 'run'}"
    done = run("benchmark", prepared, *short, "--xla", f"--compare={','.join(forms)}", output)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["times_the_speed_of"]) == set(forms)
    assert found["bytes_sent_per_step"] == {"dense": 0, "sparse": 0, "statistics": 0}  # nobody to send to
    for name in ("examples_per_second", "forward_backward_seconds", "update_seconds", "share_of_matrix_rate"):
        assert found[name] > 0, name
    assert "examples/s" in done.stderr
    assert not (tmp_path / "run").exists()
    assert_one_line(run("benchmark", prepared, "--compare=torch"), "--compare: must be of padded, unfactored")


@pytest.mark.thorough
def test_benchmark_of_one_worker_and_of_two(tmp_path: Path, prepared: Path) -> None:
    """The series starts horovodrun itself; the batch of a worker stays, and so what it computes."""
    # With our kernels they would speak through shared memory, of which Horovod's timeline knows nothing.
    flags = ("--benchmark_steps=4", "--benchmark_warmup_steps=2", f"--trace_dir={tmp_path / 'trace'}", "--nonative")
    series = ("--sweep=workers", "--sweep_values=2,1", "--sweep_rounds=1", f"--sweep_dir={tmp_path / 'series'}")
    done = run("benchmark", prepared, *flags, *series)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "series" / "workers.csv").open() as file:
        alone, both = csv.DictReader(file)
    assert [(row["world_size"], row["global_batch_size"]) for row in (alone, both)] == [("1", "64"), ("2", "128")]
    assert (alone["dense_bytes_sent"], alone["sparse_bytes_sent"]) == ("0", "0")
    # Two ranks: each sends the whole of what is reduced, and its own rows once.
    assert both["dense_bytes_sent"] == both["dense_gradient_bytes"]
    assert both["sparse_bytes_sent"] == both["row_gradient_bytes"]
    assert (tmp_path / "series" / "workers.svg").read_text().lstrip().startswith("<?xml")
    assert "row_ids" in (tmp_path / "trace" / "horovod_timeline.json").read_text()
    assert list((tmp_path / "trace").glob("rank-1/**/*.xplane.pb"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sweep=users",), "--sweep: must be of workers, batch, rows, history. Received: 'users'"),
        (("--sweep=batch", "--sweep_values=64,many"), "--sweep_values: must be whole numbers from 1. Received: 'many'"),
        (("--sweep=workers", "--sweep_values=9999"), "--sweep_values: needs a core for each worker"),
        (("--sweep=batch", "--sweep_rounds=0"), "--sweep_rounds: must be at least 1"),
        (("--sweep=batch", "--sweep_values=64"), "the data must be prepared before"),
    ],
)
def test_what_a_series_refuses(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    assert_one_line(run("benchmark", tmp_path, *flags, f"--sweep_dir={tmp_path}"), message)


def test_log_collectors_get_an_object_a_line(tmp_path: Path, prepared: Path, commands: Preloaded) -> None:
    """Of a job that trains, of wrong input and of a failure; stdout stays the summary."""
    flags = ("--epochs=1", "--log_format=json", f"--output_dir={tmp_path / 'run'}")
    done = run_at_once(commands, "train", prepared, *flags)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all({"time", "level", "rank", "message"} <= line.keys() for line in lines)
    assert lines[-1]["summary"]["test_gauc"] == json.loads(done.stdout.splitlines()[-1])["test_gauc"]
    refused = run_at_once(commands, "train", prepared, *flags, "--seed=77")
    assert refused.returncode == 2
    (line,) = map(json.loads, refused.stderr.splitlines())
    assert line["level"] == "error"
    assert "a checkpoint is resumed with the settings it was made with" in line["message"]


FAILING_TRAINER = """
import itertools, os, sys
from din_dist.cli import entry, train
from din_dist.training.train_step import TrainStep
calls = itertools.count(1)
step = TrainStep.__call__
def fail_at_third(*arguments):
    if next(calls) == 3:
        raise MemoryError("out of memory")
    return step(*arguments)
TrainStep.__call__ = fail_at_third
entry.run(train.main)
"""


@pytest.mark.thorough(unless=lambda case: case["log_format"] == "text")
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_rank_that_fails_names_itself_and_its_step(tmp_path: Path, prepared: Path, log_format: str) -> None:
    words = command("train", prepared, f"--log_format={log_format}", f"--output_dir={tmp_path / 'run'}")
    done = subprocess.run(
        [words[0], "-c", FAILING_TRAINER, *words[3:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    if log_format == "json":
        line = json.loads(last)
        assert (line["level"], line["rank"]) == ("error", 0)
        assert line["message"] == "rank 0 failed at step 3: out of memory"
        assert "MemoryError" in line["traceback"]
    else:
        assert last == "error: rank 0 failed at step 3: see the lines above"
        assert "MemoryError: out of memory" in done.stderr
