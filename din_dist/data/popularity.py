"""Weighs items by how often training clicks them, for negatives that are drawn unevenly.

PACKED/popularity-SPLIT-.../
    popularity-cumulative.npy  popularity-touched_below.npy

Letters of shapes: T touched items, U users.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

import numpy as np

from din_dist.config import DataConfig, Negatives
from din_dist.data.event_store import USERS, EventStore, map_array
from din_dist.data.splits import Examples, item_counts, kept_in, publish
from din_dist.data.trained_items import TrainedItems
from din_dist.data.walks import user_runs
from din_dist.errors import InputError

_NAME = "popularity"
_CUMULATIVE, _BELOW = "cumulative", "touched_below"
_SCALE = 1024  # weights are whole numbers, so that draws are exact


@dataclasses.dataclass(frozen=True, eq=False)
class Popularity:
    """Whole weights by which items are drawn.

    Attributes:
        cumulative: int64 `[num_items + 1]`, the weight of all items up to each; 0 for item 0.
        touched_below: int64 `[T]`, for each touched item of `EventStore.touched_gaps`: the weight of all items below it
            that its user never touched.
        in_batch: draw among the items of the global batch first.
    """

    cumulative: np.ndarray
    touched_below: np.ndarray
    in_batch: bool

    @property
    def logit_offsets(self) -> np.ndarray:
        """The correction of each item, float32 `[num_items + 1]`: minus the logarithm of its weight over the mean.

        A model that is trained on `logit + offset` has the logits that it would have with uniform negatives: with
        negatives by Q the best one is log p(item | user) - log Q(item) and a constant. Source: Menon et al., Long-tail
        learning via logit adjustment, ICLR 2021; Bengio and Senecal 2008. An item of weight 0 is never drawn: 0.
        """
        weights = np.diff(self.cumulative, prepend=0).astype(np.float64)
        drawn = weights > 0
        found = np.zeros(len(weights), np.float32)
        found[drawn] = -np.log(weights[drawn] / weights[drawn].mean())
        return found


def popularity(
    store: EventStore, config: DataConfig, splits: Mapping[str, Examples], trained: TrainedItems | None
) -> Popularity | None:
    """Returns the weights that `--negatives` asks for, or None if all items are drawn alike.

    The arrays are kept beside the packed events and memory-mapped, like the splits.

    Raises:
        InputError: the log has labels, or a user has touched all items that could be drawn.
    """
    negatives = config.drawn_negatives
    if negatives.kind == Negatives.UNIFORM:
        return None
    if store.touched_offsets is None or store.touched_gaps is None:
        raise InputError(
            f"--negatives: is for logs without labels, whose negatives are drawn. Received: {config.negatives!r}, and "
            "a log with labels. Drop it."
        )
    in_batch = negatives.kind == Negatives.BATCH
    key = f"{negatives.kind} {negatives.exponent!r} {config.unknown_item}"
    folder = kept_in(_NAME, store, config)
    folder = folder.with_name(f"{folder.name}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}")
    if not folder.is_dir():
        weights = _rows(store, splits["train"]) if in_batch else _powers(item_counts(store, splits), negatives.exponent)
        if trained is not None:
            weights = np.where(trained.occur, weights, 0)
        weights[0] = 0
        weights[store.facts.num_candidates + 1 :] = 0
        arrays = _arrays(store, weights)
        _require_untouched(store, splits["train"], arrays)
        try:
            publish(folder, {_NAME: arrays})
        except OSError:  # prepared data on a read-only disk: each process holds its own arrays
            return Popularity(arrays[_CUMULATIVE], arrays[_BELOW], in_batch)
    found = [map_array(folder / f"{_NAME}-{name}.npy", store.files) for name in (_CUMULATIVE, _BELOW)]
    lengths, wanted = [len(array) for array in found], [store.facts.num_items + 1, len(store.touched_gaps)]
    if lengths != wanted:
        raise InputError(f"{folder}: must hold {wanted} values. Received: {lengths}. Delete this folder.")
    return Popularity(np.asarray(found[0]), np.asarray(found[1]), in_batch)


def _powers(counts: np.ndarray, exponent: float) -> np.ndarray:
    """Returns whole weights, int64: the power of 1 + the number of clicks, so that each item can be drawn."""
    return np.maximum(1, np.round(_SCALE * (1.0 + counts) ** exponent)).astype(np.int64)


def _rows(store: EventStore, train: Examples) -> np.ndarray:
    """Returns how many training events each item has, int64 `[num_items + 1]`."""
    counts = np.zeros(store.facts.num_items + 1, np.int64)
    for events in train.event_parts():
        counts += np.bincount(store.item_ids[events], minlength=len(counts))
    return counts


def _arrays(store: EventStore, weights: np.ndarray) -> dict[str, np.ndarray]:
    offsets, gaps = store.touched_offsets, store.touched_gaps
    assert offsets is not None
    assert gaps is not None
    cumulative = np.cumsum(weights, dtype=np.int64)
    below = np.empty(len(gaps), np.int64)
    for first, end in user_runs(offsets[1:]):
        run = slice(int(offsets[first]), int(offsets[end]))
        begins = offsets[first:end] - run.start
        counts = np.diff(offsets[first : end + 1])
        rank = np.arange(run.stop - run.start) - np.repeat(begins, counts)
        items = gaps[run] + 1 + rank
        before = np.concatenate([[0], np.cumsum(weights[items])])
        touched = before[:-1] - np.repeat(before[begins], counts)  # the weight of smaller touched items of the user
        below[run] = cumulative[items - 1] - touched
    return {_CUMULATIVE: cumulative, _BELOW: below}


def _require_untouched(store: EventStore, train: Examples, arrays: Mapping[str, np.ndarray]) -> None:
    """Refuses a user of training who has touched every item that could be drawn."""
    offsets, gaps = store.touched_offsets, store.touched_gaps
    assert offsets is not None
    assert gaps is not None
    users = train.users
    last = offsets[users + 1] - 1  # training users have touched something
    items = gaps[last] + 1 + (last - offsets[users])
    total = arrays[_CUMULATIVE][-1]
    left = arrays[_BELOW][last] + total - arrays[_CUMULATIVE][items]
    if len(left) and left.min() <= 0:
        user = store.vocabulary(USERS)[int(users[left.argmin()])]
        raise InputError(
            "Negatives are items that training clicks and that the user never touched. Received: user "
            f"{user.as_py()!r}, who touched all of them. Remove that user, or use --negatives=uniform."
        )
