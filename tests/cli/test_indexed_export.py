"""Exports with an approximate index of items: its recall against brute force in float64, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from din_dist.config import ModelKind
from din_dist.errors import InputError
from din_dist.serving.asked import Recommend
from din_dist.serving.bundle import Bundle
from din_dist.serving.export.item_index import INDEX_FILE
from din_dist.serving.manifest import check_files, read_manifest
from tests.support.changed_manifest import assert_refused, fields_of
from tests.support.commands import assert_one_line
from tests.support.patience import PATIENCE
from tests.support.preloaded import Preloaded
from tests.support.programs import imported
from tests.support.repository import ROOT
from tests.support.small_log import small_config, write_log
from tests.support.trained_job import histories_of_tests, write_job

LONGEST = 8
K = 100


@pytest.fixture(scope="module")
def faiss() -> Any:
    return imported("faiss", "faiss-cpu")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job of two interests on more than a thousand items, with random weights."""
    folder = tmp_path_factory.mktemp("job")
    write_log(folder / "log.parquet", num_users=300, num_items=1300)
    write_job(small_config(folder, model=ModelKind.COMIREC_SA, num_interests=2, max_history_length=LONGEST))
    return folder


def words(job: Path, folder: Path, *more: str) -> list[str]:
    return [f"--output_dir={job / 'run'}", f"--export_dir={folder}", "--index=ivf", *more]


@pytest.fixture(scope="module")
def published(faiss: Any, job: Path, commands: Preloaded) -> tuple[Path, dict[str, Any]]:
    """The folder of an export with an index, and what the command told."""
    done = commands.run("export", *words(job, job / "export", "--index_recall=0.9"))
    assert done.returncode == 0, done.stderr
    return job / "export", json.loads(done.stdout.splitlines()[-1])


def recall_of(found: list[list[Any]], exact: list[list[Any]]) -> float:
    return float(np.mean([len({*ours} & {*theirs}) / K for ours, theirs in zip(found, exact, strict=True)]))


def merged_by_hand(index: Any, user: np.ndarray) -> list[int]:
    """Returns the rows that an index finds for a user `[K, H]`, best first, by the largest product of each."""
    best: dict[int, float] = {}
    for products, rows in zip(*index.search(user, K), strict=True):
        for product, row in zip(products, rows, strict=True):
            if row >= 0:
                best[row] = max(product, best.get(row, -np.inf))
    return sorted(best, key=lambda row: -best[row])[:K]


def test_the_recall_is_what_brute_force_finds(faiss: Any, job: Path, published: tuple[Path, dict[str, Any]]) -> None:
    folder, told = published
    bundle = Bundle.open(folder)
    index = bundle.manifest.index
    assert told["index"] == dataclasses.asdict(index)
    histories, _ = histories_of_tests(job / "log.parquet", LONGEST)
    items = pq.read_table(folder / "items.parquet")
    vectors = np.array(items["embedding"].to_pylist())
    lengths = [len(history) for history in histories]
    users = bundle.embed_users([item for history in histories for item in history], lengths)
    exact = np.argsort(-np.einsum("qkh,ih->qik", users.astype(np.float64), vectors).max(axis=2), axis=1)[:, :K]
    read = faiss.read_index(str(folder / INDEX_FILE))
    assert (read.nlist, read.nprobe, read.ntotal) == (index.num_lists, index.num_probes, len(vectors))
    assert read.metric_type == faiss.METRIC_INNER_PRODUCT

    def recall() -> float:
        return recall_of([merged_by_hand(read, user) for user in users], exact.tolist())

    assert index.recall == pytest.approx(recall(), abs=1e-4)
    assert 0.9 <= index.recall < 1
    assert (index.kind, index.faiss, index.k, index.num_queries) == ("ivf", faiss.__version__, K, len(histories))
    read.nprobe -= 1  # the fewest were chosen
    assert recall() < 0.9


def test_the_lines_of_the_readme_find_the_nearest(
    faiss: Any, job: Path, published: tuple[Path, dict[str, Any]]
) -> None:
    """With the recall that the manifest tells, in ids of the log."""
    folder, _ = published
    text = (ROOT / "din_dist" / "serving" / "README.md").read_text()
    (code,) = [block for block in text.split("```python\n")[1:] if "faiss" in block.split("```")[0]]
    lines: dict[str, Any] = {}
    exec(code.split("```")[0].replace("exports/find", str(folder)), lines)
    histories, _ = histories_of_tests(job / "log.parquet", LONGEST)
    bundle = Bundle.open(folder)
    behaviours = [item for history in histories for item in history]
    nearest = bundle.nearest(behaviours, [len(history) for history in histories], Recommend(K, exclude_history=False))
    exact = [[item.decode() for item in row] for row in nearest["item_ids"]]
    found = [lines["find"](history, K) for history in histories]
    assert recall_of(found, exact) == pytest.approx(bundle.manifest.index.recall, abs=1e-4)
    index, item_ids = faiss.read_index(str(folder / INDEX_FILE)), lines["item_ids"]
    for ours, history in zip(found, histories, strict=True):
        user = bundle.embed_users(history, [len(history)])[0]
        assert ours == [item_ids[row] for row in merged_by_hand(index, user)]


def test_a_changed_index_is_found(published: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(published[0], tmp_path / "copy"))
    check_files(folder, read_manifest(folder))
    content = bytearray((folder / INDEX_FILE).read_bytes())
    content[-1] ^= 1
    (folder / INDEX_FILE).write_bytes(content)
    with pytest.raises(InputError, match=f"{INDEX_FILE}: must be as it was published. Received: other content"):
        check_files(folder, read_manifest(folder))


@pytest.mark.parametrize("change", [{"recall": 1.5}, {"recall": "high"}, {"num_probes": -1}, {"faiss": 1}, {"k": None}])
def test_a_manifest_says_nothing_impossible_of_an_index(
    published: tuple[Path, dict[str, Any]], tmp_path: Path, change: dict[str, Any]
) -> None:
    fields = fields_of(published[0])
    assert_refused({**fields, "index": fields["index"] | change}, tmp_path, "an index of another form")


def test_a_manifest_without_an_index_has_no_entry_of_it(job: Path, commands: Preloaded, tmp_path: Path) -> None:
    done = commands.run("export", f"--output_dir={job / 'run'}", f"--export_dir={tmp_path / 'export'}")
    assert done.returncode == 0, done.stderr
    assert "index" not in json.loads(done.stdout.splitlines()[-1])
    assert "index" not in fields_of(tmp_path / "export")
    assert read_manifest(tmp_path / "export").index is None
    assert not (tmp_path / "export" / INDEX_FILE).exists()


def test_a_recall_that_is_not_reached_publishes_nothing(
    faiss: Any, job: Path, commands: Preloaded, tmp_path: Path
) -> None:
    done = commands.run("export", *words(job, tmp_path / "exports" / "found", "--index_recall=1"))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (*_, line) = done.stderr.splitlines()
    assert line.startswith("error: --index_recall: must be reached by reading half of the index's ")
    assert "lists. Received: 1, and 0.9" in line
    assert line.endswith("Nothing was published.")
    assert not [*(tmp_path / "exports").iterdir()]


def test_small_catalogues_have_no_index(faiss: Any, commands: Preloaded, tmp_path: Path) -> None:
    write_job(small_config(tmp_path, model=ModelKind.YOUTUBE_DNN))
    done = commands.run("export", *words(tmp_path, tmp_path / "found"))
    assert_one_line(
        done,
        "--index: is for 1,000 items or more. Received: 30. Drop it: nearest, which is exact, is as fast.",
    )
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--index=ivf", "--index_recall=0"), "--index_recall: must be above 0 and at most 1. Received: 0.0. For"),
        (("--index=ivf", "--index_recall=1.1"), "--index_recall: must be above 0 and at most 1. Received: 1.1. For"),
        (("--index_recall=0.9",), "--index_recall: is for an index. Received: 0.9. Give --index=ivf, or drop it."),
    ],
)
def test_flags_that_do_not_fit(
    job: Path, commands: Preloaded, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    done = commands.run("export", f"--output_dir={job / 'run'}", f"--export_dir={tmp_path / 'found'}", *flags)
    assert_one_line(done, message)
    assert not (tmp_path / "found").exists()


def test_models_that_rank_have_no_index(commands: Preloaded, tmp_path: Path) -> None:
    write_job(small_config(tmp_path))
    done = commands.run("export", *words(tmp_path, tmp_path / "found"))
    assert_one_line(done, "--index: is for jobs of models that find items, and --model=din ranks given ones. Received:")
    assert not (tmp_path / "found").exists()


def test_without_faiss_a_line_says_what_to_install(job: Path, tmp_path: Path) -> None:
    (tmp_path / "faiss.py").write_text("raise ModuleNotFoundError(\"No module named 'faiss'\")")
    command = [sys.executable, "-m", "din_dist.cli.export", *words(job, tmp_path / "found")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert_one_line(
        done,
        "--index: ivf needs Faiss. Received: \"No module named 'faiss'\". "
        "Run: pip install -c launch/constraints.txt faiss-cpu.",
    )
    assert not (tmp_path / "found").exists()
