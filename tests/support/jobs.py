"""Runs the cases of `train_cases` on one or several workers, and compares what the runs leave.

train(tmp_path, "alone", world_size=1)
train(tmp_path, "both", world_size=2)
assert_same_training(tmp_path, "both", "alone", case="sgd")
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from din_dist.training.checkpoint import SavedCheckpoint
from tests.support.patience import PATIENCE
from tests.support.repository import ROOT
from tests.support.train_cases import CASES

STEPS = 60


def train(
    folder: Path,
    run: str,
    world_size: int,
    max_steps: int = STEPS,
    cases: tuple[str, ...] = tuple(CASES),
    variables: Mapping[str, str] | None = None,
) -> None:
    """Trains `cases` for `max_steps` updates; the results lie in `folder`/`run`/CASE.

    Args:
        variables: environment variables, beside those of this process.
    """
    start(world_size, "tests.support.train_cases", str(folder), run, str(max_steps), *cases, variables=variables)


def start(world_size: int, module: str, *arguments: str, variables: Mapping[str, str] | None = None) -> str:
    """Runs a module to its end, alone or under horovodrun, and returns its stdout.

    Args:
        variables: environment variables, beside those of this process.
    """
    command = [sys.executable, "-m", module, *arguments]
    if world_size > 1:
        launcher = Path(sys.executable).with_name("horovodrun")
        # Other jobs of the tests may take the cores for longer than the 30 s after which a rank counts as lost.
        command = [str(launcher), "--gloo", "--gloo-timeout-seconds", "280", "-np", str(world_size), *command]
    environment = {**os.environ, **(variables or {})}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, _ends_of(done.stdout + done.stderr)
    return done.stdout


def _ends_of(output: str) -> str:
    """Returns the last lines of each rank and of the launcher, but no steps: what came first is what went wrong."""
    lines_of: dict[str, list[str]] = {}
    for line in output.splitlines():
        rank = re.match(r"\[\d+\]", line)
        if not re.search(r"step \d+ of|<std...>:\s*$", line):
            lines_of.setdefault(rank[0] if rank else "launcher", []).append(line)
    return "\n".join("\n".join(lines[-100:]) for lines in lines_of.values())


def losses(folder: Path, run: str, case: str) -> np.ndarray:
    """Returns the loss of each update, in order."""
    return np.array([line["loss"] for line in records(folder, run, case, "train")])


def records(folder: Path, run: str, case: str, kind: str) -> list[dict]:
    """Returns the records of one kind from metrics.jsonl."""
    lines = map(json.loads, (folder / run / case / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def weights(folder: Path, run: str, case: str) -> dict[str, np.ndarray]:
    """Returns the whole arrays of the checkpoint of step `STEPS`, by the name of the file of a whole one."""
    (checkpoint,) = (folder / run / case / "checkpoints").glob(f"step-{STEPS:012d}")
    names = json.loads((checkpoint / "manifest.json").read_text())["variables"]
    saved = SavedCheckpoint(checkpoint)
    return {f"{name.replace('/', '.')}.npy": saved.read(name) for name in names}


def assert_same_training(folder: Path, run: str, expected: str, case: str, loose: float = 1) -> None:
    """Asserts that two runs had the same losses, and the same weights after them; `loose` widens the tolerances."""
    assert len(losses(folder, run, case)) == STEPS
    np.testing.assert_allclose(losses(folder, run, case), losses(folder, expected, case), rtol=2e-4 * loose)
    assert_same_weights(weights(folder, run, case), weights(folder, expected, case), tolerance=1e-3 * loose)


def assert_same_weights(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    """Asserts that weights are equal; `tolerance` is relative to the largest weight of each variable."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        if "attention.scorer.output.bias" in name:
            continue  # softmax cancels it: its gradient is rounding error, which Adam scales up to whole steps
        scale = max(np.abs(weight).max(), 1e-3)
        np.testing.assert_allclose(found[name] / scale, weight / scale, rtol=0, atol=tolerance, err_msg=name)
