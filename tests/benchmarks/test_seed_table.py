"""The table of choices within models that find items: its numbers, and that it trains what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.seed_table import Judged, alike, stretches, table
from tests.support.repository import ROOT
from tests.support.small_log import write_log


def judged(recall: float, ndcg: float, cosine: float | None = None) -> Judged:
    return Judged(recall, ndcg, 0.0, 7, cosine, 2.4, 3.6)


def test_each_row_is_compared_with_its_base_within_a_seed() -> None:
    found = {
        "sr_gnn": [judged(0.2, 0.1), judged(0.4, 0.3)],
        "session_query=mean": [judged(0.3, 0.1), judged(0.7, 0.2)],
        "comirec_sa": [judged(0.5, 0.25, 0.25)],
        "comirec_sa, evaluate_with=readout": [judged(0.25, 0.2)],
    }
    assert table(found).splitlines()[2:] == [
        "| `sr_gnn` | 0.3000 (0.1414) |  | 0.2000 (0.1414) |  |  | 2 | 4 | 7 |",
        "| `session_query=mean` | 0.5000 (0.2828) | +0.2000 (0.1414) | 0.1500 (0.0707) | -0.0500 (0.0707) |"
        "  | 2 | 4 | 7 |",
        "| `comirec_sa` | 0.5000 |  | 0.2500 |  | 0.25 | 2 | 4 | 7 |",
        "| `comirec_sa, evaluate_with=readout` | 0.2500 | -0.2500 | 0.2000 | -0.0500 |  | 2 | 4 | 7 |",
    ]


def test_interests_are_alike_by_their_mean_cosine() -> None:
    vectors = np.array([[[1, 0], [0, 2], [3, 0]], [[1, 1], [2, 2], [5, 5]], [[0, 0], [0, 0], [0, 0]]], np.float32)
    assert alike(vectors) == pytest.approx((1 / 3 + 1) / 2)  # a user without history does not count
    assert alike(vectors[:, :1]) is None


def test_stretches_have_each_update_once() -> None:
    assert [*stretches(5, 2)] == [range(1, 3), range(3, 5), range(5, 6)]
    assert [*stretches(5, 0)] == [range(1, 6)]


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    given = [
        f"--data_path={folder / 'log.parquet'}",
        f"--data_dir={folder / 'prepared'}",
        f"--results_dir={folder / 'results'}",
        *("--dataset=event_log", "--split=leave_two_out", "--max_history_length=8", "--embedding_dim=6,4"),
        *("--global_batch_size=16", "--num_sampled=8", "--noxla", "--max_steps=3", "--evaluate_every_steps=2"),
    ]
    command = [sys.executable, "-m", "tests.benchmarks.seed_table", *given, *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_runs_of_a_small_log(tmp_path: Path) -> None:
    write_log(tmp_path / "log.parquet")
    variants = "--variants=youtube_dnn,readout=soft normalize_vectors"
    done = run(tmp_path, "--seeds=2", variants)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {row: len(seeds) for row, seeds in found.items()} == {
        "youtube_dnn": 2,
        "readout=soft normalize_vectors": 2,
        "readout=soft normalize_vectors, evaluate_with=readout": 2,
    }
    for seeds in found.values():
        assert seeds[0] != seeds[1]
        for one in seeds:
            assert 0 < one["recall"] <= 1
            assert one["best_step"] in (2, 3)
    soft = found["readout=soft normalize_vectors"][0]
    assert -1 <= soft["alike"] <= 1
    path = tmp_path / "results" / "0-1234.json"
    path.write_text(path.read_text().replace('"best_step": ', '"best_step": 9'))
    again = json.loads(run(tmp_path, "--seeds=1", variants).stdout.splitlines()[-1])
    assert again["youtube_dnn"][0]["best_step"] >= 92  # what lies there is not run again
    assert again["readout=soft normalize_vectors"] == found["readout=soft normalize_vectors"][:1]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--max_steps=0", "--max_steps: must be at least 1. Received: 0. For example 500."),
        ("--max_queries=0", "--max_queries: must be at least 1. Received: 0. For example 3000."),
        ("--variants=din", "--variants: must be of youtube_dnn; comirec_sa; "),
    ],
)
def test_flags_that_do_not_fit(tmp_path: Path, flag: str, message: str) -> None:
    done = run(tmp_path, flag)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
