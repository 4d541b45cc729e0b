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
from din_dist.config import (
    AttentionKind,
    AttentionNormalization,
    BatchNorm,
    Config,
    HistoryCut,
    ModelKind,
    OptimizerKind,
    Schedule,
    Softmax,
    Split,
)
from din_dist.files import read_text
from din_dist.report import charts
from din_dist.report.attention import Averages, ShownExample
from din_dist.report.charts import Mark, Series
from din_dist.report.gain import Gain
from din_dist.report.job import JobRecord, Status, duration, number, timeline
from din_dist.report.scoring import Evaluation, SliceTable
from din_dist.schema import DatasetFacts

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
_MODEL_NAMES = {  # another model is called by its name in the flags
    ModelKind.DIN: "Deep Interest Network",
    ModelKind.MEAN_POOLING: "mean pooling of the history (no attention)",
    ModelKind.YOUTUBE_DNN: "YouTube DNN, which finds items",
    ModelKind.COMIREC_SA: "ComiRec with self-attention, which finds items",
    ModelKind.COMIREC_DR: "ComiRec with dynamic routing, which finds items",
    ModelKind.MIND: "MIND, which finds items",
    ModelKind.SR_GNN: "SR-GNN, which finds items",
}
_CUTS = {
    HistoryCut.RANDOM: "each epoch draws anew where history ends and target begins",
    HistoryCut.FIXED: "the later events of training, all with the history of the first 80 % of them",
}
_SPLITS = {
    Split.LEAVE_ONE_OUT: "each user's last event tests, the rest trains",
    Split.LEAVE_TWO_OUT: "each user's last event tests, the last but one validates",
    Split.TEMPORAL: "cut by time",
    Split.USERS: "8 of 10 users train, one validates, one tests by the last fifth of the events",
}


@dataclasses.dataclass(frozen=True)
class Data:
    """Facts about the data, and the number of examples in each split."""

    facts: DatasetFacts
    num_examples: Mapping[str, int]


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
        tiles=_tiles(findings),
        settings=_settings(findings),
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
    if gain >= 0:
        return f"{text}, {gain:.4f} above the best floor, {floor}."
    return f"{text}, {-gain:.4f} below the best floor, {floor}: it has not learned enough yet to be useful."


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


def _settings(findings: Findings) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns headings, each with rows of a name and a value."""
    config, data, summary = findings.config, findings.data, findings.record.summary or {}
    if config is None:
        return []
    kind, _, category = config.data.dataset.partition("/")
    rows = [("Data set", config.data.data_path if kind == "event_log" else " / ".join(filter(None, [kind, category])))]
    if data:
        facts = data.facts
        rows += [
            ("Holds", f"{facts.num_users:,} users, {facts.num_items:,} items, {facts.num_events:,} events"),
            ("Labels", "in the log" if facts.has_labels else "every event is a positive, negatives are drawn"),
            ("Examples", ", ".join(f"{count:,} {name}" for name, count in data.num_examples.items() if count)),
        ]
    rows.append(("Split", f"{config.data.split}: {_SPLITS[config.data.split]}"))
    ends = f", which end {data.facts.histories_end}" if data else ""
    behaviours = f"behaviours of {config.data.behaviours_path}" if config.data.behaviours_path else "events"
    rows.append(("History", f"{_lengths(config)} {behaviours}{ends}"))
    if cut := _CUTS.get(config.data.history_cut):
        rows.append(("Examples of a user", cut))
    if not data or not data.facts.has_labels:
        redrawn = ", redrawn each epoch" if config.data.resample_negatives else ""
        drawn = f"{config.data.negatives_per_positive} per positive{redrawn}; "
        held_out = config.data.evaluation_negatives_per_positive
        rows.append(("Negatives", f"{'' if config.model.model.retrieves else drawn}{held_out} in evaluation"))
    return [("Data", rows), ("Model", _model_rows(config, summary)), ("Training", _training_rows(findings, config))]


def _lengths(config: Config) -> str:
    """Returns how long histories may be, in words."""
    named = []
    for history in config.data.named_histories:
        whose = f" of the candidate's {history.feature}" if history.feature else ""
        named.append(f"{history.name} up to {history.longest:,}{whose}")
    return ", ".join(named) or f"up to {config.data.max_history_length:,}"


def _model_rows(config: Config, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, is_din = config.model, config.model.model is ModelKind.DIN
    rows = [("Kind", _MODEL_NAMES.get(model.model, str(model.model)))]
    rows.append(("Embeddings", " + ".join(map(str, model.embedding_dim))))
    if is_din and model.attention is AttentionKind.DOT:
        rows.append(("Attention", "product of candidate and behaviour, softmax over the history"))
    elif is_din:
        units = "–".join(map(str, model.attention_hidden_units))
        softmax = "softmax over the history" if model.attention_normalization == "softmax" else "no normalisation"
        rows.append(("Attention", f"hidden units {units}, {softmax}"))
    if model.model.retrieves:
        against = f"{model.num_sampled:,} items, drawn {model.sampler}"
        rows.append(("Softmax", f"over {against if model.softmax is Softmax.SAMPLED else 'all items'}"))
        if model.example_age:
            rows.append(("Age of an example", "told to the tower in training, 0 otherwise"))
        if model.model.has_positions:
            rows.append(("Interests", f"{model.num_interests} of a user"))
    else:
        rows.append(("Head", f"hidden units {'–'.join(map(str, model.hidden_units))}, {model.activation}"))
        synced = model.batch_norm is BatchNorm.SYNCED
        rows.append(("Batch norm", "over the whole global batch" if synced else "frozen, as the authors' code ran"))
        rows.append(("Dropout", f"{model.dropout:g}"))
    parameters = number(dict(summary), "num_parameters")
    return [*rows, ("Parameters", f"{parameters:,.0f}")] if parameters else rows


def _training_rows(findings: Findings, config: Config) -> list[tuple[str, str]]:
    optimizer, job, record = config.optimizer, config.job, findings.record
    plain = optimizer.learning_rate_schedule is Schedule.CONSTANT
    schedule = (
        "constant" if plain else f"{optimizer.learning_rate_schedule}, {optimizer.warmup_steps:,} steps of warm-up"
    )
    if optimizer.learning_rate_schedule is Schedule.STEP:
        schedule = f"times {optimizer.learning_rate_decay:g} every {optimizer.learning_rate_decay_steps:,} steps"
    name = str(optimizer.optimizer)
    if optimizer.optimizer is OptimizerKind.ADAGRAD and optimizer.adagrad_row_wise:
        name += ", row-wise"
    rows = [("Optimizer", name), ("Learning rate", f"{optimizer.learning_rate:g}, {schedule}")]
    strengths = {
        "clip norm": optimizer.clip_norm,
        "L2": optimizer.l2,
        "embedding L2": optimizer.embedding_l2,
        "mini-batch aware L2": optimizer.mini_batch_aware_l2,
    }
    rows.append(("Regularisation", ", ".join(f"{k} {v:g}" for k, v in strengths.items() if v) or "none"))
    rows.append(("Global batch", f"{job.global_batch_size:,} examples"))
    epochs = number(record.summary or {}, "epochs")
    done = len(record.curve("epoch")) if epochs is None else int(epochs)
    limit = f", at most {job.max_steps:,} updates" if job.max_steps else ""
    rows.append(("Epochs", f"{done} of {job.epochs} complete{limit}"))
    rows.append(("Seed", str(job.seed)))
    versions = (record.summary or {}).get("versions")
    if isinstance(versions, dict):
        rows.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return rows


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
    for part in table.slices:
        named = {_ranking_name(name): value for name, value in part.values.items()}
        ours, *others = part.values.values()
        best = max((value for value in others if not math.isnan(value)), default=math.nan)
        label = f"{part.name}: model {_score(ours)}, best floor {_score(best)}"
        rows.append({"part": part, "ours": ours, "gain": ours - best, "track": charts.track(named, low, high, label)})
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
