"""The plan of parts, and the folder that its processes share."""

from __future__ import annotations

import collections
import json
import os
from pathlib import Path

import pytest

from din_dist.errors import InputError
from din_dist.serving.batch.parts import PLAN, SUMMARY, Part, PartsFolder, Plan, in_turn
from din_dist.tables.survey import Survey

SETTINGS = {"--export_dir": "digest", "--top_k": 0}


def inputs(folder: Path) -> list[Path]:
    """Files of 5, 0 and 2 rows."""
    files = [folder / name for name in ("a.csv", "b.csv", "c.csv.gz")]
    files[0].write_text("i\n1\n2\n3\n4\n5\n")
    files[1].write_text("i\n")
    import gzip

    files[2].write_bytes(gzip.compress(b"i\n1\n2\n"))
    return files


def begun(folder: Path) -> tuple[PartsFolder, list[Path]]:
    parts, files = PartsFolder(folder / "out"), inputs(folder)
    parts.folder.mkdir()
    plan = parts.begin(files, 2, SETTINGS, overwrite=False)
    (parts.folder / plan.parts()[1].name).write_text("done")
    return parts, files


def test_a_part_is_of_one_file(tmp_path: Path) -> None:
    files = inputs(tmp_path)
    plan = Plan.of(files, 2, SETTINGS)
    assert plan.num_rows == 7
    assert plan.parts() == [
        Part("part-00000-of-00005.csv", files[0], 0, 2),
        Part("part-00001-of-00005.csv", files[0], 2, 2),
        Part("part-00002-of-00005.csv", files[0], 4, 1),
        Part("part-00003-of-00005.csv", files[1], 0, 0),
        Part("part-00004-of-00005.csv.gz", files[2], 0, 2),
    ]
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_processes_begin_apart_and_each_would_do_all(count: int) -> None:
    parts = [Part(f"{number}", Path("f"), number, 1) for number in range(5)]
    orders = [in_turn(parts, rank, count) for rank in range(count)]
    assert all(sorted(order, key=lambda part: part.first_row) == parts for order in orders)
    first = collections.Counter(order[0].first_row for order in orders)
    assert len(first) == min(count, 5)
    if count == 2:
        assert [part.first_row for part in orders[0]] == [0, 1, 4, 3, 2]


def test_the_same_command_goes_on(tmp_path: Path) -> None:
    parts, files = begun(tmp_path)
    for leftover in (".part-00000-of-00005.csv.claim", ".part-00000-of-00005.csv.77", ".stopping"):
        (parts.folder / leftover).write_text("of a process that was killed")
    os.utime(files[0])  # touched, not changed
    plan = parts.begin(files, 2, SETTINGS, overwrite=False)
    assert [part.first_row for part in parts.missing(plan)] == [0, 4, 0, 0]
    assert not list(parts.folder.glob(".*"))
    for part in parts.missing(plan):
        (parts.folder / part.name).write_text("done")
    parts.finish(plan)
    summary = json.loads((parts.folder / SUMMARY).read_text())
    assert summary["num_rows"] == 7
    assert summary["parts"][2] == {
        "name": "part-00002-of-00005.csv", "file": str(files[0]), "first_row": 5, "num_rows": 1,
    }  # fmt: skip


def test_another_command_does_not(tmp_path: Path) -> None:
    parts, files = begun(tmp_path)

    def refusal(files: list[Path] = files, rows_per_part: int = 2, **settings: object) -> str:
        with pytest.raises(InputError) as caught:
            parts.begin(files, rows_per_part, SETTINGS | settings, overwrite=False)
        assert "--overwrite" in str(caught.value)
        return str(caught.value)

    assert "--top_k: predictions that were begun go on with the same settings. Received: 3" in refusal(**{"--top_k": 3})
    assert "--export_dir: " in refusal(**{"--export_dir": "another"})
    assert "--rows_per_part: " in refusal(rows_per_part=3)
    assert "c.csv.gz: this file was removed since" in refusal(files=files[:2])
    files[0].write_text("i\n1\n2\n3\n4\n6\n")
    assert "a.csv: this file has changed since" in refusal()
    (parts.folder / PLAN).write_text('{"version": 0}')
    assert "must be of this version. Received: version 0" in refusal()
    (parts.folder / PLAN).write_text("[" * 100_000)
    assert "must be of this version. Received: lists or objects nested too deeply" in refusal()
    (parts.folder / PLAN).unlink()
    assert "must be for these predictions alone" in refusal()
    kept = parts.folder / "notes.txt"
    kept.write_text("mine")
    plan = parts.begin(files, 3, SETTINGS, overwrite=True)
    assert len(parts.missing(plan)) == len(plan.parts()) == 4
    assert kept.exists()


def test_a_plan_without_a_published_part_binds_nobody(tmp_path: Path) -> None:
    parts, files = begun(tmp_path)
    next(parts.folder.glob("part-*")).unlink()
    assert parts.begin(files, 3, SETTINGS, overwrite=False).rows_per_part == 3


def test_a_plan_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    parts = PartsFolder(tmp_path / "out")
    parts.folder.mkdir()

    def check(plan: Plan) -> None:
        assert plan.files[str(tmp_path / "a.csv")] == Survey(("i",), 5, plan.files[str(tmp_path / "a.csv")].num_bytes)
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        parts.begin(inputs(tmp_path), 2, SETTINGS, overwrite=False, check=check)
    assert not list(parts.folder.iterdir())


def test_a_part_is_claimed_once(tmp_path: Path) -> None:
    parts, _ = begun(tmp_path)
    part = Part("part-00000-of-00005.csv", tmp_path, 0, 2)
    with parts.claimed(part) as first, PartsFolder(parts.folder).claimed(part) as second:
        assert (first, second) == (True, False)
    with parts.claimed(part) as again:
        assert again
    with parts.claimed(Part("part-00001-of-00005.csv", tmp_path, 0, 2)) as published:
        assert not published


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    parts = PartsFolder(tmp_path / "nowhere")
    with pytest.raises(
        InputError, match="--predictions_dir: must be a folder that can be written. Received: .*No such"
    ):
        parts.begin(inputs(tmp_path), 2, SETTINGS, overwrite=False)
