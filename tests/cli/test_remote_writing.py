"""Exports, predictions and reports in an object store, by the commands: as on a disk, and whole or not at all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from din_dist.serving.manifest import MANIFEST
from din_dist.serving.store_exports import UNFINISHED
from tests.support.commands import assert_one_line
from tests.support.faulty_store import Fault, Store, running_store
from tests.support.patience import PATIENCE
from tests.support.repository import ROOT
from tests.support.served import Served

MANIFEST_NAME = MANIFEST.as_posix()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with running_store(monkeypatch) as store:
        yield store


def run(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", f"din_dist.cli.{name}", *flags]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)


def told(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_model_goes_through_a_store(store: Store, exported_job: Path, tmp_path: Path) -> None:
    """An export, the predictions by it and the report have the content that they have in folders."""
    job, uri = f"--output_dir={exported_job / 'run'}", store.uri("exports/1")
    found = told(run("export", job, f"--export_dir={uri}"))
    assert found["export_dir"] == uri
    local = exported_job / "export"
    files = {path.relative_to(local).as_posix(): path for path in local.rglob("*") if path.is_file()}
    assert store.names("exports/1") == sorted(files)
    manifest = json.loads(store.get(f"exports/1/{MANIFEST_NAME}"))
    assert manifest["step"] == found["step"] == json.loads((local / MANIFEST).read_text())["step"]
    assert found["bytes"] == sum(len(store.get(f"exports/1/{name}")) for name in files)
    assert_one_line(run("export", job, f"--export_dir={uri}"), "s3://logs/exports/1, which holds an export. Add --over")
    replaced = told(run("export", job, f"--export_dir={uri}", "--overwrite"))
    assert replaced["digest"] != found["digest"], "TensorFlow gives each SavedModel a number of its own"
    assert store.names("exports/1") == sorted(files)

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"history": ["i1", "i{n}"], "item_id": "i{n % 7}"}}\n' for n in range(25)))
    here = tmp_path / "here"
    flags = (f"--export_dir={uri}", f"--expect_digest={replaced['digest']}", f"--input={rows}", "--rows_per_part=10")
    for place in (str(here), store.uri("predictions")):
        result = told(run("predict", *flags, f"--predictions_dir={place}"))
        assert (result["predictions_dir"], result["num_parts"], result["parts"]) == (place, 3, 3)
    expected = {path.name: path.read_bytes() for path in here.iterdir() if path.name != ".lock"}
    assert {name: store.get(f"predictions/{name}") for name in store.names("predictions")} == expected
    store.delete("predictions/part-00001-of-00003.jsonl")
    store.delete("predictions/predictions.json")
    again = told(run("predict", *flags, f"--predictions_dir={store.uri('predictions')}"))
    assert again["parts"] == 1
    assert {name: store.get(f"predictions/{name}") for name in store.names("predictions")} == expected

    done = run("report", job, f"--report_path={store.uri('reports/job.html')}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "s3://logs/reports/job.html"
    assert store.get("reports/job.html").lower().startswith(b"<!doctype html>")


def test_an_export_in_a_store_is_served(store: Store, exported_job: Path, tmp_path: Path) -> None:
    store.put_folder("exports/3", exported_job / "export")
    asked = {"instances": [{"history_item_ids": ["i1", "i2"], "candidate_item_id": "i3"}]}
    answers = []
    for place in (store.uri("exports"), str(exported_job / "export")):
        words = [sys.executable, "-m", "din_dist.cli.serve", f"--export_dir={place}", "--port=0"]
        with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            url = process.stdout.readline().strip()
            answers.append(Served(process, url).predict(asked))  # type: ignore[arg-type]
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
    assert answers[0] == answers[1]
    assert (tmp_path / "cache" / "din_dist" / "exports").is_dir()


def test_killed_before_the_manifest_it_leaves_no_export(store: Store, exported_job: Path) -> None:
    """And the same command publishes."""
    job, uri = f"--output_dir={exported_job / 'run'}", store.uri("exports/1")
    store.proxy.fail(Fault.SILENT, only=f"/logs/exports/1/{MANIFEST_NAME}.*uploads")
    words = [sys.executable, "-m", "din_dist.cli.export", job, f"--export_dir={uri}"]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + PATIENCE
        while not any(f"{MANIFEST_NAME}?uploads" in line for line in store.proxy.requests):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        process.kill()
    store.proxy.fail(Fault.NONE)
    names = store.names("exports/1")
    assert {UNFINISHED, "saved_model.pb"} <= {*names}
    assert MANIFEST_NAME not in names
    refused = run("predict", f"--export_dir={uri}", f"--input={exported_job}/log.parquet", "--predictions_dir=out")
    assert_one_line(refused, "s3://logs/exports/1: must be an export. Received: no assets.extra/manifest.json there.")
    found = told(run("export", job, f"--export_dir={uri}"))
    assert found["digest"]
    assert UNFINISHED not in store.names("exports/1")


def test_wrong_credentials_end_each_command_with_one_line(store: Store, exported_job: Path, tmp_path: Path) -> None:
    store.proxy.fail(Fault.DENIED)
    job, place = f"--output_dir={exported_job / 'run'}", store.uri("exports/1")
    expected = "must be readable. Received: "
    assert_one_line(run("export", job, f"--export_dir={place}"), expected)
    flags = [f"--input={exported_job / 'log.parquet'}", f"--predictions_dir={tmp_path / 'out'}"]
    assert_one_line(run("predict", f"--export_dir={place}", *flags), expected)
    assert_one_line(run("serve", f"--export_dir={place}"), expected)
    assert not (tmp_path / "out").exists()
