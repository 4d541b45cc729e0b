"""`evaluate --evaluation_from` scores a job on newer data than it has, with its rows found by the log's own ids."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.support.commands import assert_one_line, command
from tests.support.finished_job import run
from tests.support.patience import PATIENCE
from tests.support.preloaded import Preloaded
from tests.support.repository import ROOT
from tests.support.small_log import write_log

FROM = 15
SETTINGS = ("--label_column=label", "--epochs=3", "--learning_rate=0.02", "--split=temporal")
HELD_OUT = (f"--validation_from={FROM}", f"--test_from={FROM}")
NUMBERS = ("gauc", "auc", "log_loss", "num_examples", "num_users", "num_users_skipped")


@pytest.fixture(scope="module")
def job(commands: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a log, of a job that trained on what is before `FROM`, and of the early part of the log."""
    folder = tmp_path_factory.mktemp("job")
    write_log(folder / "log.parquet", num_users=80, labels=True)
    for name in ("prepare_data", "train"):
        run(commands, name, *command("train", folder, *SETTINGS, *HELD_OUT)[3:])
    rows = pq.read_table(folder / "log.parquet")
    late = pc.greater_equal(rows["timestamp"], FROM)
    for name, own in (("early", pc.invert(late)), ("late", late)):
        (folder / name).mkdir()
        pq.write_table(rows.filter(own), folder / name / "log.parquet")
    return folder


@pytest.fixture(scope="module")
def own_test(job: Path, commands: Preloaded) -> dict[str, Any]:
    """What the job has on its own test split."""
    return evaluated(commands, f"--output_dir={job / 'run'}")


def evaluated(commands: Preloaded, *flags: str) -> dict[str, Any]:
    done = commands.run("evaluate", "--rank_against=none", *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"said": done.stderr}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in NUMBERS:
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def test_on_its_own_data_it_is_the_test_split(job: Path, commands: Preloaded, own_test: dict[str, Any]) -> None:
    found = evaluated(commands, f"--output_dir={job / 'run'}", f"--evaluation_from={FROM}")
    assert_same(found, own_test)
    assert found["step"] == own_test["step"] > 0
    assert f"weights of {job / 'run'}, step {found['step']}: item 30 rows kept, 0 new, 0 dropped; " in found["said"]


def reordered(rows: pa.Table) -> pa.Table:
    """The rows in another order: other dense ids."""
    return rows.take(pa.array(np.random.default_rng(0).permutation(len(rows))))


def renamed(rows: pa.Table) -> pa.Table:
    """The rows with other ids of items, which the job has not seen."""
    place = rows.schema.get_field_index("item_id")
    return rows.set_column(place, "item_id", pc.binary_join_element_wise("new-", rows["item_id"], ""))


@pytest.mark.parametrize("change", [reordered, renamed])
def test_rows_are_found_by_own_ids(
    job: Path, commands: Preloaded, own_test: dict[str, Any], change: Callable[[pa.Table], pa.Table]
) -> None:
    folder = job / change.__name__
    folder.mkdir()
    pq.write_table(change(pq.read_table(job / "log.parquet")), folder / "log.parquet")
    run(commands, "prepare_data", *command("train", folder, *SETTINGS, *HELD_OUT)[3:])
    where = (f"--data_path={folder / 'log.parquet'}", f"--data_dir={folder / 'prepared'}")
    found = evaluated(commands, f"--output_dir={job / 'run'}", f"--evaluation_from={FROM}", *where)
    if change is reordered:
        assert_same(found, own_test)
    else:
        assert ": item 0 rows kept, 30 new, 30 dropped; category_id 5 rows kept" in found["said"]
        assert found["log_loss"] != pytest.approx(own_test["log_loss"], rel=1e-3)
    assert found["num_examples"] == own_test["num_examples"]


def test_a_job_meets_a_day_that_extends_its_data(job: Path, commands: Preloaded, own_test: dict[str, Any]) -> None:
    """The job has the early part alone, so what it learns is the same; the new events come by `--extend`."""
    nothing_held_out = (f"--validation_from={2**62}", f"--test_from={2**62}")
    for name in ("prepare_data", "train"):
        run(commands, name, *command("train", job / "early", *SETTINGS, *nothing_held_out)[3:])
    extend = f"--extend={job / 'early' / 'prepared'}"
    run(commands, "prepare_data", *command("train", job / "late", *SETTINGS, *HELD_OUT, extend)[3:])
    where = [f"--data_path={job / 'late' / 'log.parquet'}", f"--data_dir={job / 'late' / 'prepared'}", extend]
    found = evaluated(commands, f"--output_dir={job / 'early' / 'run'}", f"--evaluation_from={FROM}", *where)
    assert found["num_examples"] == own_test["num_examples"]
    assert found["floors"] == own_test["floors"]
    assert found["gauc"] == pytest.approx(own_test["gauc"], abs=0.05)  # items of the late part alone had rows there


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--checkpoint_step=3"], "takes the weights that an export would. Received: 15. Drop --checkpoint_step."),
        (["--evaluation_split=train"], "makes a test split of all events from then on. Received: 15. Drop --eval"),
        (["--evaluation_from=0"], "must be a timestamp. Received: 0. For example 1."),
        (["--output_dir=", "--export_dir=exports"], "is for a job. Received: 15. Give --output_dir in place of"),
    ],
)
def test_what_does_not_go_together(job: Path, flags: list[str], line: str) -> None:
    words = [
        sys.executable,
        "-m",
        "din_dist.cli.evaluate",
        f"--output_dir={job / 'run'}",
        f"--evaluation_from={FROM}",
        *flags,
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert_one_line(done, f"--evaluation_from: {line}")
