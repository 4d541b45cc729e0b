"""Bins of equal mass: as many examples in each as ties allow."""

from __future__ import annotations

import numpy as np


def equal_mass_bins(values: np.ndarray, num_bins: int) -> np.ndarray:
    """Returns the bin of each of `values` `[M]`: int64 `[M]`, counted from 0 without a gap.

    Equal values share a bin: the one where the middle of them falls in sorted order. The bins therefore do not depend
    on the order of the examples, and there may be fewer than `num_bins`.
    """
    ascending = np.sort(values)
    twice_the_middle = np.searchsorted(ascending, values, "left") + np.searchsorted(ascending, values, "right")
    return np.unique(twice_the_middle * num_bins // max(2 * len(values), 1), return_inverse=True)[1].reshape(-1)
