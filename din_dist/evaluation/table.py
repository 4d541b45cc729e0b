"""The results of `cli/evaluate.py` as a table of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from din_dist.evaluation.request import EVENTS, USERS
from din_dist.schema import METRICS_OF_TASKS, metric_of
from din_dist.text import duration, printable

_ROWS = {
    **dict.fromkeys(("recall", "ndcg", "hit_rate", "rare_recall", "rare_ndcg", "diversity", "coverage"), ".4f"),
    "mean_popularity": ",.1f",
}
_WIDTH, _GAP = 15, 2  # of a column: at least, and before it


def table(found: Mapping[str, Any]) -> str:
    """Returns the lines to print for the results of one evaluation."""
    lines = [*_scores(found), *_slices(found.get("slices", {}))]
    if retrieval := found.get("retrieval"):
        lines += _retrieval(retrieval, found["split"])
    if stages := found.get("stages"):
        lines += _stages(stages, found["retrieval"], found["num_retrieved"])
    seconds = {name: value for name, value in found["seconds"].items() if name != "total"}
    parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
    workers = f"{found['world_size']} worker{'s' if found['world_size'] > 1 else ''}"
    return "\n".join([*lines, f"  {duration(found['seconds']['total'])} in all with {workers}: {parts}"])


def _scores(found: Mapping[str, Any]) -> list[str]:
    names = {"gauc": "GAUC", "auc": "AUC", "log_loss": "log loss", "pairwise_gauc": "pairwise GAUC"}
    intervals = found.get("intervals", {})
    heading = f"95 % interval ({found['bootstrap_samples']} samples of users)" if intervals else ""
    lines = [
        f"  {found['num_examples']:,} examples, {found['num_users']:,} users ({found['num_users_skipped']:,} more with "
        "one label only)",
        f"  {'':<20} {'':>9}  {heading}".rstrip(),
    ]
    if tasks := found.get("tasks"):
        names = {metric_of(name, task): f"{task}: {names[name]}" for task in tasks for name in METRICS_OF_TASKS}
    for name, words in names.items():
        if name in found:
            lines.append(f"  {words:<20} {found[name]:9.4f}  {_interval(intervals.get(name), '.4f')}".rstrip())
    lines.append(f"  {'GAUC / AUC of floors:':<20}")
    lines += [f"  {name:<20} {floor['gauc']:9.4f} {floor['auc']:8.4f}" for name, floor in found["floors"].items()]
    return lines


def _slices(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, parts in found.items():
        lines.append(
            f"  {f'by {printable(name)}':<30} {'examples':>10} {'clicked':>8} {'':>5} {'model':>7} {'popularity':>11}"
        )
        for part in parts:
            share = part["num_positives"] / part["num_examples"]
            values = part["values"]
            lines.append(
                f"    {printable(part['name'])[:28]:<28} {part['num_examples']:>10,} {share:>8.1%} {part['metric']:>5} "
                f"{_score(values['model'])} {_score(values['popularity']):>11}"
            )
    return lines


def _score(value: float) -> str:
    return f"{value:7.4f}" if math.isfinite(value) else f"{'–':>7}"


def _retrieval(found: Mapping[str, Any], split: str) -> list[str]:
    asked, sought = _asked_and_sought(found)
    if not found[f"num_{asked}"]:
        return [f"  no positive event in the {split} split to rank"]
    against = found["ranked_against"]
    if found["exclude_history"]:
        against += " but those of the user's history"
    number, in_split = found[f"num_{asked}"], found[f"num_{asked}_in_split"]
    words = "each ranked"
    if asked == USERS:
        words = f"each asked once, {found['num_targets']:,} items chosen in all, ranked"
    lines = [f"  {number:,} of {in_split:,} {asked}, {words} against {against}; comparable only with figures so ranked"]
    if found[f"num_{sought}_of_repeats"]:
        share = found[f"num_{sought}_of_repeats"] / found[f"num_{sought}"]
        lines.append(
            f"  {share:.1%} of them are of an item that the user had before"
            + ("; with many, --noexclude_history is the fairer task" if found["exclude_history"] else "")
        )
    if weight := found.get("diversity_weight"):
        category = printable(found["diversity_of"])
        lines.append(f"  re-ranked so that items differ in {category}, by a weight of {weight:g}; popularity is not")
    metrics, floor = found["metrics"], found["floors"]["popularity"]
    intervals = found.get("intervals", {})
    ks = found["ks"]
    rows = [("", [f"@{k}" for k in ks])]
    for name, form in _ROWS.items():
        keys = [f"{name}@{k}" for k in ks]
        if not any(key in metrics for key in keys):
            continue
        rows.append((name.replace("_", " "), _cells(metrics, keys, form)))
        if any(key in intervals for key in keys):
            rows.append(("  95 % interval", [_interval(intervals.get(key), form) for key in keys]))
        rows.append(("  popularity has", _cells(floor, keys, form)))
    lines += _aligned(rows)
    lines.append(
        f"  {'mean 1 / place':<20} {metrics['mrr']:9.4f}  {_interval(intervals.get('mrr'), '.4f')}".rstrip()
        + f"  (popularity {floor['mrr']:.4f})"
    )
    rate, whole = found[f"{asked}_per_second"], found[f"seconds_for_all_{asked}"]
    thinned = number < in_split
    lines.append(f"  {rate:,.1f} {asked}/s" + (f"; all would take about {duration(whole)}" if thinned else ""))
    return lines


def _stages(stages: Mapping[str, Any], ranked: Mapping[str, Any], num_retrieved: int) -> list[str]:
    """Returns recall and NDCG of both models together beside each of them alone."""
    asked, sought = _asked_and_sought(ranked)
    if not ranked[f"num_{asked}"]:
        return []
    names = {f"found ({num_retrieved})": stages["found"], "  and ranked": stages["found_and_ranked"]}
    names["all ranked"] = ranked
    lines = []
    if ranked["exclude_history"] and ranked[f"num_{sought}_of_repeats"]:
        lines.append("  An item of the history is never found, but it is ranked where it is the chosen one.")
    for metric in ("recall", "ndcg"):
        rows = [(metric, [f"@{k}" for k in ranked["ks"]])]
        for name, own in names.items():
            keys = [f"{metric}@{k}" for k in ranked["ks"]]
            rows.append((f"  {name}", _cells(own["metrics"], keys, ".4f")))
            if intervals := own.get("intervals"):
                rows.append(("    95 % interval", [_interval(intervals.get(key), ".4f") for key in keys]))
        lines += _aligned(rows)
    return lines


def _asked_and_sought(found: Mapping[str, Any]) -> tuple[str, str]:
    """Returns what is asked and what is sought, as the names of their counts have it."""
    asked = found.get("queries", EVENTS)
    return asked, "targets" if asked == USERS else EVENTS


def _cells(metrics: Mapping[str, float], keys: Sequence[str], form: str) -> list[str]:
    """Returns a cell for each key; a list of one item has no diversity."""
    return [f"{metrics[key]:{form}}" if key in metrics else "–" for key in keys]


def _aligned(rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Returns rows of a name and cells as lines, with columns as wide as the longest cell needs."""
    width = max(_WIDTH, *(len(cell) for _, cells in rows for cell in cells)) + _GAP
    return [f"  {name:<20}" + "".join(f"{cell:>{width}}" for cell in cells) for name, cells in rows]


def _interval(bounds: tuple[float, float] | None, form: str) -> str:
    return f"{bounds[0]:{form}} – {bounds[1]:{form}}" if bounds else ""
