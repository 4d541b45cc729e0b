"""What is read from a job's folder, whatever is missing from it."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
from pathlib import Path

import pytest

from din_dist.errors import InputError
from din_dist.report import job
from din_dist.report.job import Status, duration, number, read_job, timeline


def write(folder: Path, *lines: dict, summary: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def train(step: int, time: float = 0.0, **values: object) -> dict:
    return {"kind": "train", "step": step, "time": time, "loss": step / 10, **values}


def test_a_folder_that_is_no_job(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="must be the folder of a training job"):
            read_job(folder)


def test_a_cut_last_line_is_left_out_and_counted(tmp_path: Path) -> None:
    write(tmp_path, train(1))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "step": 2, "text": "\xc3')
    record = read_job(tmp_path)
    assert [line["step"] for line in record.lines] == [1]
    assert record.num_unreadable == 1


def test_what_another_has_written_into_a_job(tmp_path: Path) -> None:
    """Numbers that no float holds, and nesting without end."""
    write(tmp_path, train(1), summary={"steps": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"train","step":1' + "0" * 400 + ',"time":1}\n')
        file.write("[" * 100_000 + "\n")
    (tmp_path / "summary.json").write_text("[" * 100_000)
    record = read_job(tmp_path)
    assert record.num_unreadable == 1
    assert record.summary is None
    assert timeline(record.lines)


def test_a_pipe_in_the_place_of_a_summary(tmp_path: Path) -> None:
    write(tmp_path, train(1))
    os.mkfifo(tmp_path / "summary.json")
    assert read_job(tmp_path).summary is None


@pytest.mark.parametrize("name", ["metrics.jsonl", "flags.txt"])
def test_a_record_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write(tmp_path, train(1))
    (tmp_path / "flags.txt").write_text("")

    def denied(path: Path, *, errors: str = "strict") -> str:
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return ""

    monkeypatch.setattr(job, "read_record", denied)  # root may read all
    with pytest.raises(InputError, match=rf"{name}: must be a file that can be read. Received: Permission denied\."):
        read_job(tmp_path)


@pytest.mark.parametrize(
    ("last", "summary", "status"),
    [
        (train(1), None, Status.BROKEN_OFF),
        (train(1), {"steps": 1}, Status.FINISHED),
        (train(9, time=1e12), {"steps": 1}, Status.BROKEN_OFF),  # it went on after that summary
        ({"kind": "end", "outcome": "done"}, None, Status.FINISHED),
        ({"kind": "end", "outcome": "stopped"}, None, Status.STOPPED),
        ({"kind": "end", "outcome": "failed"}, {"steps": 1}, Status.FAILED),
    ],
)
def test_how_it_ended(tmp_path: Path, last: dict, summary: dict | None, status: Status) -> None:
    assert read_job(write(tmp_path, last, summary=summary)).status is status


def test_a_job_at_work_holds_its_lock_and_keeps_it(tmp_path: Path) -> None:
    """As `claim_output_dir` does; reading neither takes the lock nor needs it."""
    write(tmp_path, train(1), summary={"steps": 1})
    with (tmp_path / ".lock").open("a") as lock:
        assert read_job(tmp_path).status is Status.FINISHED
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert read_job(tmp_path).status is Status.RUNNING


def test_steps_that_were_done_anew_count_once(tmp_path: Path) -> None:
    """Steps 3 and 4 were lost with the process; the run after it starts from the checkpoint of step 2."""
    lines = [train(1), train(2), train(3), train(4), {"kind": "start", "step": 2, "time": 0}, train(3, loss=0.9)]
    record = read_job(write(tmp_path, *lines))
    assert [(line["step"], line["loss"]) for line in record.curve("train")] == [(1, 0.1), (2, 0.2), (3, 0.9)]


def test_validation_at_a_step_of_the_start_stays(tmp_path: Path) -> None:
    lines = [{"kind": "validation", "step": 2, "gauc": 0.6}, {"kind": "start", "step": 2}, train(3)]
    assert len(read_job(write(tmp_path, *lines)).curve("validation")) == 1


def test_time_between_runs_is_left_out() -> None:
    """100 s, a night of 50,000 s, and 30 s: the second run's line stands at 130 s."""
    found = timeline(
        [
            {"kind": "start", "time": 1000, "step": 0, "world_size": 2},
            train(1, time=1100, examples_per_second=500.0, world_size=2),
            {"kind": "start", "time": 51100, "step": 1, "world_size": 3},
            train(2, time=51130, examples_per_second=700.0, world_size=3),
        ]
    )
    assert (found.seconds, found.examples_per_second) == ([100, 130], [500.0, 700.0])
    (event,) = found.events
    assert (event.seconds, event.step, event.text) == (100, 1, "went on with 3 workers after 14 h")


def test_elastic_events_and_silent_changes_of_size() -> None:
    lines = [
        train(1, time=10, world_size=4),
        {"kind": "elastic", "time": 20, "step": 1, "world_size": 3, "event": "lost a host"},
        train(2, time=30, world_size=3),
        train(3, time=40, world_size=2),
        {"kind": "elastic", "time": 50},
    ]
    found = timeline(lines)
    assert [(event.seconds, event.text) for event in found.events] == [
        (10, "lost a host (3 workers)"),
        (30, "3 workers became 2 workers"),
        (40, "elastic event"),
    ]
    assert found.seconds == []


def test_where_the_time_went(tmp_path: Path) -> None:
    """Told by the ends of all runs, else by the summary, else added up: 10 updates of .3 s, a validation of 3 s."""
    ends = [{"kind": "end", "seconds_by_phase": {"training": seconds, "start": 1.0}} for seconds in (10, 5)]
    assert read_job(write(tmp_path, *ends, summary={"seconds": {"training": 9}})).phases()[0] == {
        "training": 15,
        "start": 2.0,
    }
    summary = {"seconds": {"training": 9.0, "test": None, "total": 12.0}}
    assert read_job(write(tmp_path, train(1), summary=summary)).phases()[0] == {"training": 9.0, "other": 3.0}
    ends = [{"kind": "end", "seconds_by_phase": {"training": 10, "start": 1.0, "total": total}} for total in (12, 11)]
    assert read_job(write(tmp_path, *ends)).phases()[0] == {"training": 20, "start": 2.0, "other": 1.0}
    (tmp_path / "summary.json").unlink()
    lines = [train(10, step_seconds=0.2, input_wait_seconds=0.1), {"kind": "validation", "step": 10, "seconds": 3.0}]
    assert read_job(write(tmp_path, *lines)).phases()[0] == {"training": pytest.approx(3.0), "validation": 3.0}


def test_parts_of_an_update_are_means_of_the_lines_that_tell(tmp_path: Path) -> None:
    lines = [train(1, compute_seconds=0.1, exchange_seconds=None), train(2, compute_seconds=0.3), train(3)]
    assert read_job(write(tmp_path, *lines)).step_parts() == {"compute": pytest.approx(0.2)}
    assert read_job(write(tmp_path, train(1))).step_parts() == {}


def test_only_finite_numbers_are_numbers() -> None:
    line = {"a": 1, "b": math.inf, "c": "1", "d": None, "e": True}
    assert [number(line, name) for name in "abcdef"] == [1, None, None, None, None, None]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.62, "0.6 s"), (45, "45 s"), (60, "1.0 min"), (720, "12 min"), (11_520, "3.2 h"), (216_000, "2.5 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
