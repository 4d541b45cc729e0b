"""A job of a model that finds items, from end to end, and what such models refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from tests.support.commands import assert_one_line, command
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


@pytest.fixture(scope="module")
def unseen(commands: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that trains as ComiRec does, on users other than those of its tests."""
    folder = tmp_path_factory.mktemp("unseen")
    write_log(folder / "log.parquet", num_users=300)
    words = ["--model=youtube_dnn", "--split=users", "--history_cut=random", "--num_sampled=20", "--learning_rate=0.02"]
    words.append("--example_age")
    finish(commands, folder, *words, "--epochs=2", export=False)
    run(commands, "train", *command("train", folder, *words, "--epochs=4")[3:])
    return folder


def test_users_who_did_not_train_are_asked_once(unseen: Path, commands: Preloaded) -> None:
    words = [
        f"--output_dir={unseen / 'run'}",
        "--queries=users",
        "--ndcg_ideal=hits",
        "--ks=5,10",
        "--noexclude_history",
    ]
    done = commands.run("evaluate", *words)
    assert done.returncode == 0, done.stderr
    retrieval = json.loads(done.stdout.splitlines()[-1])["retrieval"]
    assert retrieval["queries"] == "users"
    for name in ("recall@5", "ndcg@5", "hit_rate@5"):
        assert retrieval["metrics"][name] > 1.2 * retrieval["floors"]["popularity"][name]


def test_its_export_asks_for_no_age(unseen: Path, commands: Preloaded) -> None:
    """Its signatures have no such input, and users are asked now, as the job itself asks them."""
    run(commands, "export", f"--output_dir={unseen / 'run'}", f"--export_dir={unseen / 'export'}")
    signatures = tf.saved_model.load(unseen / "export").signatures
    inputs = {name for signature in signatures.values() for name in signature.structured_input_signature[1]}
    assert "history_item_ids" in inputs
    assert not [name for name in inputs if "age" in name]
    found = []
    for name, folder in (("output_dir", "run"), ("export_dir", "export")):
        words = [f"--{name}={unseen / folder}", "--queries=users", "--bootstrap_samples=0", "--ks=5"]
        done = commands.run("evaluate", *words)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1])["retrieval"]["metrics"])
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_its_report_tells_how_examples_are_cut(unseen: Path, commands: Preloaded) -> None:
    run(commands, "report", f"--output_dir={unseen / 'run'}")
    page = (unseen / "run" / "report.html").read_text()
    assert "each epoch draws anew where history ends and target begins" in page
    assert "told to the tower in training, 0 otherwise" in page


def test_other_cuts_do_not_resume_a_job(unseen: Path) -> None:
    words = ["--model=youtube_dnn", "--split=users", "--num_sampled=20", "--learning_rate=0.02", "--epochs=5"]
    done = run_command("train", unseen, *words)
    assert_one_line(done, "--history_cut: random, now event; --example_age: True, now False")


def test_a_fixed_history_is_trained_on(commands: Preloaded, tmp_path: Path) -> None:
    """A fifth of the events are examples, and the job says so."""
    write_log(tmp_path / "log.parquet", num_users=100)
    words = ["--model=comirec_sa", "--split=leave_two_out", "--history_cut=fixed", "--num_sampled=20", "--epochs=1"]
    finish(commands, tmp_path, *words, export=False)
    done = commands.run("prepare_data", *command("train", tmp_path, *words)[3:])
    sizes = np.unique(pq.read_table(tmp_path / "log.parquet")["user_id"].to_pylist(), return_counts=True)[1]
    in_training = [size - 2 for size in sizes if size > 3]  # with the user's first event
    expected = sum(size - max(1, int(0.8 * size)) for size in in_training)
    assert f"examples (leave_two_out): train {expected:,}," in done.stdout


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
        (["--example_age"], "--example_age: is for youtube_dnn. Received: '--model=comirec_sa'. Drop it, or use"),
        (["--model=din", "--history_cut=fixed"], "--history_cut: is for models that find items, and din ranks."),
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

    table = pq.read_table(path)
    users = pc.dictionary_encode(table["user_id"]).combine_chunks()
    pq.write_table(table.append_column(name, users.indices.cast("int64")), path)
