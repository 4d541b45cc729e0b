"""A job of several labels from end to end: every command gives the same logits and probabilities of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from din_dist.serving.bundle import Bundle
from tests.support.changed_manifest import assert_refused, fields_of
from tests.support.finished_job import finish, run
from tests.support.preloaded import Preloaded
from tests.support.scored import CANDIDATES, HISTORIES, scored
from tests.support.served import serving
from tests.support.task_log import write_task_log

TASKS = ["--label_columns=click,buy", "--task_head=esmm", "--validation_task=buy", "--task_weights=1,2"]


@pytest.fixture(scope="module")
def folder(commands: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished job: prepared, run, and two exports."""
    folder = tmp_path_factory.mktemp("tasks")
    write_task_log(folder / "log.parquet", num_users=120)
    words = [*TASKS, "--split=temporal", "--validation_from=12", "--test_from=16", "--epochs=3", "--learning_rate=0.02"]
    finish(commands, folder, *words, export=False)
    for kind, calibrate in (("plain", "none"), ("platt", "platt")):
        where = [f"--output_dir={folder / 'run'}", f"--export_dir={folder / kind}"]
        run(commands, "export", *where, f"--calibrate={calibrate}")
    return folder


@pytest.fixture(scope="module")
def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "summary.json").read_text())


def test_the_summary_has_every_label(summary: dict[str, Any], folder: Path) -> None:
    assert summary["tasks"] == ["click", "buy"]
    for metric in ("gauc", "auc", "log_loss"):
        assert summary[f"test_{metric}"] == summary[f"test_{metric}_buy"] != summary[f"test_{metric}_click"]
    assert {"test_auc_click", "test_log_loss_click"} <= summary.keys()
    assert summary["test_auc_click"] > 0.6
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    validations = [record for record in records if record["kind"] == "validation"]
    best = max(record["gauc_buy"] for record in validations)
    assert summary["best_validation_gauc"] == best
    assert {record["gauc"] == record["gauc_buy"] for record in validations} == {True}


@pytest.mark.parametrize("of", ["run", "plain"])
def test_evaluate_finds_what_the_trainer_found(
    folder: Path, summary: dict[str, Any], commands: Preloaded, of: str
) -> None:
    which = f"--output_dir={folder / 'run'}" if of == "run" else f"--export_dir={folder / 'plain'}"
    done = commands.run("evaluate", which, "--slice_by=category_id", "--bootstrap_samples=200")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["tasks"], found["main_task"]) == (["click", "buy"], "buy")
    for name in ("gauc", "auc", "log_loss"):
        for task in ("click", "buy"):
            value = found[f"{name}_{task}"]
            assert value == pytest.approx(summary[f"test_{name}_{task}"], abs=1e-6)
            low, high = found["intervals"][f"{name}_{task}"]
            assert low < value < high
        assert found[name] == found[f"{name}_buy"]
    assert sum(part["num_positives"] for part in found["slices"]["category_id"]) < found["num_examples"] / 2
    assert found["retrieval"]["num_events"] > 0
    for words in ("click: GAUC", "buy: log loss"):
        assert words in done.stderr


@pytest.mark.parametrize("kind", ["plain", "platt"])
def test_all_ways_give_the_same(folder: Path, commands: Preloaded, tmp_path: Path, kind: str) -> None:
    bundle = Bundle.open(folder / kind)
    assert bundle.manifest.tasks == ("click", "buy")
    expected = scored(Bundle.open(folder / "plain"), "score")
    assert expected.keys() == {"logits_click", "probability_click", "logits_buy", "probability_buy"}
    assert (expected["probability_buy"] < expected["probability_click"]).all()
    probabilities = {}
    for label in bundle.manifest.predictions.labels:
        logits = expected[label.logits]
        probabilities[label.probability] = label.calibrator.probabilities(logits)
        changed = np.abs(probabilities[label.probability] - expected[label.probability]).max()
        assert changed > 1e-3 if kind == "platt" else changed < 1e-6
    for signature in ("score", "rank_histories"):
        found = scored(bundle, signature)
        for name in ("logits_click", "logits_buy"):
            np.testing.assert_allclose(found[name], expected[name], atol=1e-5)
        for name, wanted in probabilities.items():
            np.testing.assert_allclose(found[name], wanted, atol=1e-5)
    best = bundle.rank(np.array(HISTORIES[0], object), np.array(CANDIDATES, object), 4)
    assert np.all(np.diff(best["logits_buy"]) <= 0)
    assert best["item_ids"].astype(str).tolist() == [CANDIDATES[place] for place in best["places"]]

    rows = pa.table({"history": HISTORIES, "item_id": CANDIDATES})
    pq.write_table(rows, tmp_path / "rows.parquet")
    words = [f"--export_dir={folder / kind}", f"--input={tmp_path / 'rows.parquet'}"]
    done = commands.run("predict", *words, f"--predictions_dir={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    (part,) = (tmp_path / "out").glob("part-*")
    predicted = pq.read_table(part)
    assert predicted.column_names == [
        *("history", "item_id", "logit_click", "probability_click", "logit_buy", "probability_buy")
    ]
    for task in ("click", "buy"):
        np.testing.assert_allclose(predicted[f"logit_{task}"], expected[f"logits_{task}"], atol=1e-5)
        np.testing.assert_allclose(predicted[f"probability_{task}"], probabilities[f"probability_{task}"], atol=1e-5)
    rows = pa.table({"history": [HISTORIES[0]], "candidates": [CANDIDATES]})
    pq.write_table(rows, tmp_path / "lists.parquet")
    words = [f"--export_dir={folder / kind}", f"--input={tmp_path / 'lists.parquet'}", "--top_k=2"]
    done = commands.run("predict", *words, f"--predictions_dir={tmp_path / 'top'}")
    assert done.returncode == 0, done.stderr
    (part,) = (tmp_path / "top").glob("part-*")
    (top,) = pq.read_table(part).to_pylist()
    assert top["top_items"] == best["item_ids"].astype(str).tolist()[:2]
    np.testing.assert_allclose(top["logit_click"], best["logits_click"][:2], atol=1e-5)

    with serving(commands, "sales", f"--export_dir={folder / kind}") as served:
        pairs = zip(HISTORIES, CANDIDATES, strict=True)
        body = {"instances": [{"history_item_ids": one, "candidate_item_id": item} for one, item in pairs]}
        answers = served.predict(body)["predictions"]
        assert answers[0].keys() == expected.keys()
        for task in ("click", "buy"):
            logits = [one[f"logits_{task}"] for one in answers]
            np.testing.assert_allclose(logits, expected[f"logits_{task}"], atol=1e-5)
            shares = [one[f"probability_{task}"] for one in answers]
            np.testing.assert_allclose(shares, probabilities[f"probability_{task}"], atol=1e-5)
        body = {"history_item_ids": HISTORIES[0], "candidate_item_ids": CANDIDATES}
        answer = served.predict({"signature_name": "rank", "inputs": body})["outputs"]
        assert answer["item_ids"] == best["item_ids"].astype(str).tolist()
        np.testing.assert_allclose(answer["logits_click"], best["logits_click"], atol=1e-5)
        metadata = json.loads(served.get("/v1/models/sales/metadata"))["metadata"]
        assert metadata["signature_def"]["signature_def"]["score"]["outputs"].keys() == expected.keys()


def test_the_report_shows_every_label(folder: Path, commands: Preloaded, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    done = commands.run("report", f"--output_dir={folder / 'run'}", f"--report_path={path}")
    assert done.returncode == 0, done.stderr
    text = path.read_text()
    assert "Label by label" in text
    for words in ("<bdi>click</bdi>", "<bdi>buy</bdi>", "Everything else on this page is of buy"):
        assert words in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"main_task": "like"}, "a main_task of 'like'"),
        ({"tasks": ["click", "../x"]}, "tasks of another form"),
        ({"tasks": ["click"]}, "a main_task of 'buy'"),
        (
            {"calibration": {"like": {"kind": "platt", "negative_rate": 1.0}}},
            "a calibration that cannot be (other tasks)",
        ),
    ],
)
def test_a_manifest_that_was_changed(folder: Path, tmp_path: Path, changes: dict, words: str) -> None:
    fields = fields_of(folder / "platt") | changes
    assert_refused(fields, tmp_path, words)


def test_what_export_refuses(folder: Path, commands: Preloaded, tmp_path: Path) -> None:
    words = [f"--output_dir={folder / 'run'}", f"--export_dir={tmp_path / 'new'}", "--negative_rate=0.5"]
    done = commands.run("export", *words)
    assert done.returncode == 2
    assert "--negative_rate: is for logs of one label: which negatives of several were kept is not known" in done.stderr
