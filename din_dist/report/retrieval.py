"""How well a model finds the chosen item among all items, beside what popularity alone finds."""

from __future__ import annotations

import dataclasses

import numpy as np

from din_dist.config import Config
from din_dist.data.event_store import EventStore
from din_dist.data.splits import Examples
from din_dist.distributed.runtime import Runtime
from din_dist.evaluation.confidence import affordable_samples
from din_dist.evaluation.retrieval import CandidateScorer, PopularityScorer, Task, by_user, queries_of, rank
from din_dist.evaluation.summary import num_repeats
from din_dist.metrics.bootstrap import RatiosOfSums, intervals

KS = (1, 10, 50)
_MOST_CANDIDATES = 10_000_000  # scored in all: some seconds
_NUM_SAMPLES = 1000
_MANY_REPEATS = 0.1  # of the events: then users return to items, and those of the history stay candidates


@dataclasses.dataclass(frozen=True)
class FoundAt:
    """The share of the chosen items that are among the first k.

    Attributes:
        k: the length of the list.
        ours: the model's share.
        popularity: that of a list of the items with the most positive events in training.
        low: bound of the 95 % interval of the difference, by resampling users.
        high: likewise.
    """

    k: int
    ours: float
    popularity: float
    low: float
    high: float

    @property
    def gain(self) -> float:
        return self.ours - self.popularity


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """The results over the events of a split.

    Attributes:
        num_events: that were ranked.
        num_in_split: also counts events that were left out to save time.
        num_items: of the catalogue.
        repeats: the share of the events whose item the user had chosen before.
        excludes_history: items that the user had chosen before are no candidates.
        rows: by k.
    """

    num_events: int
    num_in_split: int
    num_items: int
    repeats: float
    excludes_history: bool
    rows: list[FoundAt]


def find(
    store: EventStore, examples: Examples, config: Config, popularity: np.ndarray, scorer: CandidateScorer
) -> Retrieval | None:
    """Ranks the chosen item of each event among all items.

    Args:
        store: the data.
        examples: of the split.
        config: the job's.
        popularity: `[num_items + 1]`, the positive training events of each item.
        scorer: of the model.

    Returns:
        None if no event is positive.
    """
    num_items = store.facts.num_candidates
    most = max(1, _MOST_CANDIDATES // num_items)
    queries = queries_of(store, examples, config.data.max_history_length, most, config.main_task)
    ks = [k for k in KS if k <= num_items]
    if not len(queries):
        return None
    repeats = num_repeats(store, queries) / len(queries)
    task = Task(0, exclude_history=repeats <= _MANY_REPEATS, seed=config.job.seed)
    sums: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    scorers = {"model": scorer, "popularity": PopularityScorer(popularity[: num_items + 1])}
    for name, each in scorers.items():
        positions = rank(store, queries, task, each, ks[-1], Runtime())
        found = by_user(queries, positions, popularity, ks)
        sums |= {f"{name}@{k}": found[f"recall@{k}"] for k in ks}
    ratios, num_users = RatiosOfSums(sums), len(np.unique(queries.users))
    values = dict(zip(ratios.names, ratios(np.ones(num_users)), strict=True))
    bounds = intervals(
        lambda weights: np.subtract(*np.split(ratios(weights), 2)),
        num_users,
        affordable_samples(_NUM_SAMPLES, num_users),
        config.job.seed,
    )
    rows = [
        FoundAt(k, float(values[f"model@{k}"]), float(values[f"popularity@{k}"]), float(low), float(high))
        for k, (low, high) in zip(ks, bounds, strict=True)
    ]
    return Retrieval(len(queries), queries.num_in_split, num_items, repeats, task.exclude_history, rows)
