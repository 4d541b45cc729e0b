"""Scores the examples of a split with an export, by the log's own ids, as a client would."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow as tf

from din_dist.data.event_store import ITEMS, EventStore
from din_dist.data.splits import Examples
from din_dist.data.walks import windows
from din_dist.evaluation.retrieval import Askers, histories_of
from din_dist.features.spec import Owner
from din_dist.schema import Batch
from din_dist.serving.asked import Recommend
from din_dist.serving.bundle import Bundle
from din_dist.serving.given_behaviours import GivenBehaviours, by_user
from din_dist.serving.own_values import OwnBehaviours, OwnValues, by_owner

_PAIRS = 100_000  # most (candidate, behaviour) pairs in one call
_USERS_AT_ONCE = 256  # whose items are found at once


class ExportScorer:
    """Scores packed batches and candidate lists; see `evaluation/retrieval.py: CandidateScorer`.

    Args:
        bundle: the opened export.
        store: its job's data, from which the own values of declared features are read.
        examples: those that batches are made of, for declared features.
        task: the one by which candidates are ranked.
    """

    def __init__(self, bundle: Bundle, store: EventStore, examples: Examples | None = None, task: int = 0) -> None:
        self._bundle, self._num_items = bundle, store.facts.num_candidates
        self._predictions = dataclasses.replace(bundle.manifest.predictions, main=task)
        self._examples, self._values = examples, OwnValues(store)
        self._own_behaviours = OwnBehaviours(store, self._values, bundle.manifest.max_history_length)
        self._histories = list(bundle.manifest.histories)
        vocabulary = store.vocabulary(ITEMS)
        integers = pa.types.is_integer(vocabulary.type)
        self._own_ids_in_order = vocabulary.cast(pa.int64() if integers else pa.binary()).combine_chunks()
        own_ids = vocabulary.to_numpy()
        kind = tf.string if bundle.manifest.item_id_type == "string" else tf.int64
        self._own_ids = tf.constant(own_ids, kind)
        self._item_vectors: np.ndarray | None = None

    def of_batch(self, batch: Batch) -> tf.Tensor:
        """Returns the logits, `[B]` or `[B, T]`, of a packed batch (see `schema`)."""
        histories, candidates = batch.history_item_ids, batch.candidate_item_ids
        given = {}
        of_behaviours: Mapping[str, Any] = {}
        if self._values.specs or self._values.of_history:
            if self._examples is None:
                raise ValueError("examples: must be given, because the model has features of them. Received: None.")
            of_behaviours = self._own_behaviours.of(self._examples, batch)
            users, events = self._examples.users_and_events(batch.example_ids.numpy())
            given = by_owner(self._values.of(users, events, candidates.numpy()))
        behaviours, lengths = self._behaviours(histories.numpy(), batch.history_lengths.numpy(), of_behaviours)
        return tf.constant(self._bundle.score(behaviours, lengths, self.own_ids(candidates), **given))

    def of_all(
        self,
        history_item_ids: np.ndarray,
        history_lengths: np.ndarray,
        tick: Callable[[float], None],
        askers: Askers | None = None,
    ) -> np.ndarray:
        if self._bundle.manifest.finds_items:
            return self._by_vectors(history_item_ids, history_lengths, tick, askers)
        num_users = len(history_lengths) // self.num_histories
        logits = np.empty((num_users, self._num_items), np.float32)
        for row, (items, lengths) in enumerate(histories_of(history_item_ids, history_lengths, self.num_histories)):
            asker = None if askers is None else askers.alone(row)
            history, length = self._behaviours(items, lengths, self._of_askers(asker))
            given = self._of(askers, row, row + 1)
            each = max(1, _PAIRS // max(1, len(items)))
            for first in range(0, self._num_items, each):
                candidates = self._own_ids[first : min(first + each, self._num_items)]
                count = len(candidates)
                found = self._bundle.rank_histories(history, length, candidates, np.array([count]), **given)
                logits[row, first : first + count] = self._predictions.ranking(found)
            tick((row + 1) / num_users)
        return logits

    @property
    def num_histories(self) -> int:
        """The number of histories of a user."""
        return len(self._histories) or 1

    @property
    def num_items(self) -> int:
        """The number of items that may be found."""
        return self._num_items

    def found(
        self,
        find: Callable[..., dict[str, np.ndarray]],
        asked: Recommend,
        item_ids: np.ndarray,
        lengths: np.ndarray,
        askers: Askers | None,
    ) -> np.ndarray:
        """Returns the dense ids of the items that are found for B users, best first, int64 `[B, k]`; 0 after the last.

        Args:
            find: `Bundle.recommend` or `Bundle.nearest`.
            asked: the request.
            item_ids: `[N]`, the histories concatenated, as of `Batch.history_item_ids`.
            lengths: `[S * B]`.
            askers: whose features count.
        """
        behaviours, of_users = self._behaviours(item_ids, lengths, self._of_askers(askers))
        outputs = find(behaviours, of_users, asked, **self._of(askers, 0, len(of_users)))
        ids, counts = outputs["item_ids"], outputs["counts"]
        own_ids = pa.array(ids.ravel(), pa.binary() if ids.dtype == object else pa.int64())
        places = pc.index_in(own_ids, self._own_ids_in_order).fill_null(-1).to_numpy().reshape(ids.shape)
        real = np.arange(ids.shape[1]) < counts[:, None]
        return np.where(real & (places < self._num_items), places + 1, 0).astype(np.int64)

    def _by_vectors(
        self, history_item_ids: np.ndarray, history_lengths: np.ndarray, tick: Callable[[float], None], askers: Any
    ) -> np.ndarray:
        """Returns what `of_all` does, from the vectors of users and items."""
        if self._item_vectors is None:
            self._item_vectors = self._bundle.embed_items(self._own_ids[: self._num_items])["embeddings"]
        temperature = self._bundle.manifest.temperature
        logits = np.empty((len(history_lengths), self._num_items), np.float32)
        ends = np.cumsum(history_lengths)
        for first in range(0, len(logits), _USERS_AT_ONCE):
            rows = slice(first, min(first + _USERS_AT_ONCE, len(logits)))
            items = history_item_ids[ends[first] - history_lengths[first] : ends[rows.stop - 1]]
            given = self._of(askers, rows.start, rows.stop)
            users = self._bundle.embed_users(self.own_ids(items), history_lengths[rows], **given)
            logits[rows] = (users @ self._item_vectors.T).max(axis=1) / temperature
            tick(rows.stop / len(logits))
        return logits

    def of_some(
        self,
        history_item_ids: np.ndarray,
        history_lengths: np.ndarray,
        candidate_item_ids: np.ndarray,
        candidate_counts: np.ndarray,
        askers: Askers | None = None,
    ) -> np.ndarray:
        behaviours, lengths = self._behaviours(history_item_ids, history_lengths, self._of_askers(askers))
        found = self._bundle.rank_histories(
            behaviours,
            lengths,
            self.own_ids(candidate_item_ids),
            candidate_counts,
            **self._of(askers, 0, len(candidate_counts)),
        )
        return self._predictions.ranking(found)

    def _of(self, askers: Askers | None, first: int, end: int) -> dict[str, Mapping[str, Any]]:
        """Returns the features of users and contexts; those of candidates are missing."""
        if askers is None or not self._values.specs:
            return {}
        nothing = np.zeros(end - first, np.int64)  # the candidates are others
        found = self._values.of(askers.users[first:end], askers.events[first:end], nothing)
        return by_owner({owner: values for owner, values in found.items() if owner is not Owner.CANDIDATE})

    def _of_askers(self, askers: Askers | None) -> Mapping[str, Any]:
        return {} if askers is None else self._own_behaviours.of_askers(askers)

    def _behaviours(
        self, item_ids: np.ndarray, lengths: np.ndarray, features: Mapping[str, Any]
    ) -> tuple[GivenBehaviours, np.ndarray]:
        """Returns behaviours and lengths as a bundle takes them, given those of a batch and their features."""
        if not self._histories:
            return GivenBehaviours(self.own_ids(item_ids), features=features), lengths
        order, names, lengths = by_user(lengths, self._histories)
        ordered = {name: values[order] for name, values in features.items()}
        return GivenBehaviours(self.own_ids(item_ids[order]), tf.constant(names, tf.string), ordered), lengths

    def own_ids(self, item_ids: np.ndarray | tf.Tensor) -> tf.Tensor:
        """Returns the log's own ids for dense ids, which count from 1."""
        return tf.gather(self._own_ids, tf.cast(item_ids, tf.int64) - 1)


class FoundScorer:
    """Ranks all items as an export recommends them; see `evaluation/retrieval.py: CandidateScorer`.

    An item that is not found stands below all that are, and ties with the others like it.

    Args:
        find: `Bundle.recommend` or `Bundle.nearest` of an export.
        asked: how many items are found, all of which count.
        scorer: knows the histories and features of the export.
    """

    def __init__(self, find: Callable[..., dict[str, np.ndarray]], asked: Recommend, scorer: ExportScorer) -> None:
        self._find, self._asked, self._scorer = find, asked, scorer

    def of_all(
        self,
        history_item_ids: np.ndarray,
        history_lengths: np.ndarray,
        tick: Callable[[float], None],
        askers: Askers | None = None,
    ) -> np.ndarray:
        scorer = self._scorer
        own = np.asarray(history_lengths).reshape(scorer.num_histories, -1)
        starts = np.cumsum(history_lengths).reshape(own.shape) - own
        scores = np.full((own.shape[1], scorer.num_items), -1.0 - self._asked.k, np.float32)
        for first in range(0, len(scores), _USERS_AT_ONCE):
            part = slice(first, min(first + _USERS_AT_ONCE, len(scores)))
            lengths = own[:, part].ravel()
            items = history_item_ids[windows(starts[:, part].ravel(), lengths)]
            found = scorer.found(self._find, self._asked, items, lengths, askers.part(part) if askers else None)
            rows, places = np.nonzero(found)
            scores[first + rows, found[rows, places] - 1] = -places.astype(np.float32)
            tick(part.stop / len(scores))
        return scores

    def of_some(
        self,
        history_item_ids: np.ndarray,
        history_lengths: np.ndarray,
        candidate_item_ids: np.ndarray,
        candidate_counts: np.ndarray,
        askers: Askers | None = None,
    ) -> np.ndarray:
        scores = self.of_all(history_item_ids, history_lengths, lambda share: None, askers)
        rows = np.repeat(np.arange(len(candidate_counts)), candidate_counts)
        return scores[rows, candidate_item_ids - 1]
