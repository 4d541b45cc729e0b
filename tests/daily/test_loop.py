"""The loop over days, with commands that leave files at once: what is due, when it stops, what a kill leaves."""

from __future__ import annotations

import datetime
import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from din_dist.daily import loop
from din_dist.daily.loop import Loop, LoopEnded
from din_dist.daily.settings import DailyConfig
from din_dist.errors import InputError

FIRST = datetime.date(2026, 11, 1)


class Killed(BaseException):
    """The end of a process by SIGKILL: no handler of the loop may see it."""


class Commands:
    """What the commands leave, in a folder with a log.

    Attributes:
        calls: (date, command) of each that was run.
        gauc: of a day's evaluation, by date; 0.7 by default.
        kill: (date, command, moment) at which the process is killed; the moments are begun and done.
        codes: (date, command) -> its exit code.
        forgotten: as the facts of prepared data say it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.work = folder, folder / "log", folder / "work"
        self.log.mkdir(parents=True)
        self.calls: list[tuple[str, str]] = []
        self.flags: dict[tuple[str, str], dict[str, str]] = {}
        self.gauc: dict[str, float | None] = {}
        self.kill: tuple[str, str, str] | None = None
        self.codes: dict[tuple[str, str], int] = {}
        self.forgotten: dict[str, Any] | None = None
        self.said: list[str] = []
        self.words: Sequence[str] = ()  # of the last call

    def add_days(self, *days: int, times: Sequence[int] | None = None) -> None:
        """Adds days to the log, by their places from 0, whose events have 10 times the place and more as times."""
        for day in days:
            found = [10 * day + second for second in range(4)] if times is None else [*times]
            (self.log / f"{date(day)}.csv").write_text(json.dumps(found))

    def loop(self, **settings: Any) -> dict[str, Any]:
        """Calls the loop once; returns what it found."""
        values = {"log": str(self.log), "work_dir": str(self.work), "begins": str(FIRST)} | settings
        return Loop(DailyConfig(**values), self.run, self.said.append).run()

    def run(self, name: str, words: Sequence[str]) -> int:
        flags = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
        day = Path(flags.get("data_path") or flags["output_dir"]).name.removesuffix(".csv")
        self.calls.append((day, name))
        self.words = words
        self.flags[day, name] = flags
        if code := self.codes.get((day, name), 0):
            return code
        if name == "launch":  # what a kill leaves of it must be gone on with
            Path(flags["output_dir"]).mkdir(parents=True, exist_ok=True)
            (Path(flags["output_dir"]) / "step").write_text("half")
        if self.kill == (day, name, "begun"):
            raise Killed
        getattr(self, f"_{name}")(day, flags)
        if self.kill == (day, name, "done"):
            raise Killed
        return 0

    def _prepare_data(self, day: str, flags: dict[str, str]) -> None:
        folder = Path(flags["data_dir"])
        assert not folder.exists(), "what begins anew begins from nothing"
        (folder / "packed").mkdir(parents=True)
        new, old = json.loads(Path(flags["data_path"]).read_text()), []
        if flags["extend"]:
            old = np.load(Path(flags["extend"], "packed", "timestamps.npy")).tolist()
        np.save(folder / "packed" / "timestamps.npy", np.array([*old, *new], np.int64))
        extends = {"events": len(old)} if old else None
        facts = {"extends": extends, "fingerprint": f"of {day}", "forgotten": self.forgotten}
        (folder / "facts.json").write_text(json.dumps(facts))

    def _evaluate(self, day: str, flags: dict[str, str]) -> None:
        assert Path(flags["output_dir"], "step").read_text() == "whole"
        found = {"gauc": self.gauc.get(day, 0.7), "auc": 0.6, "log_loss": 0.5, "num_examples": 8}
        Path(flags["evaluation_path"]).write_text(json.dumps(found))

    def _launch(self, day: str, flags: dict[str, str]) -> None:
        folder = Path(flags["output_dir"])
        if parent := flags.get("warm_start_from"):
            assert Path(parent, "step").read_text() == "whole"
        (folder / "flags.txt").write_text(f"flags of {day}")
        (folder / "step").write_text("whole")

    def _export(self, day: str, flags: dict[str, str]) -> None:
        folder = Path(flags["export_dir"])
        folder.mkdir(parents=True, exist_ok="--overwrite" in self.words)
        manifest = {"step": 5, "digest": "d", "data_fingerprint": f"of {day}", "flags": f"flags of {day}"}
        (folder / "manifest.json").write_text(json.dumps(manifest))


def date(day: int) -> str:
    return str(FIRST + datetime.timedelta(days=day))


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    return fake(tmp_path / "it", monkeypatch)


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    def read_facts(folder: Path) -> types.SimpleNamespace:
        times = np.load(folder / "packed" / "timestamps.npy")
        facts = json.loads((folder / "facts.json").read_text())
        return types.SimpleNamespace(**facts, num_events=len(times), last_timestamp=int(times.max()))

    def read_manifest(folder: Path) -> types.SimpleNamespace:
        if not (folder / "manifest.json").exists():
            raise InputError("no export")
        return types.SimpleNamespace(**json.loads((folder / "manifest.json").read_text()))

    monkeypatch.setattr(loop, "read_facts", read_facts)
    monkeypatch.setattr(loop, "read_manifest", read_manifest)
    return Commands(folder)


def files(commands: Commands) -> dict[str, str]:
    """The content of all files in the work folder, with the folder's own path left out."""
    return {
        path.relative_to(commands.work).as_posix(): path.read_bytes()
        .decode("latin-1")
        .replace(str(commands.folder), "")
        for path in sorted(commands.work.rglob("*"))
        if path.is_file()
    }


def test_a_day_is_evaluated_before_it_trains(commands: Commands) -> None:
    commands.add_days(0, 1)
    found = commands.loop()
    first, second = date(0), date(1)
    assert commands.calls == [
        *((first, name) for name in ("prepare_data", "launch", "export")),
        *((second, name) for name in ("prepare_data", "evaluate", "launch", "export")),
    ]
    assert found["new_days"] == [first, second]
    assert (found["version"], found["export_dir"]) == (20261102, str(commands.work / "versions"))
    assert [day["gauc"] for day in found["days"]] == [None, 0.7]
    never, work = str(2**63 - 1), commands.work
    flags = commands.flags[first, "launch"]
    assert flags["extend"] == "" and flags["test_from"] == flags["validation_from"] == never
    assert not {"epochs", "train_from", "warm_start_from"} & flags.keys()
    flags = commands.flags[second, "prepare_data"]
    assert flags["extend"] == str(work / "prepared" / first)
    assert flags["test_from"] == flags["validation_from"] == "4"  # the newest event of the first day is at 3
    flags = commands.flags[second, "evaluate"]
    assert flags["output_dir"] == str(work / "jobs" / first)
    assert (flags["evaluation_from"], flags["data_dir"]) == ("4", str(work / "prepared" / second))
    flags = commands.flags[second, "launch"]
    assert (flags["epochs"], flags["train_from"], flags["test_from"]) == ("1", "4", never)
    assert flags["warm_start_from"] == str(work / "jobs" / first)
    assert flags["output_dir"] == str(work / "jobs" / second)
    assert json.loads((work / "days" / second / "prepared.json").read_text())["new_events"] == 4


def test_running_twice_does_nothing(commands: Commands) -> None:
    commands.add_days(0, 1)
    before = commands.loop()
    calls, left = len(commands.calls), files(commands)
    found = commands.loop()
    assert (len(commands.calls), files(commands)) == (calls, left)
    assert commands.said[-1] == f"nothing to do: {date(1)} is the newest day"
    assert found == {**before, "new_days": []}
    commands.add_days(2)
    assert commands.loop()["new_days"] == [date(2)]
    assert len(commands.calls) == calls + 4


@pytest.mark.parametrize("moment", ["begun", "done"])
@pytest.mark.parametrize("name", ["prepare_data", "evaluate", "launch", "export"])
def test_after_a_kill_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, moment: str
) -> None:
    whole, killed = (fake(tmp_path / folder, monkeypatch) for folder in ("whole", "killed"))
    for each in (whole, killed):
        each.add_days(0, 1, 2)
    whole.loop(keep=2)
    killed.kill = (date(1), name, moment)
    with pytest.raises(Killed):
        killed.loop(keep=2)
    killed.kill = None
    before = len(killed.calls)
    assert killed.loop(keep=2)["version"] == 20261103
    assert files(killed) == files(whole)
    phases = ["prepare_data", "evaluate", "launch", "export"]
    done = {**dict.fromkeys(phases, phases.index(name)), "export": 3 + (moment == "done")}[name]
    again = [(date(1), phase) for phase in phases[done:]]
    assert killed.calls[before : before + len(again)] == again


def test_a_drop_stops_it_until_it_is_accepted(commands: Commands) -> None:
    commands.add_days(0, 1, 2, 3)
    commands.gauc = {date(1): 0.8, date(2): 0.75, date(3): 0.74}
    for _ in range(2):
        with pytest.raises(LoopEnded) as end:
            commands.loop()
        assert end.value.code == 81
        assert str(end.value) == (
            f"{date(2)}: --quality_metric must not fall by more than --largest_drop=0.05. Received: gauc 0.7500 of the "
            f"model of {date(1)}, 6.3% worse than 0.8000 one day before. Nothing is trained, and version 20261102 "
            f"stays the newest. Look at the log of that day; --accept_drop={date(2)} goes on."
        )
    assert commands.calls[-1] == (date(2), "evaluate"), "it is not evaluated again"
    assert not (commands.work / "versions" / "20261103").exists()
    assert commands.loop(accept_drop=date(2))["version"] == 20261104, "the next day is compared with the lower value"
    assert any(f"{date(2)}: goes on as --accept_drop says, with gauc 0.7500" in line for line in commands.said)


@pytest.mark.parametrize(
    ("metric", "drop", "stops"), [("auc", 0.0, False), ("log_loss", 0.0, True), ("gauc", 0.5, False)]
)
def test_what_counts_as_a_drop(commands: Commands, metric: str, drop: float, stops: bool) -> None:
    commands.add_days(0, 1, 2)
    commands.gauc = {date(1): 0.8, date(2): 0.5}
    commands.loop(accept_drop=date(2))
    commands.add_days(3)
    path = commands.work / "days" / date(2) / "evaluated.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"log_loss": 0.49, "auc": 0.59, "gauc": 0.71}))
    if stops:
        with pytest.raises(
            LoopEnded, match="log_loss 0.5000 of the model of 2026-11-03, 2.0% worse than 0.4900 one day"
        ):
            commands.loop(quality_metric=loop.QualityMetric(metric), largest_drop=drop)
    else:
        assert commands.loop(quality_metric=loop.QualityMetric(metric), largest_drop=drop)["version"] == 20261104


def test_a_day_without_a_metric(commands: Commands) -> None:
    commands.add_days(0, 1)
    commands.gauc = {date(1): None}
    with pytest.raises(
        InputError, match="--quality_metric: must have a value on each day. Received: no gauc on 2026-1"
    ):
        commands.loop()
    assert commands.loop(quality_metric=loop.QualityMetric.LOG_LOSS)["version"] == 20261102


def test_the_newest_are_kept(commands: Commands) -> None:
    commands.add_days(*range(5))
    commands.loop(keep=2)
    for name, kept in (
        ("versions", ["20261104", "20261105"]),
        ("jobs", [date(3), date(4)]),
        ("prepared", [date(3), date(4)]),
    ):
        assert sorted(path.name for path in (commands.work / name).iterdir()) == kept
    assert sorted(path.name for path in (commands.work / "days").iterdir()) == [date(day) for day in range(5)]
    assert len(commands.loop(keep=1)["days"]) == 5
    commands.add_days(5)
    assert commands.loop(keep=1)["new_days"] == [date(5)], "the next day needs what is kept, and no more"


def test_a_missing_day_is_waited_for(commands: Commands) -> None:
    commands.add_days(0, 2)
    with pytest.raises(LoopEnded) as end:
        commands.loop()
    assert end.value.code == 82
    assert str(end.value) == (
        f"--log: days must come in order. Received: {date(2)} in {commands.log}, but not {date(1)}. Once it is there, "
        "the same command goes on; --skip_missing goes on without it."
    )
    assert commands.calls[-1] == (date(0), "export"), "what is before it is done"
    commands.add_days(1)
    assert commands.loop()["new_days"] == [date(1), date(2)]


def test_a_missing_day_is_left_out_if_it_is_said(commands: Commands) -> None:
    commands.add_days(0, 2)
    assert commands.loop(skip_missing=True)["new_days"] == [date(0), date(2)]
    assert commands.flags[date(2), "launch"]["warm_start_from"] == str(commands.work / "jobs" / date(0))
    commands.add_days(1)
    assert commands.loop()["new_days"] == []
    assert f"passed over: {date(1)}, because it came after {date(2)} was done" in commands.said


def test_before_the_first_day_there_is_nothing_to_do(commands: Commands) -> None:
    commands.add_days(0)
    assert commands.loop(begins=date(1))["version"] is None
    assert commands.said == ["nothing to do: no day is there yet"]


def test_weeks(commands: Commands) -> None:
    commands.add_days(0, 7, 14)
    assert commands.loop(period=loop.DailyConfig.period.WEEK)["version"] == 20261115
    commands.add_days(16)
    with pytest.raises(InputError) as error:
        commands.loop(period=loop.DailyConfig.period.WEEK)
    assert str(error.value) == (
        "--log: with --period=week must have dates that are one week apart, from --from=2026-11-01 on. Received: "
        "2026-11-17. Correct its name, or give another --period."
    )


def test_the_first_day_stays(commands: Commands) -> None:
    commands.add_days(0, 1)
    commands.loop()
    with pytest.raises(InputError) as error:
        commands.loop(begins=date(1))
    assert str(error.value) == (
        f"--from: stays as it was at the first command. Received: {date(1)}, and {commands.work} began with {date(0)}. "
        "Give that, or another --work_dir."
    )


def test_events_that_are_late_are_history_only(commands: Commands) -> None:
    commands.add_days(0)
    commands.add_days(1, times=[3, 10, 11])
    commands.loop()
    assert json.loads((commands.work / "days" / date(1) / "prepared.json").read_text())["late_events"] == 1
    assert f"{date(1)}: 3 new events; 1 of them are not later than all before, and are history only" in commands.said
    commands.add_days(2, times=[1, 2, 3, 20])
    for _ in range(2):
        with pytest.raises(InputError) as error:
            commands.loop()
        assert str(error.value) == (
            f"--log: a day must come after those before. Received: {commands.log}/{date(2)}.csv, where 3 of 4 events "
            f"are not later than timestamp 11, the last of the days before. Correct the times of one of them; delete "
            f"{commands.work} to begin anew."
        )
    commands.add_days(2)
    assert commands.loop()["version"] == 20261103


def test_what_is_forgotten_is_neither_late_nor_lost(commands: Commands) -> None:
    commands.add_days(0)
    commands.add_days(1, times=[3, 10, 11])
    commands.loop()
    commands.add_days(2)  # the four events that stay; of seven, two that are left out came after day 1
    commands.forgotten = {"min_item_events": 0, "forget_after": 9, "events": 3, "newer_events": 2}
    commands.forgotten |= {"items": {"ids": 2}, "users": {"ids": 1}}
    commands.loop()
    found = json.loads((commands.work / "days" / date(2) / "prepared.json").read_text())
    assert (found["new_events"], found["late_events"]) == (7, 1)
    assert f"{date(2)}: forgotten (--forget_after=9): 2 items, 1 users, with 3 events" in commands.said


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (75, "2026-11-02: stopped during launch. The same command goes on."),
        (2, "2026-11-02: launch must succeed. Received: its exit code 2. The same command does it again."),
    ],
)
def test_a_command_that_fails_ends_it(commands: Commands, code: int, line: str) -> None:
    commands.add_days(0, 1)
    commands.codes = {(date(1), "launch"): code}
    with pytest.raises(LoopEnded) as end:
        commands.loop()
    assert (end.value.code, str(end.value)) == (code, line)
    commands.codes = {}
    assert commands.loop()["version"] == 20261102


def test_an_export_of_another_job_is_replaced(commands: Commands) -> None:
    """The user deleted the records of a day to do it again."""
    commands.add_days(0)
    commands.loop()
    for path in (commands.work / "days" / date(0)).iterdir():
        path.unlink()
    manifest = commands.work / "versions" / "20261101" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("flags of", "other flags of"))
    commands.loop()
    assert "--overwrite" in commands.words
    assert "other" not in manifest.read_text()


@pytest.mark.parametrize("damage", ["", "[]", "{"])
def test_a_damaged_record_is_one_clear_line(commands: Commands, damage: str) -> None:
    commands.add_days(0, 1)
    commands.loop()
    path = commands.work / "days" / date(1) / "prepared.json"
    path.write_text(damage)
    commands.add_days(2)
    with pytest.raises(
        InputError, match="prepared.json: must be as it was written. Received: .*. Delete it, and the ph"
    ):
        commands.loop()
