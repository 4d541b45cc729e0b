"""Which names of files and folders are days."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from din_dist.daily import periods
from din_dist.daily.periods import find_days
from din_dist.daily.settings import DailyConfig, Period, QualityMetric
from din_dist.errors import InputError
from din_dist.tables.storage import Listing, RemoteFile

DAY = datetime.date(2026, 11, 1)
FILES = ("2026-11-01.parquet", "2026-11-01.csv.gz", "2026-11-01.JSONL", "day=2026-11-01.parquet", "2026-11-01.of.csv")
FOLDERS = ("2026-11-01", "day=2026-11-01", "event_date=2026-11-01", "2026-11-01.parquet")
OTHERS = (
    *("2026-11-01.txt", "2026-11-01", ".2026-11-01.csv", "_2026-11-01.csv", "20261101.csv", "log-2026-11-01.csv"),
    *("2026-11-01.parquet.crc", "2026-11-01T00.csv", "_SUCCESS", "a.day=2026-11-01.csv"),
)


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_days(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert find_days(str(tmp_path)) == {DAY: str(tmp_path / name)}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_are_days(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert find_days(str(tmp_path)) == {DAY: str(tmp_path / name)}


@pytest.mark.parametrize("name", OTHERS)
def test_names_that_are_passed_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    (tmp_path / "2026-10-31.csv").touch()
    assert list(find_days(str(tmp_path))) == [datetime.date(2026, 10, 31)]
    (tmp_path / "2026-10-31.csv").unlink()
    with pytest.raises(InputError) as error:
        find_days(str(tmp_path))
    assert str(error.value) == (
        f"--log: must have files or folders that are named by their day. Received: {tmp_path}, with none. Name it as "
        "2026-11-01.parquet, 2026-11-01/ or day=2026-11-01/."
    )


def test_days_come_in_order(tmp_path: Path) -> None:
    for name in ("day=2026-11-02", "a=2026-10-03", "z=2026-09-30"):
        (tmp_path / name).mkdir()
    assert [str(date) for date in find_days(str(tmp_path))] == ["2026-09-30", "2026-10-03", "2026-11-02"]


def test_a_day_that_is_there_twice(tmp_path: Path) -> None:
    (tmp_path / "2026-11-01.csv").touch()
    (tmp_path / "day=2026-11-01").mkdir()
    with pytest.raises(InputError) as error:
        find_days(str(tmp_path))
    assert str(error.value) == (
        f"--log: must have one file or folder for each day. Received: {tmp_path}/2026-11-01.csv and "
        f"{tmp_path}/day=2026-11-01. Move one of them away, or put both into one folder."
    )


def test_a_day_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "2026-02-30.csv").touch()
    with pytest.raises(
        InputError, match=r"--log: names must have dates. Received: .*/2026-02-30.csv. Name it as 2026-1"
    ):
        find_days(str(tmp_path))


@pytest.mark.parametrize(("name", "why"), [("none", "No such file or directory"), ("file", "Not a directory")])
def test_a_log_that_is_no_folder(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as error:
        find_days(str(tmp_path / name))
    assert str(error.value) == (
        f"--log: must be a folder that can be read. Received: {tmp_path / name}, {why}. Name the folder of the days."
    )


def test_a_log_in_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of the store stay with each day."""
    top = RemoteFile.of("s3://bucket/log?region=eu-west-1")
    found = {top: True, top / "day=2026-11-02": True, top / "2026-11-01.parquet": False, top / "notes.txt": False}
    asked = []

    def of(top: RemoteFile, recursive: bool) -> Listing:
        asked.append((top, recursive))
        return Listing(top, found)

    monkeypatch.setattr(periods.Listing, "of", of)
    assert list(find_days("s3://bucket/log?region=eu-west-1").values()) == [
        "s3://bucket/log/2026-11-01.parquet?region=eu-west-1",
        "s3://bucket/log/day=2026-11-02?region=eu-west-1",
    ]
    assert asked == [(top, False)]
    found.clear()
    with pytest.raises(InputError, match="--log: must be a folder that can be read. Received: s3://.*, no such folder"):
        find_days("s3://bucket/log?region=eu-west-1")


@pytest.mark.parametrize(
    ("period", "date", "after"),
    [
        (Period.DAY, "2026-02-28", "2026-03-01"),
        (Period.WEEK, "2026-12-28", "2027-01-04"),
        (Period.MONTH, "2026-12-01", "2027-01-01"),
        (Period.MONTH, "2027-01-28", "2027-02-28"),
    ],
)
def test_the_next_period(period: Period, date: str, after: str) -> None:
    assert str(period.after(datetime.date.fromisoformat(date))) == after


def test_how_much_worse_a_metric_is() -> None:
    assert QualityMetric.GAUC.drop(0.8, 0.6) == pytest.approx(0.25)
    assert QualityMetric.AUC.drop(0.8, 1.0) == pytest.approx(-0.25)
    assert QualityMetric.LOG_LOSS.drop(0.4, 0.5) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"log": ""},
            "--log: must name your log. Received: ''. Give the folder that has a file or a folder for each d",
        ),
        ({"begins": ""}, "--from: must name the first day. Received: ''. Write it as 2026-11-01."),
        ({"begins": "1.11.2026"}, "--from: must be a date. Received: '1.11.2026'. Write it as 2026-11-01."),
        ({"begins": "2026-02-30"}, "--from: must be a date. Received: '2026-02-30'. Write it as 2026-11-01."),
        ({"accept_drop": "2026"}, "--accept_drop: must be a date. Received: '2026'. Write it as 2026-11-01."),
        ({"work_dir": ""}, "--work_dir: must name a folder. Received: ''. For example runs/daily."),
        ({"largest_drop": 1.0}, "--largest_drop: must be below 1. Received: 1.0. For example 0.05."),
        ({"keep": 0}, "--keep: must be at least 1. Received: 0. For example 3."),
        (
            {"begins": "2026-10-31", "period": Period.MONTH},
            "--from: with --period=month must be at most the 28th. Received: '2026-10-31'. For example the 1st.",
        ),
    ],
)
def test_wrong_settings(settings: dict[str, object], line: str) -> None:
    values: dict[str, object] = {"log": "/log", "begins": "2026-11-01"} | settings
    with pytest.raises(InputError) as error:
        DailyConfig(**values)  # type: ignore[arg-type]
    assert str(error.value).startswith(line)
