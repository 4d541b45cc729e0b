"""A job whose splits are users, from end to end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from tests.support.commands import command
from tests.support.finished_job import finish, run
from tests.support.patience import PATIENCE
from tests.support.preloaded import Preloaded
from tests.support.repository import ROOT
from tests.support.small_log import write_log

FLAGS = ("--split=users", "--learning_rate=0.02")


@pytest.fixture(scope="module")
def folder(commands: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that trained for an epoch, and was resumed for two more."""
    folder = tmp_path_factory.mktemp("users")
    write_log(folder / "log.parquet", num_users=150)
    finish(commands, folder, *FLAGS, "--epochs=1", export=False)
    run(commands, "train", *command("train", folder, *FLAGS, "--epochs=3")[3:])
    run(commands, "export", f"--output_dir={folder / 'run'}", f"--export_dir={folder / 'export'}")
    return folder


def num_tested(folder: Path) -> int:
    """The last fifth of the events of those users whose hash tells it, but never a user's first event."""
    users, sizes = np.unique(pq.read_table(folder / "log.parquet")["user_id"].to_pylist(), return_counts=True)
    tests = tf.strings.to_hash_bucket_fast(tf.strings.join(["split:", users]), 10).numpy() == 9
    return sum(size - max(1, int(0.8 * size)) for size in sizes[tests])


def test_it_is_resumed_tested_and_evaluated(folder: Path, commands: Preloaded) -> None:
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["test_gauc"] > 0.55
    done = commands.run("evaluate", f"--output_dir={folder / 'run'}", "--bootstrap_samples=0")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["gauc"] == pytest.approx(summary["test_gauc"], abs=1e-6)
    assert found["retrieval"]["num_events"] == num_tested(folder) == found["num_examples"] // 2


def test_each_user_is_asked_once(folder: Path, commands: Preloaded) -> None:
    """Alone and on two workers; a list of all 30 items holds every target."""
    words = [f"--output_dir={folder / 'run'}", "--queries=users", "--ks=5,30", "--noexclude_history"]
    done = commands.run("evaluate", *words, "--ndcg_ideal=hits")
    assert done.returncode == 0, done.stderr
    alone = json.loads(done.stdout.splitlines()[-1])["retrieval"]
    rows = pq.read_table(folder / "log.parquet").sort_by("timestamp").to_pylist()
    targets = {}
    for user in sorted({row["user_id"] for row in rows}):
        own = [row["item_id"] for row in rows if row["user_id"] == user]
        if int(tf.strings.to_hash_bucket_fast(f"split:{user}", 10)) == 9 and len(own) > 1:
            targets[user] = own[max(1, int(0.8 * len(own))) :]
    assert alone["num_users"] == alone["num_users_in_split"] == len(targets)
    assert alone["num_targets"] == sum(len(set(items)) for items in targets.values())
    metrics = alone["metrics"]
    assert (metrics["recall@30"], metrics["hit_rate@30"]) == (1, 1)
    assert alone["floors"]["popularity"]["recall@5"] < metrics["recall@5"] < 1
    low, high = alone["intervals"]["recall@5"]
    assert low < metrics["recall@5"] < high
    assert (
        f"{len(targets)} of {len(targets)} users, each asked once, {alone['num_targets']} items chosen" in done.stderr
    )
    launcher = Path(sys.executable).with_name("horovodrun")
    program = [str(launcher), "--gloo", "-np", "2", sys.executable, "-m", "din_dist.cli.evaluate", *words]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (text,) = re.findall(r'{"output_dir".*}', done.stdout)
    two = json.loads(text)["retrieval"]
    for name, value in metrics.items():
        if "ndcg" not in name:
            assert two["metrics"][name] == pytest.approx(value, rel=1e-6), name
    assert two["metrics"]["ndcg@5"] < metrics["ndcg@5"]  # over all targets, and not only those that were found


def test_prepare_data_tells_what_is_only_history(folder: Path, commands: Preloaded) -> None:
    done = commands.run("prepare_data", *command("train", folder, *FLAGS)[3:])
    assert done.returncode == 0, done.stderr
    users, sizes = np.unique(pq.read_table(folder / "log.parquet")["user_id"].to_pylist(), return_counts=True)
    stays_out = tf.strings.to_hash_bucket_fast(tf.strings.join(["split:", users]), 10).numpy() >= 8
    history = sum(max(1, int(0.8 * size)) for size in sizes[stays_out])
    assert f"events that are held out, but only make histories: {history:,}" in done.stdout
    assert f"examples (users): train {2 * (sizes[~stays_out] - 1).sum():,}, validation" in done.stdout


def test_the_report_names_the_split(folder: Path, commands: Preloaded) -> None:
    run(commands, "report", f"--output_dir={folder / 'run'}")
    page = (folder / "run" / "report.html").read_text()
    assert "users: 8 of 10 users train, one validates, one tests by the last fifth of the events" in page


def test_predictions_are_for_all_users(folder: Path, commands: Preloaded, tmp_path: Path) -> None:
    """Who does not train has a history all the same."""
    users = sorted(set(pq.read_table(folder / "log.parquet")["user_id"].to_pylist()))
    pq.write_table(pa.table({"user_id": users, "item_id": ["i3"] * len(users)}), tmp_path / "rows.parquet")
    words = [f"--input={tmp_path / 'rows.parquet'}", f"--predictions_dir={tmp_path / 'out'}"]
    run(commands, "predict", f"--export_dir={folder / 'export'}", f"--user_histories={folder / 'run'}", *words)
    found = pa.concat_tables(map(pq.read_table, sorted((tmp_path / "out").glob("*.parquet")))).to_pydict()
    assert sorted(found["user_id"]) == users
    assert len(set(found["click_probability"])) > 0.8 * len(users)


def test_an_empty_split_is_one_clear_line(commands: Preloaded, tmp_path: Path) -> None:
    """u0, u1 and u2 all train."""
    write_log(tmp_path / "log.parquet", num_users=3)
    finish(commands, tmp_path, *FLAGS, "--epochs=1", export=False)
    done = commands.run("evaluate", f"--output_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    message = "--evaluation_split: must have examples. Received: test, which has none with --split=users."
    assert message in done.stderr
    assert "Choose among train." in done.stderr
