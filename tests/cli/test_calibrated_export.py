"""`export --calibrate`: the export, the server and `predict` give the same click probabilities, and the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from din_dist.config import Split
from din_dist.serving.bundle import Bundle
from tests.support.changed_manifest import assert_refused, fields_of
from tests.support.preloaded import Preloaded
from tests.support.scored import CANDIDATES, HISTORIES, scored
from tests.support.served import serving
from tests.support.small_log import small_config
from tests.support.trained_job import write_job


@pytest.fixture(scope="module")
def folder(commands: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job, and its exports by the kind of calibration."""
    folder = tmp_path_factory.mktemp("calibrated")
    write_job(small_config(folder, split=Split.LEAVE_TWO_OUT))
    for kind, rate in (("none", "1"), ("platt", "0.25"), ("isotonic", "1")):
        words = [f"--output_dir={folder / 'run'}", f"--export_dir={folder / kind}"]
        done = commands.run("export", *words, f"--calibrate={kind}", f"--negative_rate={rate}")
        assert done.returncode == 0, done.stderr
        assert ("calibrating on 80 examples of validation" in done.stderr) is (kind != "none")
    return folder


@pytest.mark.parametrize("kind", ["platt", "isotonic"])
def test_all_ways_give_the_same_probabilities(folder: Path, kind: str, commands: Preloaded, tmp_path: Path) -> None:
    plain, bundle = (Bundle.open(folder / name) for name in ("none", kind))
    assert plain.manifest.calibration is None
    assert bundle.manifest.calibration is not None and bundle.manifest.calibration["kind"] == kind
    expected = scored(plain, "score")
    probabilities = bundle.manifest.predictions.labels[0].calibrator.probabilities(expected["logits"])
    assert np.abs(probabilities - expected["click_probability"]).max() > 0.01
    for signature in ("score", "rank_histories"):
        found = scored(bundle, signature)
        np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-6)
        np.testing.assert_allclose(found["click_probability"], probabilities, atol=1e-5)
    best = bundle.rank(np.array(HISTORIES[0], object), np.array(CANDIDATES, object), 4)
    np.testing.assert_allclose(
        best["click_probability"],
        bundle.manifest.predictions.labels[0].calibrator.probabilities(best["logits"]),
        atol=1e-5,
    )

    rows = pa.table({"history": HISTORIES, "item_id": CANDIDATES})
    pq.write_table(rows, tmp_path / "rows.parquet")
    words = [f"--export_dir={folder / kind}", f"--input={tmp_path / 'rows.parquet'}"]
    done = commands.run("predict", *words, f"--predictions_dir={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    (part,) = (tmp_path / "out").glob("part-*")
    np.testing.assert_allclose(pq.read_table(part)["click_probability"], probabilities, atol=1e-5)

    with serving(commands, "clicks", f"--export_dir={folder / kind}") as served:
        pairs = zip(HISTORIES, CANDIDATES, strict=True)
        body = {"instances": [{"history_item_ids": one, "candidate_item_id": item} for one, item in pairs]}
        answers = served.predict(body)["predictions"]
        np.testing.assert_allclose([one["logits"] for one in answers], expected["logits"], atol=1e-5)
        np.testing.assert_allclose([one["click_probability"] for one in answers], probabilities, atol=1e-5)
        body = {"history_item_ids": HISTORIES[0], "candidate_item_ids": CANDIDATES}
        answer = served.predict({"signature_name": "rank", "inputs": body})["outputs"]
        np.testing.assert_allclose(answer["click_probability"], best["click_probability"], atol=1e-5)
        told = json.loads(served.get("/v1/models/clicks/metadata"))["metadata"]["din_dist"]
        assert told["calibration"]["kind"] == kind


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "magic"}, "'magic' is not a valid Calibrate"),
        ({"negative_rate": 0}, "impossible numbers"),
        ({"slope": float("inf")}, "a calibration that cannot be"),
        ({"slope": -1}, "impossible numbers"),
        ({"slope": "steep"}, "a calibration that cannot be"),
        ({"kind": "isotonic", "logits": [0, 1], "calibrated": [1, 0]}, "impossible numbers"),
        ({"kind": "isotonic", "logits": [0, 1], "calibrated": [1]}, "2 and 1 knots of isotonic"),
        ({"surprise": 1}, "a calibration that cannot be"),
    ],
)
def test_a_manifest_that_was_changed(folder: Path, tmp_path: Path, changes: dict, words: str) -> None:
    fields = fields_of(folder / "platt")
    if "kind" in changes:
        del fields["calibration"]["slope"], fields["calibration"]["intercept"]
    fields["calibration"] |= changes
    assert_refused(fields, tmp_path, words)


def test_what_export_refuses(folder: Path, commands: Preloaded, tmp_path: Path) -> None:
    without = tmp_path / "without"
    without.mkdir()
    write_job(small_config(without))  # leave_one_out has no validation
    for job, words, message in (
        (folder, ["--negative_rate=0"], "--negative_rate: must be above 0 and at most 1. Received: 0.0. For example"),
        (folder, ["--negative_rate=1.5"], "--negative_rate: must be above 0 and at most 1. Received: 1.5."),
        (
            without,
            ["--calibrate=platt"],
            "--calibrate: platt is fitted on the validation split. Received: a job whose --split has none. Train with "
            "--split=temporal or leave_two_out, or drop it.",
        ),
    ):
        done = commands.run("export", f"--output_dir={job / 'run'}", f"--export_dir={tmp_path / 'new'}", *words)
        assert done.returncode == 2
        assert message in done.stderr
    assert not (tmp_path / "new").exists()
