"""A job of one day goes on with what that of the day before has learned, from its folder or from its export."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.support.commands import assert_one_line, command
from tests.support.commands import run as run_command
from tests.support.finished_job import finish, run
from tests.support.jobs import assert_same_weights
from tests.support.patience import PATIENCE
from tests.support.preloaded import Preloaded
from tests.support.repository import ROOT
from tests.support.small_log import write_log

SETTINGS = ("--epochs=2", "--learning_rate=0.02", "--activation=dice", "--split=leave_two_out")


@pytest.fixture(scope="module")
def days(commands: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two days: `one` has a finished job and its export, `two` a prepared log with more items."""
    folder = tmp_path_factory.mktemp("days")
    for name, num_items in (("one", 30), ("two", 40)):
        (folder / name).mkdir()
        write_log(folder / name / "log.parquet", num_users=60, num_items=num_items)
    rows = pq.read_table(folder / "two" / "log.parquet")
    rows = rows.take(pa.array(np.random.default_rng(0).permutation(len(rows))))
    pq.write_table(rows, folder / "two" / "log.parquet")
    finish(commands, folder / "one", *SETTINGS)
    run(commands, "prepare_data", *command("train", folder / "two")[3:])
    return folder


def train(commands: Preloaded, days: Path, parent: str, name: str, *flags: str) -> str:
    """Trains on the log of the second day, to FOLDER/NAME; returns what the job says."""
    words = command("train", days / "two", *SETTINGS, f"--warm_start_from={days / parent}", *flags)
    done = commands.run("train", *words[3:], f"--output_dir={days / name}")
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


def arrays(folder: Path, step: int) -> dict[str, np.ndarray]:
    return {path.name: np.load(path) for path in (folder / "checkpoints" / f"step-{step:012d}").glob("*.npy")}


def rows_of(folder: Path) -> dict[str, int]:
    """Returns the row of each item, as the rows that are kept beside a job say."""
    table = pq.read_table(folder / "rows" / "0.parquet")
    return dict(zip(table["id"].to_pylist(), table["row"].to_pylist(), strict=True))


def test_a_job_goes_on_from_a_job(days: Path, commands: Preloaded) -> None:
    said = train(commands, days, "one/run", "from_job", "--keep_checkpoints=99")
    summary = json.loads((days / "from_job" / "summary.json").read_text())
    parent = json.loads((days / "one" / "run" / "summary.json").read_text())
    (line,) = (line for line in said.splitlines() if "warm start from" in line)
    before, now = rows_of(days / "one" / "run"), rows_of(days / "from_job")
    assert now.keys() > before.keys()
    new = len(now) - len(before)
    assert f"step {parent['best_step']} (digest {summary['warm_start']['digest'][:16]})" in line
    assert f": item {len(before)} rows kept, {new} new, 0 dropped; category_id 5 rows kept, 0 new, 0 dropped; " in line
    assert line.endswith("slots come along")
    assert summary["warm_start"]["slot_updates"] == parent["best_step"]
    assert summary["epochs"] == 2
    old, first = arrays(days / "one" / "run", parent["best_step"]), arrays(days / "from_job", 0)
    assert old.keys() == first.keys()
    for name in old:
        if "lookup.item" in name:
            assert all(
                np.array_equal(first[name][row], old[name][before[own]]) for own, row in now.items() if own in before
            )
        elif "lookup" not in name:
            np.testing.assert_array_equal(first[name], old[name], err_msg=name)
    assert [now[own] for own in before] != [*before.values()]
    # The job is a job like others: its folder says all.
    shutil.copytree(days / "from_job", days / "moved")
    for name, flags in (("evaluate", ()), ("export", (f"--export_dir={days / 'moved_export'}",))):
        run(commands, name, f"--output_dir={days / 'moved'}", *flags)
    assert f"--warm_start_from={days / 'one' / 'run'}" in (days / "from_job" / "flags.txt").read_text()


def test_a_job_goes_on_from_an_export(days: Path, commands: Preloaded) -> None:
    """With the same weights, and slots that begin anew."""
    said = train(commands, days, "one/export", "from_export", "--keep_checkpoints=99", "--optimizer=adagrad")
    assert "slots begin anew, because it has none" in said
    train(commands, days, "one/run", "again", "--keep_checkpoints=99", "--max_steps=1")
    first, by_job = arrays(days / "from_export", 0), arrays(days / "again", 0)
    weights = {name for name in by_job if "moment" not in name}
    assert weights == {name for name in first if "accumulator" not in name}
    for name in weights:
        np.testing.assert_array_equal(first[name], by_job[name], err_msg=name)
    for name in first.keys() - weights:
        np.testing.assert_array_equal(first[name], np.full_like(first[name], 0.1))
    manifest = json.loads((days / "from_export" / "checkpoints" / f"step-{0:012d}" / "manifest.json").read_text())
    parent = manifest["state"]["parent"]
    assert (parent["kind"], parent["slot_updates"]) == ("export", 0)
    digest = json.loads((days / "one" / "run" / "summary.json").read_text())["best_step"]
    assert parent["step"] == digest and re.fullmatch("[0-9a-f]{64}", parent["digest"])


@pytest.mark.parametrize("num_workers", [2, 3])
def test_many_workers_begin_as_one(days: Path, commands: Preloaded, num_workers: int) -> None:
    flags = ("--max_steps=8", "--keep_checkpoints=99", "--new_rows=random")
    alone, many = days / f"alone_of_{num_workers}", days / f"{num_workers}_workers"
    train(commands, days, "one/run", alone.name, *flags)
    parent = f"--warm_start_from={days / 'one' / 'run'}"
    words = command("train", days / "two", *SETTINGS, parent, f"--output_dir={many}", *flags)
    launcher = [str(Path(sys.executable).with_name("horovodrun")), "--gloo", "--gloo-timeout-seconds", "280"]
    done = subprocess.run(
        [*launcher, "-np", str(num_workers), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (done.stderr + done.stdout).count("warm start from") == 1
    for name, array in arrays(alone, 0).items():
        np.testing.assert_array_equal(arrays(many, 0)[name], array, err_msg=name)
    assert_same_weights(arrays(many, 8), arrays(alone, 8), tolerance=1e-3)


def test_what_does_not_fit_is_refused_in_one_line(days: Path) -> None:
    parent, other = f"--warm_start_from={days / 'one' / 'run'}", f"--output_dir={days / 'refused'}"
    done = run_command("train", days / "two", *SETTINGS, parent, other, "--hidden_units=7")
    assert_one_line(
        done, f"--hidden_units: a warm start goes on with the parent's. Received: 7, and {days}/one/run has 8."
    )
    assert not (days / "refused" / "checkpoints").exists()
    done = run_command("train", days / "two", *SETTINGS, other, "--new_rows=random")
    assert_one_line(done, "--new_rows: belongs to --warm_start_from. Received: 'random'. Add it, or drop --new_rows.")
    done = run_command("train", days / "two", *SETTINGS, f"--warm_start_from={days / 'none'}", other)
    assert_one_line(
        done, f"--warm_start_from: must be the --output_dir of a job, or an export. Received: {days}/none, no"
    )


@pytest.mark.parametrize("damage", ["an earlier version", "variables"])
def test_a_damaged_export_is_refused(days: Path, tmp_path: Path, damage: str) -> None:
    from din_dist.errors import InputError
    from din_dist.serving.export.parent import ParentExport

    folder = shutil.copytree(days / "one" / "export", tmp_path / "export")
    if damage == "variables":
        (path,) = (folder / "variables").glob("*.data-*")
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
        rule = "must be as it was exported. Received: its content changed"
    else:
        path = folder / "assets.extra" / "rows"
        shutil.rmtree(path)
        manifest = json.loads((folder / "assets.extra" / "manifest.json").read_text())
        manifest["files"] = {name: digest for name, digest in manifest["files"].items() if "rows" not in name}
        (folder / "assets.extra" / "manifest.json").write_text(json.dumps(manifest))
        rule = "must tell of the rows of tables. Received: no such file, as from earlier versions"
        path /= "rows.json"
    with pytest.raises(InputError) as error:
        ParentExport(folder)
    assert str(error.value) == f"{path}: {rule}. Write the export again, or warm start from its job."


def test_a_day_extends_the_day_before(days: Path, commands: Preloaded) -> None:
    """Newer files alone are prepared; the job learns from the new events, and the rows of old ids keep their place."""
    day = days / "three"
    day.mkdir()
    write_log(day / "log.parquet", num_users=70, num_items=40, seed=3)
    rows = pq.read_table(day / "log.parquet")
    later = rows.set_column(rows.schema.get_field_index("timestamp"), "timestamp", pc.add(rows["timestamp"], 100))
    pq.write_table(later, day / "log.parquet")
    shared = (*SETTINGS, f"--extend={days / 'one' / 'prepared'}", "--train_from=100")
    words = command("train", day, *shared, f"--warm_start_from={days / 'one' / 'run'}", "--keep_checkpoints=99")[3:]
    prepared = commands.run("prepare_data", *words)
    assert prepared.returncode == 0, prepared.stderr
    assert re.search(rf"extends .*: {len(rows):,} new events, 10 new users, 1\d new items", prepared.stdout)
    done = commands.run("train", *words)
    assert done.returncode == 0, done.stderr
    before, now = rows_of(days / "one" / "run"), rows_of(day / "run")
    assert [now[own] for own in before] == [*before.values()]
    step = json.loads((days / "one" / "run" / "summary.json").read_text())["best_step"]
    old, first = arrays(days / "one" / "run", step), arrays(day / "run", 0)
    for name in old:
        np.testing.assert_array_equal(first[name][: len(old[name])], old[name], err_msg=name)
    counts = [Counter(pq.read_table(days / name / "log.parquet")["user_id"].to_pylist()) for name in ("one", "three")]
    trained = 0  # the new events but each user's first of all, which has no history, and the two that are held out
    for user in counts[0] | counts[1]:
        trained += max(0, counts[0][user] + counts[1][user] - 2 - max(1, counts[0][user]))
    assert f" train {2 * trained:,}, " in prepared.stdout
    run(commands, "evaluate", f"--output_dir={day / 'run'}")
    run(commands, "export", f"--output_dir={day / 'run'}", f"--export_dir={day / 'export'}")
