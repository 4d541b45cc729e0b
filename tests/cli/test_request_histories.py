"""One example has one logit, on a log full of ties: in training, `evaluate`, `predict --before_column` and `serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from din_dist.metrics.ranking import gauc
from tests.support.commands import command
from tests.support.finished_job import finish
from tests.support.page_log import Row, known_before, pages, request_time
from tests.support.preloaded import Preloaded
from tests.support.served import serving

LONGEST, DELAY, TEST_FROM = 10, 5, 1090
RULES = ("--request_column=page", "--label_time_column=came", f"--history_delay={DELAY}")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return pages(num_users=40)


@pytest.fixture(scope="module")
def folder(rows: list[Row], commands: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job and its export."""
    folder = tmp_path_factory.mktemp("requests")
    pq.write_table(pa.Table.from_pylist(rows), folder / "log.parquet")
    split = ("--split=temporal", "--validation_from=1080", f"--test_from={TEST_FROM}")
    return finish(commands, folder, "--epochs=2", "--learning_rate=0.02", *split, *RULES)


def test_every_way_gives_the_same_logits(rows: list[Row], folder: Path, commands: Preloaded, tmp_path: Path) -> None:
    tested = [row for row in rows if row["timestamp"] >= TEST_FROM]
    table = pa.Table.from_pylist([{**row, "asked_at": request_time(rows, row)} for row in tested])
    pq.write_table(table.select(["user_id", "item_id", "asked_at"]), tmp_path / "rows.parquet")
    words = [f"--export_dir={folder / 'export'}", f"--input={tmp_path / 'rows.parquet'}", "--before_column=asked_at"]
    words += [f"--user_histories={folder / 'run'}", f"--predictions_dir={tmp_path / 'out'}"]
    done = commands.run("predict", *words)
    assert done.returncode == 0, done.stderr
    (part,) = (tmp_path / "out").glob("part-*")
    predicted = pq.read_table(part)["logit"].to_numpy()

    histories = [known_before(rows, row, DELAY)[-LONGEST:] for row in tested]
    assert max(map(len, histories)) > 5 and len(set(map(len, histories))) > 2
    asked: list[dict[str, Any]] = [
        {"history_item_ids": history, "candidate_item_id": row["item_id"]}
        for history, row in zip(histories, tested, strict=True)
    ]
    with serving(commands, "pages", f"--export_dir={folder / 'export'}") as served:
        answers = [served.predict({"instances": asked[first : first + 50]}) for first in range(0, len(asked), 50)]
    logits = [one["logits"] for answer in answers for one in answer["predictions"]]
    np.testing.assert_allclose(predicted, logits, atol=1e-5)

    users = np.unique([row["user_id"] for row in tested], return_inverse=True)[1]
    labels = np.array([row["label"] for row in tested])
    expected = gauc(predicted, labels, users).gauc
    done = commands.run("evaluate", f"--output_dir={folder / 'run'}", "--rank_against=none")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert found["num_examples"] == len(tested)
    for value in (found["gauc"], summary["test_gauc"]):
        assert value == pytest.approx(expected, abs=1e-6)


def test_a_job_resumes_with_its_own_histories_alone(folder: Path, commands: Preloaded) -> None:
    words = command("train", folder, "--epochs=3", "--learning_rate=0.02", "--split=temporal")[3:]
    words += ["--validation_from=1080", f"--test_from={TEST_FROM}", *RULES[:2], "--history_delay=6"]
    done = commands.run("prepare_data", *words)
    assert done.returncode == 2
    assert "history_delay" in done.stderr
