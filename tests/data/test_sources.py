"""Which files make up a log, and whether they changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from din_dist.data.sources import check_unchanged, find_files, fingerprint_files
from din_dist.errors import InputError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def found(source: Path | str) -> list[str]:
    return [path.name for path in find_files(str(source))]


@pytest.mark.parametrize("name", ["a.parquet", "a.pq", "A.CSV", "a.csv.gz", "a.jsonl", "a.ndjson.gz", "a.json"])
def test_one_file(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name)
    assert found(tmp_path / name) == [name]


def test_a_folder_is_searched_to_the_bottom_and_sorted(tmp_path: Path) -> None:
    touch(tmp_path, "b.parquet", "day=2/a.parquet", "day=1/z.parquet", "_SUCCESS", "b.parquet.crc", ".hidden.parquet")
    touch(tmp_path, "_temporary/x.parquet", ".git/y.parquet", "README.md")
    assert found(tmp_path) == ["b.parquet", "z.parquet", "a.parquet"]


def test_a_glob_takes_files_and_folders(tmp_path: Path) -> None:
    touch(tmp_path, "day=1/a.csv", "day=2/b.csv", "day=2/_SUCCESS", "night/deep/c.csv")
    assert found(tmp_path / "day=*") == ["a.csv", "b.csv"]
    assert found(tmp_path / "**" / "[bc].csv") == ["b.csv", "c.csv"]


def test_relative_paths_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.csv")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_files("a.csv") == find_files("~/a.csv") == [tmp_path / "a.csv"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("none.csv", "none.csv: no such file, folder, or match of a glob. Correct --data_path."),
        ("*.csv", "*.csv: no such file, folder, or match of a glob."),
        ("a.xlsx", "a.xlsx: a log's file must be one of .parquet, .pq, .csv, .csv.gz, .jsonl"),
        ("empty", "empty: no file of a supported type there (.parquet, "),
        ("mixed", "mixed: all files of a log must have one format. Received: "),
    ],
)
def test_errors(tmp_path: Path, source: str, expected: str) -> None:
    touch(tmp_path, "a.xlsx", "empty/_SUCCESS", "mixed/a.csv", "mixed/b.parquet")
    with pytest.raises(InputError) as caught:
        find_files(str(tmp_path / source))
    assert expected in str(caught.value)
    if source == "mixed":
        assert "mixed/a.csv (CSV) and " in str(caught.value) and "mixed/b.parquet (Parquet)" in str(caught.value)


def test_a_touch_or_a_copy_is_no_change(tmp_path: Path) -> None:
    touch(tmp_path, "a.csv")
    files = [tmp_path / "a.csv"]
    recorded = fingerprint_files(files)
    check_unchanged(recorded, files)
    os.utime(files[0], ns=(5, 5))
    check_unchanged(recorded, files)


@pytest.mark.parametrize(("content", "same_time"), [("A.csv", False), ("longer", False), ("longer", True)])
def test_a_change_is_noticed(tmp_path: Path, content: str, same_time: bool) -> None:
    touch(tmp_path, "a.csv")
    files = [tmp_path / "a.csv"]
    recorded = fingerprint_files(files)
    files[0].write_text(content)
    time = recorded[str(files[0])]["mtime_ns"] if same_time else 5
    os.utime(files[0], ns=(time, time))
    with pytest.raises(
        InputError, match=r"a.csv: this file has changed since .* --overwrite_prepared once, or .* --data_dir"
    ):
        check_unchanged(recorded, files)


def test_files_that_came_or_went(tmp_path: Path) -> None:
    touch(tmp_path, "a.csv", "b.csv")
    recorded = fingerprint_files([tmp_path / "a.csv"])
    with pytest.raises(InputError, match=r"b\.csv: this file was added"):
        check_unchanged(recorded, find_files(str(tmp_path)))
    with pytest.raises(InputError, match=r"a\.csv: this file was removed"):
        check_unchanged(recorded, [])
