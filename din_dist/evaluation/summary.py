"""The results that `cli/evaluate.py` prints for a split: ranking metrics, retrieval metrics, floors, intervals."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from din_dist.config import Config
from din_dist.data.event_store import EventStore
from din_dist.data.splits import Examples, item_counts
from din_dist.distributed.runtime import Runtime
from din_dist.evaluation.confidence import Interval, affordable_samples, intervals_of_scores, intervals_of_sums
from din_dist.evaluation.evaluator import BatchScorer, Evaluator
from din_dist.evaluation.request import ALL, AUTO_CANDIDATES, HITS, USERS, EvaluationRequest
from din_dist.evaluation.reranking import Diversity, category_of_items
from din_dist.evaluation.retrieval import (
    CandidateScorer,
    PopularityScorer,
    Queries,
    TargetPositions,
    Task,
    by_user,
    coverages,
    queries_of,
    rank,
)
from din_dist.evaluation.slicing import parts_of
from din_dist.metrics.slices import slices
from din_dist.schema import metric_of
from din_dist.text import duration


def score_split(
    request: EvaluationRequest,
    evaluator: Evaluator,
    config: Config,
    store: EventStore,
    examples: Examples,
    logits_of: BatchScorer,
    runtime: Runtime,
) -> dict[str, Any]:
    """Returns the trainer's metrics of a split and of the floors; on the chief, also their intervals.

    All ranks must call it.
    """
    split = request.evaluation_split
    logits = evaluator.scores(split, logits_of)
    found: dict[str, Any] = dict(evaluator.metrics_of(split, logits))
    if evaluator.tasks:
        found |= {"tasks": list(evaluator.tasks), "main_task": evaluator.tasks[config.main_task]}
    found["floors"] = evaluator.floors(split)
    num_samples = affordable_samples(request.bootstrap_samples, len(logits) + len(examples.users))
    found["bootstrap_samples"] = num_samples
    ranked = evaluator.of_main_task(logits)
    if num_samples and runtime.is_chief:
        draws = None if store.facts.has_labels else examples.draws_per_row
        users = examples.user_of_example()

        def intervals(own: np.ndarray, labels: np.ndarray) -> dict[str, Interval]:
            return intervals_of_scores(own, labels, users, draws, num_samples, config.job.seed)

        if evaluator.tasks:
            by_task = {
                task: intervals(logits[:, place], evaluator.labels(split, place))
                for place, task in enumerate(evaluator.tasks)
            }
            found["intervals"] = dict(by_task[evaluator.tasks[config.main_task]])
            for task, own in by_task.items():
                found["intervals"] |= {metric_of(name, task): bounds for name, bounds in own.items()}
        else:
            found["intervals"] = intervals(logits, evaluator.labels(split))
    if request.slice_by:
        floor = evaluator.scores(split, evaluator.floor_scorers()["popularity"])
        rankings = {"model": ranked, "popularity": floor}
        labels, users = evaluator.labels(split), examples.user_of_example()
        found["slices"] = {name: _slices(store, examples, name, rankings, labels, users) for name in request.slice_by}
    return found


def _slices(
    store: EventStore,
    examples: Examples,
    name: str,
    rankings: Mapping[str, np.ndarray],
    labels: np.ndarray,
    users: np.ndarray,
) -> list[dict[str, Any]]:
    """Returns the metrics on each part of the examples by a feature."""
    parts = parts_of(store, examples, name)
    found = slices(rankings, labels, users, parts.part_of, parts.names)
    return [dataclasses.asdict(part) for part in found]


def rank_split(
    request: EvaluationRequest,
    config: Config,
    store: EventStore,
    splits: Mapping[str, Examples],
    scorer: CandidateScorer,
    runtime: Runtime,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Returns the retrieval metrics of a split and of the popularity floor; on the chief, also their intervals.

    All ranks must call it.

    Raises:
        FloatingPointError: on the chief, if a logit is NaN.
    """
    assert request.rank_against is not None
    num_items, against = store.facts.num_candidates, request.rank_against
    task = Task(against, not against and request.exclude_history, config.job.seed)
    most = request.max_events or max(1, AUTO_CANDIDATES // (1 + against if against else num_items))
    examples = splits[request.evaluation_split]
    queries = queries_of(store, examples, config.data.max_history_length, most, config.main_task, request.queries)
    asked = request.queries
    if not len(queries):
        return {f"num_{asked}": 0}
    thinned = len(queries) < queries.num_in_split
    text = f"ranking {len(queries):,} of {queries.num_in_split:,} {asked}"
    say(text + (": whole users, evenly spaced; --max_events=all ranks all" if thinned else ""))
    started = time.perf_counter()

    def progress(share: float, seconds: float) -> None:
        say(f"ranked {share:.0%} of this worker's {asked}, {duration(seconds / share * (1 - share))} left")

    category, category_of = category_of_items(store)
    diversity = _diversity(request, category_of)
    positions = rank(store, queries, task, scorer, request.ks[-1], runtime, progress, diversity)
    seconds = time.perf_counter() - started
    popularity = item_counts(store, splits)
    of_hits = request.ndcg_ideal == HITS
    parts = by_user(queries, positions, popularity, request.ks, category_of, of_hits)
    floor = rank(store, queries, task, PopularityScorer(popularity[: num_items + 1]), request.ks[-1], runtime)
    of_floor = _ratios(by_user(queries, floor, popularity, request.ks, category_of, of_hits))
    of_floor |= coverages(floor, num_items, request.ks)
    facts = _facts_of_users if asked == USERS else _facts
    found = facts(store, queries, task, positions) | {
        **({"diversity_weight": diversity.weight, "diversity_of": category} if diversity else {}),
        "ks": list(request.ks),
        f"{asked}_per_second": len(queries) / seconds,
        f"seconds_for_all_{asked}": seconds / len(queries) * queries.num_in_split,
        "metrics": _ratios(parts) | coverages(positions, num_items, request.ks),
        "floors": {"popularity": of_floor},
    }
    num_samples = affordable_samples(request.bootstrap_samples, found["num_users"])
    if num_samples and runtime.is_chief:
        found["intervals"] = intervals_of_sums(parts, num_samples, config.job.seed)
    return found


def _diversity(request: EvaluationRequest, category_of: np.ndarray | None) -> Diversity | None:
    if not request.diversity_weight:
        return None
    assert category_of is not None  # `EvaluationRequest.fitted` has refused the request otherwise
    return Diversity(request.diversity_weight, category_of)


def _facts(store: EventStore, queries: Queries, task: Task, positions: TargetPositions) -> dict[str, Any]:
    """Returns the entries that say which events were ranked against which candidates."""
    return _facts_of_candidates(queries, task, positions) | {
        "num_events": len(queries),
        "num_events_in_split": queries.num_in_split,
        "num_events_without_history": int((queries.history_ends == queries.history_starts).sum()),
        "num_events_of_repeats": num_repeats(store, queries),
        "num_events_tied": int((positions.tied > 0).sum()),
        "num_users": len(np.unique(queries.users)),
        "mean_num_candidates": float(positions.num_candidates.mean()),
    }


def _facts_of_users(store: EventStore, queries: Queries, task: Task, positions: TargetPositions) -> dict[str, Any]:
    """Returns the same of users who were asked once."""
    return _facts_of_candidates(queries, task, positions) | {
        "queries": USERS,
        "num_users": len(queries),
        "num_users_in_split": queries.num_in_split,
        "num_users_without_history": int((queries.history_ends == queries.history_starts).sum()),
        "num_targets": len(queries.targets),
        "num_targets_of_repeats": num_repeats(store, queries),
        "num_targets_tied": int((positions.tied > 0).sum()),
        "mean_num_candidates": float(positions.num_candidates.mean()),
    }


def _facts_of_candidates(queries: Queries, task: Task, positions: TargetPositions) -> dict[str, Any]:
    against = task.num_negatives
    others = positions.num_candidates - (1 if queries.num_targets is None else queries.num_targets)
    fewer = "up to " if against and (others < against).any() else ""
    return {
        "ranked_against": f"{fewer}{against} items that the user never touched" if against else "all items",
        "rank_against": against or ALL,
        "exclude_history": task.exclude_history,
        "comparable_only_with": "figures that rank against as many candidates, chosen in the same way",
    }


def _ratios(parts: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    return {name: float(above.sum() / below.sum()) for name, (above, below) in parts.items()}


def num_repeats(store: EventStore, queries: Queries) -> int:
    """Returns how many targets the user's history has."""
    query_of = queries.query_of
    windows = zip(queries.targets, queries.seen_starts[query_of], queries.history_ends[query_of], strict=True)
    return sum(int((store.history_item_ids[start:end] == target).any()) for target, start, end in windows)
