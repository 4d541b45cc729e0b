"""The loop over days: prepare, evaluate yesterday's model, train, export; each phase is done, or done again."""

from __future__ import annotations

import datetime
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from din_dist.daily.periods import find_days
from din_dist.daily.records import DayPhase, WorkFolder, version_of
from din_dist.daily.settings import DailyConfig, QualityMetric, date_of
from din_dist.data.event_store import PACKED_DIR, read_facts, reading_prepared
from din_dist.data.extension import Extension
from din_dist.data.forgetting import shown_forgotten
from din_dist.errors import EXIT_DAY_MISSING, EXIT_QUALITY_FELL, EXIT_RETRY, InputError
from din_dist.files import is_locked, read_record
from din_dist.serving.manifest import Manifest, read_manifest
from din_dist.text import parse_json

# Runs a command by the name of its module, with these flags after the user's; returns its exit code.
Run = Callable[[str, Sequence[str]], int]

_NEVER = 2**63 - 1  # a time that no event reaches: nothing is held out
_MOST_LATE = 0.5  # of a day's events
_LOCK_SECONDS = 120.0  # for the workers of a command that was killed
_KEPT_NUMBERS = ("num_examples", "num_users", "num_users_skipped", "intervals", "floors", "step")


class LoopEnded(Exception):
    """The loop ends before all days are done.

    Attributes:
        code: the exit code.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Loop:
    """Daily training.

    Args:
        config: its settings.
        run: runs the other commands.
        say: prints a line for people.
    """

    def __init__(self, config: DailyConfig, run: Run, say: Callable[[str], None]) -> None:
        self._config, self._run, self._say = config, run, say
        self._work = WorkFolder(Path(config.work_dir))

    def run(self) -> dict[str, Any]:
        """Does all days that are due; returns what the last line on stdout holds.

        Raises:
            InputError: something of the user's is wrong.
            LoopEnded: the quality fell, a day is missing, or a command failed.
            OSError: the work folder cannot be written.
        """
        config = self._config
        days = find_days(config.log)
        self._require_period(list(days))
        self._work.begin({"from": config.begins, "period": str(config.period)})
        done_before = self._work.finished()
        self._prune()
        for date in self._due(list(days)):
            self._do(date, days[date])
            self._prune()
        finished = self._work.finished()
        if finished == done_before:
            self._say(f"nothing to do: {f'{finished[-1]} is the newest day' if finished else 'no day is there yet'}")
        return {
            "new_days": [str(date) for date in finished if date not in done_before],
            "version": version_of(finished[-1]) if finished else None,
            "export_dir": str(self._work.versions),
            "days": [self._summary(date) for date in finished],
        }

    # --- Which days are due. ---

    def _require_period(self, dates: Sequence[datetime.date]) -> None:
        """Refuses dates that no period begins with."""
        config = self._config
        expected = config.first
        for date in dates:
            while expected < date:
                expected = config.period.after(expected)
            if config.first <= date != expected:
                raise InputError(
                    f"--log: with --period={config.period} must have dates that are one {config.period} apart, from "
                    f"--from={config.begins} on. Received: {date}. Correct its name, or give another --period."
                )

    def _due(self, dates: Sequence[datetime.date]) -> Iterator[datetime.date]:
        """Yields the days to do, in order."""
        config, finished = self._config, self._work.finished()
        late = [date for date in dates if finished and config.first <= date < finished[-1] and date not in finished]
        for date in late:
            self._say(f"passed over: {date}, because it came after {finished[-1]} was done")
        expected = config.period.after(finished[-1]) if finished else config.first
        while dates[-1] >= expected:
            if expected in dates:
                yield expected
            else:
                later = next(date for date in dates if date > expected)
                if not config.skip_missing:
                    raise LoopEnded(
                        EXIT_DAY_MISSING,
                        f"--log: days must come in order. Received: {later} in {config.log}, but not {expected}. Once "
                        f"it is there, the same command goes on; --skip_missing goes on without it.",
                    )
                self._say(f"left out: {expected}, because it is missing")
            expected = config.period.after(expected)

    # --- The phases of a day. ---

    def _do(self, date: datetime.date, source: str) -> None:
        finished = self._work.finished()
        before = finished[-1] if finished else None
        self._work.make_day(date)
        if not self._work.read(date, DayPhase.PREPARED):
            self._prepare(date, source, before)
        if before:
            if not self._work.read(date, DayPhase.EVALUATED):
                self._evaluate(date, before)
            self._require_quality(date, before)
        if not self._work.read(date, DayPhase.TRAINED):
            self._train(date, before)
        if not self._work.read(date, DayPhase.EXPORTED):
            self._export(date)
        self._say(f"{date}: done, its version is {self._work.export(date)}")

    def _prepare(self, date: datetime.date, source: str, before: datetime.date | None) -> None:
        """Prepares the day's events behind those of the days before."""
        for folder in (self._work.prepared(date), self._work.job(date)):  # what begins anew begins from nothing
            self._work.delete(folder)
        train_from = 0 if before is None else self._record(before, DayPhase.PREPARED)["last_timestamp"] + 1
        where = self._where(date, source, before)
        split = self._split(train_from) if before else self._split(_NEVER)
        self._command(date, "prepare_data", [*where, *split, f"--output_dir={self._work.job(date)}"])
        folder = Extension(str(self._work.prepared(date))).find()
        facts = read_facts(folder)
        gone = facts.forgotten or {"events": 0, "newer_events": 0}
        num_new = facts.num_events + gone["events"] - (facts.extends["events"] if facts.extends else 0)
        num_late = num_new - _num_from(folder, train_from) - gone["newer_events"] if before else 0
        if num_late > _MOST_LATE * num_new:
            raise InputError(
                f"--log: a day must come after those before. Received: {source}, where {num_late:,} of {num_new:,} "
                f"events are not later than timestamp {train_from - 1}, the last of the days before. Correct the times "
                f"of one of them; delete {self._work.root} to begin anew."
            )
        late = f"; {num_late:,} of them are not later than all before, and are history only" if num_late else ""
        self._say(f"{date}: {num_new:,} new events{late}")
        if facts.forgotten:
            self._say(f"{date}: {shown_forgotten(facts.forgotten)}")
        values = {
            "source": source,
            "events": facts.num_events,
            "new_events": num_new,
            "late_events": num_late,
            "train_from": train_from,
            "last_timestamp": facts.last_timestamp,
            "forgotten": facts.forgotten,
            "fingerprint": facts.fingerprint,
        }
        self._work.write(date, DayPhase.PREPARED, values)

    def _evaluate(self, date: datetime.date, before: datetime.date) -> None:
        """Evaluates the model of the day before on the day's events, which it has not seen."""
        prepared, path = self._record(date, DayPhase.PREPARED), self._work.evaluation(date)
        flags = [
            f"--output_dir={self._work.job(before)}",
            f"--evaluation_from={prepared['train_from']}",
            "--rank_against=none",
            f"--evaluation_path={path}",
        ]
        where = [flag for flag in self._where(date, prepared["source"], before) if not flag.startswith("--dataset=")]
        self._command(date, "evaluate", [*flags, *where])
        found = parse_json(read_record(path))
        numbers = {name: found.get(name) for name in (*QualityMetric, *_KEPT_NUMBERS)}
        self._work.write(date, DayPhase.EVALUATED, {"model_of": str(before), **numbers})
        self._say(f"{date}: the model of {before} has {self._shown(date)} on {found['num_examples']:,} examples")

    def _require_quality(self, date: datetime.date, before: datetime.date) -> None:
        """Refuses a day on which yesterday's model is much worse than the one before was on yesterday's events."""
        config, metric = self._config, self._config.quality_metric
        now = self._record(date, DayPhase.EVALUATED)[metric]
        if now is None:
            raise InputError(
                f"--quality_metric: must have a value on each day. Received: no {metric} on {date}, whose users have "
                "examples of one label each. Give --quality_metric=log_loss, or longer periods."
            )
        evaluated = self._work.read(before, DayPhase.EVALUATED)
        then = evaluated[metric] if evaluated else None  # the first day has no model before it
        if then is None:
            return
        drop = metric.drop(then, now)
        if drop <= config.largest_drop:
            return
        worse = f"{drop:.1%} worse than {then:.4f} one {config.period} before"
        text = f"{metric} {now:.4f} of the model of {before}, {worse}"
        if config.accept_drop and date_of("accept_drop", config.accept_drop) == date:
            self._say(f"{date}: goes on as --accept_drop says, with {text}")
            return
        raise LoopEnded(
            EXIT_QUALITY_FELL,
            f"{date}: --quality_metric must not fall by more than --largest_drop={config.largest_drop:g}. Received: "
            f"{text}. Nothing is trained, and version {version_of(before)} stays the newest. Look at the log of that "
            f"day; --accept_drop={date} goes on.",
        )

    def _train(self, date: datetime.date, before: datetime.date | None) -> None:
        """Trains on the day's events, once, from the model of the day before; on the first day from the start."""
        prepared, folder = self._record(date, DayPhase.PREPARED), self._work.job(date)
        flags = [*self._where(date, prepared["source"], before), *self._split(_NEVER), f"--output_dir={folder}"]
        if before:
            flags += ["--epochs=1", f"--train_from={prepared['train_from']}"]
            flags += [f"--warm_start_from={self._work.job(before)}"]
        patience = time.monotonic() + _LOCK_SECONDS
        while is_locked(folder / ".lock") and time.monotonic() < patience:  # by workers that save what they have
            time.sleep(0.1)
        self._command(date, "launch", flags)
        self._work.write(date, DayPhase.TRAINED, {"output_dir": str(folder)})

    def _export(self, date: datetime.date) -> None:
        """Exports the day's model under the day's number."""
        folder, manifest = self._work.export(date), self._published(date)
        if manifest is None:
            flags = [f"--output_dir={self._work.job(date)}", f"--export_dir={folder}"]
            self._command(date, "export", [*flags, *(["--overwrite"] if folder.exists() else [])])
            manifest = read_manifest(folder)
        values = {"version": version_of(date), "step": manifest.step, "digest": manifest.digest}
        self._work.write(date, DayPhase.EXPORTED, values)

    def _published(self, date: datetime.date) -> Manifest | None:
        """Returns the manifest of an export of the day's job that was not recorded any more; None if there is none."""
        try:
            manifest = read_manifest(self._work.export(date))
            flags_of_job = read_record(self._work.job(date) / "flags.txt", errors="replace")
        except (InputError, OSError):
            return None
        same = manifest.data_fingerprint == self._record(date, DayPhase.PREPARED)["fingerprint"]
        return manifest if same and manifest.flags == flags_of_job else None

    def _command(self, date: datetime.date, name: str, flags: Sequence[str]) -> None:
        """Runs a command, which must succeed."""
        self._say(f"{date}: {name}")
        code = self._run(name, flags)
        if code == EXIT_RETRY:
            raise LoopEnded(code, f"{date}: stopped during {name}. The same command goes on.")
        if code:
            raise LoopEnded(
                code, f"{date}: {name} must succeed. Received: its exit code {code}. The same command does it again."
            )

    def _where(self, date: datetime.date, source: str, before: datetime.date | None) -> list[str]:
        """Returns the flags that say where the day's data lies."""
        extend = [f"--extend={self._work.prepared(before)}"] if before else ["--extend="]
        return ["--dataset=event_log", f"--data_path={source}", f"--data_dir={self._work.prepared(date)}", *extend]

    @staticmethod
    def _split(time_: int) -> list[str]:
        """Returns the flags that hold out all events from a timestamp on."""
        return ["--split=temporal", f"--validation_from={time_}", f"--test_from={time_}"]

    # --- What is kept and shown. ---

    def _prune(self) -> None:
        """Deletes exports, jobs and prepared data of older days. The next day goes on from the newest one's."""
        for date in self._work.finished()[: -self._config.keep]:
            for folder in (self._work.export(date), self._work.job(date), self._work.prepared(date)):
                self._work.delete(folder)

    def _record(self, date: datetime.date, phase: DayPhase) -> dict[str, Any]:
        values = self._work.read(date, phase)
        if values is None:
            raise InputError(
                f"{self._work.root}: must have the records of finished phases. Received: none that {date} was {phase}. "
                "Name another --work_dir to begin anew."
            )
        return values

    def _shown(self, date: datetime.date) -> str:
        found = self._record(date, DayPhase.EVALUATED)
        parts = [f"{name} {found[name]:.4f}" for name in QualityMetric if found[name] is not None]
        return ", ".join(parts) or "no metric"

    def _summary(self, date: datetime.date) -> dict[str, Any]:
        evaluated = self._work.read(date, DayPhase.EVALUATED) or {}
        numbers = {str(name): evaluated.get(name) for name in (*QualityMetric, "num_examples")}
        return {"date": str(date), "version": version_of(date), **numbers}


def _num_from(folder: Path, time_: int) -> int:
    """Returns how many prepared events are not earlier than a timestamp."""
    path = folder / PACKED_DIR / "timestamps.npy"
    with reading_prepared(path):  # checksums are left to those who learn from it: they import TensorFlow
        times = np.load(path, mmap_mode="r", allow_pickle=False)
    parts = itertools.pairwise([*range(0, len(times), 1 << 22), len(times)])
    return sum(int(np.count_nonzero(times[first:end] >= time_)) for first, end in parts)
