"""Scores the examples of a split with an export, by the log's own ids, as a client would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from din_dist.data.event_store import ITEMS, EventStore
from din_dist.errors import InputError
from din_dist.schema import Batch
from din_dist.serving.bundle import Bundle

_PAIRS = 100_000  # most (candidate, behaviour) pairs in one call


class ExportScorer:
    """Scores packed batches and candidate lists; see `evaluation/retrieval.py: CandidateScorer`."""

    def __init__(self, bundle: Bundle, store: EventStore) -> None:
        self._bundle, self._num_items = bundle, store.facts.num_items
        own_ids = store.vocabulary(ITEMS).to_numpy()
        kind = tf.string if bundle.manifest.item_id_type == "string" else tf.int64
        self._own_ids = tf.constant(own_ids, kind)

    def of_batch(self, batch: Batch) -> tf.Tensor:
        """Returns the logits `[B]` of a packed batch (see `schema`)."""
        histories, candidates = batch.history_item_ids, batch.candidate_item_ids
        logits = self._bundle.score(self._own(histories), batch.history_lengths, self._own(candidates))
        return tf.constant(logits)

    def of_all(
        self,
        history_item_ids: np.ndarray,
        history_lengths: np.ndarray,
        tick: Callable[[float], None],
        features: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        _refuse(features)
        logits = np.empty((len(history_lengths), self._num_items), np.float32)
        ends = np.cumsum(history_lengths)
        for row, (end, length) in enumerate(zip(ends, history_lengths, strict=True)):
            history = self._own(history_item_ids[end - length : end])
            each = max(1, _PAIRS // max(1, int(length)))
            for first in range(0, self._num_items, each):
                candidates = self._own_ids[first : first + each]
                count = len(candidates)
                found = self._bundle.rank_histories(history, np.array([length]), candidates, np.array([count]))
                logits[row, first : first + count] = found
            tick((row + 1) / len(ends))
        return logits

    def of_some(
        self,
        history_item_ids: np.ndarray,
        history_lengths: np.ndarray,
        candidate_item_ids: np.ndarray,
        candidate_counts: np.ndarray,
        features: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        _refuse(features)
        return self._bundle.rank_histories(
            self._own(history_item_ids), history_lengths, self._own(candidate_item_ids), candidate_counts
        )

    def _own(self, item_ids: np.ndarray | tf.Tensor) -> tf.Tensor:
        """Returns the log's own ids for dense ids, which count from 1."""
        return tf.gather(self._own_ids, tf.cast(item_ids, tf.int64) - 1)


def _refuse(features: Mapping[str, Any] | None) -> None:
    if features:
        names = ", ".join(sorted(features))
        raise InputError(
            f"--export_dir: an export is scored without features. Received: {names}. Evaluate the job instead."
        )
