"""A job whose histories come from a log of behaviours, from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from din_dist.serving.bundle import Bundle
from tests.support.commands import command
from tests.support.finished_job import finish, run
from tests.support.preloaded import Preloaded

NUM_USERS, TEST_FROM = 300, 50


def write_logs(folder: Path) -> None:
    """Each user likes one of five categories, which only the behaviours tell: two items are shown to each."""
    random = np.random.default_rng(0)
    shown, done = [], []
    for user in range(NUM_USERS):
        name, liked = f"u{user}", int(random.integers(5))
        for time in (random.integers(40, TEST_FROM), random.integers(TEST_FROM, 60)):
            item = int(random.integers(25))
            row = {"user_id": name, "item_id": f"i{item}", "category_id": f"c{item % 5}", "timestamp": int(time)}
            shown.append(row | {"label": int(random.random() < (0.9 if item % 5 == liked else 0.1))})
        for time in range(random.integers(1, 8)):  # of items 25 to 49, which are never shown
            item = 25 + 5 * int(random.integers(5)) + liked
            done.append({"who": name, "item_id": f"i{item}", "category_id": f"c{item % 5}", "timestamp": time})
    pq.write_table(pa.Table.from_pylist(shown), folder / "log.parquet")
    pq.write_table(pa.Table.from_pylist(done), folder / "done.parquet")


def without_ids(folder: Path) -> Path:
    """Writes the behaviours of `folder` without the ids of their items."""
    table = pq.read_table(folder / "done.parquet").drop_columns("item_id")
    path = folder / "done_without_ids.parquet"
    pq.write_table(table, path)
    return path


def words(folder: Path, *more: str) -> list[str]:
    split = ["--split=temporal", f"--validation_from={TEST_FROM}", f"--test_from={TEST_FROM + 1}"]
    return [*split, "--epochs=30", "--learning_rate=0.03", *more]


def with_behaviours(folder: Path) -> list[str]:
    return [f"--behaviours_path={folder / 'done.parquet'}", "--behaviour_user_column=who"]


@pytest.fixture(scope="module")
def folder(commands: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished job."""
    folder = tmp_path_factory.mktemp("behaviours")
    write_logs(folder)
    return finish(commands, folder, *words(folder, *with_behaviours(folder)))


def summary_of(job: Path) -> dict[str, Any]:
    return json.loads((job / "summary.json").read_text())


def test_histories_of_behaviours_tell_what_those_of_events_cannot(folder: Path, commands: Preloaded) -> None:
    """The planted rates allow an AUC of 0.85 or so; without behaviours nothing is known of a user."""
    found = summary_of(folder / "run")
    assert found["test_auc"] > 0.75
    output = folder / "alone"
    flags = command("train", folder, *words(folder), f"--output_dir={output}")[3:]
    for name in ("prepare_data", "train"):
        run(commands, name, *flags)
    assert summary_of(output)["test_auc"] < 0.6


def test_evaluate_finds_what_the_trainer_found(folder: Path, commands: Preloaded) -> None:
    expected = summary_of(folder / "run")
    for which in (f"--output_dir={folder / 'run'}", f"--export_dir={folder / 'export'}"):
        done = commands.run("evaluate", which, "--bootstrap_samples=100")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["auc"] == pytest.approx(expected["test_auc"], abs=1e-6)
        assert found["retrieval"]["mean_num_candidates"] <= 25


def test_predict_gives_the_logits_of_training(folder: Path, commands: Preloaded, tmp_path: Path) -> None:
    """By users and times, from prepared data, and by the histories themselves."""
    shown = pq.read_table(folder / "log.parquet").to_pandas()
    done = pq.read_table(folder / "done.parquet").to_pandas().groupby("who")["item_id"].apply(list)
    rows = shown[shown["timestamp"] >= TEST_FROM].reset_index(drop=True)
    by_user = pa.Table.from_pandas(rows[["user_id", "item_id", "timestamp"]])
    given = pa.table({"history": done[rows["user_id"]].tolist(), "item_id": rows["item_id"]})
    logits = {}
    for name, table, flags in (
        ("user", by_user, [f"--user_histories={folder / 'run'}", "--before_column=timestamp"]),
        ("given", given, []),
    ):
        pq.write_table(table, tmp_path / f"{name}.parquet")
        flags = [*flags, f"--export_dir={folder / 'export'}", f"--input={tmp_path / f'{name}.parquet'}"]
        run(commands, "predict", *flags, f"--predictions_dir={tmp_path / name}")
        (part,) = (tmp_path / name).glob("part-*")
        logits[name] = pq.read_table(part)["logit"].to_numpy()
    np.testing.assert_allclose(logits["user"], logits["given"], atol=1e-5)
    assert np.corrcoef(logits["user"], rows["label"])[0, 1] > 0.4


@pytest.mark.thorough  # as test_sides_job.py and test_elastic.py do
def test_a_resumed_job_ends_the_same(folder: Path, commands: Preloaded) -> None:
    output = folder / "resumed"
    flags = command("train", folder, *words(folder, *with_behaviours(folder)), f"--output_dir={output}")[3:]
    run(commands, "train", *flags, "--max_steps=40")
    run(commands, "train", *flags)
    first, second = summary_of(folder / "run"), summary_of(output)
    assert second["test_log_loss"] == pytest.approx(first["test_log_loss"], abs=1e-5)
    newest = max((output / "checkpoints").glob("step-*"))
    for path in newest.glob("*.npy"):
        np.testing.assert_allclose(
            np.load(path), np.load(folder / "run" / "checkpoints" / newest.name / path.name), atol=1e-5
        )


def test_behaviours_without_ids_tell_by_their_categories(commands: Preloaded, tmp_path: Path) -> None:
    """Training, evaluation, the export and requests agree; a request has any id that the model does not know."""
    write_logs(tmp_path)
    behaviours = [f"--behaviours_path={without_ids(tmp_path)}", "--behaviour_item_column=none"]
    finish(commands, tmp_path, *words(tmp_path, *behaviours, "--behaviour_user_column=who"))
    summary = summary_of(tmp_path / "run")
    assert summary["test_auc"] > 0.75
    done = commands.run("evaluate", f"--export_dir={tmp_path / 'export'}", "--bootstrap_samples=100")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["log_loss"] == pytest.approx(summary["test_log_loss"], abs=1e-6)  # histories of one category tie
    assert found["retrieval"]["mean_num_candidates"] <= 25
    bundle = Bundle.open(tmp_path / "export")
    liked, candidates = ["c3", "c1", "c3"], ["i3", "i8", "i4"]
    by_made_up_ids = bundle.score([f"category_id={category}" for category in liked] * 3, [3] * 3, candidates)
    by_categories = bundle.score_with_features([""] * 9, [3] * 3, candidates, {"category_id": liked * 3}, {})
    np.testing.assert_allclose(by_categories, by_made_up_ids, atol=1e-6)
    assert by_categories[:2].min() > by_categories[2] + 1


def test_the_report_is_written(folder: Path, commands: Preloaded, tmp_path: Path) -> None:
    run(commands, "report", f"--output_dir={folder / 'run'}", f"--report_path={tmp_path / 'report.html'}")
    assert f"up to 10 behaviours of {folder / 'done.parquet'}" in (tmp_path / "report.html").read_text()
