"""What groups of features are worth on The Complete Journey: `python -m tests.benchmarks.feature_groups FOLDER`.

Trains the job of launch/flags/quick.flags with each group of the features of complete_journey_features.toml beside it,
with two workers, in FOLDER/GROUP; a job that is finished there stays. Prints GAUC and AUC of the test events
with bootstrap intervals, and the speed of one process, measured in turn. Takes half an hour.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.repository import ROOT

GROUPS: dict[str, tuple[str, ...]] = {  # by the owners of the features
    "ids": (),
    "item": ("item",),
    "item_user": ("item", "user"),
    "item_user_context": ("item", "user", "context"),
    "all": ("item", "user", "context", "candidate"),
    "item_context_promotions": ("item", "context", "candidate"),
    "promotions": ("candidate",),
}
ROUNDS, STEPS = 3, 60


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    flags = {name: flags_of(folder, name, owners) for name, owners in GROUPS.items()}
    for name, words in flags.items():
        if not (folder / name / "summary.json").exists():
            run([str(ROOT / "launch" / "train.sh"), *words])
    speeds: dict[str, list[float]] = {name: [] for name in GROUPS}
    for _ in range(ROUNDS):
        for name, words in flags.items():
            found = run([*module("benchmark"), *words, f"--benchmark_steps={STEPS}"])
            speeds[name].append(json.loads(found.splitlines()[-1])["examples_per_second"])
    print("| features | validation GAUC | test GAUC | test AUC | examples/s |\n|---|---|---|---|---|")
    for name in GROUPS:
        summary = json.loads((folder / name / "summary.json").read_text())
        words = [*module("evaluate"), f"--output_dir={folder / name}", "--rank_against=none"]
        test = json.loads(run(words).splitlines()[-1])
        columns = [f"{summary['best_validation_gauc']:.4f}", interval(test, "gauc"), interval(test, "auc")]
        print(f"| {name} | {' | '.join(columns)} | {statistics.median(speeds[name]):,.0f} |", flush=True)


def flags_of(folder: Path, name: str, owners: Sequence[str]) -> list[str]:
    """Writes the declarations of some owners, and returns the flags of their job."""
    flags = [f"--flagfile={ROOT / 'launch/flags/quick.flags'}", "--num_workers=2", "--metrics_port=-1"]
    flags += [f"--data_dir={folder / 'data'}", f"--output_dir={folder / name}", "--features="]
    if owners:
        declared = (ROOT / "launch/flags/complete_journey_features.toml").read_text()
        tables = re.split(r"\n(?=\[)", declared)[1:]
        path = folder / f"{name}.toml"
        path.write_text("\n".join(table for table in tables if re.search(f'of = "({"|".join(owners)})"', table)))
        flags[-1] += str(path)
    return flags


def module(name: str) -> list[str]:
    return [sys.executable, "-m", f"din_dist.cli.{name}"]


def interval(found: dict, metric: str) -> str:
    low, high = found["intervals"][metric]
    return f"{found[metric]:.4f} ({low:.4f} to {high:.4f})"


def run(words: list[str]) -> str:
    """Returns what a command says on stdout."""
    if "din_dist.cli.benchmark" in words:
        words = [word for word in words if not word.startswith("--num_workers")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
