"""Bins of equal mass: as many examples in each as ties allow."""

from __future__ import annotations

import numpy as np


def equal_mass_bins(values: np.ndarray, num_bins: int) -> np.ndarray:
    """The bin of each of `values` `[M]`, ascending from 0 without a gap: int64 `[M]`.

    Equal values share a bin, that of the first of them in sorted order: the bins do not depend on the order of the
    examples, and there may be fewer than `num_bins`.
    """
    ascending = np.sort(values)
    first_ranks = np.searchsorted(ascending, values, side="left")
    return np.unique(first_ranks * num_bins // max(len(values), 1), return_inverse=True)[1].reshape(-1)
