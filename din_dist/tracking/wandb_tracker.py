"""Writes to Weights & Biases, online or offline."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from din_dist.tracking.run import TrackedRun

_START_SECONDS = 30


class WandbTracker:
    """A run of Weights & Biases. The experiment is its project, and the parent its group.

    Args:
        run: `uri` is the address of a server; empty: wandb's default.
        folder: of the job; the files of the run go to its folder `wandb`.
    """

    def __init__(self, run: TrackedRun, folder: Path) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._folder = folder
        own: dict[str, Any] = {"base_url": run.uri} if run.uri else {}
        settings = wandb.Settings(silent=True, console="off", init_timeout=_START_SECONDS, x_disable_stats=True, **own)
        self._run = wandb.init(
            project=run.experiment,
            name=run.name,
            id=run.id or secrets.token_hex(8),
            resume="allow",
            group=run.parent or None,
            dir=str(folder),
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")  # wandb's own count refuses to go back, as resumed jobs do

    @property
    def run_id(self) -> str:
        return str(self._run.id)

    def parameters(self, values: Mapping[str, str]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def curves(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def artefact(self, path: Path) -> None:
        self._run.save(str(path), base_path=str(path.parent), policy="now")

    def end(self, outcome: str) -> None:
        self._run.summary["outcome"] = outcome
        self._run.finish(exit_code=0 if outcome == "done" else 1)

    def close(self) -> None:
        self._run.finish()
