"""Layers in files that Keras writes and reads."""

from pathlib import Path

import keras
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from din_dist.config import Activation
from din_dist.layers.dice import Dice
from din_dist.layers.hidden import HiddenLayers
from din_dist.layers.standardize import BatchNormalization, Standardize
from tests.support.reference.compare import randomise


@pytest.mark.parametrize("activation", Activation)
def test_a_saved_stack_scores_the_same(tmp_path: Path, activation: Activation) -> None:
    layers = [Standardize(momentum=0.9), BatchNormalization(frozen=True), Dice(), HiddenLayers([5, 4], activation)]
    model = keras.Sequential([keras.Input([3]), *layers])
    for layer in layers:
        randomise(layer)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    inputs = np.random.default_rng(0).normal(1, 2, (6, 3)).astype(np.float32)
    assert_array_equal(again(inputs), model(inputs))
    assert again.layers[0].momentum == 0.9
    assert again.layers[1].standardize.frozen
