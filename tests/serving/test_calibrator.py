"""Calibrated click probabilities: against a truth that is planted, by hand, and wherever an export answers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from din_dist.errors import InputError
from din_dist.metrics.calibration import calibration
from din_dist.serving.calibrator import Calibrate, Calibrator, fit
from din_dist.serving.export.signatures import calibrated

PLATT, ISOTONIC = Calibrate.PLATT, Calibrate.ISOTONIC
MODELS = {
    "too sure": lambda truth: 3 * truth + 1,
    "too shy": lambda truth: 0.2 * truth - 2,
    "curved": lambda truth: np.sign(truth) * truth**2 + 0.5,
}


def planted(model: str, num_examples: int, seed: int, negative_rate: float = 1.0) -> tuple[np.ndarray, ...]:
    """Returns a model's logits, labels and true click probabilities; of the negatives a share is kept."""
    random = np.random.default_rng(seed)
    truth = random.normal(-1.5, 1.2, num_examples)
    rates = 1 / (1 + np.exp(-truth))
    labels = (random.random(num_examples) < rates).astype(np.uint8)
    kept = (labels == 1) | (random.random(num_examples) < negative_rate)
    return MODELS[model](truth[kept]), labels[kept], rates[kept]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", [PLATT, ISOTONIC])
def test_probabilities_are_those_that_were_planted(model: str, kind: Calibrate) -> None:
    calibrator = fit(kind, *planted(model, 100_000, seed=0)[:2])
    logits, labels, rates = planted(model, 100_000, seed=1)
    before, after = (calibration(each.probabilities(logits), labels).error for each in (Calibrator(), calibrator))
    assert before > 0.05
    if kind is PLATT and model == "curved":
        assert after < before  # no line mends a curve
        return
    assert after < 0.01
    assert np.abs(calibrator.probabilities(logits) - rates).mean() < 0.01


@pytest.mark.parametrize("kind", Calibrate)
def test_a_thinned_log_gives_the_probabilities_of_the_whole(kind: Calibrate) -> None:
    logits, labels, _ = planted("too sure", 200_000, seed=0, negative_rate=0.1)
    if kind is Calibrate.NONE:  # a model that fits the thinned log has ten times the odds
        logits = (logits - 1) / 3 + math.log(10)
    calibrator = fit(kind, logits, labels, negative_rate=0.1)
    logits, labels, rates = planted("too sure", 100_000, seed=1)
    if kind is Calibrate.NONE:
        logits = (logits - 1) / 3 + math.log(10)
    found = calibrator.probabilities(logits)
    assert calibration(found, labels).error < 0.01
    assert np.abs(found - rates).mean() < 0.01


def test_platt_by_hand() -> None:
    """Of two logits, with 1 of 4 and 6 of 8 positive, by the targets of Platt: 8/9 for positives and 1/7 for others."""
    logits = np.repeat([-1.0, 2.0], [4, 8])
    labels = np.array([1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0])
    high, low = 8 / 9, 1 / 7
    shares = np.array([(high + 3 * low) / 4, (6 * high + 2 * low) / 8])
    calibrator = fit(PLATT, logits, labels)
    np.testing.assert_allclose(calibrator.probabilities(np.array([-1.0, 2.0])), shares, rtol=1e-5)


def test_isotonic_by_hand() -> None:
    """Shares 0, 1, 0, 1 of neighbours: those of the middle fall, and are pooled at their mean logit."""
    calibrator = fit(ISOTONIC, np.array([0.0, 1.0, 2.0, 3.0]), np.array([0, 1, 0, 1]))
    assert calibrator.logits == (0.0, 1.5, 3.0)
    found = calibrator.probabilities(np.array([-9.0, 0.0, 1.5, 3.0, 9.0]))
    np.testing.assert_allclose(found, [0.125, 0.125, 0.5, 0.875, 0.875], rtol=1e-6)


@settings(deadline=None)  # TensorFlow's first call takes seconds
@given(
    examples=st.lists(st.tuples(st.floats(-30, 30), st.integers(0, 1)), min_size=2, max_size=60),
    kind=st.sampled_from([PLATT, ISOTONIC]),
)
@example(examples=[(0.0, 1), (-2e-50, 0)], kind=PLATT)
def test_an_order_is_never_turned_round(examples: list[tuple[float, int]], kind: Calibrate) -> None:
    """And JSON and the graph keep the function."""
    logits, labels = (np.array(values) for values in zip(*examples, strict=True))
    if len(set(labels)) < 2:
        return
    calibrator = fit(kind, logits, labels, negative_rate=0.5)
    points = np.sort(np.concatenate([logits, np.linspace(-50, 50, 30)])).astype(np.float32)
    found = calibrator.probabilities(points)
    assert (np.diff(found) >= 0).all() and found.min() >= 0 and found.max() <= 1
    again = Calibrator.from_json(json.loads(json.dumps(calibrator.to_json())))
    assert again == calibrator
    in_graph = tf.sigmoid(calibrated(tf.constant(points), calibrator)).numpy()
    np.testing.assert_allclose(in_graph, found, atol=2e-5)


def test_a_model_that_orders_wrongly_gets_the_mean() -> None:
    logits, labels, _ = planted("too sure", 1000, seed=0)
    calibrator = fit(PLATT, -logits, labels)
    assert calibrator.slope == 0
    np.testing.assert_allclose(calibrator.probabilities(logits), labels.mean(), atol=2e-3)


def test_separable_examples_have_an_answer() -> None:
    for logits in (np.array([-1.0, 1.0]), np.array([2.0, 2.0]), np.array([-1e6, 1e6])):
        for kind in (PLATT, ISOTONIC):
            assert np.isfinite(fit(kind, logits, np.array([0, 1])).probabilities(logits)).all()


@pytest.mark.parametrize("labels", [[0, 0], [1, 1], []])
def test_both_labels_are_needed(labels: list[int]) -> None:
    with pytest.raises(InputError) as caught:
        fit(PLATT, np.zeros(len(labels)), np.array(labels))
    assert str(caught.value) == (
        "--calibrate: platt is fitted on validation examples of both labels. Received: "
        f"{sum(labels)} positive ones among {len(labels)}. Train with more events in validation, or drop it."
    )
