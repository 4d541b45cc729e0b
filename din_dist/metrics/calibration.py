"""Calibration of click probabilities: of the examples predicted at 30 %, 30 % should end in a click."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from din_dist.metrics.bins import equal_mass_bins

NUM_BINS = 15
_Z = 1.96  # standard deviations to each side of a 95 % interval


@dataclasses.dataclass(frozen=True)
class CalibrationBin:
    """Examples of similar click probability.

    `low` and `high` bound the true rate with 95 % confidence (Wilson), if the examples are independent.
    """

    num_examples: int
    predicted: float  # mean click probability
    observed: float  # share of positives
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Bins by ascending click probability, and the expected calibration error over them; NaN without examples."""

    bins: tuple[CalibrationBin, ...]
    error: float


def calibration(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = NUM_BINS) -> Calibration:
    """Computes the calibration of click probabilities.

    The bins hold equal numbers of examples, so that no bin rests on a few. With M_b of the M examples in bin b:
    error = sum over b of M_b / M * |mean probability in b - share of positives in b|.

    Args:
        probabilities: `[M]`.
        labels: `[M]` in {0, 1}.
        num_bins: the number of bins, unless ties merge some.
    """
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels, np.float64)
    bin_of = equal_mass_bins(probabilities, num_bins)
    counts = np.bincount(bin_of)
    predicted = np.bincount(bin_of, probabilities) / counts
    observed = np.bincount(bin_of, labels) / counts
    bins = tuple(
        CalibrationBin(int(count), float(mean), float(rate), *wilson_interval(float(rate), int(count)))
        for count, mean, rate in zip(counts, predicted, observed, strict=True)
    )
    error = float(np.average(np.abs(predicted - observed), weights=counts)) if bins else math.nan
    return Calibration(bins, error)


def wilson_interval(rate: float, num_examples: int) -> tuple[float, float]:
    """Returns bounds of the true rate with 95 % confidence, given the observed `rate` (Wilson 1927)."""
    scale = 1 + _Z**2 / num_examples
    middle = (rate + _Z**2 / (2 * num_examples)) / scale
    half = _Z / scale * math.sqrt(rate * (1 - rate) / num_examples + _Z**2 / (4 * num_examples**2))
    return max(0.0, middle - half), min(1.0, middle + half)
