"""Models in `.keras` files: exactly what was saved, in another process too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import din_dist
from tests.support.patience import PATIENCE
from tests.support.reference.compare import ITEM_FEATURES, NUM_ITEMS, RandomFeatures
from tests.support.repository import ROOT

RANDOM = np.random.default_rng(0)
INPUTS = {
    "candidate_item_ids": RANDOM.integers(1, NUM_ITEMS + 1, 48),
    "history_item_ids": RANDOM.integers(0, NUM_ITEMS + 1, (48, 6)),
}
LABELS = RANDOM.integers(0, 2, 48).astype(np.float32)
MODELS: dict[str, dict[str, Any]] = {
    "DIN": {"activation": "dice", "features": {"hour": 24, "price": "number"}, "hidden_units": [5]},
    "MeanPooling": {"activation": "prelu", "batch_norm": "frozen"},
    "YouTubeDNN": {"tower_units": [6], "item_counts": np.arange(NUM_ITEMS + 1), "features": {"hour": 24}},
    "ComiRecSA": {"num_interests": 2},
    "ComiRecDR": {"num_positions": 6, "softmax": "full"},
    "MIND": {"temperature": 0.5},
    "SRGNN": {"session_readout": "attention"},
}
IN_ANOTHER_PROCESS = """
import sys
import numpy as np
import din_dist

path, inputs, found = sys.argv[1:]
given = dict(np.load(inputs))
labels = given.pop("labels", None)
model = din_dist.load_model(path)
logits = model.predict(given, verbose=0)
model.fit(given, labels, batch_size=16, shuffle=False, verbose=0)
np.savez(found, logits, *model.get_weights(), *(variable.numpy() for variable in model.optimizer.variables))
"""


def fitted(name: str) -> keras.Model:
    model = getattr(din_dist, name)(NUM_ITEMS, ITEM_FEATURES, (3, 2), **MODELS[name])
    model.compile(din_dist.LazyAdam(0.01, global_clipnorm=5.0))
    model.fit(INPUTS, *labels_of(model), batch_size=16, verbose=0)
    return model


def labels_of(model: keras.Model) -> list[np.ndarray]:
    return [] if model.KIND.retrieves else [LABELS]


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_the_same_and_goes_on_the_same(name: str, tmp_path: Path) -> None:
    model = fitted(name)
    model.save(tmp_path / "model.keras")
    again = din_dist.load_model(tmp_path / "model.keras")
    assert type(again) is type(model)
    assert again.get_config() == model.get_config()
    assert_array_equal(again.predict(INPUTS, verbose=0), model.predict(INPUTS, verbose=0))
    for each in (model, again):
        each.fit(INPUTS, *labels_of(model), batch_size=16, shuffle=False, verbose=0)
    for one, other in zip(
        (*again.get_weights(), *again.optimizer.variables),
        (*model.get_weights(), *model.optimizer.variables),
        strict=True,
    ):
        assert_array_equal(one, other)


def test_another_process_goes_on_the_same(tmp_path: Path) -> None:
    model = fitted("DIN")
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "inputs.npz", labels=LABELS, **INPUTS)
    words = [str(tmp_path / name) for name in ("model.keras", "inputs.npz", "found.npz")]
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, *words]
    subprocess.run(command, cwd=ROOT, check=True, timeout=PATIENCE)
    logits = model.predict(INPUTS, verbose=0)
    model.fit(INPUTS, LABELS, batch_size=16, shuffle=False, verbose=0)
    expected = [logits, *model.get_weights(), *(variable.numpy() for variable in model.optimizer.variables)]
    found = np.load(tmp_path / "found.npz")
    for one, other in zip(found.values(), expected, strict=True):
        assert_array_equal(one, other)


def test_declared_features_of_items_are_saved(tmp_path: Path) -> None:
    features = RandomFeatures().stored
    model = din_dist.DIN(NUM_ITEMS, ITEM_FEATURES, (3, 2), features)
    model.save(tmp_path / "model.keras")
    again = din_dist.load_model(tmp_path / "model.keras")
    assert_array_equal(again.predict(INPUTS, verbose=0), model.predict(INPUTS, verbose=0))
