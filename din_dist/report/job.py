"""Reads the records in a job's output directory. Nothing there is changed, because the job may still run."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from din_dist.errors import InputError
from din_dist.files import is_locked, read_record
from din_dist.text import is_integer, parse_json

Line = dict[str, Any]
_OTHER = "other"


class Status(enum.StrEnum):
    FINISHED = "finished"
    RUNNING = "running"
    STOPPED = "stopped on request"
    FAILED = "failed"
    BROKEN_OFF = "broken off"


@dataclasses.dataclass(frozen=True)
class JobRecord:
    """The records of a job.

    Attributes:
        folder: the output directory.
        lines: of metrics.jsonl, in order.
        num_unreadable: lines that were cut or damaged and are left out.
        flags: the content of flags.txt, if it is there.
        summary: the content of summary.json, if it is there.
        status: of the job.
    """

    folder: Path
    lines: Sequence[Line]
    num_unreadable: int
    flags: str | None
    summary: Line | None
    status: Status

    def of_kind(self, kind: str) -> list[Line]:
        return [line for line in self.lines if line.get("kind") == kind]

    def curve(self, kind: str) -> list[Line]:
        """Returns the lines of a kind by ascending step.

        A job that resumes from a checkpoint repeats some steps; the earlier lines of these steps are left out.
        """
        kept: list[Line] = []
        for line in self.lines:
            step = number(line, "step")
            if step is None or line.get("kind") not in (kind, "start"):
                continue
            starts = line["kind"] == "start"
            while kept and kept[-1]["step"] >= step + starts:
                kept.pop()
            if not starts:
                kept.append(line)
        return kept

    def phases(self) -> tuple[dict[str, float], str]:
        """Returns the seconds of the whole job by phase, and a text that says where they come from.

        What no phase has of the total that a job reported is `other`.
        """
        ends = [
            line["seconds_by_phase"] for line in self.of_kind("end") if isinstance(line.get("seconds_by_phase"), dict)
        ]
        if ends:
            runs = max(len(ends), len(self.of_kind("start")))
            source = "as the job reported at its end" if runs == 1 else f"{len(ends)} of {runs} runs, as they reported"
        elif self.summary and isinstance(self.summary.get("seconds"), dict):
            ends, source = [self.summary["seconds"]], "the last run, from its summary"
        else:
            ends, source = [self._phases_of_lines()], "so far, added up from metrics.jsonl"
        seconds: dict[str, float] = {}
        for phases in ends:
            found = {str(name): value for name in phases if (value := number(phases, name))}
            if rest := max(0.0, found.pop("total", 0.0) - sum(found.values())):
                found[_OTHER] = rest + found.get(_OTHER, 0.0)
            for name, value in found.items():
                seconds[name] = seconds.get(name, 0.0) + value
        return seconds, source

    def step_parts(self) -> dict[str, float]:
        """Returns the mean seconds of each part of an update that the job has measured."""
        parts = {}
        for name in ("input_wait", "compute", "exchange", "update"):
            found = [value for line in self.of_kind("train") if (value := number(line, f"{name}_seconds")) is not None]
            if found:
                parts[name] = sum(found) / len(found)
        return parts if any(parts.values()) else {}

    def _phases_of_lines(self) -> dict[str, float]:
        seconds = {}
        for kind in ("validation", "test", "checkpoint"):
            seconds[kind] = sum(number(line, "seconds") or 0.0 for line in self.of_kind(kind))
        seconds["training"] = 0.0
        for before, line in zip([{"step": 0}, *self.of_kind("train")], self.of_kind("train"), strict=False):
            steps = max(0.0, (number(line, "step") or 0) - (number(before, "step") or 0))
            each = (number(line, "step_seconds") or 0.0) + (number(line, "input_wait_seconds") or 0.0)
            seconds["training"] += steps * each
        return seconds


@dataclasses.dataclass(frozen=True)
class Event:
    """An event in the life of the job, such as a restart; for `seconds` see `Timeline`."""

    seconds: float
    step: int | None
    text: str


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The speed over time. Seconds count from the job's first line, without the time between its runs."""

    seconds: list[float]
    examples_per_second: list[float]
    events: list[Event]


def timeline(lines: Sequence[Line]) -> Timeline:
    """Returns the speed over time, and the events, from the lines of metrics.jsonl."""
    found = Timeline([], [], [])
    begin = before = next((time for line in lines if (time := number(line, "time")) is not None), 0.0)
    world_size: float | None = None
    for line in lines:
        kind, time, step = line.get("kind"), number(line, "time"), number(line, "step")
        if time is None:
            continue
        ranks = number(line, "world_size")
        at_step = None if step is None else int(step)
        if kind == "start" and (found.seconds or step):
            pause = max(0.0, time - before)
            begin += pause
            text = (
                f"went on with {_workers(ranks)} after {duration(pause)}"
                if ranks
                else f"went on after {duration(pause)}"
            )
            found.events.append(Event(time - begin, at_step, text))
        elif kind == "elastic":
            words = f"{line.get('event', 'elastic event')}"
            found.events.append(Event(time - begin, at_step, f"{words} ({_workers(ranks)})" if ranks else words))
        elif kind != "start" and ranks and world_size and ranks != world_size:
            found.events.append(Event(time - begin, at_step, f"{_workers(world_size)} became {_workers(ranks)}"))
        world_size, before = ranks or world_size, time
        rate = number(line, "examples_per_second")
        if kind == "train" and rate:
            found.seconds.append(time - begin)
            found.examples_per_second.append(rate)
    return found


def read_job(folder: Path, flag: str = "output_dir") -> JobRecord:
    """Reads the records in `folder`. Files may be missing, and the last line may be cut if the job was killed.

    Args:
        folder: of the job.
        flag: the name of the flag that gave the folder, for errors.

    Raises:
        InputError: the folder is not that of a job.
    """
    log, flags = folder / "metrics.jsonl", folder / "flags.txt"
    if not log.is_file() and not flags.is_file():
        raise InputError(
            f"--{flag}: must be the folder of a training job. Received: {folder}, which has neither flags.txt nor "
            "metrics.jsonl. Give the --output_dir that the job was given."
        )
    lines, num_unreadable = _read_lines(log)
    summary = _read_object(folder / "summary.json")
    with _reading(flags):
        flags_of_job = read_record(flags, errors="replace") if flags.is_file() else None
    return JobRecord(
        folder=folder,
        lines=lines,
        num_unreadable=num_unreadable,
        flags=flags_of_job,
        summary=summary,
        status=_status(folder, lines, summary),
    )


def number(line: Line, name: str) -> float | None:
    """Returns the value of that name, or None if it is not a finite number."""
    value = line.get(name)
    ok = is_integer(value) or (isinstance(value, float) and math.isfinite(value))
    return value if ok else None


def duration(seconds: float) -> str:
    """Returns a time for people: `"0.6 s"`, `"45 s"`, `"12 min"`, `"3.2 h"`, `"2.5 days"`."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size or (unit == "min" and seconds >= size):
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 or seconds == 0 else f"{seconds:.1f} s"


def _workers(number_of: float) -> str:
    return "1 worker" if number_of == 1 else f"{number_of:,.0f} workers"


def _status(folder: Path, lines: Sequence[Line], summary: Line | None) -> Status:
    if is_locked(folder / ".lock"):
        return Status.RUNNING
    last = lines[-1] if lines else {}
    if last.get("kind") == "end" and last.get("outcome") in ("stopped", "failed"):
        return Status.STOPPED if last["outcome"] == "stopped" else Status.FAILED
    if last.get("kind") == "end" and last.get("outcome") == "done":
        return Status.FINISHED
    # The summary of an earlier run stays if the job is resumed, with more epochs for example.
    if summary and (folder / "summary.json").stat().st_mtime >= (number(last, "time") or 0.0) - 1:
        return Status.FINISHED
    return Status.BROKEN_OFF


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: must be a file that can be read. Received: {error.strerror}. Give rights to read it."
        ) from error


def _read_lines(path: Path) -> tuple[list[Line], int]:
    lines, num_unreadable = [], 0
    with _reading(path):
        content = read_record(path, errors="replace") if path.is_file() else ""
    for text in content.splitlines():
        try:
            line = parse_json(text)
        except ValueError:
            line = None
        if isinstance(line, dict):
            lines.append(line)
        else:
            num_unreadable += 1
    return lines, num_unreadable


def _read_object(path: Path) -> Line | None:
    try:
        found = parse_json(read_record(path))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
