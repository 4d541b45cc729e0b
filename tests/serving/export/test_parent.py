"""The weights that a warm start reads from an export: those of the model, whatever its variables are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from numpy.testing import assert_array_equal

from din_dist.config import BatchNorm, Config, ModelKind, UnknownItem
from din_dist.data.splits import split_examples
from din_dist.distributed.runtime import Runtime
from din_dist.evaluation.evaluator import Evaluator
from din_dist.serving.export.parent import ParentExport
from din_dist.serving.export.writer import TrainedModel, export
from tests.support.featured_log import featured_config
from tests.support.small_log import small_config
from tests.support.trained_job import flagfile_of, write_job

CASES: dict[str, dict[str, Any]] = {
    "item features": {"unknown_item": UnknownItem.FEATURES, "batch_norm": BatchNorm.SYNCED},
    "finds items": {"model": ModelKind.COMIREC_SA, "num_sampled": 10},
    "declared features": {},
}


def config_of(folder: Path, case: str) -> Config:
    return (featured_config if case == "declared features" else small_config)(folder, **CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_each_weight_is_that_of_the_model(tmp_path: Path, case: str) -> None:
    """Among the declared features is one whose name TensorFlow cannot save."""
    config = config_of(tmp_path, case)
    model, store = write_job(config)
    trained = TrainedModel(model, store, config, 7, flagfile_of(config), None)
    evaluator = Evaluator(config, store, split_examples(store, config.data), Runtime())
    manifest = export(trained, evaluator, "test", tmp_path / "export")
    parent = ParentExport(tmp_path / "export")
    assert parent.rows.variables.keys() == {weight.path for weight in model.weights}
    for weight in model.weights:
        assert_array_equal(parent.read(weight.path), weight.value.numpy(), err_msg=weight.path)
    assert (parent.step, parent.digest, parent.slot_updates) == (7, manifest.digest, 0)
    assert not parent.has_slots
    assert "assets.extra/rows/rows.json" in manifest.files
    assert parent.rows.fingerprint == store.facts.fingerprint
