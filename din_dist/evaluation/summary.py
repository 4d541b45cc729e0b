"""All that `cli/evaluate.py` tells of a split: the trainer's metrics, retrieval metrics, floors and intervals."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from din_dist.config import Config
from din_dist.data.event_store import EventStore
from din_dist.data.splits import Examples, item_counts
from din_dist.distributed.runtime import Runtime
from din_dist.evaluation.confidence import affordable_samples, intervals_of_scores, intervals_of_sums
from din_dist.evaluation.evaluator import Evaluator, Scorer
from din_dist.evaluation.request import ALL, AUTO_CANDIDATES, EvaluationRequest
from din_dist.evaluation.retrieval import (
    CandidateScorer,
    PopularityScorer,
    Queries,
    Task,
    by_user,
    coverages,
    queries_of,
    rank,
)
from din_dist.text import duration


def score_split(
    asked: EvaluationRequest,
    evaluator: Evaluator,
    config: Config,
    store: EventStore,
    examples: Examples,
    logits_of: Scorer,
    runtime: Runtime,
) -> dict[str, Any]:
    """The trainer's own metrics of a split and the floors; on the chief, their intervals. All ranks call it."""
    split = asked.evaluation_split
    logits = evaluator.scores(split, logits_of)
    found: dict[str, Any] = dict(evaluator.metrics_of(split, logits))
    found["floors"] = evaluator.floors(split)
    num_samples = affordable_samples(asked.bootstrap_samples, len(logits) + len(examples.users))
    found["bootstrap_samples"] = num_samples
    if num_samples and runtime.is_chief:
        draws = None if store.facts.has_labels else examples.draws_per_row
        labels, users = evaluator.labels(split), examples.user_of_example()
        found["intervals"] = intervals_of_scores(logits, labels, users, draws, num_samples, config.job.seed)
    return found


def rank_split(
    asked: EvaluationRequest,
    config: Config,
    store: EventStore,
    splits: Mapping[str, Examples],
    scorer: CandidateScorer,
    runtime: Runtime,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Retrieval metrics of a split and of the popularity floor; on the chief, their intervals. All ranks call it.

    Raises:
        FloatingPointError: as `retrieval.rank`.
    """
    assert asked.rank_against is not None
    num_items, against = store.facts.num_items, asked.rank_against
    task = Task(against, not against and asked.exclude_history, config.job.seed)
    most = asked.max_events or max(1, AUTO_CANDIDATES // (1 + against if against else num_items))
    queries = queries_of(store, splits[asked.evaluation_split], config.data.max_history_length, most)
    if not len(queries):
        return {"num_events": 0}
    thinned = len(queries) < queries.num_in_split
    text = f"ranking {len(queries):,} of {queries.num_in_split:,} events"
    say(text + (": whole users, evenly spaced; --max_events=all ranks all" if thinned else ""))
    started = time.perf_counter()

    def progress(share: float, seconds: float) -> None:
        say(f"ranked {share:.0%} of this worker's events, {duration(seconds / share * (1 - share))} left")

    places = rank(store, queries, task, scorer, asked.ks[-1], runtime, progress)
    seconds = time.perf_counter() - started
    popularity = item_counts(store, splits)
    parts = by_user(queries, places, popularity, asked.ks)
    floor = rank(store, queries, task, PopularityScorer(popularity), asked.ks[-1], runtime)
    of_floor = _ratios(by_user(queries, floor, popularity, asked.ks)) | coverages(floor, num_items, asked.ks)
    num_users = len(np.unique(queries.users))
    fewer = "up to " if against and (places.num_candidates <= against).any() else ""
    found: dict[str, Any] = {
        "ranked_against": f"{fewer}{against} items that the user never touched" if against else "all items",
        "rank_against": against or ALL,
        "exclude_history": task.exclude_history,
        "comparable_only_with": "figures that rank against as many candidates, chosen in the same way",
        "num_events": len(queries),
        "num_events_in_split": queries.num_in_split,
        "num_events_without_history": int((queries.history_ends == queries.history_starts).sum()),
        "num_events_of_repeats": _num_repeats(store, queries),
        "num_events_tied": int((places.tied > 0).sum()),
        "num_users": num_users,
        "mean_num_candidates": float(places.num_candidates.mean()),
        "ks": list(asked.ks),
        "events_per_second": len(queries) / seconds,
        "seconds_for_all_events": seconds / len(queries) * queries.num_in_split,
        "metrics": _ratios(parts) | coverages(places, num_items, asked.ks),
        "floors": {"popularity": of_floor},
    }
    num_samples = affordable_samples(asked.bootstrap_samples, num_users)
    if num_samples and runtime.is_chief:
        found["intervals"] = intervals_of_sums(parts, num_samples, config.job.seed)
    return found


def _ratios(parts: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    return {name: float(above.sum() / below.sum()) for name, (above, below) in parts.items()}


def _num_repeats(store: EventStore, queries: Queries) -> int:
    """Events of an item that their user had before."""
    windows = zip(queries.targets, queries.seen_starts, queries.history_ends, strict=True)
    return sum(int((store.history_item_ids[start:end] == target).any()) for target, start, end in windows)
