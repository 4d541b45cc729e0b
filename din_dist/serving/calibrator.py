"""Turns logits into click probabilities that can be taken at their word.

A calibrator is fitted on the validation split when a model is exported. The manifest keeps it, and the export, `serve`
and `predict` apply it to `click_probability` alone. It never changes an order, except that it may make two equal.

Letters of shapes: M examples, K knots.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from din_dist.errors import InputError
from din_dist.metrics.bins import equal_mass_bins
from din_dist.text import shown

_MOST_KNOTS = 1000
_NEWTON_STEPS = 100
_CONVERGED = 1e-12
_SAME = 1e-6  # logits that differ by no more of their size are one, because they are float32


class Calibrate(enum.StrEnum):
    """How click probabilities are calibrated."""

    NONE = "none"
    PLATT = "platt"  # sigmoid(slope * logit + intercept)
    ISOTONIC = "isotonic"  # any function that does not fall


@dataclasses.dataclass(frozen=True)
class Calibrator:
    """A function from logits to click probabilities.

    Attributes:
        kind: of the function.
        slope, intercept: of `PLATT`.
        logits: ascending `[K]`, the knots of `ISOTONIC`.
        calibrated: `[K]`, the calibrated logit at each knot, not falling; linear between them, constant outside.
        negative_rate: the share of the negatives that the log kept. The odds of a click are multiplied by it.
    """

    kind: Calibrate = Calibrate.NONE
    slope: float = 1.0
    intercept: float = 0.0
    logits: tuple[float, ...] = ()
    calibrated: tuple[float, ...] = ()
    negative_rate: float = 1.0

    @property
    def changes_nothing(self) -> bool:
        """True if the click probability is the sigmoid of the logit."""
        return self.kind is Calibrate.NONE and self.negative_rate == 1

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Returns the click probabilities of logits, float32, in a form that cannot overflow."""
        logits = self.of_logits(logits.astype(np.float64))
        small = np.exp(-np.abs(logits))
        return (np.where(logits >= 0, 1.0, small) / (1.0 + small)).astype(np.float32)

    def of_logits(self, logits: np.ndarray) -> np.ndarray:
        """Returns the calibrated logits, float64."""
        match self.kind:
            case Calibrate.PLATT:
                logits = self.slope * logits + self.intercept
            case Calibrate.ISOTONIC:
                logits = np.interp(logits, self.logits, self.calibrated)
        return logits + math.log(self.negative_rate)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields that belong to the kind."""
        fields: dict[str, Any] = {"kind": str(self.kind), "negative_rate": self.negative_rate}
        if self.kind is Calibrate.PLATT:
            fields |= {"slope": self.slope, "intercept": self.intercept}
        elif self.kind is Calibrate.ISOTONIC:
            fields |= {"logits": list(self.logits), "calibrated": list(self.calibrated)}
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Calibrator:
        """Returns what `to_json` has written.

        Raises:
            ValueError, TypeError: the fields are those of no calibrator.
        """
        fields = dict(fields)
        knots = [tuple(map(float, fields.pop(name, ()))) for name in ("logits", "calibrated")]
        kind = Calibrate(fields.pop("kind"))
        found = cls(kind, logits=knots[0], calibrated=knots[1], **{name: float(fields[name]) for name in fields})
        numbers = [found.slope, found.intercept, found.negative_rate, *found.logits, *found.calibrated]
        falls = any(np.any(np.diff(values) < 0) for values in knots)
        if not np.isfinite(numbers).all() or not 0 < found.negative_rate <= 1 or found.slope < 0 or falls:
            raise ValueError(f"impossible numbers: {shown(str(fields))}")
        if len(found.logits) != len(found.calibrated) or (kind is Calibrate.ISOTONIC) != bool(found.logits):
            raise ValueError(f"{len(found.logits)} and {len(found.calibrated)} knots of {kind}")
        return found


def fit(kind: Calibrate, logits: np.ndarray, labels: np.ndarray, negative_rate: float = 1.0) -> Calibrator:
    """Fits a calibrator.

    Args:
        kind: of the function.
        logits: `[M]`, of the validation split.
        labels: `[M]` in {0, 1}.
        negative_rate: the share of the negatives that the log kept.

    Raises:
        InputError: the examples are not of both labels.
    """
    if kind is Calibrate.NONE:
        return Calibrator(negative_rate=negative_rate)
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    num_positives = int(labels.sum())
    if not 0 < num_positives < len(labels):
        raise InputError(
            f"--calibrate: {kind} is fitted on validation examples of both labels. Received: {num_positives:,} "
            f"positive ones among {len(labels):,}. Train with more events in validation, or drop it."
        )
    if kind is Calibrate.PLATT:
        slope, intercept = _fit_platt(logits, labels)
        return Calibrator(kind, slope, intercept, negative_rate=negative_rate)
    knots, calibrated = _fit_isotonic(logits, labels)
    return Calibrator(kind, logits=knots, calibrated=calibrated, negative_rate=negative_rate)


def _fit_platt(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Returns slope and intercept of the largest likelihood, by Newton's method with halved steps.

    The targets are a little within 0 and 1, so that the maximum exists: Platt 1999; Lin, Lin and Weng 2007.
    """
    positives = labels.sum()
    high, low = (positives + 1) / (positives + 2), 1 / (len(labels) - positives + 2)
    targets = np.where(labels == 1, high, low)
    center, scale = logits.mean(), logits.std() or 1.0
    inputs = np.stack([(logits - center) / scale, np.ones_like(logits)], axis=1)
    if np.ptp(logits) <= _SAME * max(1.0, float(np.abs(logits).max())):
        inputs[:, 0] = 0  # a line through one point

    def loss(weights: np.ndarray) -> float:
        found = inputs @ weights
        return float(np.mean(np.logaddexp(0, found) - targets * found))

    weights, best = np.zeros(2), math.inf
    for _ in range(_NEWTON_STEPS):
        value = loss(weights)
        if best - value < _CONVERGED * max(1.0, abs(value)):
            break
        best = value
        expected = 1 / (1 + np.exp(-np.clip(inputs @ weights, -500, 500)))
        gradient = inputs.T @ (expected - targets) / len(targets)
        curvature = (inputs * (expected * (1 - expected))[:, None]).T @ inputs / len(targets) + 1e-12 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        while loss(weights - step) > value and np.abs(step).max() > _CONVERGED:
            step /= 2
        weights = weights - step
    if weights[0] <= 0:  # the model orders validation wrongly; an order must not be turned round
        return 0.0, float(np.log(targets.mean() / (1 - targets.mean())))
    slope = float(weights[0] / scale)
    return slope, float(weights[1] - slope * center)


def _fit_isotonic(logits: np.ndarray, labels: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns knots and their calibrated logits, by pooling neighbours that fall (Ayer et al. 1955).

    Examples are first pooled to bins of equal mass, and shares stay half an example away from 0 and 1.
    """
    bin_of = equal_mass_bins(logits, _MOST_KNOTS)
    sizes = np.bincount(bin_of).astype(np.float64)
    places, shares = np.bincount(bin_of, logits) / sizes, np.bincount(bin_of, labels) / sizes
    blocks: list[tuple[float, float, float]] = []  # mean logit, share of positives, examples
    for place, share, size in zip(places, shares, sizes, strict=True):
        block = (place, share, size)
        while blocks and blocks[-1][1] >= block[1]:
            last = blocks.pop()
            total = last[2] + block[2]
            mean = [(last[n] * last[2] + block[n] * block[2]) / total for n in range(2)]
            block = (mean[0], mean[1], total)
        blocks.append(block)
    least = 0.5 / len(labels)
    rates = np.clip([share for _, share, _ in blocks], least, 1 - least)
    return tuple(float(place) for place, _, _ in blocks), tuple(np.log(rates / (1 - rates)).tolist())
