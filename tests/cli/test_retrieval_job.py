"""A job of a model that finds items, from end to end, and what such models refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.commands import assert_one_line
from tests.support.commands import run as run_command
from tests.support.finished_job import finish, run
from tests.support.preloaded import Preloaded
from tests.support.small_log import write_log


@pytest.fixture(scope="module")
def folder(commands: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished job of two interests."""
    folder = tmp_path_factory.mktemp("retrieval")
    write_log(folder / "log.parquet", num_users=150)
    words = ["--model=comirec_sa", "--num_interests=2", "--num_sampled=20", "--split=leave_two_out"]
    finish(commands, folder, *words, "--epochs=6", "--learning_rate=0.02", export=False)
    return folder


def test_it_learns_and_evaluate_ranks_all_items(folder: Path, commands: Preloaded) -> None:
    """A third of the log is random, and each category has six items, so no model finds more than one in five or so."""
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["test_gauc"] > 0.7
    done = commands.run("evaluate", f"--output_dir={folder / 'run'}", "--bootstrap_samples=200", "--noexclude_history")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["gauc"] == pytest.approx(summary["test_gauc"], abs=1e-6)
    retrieval = found["retrieval"]
    assert (retrieval["num_events"], retrieval["rank_against"]) == (found["num_examples"] // 2, "all")
    assert retrieval["metrics"]["recall@10"] > 1.3 * retrieval["floors"]["popularity"]["recall@10"]
    low, high = retrieval["intervals"]["recall@10"]
    assert low < retrieval["metrics"]["recall@10"] < high


def test_the_report_tells_what_it_is(folder: Path, commands: Preloaded) -> None:
    run(commands, "report", f"--output_dir={folder / 'run'}")
    page = (folder / "run" / "report.html").read_text()
    for words in ("ComiRec with self-attention, which finds items", "over 20 items, drawn log_uniform", "2 of a user"):
        assert words in page


def test_it_is_not_exported_yet(folder: Path, commands: Preloaded) -> None:
    done = commands.run("export", f"--output_dir={folder / 'run'}", f"--export_dir={folder / 'export'}")
    assert done.returncode == 2
    message = "--output_dir: exports have models that rank given candidates, and this job's model finds items."
    assert_one_line(done, message)
    assert not (folder / "export").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--negatives=batch"], "--negatives: is for models that rank, and comirec_sa finds. Received: 'batch'."),
        (["--histories=all:5"], "--histories: is for models that rank, and comirec_sa finds. Received: 'all:5'."),
        (["--max_history_length=200"], "--num_positions: must be at least --max_history_length=200. Received: 100."),
        (["--num_interests=65"], "--num_interests: must be at least 1 and at most 64. Received: 65."),
        (["--num_sampled=0"], "--num_sampled: must be at least 1. Received: 0."),
        (["--temperature=0"], "--temperature: must be above 0. Received: 0.0."),
        (
            ["--model=din", "--negatives_per_positive=0"],
            "--negatives_per_positive: a model that ranks needs",
        ),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, flags: list[str], message: str) -> None:
    assert_one_line(run_command("train", tmp_path, "--model=comirec_sa", *flags), message)


@pytest.mark.parametrize(("model", "owner"), [("comirec_sa", "user"), ("youtube_dnn", "candidate")])
def test_features_that_are_not_read_are_refused(tmp_path: Path, commands: Preloaded, model: str, owner: str) -> None:
    declared = tmp_path / "features.toml"
    declared.write_text(f'[spent]\nof = "{owner}"\nkind = "number"\n')
    write_log(tmp_path / "log.parquet", labels=True)
    _with_column(tmp_path / "log.parquet", "spent")
    flags = [f"--model={model}", f"--features={declared}", "--split=temporal"]
    run(
        commands,
        "prepare_data",
        "--dataset=event_log",
        f"--data_path={tmp_path / 'log.parquet'}",
        f"--data_dir={tmp_path / 'prepared'}",
        f"--features={declared}",
    )
    done = run_command("train", tmp_path, *flags)
    assert_one_line(done, f"--features: {model} reads features of item")
    assert f"'spent, of {owner}'" in done.stderr


def _with_column(path: Path, name: str) -> None:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    users = pc.dictionary_encode(table["user_id"]).combine_chunks()
    pq.write_table(table.append_column(name, users.indices.cast("int64")), path)
