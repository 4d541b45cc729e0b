"""Exports to ONNX: scored by ONNX Runtime alone, from the log's own ids, and refused where ONNX would say less."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from din_dist.data.splits import split_examples
from din_dist.distributed.runtime import Runtime
from din_dist.errors import InputError
from din_dist.evaluation.evaluator import Evaluator
from din_dist.serving.calibrator import Calibrate, Calibrator
from din_dist.serving.export import onnx_writer
from din_dist.serving.export.onnx_writer import export_onnx
from din_dist.serving.export.writer import TrainedModel
from tests.support.patience import PATIENCE
from tests.support.programs import imported
from tests.support.small_log import small_config
from tests.support.trained_job import histories_of_tests, write_job

# Reads the vocabulary and scores where neither this package nor TensorFlow can be imported.
ALONE = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"din_dist", "tensorflow", "keras", "tf2onnx", "onnx"}:
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Refuse())
import numpy as np, onnxruntime, pyarrow.parquet as pq

folder, (histories, candidates) = sys.argv[1], json.load(sys.stdin)
table = pq.read_table(folder + "/items.parquet").to_pydict()
dense = dict(zip(table["item_id"], table["dense_id"]))
inputs = {
    "history_item_ids": [dense.get(item, 0) for history in histories for item in history],
    "history_lengths": list(map(len, histories)),
    "candidate_item_ids": [dense.get(item, 0) for item in candidates],
}
inputs = {name: np.array(values, np.int32) for name, values in inputs.items()}
session = onnxruntime.InferenceSession(folder + "/model.onnx")
print(json.dumps([values.tolist() for values in session.run(["logits", "click_probability"], inputs)]))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    imported("tf2onnx", "tf2onnx")
    imported("onnxruntime", "onnxruntime")
    config = small_config(tmp_path_factory.mktemp("job"))
    model, store = write_job(config)
    return TrainedModel(model, store, config, 7, "", None)


@pytest.fixture(scope="module")
def evaluator(trained: TrainedModel) -> Evaluator:
    return Evaluator(trained.config, trained.store, split_examples(trained.store, trained.config.data), Runtime())


def test_onnx_runtime_alone_scores_own_ids_as_the_trainer(
    trained: TrainedModel, evaluator: Evaluator, tmp_path: Path
) -> None:
    """With an empty history and items that nobody has seen."""
    folder = tmp_path / "onnx"
    described = export_onnx(trained, evaluator, "test", folder)
    assert described["max_difference"] <= 1e-5 and described["num_compared"] > 20
    assert json.loads((folder / "onnx.json").read_text()) == described
    histories, candidates = histories_of_tests(Path(trained.config.data.data_path), longest=8)
    asked = json.dumps([[*histories, [], ["new"]], [*candidates, "i1", "new"]])
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder)],
        cwd=tmp_path,
        input=asked,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    logits, probabilities = map(np.array, json.loads(done.stdout))
    expected = evaluator.scores("test", lambda batch: trained.model(batch))[::2]  # the others are drawn negatives
    assert_allclose(np.sort(logits[:-2]), np.sort(expected), atol=1e-5)
    assert np.unique(np.round(logits, 4)).size > 20
    assert np.isfinite(logits).all()
    assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), atol=1e-6)


def test_another_model_than_the_trainer_s_is_not_published(
    trained: TrainedModel, evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_scorer = onnx_writer.scorer_of

    def slightly_wrong(content: bytes):
        score = open_scorer(content)
        return lambda inputs: {name: values + 1e-3 for name, values in score(inputs).items()}

    monkeypatch.setattr(onnx_writer, "scorer_of", slightly_wrong)
    with pytest.raises(FloatingPointError, match="--format: onnx must have the trainer's logits, within 1e-05. Recei"):
        export_onnx(trained, evaluator, "test", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_folder_in_use_is_refused(trained: TrainedModel, evaluator: Evaluator, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    rule = "--export_dir: must be a new folder, or an ONNX export with --overwrite. Received: "
    with pytest.raises(InputError, match=rule):
        export_onnx(trained, evaluator, "test", tmp_path)
    onnx_writer.check_target(tmp_path / "new", overwrite=False)
    (tmp_path / "onnx.json").touch()
    onnx_writer.check_target(tmp_path, overwrite=True)


def test_what_onnx_cannot_have_is_refused(trained: TrainedModel) -> None:
    isotonic = Calibrator(Calibrate.ISOTONIC, logits=(0.0,), calibrated=(0.0,))
    with pytest.raises(InputError, match="--format: onnx has the ids of one history .* --calibrate=isotonic. Use --fo"):
        onnx_writer.check_model(dataclasses.replace(trained, calibrators={"": isotonic}))


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(InputError) as raised:
        onnx_writer.onnx_tools()
    assert str(raised.value).startswith("--format: onnx needs tf2onnx and ONNX Runtime. Received: ")
    assert str(raised.value).endswith("Run: pip install -c launch/constraints.txt onnx onnxruntime tf2onnx.")
