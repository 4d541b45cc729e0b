"""Dice and the local activation unit as layers of Keras."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

import din_dist
from tests.support.reference.compare import randomise, weights_of
from tests.support.reference.padded_din import attention_weights


def test_dice_by_hand() -> None:
    """Column 0 has mean 2 and variance 1, column 1 mean 0 and variance 4; moving averages keep 0.99 of 0 and 1."""
    dice = din_dist.Dice()
    inputs = np.array([[[1.0, 2.0], [3.0, -2.0]]], np.float32)
    dice(inputs)
    alpha = next(weight for weight in dice.weights if weight.path.endswith("alpha"))
    alpha.assign([0.5, -1.0])

    def expected(mean: list[float], variance: list[float]) -> np.ndarray:
        gate = 1 / (1 + np.exp(-(inputs - np.array(mean)) / np.sqrt(np.array(variance) + 1e-3)))
        return gate * inputs + (1 - gate) * np.array([0.5, -1.0]) * inputs

    assert_allclose(dice(inputs), expected([0.0, 0.0], [1.0, 1.0]), rtol=1e-5)
    assert_allclose(dice(inputs, training=True), expected([2.0, 0.0], [1.0, 4.0]), rtol=1e-5)
    assert_allclose(dice(inputs), expected([0.02, 0.0], [1.0, 1.03]), rtol=1e-5)


def test_dice_in_a_saved_model(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3), din_dist.Dice(), keras.layers.Dense(1)])
    model.compile(din_dist.LazyAdam(0.1), "mse")
    random = np.random.default_rng(0)
    inputs, labels = random.normal(size=(64, 4)), random.normal(size=(64, 1))
    losses = model.fit(inputs, labels, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    assert_array_equal(din_dist.load_model(tmp_path / "model.keras").predict(inputs), model.predict(inputs))


LENGTHS = (3, 0, 5)


def vectors() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns candidates [B, H], padded histories [B, T, H] whose padding is random, and their mask, padded left."""
    random = np.random.default_rng(0)
    mask = np.arange(5) >= 5 - np.array(LENGTHS)[:, None]
    return random.normal(size=(3, 4)).astype("f"), random.normal(size=(3, 5, 4)).astype("f"), mask


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("normalization", ["softmax", "none"])
@pytest.mark.parametrize("activation", ["sigmoid", "dice"])
def test_the_unit_equals_the_reference(activation: str, normalization: str, training: bool) -> None:
    candidate, history, mask = vectors()
    unit = din_dist.LocalActivationUnit([5, 3], activation, normalization)
    unit(candidate, history, mask)
    randomise(unit)
    weights = {path.partition("/unit/")[2]: values for path, values in weights_of(unit).items()}
    expected = attention_weights(
        weights, candidate, history, mask, activation, normalization, batch_statistics=training
    )
    interest = np.einsum("bt,bth->bh", np.where(mask, expected, 0), history)
    rows = tf.RaggedTensor.from_row_lengths(history[mask], LENGTHS)
    before = unit.get_weights()
    for form in ((history, mask), (rows,)):
        unit.set_weights(before)
        assert_allclose(unit(candidate, *form, training=training), interest, rtol=1e-4, atol=1e-5)


def test_the_unit_in_a_functional_model_takes_the_mask_of_an_embedding(tmp_path: Path) -> None:
    candidate, history = keras.Input([], dtype="int32"), keras.Input([None], dtype="int32")
    table = keras.layers.Embedding(10, 4, mask_zero=True)
    interest = din_dist.LocalActivationUnit([5])(table(candidate), table(history))
    model = keras.Model([candidate, history], keras.layers.Dense(1)(interest))
    asked = [np.array([1, 2]), np.array([[3, 4, 0], [5, 0, 0]])]
    shorter = [np.array([2]), np.array([[5]])]
    logits = model.predict(asked, verbose=0)
    assert_allclose(logits[1:], model.predict(shorter, verbose=0), rtol=1e-5)
    model.save(tmp_path / "model.keras")
    assert_array_equal(din_dist.load_model(tmp_path / "model.keras").predict(asked, verbose=0), logits)


def test_wrong_shapes_get_one_line() -> None:
    candidate, history, mask = vectors()
    unit = din_dist.LocalActivationUnit([5])
    rule = r"candidate, history: must be \[B, H\] and \[B, T, H\]\. Received: '\[3, 4\] and \[3, 5, 2\]'\."
    with pytest.raises(din_dist.InputError, match=rule):
        unit(candidate, history[..., :2])
    with pytest.raises(din_dist.InputError, match=r"history_mask: must be \[B, T\]\. Received: '\[3, 4\] for "):
        unit(candidate, history, mask[:, 1:])
    with pytest.raises(din_dist.InputError, match=r"^activation: must be a choice it knows\. Received: 'tanh'\."):
        din_dist.LocalActivationUnit(activation="tanh")
