"""Metrics of parts of the examples, for several rankings side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from din_dist.metrics.ranking import auc, gauc


@dataclasses.dataclass(frozen=True)
class Slice:
    """`values`: of each ranking, its `metric` on these examples: GAUC, or AUC where no user has both labels here."""

    name: str
    num_examples: int
    num_positives: int
    metric: str
    values: Mapping[str, float]


def slices(
    rankings: Mapping[str, np.ndarray],
    labels: np.ndarray,
    users: np.ndarray,
    part_of: np.ndarray,
    names: Sequence[str],
) -> list[Slice]:
    """A slice for each of `names` that has examples.

    Args:
        rankings: by name, the scores `[M]` of a model or of a floor.
        part_of: `[M]`, the place in `names` of each example's part.
    """
    found = []
    for part, name in enumerate(names):
        here = np.flatnonzero(part_of == part)
        if len(here):
            metric, values = metrics_of(
                {key: scores[here] for key, scores in rankings.items()}, labels[here], users[here]
            )
            found.append(Slice(name, len(here), int(labels[here].sum()), metric, values))
    return found


def metrics_of(
    rankings: Mapping[str, np.ndarray], labels: np.ndarray, users: np.ndarray
) -> tuple[str, dict[str, float]]:
    """GAUC of each ranking, or the AUC of each where GAUC is not defined; which of the two comes first."""
    values = {name: gauc(scores, labels, users).gauc for name, scores in rankings.items()}
    if any(math.isnan(value) for value in values.values()):  # of none or all: the labels decide
        return "AUC", {name: auc(scores, labels) for name, scores in rankings.items()}
    return "GAUC", values


def range_names(values: np.ndarray, part_of: np.ndarray) -> list[str]:
    """`"7"` or `"3–5"` for each part: the smallest and the largest of its `values`, whole numbers."""
    names = []
    for part in range(int(part_of.max(initial=-1)) + 1):
        here = values[part_of == part]
        low, high = int(here.min()), int(here.max())
        names.append(f"{low:,}" if low == high else f"{low:,}–{high:,}")
    return names


def largest_parts(values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The `most` commonest of `values`, commonest first, and each example's part: one more than those for others."""
    found, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rank_of = np.empty_like(order)
    rank_of[order] = np.arange(len(order))
    kept = order[:most]
    return found[kept], np.minimum(rank_of, len(kept))[place.reshape(-1)]
