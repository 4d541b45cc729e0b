"""Log lines and a progress bar for people, or JSON lines for log collectors, all on stderr."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from din_dist.config import LogFormat
from din_dist.streams import tolerant
from din_dist.text import duration, printable, to_json


def format_line(text: str, log_format: LogFormat, *, rank: int, level: str = "info", **fields: Any) -> str:
    """Returns one line of a log, as text or as JSON. `fields` are the values in `text`, for JSON only."""
    if log_format is LogFormat.TEXT:
        return printable(text if level == "info" else f"{level}: {text}")
    return to_json({"time": time.time(), "level": level, "rank": rank, "message": text, **fields})


class Terminal:
    """The chief's log lines and progress bar. Other ranks have a `silent` one.

    Args:
        log_format: text or JSON lines.
        num_steps: the length of the bar.
        silent: show nothing.
        unit: the unit of the bar.
    """

    def __init__(self, log_format: LogFormat, num_steps: int, *, silent: bool, unit: str = "step") -> None:
        self._format, self._silent = log_format, silent
        self._num_steps = num_steps
        self._bar: tqdm | None = None
        self._file = None if silent or log_format is LogFormat.JSON else _terminal()
        if self._file:
            self._bar = tqdm(
                total=num_steps,
                unit=unit,
                file=self._file,
                dynamic_ncols=True,
                smoothing=0.05,
                bar_format="{percentage:3.0f}% |{bar}| {unit} {n_fmt}/{total_fmt}, {remaining} left{postfix}",
            )

    def say(self, text: str, *, level: str = "info", **fields: Any) -> None:
        """Writes one line; for `fields` see `format_line`."""
        if self._silent:
            return
        line = format_line(text, self._format, rank=0, level=level, **fields)
        if self._bar is not None:
            self._bar.write(line, file=self._bar.fp)
        else:
            print(line, file=sys.stderr, flush=True)

    @property
    def has_bar(self) -> bool:
        return self._bar is not None

    def go_to(self, step: int) -> None:
        """Moves the bar to `step`, where a resumed job begins."""
        if self._bar is not None:
            self._bar.n = self._bar.initial = step
            self._bar.refresh()

    def advance(self, count: int = 1) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def show_progress(self, step: int, loss: float, rate: float, seconds_left: float, fields: dict[str, Any]) -> None:
        left = f", {duration(seconds_left)} left" if rate else ""
        found = f"loss {loss:.4f}, {rate:,.0f} examples/s"
        self.show(found, f"step {step:,} of {self._num_steps:,}: {found}{left}", step=step, **fields)

    def show(self, found: str, line: str, **fields: Any) -> None:
        """Shows `found` beside the bar, or the whole `line` if there is no bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(found)
        else:
            self.say(line, **fields)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._file is not None and self._file is not sys.stderr:
            self._file.close()


def _terminal() -> TextIO | None:
    """Returns a stream for a progress bar: stderr, or the launcher's terminal if horovodrun has replaced stderr."""
    if sys.stderr.isatty():
        return sys.stderr
    path = os.environ.get("DIN_DIST_PROGRESS_TTY")
    try:
        return tolerant(Path(path).open("w", encoding="utf-8")) if path else None
    except OSError:  # the chief runs on another machine than the launcher
        return None
