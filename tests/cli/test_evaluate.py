"""`cli.evaluate` on a finished job: the trainer's own numbers, alone, on two workers and from an export."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import assert_one_line, command
from tests.support.patience import PATIENCE
from tests.support.preloaded import Preloaded
from tests.support.repository import ROOT
from tests.support.small_log import write_log

METRICS = ("gauc", "auc", "log_loss", "pairwise_gauc", "num_examples", "num_users", "num_users_skipped")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, commands: Preloaded) -> Path:
    """The folder of a job whose best update is not its last, and of its export."""
    folder = tmp_path_factory.mktemp("job")
    flags = ("--split=leave_two_out", "--epochs=3", "--learning_rate=0.02", "--keep_checkpoints=5")
    for name in ("prepare_data", "train"):
        done = commands.run(name, *command(name, folder, *flags)[3:])
        assert done.returncode == 0, done.stderr
    done = commands.run("export", f"--output_dir={folder / 'run'}", f"--export_dir={folder / 'export'}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def summary(job: Path) -> dict[str, Any]:
    return json.loads((job / "run" / "summary.json").read_text())


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def alone(job: Path, commands: Preloaded) -> subprocess.CompletedProcess[str]:
    return commands.run("evaluate", f"--output_dir={job / 'run'}", f"--evaluation_path={job / 'found.json'}")


def test_it_is_what_the_trainer_found(
    job: Path, alone: subprocess.CompletedProcess[str], summary: dict[str, Any]
) -> None:
    found = result(alone)
    assert found["step"] == summary["best_step"]
    assert {name: found[name] for name in METRICS} == {name: summary[f"test_{name}"] for name in METRICS}
    assert found["floors"] == summary["test_floors"]
    assert json.loads((job / "found.json").read_text()) == found
    for name in ("gauc", "auc", "log_loss", "pairwise_gauc"):
        low, high = found["intervals"][name]
        assert low < found[name] < high
        assert f"{low:.4f} – {high:.4f}" in alone.stderr
    retrieval = found["retrieval"]
    assert retrieval["rank_against"] == "all"
    assert retrieval["num_events"] == retrieval["num_events_in_split"] == found["num_examples"] / 2
    for name, (low, high) in retrieval["intervals"].items():
        assert low <= retrieval["metrics"][name] <= high, name
    assert retrieval["metrics"]["recall@20"] > retrieval["metrics"]["recall@1"]
    assert 0 < retrieval["metrics"]["coverage@1"] <= retrieval["metrics"]["coverage@20"] <= 1
    assert retrieval["metrics"]["ndcg@10"] > retrieval["floors"]["popularity"]["ndcg@10"]
    for words in ("ranked against all items but those of the user's history", "comparable only", "noexclude_history"):
        assert words in alone.stderr, words


def test_two_workers_find_the_same(job: Path, alone: subprocess.CompletedProcess[str]) -> None:
    words = [sys.executable, "-m", "din_dist.cli.evaluate", f"--output_dir={job / 'run'}"]
    launcher = Path(sys.executable).with_name("horovodrun")
    done = subprocess.run(
        [str(launcher), "--gloo", "--gloo-timeout-seconds", "280", "-np", "2", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (text,) = re.findall(r'{"output_dir".*}', done.stdout)  # of the chief alone
    assert done.stderr.count("examples, ") == 1
    one, two = result(alone), json.loads(text)
    assert two["world_size"] == 2
    for name in METRICS:
        assert two[name] == pytest.approx(one[name], rel=1e-6), name
    assert two["floors"] == one["floors"]
    for name in ("metrics", "intervals", "floors"):
        assert_alike(two["retrieval"][name], one["retrieval"][name])


def test_an_export_has_the_numbers_of_its_job(
    job: Path, commands: Preloaded, alone: subprocess.CompletedProcess[str]
) -> None:
    """By the log's own ids; with and without --output_dir."""
    one = result(alone)
    quick = ("--bootstrap_samples=0", "--rank_against=none")
    for flags in ((f"--output_dir={job / 'run'}", *quick), ("--bootstrap_samples=10",)):
        found = result(commands.run("evaluate", f"--export_dir={job / 'export'}", *flags))
        for name in METRICS:
            assert found[name] == pytest.approx(one[name], rel=1e-5), name
        assert ("intervals" in found) == ("retrieval" in found) == (len(flags) == 1)
    assert_alike(found["retrieval"]["metrics"], one["retrieval"]["metrics"])
    assert "intervals" in found["retrieval"]


def assert_alike(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_alike(found[name], value)
    else:
        assert found == pytest.approx(expected, rel=1e-5)


def test_other_splits_updates_and_candidates(job: Path, commands: Preloaded, summary: dict[str, Any]) -> None:
    validation = "--evaluation_split=validation"
    found = result(commands.run("evaluate", f"--output_dir={job / 'run'}", validation, "--rank_against=none"))
    assert found["gauc"] == summary["best_validation_gauc"]
    assert "retrieval" not in found
    first = min(int(path.name.removeprefix("step-")) for path in (job / "run" / "checkpoints").iterdir())
    assert first != summary["best_step"]
    flags = (
        f"--checkpoint_step={first}",
        "--rank_against=7",
        "--ks=8,2",
        "--max_events=50",
        "--evaluation_split=train",
    )
    done = commands.run("evaluate", f"--output_dir={job / 'run'}", *flags)
    found = result(done)
    assert (found["step"], found["split"]) == (first, "train")
    retrieval = found["retrieval"]
    assert retrieval["num_events"] <= 50 < retrieval["num_events_in_split"]
    assert retrieval["mean_num_candidates"] == 8
    assert retrieval["metrics"]["recall@8"] == 1
    assert "50" in done.stderr
    assert "--max_events=all ranks all" in done.stderr
    assert "each ranked against 7 items that the user never touched" in done.stderr
    assert retrieval["exclude_history"] is False


def test_a_log_with_labels(tmp_path: Path, commands: Preloaded) -> None:
    """Clicks are ranked, other rows are not; an event may have no history."""
    write_log(tmp_path / "log.parquet", num_users=60, labels=True)
    flags = ("--split=temporal", "--epochs=1")
    for name in ("prepare_data", "train"):
        done = commands.run(name, *command(name, tmp_path, *flags)[3:])
        assert done.returncode == 0, done.stderr
    found = result(commands.run("evaluate", f"--output_dir={tmp_path / 'run'}", "--ks=1,30", "--noexclude_history"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    names = [name for name in METRICS if name != "pairwise_gauc"]
    assert {name: found[name] for name in names} == {name: summary[f"test_{name}"] for name in names}
    assert "pairwise_gauc" not in found
    retrieval = found["retrieval"]
    assert 0 < retrieval["num_events"] < found["num_examples"]
    assert retrieval["num_users"] < retrieval["num_events"]
    assert retrieval["metrics"]["recall@30"] == 1
    assert retrieval["mean_num_candidates"] == 30


def test_lists_of_the_default_are_no_longer_than_there_are_candidates(job: Path, commands: Preloaded) -> None:
    found = result(commands.run("evaluate", f"--output_dir={job / 'run'}", "--rank_against=7"))
    assert found["retrieval"]["ks"] == [1, 5]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ks=5,0",), "--ks: must be at least 1. Received: '0'"),
        (("--ks=",), "--ks: must name a length"),
        (("--rank_against=0",), "--rank_against: must be at least 1. Received: '0'. Give all, none or a number"),
        (("--rank_against=some",), "--rank_against: must be all, none or a whole number. Received: 'some'"),
        (("--ks=ten",), "--ks: must be whole numbers, comma-separated. Received: 'ten'. For example 1,5,10,20."),
        (("--max_events=1.5",), "--max_events: must be all, auto or a whole number. Received: '1.5'. Give all, auto"),
        (("--rank_against=30",), "--rank_against: must be fewer than the 30 items. Received: 30"),
        (("--ks=31",), "--ks: must be at most the number of candidates, 30. Received: 31"),
        (("--rank_against=3", "--ks=5"), "--ks: must be at most the number of candidates, 4. Received: 5"),
        (("--max_events=-1",), "--max_events: must be at least 1. Received: '-1'"),
        (("--bootstrap_samples=-1",), "--bootstrap_samples: must be at least 0. Received: -1"),
        (("--checkpoint_step=7",), "--checkpoint_step: must be one whose checkpoint was kept. Received: 7"),
        (("--checkpoint_step=7", "--export_dir=x"), "--checkpoint_step: an export has the weights of one update"),
        (
            ("--evaluation_split=tests",),
            "--evaluation_split: must be one of test, validation, train. Received: 'tests'",
        ),
        (("--split=temporal",), "Unknown command line flag 'split'"),
        (("--data_path=/nowhere.parquet",), "/nowhere.parquet"),
        (("--export_dir=/nowhere",), "/nowhere: must be an export. Received: no such folder"),
        (("--export_dir=x", "--expect_digest=abc"), "--expect_digest: must be the SHA-256 of a manifest, 64 hex"),
        (("--ndcg_ideal=hits",), "--ndcg_ideal: is for --queries=users, in which there are several. Received: 'hits'"),
        (
            ("--queries=users", "--rank_against=none"),
            "--queries: are those of retrieval metrics. Received: 'users'. Drop it, or give --rank_against=all.",
        ),
        (
            ("--diversity_weight=-0.5",),
            "--diversity_weight: must be finite and at least 0. Received: -0.5. For example 0.1.",
        ),
        (("--diversity_weight=nan",), "--diversity_weight: must be finite and at least 0. Received: nan."),
        (("--diversity_weight=inf",), "--diversity_weight: must be finite and at least 0. Received: inf."),
        (
            ("--diversity_weight=0.5", "--rank_against=3"),
            "--diversity_weight: is for --rank_against=all. Received: 0.5. Drop one of them.",
        ),
        (("--diversity_weight=0.5", "--rank_against=none"), "--diversity_weight: is for --rank_against=all."),
        (("--diversity_weight=0.5",), "--diversity_weight: is for models that find items, and din ranks."),
        ((f"--expect_digest={'0' * 64}",), "--expect_digest: is for an export. Received: '000"),
    ],
)
def test_what_it_refuses(job: Path, commands: Preloaded, flags: tuple[str, ...], message: str) -> None:
    assert_one_line(commands.run("evaluate", f"--output_dir={job / 'run'}", *flags), message)


def test_folders_that_it_refuses(tmp_path: Path, job: Path, commands: Preloaded) -> None:
    def refused(message: str, *flags: str) -> None:
        done = commands.run("evaluate", "--rank_against=none", "--bootstrap_samples=0", *flags)
        done.stderr = done.stderr.splitlines()[-1]
        assert_one_line(done, message)

    refused("flags.txt: holds the settings of a training job. Received: no such file", f"--output_dir={tmp_path}")
    copy = tmp_path / "run"
    shutil.copytree(job / "run", copy)
    blocked = tmp_path / "missing" / "found.json"
    refused(
        "--evaluation_path: must be a file that can be written", f"--output_dir={copy}", f"--evaluation_path={blocked}"
    )
    settings = (copy / "flags.txt").read_text()
    (copy / "flags.txt").write_text(settings.replace("--embedding_dim=8", "--embedding_dim=9"))
    refused("--export_dir: an export is evaluated as its own job was", *with_export(job, copy))
    refused("a checkpoint is resumed with the settings it was made with", f"--output_dir={copy}")
    (copy / "flags.txt").write_text(settings)
    shutil.rmtree(copy / "checkpoints")
    refused("what the model has learned is read from a checkpoint. Received: none yet", f"--output_dir={copy}")
    other = tmp_path / "other.parquet"
    write_log(other, num_users=50, seed=9)
    elsewhere = (f"--data_path={other}", f"--data_dir={tmp_path / 'prepared'}")
    prepared = commands.run("prepare_data", "--dataset=event_log", *elsewhere)
    assert prepared.returncode == 0, prepared.stderr
    refused("--export_dir: an export is evaluated on the data of its job", *with_export(job, copy), *elsewhere)
    (copy / "flags.txt").write_text(settings.replace("leave_two_out", "leave_one_out"))
    refused(
        "--evaluation_split: must have examples. Received: validation",
        "--evaluation_split=validation",
        f"--output_dir={copy}",
    )


def with_export(job: Path, folder: Path) -> tuple[str, str]:
    return f"--export_dir={job / 'export'}", f"--output_dir={folder}"
