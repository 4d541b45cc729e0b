"""Writes what a finished job leaves, without training: checkpoints of random weights on the events of `small_log`.

model, store = write_job(small_config(tmp_path), steps=(3, 7))
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow.parquet as pq

from din_dist.assembly import make_model
from din_dist.config import Config
from din_dist.data.event_store import EventStore
from din_dist.data.prepared import prepare
from din_dist.data.splits import split_examples
from din_dist.data.trained_items import trained_items
from din_dist.distributed.runtime import Runtime
from din_dist.models.ranking_model import RankingModel
from din_dist.training.checkpoint import CheckpointStore
from din_dist.training_state import TrainingState
from tests.support.reference.compare import randomise


def write_job(config: Config, steps: tuple[int, ...] = (7,)) -> tuple[RankingModel, EventStore]:
    """Writes the output folder of `config` with a checkpoint for each step; returns the last model and the data."""
    store = prepare(config.data)
    trained = trained_items(store, config.data, split_examples(store, config.data))
    row_of_item = trained.row_of_item if trained else None
    model = make_model(
        config.model, store.facts, store.item_features, seed=0, row_of_item=row_of_item, features=store.features
    )
    checkpoints = CheckpointStore(config, store.facts.fingerprint, Runtime())
    for step in steps:
        randomise(model, seed=step)
        checkpoints.save({weight.path: weight.value for weight in model.weights}, TrainingState(step=step))
    (Path(config.job.output_dir) / "flags.txt").write_text(flagfile_of(config))
    return model, store


def flagfile_of(config: Config) -> str:
    """Returns the text of flags.txt as a job writes it: only settings that differ from their defaults."""
    lines = []
    for _, part in config.parts():
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if "help" in field.metadata and value != field.default:
                lines.append(f"--{field.name}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return "\n".join(lines) + "\n"


def histories_of_tests(path: Path, longest: int) -> tuple[list[list[str]], list[str]]:
    """Returns what the test split asks, read from the log itself: histories, and the candidate of each.

    The candidate is the user's last item. Users come in the order of their first row in the log.

    Args:
        longest: how many items a history keeps, the newest.
    """
    events: dict[str, list[tuple[int, str]]] = {}
    for row in pq.read_table(path).to_pylist():
        events.setdefault(row["user_id"], []).append((row["timestamp"], row["item_id"]))
    items = [[item for _, item in sorted(of_user, key=lambda event: event[0])] for of_user in events.values()]
    items = [of_user for of_user in items if len(of_user) > 1]
    return [of_user[:-1][-longest:] for of_user in items], [of_user[-1] for of_user in items]
