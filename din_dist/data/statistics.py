"""Statistics of a prepared data set: counts, history lengths, shared times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import starmap
from typing import Any

import numpy as np

from din_dist.data.event_store import EventStore
from din_dist.data.forgetting import shown_forgotten
from din_dist.data.histories import begins_a_moment
from din_dist.data.raw_columns import TABLES, TableCounts
from din_dist.data.raw_features import read_tables
from din_dist.features.encoding import StoredFeature
from din_dist.features.spec import TIME_KINDS, Kind, Owner, Scale
from din_dist.schema import BY_COLUMN, DatasetFacts, HistoryRule

_COUNTED = (Kind.CATEGORY, Kind.CATEGORIES)  # kinds whose values may be rare
_MOST_BOUNDS = 8  # that a line shows
PERCENTILES = (50, 90, 99, 100)
USERS_AT_ONCE = 1 << 16  # bounds the memory


def describe(store: EventStore, max_history_length: int) -> list[str]:
    """Returns what `measure` finds as the lines that `prepare_data` prints."""
    found = measure(store, max_history_length)

    def spread(name: str) -> str:
        numbers = found[name]
        return (
            f"mean {numbers['mean']:.1f}, 50% up to {numbers['p50']:,}, 90% {numbers['p90']:,}, "
            f"99% {numbers['p99']:,}, longest {numbers['max']:,}"
        )

    sizes = [f"{name} {size:,}" for name, size in found["item_features"].items()]
    rate = found["label_rate"]
    return [
        f"users: {found['users']:,}",
        f"items: {found['items']:,}",
        f"item features: {', '.join(sizes) or 'none'}",
        f"events: {found['events']:,}, timestamps {found['first_timestamp']} to {found['last_timestamp']}",
        *([_extends_line(found)] if "extends" in found else []),
        *([shown_forgotten(found["forgotten"])] if "forgotten" in found else []),
        "labels: none, every event is a positive" if rate is None else f"labels: {rate:.2%} positive",
        *([_tasks_line(found["label_rates"])] if "label_rates" in found else []),
        *([_weights_line(found["weights"])] if "weights" in found else []),
        *([_behaviours_line(found["behaviours"])] if "behaviours" in found else []),
        _ties_line(found["events_at_a_shared_time"], found["events"], store.facts.history_rule),
        f"histories end {store.facts.histories_end}",
        *([_sessions_line(store, found["sessions"])] if "sessions" in found else []),
        f"events per user: {spread('events_per_user')}",
        f"history lengths: {spread('history_length')}",
        f"history lengths up to {max_history_length:,}: {spread('capped_history_length')}",
        *(f"history {name}: {number:,} behaviours" for name, number in found.get("histories", {}).items()),
        *map(_feature_line, store.features.values()),
        *starmap(_table_line, read_tables(store.folder).items()),
    ]


def _feature_line(feature: StoredFeature) -> str:
    found, spec = feature.encoding, feature.encoding.spec
    counts = found.counts
    words = [f"feature {spec.name}: {spec.owner} {spec.kind}"]
    if spec.kind is Kind.TIME_SINCE:
        return f"{words[0]}, a row for each doubling, found at the request"
    words.append(f"{counts.distinct:,} distinct")
    words += [f"{counts.missing:,} missing"] if spec.kind not in TIME_KINDS else [f"{found.unit}, {found.timezone}"]
    if spec.kind in _COUNTED and not spec.rows:
        words.append(f"{counts.rare:,} rare (fewer than {spec.min_count:,} training events)")
    if spec.rows:
        words.append(f"{spec.rows:,} rows, {counts.colliding:.1%} of the training events collide")
    if spec.encode.scale is Scale.QUANTILES:
        bounds = [f"{bound:g}" for bound in found.bounds]
        shown = bounds if len(bounds) <= _MOST_BOUNDS else [*bounds[: _MOST_BOUNDS - 1], "...", bounds[-1]]
        words.append(f"{len(bounds) + 1:,} bins, bounds {' '.join(shown) or 'none'}")
    elif spec.kind is Kind.NUMBER:
        words.append(f"{spec.encode}, mean {found.mean:.4g}, deviation {found.deviation:.4g}")
    if found.dimension:
        words.append(f"dimension {found.dimension:,}{', trained' * spec.trained}")
    return ", ".join(words)


def _table_line(name: str, counts: TableCounts) -> str:
    line = f"table of {name}: {counts.rows:,} rows, {counts.without_events:,} without events"
    if name != TABLES[Owner.CANDIDATE]:
        return f"{line}; {counts.ids_without_a_row:,} {name} without a row"
    line += f", {counts.repeated:,} repeat an earlier one, which counts"
    return f"{line}; {counts.ids_without_a_row:,} events without a row"


def _extends_line(found: Mapping[str, Any]) -> str:
    before = found["extends"]
    gone = found.get("forgotten", {"events": 0, "users": {"ids": 0}, "items": {"ids": 0}})
    now = {name: found[name] + gone[name]["ids"] for name in ("users", "items")}
    now["events"] = found["events"] + gone["events"]
    new = {name: now[name] - before[name] for name in ("events", "users", "items")}
    counts = ", ".join(f"{number:,} new {name}" for name, number in new.items())
    return f"extends {before['folder']}: {counts}"


def _ties_line(num_events: int, num_all: int, rule: HistoryRule) -> str:
    line = f"events that share their user's time with another: {num_events:,} ({num_events / num_all:.1%})"
    if not num_events:
        return line
    if rule is HistoryRule.BEFORE_TIME:
        return f"{line}; none of them is in the history of another"
    return f"{line}; they count one after the other, in the order of the files"


def _sessions_line(store: EventStore, found: Mapping[str, Any]) -> str:
    gap = int(store.facts.sessions) if store.facts.sessions != BY_COLUMN else 0
    which = f"with gaps of at most {gap:,}, in the unit of the timestamps" if gap else "named by the log"
    sizes = found["events_per_session"]
    return (
        f"sessions: {found['sessions']:,} {which}; {found['single']:,} have one event; events per session: mean "
        f"{sizes['mean']:.1f}, 50% up to {sizes['p50']:,}, longest {sizes['max']:,}"
    )


def _tasks_line(rates: Mapping[str, float]) -> str:
    return f"labels to predict: {', '.join(f'{task} {rate:.2%} positive' for task, rate in rates.items())}"


def _weights_line(found: Mapping[str, float]) -> str:
    return f"weights: mean {found['mean']:.4g}, largest {found['max']:.4g}, {found['zero']:,} events of weight 0"


def measure(store: EventStore, max_history_length: int) -> dict[str, Any]:
    """Counts users, items, events and history lengths; the result is ready for JSON.

    Returns:
        `users`, `items`, `events`: counts.
        `item_features`: the number of ids of each feature, by name.
        `extends`: the `folder` of the data that newer files extend, and its number of `events`, `users` and `items`;
            absent if there is none.
        `forgotten`: as of `DatasetFacts`; absent without a rule.
        `first_timestamp`, `last_timestamp`: the range of the times.
        `events_at_a_shared_time`: the number of events that have the user and the time of another.
        `history_rule`, `history_delay`: where histories end, and how long after its time a behaviour is known.
        `label_rate`: the share of positive events; None without labels.
        `behaviours`: of a log of behaviours, how many it has of these users and when, how many users have none, and
            how many of its items no event has; absent without such a log.
        `sessions`: how many there are, how many of them have a `single` event, and their `events_per_session`; absent
            if histories are not sessions.
        `label_rates`: of each label to predict, by name, the share of positive events; absent if there is one.
        `weights`: their `mean` and `max`, and how many are `zero`; absent if all events count alike.
        `events_per_user`: its `mean`, `p50`, `p90`, `p99` and `max`.
        `history_length`: the same of the number of events before an example, over all examples that the log can give.
        `capped_history_length`: the same if only the newest `max_history_length` of them count.
        `histories`: of each named history how many behaviours all users have; absent if there is one without a name.
        `features`: of each declared feature, by name: owner, kind, counts and what the training part fixed. Absent if
            none is declared, likewise the next.
        `tables`: of `items`, `users` and `offers`, how the table fits the events.
    """
    facts, tables = store.facts, read_tables(store.folder)
    events_per_user = np.bincount(np.diff(store.user_offsets))
    lengths = _history_lengths(store, events_per_user)
    capped = lengths[: max_history_length + 1].copy()
    capped[-1] += lengths[max_history_length + 1 :].sum()
    return {
        "users": facts.num_users,
        "items": facts.num_items,
        "events": facts.num_events,
        "item_features": dict(facts.item_features),
        "first_timestamp": facts.first_timestamp,
        "last_timestamp": facts.last_timestamp,
        "events_at_a_shared_time": _num_at_a_shared_time(store),
        "history_rule": str(facts.history_rule),
        "history_delay": facts.history_delay,
        "label_rate": None if store.labels is None else int(np.count_nonzero(store.labels)) / facts.num_events,
        **({"behaviours": _measure_behaviours(store)} if facts.has_behaviours else {}),
        **({} if store.sessions is None else {"sessions": _measure_sessions(store.sessions)}),
        **({"label_rates": _label_rates(store)} if facts.tasks else {}),
        **({} if store.weights is None else {"weights": _measure_weights(store.weights)}),
        "events_per_user": _summary(events_per_user),
        "history_length": _summary(lengths),
        "capped_history_length": _summary(capped),
        **({"extends": _measure_extension(facts)} if facts.extends else {}),
        **({"forgotten": dict(facts.forgotten)} if facts.forgotten else {}),
        **({"histories": {history.name: len(history.item_ids) for history in store.sets}} if store.sets else {}),
        **({"features": _measure_features(store)} if store.features else {}),
        **({"tables": {name: asdict(counts) for name, counts in tables.items()}} if tables else {}),
    }


def _measure_extension(facts: DatasetFacts) -> dict[str, Any]:
    told = facts.extends
    assert told
    counts = {name: told["vocabularies"][name]["ids"] for name in ("users", "items")}
    return {"folder": told["folder"], "events": told["events"], **counts}


def _measure_behaviours(store: EventStore) -> dict[str, int]:
    assert store.history_times is not None
    times = store.history_times if len(store.history_times) else np.zeros(1, np.int64)
    return {
        "behaviours": len(store.history_item_ids),
        "users_without": int(np.count_nonzero(np.diff(store.history_offsets) == 0)),
        "items_without_events": store.facts.num_only_behaviours,
        "items_without_ids": store.facts.num_without_id,
        "first_timestamp": int(times.min()),
        "last_timestamp": int(times.max()),
    }


def _measure_sessions(sessions: np.ndarray) -> dict[str, Any]:
    sizes = np.bincount(sessions)
    counts = np.bincount(sizes)
    return {
        "sessions": len(sizes),
        "single": int(np.count_nonzero(sizes == 1)),
        "events_per_session": _summary(counts),
    }


def _behaviours_line(found: Mapping[str, int]) -> str:
    count = found["items_without_ids"]
    without_ids = f", {count:,} of which stand for behaviours without an item's id" if count else ""
    return (
        f"behaviours: {found['behaviours']:,} in a log of their own, timestamps {found['first_timestamp']} to "
        f"{found['last_timestamp']}; {found['users_without']:,} users have none, {found['items_without_events']:,} "
        f"items have no event and are never candidates{without_ids}"
    )


def _label_rates(store: EventStore) -> dict[str, float]:
    assert store.task_labels is not None
    times = np.bincount(store.task_labels, minlength=1)
    of_bits = np.arange(len(times))
    tasks = enumerate(store.facts.tasks)
    return {task: int(times[of_bits >> place & 1 == 1].sum()) / store.facts.num_events for place, task in tasks}


def _measure_weights(weights: np.ndarray) -> dict[str, float]:
    mean, zero = float(weights.mean(dtype=np.float64)), len(weights) - int(np.count_nonzero(weights))
    return {"mean": mean, "max": float(weights.max()), "zero": zero}


def _measure_features(store: EventStore) -> dict[str, Any]:
    found = {}
    for name, feature in store.features.items():
        encoding = feature.encoding
        found[name] = {
            "owner": str(encoding.spec.owner),
            "kind": str(encoding.spec.kind),
            **asdict(encoding.counts),
            "num_rows": encoding.num_rows,
            "dimension": encoding.dimension,
            "mean": encoding.mean,
            "deviation": encoding.deviation,
            "bounds": list(encoding.bounds),
        }
    return found


def _num_at_a_shared_time(store: EventStore) -> int:
    found = 0
    for first in range(0, store.facts.num_users, USERS_AT_ONCE):
        offsets = store.user_offsets[first : first + USERS_AT_ONCE + 1]
        begins = begins_a_moment(offsets - offsets[0], store.timestamps[offsets[0] : offsets[-1]])
        alone = begins & np.append(begins[1:], True)
        found += len(alone) - int(np.count_nonzero(alone))
    return found


def _history_lengths(store: EventStore, events_per_user: np.ndarray) -> np.ndarray:
    """Counts the examples with a history of 0, 1, 2, ... events: int64 `[longest + 1]`.

    Without labels a user (or a session) of n events gives examples with 1 to n - 1 events before them.

    Args:
        store: the events.
        events_per_user: int64, the number of users with 0, 1, 2, ... events.
    """
    if store.history_ends is None:
        at_least = np.cumsum(events_per_user[::-1])[::-1]  # users with n events or more
        return np.concatenate([[0], at_least[2:]])
    counts = np.zeros(1, np.int64)
    has_firsts = store.sessions is not None and not store.facts.selects_behaviours
    begins = store.begins_a_session if has_firsts else None
    for first in range(0, store.facts.num_users, USERS_AT_ONCE):
        offsets = store.user_offsets[first : first + USERS_AT_ONCE + 1]
        users = np.repeat(np.arange(first, first + len(offsets) - 1), np.diff(offsets))
        events = np.arange(offsets[0], offsets[-1])
        lengths = store.history_ends[events] - store.history_offsets[store.owners(users, events)]
        if begins is not None:
            lengths = lengths[~begins[events]]
        counts = _sum(counts, np.bincount(lengths))
    return counts


def _sum(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    short, long = sorted((left, right), key=len)
    return long + np.pad(short, (0, len(long) - len(short)))


def _summary(counts: np.ndarray, percentiles: Sequence[int] = PERCENTILES) -> dict[str, float]:
    """Returns the mean and the percentiles of values 0, 1, 2, ... that occur `counts` times.

    A percentile is a value that occurs (nearest rank).
    """
    reached = np.cumsum(counts)
    total = int(reached[-1]) if len(reached) else 0
    if not total:
        return {"mean": 0.0, "p50": 0, "p90": 0, "p99": 0, "max": 0}
    ranks = [max(1, -(-percent * total // 100)) for percent in percentiles]
    values = [int(value) for value in np.searchsorted(reached, ranks)]
    mean = float(counts @ np.arange(len(counts)) / total)
    return {"mean": mean, **dict(zip(("p50", "p90", "p99", "max"), values, strict=True))}
