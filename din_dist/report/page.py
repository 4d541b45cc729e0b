"""Renders the findings as one HTML page, which needs only a browser.

The page has no scripts, fonts, pictures or network requests. Its own Content-Security-Policy forbids them all and
allows the one style sheet by its hash. Jinja2 escapes every string; only `charts` makes markup.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from din_dist import __version__
from din_dist.config import AttentionNormalization, Config
from din_dist.files import read_text
from din_dist.report import charts
from din_dist.report.attention import Averages, ShownExample
from din_dist.report.charts import Mark, Series
from din_dist.report.comparison import Comparison, differing_settings
from din_dist.report.gain import Difference, Gain
from din_dist.report.job import JobRecord, Status, duration, number, timeline
from din_dist.report.retrieval import Retrieval
from din_dist.report.scoring import Evaluation, SliceTable
from din_dist.report.settings_table import Data, settings_of

_TEMPLATES = Path(__file__).parent / "templates"
_LONGEST = 80  # characters of an id or a name that are shown

_STATUS = {
    Status.FINISHED: "The job trained to its end.",
    Status.RUNNING: "The job is still running in this folder: a later report will say more.",
    Status.STOPPED: "The job wrote a checkpoint; the same command resumes from there.",
    Status.FAILED: "The job ended with an error; its last checkpoint is good.",
    Status.BROKEN_OFF: "Its records have no end, and no process of this machine runs in the folder. "
    "The same command resumes from the last checkpoint, if there is one.",
}


@dataclasses.dataclass
class Findings:
    """The content of a report. Missing parts are None, and `problems` explains each of them in a line."""

    record: JobRecord
    config: Config | None = None
    data: Data | None = None
    step: int | None = None  # of the checkpoint
    evaluation: Evaluation | None = None
    shown: Sequence[ShownExample] = ()
    averages: Sequence[Averages] = ()
    gains: Sequence[Gain] = ()
    retrieval: Retrieval | None = None
    comparison: Comparison | None = None
    problems: list[str] = dataclasses.field(default_factory=list)


def render(findings: Findings, now: float | None = None) -> str:
    """Returns the page. `now` is the unix time to show as the time of the report; None: the current time."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(score=_score, count=_count, short=_short, percent=_percent, chance=_chance)
    style = read_text(_TEMPLATES / "report.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    evaluation, record = findings.evaluation, findings.record
    softmax = AttentionNormalization.SOFTMAX
    shares = findings.config is not None and findings.config.model.attention_normalization is softmax
    return environment.get_template("report.html").render(
        style=Markup(style),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        name=record.folder.absolute().name or str(record.folder),
        made=time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(now)),
        version=__version__,
        status_note=_STATUS[record.status],
        findings=findings,
        record=record,
        verdict=_verdict(evaluation) if evaluation else "",
        retrieval_verdict=_retrieval_verdict(findings.retrieval) if findings.retrieval else "",
        comparison=_comparison(findings) if findings.comparison else {},
        tiles=_tiles(findings),
        settings=settings_of(findings.record, findings.config, findings.data),
        curves=_curves(findings),
        rankings=_rankings(evaluation) if evaluation else {},
        tables=[_slice_rows(table) for table in evaluation.tables] if evaluation else [],
        calibration=_calibration(evaluation) if evaluation else Markup(""),
        speed=_speed(record),
        main_task=_main_task(findings),
        shown=findings.shown,
        averages=findings.averages,
        gains=_gain_rows(findings.gains),
        charts=charts,
        weight_bar=functools.partial(_weight_bar, shares=shares),
        weight=functools.partial(_weight, shares=shares),
        ranking_name=_ranking_name,
        duration=duration,
        interval=_interval,
    )


def _main_task(findings: Findings) -> str:
    """Returns the name of the label that all metrics without a name are of; empty if there is one label."""
    config = findings.config
    return config.data.label_columns[config.main_task] if config and config.data.label_columns else ""


def _verdict(found: Evaluation) -> str:
    metric, (model, *floors) = _main_metric(found), found.rankings
    ours = getattr(model, metric)
    if math.isnan(ours):
        return f"The {found.split} split has no examples of both labels: there is nothing to rank."
    best = max(floors, key=lambda floor: getattr(floor, metric))
    gain = ours - getattr(best, metric)
    text = f"On {found.num_examples:,} {found.split} examples the model reaches {metric.upper()} {ours:.4f}"
    floor = f"{_ranking_name(best.name)} ({getattr(best, metric):.4f})"
    between = _between(found.gain)
    if gain >= 0:
        return f"{text}, {gain:.4f} above the best floor, {floor}; {between}."
    return f"{text}, {-gain:.4f} below the best floor, {floor}: it has not learned enough yet to be useful; {between}."


def _between(gain: Difference) -> str:
    chance = "" if gain.is_certain else ", which may be chance"
    return f"95 % interval of the difference {_interval(gain)}{chance}"


def _interval(gain: Any) -> str:
    return f"{gain.low:+.4f} to {gain.high:+.4f}"


def _retrieval_verdict(found: Retrieval) -> str:
    """Says at which lengths of a list popularity finds more, or as much, as the model."""
    worse = [row.k for row in found.rows if row.high < 0]
    level = [row.k for row in found.rows if row.low <= 0 <= row.high]
    parts = []
    if worse:
        parts.append(f"popularity finds more than the model among the first {_numbers(worse)}")
    if level:
        parts.append(f"among the first {_numbers(level)} the two cannot be told apart")
    if not parts:
        return "The model finds more than popularity at every length."
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _numbers(values: Sequence[int]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def _comparison(findings: Findings) -> dict[str, Any]:
    """Returns what the page shows of the other job."""
    found = findings.comparison
    assert found is not None
    name = found.record.folder.absolute().name
    verdict = found.problem
    if gain := found.gain:
        how = "above" if gain.value >= 0 else "below"
        verdict = (
            f"On the same examples, this job's {gain.metric} is {abs(gain.value):.4f} {how} that of {name} "
            f"(update {found.step:,}); {_between(gain)}."
        )
    lines = [
        ("this job", findings.record.curve("validation"), "gauc"),
        (name, found.record.curve("validation"), "gauc"),
    ]
    return {
        "name": name,
        "verdict": verdict,
        "settings": differing_settings(findings.record.flags or "", found.record.flags or ""),
        "curve": _curve("GAUC on validation", "area under the curve", lines, "Both jobs, each over its own updates."),
    }


def _main_metric(found: Evaluation) -> str:
    return "auc" if math.isnan(found.rankings[0].gauc) else "gauc"


def _ranking_name(name: str) -> str:
    if name in ("model", "popularity"):
        return name
    return "the user's own repeats" if name == "user_repeat" else f"repeats of {name.removesuffix('_repeat')}"


def _tiles(findings: Findings) -> list[tuple[str, str, str]]:
    """Returns the key numbers, each as a label, a value and a note to compare it with."""
    found, record, tiles = findings.evaluation, findings.record, []
    if found:
        model, *floors = found.rankings
        for metric in ("gauc", "auc"):
            best = max((getattr(floor, metric) for floor in floors), default=math.nan)
            note = f"best floor {_score(best)}"
            if metric == "gauc" and math.isnan(model.gauc):
                note = "no user has examples of both labels"
            tiles.append((metric.upper(), _score(getattr(model, metric)), note))
        loss_note, error_note = f"base rate alone {_score(found.base_log_loss)}, nats", "expected; 0 is calibrated"
        if found.corrected:
            loss, calibrated = found.corrected
            loss_note = f"{_score(loss)} corrected for drawn negatives; {loss_note}"
            error_note = f"{_percent(calibrated.error, 1)} corrected for drawn negatives"
        tiles.append(("Log loss", _score(found.log_loss), loss_note))
        tiles.append(("Calibration error", _percent(found.calibration.error, 1), error_note))
    speed = _mean_speed(record)
    if speed:
        ranks = number(record.summary or {}, "world_size") or _last(record, "world_size")
        tiles.append(
            ("Examples per second", f"{speed:,.0f}", f"{ranks:,.0f} worker{'s' * (ranks != 1)}" if ranks else "")
        )
    steps = _last(record, "step")
    if steps is not None:
        seconds = sum(record.phases()[0].values())
        tiles.append(("Updates", f"{steps:,.0f}", f"{duration(seconds)} in all" if seconds else ""))
    return tiles


def _mean_speed(record: JobRecord) -> float | None:
    if record.summary and number(record.summary, "examples_per_second"):
        return number(record.summary, "examples_per_second")
    rates = timeline(record.lines).examples_per_second
    return sum(rates) / len(rates) if rates else None


def _last(record: JobRecord, name: str) -> float | None:
    return next((value for line in reversed(record.lines) if (value := number(line, name)) is not None), None)


def _curves(findings: Findings) -> list[dict[str, Any]]:
    """Returns charts over the updates, each with a caption."""
    record, config = findings.record, findings.config
    train, validation = record.curve("train"), record.curve("validation")
    drawn = config.data if config else None
    negatives = drawn and (not findings.data or not findings.data.facts.has_labels)
    differs = negatives and drawn and drawn.negatives_per_positive != drawn.evaluation_negatives_per_positive
    loss_note = "It should fall and level off. If validation rises again while training falls, the model overfits."
    if differs and drawn:
        loss_note += (
            f" The two also differ because training has {drawn.negatives_per_positive} negatives per positive and "
            f"validation {drawn.evaluation_negatives_per_positive}."
        )
    found = [
        _curve("Loss", "nats", [("training", train, "loss"), ("validation", validation, "log_loss")], loss_note),
        _curve(
            "Ranking quality on validation",
            "area under the curve",
            [("GAUC", validation, "gauc"), ("AUC", validation, "auc")],
            _validation_note(findings),
        ),
        _curve(
            "Gradient norm",
            "global norm",
            [("gradient norm", train, "gradient_norm")],
            "Before clipping. A jump shows where training was at risk.",
        ),
        _curve(
            "Learning rate",
            "rate",
            [("learning rate", train, "learning_rate")],
            "The rate that the schedule gave.",
        ),
    ]
    return [curve for curve in found if curve["chart"]]


def _validation_note(findings: Findings) -> str:
    note = "Higher is better; 0.5 is chance."
    best = findings.record.summary and number(findings.record.summary, "best_step")
    return f"{note} The best model is that of update {best:,.0f}." if best else note


def _curve(title: str, unit: str, lines: Sequence[tuple[str, list[dict], str]], note: str) -> dict[str, Any]:
    series = []
    for style, (name, points, field) in zip(("main", "second"), lines, strict=False):
        pairs = [(float(line["step"]), value) for line in points if (value := number(line, field)) is not None]
        if pairs:
            steps, values = zip(*pairs, strict=True)
            series.append(Series(name, steps, values, style, dots=len(pairs) <= 30))
    chart = charts.line_chart(
        series, title=f"{title} by update", x_label="update", y_label=unit, tip="{name}: {y} at update {x}"
    )
    legend = [(line.name, line.style) for line in series] if len(series) > 1 else []
    return {"title": title, "chart": chart, "legend": legend, "note": note}


def _rankings(found: Evaluation) -> dict[str, Any]:
    """Returns the comparison with the floors for a dot plot, by GAUC or, where that is not defined, by AUC."""
    metric = _main_metric(found)
    low, high = _bounds([getattr(ranking, metric) for ranking in found.rankings])
    rows = [
        {"name": _ranking_name(ranking.name), "shape": number, "gauc": ranking.gauc, "auc": ranking.auc}
        for number, ranking in enumerate(found.rankings)
    ]
    return {"metric": metric.upper(), "rows": rows, "low": low, "high": high}


def _slice_rows(table: SliceTable) -> dict[str, Any]:
    values = [value for part in table.slices for value in part.values.values()]
    low, high = _bounds(values)
    rows = []
    for part, over in zip(table.slices, table.gains, strict=True):
        named = {_ranking_name(name): value for name, value in part.values.items()}
        ours, *others = part.values.values()
        best = max((value for value in others if not math.isnan(value)), default=math.nan)
        label = f"{part.name}: model {_score(ours)}, best floor {_score(best)}"
        track = charts.track(named, low, high, label, worse=over.high < 0)
        rows.append({"part": part, "ours": ours, "gain": over, "track": track})
    mixed = len({part.metric for part in table.slices}) > 1
    return {"table": table, "rows": rows, "axis": charts.track_axis(low, high), "mixed": mixed}


def _gain_rows(gains: Sequence[Gain]) -> list[dict[str, Any]]:
    """Returns the features, those of the largest gain first, each with a bar relative to that."""
    known = [gain for gain in gains if math.isfinite(gain.value)]
    largest = max((abs(gain.value) for gain in known), default=0.0) or 1.0
    rows = []
    for gain in sorted(known, key=lambda gain: -gain.value):
        between = f"95 % interval {gain.low:+.4f} to {gain.high:+.4f}"
        style = "negative" if gain.value < 0 else ""
        rows.append({"gain": gain, "bar": charts.bar(abs(gain.value) / largest, between, None, style)})
    return rows


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """Returns a common scale for the values, in steps of 0.05."""
    finite = [value for value in values if math.isfinite(value)] or [0.5, 1.0]
    low, high = math.floor(min(finite) * 20) / 20, math.ceil(max(finite) * 20) / 20
    return low, max(high, low + 0.05)


def _calibration(found: Evaluation) -> Markup:
    title = f"Calibration: expected calibration error {_percent(found.calibration.error, 1)}"
    if not found.corrected:
        return charts.calibration_chart([("as predicted", found.calibration)], title)
    return charts.calibration_chart([("corrected", found.corrected[1]), ("as predicted", found.calibration)], title)


def _speed(record: JobRecord) -> dict[str, Any]:
    found = timeline(record.lines)
    minutes = (found.seconds[-1] if found.seconds else 0) >= 180
    unit = 60.0 if minutes else 1.0
    marks = [Mark(event.seconds / unit, str(number), event.text) for number, event in enumerate(found.events, 1)]
    chart = charts.line_chart(
        [Series("speed", [second / unit for second in found.seconds], found.examples_per_second)],
        title="Examples per second over time",
        x_label="minutes of the job" if minutes else "seconds of the job",
        y_label="examples per second",
        marks=marks,
        from_zero=True,
        tip="{y} examples/s at {x} " + ("min" if minutes else "s"),
    )
    phases, source = record.phases()
    return {
        "chart": chart,
        "events": found.events,
        "phases": _shares(phases),
        "source": source,
        "parts": _shares(record.step_parts()),
    }


def _shares(seconds: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Returns the name, the seconds and the share of the sum of each entry, the largest first."""
    total = sum(seconds.values())
    rows = [(name.replace("_", " "), value, value / total) for name, value in seconds.items() if value > 0]
    return sorted(rows, key=lambda row: -row[1])


def _weight_bar(shown: ShownExample, weight: float, *, shares: bool) -> Markup:
    """Draws a weight relative to the heaviest one of the example, with a line at the weight of an equal share.

    Args:
        shown: the example.
        weight: the weight of one behaviour.
        shares: the weights of a history sum to 1.
    """
    largest = max(abs(behaviour.weight or 0.0) for behaviour in shown.behaviours) or 1.0
    tick = 1 / shown.history_length / largest if shares else None
    title = f"weight {_weight(weight, shares=shares)}"
    return charts.bar(abs(weight) / largest, title, tick, "negative" if weight < 0 else "")


def _weight(weight: float, *, shares: bool) -> str:
    return _percent(weight, 1) if shares else f"{weight:.3g}"


def _score(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "–"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _percent(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %" if math.isfinite(value) else "–"


def _chance(value: float) -> str:
    """Returns a click probability for people, which is never 0 or 100 %."""
    return "< 0.1 %" if value < 0.001 else "> 99.9 %" if value > 0.999 else _percent(value, 1)


def _short(text: object) -> str:
    words = str(text)
    return words if len(words) <= _LONGEST else f"{words[: _LONGEST - 1]}…"
