"""Trains as the command `train` does, in this process."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from din_dist.api.arguments import check
from din_dist.api.model import KerasBehaviourModel
from din_dist.api.ranking import KerasDIN, KerasMeanPooling
from din_dist.api.retrieval import KerasComiRecDR, KerasComiRecSA, KerasMIND, KerasSRGNN, KerasYouTubeDNN
from din_dist.cli import flags
from din_dist.cli.saved_job import config_of, trained_model
from din_dist.cli.training_process import TrainingProcess
from din_dist.config import Config, UnknownItem
from din_dist.data.prepared import open_prepared, prepare
from din_dist.distributed.runtime import Runtime
from din_dist.features.spec import Owner
from din_dist.files import read_record
from din_dist.text import parse_json
from din_dist.training.output_dir import OutputDirLock
from din_dist.training.trainer import NoSignals

_CLASSES: tuple[type[KerasBehaviourModel], ...] = (
    KerasDIN,
    KerasMeanPooling,
    KerasYouTubeDNN,
    KerasComiRecSA,
    KerasComiRecDR,
    KerasMIND,
    KerasSRGNN,
)


def settings(*flagfiles: str, **values: Any) -> Config:
    """Returns the settings of a job as its command line would give them.

    Args:
        flagfiles: paths, or names of ours: `settings("recommended", data_path="clicks.parquet")`.
        values: by the names of flags, which `din-dist train --help` lists. They come after flagfiles.

    Raises:
        InputError: there is no such setting, or a value breaks its rule.
    """
    return flags.config_from_flags(flags.flags_of(values, flagfiles))


@dataclasses.dataclass(frozen=True)
class TrainedJob:
    """The things that a job has left.

    Attributes:
        config: its settings.
        summary: the content of summary.json.
    """

    config: Config
    summary: Mapping[str, Any]

    @classmethod
    def of(cls, output_dir: str | os.PathLike) -> TrainedJob:
        """Returns the result of a job that ended before, here or as a command.

        Args:
            output_dir: its folder.

        Raises:
            InputError: the folder has no finished job.
        """
        path = Path(output_dir) / "summary.json"
        check(path.is_file(), "output_dir", "must have a finished job", str(output_dir), "Train it to its end.")
        return cls(config_of(Path(output_dir)), parse_json(read_record(path)))

    @property
    def output_dir(self) -> Path:
        """The folder of checkpoints, metrics and records. The other commands take it as `--output_dir`."""
        return Path(self.config.job.output_dir)

    @functools.cached_property
    def model(self) -> KerasBehaviourModel:
        """The model as one of Keras, with its best weights by validation, or the newest where there is none.

        Raises:
            InputError: it has inputs that only the trainer's has: several labels or histories, features of behaviours.
        """
        config = self.config
        store = open_prepared(config.data)
        owners = {stored.encoding.spec.owner for stored in store.features.values()}
        has_more = {
            "label_columns": bool(config.data.label_columns),
            "histories": bool(store.facts.histories),
            "features of behaviours": Owner.HISTORY in owners,
            "unknown_item": config.data.unknown_item is not UnknownItem.UNTRAINED,
            "example_age": config.model.example_age,
        }
        names = [name for name, given in has_more.items() if given]
        remedy = "Use the commands evaluate, export and predict."
        check(not names, "model", "is for jobs of one label and one history", names, remedy)
        trained, _ = trained_model(config, store)
        kind = next(each for each in _CLASSES if each.KIND is config.model.model)
        model = kind(
            store.facts.num_items,
            store.item_features,
            config.model.embedding_dim,
            store.features,
            seed=config.job.seed,
            **{name: getattr(config.model, name) for name in kind.SETTINGS},
        )
        for weight, value in zip(model.core.weights, trained.weights, strict=True):
            weight.assign(value)
        return model


def train(config: Config) -> TrainedJob:
    """Trains a job in this process, alone, as the command `train` does. Data are prepared before if they are not.

    A job whose `output_dir` has a checkpoint is resumed. After KeyboardInterrupt, the next call goes on from the last
    checkpoint. TensorFlow keeps the threads that it has.

    Args:
        config: all settings, from `settings` or built from the classes of `din_dist.config`.

    Raises:
        InputError: a setting does not fit the data, or another job is at work in the folder.
    """
    started = time.perf_counter()
    prepare(config.data)
    lock = OutputDirLock(Path(config.job.output_dir))
    try:
        num_threads, flagfile = len(os.sched_getaffinity(0)), flags.flagfile_of(config)
        process = TrainingProcess(config, Runtime(), lock, NoSignals(), num_threads, flagfile, started)
        summary = process.run()
    finally:
        lock.release()
    return TrainedJob(config, parse_json(summary or "{}"))
