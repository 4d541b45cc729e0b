"""Metrics on parts of the examples, for several rankings at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from din_dist.metrics.ranking import auc, gauc


@dataclasses.dataclass(frozen=True)
class Slice:
    """A part of the examples.

    `values` holds the `metric` of each ranking on them: GAUC, or AUC where no user has both labels in this part.
    """

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
    """Returns a slice for each of `names` that has examples.

    Args:
        rankings: name -> scores `[M]` of a model or of a floor.
        labels: `[M]` in {0, 1}.
        users: int `[M]`.
        part_of: int `[M]`, the index in `names` of each example's part.
        names: the names of the parts.
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
    """Returns the metric's name, and the GAUC of each ranking; the AUC of each where GAUC is not defined."""
    values = {name: gauc(scores, labels, users).gauc for name, scores in rankings.items()}
    if any(math.isnan(value) for value in values.values()):  # for all rankings or none: it depends on the labels
        return "AUC", {name: auc(scores, labels) for name, scores in rankings.items()}
    return "GAUC", values


def range_names(values: np.ndarray, part_of: np.ndarray) -> list[str]:
    """Returns the smallest and the largest of the `values` of each part, whole numbers: `"7"` or `"3–5"`."""
    names = []
    for part in range(int(part_of.max(initial=-1)) + 1):
        here = values[part_of == part]
        low, high = int(here.min()), int(here.max())
        names.append(f"{low:,}" if low == high else f"{low:,}–{high:,}")
    return names


def largest_parts(values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the `most` commonest of `values`, commonest first, and the part of each example.

    A part is an index among the commonest values; all other values share the index after the last of them.
    """
    found, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rank_of = np.empty_like(order)
    rank_of[order] = np.arange(len(order))
    kept = order[:most]
    return found[kept], np.minimum(rank_of, len(kept))[inverse.reshape(-1)]
