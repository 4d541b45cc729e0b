"""The settings of daily training, checked when they are built; `cli/daily.py` makes a flag of each."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import re
from typing import ClassVar

from din_dist.config.settings import Settings, flagless, path_setting, require, setting, source_setting, text_setting

_QUALITY, _KEPT = "quality", "what is kept"
_DATE_REMEDY = "Write it as 2026-11-01."


class Period(enum.StrEnum):
    """How much time the files of one date hold."""

    DAY = "day"
    WEEK = "week"
    MONTH = "month"

    def after(self, date: datetime.date) -> datetime.date:
        """Returns the beginning of the period after the one that begins with `date`."""
        if self is Period.MONTH:
            return (date.replace(day=1) + datetime.timedelta(days=31)).replace(day=date.day)
        return date + datetime.timedelta(days=7 if self is Period.WEEK else 1)


class QualityMetric(enum.StrEnum):
    GAUC = "gauc"
    AUC = "auc"
    LOG_LOSS = "log_loss"

    def drop(self, before: float, now: float) -> float:
        """Returns by which share of the value before the quality fell; negative if it rose."""
        return (now - before if self is QualityMetric.LOG_LOSS else before - now) / before


def date_of(name: str, text: str) -> datetime.date:
    """Returns the date that a flag names.

    Args:
        name: of the flag.
        text: its value.

    Raises:
        InputError: it is no date.
    """
    try:
        if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII):
            raise ValueError(text)
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        require(False, "must be a date", name, text, _DATE_REMEDY)
        raise AssertionError from error


def _check_log(name: str, value: str) -> None:
    remedy = "Give the folder that has a file or a folder for each day."
    require(bool(value), "must name your log", name, value, remedy)


def _check_work_dir(name: str, value: str) -> None:
    require(bool(value), "must name a folder", name, value, "For example runs/daily.")


def _check_date(name: str, value: str) -> None:
    if value:
        date_of(name, value)


@dataclasses.dataclass(frozen=True)
class DailyConfig(Settings):
    """Settings of daily training: where the days lie, when to stop, and what is kept."""

    THEME: ClassVar[str] = "days"

    log: str = source_setting(
        "",
        "Folder of your log, with a file or a folder for each day: 2026-11-01.parquet, day=2026-11-01/ or "
        "2026-11-01/. On this machine or in a store (s3://, gs://, abfs://, hdfs://).",
    )
    work_dir: str = path_setting(
        "runs/daily",
        "Folder of all results: versions/NUMBER has the exports, which `serve` takes. One command at a time.",
        check=_check_work_dir,
    )
    period: Period = setting(
        Period.DAY, "How much time one date of --log stands for: day, week or month. The date is its beginning."
    )
    skip_missing: bool = setting(
        False, "Go on without a day that is missing before a later one. It stays left out, even if it comes later."
    )
    quality_metric: QualityMetric = setting(
        QualityMetric.GAUC,
        "What is compared between a day and the one before: gauc, auc or log_loss of the model that has not yet "
        "trained on the day.",
        theme=_QUALITY,
    )
    largest_drop: float = setting(
        0.05,
        "Stop before training if --quality_metric is worse than on the day before by more than this share of it.",
        at_least=0,
        below=1,
        theme=_QUALITY,
    )
    accept_drop: str = text_setting(
        "", "A date on which to go on although the quality fell. Default: none.", check=_check_date, theme=_QUALITY
    )
    keep: int = setting(
        3,
        "Newest days whose exports, jobs and prepared data are kept. Each prepared day has the whole log up to it. "
        "The records of all days are kept.",
        at_least=1,
        theme=_KEPT,
    )
    begins: str = flagless("")  # --from, which is no name of Python

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_log("log", self.log)
        require(bool(self.begins), "must name the first day", "from", self.begins, _DATE_REMEDY)
        first = date_of("from", self.begins)
        fits = self.period is not Period.MONTH or first.day <= 28
        require(fits, "with --period=month must be at most the 28th", "from", self.begins, "For example the 1st.")

    @property
    def first(self) -> datetime.date:
        """The first day."""
        return date_of("from", self.begins)
