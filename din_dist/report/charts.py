"""Charts as small SVGs inside the page itself.

These few shapes take a page of Python. Their colours come from the page's style sheet, and the browser's own tooltips
(`<title>`) show exact values. Two alternatives were rejected:

- matplotlib writes each letter as a path (100 KB for such a page) and has its own colours and fonts. Its charts cannot
  follow the reader's dark mode or text size, and every installation would depend on it.
- A script library would run code next to strings from data, which the Content-Security-Policy could not forbid.

All markup is built by `Markup.format`, which escapes everything that is not markup.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup

from din_dist.metrics.calibration import Calibration, CalibrationBin

WIDTH, HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 14, 40
_MOST_POINTS = 300  # points of a line; more would only make the page larger
_MARK_RADIUS = 8
_SHAPES = ("ring", "diamond", "triangle", "square", "cross")

NumberFormat = Callable[[float], str]


@dataclasses.dataclass(frozen=True)
class Series:
    """A line through points, which NaN interrupts. `style` is a class of the style sheet, `main` or `second`."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "main"
    dots: bool = False


@dataclasses.dataclass(frozen=True)
class Mark:
    """A vertical line with a label at its top."""

    x: float
    label: str
    title: str


def compact(value: float) -> str:
    """Returns a short form of a number for axes, such as `"12k"` or `"0.35"`."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{letter}"
    return f"{value:.6g}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Returns at most `most` + 1 round numbers from `low` to `high`.

    They are 1, 2, 2.5 or 5 times a power of ten apart.
    """
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    marks: Sequence[Mark] = (),
    from_zero: bool = False,
    y_format: NumberFormat = compact,
    tip: str = "{name}: {y} at {x}",
) -> Markup:
    """Draws lines over common axes.

    Args:
        series: the lines.
        title: for screen readers.
        x_label: the label of the horizontal axis.
        y_label: the label of the vertical axis.
        marks: vertical lines.
        from_zero: the vertical axis begins at 0.
        y_format: the format of the values on the vertical axis.
        tip: the template of a point's tooltip.
    """
    points = [
        (x, y) for line in series for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x) and math.isfinite(y)
    ]
    if not points:
        return Markup("")
    xs, ys = [x for x, _ in points] + [mark.x for mark in marks], [y for _, y in points]
    frame = _Frame(min(xs), max(xs), 0.0 if from_zero else min(ys), max(ys))
    parts = [frame.axes(x_label, y_label, y_format)]
    parts += _marks(frame, marks)
    for line in series:
        parts.append(_line(frame, line, y_format, tip))
    return _svg(title, parts)


def _marks(frame: _Frame, marks: Sequence[Mark]) -> list[Markup]:
    """Draws a line for each mark, and one label for marks that lie so near that theirs would cover each other."""
    groups: list[list[Mark]] = []
    for mark in sorted(marks, key=lambda mark: mark.x):
        if groups and frame.x(mark.x) - frame.x(groups[-1][-1].x) < 2 * _MARK_RADIUS + 14 * (len(groups[-1]) > 1):
            groups[-1].append(mark)
        else:
            groups.append([mark])
    parts = []
    for group in groups:
        first, last = frame.x(group[0].x), frame.x(group[-1].x)
        label = group[0].label if len(group) == 1 else f"{group[0].label}–{group[-1].label}"
        middle, half = (first + last) / 2, _MARK_RADIUS + 3.2 * (len(label) - 1)
        title = "\n".join(mark.title for mark in group)
        lines = [
            Markup('<line x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(
                frame.x(mark.x), _TOP + _MARK_RADIUS, HEIGHT - _BOTTOM
            )
            for mark in group
        ]
        parts.append(
            Markup(
                '<g class="mark"><title>{}</title>{}<rect x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="{}"/>'
                '<text x="{:.1f}" y="{}" class="in">{}</text></g>'
            ).format(
                title,
                Markup("").join(lines),
                middle - half,
                _TOP - _MARK_RADIUS,
                2 * half,
                2 * _MARK_RADIUS,
                _MARK_RADIUS,
                middle,
                _TOP + 4,
                label,
            )
        )
    return parts


def calibration_chart(curves: Sequence[tuple[str, Calibration]], title: str) -> Markup:
    """Draws the observed rate over the click probability, with 95 % intervals and the diagonal of perfect calibration.

    Args:
        curves: name and calibration of one or two curves; the second one is grey.
        title: for screen readers.
    """
    frame = _Frame(0.0, 1.0, 0.0, 1.0, pad=0.0)
    parts = [frame.axes("mean click probability", "share of positives", compact)]
    diagonal = '<line class="diagonal" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"><title>calibrated</title></line>'
    parts.append(Markup(diagonal).format(frame.x(0), frame.y(0), frame.x(1), frame.y(1)))
    for style, (name, found) in reversed(list(zip(("main", "second"), curves, strict=False))):
        path = " ".join(f"{frame.x(b.predicted):.1f},{frame.y(b.observed):.1f}" for b in found.bins)
        parts.append(Markup('<polyline class="line {} thin" points="{}"/>').format(style, path))
        parts += [_calibration_point(frame, style, name, b) for b in found.bins]
    return _svg(title, parts)


def _calibration_point(frame: _Frame, style: str, name: str, b: CalibrationBin) -> Markup:
    at = frame.x(b.predicted)
    text = (
        f"{name}: {b.num_examples:,} examples given {b.predicted:.1%} on average, {b.observed:.1%} were positive "
        f"(95 % interval {b.low:.1%} to {b.high:.1%})"
    )
    return Markup(
        '<g class="point {}"><title>{}</title>'
        '<line class="interval" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
        '<circle cx="{:.1f}" cy="{:.1f}" r="4"/></g>'
    ).format(style, text, at, at, frame.y(b.low), frame.y(b.high), at, frame.y(b.observed))


def track(values: Mapping[str, float], low: float, high: float, title: str, *, worse: bool = False) -> Markup:
    """Draws one row of a dot plot: the first of `values` as a disc, the others as outlined shapes.

    The row fills the width of its cell, because positions are percentages. A nested `<svg>` keeps each shape's form.

    Args:
        values: by name; the first is the model's.
        low: value at the left end.
        high: value at the right end.
        title: for screen readers.
        worse: the model is worse than the best of the others.
    """
    shown = [(number, name, value) for number, (name, value) in enumerate(values.items()) if math.isfinite(value)]
    parts = [Markup('<line class="rail" x1="0" x2="100%" y1="11" y2="11"/>')]
    if shown and shown[0][0] == 0:
        others = [value for number, _, value in shown if number]
        if others:
            ends = sorted(_percent(value, low, high) for value in (shown[0][2], max(others)))
            css = "gain worse" if worse else "gain"
            parts.append(Markup('<line class="{}" x1="{:.2f}%" x2="{:.2f}%" y1="11" y2="11"/>').format(css, *ends))
    for number, name, value in reversed(shown):  # the model's on top
        parts.append(
            Markup('<svg x="{:.2f}%" class="over"><title>{}</title>{}</svg>').format(
                _percent(value, low, high), f"{name}: {value:.4f}", shape(number)
            )
        )
    return Markup('<svg class="track" height="22" role="img" aria-label="{}">{}</svg>').format(
        title, Markup("").join(parts)
    )


def shape(number: int) -> Markup:
    """Draws the symbol of a ranking around (0, 11): a disc for the model, number 0, and outlined shapes for floors."""
    if number == 0:
        return Markup('<circle class="disc" cx="0" cy="11" r="5.5"/>')
    drawn = {
        "ring": '<circle class="floor" cx="0" cy="11" r="4.2"/>',
        "diamond": '<path class="floor" d="M0 6 5 11 0 16 -5 11Z"/>',
        "triangle": '<path class="floor" d="M0 6.2 5 15 -5 15Z"/>',
        "square": '<path class="floor" d="M-4 7H4V15H-4Z"/>',
        "cross": '<path class="floor" d="M-4 7 4 15M4 7-4 15"/>',
    }
    return Markup(drawn[_SHAPES[(number - 1) % len(_SHAPES)]])


def track_axis(low: float, high: float) -> Markup:
    """Draws the scale above a column of tracks."""
    labels = []
    for value in ticks(low, high, most=4):
        percent = _percent(value, low, high)
        anchor = "start" if percent < 5 else "end" if percent > 95 else "middle"
        labels.append(Markup('<text x="{:.2f}%" y="12" class="{}">{:g}</text>').format(percent, anchor, value))
    return Markup('<svg class="track axis" height="16" aria-hidden="true">{}</svg>').format(Markup("").join(labels))


def bar(share: float, title: str, tick: float | None = None, css: str = "") -> Markup:
    """Draws a bar over a `share` (0 to 1) of its cell, with a line at the share `tick`."""
    line = Markup("") if tick is None else Markup('<line class="tick" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="14"/>')
    return Markup(
        '<svg class="bar {}" height="14" role="img" aria-label="{}"><title>{}</title>'
        '<rect class="back" width="100%" height="14" rx="2"/>'
        '<rect class="fill" width="{:.2f}%" height="14" rx="2"/>{}</svg>'
    ).format(css, title, title, 100 * min(max(share, 0.0), 1.0), line.format(100 * min(tick or 0.0, 1.0)))


def _percent(value: float, low: float, high: float) -> float:
    return 100 * min(max((value - low) / (high - low), 0.0), 1.0)


class _Frame:
    """The axes of a chart, which map values to coordinates."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float, pad: float = 0.06) -> None:
        spread = (y_high - y_low) or abs(y_high) or 1.0
        self._x_low, self._x_high = (x_low, x_high) if x_high > x_low else (x_low - 1, x_low + 1)
        self._x_ticks = ticks(x_low, x_high, most=6)
        self._y_low, self._y_high = (y_low if y_low == 0 else y_low - pad * spread), y_high + pad * spread

    def x(self, value: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (value - self._x_low) / (self._x_high - self._x_low)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (value - self._y_low) / (self._y_high - self._y_low)

    def axes(self, x_label: str, y_label: str, y_format: NumberFormat) -> Markup:
        parts = []
        for value in ticks(self._y_low, self._y_high):
            parts.append(
                Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                    _LEFT, WIDTH - _RIGHT, self.y(value), self.y(value)
                )
            )
            label = '<text class="end" x="{}" y="{:.1f}">{}</text>'
            parts.append(Markup(label).format(_LEFT - 6, self.y(value) + 4, y_format(value)))
        for value in self._x_ticks:
            label = '<text class="middle" x="{:.1f}" y="{}">{}</text>'
            parts.append(Markup(label).format(self.x(value), HEIGHT - _BOTTOM + 16, compact(value)))
        middle = (_TOP + HEIGHT - _BOTTOM) / 2
        parts.append(
            Markup(
                '<text class="middle label" x="{:.0f}" y="{}">{}</text>'
                '<text class="middle label" transform="translate(11 {:.0f}) rotate(-90)">{}</text>'
            ).format((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 5, x_label, middle, y_label)
        )
        return Markup("").join(parts)


def _line(frame: _Frame, line: Series, y_format: NumberFormat, tip: str) -> Markup:
    points = list(zip(line.x, line.y, strict=True))
    points = points[:: max(1, -(-len(points) // _MOST_POINTS))]
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    parts = [
        Markup('<polyline class="line {}" points="{}"/>').format(
            line.style, " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in run)
        )
        for run in runs
        if run
    ]
    # Few points get visible dots, and so do those without a neighbour, of which a line shows nothing. Other dots are
    # invisible and only carry the tooltips.
    for number, x, y in ((len(run), *point) for run in runs for point in run):
        radius = 3.5 if line.dots or number == 1 else 0
        text = tip.format(name=line.name, x=f"{x:,.6g}", y=y_format(round(y, 6)))
        css = "dot" if radius else "hit"
        parts.append(
            Markup('<circle class="{} {}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>').format(
                css, line.style, frame.x(x), frame.y(y), radius or 5, text
            )
        )
    return Markup("").join(parts)


def _svg(title: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, title, Markup("").join(parts)
    )
