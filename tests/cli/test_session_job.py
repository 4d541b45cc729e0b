"""Jobs whose histories are sessions, from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.commands import assert_one_line, command
from tests.support.commands import run as run_command
from tests.support.finished_job import finish, run
from tests.support.preloaded import Preloaded
from tests.support.visit_log import write_visits

GRAPHS = ("--model=sr_gnn", "--split=temporal", "--session_gap=5", "--num_sampled=20", "--learning_rate=0.02")


@pytest.fixture(scope="module")
def ranking(commands: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that ranks, with the ids of its sessions, and of its export."""
    folder = tmp_path_factory.mktemp("visits")
    write_visits(folder / "log.parquet", labels=False, num_users=80)
    return finish(commands, folder, "--split=leave_two_out", "--session_column=visit", "--epochs=2")


@pytest.fixture(scope="module")
def graphs(commands: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that finds items by the graphs of sessions, which was resumed."""
    folder = tmp_path_factory.mktemp("graphs")
    write_visits(folder / "log.parquet", labels=False, num_users=150)
    finish(commands, folder, *GRAPHS, "--epochs=2", export=False)
    run(commands, "train", *command("train", folder, *GRAPHS, "--epochs=6")[3:])
    return folder


def test_items_are_found_by_the_session(graphs: Path, commands: Preloaded) -> None:
    done = commands.run("evaluate", f"--output_dir={graphs / 'run'}", "--bootstrap_samples=0", "--noexclude_history")
    assert done.returncode == 0, done.stderr
    retrieval = json.loads(done.stdout.splitlines()[-1])["retrieval"]
    assert retrieval["num_events_without_history"] == 0
    assert retrieval["metrics"]["recall@10"] > 1.2 * retrieval["floors"]["popularity"]["recall@10"]
    done = commands.run("evaluate", f"--output_dir={graphs / 'run'}", "--bootstrap_samples=0", "--queries=users")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["retrieval"]["num_users_without_history"] == 0


def test_the_report_says_where_histories_begin(graphs: Path, commands: Preloaded) -> None:
    run(commands, "report", f"--output_dir={graphs / 'run'}")
    assert "and begin with its session" in (graphs / "run" / "report.html").read_text()


def test_prepare_data_tells_of_sessions(graphs: Path, commands: Preloaded) -> None:
    done = commands.run("prepare_data", *command("train", graphs, *GRAPHS)[3:])
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(graphs / "log.parquet")
    num_sessions = 0
    for user in set(rows["user_id"].to_pylist()):
        times = np.sort(rows["timestamp"].to_numpy()[np.array(rows["user_id"].to_pylist()) == user])
        num_sessions += 1 + int((np.diff(times) > 5).sum())
    assert f"sessions: {num_sessions:,} with gaps of at most 5, in the unit of the timestamps;" in done.stdout
    assert "events that are held out, but only make histories: " in done.stdout


def test_another_gap_does_not_resume_a_job(graphs: Path) -> None:
    words = [word for word in GRAPHS if "gap" not in word]
    assert_one_line(run_command("train", graphs, *words, "--session_gap=6", "--epochs=7"), "--session_gap: 5, now 6")


def test_an_export_has_the_numbers_of_its_job(ranking: Path, commands: Preloaded) -> None:
    found = []
    for name, folder in (("output_dir", "run"), ("export_dir", "export")):
        done = commands.run("evaluate", f"--{name}={ranking / folder}", "--bootstrap_samples=0")
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[1]["gauc"] == pytest.approx(found[0]["gauc"], abs=1e-6)
    assert found[1]["retrieval"]["metrics"] == pytest.approx(found[0]["retrieval"]["metrics"], abs=1e-6)


def test_predictions_know_the_session(ranking: Path, commands: Preloaded, tmp_path: Path) -> None:
    """A user of the data gets what a row with the items of the current visit gets."""
    log = pq.read_table(ranking / "log.parquet").to_pylist()
    users, visits = sorted({row["user_id"] for row in log}), []
    for user in users:
        own = sorted((row for row in log if row["user_id"] == user), key=lambda row: row["timestamp"])
        visits.append([row["item_id"] for row in own if row["visit"] == own[-1]["visit"]])
    assert len({len(visit) for visit in visits}) > 2
    rows = {"user_id": users, "history": visits, "item_id": ["i3"] * len(users)}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    found = []
    for name, words in (("own", ["--history_column=history"]), ("of_users", [f"--user_histories={ranking / 'run'}"])):
        given = [f"--input={tmp_path / 'rows.parquet'}", f"--predictions_dir={tmp_path / name}", *words]
        run(commands, "predict", f"--export_dir={ranking / 'export'}", *given)
        tables = [pq.read_table(path) for path in sorted((tmp_path / name).glob("*.parquet"))]
        found.append(pa.concat_tables(tables)["logit"].to_numpy())
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    assert len(set(found[0].tolist())) > len(users) / 4
