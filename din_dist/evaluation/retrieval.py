"""Retrieval metrics of a split: the position of each chosen item among all items, or among drawn ones.

A query is one positive event of the split: its item, the target, among candidates, given the history before it. Or it
is one user, given the history before the first event of the split, and all items that the user chose in the split are
targets. Rows with a negative label give no target. Metrics over candidate lists of different sizes are not comparable.

Letters of shapes: E queries, M targets of all of them; B queries and T targets of a block; I items.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow as tf

from din_dist.data.event_store import EventStore, touched_gaps
from din_dist.data.hashing import hash64
from din_dist.data.negatives import distinct_untouched_items
from din_dist.data.pipeline import ExampleFeatures, share
from din_dist.data.side_information import SideInformation
from din_dist.data.splits import Examples
from din_dist.data.thinning import evenly_spaced, of_segments
from din_dist.data.walks import windows
from din_dist.distributed.runtime import Runtime
from din_dist.errors import FailedElsewhere
from din_dist.evaluation.catalogue import catalogue_of
from din_dist.evaluation.request import EVENTS, USERS
from din_dist.evaluation.reranking import Diversity
from din_dist.features.gathering import missing_values, signature_of
from din_dist.features.spec import Owner
from din_dist.metrics.retrieval import (
    coverage,
    hit_rate_by_user,
    ndcg_at,
    pairs_that_differ,
    recall_at,
    reciprocal_rank,
)
from din_dist.metrics.several_targets import SeveralTargets
from din_dist.models.behaviour_model import BehaviourModel, Sides

_RANKING = 5  # number of the random stream; `data/pipeline.py` uses others
SCORES_BYTES = 256 * 2**20  # memory for the logits of all candidates of a block of queries
PAIRS_AT_ONCE = 200_000  # (candidate, behaviour) pairs of a block of queries with candidates of their own
QUERIES_AT_ONCE = 256  # queries whose positions are computed at once
REPORT_SECONDS = 10.0

Tick = Callable[[float], None]  # called now and then with the share of the work that is done
Sums = dict[str, tuple[np.ndarray, np.ndarray]]  # of metrics, by name, as `by_user` returns them
_SumUp = Callable[[np.ndarray], np.ndarray]


class Askers(NamedTuple):
    """The users and the events for which candidates are scored, whose features count. Candidates' own are missing."""

    users: np.ndarray  # int64 [B]
    events: np.ndarray  # int64 [B]
    # Of each history the first and the end of each one's positions among its behaviours, int64 [B]; see
    # `EventStore.histories_in_full`.
    bounds: tuple[tuple[np.ndarray, np.ndarray], ...]

    def alone(self, row: int) -> Askers:
        """Returns one of them."""
        return self.part(slice(row, row + 1))

    def part(self, part: slice) -> Askers:
        """Returns some of them."""
        own_bounds = tuple((begins[part], ends[part]) for begins, ends in self.bounds)
        return Askers(self.users[part], self.events[part], own_bounds)


class CandidateScorer(Protocol):
    """Anything that returns logits: a model, an export, or a floor."""

    def of_all(
        self, history_item_ids: np.ndarray, history_lengths: np.ndarray, tick: Tick, askers: Askers | None = None
    ) -> np.ndarray:
        """Returns the logits of all items for B concatenated histories: `[B, I]`, which the caller may change.

        Column i belongs to item i + 1. Without `askers` all features of users and contexts are missing.
        """

    def of_some(
        self,
        history_item_ids: np.ndarray,
        history_lengths: np.ndarray,
        candidate_item_ids: np.ndarray,
        candidate_counts: np.ndarray,
        askers: Askers | None = None,
    ) -> np.ndarray:
        """Returns the logits `[C]` of each history's own candidates, like `BehaviourModel.score_candidates`."""


class ModelScorer:
    """Logits of a model, with the weights that it has at construction.

    A model that `catalogue_of` does not know scores all items for one history after the other.

    Args:
        model: the model.
        num_items: of the catalogue.
        store: the data, for features of users and contexts. None: they are missing.
        task: the one whose logits are returned.
    """

    def __init__(self, model: BehaviourModel, num_items: int, store: EventStore | None = None, task: int = 0) -> None:
        self._num_items = num_items
        self._catalogue = catalogue_of(model, num_items, task)
        self._encodings, self._num_histories = model.encodings, model.num_histories
        self._features = ExampleFeatures(store) if store and self._encodings else None
        self._side_names = [encoding.spec.name for encoding in model.side_encodings]
        self._sides = SideInformation(store, store.histories_in_full(0)) if store and self._side_names else None
        ids = tf.TensorSpec([None], tf.int32)
        more: dict[str, Any] = {"features": signature_of(self._encodings)} if self._encodings else {}
        more |= {"sides": Sides(dict.fromkeys(self._side_names, ids), ids)} if self._side_names else {}

        def score(history: Any, lengths: Any, candidates: Any, counts: Any, more: Mapping[str, Any]) -> tf.Tensor:
            return model.of_task(model.score_candidates(history, lengths, candidates, counts, **more), task)

        self._score = tf.function(score, input_signature=[*[ids] * 4, more], autograph=False)

    def of_all(
        self, history_item_ids: np.ndarray, history_lengths: np.ndarray, tick: Tick, askers: Askers | None = None
    ) -> np.ndarray:
        num_users = len(history_lengths) // self._num_histories
        if self._catalogue is not None:
            features = self._of(askers, num_users, 1)
            return self._catalogue.logits(history_item_ids, history_lengths, tick, features)
        logits = np.empty((num_users, self._num_items), np.float32)
        for row, (history, lengths) in enumerate(histories_of(history_item_ids, history_lengths, self._num_histories)):
            asker = None if askers is None else askers.alone(row)
            each = max(1, PAIRS_AT_ONCE // max(1, len(history)))
            for first in range(0, self._num_items, each):
                candidates = np.arange(first, min(first + each, self._num_items)) + 1
                counts = np.array([len(candidates)])
                logits[row, candidates - 1] = self.of_some(history, lengths, candidates, counts, asker)
            tick((row + 1) / num_users)
        return logits

    def of_some(
        self,
        history_item_ids: np.ndarray,
        history_lengths: np.ndarray,
        candidate_item_ids: np.ndarray,
        candidate_counts: np.ndarray,
        askers: Askers | None = None,
    ) -> np.ndarray:
        arrays = (history_item_ids, history_lengths, candidate_item_ids, candidate_counts)
        more: dict[str, Any] = {}
        if (features := self._of(askers, len(candidate_counts), len(candidate_item_ids))) is not None:
            more["features"] = features
        if self._side_names:
            more["sides"] = self._sides_of(askers, len(history_item_ids))
        return self._score(*(tf.constant(array, tf.int32) for array in arrays), more).numpy()

    def _sides_of(self, askers: Askers | None, num_positions: int) -> Sides:
        """Returns the side information of all positions; all of it is missing without askers."""
        if self._sides is None or askers is None:
            missing = dict.fromkeys(self._side_names, tf.zeros([1], tf.int32))
            return Sides(missing, tf.zeros([num_positions], tf.int32))
        return Sides(*self._sides.of(askers.bounds, tf.constant(askers.events)))

    def _of(self, askers: Askers | None, num_histories: int, num_candidates: int) -> dict[str, Any] | None:
        """Returns the features of histories, and those of candidates as missing; None without features."""
        if not self._encodings:
            return None
        own = [encoding for encoding in self._encodings if encoding.spec.owner is Owner.CANDIDATE]
        if self._features is None or askers is None:
            found = missing_values(self._encodings, num_histories)
        else:
            nothing = tf.zeros([len(askers.events)], tf.int32)  # the candidates are others
            found = dict(self._features.of(tf.constant(askers.users), tf.constant(askers.events), nothing))
        return found | missing_values(own, num_candidates)


class PopularityScorer:
    """The floor: the items chosen most often in training (`counts` `[I + 1]`) come first for every user."""

    def __init__(self, counts: np.ndarray) -> None:
        self._counts = counts

    def of_all(
        self, history_item_ids: np.ndarray, history_lengths: np.ndarray, tick: Tick, askers: Askers | None = None
    ) -> np.ndarray:
        num_users = len(history_lengths) if askers is None else len(askers.users)
        return np.tile(self._counts[1:].astype(np.float32), (num_users, 1))

    def of_some(
        self,
        history_item_ids: np.ndarray,
        history_lengths: np.ndarray,
        candidate_item_ids: np.ndarray,
        candidate_counts: np.ndarray,
        askers: Askers | None = None,
    ) -> np.ndarray:
        return self._counts[candidate_item_ids]


@dataclasses.dataclass(frozen=True)
class Queries:
    """E queries of a split, user by user. Their histories are windows of `EventStore.history_item_ids`."""

    events: np.ndarray  # that are asked for, or of each user the first of the split
    users: np.ndarray
    targets: np.ndarray  # [M], those of one query after those of another
    seen_starts: np.ndarray  # where all that the user did before begins; the history is the newest part of it
    history_starts: np.ndarray
    history_ends: np.ndarray
    num_in_split: int
    num_targets: np.ndarray | None = None  # int64 [E], those of each query; None: each has one

    def __len__(self) -> int:
        return len(self.events)

    def __getitem__(self, part: slice) -> Queries:
        names = ("events", "users", "seen_starts", "history_starts", "history_ends")
        found = {name: getattr(self, name)[part] for name in names}
        if self.num_targets is None:
            return dataclasses.replace(self, targets=self.targets[part], **found)
        ends = np.append(0, np.cumsum(self.num_targets))
        first, end, _ = part.indices(len(self))
        targets = self.targets[ends[first] : ends[end]]
        return dataclasses.replace(self, targets=targets, num_targets=self.num_targets[part], **found)

    @property
    def query_of(self) -> np.ndarray:
        """The query of each target, int64 `[M]`, ascending."""
        every = np.arange(len(self))
        return every if self.num_targets is None else np.repeat(every, self.num_targets)


def queries_of(
    store: EventStore,
    examples: Examples,
    max_history_length: int,
    most: int,
    task: int = 0,
    by: str = EVENTS,
) -> Queries:
    """Returns the queries of `examples`, at most `most` of them. Whole users, evenly spaced, are kept.

    Args:
        store: the events.
        examples: of a split.
        max_history_length: the most items of a history.
        most: the most queries.
        task: of whose labels positive events are.
        by: `EVENTS`: each positive event is a query. `USERS`: each user with a positive event is one.
    """
    rows = dataclasses.replace(examples, draws_per_row=1)
    every, segment_of = np.unique(rows.users, return_inverse=True)
    users_of_rows = np.repeat(segment_of, rows.rows_per_user())
    positives = None if store.labels is None else store.labels_of(rows.events(), task)
    sizes = np.bincount(users_of_rows, positives, len(every)).astype(np.int64)
    if by == USERS:
        asked = np.flatnonzero(sizes)
        sizes = np.ones(len(asked), np.int64)
        kept = asked[evenly_spaced(sizes, most)]
    else:
        kept = evenly_spaced(sizes, most)
    rows = of_segments(rows, np.flatnonzero(np.isin(segment_of, kept)))
    all_events, all_users = events, users = rows.events(), rows.user_of_example()
    if store.labels is not None:
        positive = store.labels_of(events, task) == 1
        events, users = events[positive], users[positive]
    targets, num_targets = store.item_ids[events], None
    if by == USERS:
        pairs = np.unique(users * (store.facts.num_items + 1) + targets)  # each item once a user
        user_of, targets = np.divmod(pairs, store.facts.num_items + 1)
        num_targets = np.unique(user_of, return_counts=True)[1]
        users, first_of = np.unique(all_users, return_index=True)
        events = all_events[first_of]
    ends = events if store.history_ends is None else store.history_ends[events]
    seen_starts = store.history_offsets[store.owners(users, events)]
    return Queries(
        events=events,
        users=users,
        targets=targets,
        seen_starts=seen_starts,
        history_starts=np.maximum(seen_starts, ends - max_history_length),
        history_ends=ends,
        num_in_split=int(sizes.sum()),
        num_targets=num_targets,
    )


@dataclasses.dataclass(frozen=True)
class Task:
    """The candidates that the targets are ranked against.

    Attributes:
        num_negatives: the number of items that the user never touched, or all of those if there are fewer. They are
            drawn by (seed, event) without repetition. 0: all items of the catalogue.
        exclude_history: with all items, leave out those of the user's history, but never a target.
        seed: the seed of the drawn negatives.
    """

    num_negatives: int
    exclude_history: bool
    seed: int


@dataclasses.dataclass(frozen=True)
class TargetPositions:
    """The positions of M targets in the rankings of their candidates.

    Attributes:
        greater: int64 `[M]`, the candidates above the target; see `metrics/retrieval.py`.
        tied: int64 `[M]`, the other candidates with the target's score.
        num_candidates: int64 `[E]`.
        top_items: int64 `[E, k]`, the first candidates, ties by item id; 0 where there are fewer.
    """

    greater: np.ndarray
    tied: np.ndarray
    num_candidates: np.ndarray
    top_items: np.ndarray


def rank(
    store: EventStore,
    queries: Queries,
    task: Task,
    scorer: CandidateScorer,
    num_top: int,
    runtime: Runtime,
    progress: Callable[[float, float], None] = lambda share, seconds: None,
    diversity: Diversity | None = None,
) -> TargetPositions:
    """Returns the positions of all targets, equal on all ranks. Each rank ranks its own range of the queries.

    Args:
        progress: called now and then with the share of this rank's queries that is done and the seconds they took.
        diversity: re-ranks the first `num_top` of each query's list, whose candidates must be all items.

    Raises:
        FloatingPointError: on the chief, if a logit is NaN.
        FailedElsewhere: on the other ranks in that case.
    """
    first, end = share(len(queries), runtime.rank, runtime.world_size)
    num_candidates = store.facts.num_candidates
    num_top = min(num_top, num_candidates)
    of_targets, of_queries = [np.zeros((0, 2), np.int64)], [np.zeros((0, 1 + num_top), np.int64)]
    started = reported = time.perf_counter()
    all_numbers = True
    begin = first
    while begin < end:
        block = queries[begin : min(begin + _block_size(queries[begin:end], task, num_candidates), end)]

        def tick(share: float, done: int = begin - first, size: int = len(block)) -> None:
            nonlocal reported
            if (now := time.perf_counter()) - reported > REPORT_SECONDS:
                reported = now
                progress((done + share * size) / (end - first), now - started)

        candidates, scores = _score(store, block, task, scorer, tick)
        all_numbers &= not np.isnan(scores).any()
        for row in range(0, len(block), QUERIES_AT_ONCE):
            part = slice(row, row + QUERIES_AT_ONCE)
            if diversity is not None:
                diversity.rerank(scores[part], num_top)
            of_part = candidates if len(candidates) == 1 else candidates[part]
            of_targets.append(_target_positions(block[part], task, scores[part]))
            of_queries.append(_tops(task, of_part, scores[part], num_top))
        tick(1.0)
        begin += len(block)
    if runtime.sum(np.array([all_numbers], np.int64))[0] < runtime.world_size:
        if not runtime.is_chief:
            raise FailedElsewhere
        raise FloatingPointError("The logits of all candidates must be numbers. Received: NaN. Use another checkpoint.")
    positions, tops = runtime.gather(np.concatenate(of_targets)), runtime.gather(np.concatenate(of_queries))
    return TargetPositions(positions[:, 0], positions[:, 1], tops[:, 0], tops[:, 1:])


def _block_size(queries: Queries, task: Task, num_items: int) -> int:
    """Returns how many of the first queries fit into one block, by the memory that their candidates take."""
    if not task.num_negatives:
        return max(1, SCORES_BYTES // (4 * num_items))
    lengths = queries.history_ends - queries.history_starts
    num_targets = 1 if queries.num_targets is None else queries.num_targets[:PAIRS_AT_ONCE]
    pairs = np.cumsum((num_targets + task.num_negatives) * np.maximum(lengths[:PAIRS_AT_ONCE], 1))
    return max(1, int(np.searchsorted(pairs, PAIRS_AT_ONCE, side="right")))


def _score(
    store: EventStore, queries: Queries, task: Task, scorer: CandidateScorer, tick: Tick
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the candidates, `[B, C]` or `[1, C]` if all queries share them, and their scores `[B, C]`.

    A score of -inf marks an item that is no candidate.
    """
    all_windows = _windows_of(store, queries)
    found = [(items[windows(starts, lengths)], lengths) for items, starts, lengths in all_windows]
    histories, lengths = map(np.concatenate, zip(*found, strict=True))
    bounds = tuple((starts, starts + own) for _, starts, own in all_windows)
    askers = Askers(queries.users, queries.events, bounds)
    if not task.num_negatives:
        scores = scorer.of_all(histories, lengths, tick, askers)
        if task.exclude_history:
            num_seen = queries.history_ends - queries.seen_starts
            seen = store.history_item_ids[windows(queries.seen_starts, num_seen)]
            rows = queries.query_of
            targets = scores[rows, queries.targets - 1]
            candidates = seen <= store.facts.num_candidates
            scores[np.repeat(np.arange(len(queries)), num_seen)[candidates], seen[candidates] - 1] = -np.inf
            scores[rows, queries.targets - 1] = targets
        return np.arange(1, store.facts.num_candidates + 1)[None], scores
    negatives, counts = drawn_negatives(store, queries, task)
    num_targets = np.ones(len(queries), np.int64) if queries.num_targets is None else queries.num_targets
    widest = int(num_targets.max())
    places = np.arange(widest + task.num_negatives)  # the targets, then the negatives
    is_target, is_negative = places < num_targets[:, None], places >= widest
    is_negative = is_negative & (places < widest + counts[:, None])
    candidates = np.zeros(is_target.shape, np.int64)
    candidates[is_target], candidates[is_negative] = queries.targets, negatives
    scores = np.full(is_target.shape, -np.inf, np.float32)
    real = is_target | is_negative
    scores[real] = scorer.of_some(histories, lengths, candidates[real], num_targets + counts, askers)
    return candidates, scores


def drawn_negatives(store: EventStore, queries: Queries, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Returns the negatives of all queries, concatenated, and the number `[B]` of each.

    The negatives of a query do not depend on the block that it is in.
    """
    users, user_of = np.unique(queries.users, return_inverse=True)
    num_candidates = store.facts.num_candidates
    runs = [_of_users(store.user_offsets, store.item_ids, users)]
    if store.facts.has_behaviours:
        runs.append(_of_users(store.history_offsets, store.history_item_ids, users))
    touched_offsets, gaps = touched_gaps(runs, num_candidates)
    begins, ends = touched_offsets[:-1][user_of], touched_offsets[1:][user_of]
    counts = np.minimum(task.num_negatives, num_candidates - (ends - begins))
    keys = hash64(task.seed, _RANKING, tf.constant(queries.events, tf.int64))
    negatives = distinct_untouched_items(keys, counts, begins, ends, tf.constant(gaps, tf.int32), num_candidates)
    return negatives.numpy(), counts


def _windows_of(store: EventStore, queries: Queries) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Returns of each history the items of behaviours, and the first and the number of those of each query, `[B]`."""
    if not store.sets:
        return [(store.history_item_ids, queries.history_starts, queries.history_ends - queries.history_starts)]
    found = []
    for history in store.sets:
        if history.feature:  # all behaviours, because each candidate gets its own of them
            found.append((store.history_item_ids, queries.seen_starts, queries.history_ends - queries.seen_starts))
            continue
        ends = queries.events if history.ends is None else history.ends[queries.events]
        owners = store.owners(queries.users, queries.events)
        starts = np.maximum(history.offsets[owners], ends - history.longest)
        found.append((history.item_ids, starts, ends - starts))
    return found


def histories_of(
    item_ids: np.ndarray, lengths: np.ndarray, num_histories: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the items and the lengths `[S]` of the histories of each of B users.

    Args:
        item_ids: `[N]`, as of `Batch.history_item_ids`.
        lengths: `[S * B]`, as of `Batch.history_lengths`.
        num_histories: S.
    """
    ends = np.cumsum(lengths).reshape(num_histories, -1)
    of_users = np.asarray(lengths).reshape(num_histories, -1)
    for user in range(ends.shape[1]):
        own = of_users[:, user]
        yield item_ids[windows(ends[:, user] - own, own)], own


def _of_users(offsets: np.ndarray, values: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the offsets `[M + 1]` and the values of some users alone, given those of all."""
    lengths = offsets[users + 1] - offsets[users]
    return np.concatenate([[0], np.cumsum(lengths)]), values[windows(offsets[users], lengths)]


def _target_positions(queries: Queries, task: Task, scores: np.ndarray) -> np.ndarray:
    """Returns how many candidates are above each target, and tied with it: int64 `[T, 2]`."""
    query_of, columns = queries.query_of, queries.targets - 1
    if task.num_negatives:  # a query's targets come first
        columns = np.arange(len(query_of)) - np.searchsorted(query_of, query_of)
    found = [np.zeros((0, 2), np.int64)]
    for first in range(0, len(query_of), max(1, len(queries))):  # as many as queries, whose scores fit into memory
        part = slice(first, first + len(queries))
        of_target = scores[query_of[part], columns[part]][:, None]
        others = scores if queries.num_targets is None else scores[query_of[part]]
        counts = [(others > of_target).sum(axis=1), (others == of_target).sum(axis=1) - 1]
        found.append(np.stack(counts, axis=1))
    return np.concatenate(found)


def _tops(task: Task, candidates: np.ndarray, scores: np.ndarray, num_top: int) -> np.ndarray:
    """Returns the number of candidates of each query, and the first ones: int64 `[B, 1 + num_top]`."""
    counts = (scores > -np.inf).sum(axis=1)
    if task.num_negatives:  # sort by item id, so that ties fall as they do among all items
        order = np.argsort(candidates, axis=1)
        candidates, scores = (np.take_along_axis(values, order, axis=1) for values in (candidates, scores))
    highest, columns = tf.math.top_k(scores, min(num_top, scores.shape[1]))
    items = np.take_along_axis(np.broadcast_to(candidates, scores.shape), columns.numpy(), axis=1)
    found = np.zeros((len(scores), 1 + num_top), np.int64)
    found[:, 0] = counts
    found[:, 1 : 1 + items.shape[1]] = np.where(np.isneginf(highest.numpy()), 0, items)
    return found


def by_user(
    queries: Queries,
    positions: TargetPositions,
    popularity: np.ndarray,
    ks: Sequence[int],
    category_of: np.ndarray | None = None,
    ideal_of_hits: bool = False,
) -> Sums:
    """Returns what each of the K users adds to the numerator and the denominator of each metric, `[K]` each.

    - Means over queries: recall, NDCG and the reciprocal rank, that of the first target if a query has several.
    - Means over users: the hit rate, 1 if any of the user's targets is found.
    - `rare_...`: the same with those targets alone that were chosen at most as often as their median.
    - Means over the items in the lists: how often each was chosen in training.
    - Means over the pairs of items in the lists: `diversity`, 1 if they differ in category.

    Args:
        queries: whose users are counted.
        positions: those of their targets.
        popularity: `[I + 1]`, how often each item was chosen in training.
        ks: list lengths.
        category_of: int `[I + 1]`. None: there is no diversity.
        ideal_of_hits: as of `SeveralTargets.ndcg_at`, if a query has several targets.
    """
    users, user_of = np.unique(queries.users, return_inverse=True)

    def sums(values: np.ndarray) -> np.ndarray:
        return np.bincount(user_of, values, len(users))

    of_targets = popularity[queries.targets]
    parts: Sums = {}
    for prefix, counted in {"": np.full(len(of_targets), True), "rare_": of_targets <= np.median(of_targets)}.items():
        if queries.num_targets is None:
            found = _of_events(queries, positions, counted.astype(np.float64), ks, sums)
        else:
            found = _of_several(queries, positions, counted, ks, sums, ideal_of_hits)
        parts |= {f"{prefix}{name}": part for name, part in found.items()}
    for k in ks:
        listed = positions.top_items[:, :k]
        chosen = np.where(listed > 0, popularity[listed], 0).sum(axis=1)
        parts[f"mean_popularity@{k}"] = sums(chosen), sums((listed > 0).sum(axis=1))
        if category_of is not None and (listed[:, 1:] > 0).any():  # a list of one has no pair
            differ, pairs = pairs_that_differ(listed, category_of)
            parts[f"diversity@{k}"] = sums(differ), sums(pairs)
    return parts


def _of_events(
    queries: Queries, positions: TargetPositions, counted: np.ndarray, ks: Sequence[int], sums: _SumUp
) -> Sums:
    """Returns metrics as `by_user` does, of queries with one target each.

    Args:
        queries: the events.
        positions: of their targets.
        counted: float64 `[E]`, 1 for those that count, 0 for others.
        ks: list lengths.
        sums: returns the sum of each user, `[K]`, of numbers `[E]`.
    """
    greater, tied, num_counted = positions.greater, positions.tied, sums(counted)
    found = {"mrr": (sums(counted * reciprocal_rank(greater, tied)), num_counted)}
    for k in ks:
        recall = recall_at(k, greater, tied)
        found[f"recall@{k}"] = sums(counted * recall), num_counted
        found[f"ndcg@{k}"] = sums(counted * ndcg_at(k, greater, tied)), num_counted
        hits = hit_rate_by_user(counted * recall, queries.users)[1]
        found[f"hit_rate@{k}"] = hits, (num_counted > 0).astype(np.float64)
    return found


def _of_several(
    queries: Queries,
    positions: TargetPositions,
    counted: np.ndarray,
    ks: Sequence[int],
    sums: _SumUp,
    ideal_of_hits: bool,
) -> Sums:
    """Returns metrics as `by_user` does, of queries with several targets; `counted` is bool `[M]`."""
    query_of, greater, tied = (values[counted] for values in (queries.query_of, positions.greater, positions.tied))
    targets = SeveralTargets(query_of, greater, tied, len(queries))
    num_counted = sums((targets.num_targets > 0).astype(np.float64))
    found = {"mrr": (sums(targets.first_reciprocal_rank()), num_counted)}
    for k in ks:
        found[f"recall@{k}"] = sums(targets.recall_at(k)), num_counted
        found[f"ndcg@{k}"] = sums(targets.ndcg_at(k, ideal_of_hits=ideal_of_hits)), num_counted
        found[f"hit_rate@{k}"] = sums(targets.hit_at(k)), num_counted
    return found


def coverages(positions: TargetPositions, num_items: int, ks: Sequence[int]) -> dict[str, float]:
    return {f"coverage@{k}": coverage(positions.top_items[:, :k], num_items) for k in ks}
