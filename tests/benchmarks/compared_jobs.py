"""Trains several jobs, and compares what they reach and how fast they are; for the benchmarks beside this file."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.repository import ROOT

ROUNDS, STEPS = 3, 60


def quick_flags(folder: Path, name: str) -> list[str]:
    """Returns the flags of the default job with two workers, whose output is FOLDER/NAME."""
    flags = [f"--flagfile={ROOT / 'launch/flags/quick.flags'}", "--num_workers=2", "--metrics_port=-1"]
    return [*flags, f"--data_dir={folder / 'data'}", f"--output_dir={folder / name}"]


def compare(folder: Path, jobs: Mapping[str, Sequence[str]], what: str) -> None:
    """Trains jobs in FOLDER/NAME and prints a table. A job that is finished there stays.

    GAUC and AUC of the test events have bootstrap intervals. The speed is that of one process, measured in turn. The
    bytes are those that the chief handed to the exchange between workers, for each example of the job.

    Args:
        folder: of all jobs.
        jobs: name -> flags.
        what: the heading of the names.
    """
    for name, words in jobs.items():
        if not (folder / name / "summary.json").exists():
            _run([str(ROOT / "launch" / "train.sh"), *words])
    speeds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(ROUNDS):
        for name, words in jobs.items():
            of_one = [word for word in words if not word.startswith("--num_workers")]
            found = _run([*_module("benchmark"), *of_one, f"--benchmark_steps={STEPS}"])
            speeds[name].append(json.loads(found.splitlines()[-1])["examples_per_second"])
    columns = [what, "validation GAUC", "test GAUC", "test AUC", "examples/s", "bytes an example"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in jobs:
        summary = json.loads((folder / name / "summary.json").read_text())
        words = [*_module("evaluate"), f"--output_dir={folder / name}", "--rank_against=none"]
        test = json.loads(_run(words).splitlines()[-1])
        columns = [f"{summary['best_validation_gauc']:.4f}", _interval(test, "gauc"), _interval(test, "auc")]
        sent = _bytes_per_example(summary["metrics"])
        print(f"| {name} | {' | '.join(columns)} | {statistics.median(speeds[name]):,.0f} | {sent:,.0f} |", flush=True)
        if others := {key: value for key, value in summary.items() if key.startswith("test_auc_")}:
            print(f"{name}: {others}", file=sys.stderr, flush=True)


def _bytes_per_example(metrics: Mapping[str, float]) -> float:
    sent = sum(value for name, value in metrics.items() if name.startswith("din_dist_exchanged_bytes_total"))
    return sent / metrics["din_dist_examples_total"]


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", f"din_dist.cli.{name}"]


def _interval(found: dict, metric: str) -> str:
    low, high = found["intervals"][metric]
    return f"{found[metric]:.4f} ({low:.4f} to {high:.4f})"


def _run(words: list[str]) -> str:
    """Returns what a command says on stdout."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return done.stdout
