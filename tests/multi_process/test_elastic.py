"""Elastic jobs of two workers, each on a "host" of its own (two names of this machine), that lose one for real.

All other faults, on hosts that are real: tests/cluster/.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from din_dist.distributed.placement import FEWEST_TO_SUM_AT_OWNERS
from tests.support.commands import prepare_log, run
from tests.support.launcher_jobs import environment, launcher, start_elastic, wait_for, worker_of
from tests.support.patience import PATIENCE
from tests.support.repository import ROOT
from tests.support.task_log import write_task_log

FLAGS = (
    *("--epochs=12", "--optimizer=adagrad", "--learning_rate=0.02"),
    *("--histories=all:10", "--long_history=category_id:5", f"--features={ROOT / 'tests' / 'support' / 'age.toml'}"),
)
# What is learned, and from what: each form of it by itself, or with others that do not hide it.
FORMS = {
    "weighted labels after other behaviours": (
        *("--label_columns=click,buy", "--task_head=mmoe:2", "--task_weights=1,2", "--weight_column=weight"),
        *("--split=temporal", "--validation_from=12", "--test_from=16"),
        *("--behaviours_path={folder}/behaviours.parquet", "--behaviour_user_column=who"),
    ),
    "popular negatives": ("--negatives=popularity:0.75",),
    "negatives of the batch": ("--negatives=batch",),
    "several interests": ("--model=comirec_sa", "--num_interests=2", "--num_sampled=20"),
    "graphs of sessions": ("--model=sr_gnn", "--num_sampled=20"),
    "what an older job has learned": ("--optimizer=lazy_adam", "--warm_start_from={folder}/older"),
}


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A prepared log, and how one worker trains on it."""
    folder = tmp_path_factory.mktemp("elastic")
    prepare_log(folder)
    done = run("train", folder, *FLAGS, f"--output_dir={folder / 'alone'}")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def write_labels_and_behaviours(folder: Path) -> None:
    """Writes a log of two labels and a weight an example, and one of what its users did elsewhere."""
    log = folder / "log.parquet"
    write_task_log(log, num_users=250)
    table = pq.read_table(log)
    weights = [0.25 * (row % 9) for row in range(table.num_rows)]  # some of them 0
    pq.write_table(table.append_column("weight", pa.array(weights)), log)
    done = table.select(["user_id", "item_id", "category_id", "timestamp"]).take(list(range(0, table.num_rows, 3)))
    pq.write_table(done.rename_columns(["who", "item_id", "category_id", "timestamp"]), folder / "behaviours.parquet")


def share_log(undisturbed: tuple[Path, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Gives a job in `folder` the log of the undisturbed one, and returns how that one ended."""
    source, expected = undisturbed
    (folder / "log.parquet").symlink_to(source / "log.parquet")
    return expected


def assert_as_if_nothing_happened(summary: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    """Every example once in each epoch, in the same updates: the same losses, and the same test."""
    for record, expected in zip(summary["epoch_records"], undisturbed["epoch_records"], strict=True):
        assert record["examples"] == expected["examples"]
        assert record["example_checksum"] == expected["example_checksum"]
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert summary["steps"] == undisturbed["steps"]
    assert summary["test_gauc"] == pytest.approx(undisturbed["test_gauc"], abs=0.003)


@pytest.mark.thorough  # as test_faults.py does
def test_a_killed_chief_costs_no_example(undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    expected = share_log(undisturbed, tmp_path)
    with start_elastic(tmp_path, *FLAGS) as job:
        wait_for(job, "step 200 of ")
        os.kill(worker_of(0, tmp_path), signal.SIGKILL)
        out, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert_as_if_nothing_happened(summary, expected)
    told = events(tmp_path)
    resets = [line for line in told if line["kind"] == "elastic"]
    assert resets[0]["world_size"] == 1
    assert 199 <= resets[0]["step"] < expected["steps"]
    assert summary["metrics"]["din_dist_elastic_resets_total"] >= 1
    # Nothing was read from the disk: training went on with the very next update.
    after = next(line for line in told[told.index(resets[0]) :] if line["kind"] == "train")
    assert after["step"] == resets[0]["step"] + 1


def test_two_workers_become_four_and_three(undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Of four each sums a part of the rows, while fewer gather all of them."""
    expected = share_log(undisturbed, tmp_path)
    with start_elastic(tmp_path, *FLAGS) as job:
        wait_for(job, "step 200 of ")
        (tmp_path / "hosts").write_text("localhost:2\n127.0.0.1:2\n")
        wait_for(job, f"{FEWEST_TO_SUM_AT_OWNERS} worker(s) from step ")
        wait_for(job, "00 of ")  # they have trained together
        os.kill(worker_of(3, tmp_path), signal.SIGKILL)
        out, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, err
    assert_as_if_nothing_happened(json.loads(out.splitlines()[-1]), expected)
    world_sizes = [line["world_size"] for line in events(tmp_path) if line["kind"] in ("start", "elastic")]
    assert world_sizes[:2] == [2, FEWEST_TO_SUM_AT_OWNERS]
    assert world_sizes[2] < FEWEST_TO_SUM_AT_OWNERS


@pytest.mark.thorough(unless=lambda case: "labels" in case["form"])
@pytest.mark.parametrize("form", FORMS)
def test_whatever_is_learned_is_learned_once(form: str, tmp_path: Path) -> None:
    """A worker is lost for good: losses and metrics are those of one worker from the start."""
    flags = ["--epochs=12", "--optimizer=adagrad", "--learning_rate=0.02"]
    flags += [flag.format(folder=tmp_path) for flag in FORMS[form]]
    if "labels" in form:
        write_labels_and_behaviours(tmp_path)
    assert run("prepare_data", tmp_path, *flags).returncode == 0
    if "older" in form:
        older = run("train", tmp_path, "--epochs=2", "--optimizer=lazy_adam", f"--output_dir={tmp_path / 'older'}")
        assert older.returncode == 0, older.stderr
    alone = run("train", tmp_path, *flags, f"--output_dir={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    expected = json.loads(alone.stdout.splitlines()[-1])
    with start_elastic(tmp_path, *flags) as job:
        wait_for(job, "step 150 of ")
        os.kill(worker_of(0, tmp_path), signal.SIGKILL)
        out, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert_as_if_nothing_happened(summary, expected)
    for name, value in expected.items():
        if name.startswith("test_") and isinstance(value, float):
            tolerance = {"rel": 1e-3} if "log_loss" in name else {"abs": 0.003}
            assert summary[name] == pytest.approx(value, **tolerance), name
    world_sizes = [line["world_size"] for line in events(tmp_path) if line["kind"] in ("start", "elastic")]
    assert world_sizes[:2] == [2, 1]


def test_with_too_few_workers_a_job_saves_and_can_be_run_again(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    expected = share_log(undisturbed, tmp_path)
    with start_elastic(tmp_path, *FLAGS, "--min_workers=2", "--rejoin_timeout_seconds=3") as job:
        wait_for(job, "step 200 of ")
        os.kill(worker_of(0, tmp_path), signal.SIGKILL)
        err = job.communicate(timeout=PATIENCE)[1]
    assert job.returncode == 75, err
    *_, saved = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    step = int(saved.name.removeprefix("step-"))
    assert step >= 199
    assert (
        f"stopped: fewer than --min_workers for 3 s; step {step} is saved. The same command goes on from there" in err
    )
    done = run("train", tmp_path, *FLAGS)
    assert done.returncode == 0, done.stderr
    assert_as_if_nothing_happened(json.loads(done.stdout.splitlines()[-1]), expected)


@pytest.mark.thorough
def test_a_stop_while_a_lost_worker_is_waited_for(undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    share_log(undisturbed, tmp_path)
    with start_elastic(tmp_path, *FLAGS, "--min_workers=2") as job:
        wait_for(job, "step 200 of ")
        os.kill(worker_of(1, tmp_path), signal.SIGKILL)
        wait_for(job, "a worker was lost")
        job.send_signal(signal.SIGTERM)
        err = job.communicate(timeout=PATIENCE)[1]
    assert job.returncode == 75, err
    *_, saved = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    step = int(saved.name.removeprefix("step-"))
    assert step >= 199
    assert f"stopped: on request; step {step} is saved. The same command goes on from there" in err


def test_wrong_settings_are_one_line(tmp_path: Path) -> None:
    def refusal(*flags: str) -> str:
        words = [launcher(tmp_path)[0], *flags]
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        return line

    hosts = tmp_path / "hosts"
    hosts.write_text("localhost:1\nwhat is this\n")
    assert "hosts, line 2: what is this. Correct it." in refusal("--elastic", f"--hosts_file={hosts}")
    hosts.write_text("# none yet\n\n")
    assert "hosts, which names none. Add one." in refusal("--elastic", f"--hosts_file={hosts}")
    hosts.write_text("localhost:2  # this machine\n")
    assert "--elastic: needs --hosts_file outside Kubernetes. Received: 'none'." in refusal("--elastic")
    assert "--hosts_file: must be a file with a line HOST:SLOTS" in refusal("--elastic", "--hosts_file=nowhere")
    assert "--min_workers: belongs to --elastic. Received: '2'. Add --elastic, or drop it." in refusal(
        "--min_workers=2"
    )
    assert "--max_workers: must be a whole number from 1. Received: 'few'" in refusal(
        "--elastic", f"--hosts_file={hosts}", "--max_workers=few"
    )
    assert "must be from --min_workers to --max_workers. Received: '2, with 3 and no limit'" in refusal(
        "--elastic", f"--hosts_file={hosts}", "--min_workers=3"
    )
